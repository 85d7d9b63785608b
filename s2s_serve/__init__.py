"""Answers "what next?" from an export of s2s_jax, without JAX."""
