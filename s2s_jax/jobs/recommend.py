"""Top-K items: `python -m s2s_jax.recommend --config FILE --input LOGS --output recs.parquet`.

Reads logs in the format of training, whole rows as histories, and writes for each row the items of the
catalogue (by default the items of `io.data_paths`) that the user is most likely to go on with. Stripes
are written one by one into `OUTPUT.parts` and put together at the end, so a command that was interrupted
goes on where it stopped, if weights, configuration, catalogue and logs are the same. Events of items
that are not in the catalogue are counted, and those of items that have no row in a table that grows.

Shapes: U users, K items of a list.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from s2s_jax import signals
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, ConfigParser, identity
from s2s_jax.data.batching.histories import Histories, HistoryReader, ItemNumbers
from s2s_jax.data.encoding.indexing import check_kinds, index_files
from s2s_jax.data.inspection import user_rows
from s2s_jax.data.items import catalogue as catalogues
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import EXIT_DONE, EXIT_STOPPED, Stopped, UserError
from s2s_jax.ranking.evaluation import make_candidates, user_vectors
from s2s_jax.ranking.parts import Parts
from s2s_jax.ranking.restored import Restored, restore


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: see `errors.run_door`.
    """
    with signals.StopSignals() as stop:
        try:
            with stop.at_once():
                # In another thread, since compilation would keep this one from hearing signals.
                stop.unless_told(lambda: _recommend(argv))
        except Stopped as told:
            print(
                f"stopped by {told}; what is finished is kept, start the same command again to go on",
                file=sys.stderr,
                flush=True,
            )
            return EXIT_STOPPED
    return EXIT_DONE


def _recommend(argv: list[str]) -> None:
    parser = ConfigParser("s2s recommend", "--config FILE --input LOGS --output FILE")
    parser.add_argument("--input", required=True, help="ORC files and directories, comma-separated")
    parser.add_argument("--output", required=True, type=Path, help="Parquet file")
    parser.add_argument("--top_k", type=int, default=100, help="items for each row")
    parser.add_argument("--user_column", help="column of the logs that names the user")
    parser.add_argument("--catalogue", help="Parquet of data.catalogue; default: made from the log")
    parser.add_argument(
        "--checkpoint", default="best", help="best (by eval.metric), newest, or a step"
    )
    parser.add_argument(
        "--keep_seen",
        action=argparse.BooleanOptionalAction,
        help="also recommend items of the history; default: unless eval.filter_seen",
    )
    read = parser.read(argv)
    if read is None:
        return
    arguments, config = read
    if arguments.top_k < 1:
        raise UserError(f"--top_k: expected at least 1, found {arguments.top_k}")
    if arguments.keep_seen is None:
        # What evaluation ranked is what is recommended.
        arguments.keep_seen = not config.eval.filter_seen
    mesh = make_mesh()
    run = restore(config, mesh, arguments.checkpoint)
    logs = dataclasses.replace(config.io, data_paths=arguments.input)
    index = index_files(dataclasses.replace(config, io=logs))
    check_kinds(index.files, run.kinds, "as the run was trained with", config)
    for note in index.notes:
        print(note, file=sys.stderr)
    if config.known_of_next:
        print(
            f"note: {', '.join(config.known_of_next)} tell of the next event (of_next), of which "
            f"nothing is known when recommending: they are left empty, as they never are in training",
            file=sys.stderr,
        )
    user_type = _user_type(index, arguments.user_column)
    if arguments.catalogue is None:
        catalogue = catalogues.collect(config)
    else:
        catalogue = catalogues.load(arguments.catalogue, config)
    made_for = {
        # Of what the parts hold.
        "version": 4,
        "checkpoint": [run.step, run.fingerprint],
        "configuration": identity.of_run(config),
        "catalogue": catalogue.fingerprint(),
        "input": index.identity(),
        "--top_k": arguments.top_k,
        "--user_column": [arguments.user_column, str(user_type)],
        "--keep_seen": arguments.keep_seen,
        "eval.untrained": config.eval.untrained,
    }
    parts = Parts(arguments.output, made_for)
    job = _Job(config, run, catalogue, index, arguments, mesh, user_type)
    with contextlib.closing(parts):
        for stripe, table, counts in job.recommend(
            [n for n in range(len(index.stripes)) if n not in parts]
        ):
            parts.write(stripe, table, counts)
        counts = parts.join()
    if not counts["users"]:
        arguments.output.unlink()
        raise UserError(
            f"--input: no row of {arguments.input} has a history that can be read (what was skipped is "
            f"told above); name other files"
        )
    print(
        f"{counts['users']:,} users, up to {arguments.top_k} items each, of step {run.step} in "
        f"{arguments.output}"
    )
    _print_unknown(config, counts)
    _print_untrained(config, counts, job.untrained_items, len(catalogue.item))
    sharing = catalogue.sharing()
    if sharing is not None:
        print(f"{sharing}; what is recommended as it may be any of them")
    # Of whole columns, which are little beside the histories.
    for warning in user_rows.warnings_of_log(index, arguments.user_column, most=None):
        print(warning)


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


def _print_untrained(config: Config, counts: Counter[str], untrained: int, items: int) -> None:
    """Says how many items were never trained, and how often they are recommended."""
    if not untrained:
        return
    if config.eval.untrained == "drop":
        how = "they are left out (eval.untrained drop)"
    else:
        how = (
            f"{counts['untrained']:,} times they are recommended (eval.untrained "
            f"{config.eval.untrained}; last puts them after all others, drop leaves them out)"
        )
    print(f"{untrained:,} of the {items:,} items of the catalogue were never trained: {how}")


