"""Recommends the top K items for each row of a log.

A row is the history of a user. The items come from the catalogue, by default from the items of
`io.data_paths`. The items of each stripe are written to a file in `OUTPUT.parts`, and these files are
joined at the end. So an interrupted job continues with the next stripe, if weights, configuration,
catalogue and logs are the same.

Shapes: U users, K items of a list.
"""

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, identity
from s2s_jax.config.settings import Decoding, Items, Logs, Ranking, ShownHistory, Split
from s2s_jax.data.batching.histories import Histories, HistoryReader
from s2s_jax.data.encoding.held_out import catalogue_cut
from s2s_jax.data.encoding.indexing import check_kinds, index_files
from s2s_jax.data.inspection import user_rows
from s2s_jax.data.items import catalogue as catalogues
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.data.items.item_numbers import ItemNumbers
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import UserError
from s2s_jax.ranking.candidates import Candidates, make_candidates
from s2s_jax.ranking.encode import user_vectors
from s2s_jax.ranking.neighbour_bias import count_bias
from s2s_jax.ranking.parts import Parts
from s2s_jax.ranking.restored import Restored, restore


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The settings of `recommend`.

    Attributes:
      input: ORC files and directories of the log with the histories, separated by commas.
      output: the Parquet file to write.
      top_k: the number of items for each row.
      user_column: the column of the log with user ids; None: rows are identified by file and number.
      catalogue: the file of `s2s catalogue` with the items; None: the items of `io.data_paths`.
      checkpoint: the checkpoint to use: best (by `eval.metric`), newest, or a step.
      keep_seen: whether to recommend items of the history too; None: only if `eval.filter_seen` is
        False.
    """

    input: str
    output: Path
    top_k: int = 100
    user_column: str | None = None
    catalogue: str | None = None
    checkpoint: str = "best"
    keep_seen: bool | None = None


class Recommended(NamedTuple):
    """A summary of the recommendations that were written.

    Attributes:
      step: the step of the checkpoint.
      neighbours: the weight of counted neighbours; that of the checkpoint if `eval.neighbours` is auto.
      items: the number of items of the catalogue.
      untrained_items: the number of items of the catalogue that were never trained.
      sharing: a sentence about ids that share a row of the table; None if none do.
      counts: the number of "users" with recommendations; the numbers of events of their histories: all
        that the model was "shown", those "without_row" in a growing table, and those that are
        "not_in_catalogue"; and how often "untrained" items are recommended.
      warnings: warnings about the users of the log, a sentence each.
    """

    step: int
    neighbours: float
    items: int
    untrained_items: int
    sharing: str | None
    counts: Counter[str]
    warnings: list[str]


def recommend(config: Config, request: Request, mesh: Mesh | None = None) -> Recommended:
    """Writes the items that users of a log are most likely to choose next.

    Args:
      config: the configuration of the run in `train.output_dir`.
      request: the settings of this job.
      mesh: the devices to rank on; None: all.

    Raises:
      UserError: a setting is impossible; the checkpoint, the catalogue or the log cannot be read; the
        file cannot be written; or no row has a history.
    """
    if request.top_k < 1:
        raise UserError(f"--top_k: expected at least 1, found {request.top_k}")
    if request.keep_seen is None:
        # By default, recommend the same items that evaluation ranks.
        request = dataclasses.replace(request, keep_seen=not config.eval.filter_seen)
    mesh = make_mesh() if mesh is None else mesh
    run = restore(config, mesh, request.checkpoint)
    config = run.with_weight(config)
    logs = dataclasses.replace(Logs.of(config), paths=request.input)
    index = _index_input(config, logs, run.kinds)
    users = None if request.user_column is None else _user_column(index, request.user_column)
    catalogue = _catalogue(config, request.catalogue)
    made_for = _made_for(config, request, run, index, catalogue, users)
    with contextlib.closing(Parts(request.output, made_for)) as parts:
        ranking = dataclasses.replace(Ranking.of(config), filter_seen=not request.keep_seen)
        # Counted in the training log, not in the one with the histories.
        trained_on, decoding = Logs.of(config), Decoding.of(config)
        neighbours = count_bias(ranking, Split.of(config), trained_on, decoding, catalogue)
        candidates = make_candidates(run.functions, run.state, catalogue, ranking, mesh, neighbours)
        numbers = ItemNumbers(catalogue.ids[config.loss.item_feature])
        batch_users = config.eval.batch_size * mesh.size
        reader = HistoryReader(ShownHistory.of(config), logs, index, numbers, batch_users)
        recommender = _StripeRecommender(
            run, reader, index, candidates, catalogue.item, users, request.top_k, mesh
        )
        missing = [n for n in range(len(index.stripes)) if n not in parts]
        for stripe, table, counts in recommender.recommend(missing):
            parts.write(stripe, table, counts)
        counts = parts.join()
    if not counts["users"]:
        request.output.unlink()
        raise UserError(
            f"--input: no row of {request.input} has a history that can be read (messages above list "
            f"what was skipped); give other files"
        )
    return Recommended(
        step=run.step,
        neighbours=Ranking.of(config).weight,
        items=len(catalogue.item),
        untrained_items=int((~candidates.trained_I).sum()),
        sharing=catalogue.sharing(),
        counts=counts,
        # Reads the column of all rows, which is small compared with the histories.
        warnings=user_rows.warnings_of_log(index, request.user_column, most=None),
    )


# ------------------------------------------------------------------------------------- inputs


class _UserColumn(NamedTuple):
    """The column with user ids.

    Attributes:
      name: name of the column.
      type: the type of its values in the output.
    """

    name: str
    type: pa.DataType


def _index_input(config: Config, logs: Logs, kinds: Mapping[str, str]) -> FileIndex:
    """The index of the log with the histories; prints notes about it.

    Args:
      config: the configuration of the run.
      logs: the log.
      kinds: kinds of the ids in training.

    Raises:
      UserError: the log cannot be read, or its ids are of other kinds than in training.
    """
    index = index_files(logs, Decoding.of(config))
    check_kinds(index.files, kinds, "as the run was trained with", config.features)
    for note in index.notes:
        print(note, file=sys.stderr)
    if config.known_of_next:
        print(
            f"note: features with of_next ({', '.join(config.known_of_next)}) describe the next event, "
            f"which is unknown when recommending; they are left empty here, but never in training",
            file=sys.stderr,
        )
    return index


def _user_column(index: FileIndex, name: str) -> _UserColumn:
    """The user column, with a type for the values of all files.

    Raises:
      UserError: a file has no such column, or the types of two files have no common type.
    """
    common, first = None, index.files[0]
    for file in index.files:
        if name not in file.schema.names:
            listed = ", ".join(file.schema.names)
            raise UserError(f"--user_column: {file.path} has no column {name}; it has {listed}")
        found = file.schema.field(name).type
        integers = common is not None and all(map(pa.types.is_signed_integer, (found, common)))
        if common is None or (integers and found.bit_width > common.bit_width):
            common, first = found, file
        elif found != common and not integers:
            raise UserError(
                f"--user_column: column {name} holds {found} in {file.path} and {common} in "
                f"{first.path}; rewrite one of these files, or recommend for them one by one"
            )
    return _UserColumn(name, common)


def _catalogue(config: Config, path: str | None) -> Catalogue:
    """The items to rank, from a file or, without a path, from `io.data_paths`."""
    items, split = Items.of(config), Split.of(config)
    if path is not None:
        return catalogues.load(path, items, split)
    logs = Logs.of(config)
    index = index_files(logs, Decoding.of(config))
    return catalogues.collect(items, logs, index, catalogue_cut(split))


def _made_for(
    config: Config,
    request: Request,
    run: Restored,
    index: FileIndex,
    catalogue: Catalogue,
    users: _UserColumn | None,
) -> dict[str, Any]:
    """Everything that the parts depend on, as JSON; if it changes, all parts are computed again."""
    return {
        # The version of the parts' format.
        "version": 4,
        "checkpoint": [run.step, run.fingerprint],
        "configuration": identity.of_run(config),
        "catalogue": catalogue.fingerprint(),
        "input": index.identity(),
        "--top_k": request.top_k,
        "--user_column": [request.user_column, str(None if users is None else users.type)],
        "--keep_seen": request.keep_seen,
        "eval.untrained": config.eval.untrained,
        "eval.neighbours": config.eval.neighbours,
    }


# ------------------------------------------------------------------------------------ stripes


class _StripeRecommender:
    """Recommends items for one stripe after another."""

    def __init__(
        self,
        run: Restored,
        reader: HistoryReader,
        index: FileIndex,
        candidates: Candidates,
        item: pa.Array,
        users: _UserColumn | None,
        top_k: int,
        mesh: Mesh,
    ):
        """Prepares recommending.

        Args:
          run: the restored checkpoint.
          reader: the reader of the histories.
          index: the index of the log that it reads.
          candidates: the items to rank.
          item: the ids of these items, as stored in the log.
          users: the column with user ids; None: rows are identified by file and number.
          top_k: K.
          mesh: the devices.
        """
        self._run, self._mesh, self._index = run, mesh, index
        self._reader, self._candidates, self._item = reader, candidates, item
        self._users, self._top_k = users, top_k

    def recommend(self, stripes: Iterable[int]) -> Iterator[tuple[int, pa.Table, Counter[str]]]:
        """Yields each stripe when it is complete.

        Args:
          stripes: numbers of stripes, ascending.

        Yields:
          The number of the stripe; the table for its rows that have a history; and its counts, see
          `Recommended.counts`.
        """
        left = list(stripes)
        # A batch may have users of several stripes. A stripe is complete when a later one has begun.
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
        """Joins the parts of a stripe."""
        mine = [part for part in parts if part.stripe == stripe]
        file, number, first_row = self._index.stripes[stripe]
        row = np.concatenate([np.zeros(0, np.int64), *(part.row_U for part in mine)])
        if self._users is None:
            paths = pa.array([str(file.path)] * len(row), pa.string())
            columns = {"file": paths.dictionary_encode(), "row": pa.array(row)}
        else:
            users = orc.read_stripe(file, number, [self._users.name]).column(0)
            chosen = users.take(pa.array(row - first_row)).cast(self._users.type)
            columns = {self._users.name: chosen}
        kinds = {"items": pa.list_(self._item.type), "scores": pa.list_(pa.float32())}
        for field, kind in kinds.items():
            chunks = [part.columns[field] for part in mine]
            columns[field] = pa.concat_arrays(chunks) if chunks else pa.array([], kind)
        counts: Counter[str] = sum((part.counts for part in mine), Counter())
        return pa.table(columns), counts

    def _one_batch(self, batch: Histories) -> list["_Part"]:
        """Recommends items to the users of a batch; there is one part for each stripe."""
        users_UE, unknown_U = user_vectors(self._run.functions, self._run.state, batch, self._mesh)
        best = self._candidates.top_k(users_UE, self._top_k, batch)
        there_UK = best.index_UK >= 0
        counted_U = {
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
            counts = Counter({name: int(count_U[of].sum()) for name, count_U in counted_U.items()})
            parts.append(_Part(int(batch.stripe_U[begin]), batch.row_U[of], columns, counts))
        return parts


class _Part(NamedTuple):
    """The users of a batch who are in one stripe.

    Attributes:
      stripe: the number of the stripe.
      row_U: int64, the row of each user in the file.
      columns: "items" and "scores", a list for each user.
      counts: sums over the users, see `Recommended.counts`.
    """

    stripe: int
    row_U: np.ndarray
    columns: dict[str, pa.Array]
    counts: Counter[str]
