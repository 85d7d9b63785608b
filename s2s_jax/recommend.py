"""Top-K items: `python -m s2s_jax.recommend --config FILE --input LOGS --output recs.parquet`.

Reads logs in the format of training, whole rows as histories, and writes for each row the items of the
catalogue (by default the items of `io.data_paths`) that the user is most likely to go on with. Stripes
are written one by one into `OUTPUT.parts` and put together at the end, so a command that was interrupted
goes on where it stopped. Events of items that are not in the catalogue are counted, and those of items
that have no row in a table that grows.

Shapes: U users, K items of a list.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s2s_jax.config import Config, ConfigParser
from s2s_jax.data import catalogue as catalogues
from s2s_jax.data import orc
from s2s_jax.data.histories import Histories, HistoryReader, ItemNumbers
from s2s_jax.data.index import FileIndex, index_files
from s2s_jax.errors import EXIT_DONE, UserError, run_door
from s2s_jax.serving import ranking
from s2s_jax.serving.evaluation import item_vectors, user_vectors
from s2s_jax.serving.restored import Restored, restore
from s2s_jax.training.mesh import make_mesh

# Where a finished stripe keeps its counts.
_COUNTS = b"s2s_jax.counts"


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: see `errors.run_door`.
    """
    parser = ConfigParser("s2s_jax.recommend", "--config FILE --input LOGS --output FILE")
    parser.add_argument("--input", required=True, help="ORC files and directories, comma-separated")
    parser.add_argument("--output", required=True, type=Path, help="Parquet file")
    parser.add_argument("--top_k", type=int, default=100, help="items for each row")
    parser.add_argument("--user_column", help="column of the logs that names the user")
    parser.add_argument("--catalogue", help="Parquet of data.catalogue; default: made from the log")
    parser.add_argument(
        "--checkpoint", default="best", help="best (by eval.metric), newest, or a step"
    )
    parser.add_argument(
        "--keep_seen", action="store_true", help="also recommend items of the history"
    )
    read = parser.read(argv)
    if read is None:
        return EXIT_DONE
    arguments, config = read
    if arguments.top_k < 1:
        raise UserError(f"--top_k: expected at least 1, found {arguments.top_k}")
    mesh = make_mesh()
    run = restore(config, mesh, arguments.checkpoint)
    logs = dataclasses.replace(config.io, data_paths=arguments.input)
    index = index_files(dataclasses.replace(config, io=logs))
    if config.known_of_next:
        print(
            f"note: {', '.join(config.known_of_next)} tell of the next event (of_next), of which "
            f"nothing is known when recommending: they are left empty, as they never are in training",
            file=sys.stderr,
        )
    _check_user_column(index, arguments.user_column)
    if arguments.catalogue is None:
        catalogue = catalogues.collect(config)
    else:
        catalogue = catalogues.load(arguments.catalogue, config)
    parts = _open_parts(arguments, run.step, index)
    job = _Job(config, run, catalogue, index, arguments, mesh)
    for stripe in range(len(index.stripes)):
        path = parts / f"{stripe:08}.parquet"
        if not path.exists():
            table = job.recommend(stripe)
            pq.write_table(table, str(path.with_suffix(".tmp")))
            path.with_suffix(".tmp").replace(path)
    counts = _join(parts, arguments.output)
    print(
        f"{counts['users']:,} users x {arguments.top_k} items of step {run.step} in {arguments.output}"
    )
    _print_unknown(config, counts)
    return EXIT_DONE


def _print_unknown(config: Config, counts: Counter[str]) -> None:
    """Says how much of the histories is of items that are not known."""
    missing = counts["not_in_catalogue"]
    if missing:
        print(f"{missing:,} events of the histories are of items that are not in the catalogue")
    item = config.feature(config.loss.item_feature)
    if item.grows:
        stands = "zeros stand" if item.unknown == "zeros" else "its default row stands"
        print(
            f"{counts['without_row']:,} of the {counts['shown']:,} events that the model was shown are "
            f"of items without a row in table {item.table_name}; {stands} for them"
        )


