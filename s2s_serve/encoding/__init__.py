"""Turns histories into the ids of a model, in training and in serving."""
