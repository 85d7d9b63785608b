"""Files in object stores and HDFS: reading them in large ranges."""
