"""Finds the best items for users: exactly, or with an index."""
