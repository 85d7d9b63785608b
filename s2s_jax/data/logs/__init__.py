"""ORC logs: finding files, reading footers and stripes, and writing logs."""
