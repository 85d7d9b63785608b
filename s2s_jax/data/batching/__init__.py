"""Which rows a batch has, and how they lie in it."""
