"""Ranks the items of a catalogue for users, and evaluates the ranking."""
