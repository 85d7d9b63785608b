"""The causal transformer over event embeddings, and its loss."""
