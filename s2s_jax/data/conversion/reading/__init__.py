"""Files and databases that a conversion reads."""
