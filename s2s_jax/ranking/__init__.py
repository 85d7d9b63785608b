"""Ranking all items for users, and evaluating the ranking."""
