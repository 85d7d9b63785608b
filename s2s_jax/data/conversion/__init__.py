"""Event logs of other formats → ORC logs: finding files, parsing, choosing columns, grouping by user."""
