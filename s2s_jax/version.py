"""The version of s2s_jax, for the package, its checkpoints and `s2s_jax.__version__`."""

__version__ = "0.2.0"
