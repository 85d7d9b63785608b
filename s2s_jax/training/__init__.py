"""Mesh, optimizer, train step, checkpoints and metrics."""
