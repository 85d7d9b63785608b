"""The directory of a run: configuration, checkpoints and metrics."""
