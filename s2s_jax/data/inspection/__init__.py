"""Statistics and warnings about a log, for people to read."""
