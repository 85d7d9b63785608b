"""ORC logs: files, footers, stripes, and writing them."""
