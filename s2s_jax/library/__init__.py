"""What `import s2s_jax` offers to Python programs; the package's `__init__` names it."""
