"""Order of rows, windows, packing and reading: which rows a batch has, and how they are arranged."""
