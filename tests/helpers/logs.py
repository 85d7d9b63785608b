"""Small ORC logs for tests."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.orc


def write_log(
    path: Path,
    rows: list[dict[str, Any]],
    types: dict[str, pa.DataType] | None = None,
    stripe_rows: int | None = None,
    compression: str = "uncompressed",
) -> Path:
    """Writes rows (dictionaries with the same keys) as an ORC file.

    Args:
      path: the file; its directory is created.
      rows: the rows; may be empty if `types` is given.
      types: types of all columns; by default guessed by pyarrow.
      stripe_rows: rows per stripe (uncompressed only); by default all rows are in one stripe.
      compression: compression of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(types) if types is not None else list(rows[0])
    columns = {name: [row[name] for row in rows] for name in names}
    table = pa.table(
        {name: pa.array(column, types and types[name]) for name, column in columns.items()}
    )
    # pyarrow ends a stripe after a write if it has flushed more than stripe_size; compression would
    # delay that.
    assert stripe_rows is None or compression == "uncompressed"
    step = stripe_rows or max(len(rows), 1)
    with pyarrow.orc.ORCWriter(
        str(path),
        stripe_size=1 if stripe_rows else 2**26,
        batch_size=step,
        compression=compression,
    ) as writer:
        if not rows:
            writer.write(table)
        for start in range(0, len(rows), step):
            writer.write(table.take(pa.array(range(start, min(start + step, len(rows))))))
    return path
