"""The checkpoints of a run: saving, restoring, and which ones are kept."""