class _Job:
    """Recommends for one stripe after the other."""

    def __init__(
        self,
        config: Config,
        run: Restored,
        catalogue: catalogues.Catalogue,
        index: FileIndex,
        arguments: argparse.Namespace,
        mesh: Any,
    ):
        numbers = ItemNumbers(catalogue, config)
        users = config.eval.batch_size * mesh.size
        self._reader = HistoryReader(config, index, numbers, users)
        vectors = item_vectors(run.functions, run.state, catalogue, config, mesh)
        self._items = ranking.make_catalogue(vectors, mesh)
        self._run, self._mesh, self._index = run, mesh, index
        self._item = catalogue.item
        self._arguments = arguments

    def recommend(self, stripe: int) -> pa.Table:
        """One row for each row of the stripe that has a history; counts in the schema's metadata."""
        counts: Counter[str] = Counter()
        batches = [self._one_batch(batch, counts) for batch in self._reader.read(stripe, None)]
        file, number, first_row = self._index.stripes[stripe]
        row = np.concatenate([b[0] for b in batches]) if batches else np.zeros(0, np.int64)
        name = self._arguments.user_column
        if name is None:
            paths = pa.array([str(file.path)] * len(row), pa.string())
            columns = {"file": paths.dictionary_encode(), "row": pa.array(row)}
        else:
            users = orc.read_stripe(file, number, [name]).column(0)
            columns = {name: users.take(pa.array(row - first_row))}
        lists = [part for _, part in batches]
        for field in ("items", "scores"):
            kind = pa.list_(self._item.type if field == "items" else pa.float32())
            chunks = [part[field] for part in lists]
            columns[field] = pa.concat_arrays(chunks) if chunks else pa.array([], kind)
        # Beside what they count, so that they are whole if the command is interrupted.
        return pa.table(columns).replace_schema_metadata({_COUNTS: json.dumps(counts)})

    def _one_batch(
        self, batch: Histories, counts: Counter[str]
    ) -> tuple[np.ndarray, dict[str, pa.Array]]:
        users = batch.users
        users_UE, unknown_U = user_vectors(self._run.functions, self._run.state, batch, self._mesh)
        seen = None if self._arguments.keep_seen else batch.seen_US
        best = ranking.top_k(users_UE, self._items, self._arguments.top_k, seen)
        index_UK = np.asarray(best.index_BK)[:users]
        score_UK = np.asarray(best.score_BK)[:users]
        known = (batch.seen_US >= 0).sum()
        counts["users"] += users
        counts["not_in_catalogue"] += int(batch.events_U.sum() - known)
        counts["without_row"] += int(np.asarray(unknown_U).sum())
        counts["shown"] += int(batch.arrays["length"].sum())
        there_UK = index_UK >= 0
        ends = np.concatenate([[0], np.cumsum(there_UK.sum(axis=1))]).astype(np.int32)
        items = self._item.take(pa.array(index_UK[there_UK]))
        return batch.row_U, {
            "items": pa.ListArray.from_arrays(pa.array(ends), items),
            "scores": pa.ListArray.from_arrays(pa.array(ends), pa.array(score_UK[there_UK])),
        }


def _check_user_column(index: FileIndex, name: str | None) -> None:
    if name is None:
        return
    for file in index.files:
        if name not in file.schema.names:
            listed = ", ".join(file.schema.names)
            raise UserError(f"--user_column: {file.path} has no column {name}; it has {listed}")


def _open_parts(arguments: argparse.Namespace, step: int, index: FileIndex) -> Path:
    """The directory of finished stripes, emptied if they are of another command."""
    parts = arguments.output.with_name(arguments.output.name + ".parts")
    told = {
        # Of what lies in the directory; before, parts had no counts.
        "version": 2,
        "step": step,
        "top_k": arguments.top_k,
        "user_column": arguments.user_column,
        "catalogue": arguments.catalogue,
        "keep_seen": arguments.keep_seen,
        "files": index.identity(),
    }
    note, text = parts / "made_for.json", json.dumps(told, default=str)
    try:
        if parts.exists() and (not note.exists() or note.read_text() != text):
            shutil.rmtree(parts)
        parts.mkdir(parents=True, exist_ok=True)
        note.write_text(text)
    except OSError as error:
        raise UserError(f"--output: {parts} cannot be written: {error}") from error
    return parts


def _join(parts: Path, output: Path) -> Counter[str]:
    """Puts finished stripes together, one at a time in memory; returns the sums of their counts."""
    unfinished = output.with_name(f".{output.name}.tmp")
    counts: Counter[str] = Counter()
    writer = None
    for path in sorted(parts.glob("*.parquet")):
        table = pq.read_table(path)
        counts.update(json.loads(table.schema.metadata[_COUNTS]))
        table = table.replace_schema_metadata()
        if writer is None:
            writer = pq.ParquetWriter(str(unfinished), table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
        unfinished.replace(output)
    shutil.rmtree(parts)
    return counts


if __name__ == "__main__":
    run_door(main)
