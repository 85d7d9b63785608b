"""Sequence models of user behaviour, from ORC event logs to next-event predictions, in JAX."""

from s2s_jax.version import __version__

__all__ = ["__version__"]
