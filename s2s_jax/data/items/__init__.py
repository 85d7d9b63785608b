"""The items of a log: their counts, the catalogue, neighbours, and the items that users have seen."""
