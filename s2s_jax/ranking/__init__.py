"""Scoring all items, and how well that does."""
