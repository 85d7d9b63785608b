"""From ORC files to padded NumPy batches. Nothing here imports JAX."""
