"""From ORC files to padded NumPy batches. Nothing in this room imports JAX."""
