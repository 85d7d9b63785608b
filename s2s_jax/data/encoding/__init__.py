"""Columns of a log → encoded ids in blocks, according to the features."""
