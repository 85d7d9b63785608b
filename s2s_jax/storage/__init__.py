"""Files of object stores and HDFS: their addresses, and reading them in ranges."""