class _Job:
    """Recommends for one stripe after the other.

    Attributes:
      untrained_items: items of the catalogue that were never trained.
    """

    def __init__(
        self,
        config: Config,
        run: Restored,
        catalogue: catalogues.Catalogue,
        index: FileIndex,
        arguments: argparse.Namespace,
        mesh: Any,
        user_type: pa.DataType | None,
    ):
        numbers = ItemNumbers(catalogue, config)
        users = config.eval.batch_size * mesh.size
        self._reader = HistoryReader(config, index, numbers, users)
        self._candidates = make_candidates(
            run.functions, run.state, catalogue, config, mesh, filter_seen=not arguments.keep_seen
        )
        self.untrained_items = int((~self._candidates.trained_I).sum())
        self._run, self._mesh, self._index = run, mesh, index
        self._item = catalogue.item
        self._arguments = arguments
        self._user_type = user_type

    def recommend(self, stripes: Iterable[int]) -> Iterator[tuple[int, pa.Table, Counter[str]]]:
        """Each stripe when it is done: one row for each row that has a history, and what was counted.

        Args:
          stripes: their numbers, rising.
        """
        left = list(stripes)
        # Batches have users of several stripes; a stripe is done when a later one is begun.
        begun: list[_Part] = []
        for batch in self._reader.read_all(tuple(left), None):
            begun += self._one_batch(batch)
            while left and left[0] < begun[-1].stripe:
                yield left[0], *self._table(left[0], begun)
                begun = [part for part in begun if part.stripe > left[0]]
                del left[0]
        for stripe in left:
            yield stripe, *self._table(stripe, begun)

    def _table(self, stripe: int, parts: Iterable["_Part"]) -> tuple[pa.Table, Counter[str]]:
        mine = [part for part in parts if part.stripe == stripe]
        file, number, first_row = self._index.stripes[stripe]
        row = np.concatenate([np.zeros(0, np.int64), *(part.row_U for part in mine)])
        name = self._arguments.user_column
        if name is None:
            paths = pa.array([str(file.path)] * len(row), pa.string())
            columns = {"file": paths.dictionary_encode(), "row": pa.array(row)}
        else:
            users = orc.read_stripe(file, number, [name]).column(0)
            columns = {name: users.take(pa.array(row - first_row)).cast(self._user_type)}
        kinds = {"items": pa.list_(self._item.type), "scores": pa.list_(pa.float32())}
        for field, kind in kinds.items():
            chunks = [part.columns[field] for part in mine]
            columns[field] = pa.concat_arrays(chunks) if chunks else pa.array([], kind)
        counts: Counter[str] = sum((part.counts for part in mine), Counter())
        return pa.table(columns), counts

    def _one_batch(self, batch: Histories) -> list["_Part"]:
        """What is recommended to the users of a batch, by stripe."""
        users_UE, unknown_U = user_vectors(self._run.functions, self._run.state, batch, self._mesh)
        best = self._candidates.top_k(users_UE, self._arguments.top_k, batch)
        there_UK = best.index_UK >= 0
        counted = {
            "users": np.ones(batch.users, np.int64),
            "not_in_catalogue": (batch.events_U - batch.known_events())[: batch.users],
            "without_row": np.asarray(unknown_U)[: batch.users],
            "shown": batch.arrays["length"][: batch.users],
            "untrained": (there_UK & ~self._candidates.trained_I[best.index_UK]).sum(axis=1),
        }
        parts = []
        begins = np.flatnonzero(np.diff(batch.stripe_U, prepend=-1))
        for begin, stop in zip(begins, [*begins[1:], batch.users], strict=True):
            of = slice(begin, stop)
            items = self._item.take(pa.array(best.index_UK[of][there_UK[of]]))
            scores = pa.array(best.score_UK[of][there_UK[of]])
            ends = np.concatenate([[0], np.cumsum(there_UK[of].sum(axis=1))]).astype(np.int32)
            columns = {
                name: pa.ListArray.from_arrays(pa.array(ends), values)
                for name, values in (("items", items), ("scores", scores))
            }
            counts = Counter({name: int(count_U[of].sum()) for name, count_U in counted.items()})
            parts.append(_Part(int(batch.stripe_U[begin]), batch.row_U[of], columns, counts))
        return parts


class _Part(NamedTuple):
    """Some users of one stripe.

    Attributes:
      stripe: its number.
      row_U: int64 rows of the users in their file.
      columns: lists of each user.
      counts: sums over the users.
    """

    stripe: int
    row_U: np.ndarray
    columns: dict[str, pa.Array]
    counts: Counter[str]


def _user_type(index: FileIndex, name: str | None) -> pa.DataType | None:
    """The type of the user column, which holds what any of the files has; None without a column.

    Raises:
      UserError: a file has no such column, or no type holds what two files have.
    """
    if name is None:
        return None
    common, of = None, index.files[0]
    for file in index.files:
        if name not in file.schema.names:
            listed = ", ".join(file.schema.names)
            raise UserError(f"--user_column: {file.path} has no column {name}; it has {listed}")
        found = file.schema.field(name).type
        integers = common is not None and all(map(pa.types.is_signed_integer, (found, common)))
        if common is None or (integers and found.bit_width > common.bit_width):
            common, of = found, file
        elif found != common and not integers:
            raise UserError(
                f"--user_column: column {name} holds {found} in {file.path} and {common} in "
                f"{of.path}; write one of them anew, or recommend for them one by one"
            )
    return common
