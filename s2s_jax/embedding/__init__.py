"""Embedding tables: layout, lookup, and the way back for gradients."""
