"""The items of a log: their counts, the catalogue, and the items that users have seen."""
