"""Top-K items for the histories of a log.

Reads logs in the format of training, whole rows as histories, and writes for each row the items of the
catalogue (by default the items of `io.data_paths`) that the user is most likely to go on with. Stripes
are written one by one into `OUTPUT.parts` and put together at the end, so a job that was interrupted
goes on where it stopped, if weights, configuration, catalogue and logs are the same.

Shapes: U users, K items of a list.
"""

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, identity
from s2s_jax.config.settings import Decoding, Items, Logs, Ranking, ShownHistory, Split
from s2s_jax.data.batching.histories import Histories, HistoryReader, ItemNumbers
from s2s_jax.data.encoding.held_out import catalogue_cut
from s2s_jax.data.encoding.indexing import check_kinds, index_files
from s2s_jax.data.inspection import user_rows
from s2s_jax.data.items import catalogue as catalogues
from s2s_jax.data.logs import orc
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import UserError
from s2s_jax.ranking.candidates import make_candidates
from s2s_jax.ranking.encode import user_vectors
from s2s_jax.ranking.parts import Parts
from s2s_jax.ranking.restored import Restored, restore


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to recommend, and for whom.

    Attributes:
      input: ORC files and directories, comma-separated.
      output: Parquet file to write.
      top_k: items for each row.
      user_column: column of the logs that names the user; None: rows are named by file and number.
      catalogue: Parquet of `data.items.catalogue`; None: it is made from the log.
      checkpoint: best (by eval.metric), newest, or a step.
      keep_seen: whether items of the history are recommended, too; None: unless `eval.filter_seen`.
    """

    input: str
    output: Path
    top_k: int = 100
    user_column: str | None = None
    catalogue: str | None = None
    checkpoint: str = "best"
    keep_seen: bool | None = None


class Recommended(NamedTuple):
    """What was written.

    Attributes:
      step: of the checkpoint.
      items: of the catalogue.
      untrained_items: items of the catalogue that were never trained.
      sharing: how many ids share a row of the table, in words; None if none do.
      counts: "users" who have a list; events of the histories that are "not_in_catalogue"; events that
        the model was "shown", and those "without_row" of its growing table of items; how often
        "untrained" items are recommended.
      warnings: what is odd about the users of the log, a sentence each.
    """

    step: int
    items: int
    untrained_items: int
    sharing: str | None
    counts: Counter[str]
    warnings: list[str]


def recommend(config: Config, request: Request, mesh: Mesh | None = None) -> Recommended:
    """Writes the items that users of a log are most likely to go on with.

    Args:
      config: of the run in `train.output_dir`.
      request: what to recommend, and for whom.
      mesh: devices to rank on; by default all.

    Raises:
      UserError: the request is impossible; the checkpoint, the catalogue or the logs cannot be read; the
        file cannot be written; or no row has a history.
    """
    if request.top_k < 1:
        raise UserError(f"--top_k: expected at least 1, found {request.top_k}")
    if request.keep_seen is None:
        # What evaluation ranked is what is recommended.
        request = dataclasses.replace(request, keep_seen=not config.eval.filter_seen)
    mesh = make_mesh() if mesh is None else mesh
    run = restore(config, mesh, request.checkpoint)
    logs, decoding = Logs.of(config), Decoding.of(config)
    input_logs = dataclasses.replace(logs, paths=request.input)
    index = index_files(input_logs, decoding)
    check_kinds(index.files, run.kinds, "as the run was trained with", config.features)
    for note in index.notes:
        print(note, file=sys.stderr)
    if config.known_of_next:
        print(
            f"note: {', '.join(config.known_of_next)} tell of the next event (of_next), of which "
            f"nothing is known when recommending: they are left empty, as they never are in training",
            file=sys.stderr,
        )
    user_type = _user_type(index, request.user_column)
    items, split = Items.of(config), Split.of(config)
    if request.catalogue is None:
        catalogue = catalogues.collect(
            items, logs, index_files(logs, decoding), catalogue_cut(split)
        )
    else:
        catalogue = catalogues.load(request.catalogue, items, split)
    made_for = {
        # Of what the parts hold.
        "version": 4,
        "checkpoint": [run.step, run.fingerprint],
        "configuration": identity.of_run(config),
        "catalogue": catalogue.fingerprint(),
        "input": index.identity(),
        "--top_k": request.top_k,
        "--user_column": [request.user_column, str(user_type)],
        "--keep_seen": request.keep_seen,
        "eval.untrained": config.eval.untrained,
    }
    parts = Parts(request.output, made_for)
    job = _Job(config, run, catalogue, input_logs, index, request, mesh, user_type)
    with contextlib.closing(parts):
        for stripe, table, counts in job.recommend(
            [n for n in range(len(index.stripes)) if n not in parts]
        ):
            parts.write(stripe, table, counts)
        counts = parts.join()
    if not counts["users"]:
        request.output.unlink()
        raise UserError(
            f"--input: no row of {request.input} has a history that can be read (what was skipped is "
            f"told above); name other files"
        )
    return Recommended(
        step=run.step,
        items=len(catalogue.item),
        untrained_items=job.untrained_items,
        sharing=catalogue.sharing(),
        counts=counts,
        # Of whole columns, which are little beside the histories.
        warnings=user_rows.warnings_of_log(index, request.user_column, most=None),
    )


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
        logs: Logs,
        index: FileIndex,
        request: Request,
        mesh: Mesh,
        user_type: pa.DataType | None,
    ):
        numbers = ItemNumbers(catalogue.ids[config.loss.item_feature])
        users = config.eval.batch_size * mesh.size
        self._reader = HistoryReader(ShownHistory.of(config), logs, index, numbers, users)
        ranking = dataclasses.replace(Ranking.of(config), filter_seen=not request.keep_seen)
        self._candidates = make_candidates(run.functions, run.state, catalogue, ranking, mesh)
        self.untrained_items = int((~self._candidates.trained_I).sum())
        self._run, self._mesh, self._index = run, mesh, index
        self._item = catalogue.item
        self._request = request
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
        name = self._request.user_column
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
        best = self._candidates.top_k(users_UE, self._request.top_k, batch)
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
