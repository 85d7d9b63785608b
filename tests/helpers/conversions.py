"""Sources for conversions."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet

from s2s_jax.data.conversion.convert import convert
from s2s_jax.data.conversion.settings import Settings

FEATURES = ("item_id", "cate_id", "behavior_id")


NAMES = ("user_id", *FEATURES, "timestamp")


def run(out: Path, *paths: Path, **changes) -> dict:
    """Converts, and returns the lists of each user in the order of the log."""
    done = convert(Settings(paths=tuple(map(str, paths)), output=out, **changes))
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in done.paths)
    rows = [row for path in done.paths for row in pyarrow.orc.read_table(str(path)).to_pylist()]
    assert len(rows) == done.rows
    users = {row.pop("user_id"): row for row in rows}
    assert len(users) == done.rows
    assert list(users) == sorted(users)
    assert done.events == sum(len(row["timestamp"]) for row in rows)
    return users


def write_csv(path: Path, rows: list[dict], header: bool = True, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n", **how)
        if header:
            writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_parquet(path: Path, rows: list[dict], types: dict | None = None) -> Path:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    arrays = {name: pa.array(column, types and types[name]) for name, column in columns.items()}
    pyarrow.parquet.write_table(pa.table(arrays), path)
    return path


def events(**columns) -> list[dict]:
    """Events with the usual columns; `columns` sets some of them."""
    rows = len(next(iter(columns.values())))
    usual = {name: [1] * rows for name in NAMES} | columns
    return [{name: column[i] for name, column in usual.items()} for i in range(rows)]
