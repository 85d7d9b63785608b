"""The causal transformer over embedded events, and its loss."""
