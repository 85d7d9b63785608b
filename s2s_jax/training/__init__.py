"""The training loop, and what happens between steps."""
