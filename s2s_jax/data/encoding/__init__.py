"""Turns columns of a log into blocks of encoded ids, according to the features."""
