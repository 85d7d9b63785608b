"""Embedding tables: their layout, the look-up of ids, and the sums of gradients."""
