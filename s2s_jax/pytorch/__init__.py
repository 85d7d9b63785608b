"""Weights of the RecIS example in PyTorch: its tensors, and files of them."""
