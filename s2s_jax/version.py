"""The version of s2s_jax. The package, its checkpoints and `s2s_jax.__version__` have it from here."""

__version__ = "0.2.0"
