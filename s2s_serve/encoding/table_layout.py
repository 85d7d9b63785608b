"""The order of the rows in a bucket table.

A table has 256 segments. Bucket b is in segment b mod 256 at place b div 256, so that small ids, which
are often the popular ones, are spread over all segments.
"""

from typing import Any

# Also the maximum number of devices in training. The number of devices must divide it.
NUM_SEGMENTS = 256


def row_of_bucket(bucket: Any, segment_rows: int) -> Any:
    """Return the rows of buckets, NumPy or JAX arrays of integers; buckets must not be negative.

    Examples:
      >>> [row_of_bucket(bucket, segment_rows=2) for bucket in (0, 1, 256)]
      [0, 2, 1]
    """
    return bucket % NUM_SEGMENTS * segment_rows + bucket // NUM_SEGMENTS


def bucket_of_row(row: Any, segment_rows: int) -> Any:
    """Return the buckets of rows; those after the last bucket of a table stand for no bucket.

    Examples:
      >>> [bucket_of_row(row, segment_rows=2) for row in (0, 2, 1)]
      [0, 1, 256]
    """
    return row % segment_rows * NUM_SEGMENTS + row // segment_rows
