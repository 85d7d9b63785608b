"""Files for spark-submit."""
