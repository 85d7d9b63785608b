"""The items of a log: counted, listed, seen."""
