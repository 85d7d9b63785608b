"""Whole jobs, without a command line."""
