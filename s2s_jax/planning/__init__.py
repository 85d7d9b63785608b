"""Chooses a first configuration for a log and a machine, and measures what to expect from it."""
