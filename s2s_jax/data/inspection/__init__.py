"""What a log is like, for people."""
