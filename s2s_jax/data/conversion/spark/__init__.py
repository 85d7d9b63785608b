"""Carries out a conversion with Spark: pieces of the sources in tasks, which DuckDB reads."""
