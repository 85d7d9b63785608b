"""Embedding tables: their layout, look-up, and the way back for gradients."""
