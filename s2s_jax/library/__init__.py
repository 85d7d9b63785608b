"""The interface for Python programs; the package's `__init__` exports its names."""
