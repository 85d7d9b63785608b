"""Converts event logs to ORC logs: finds files, parses them, and groups events by user."""
