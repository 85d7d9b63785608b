"""Sequence models of user behaviour, from ORC event logs to next-event predictions, in JAX."""

__version__ = "0.1.0"
