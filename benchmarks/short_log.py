"""Cuts the rows of a log into short ones: a log of many users with few events each, to measure on.

    python benchmarks/short_log.py ../shared/data/ml-1m /tmp/short --rows 30000

Each row becomes consecutive pieces of 5 to 12 events (uniform, by --seed), each piece a user of its own;
pieces shorter than --fewest are left out. --rows keeps a random sample of the pieces. All columns stay
as they are, except that user_id numbers the pieces.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import orc


def cut(table: pa.Table, fewest: int, most: int, rng: np.random.Generator) -> pa.Table:
    """The rows of `table`, whose columns but user_id are lists of equal lengths, in pieces."""
    names = [name for name in table.column_names if name != "user_id"]
    columns = [table.column(name).combine_chunks() for name in names]
    offset_R = columns[0].offsets.to_numpy()
    pieces = []
    for begin, end in itertools.pairwise(offset_R):
        while end - begin >= fewest:
            size = min(int(rng.integers(fewest, most + 1)), int(end - begin))
            pieces.append((begin, begin + size))
            begin += size
    begin_P, end_P = np.array(pieces, np.int64).reshape(-1, 2).T
    size_P = end_P - begin_P
    offset_P = np.concatenate([[0], np.cumsum(size_P)])
    taken = np.repeat(begin_P - offset_P[:-1], size_P) + np.arange(offset_P[-1])
    lists = [
        pa.ListArray.from_arrays(
            pa.array(offset_P, pa.int32()), column.values.take(pa.array(taken))
        )
        for column in columns
    ]
    return pa.table(dict(zip(names, lists, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--fewest", type=int, default=5)
    parser.add_argument("--most", type=int, default=12)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    rng = np.random.default_rng(settings.seed)
    files = sorted(settings.log.glob("*.orc"))
    parts = [cut(orc.read_table(file), settings.fewest, settings.most, rng) for file in files]
    table = pa.concat_tables(parts)
    if settings.rows is not None:
        table = table.take(np.sort(rng.permutation(len(table))[: settings.rows]))
    table = table.add_column(0, "user_id", pa.array(np.arange(len(table))))
    settings.output.mkdir(parents=True, exist_ok=True)
    orc.write_table(table, settings.output / "part-0.orc", compression="zstd")
    print(f"{len(table):,} rows in {settings.output}")


if __name__ == "__main__":
    main()
