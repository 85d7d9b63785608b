"""Recommends the top K items for each row of a log.

A row is the history of a user. The items come from the catalogue, by default from the items of
`io.data_paths`. The items of each stripe are written to a file in `OUTPUT.parts`, and these files are
joined at the end; or the output is a directory of parts, to which several processes write. So an
interrupted job continues with the next stripe, if weights, configuration, catalogue and logs are the
same.

Shapes: U users, K items of a list.
"""

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, identity
from s2s_jax.config.settings import Decoding, Items, Logs, Ranking, ShownHistory, Split
from s2s_jax.data.batching.histories import HistoryReader
from s2s_jax.data.encoding.indexing import check_kinds, index_files
from s2s_jax.data.inspection import user_rows
from s2s_jax.data.items import catalogue as catalogues
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import UserError
from s2s_jax.jobs.rows_left import RowsLeft
from s2s_jax.jobs.stripe_recommender import StripeRecommender, UserColumn
from s2s_jax.ranking.answers import Answerer, By, ByCounts, ByModel
from s2s_jax.ranking.candidates import make_candidates
from s2s_jax.ranking.encode import UserEncoder, shapes_for
from s2s_jax.ranking.neighbour_bias import bias_of, make_scorer
from s2s_jax.ranking.part_directory import ALONE, PartDirectory, Share
from s2s_jax.ranking.parts import Parts
from s2s_jax.ranking.restored import Restored, restore
from s2s_serve.encoding import features
from s2s_serve.encoding.item_numbers import ItemNumbers
from s2s_serve.storage.address import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The settings of `recommend`.

    Attributes:
      input: ORC files and directories of the log with the histories, separated by commas.
      output: the Parquet file to write; or a directory, if its name does not end in .parquet, if it is
        there, or if there are several processes.
      top_k: the number of items for each row.
      user_column: the column of the log with user ids; None: rows are identified by file and number.
      catalogue: the file of `s2s catalogue` with the items; None: the items of `io.data_paths`.
      checkpoint: the checkpoint to use: best (by `eval.metric`), newest, or a step.
      keep_seen: whether to recommend items of the history too; None: only if `eval.filter_seen` is
        False.
      by: what ranks the items: the model, or counted neighbours, which need no checkpoint.
      short_history: histories of fewer events are answered by counted neighbours, and rows without
        events by popularity; 0: rows without events are left out.
      share: which process of a job this is, each of which recommends for a share of the log.
    """

    input: str
    output: Place
    top_k: int = 100
    user_column: str | None = None
    catalogue: str | None = None
    checkpoint: str = "best"
    keep_seen: bool | None = None
    by: By = "model"
    short_history: int = 0
    share: Share = ALONE

    @property
    def writes_directory(self) -> bool:
        """Whether the output is a directory."""
        several = self.share.hosts > 1
        return several or self.output.suffix != ".parquet" or self.output.is_dir()


class Recommended(NamedTuple):
    """A summary of the recommendations that were written.

    Attributes:
      step: the step of the checkpoint; None if none was needed.
      neighbours: the weight of counted neighbours in the scores of the model; that of the checkpoint if
        `eval.neighbours` is auto.
      items: the number of items of the catalogue.
      untrained_items: the number of items of the catalogue that were never trained.
      sharing: a sentence about ids that share a row of the table; None if none do.
      counts: the number of "users" with recommendations; the numbers of events of their histories: all
        that the model was "shown", those "without_row" in a growing table, and those that are
        "not_in_catalogue"; how often "untrained" items are recommended; and the numbers of users who
        are answered "by_model", "by_neighbours" and "by_popularity"; and, if there are any, the rows
        that were left out because they cannot be read, "skipped_rows". None if other processes have not
        finished their shares.
      warnings: warnings about the users of the log, a sentence each.
    """

    step: int | None
    neighbours: float
    items: int
    untrained_items: int
    sharing: str | None
    counts: Counter[str] | None
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
    _check(request)
    if request.keep_seen is None:
        # By default, recommend the same items that evaluation ranks.
        request = dataclasses.replace(request, keep_seen=not config.eval.filter_seen)
    config, model = _restored(config, request, mesh)
    log = _log_of_items(config, request)
    logs = dataclasses.replace(Logs.of(config), paths=request.input)
    index = _index_input(config, logs, _kinds(config, model, log))
    users = None if request.user_column is None else _user_column(index, request.user_column)
    items = _items(config, request, log)
    made_for = _made_for(config, request, model, index, items, users)
    with contextlib.closing(_parts(request, made_for, index)) as parts:
        answerer = _answerer(config, request, model, items)
        recommender = StripeRecommender(
            answerer,
            _reader(config, request, logs, index, items, 1 if model is None else model.mesh.size),
            index,
            items.catalogue.item,
            users,
            min(request.top_k, max(len(items.catalogue.item), 1)),
            tells_by=request.short_history > 0,
        )
        # A command that may skip nothing does not use what another has skipped.
        missing = parts.missing(len(index.stripes), complete=config.io.on_error == "stop")
        left = RowsLeft(sum(index.stripe_rows[n] for n in missing), _name(request.share))
        for stripe, table, counts in recommender.recommend(missing):
            parts.write(stripe, table, counts)
            left.add(index.stripe_rows[stripe])
        counts = parts.join()
        if counts is not None and not counts["users"]:
            parts.discard()
            raise UserError(
                f"--input: no row of {request.input} has a history that can be read (messages above "
                f"list what was skipped); give other files"
            )
    trained_I = answerer.trained_I
    return Recommended(
        step=None if model is None else model.run.step,
        neighbours=Ranking.of(config).weight,
        items=len(items.catalogue.item),
        untrained_items=0 if trained_I is None else int((~trained_I).sum()),
        sharing=items.catalogue.sharing(),
        counts=counts,
        # Reads the column of all rows, which is small compared with the histories.
        warnings=user_rows.warnings_of_log(index, request.user_column, most=None),
    )


def _parts(
    request: Request, made_for: Mapping[str, Any], index: FileIndex
) -> Parts | PartDirectory:
    if request.writes_directory:
        return PartDirectory(request.output, made_for, index.stripe_rows, request.share)
    return Parts(request.output, made_for)


def _name(share: Share) -> str:
    """The name of this process in messages."""
    return f"host {share.host} of {share.hosts}" if share.hosts > 1 else ""


def _check(request: Request) -> None:
    if request.top_k < 1:
        raise UserError(f"--top_k: expected at least 1, found {request.top_k}")
    if request.short_history < 0:
        raise UserError(f"--short_history: expected at least 0, found {request.short_history}")
    if request.by == "neighbours" and request.checkpoint != "best":
        raise UserError(
            f"--checkpoint: expected nothing, because --by neighbours uses no checkpoint, found "
            f"{request.checkpoint}; leave one of the two out"
        )


# ------------------------------------------------------------------------------------- inputs


class _Model(NamedTuple):
    """A restored checkpoint, and the devices that it is on."""

    run: Restored
    mesh: Mesh


def _restored(config: Config, request: Request, mesh: Mesh | None) -> tuple[Config, _Model | None]:
    """The checkpoint, if the model ranks items, and the configuration with the weight of neighbours.

    Prints a note if the model knows something of the next event in training.
    """
    if request.by == "neighbours":
        alone = dataclasses.replace(config.eval, neighbours=0.0)
        return dataclasses.replace(config, eval=alone), None
    mesh = make_mesh() if mesh is None else mesh
    run = restore(config, mesh, request.checkpoint)
    if config.known_of_next:
        print(
            f"note: features with of_next ({', '.join(config.known_of_next)}) describe the next event, "
            f"which is unknown when recommending; they are left empty here, but never in training",
            file=sys.stderr,
        )
    return run.with_weight(config), _Model(run, mesh)


class _RankedItems(NamedTuple):
    """The items to rank, and the log of training in which they are counted.

    Attributes:
      catalogue: the items.
      count_I: int64, number of events of each item.
      counted_in: the index of the log in which neighbours are counted; None if they are not.
    """

    catalogue: Catalogue
    count_I: np.ndarray
    counted_in: FileIndex | None


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
    return index


def _user_column(index: FileIndex, name: str) -> UserColumn:
    """The user column, with a type for the values of all files.

    Raises:
      UserError: a file has no such column, or the types of two files have no common type.
    """
    if name in ("items", "scores", "by"):
        raise UserError(
            f"--user_column: expected another name than {name}, which is a column of the output; rename "
            f"the column in the log"
        )
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
    return UserColumn(name, common)


def _needs_counts(config: Config, request: Request) -> bool:
    """Whether neighbours are counted."""
    instead = request.by == "neighbours" or request.short_history > 0
    return instead or Ranking.of(config).weight > 0


def _log_of_items(config: Config, request: Request) -> FileIndex | None:
    """The index of the log of training; None if a file has the items and nothing is counted."""
    if request.catalogue is not None and not _needs_counts(config, request):
        return None
    return index_files(Logs.of(config), Decoding.of(config))


def _kinds(config: Config, model: _Model | None, log: FileIndex | None) -> Mapping[str, str]:
    """The kinds of ids that the histories must have: those of training."""
    if model is not None:
        return model.run.kinds
    assert log is not None, "without a model, neighbours are counted"
    return features.entry_kinds(log.files[0], config.features)


def _items(config: Config, request: Request, log: FileIndex | None) -> _RankedItems:
    """The items to rank, from a file or, without a path, from `io.data_paths`."""
    items, split, logs = Items.of(config), Split.of(config), Logs.of(config)
    if request.catalogue is not None:
        catalogue = catalogues.load(request.catalogue, items, split)
        count_I = catalogue.count_I
    else:
        assert log is not None, "it has the items"
        catalogue, count_I = catalogues.collect_for_evaluation(items, logs, log, split)
    return _RankedItems(catalogue, count_I, log if _needs_counts(config, request) else None)


def _answerer(
    config: Config, request: Request, model: _Model | None, items: _RankedItems
) -> Answerer:
    """What ranks the items for a batch of users."""
    ranking = dataclasses.replace(Ranking.of(config), filter_seen=not request.keep_seen)
    catalogue, scorer = items.catalogue, None
    if items.counted_in is not None:
        # Counted in the training log, not in the one with the histories.
        logs, split = Logs.of(config), Split.of(config)
        scorer = make_scorer(ranking.items, split, logs, items.counted_in, catalogue)
    if model is None:
        assert scorer is not None, "without a model, neighbours are counted"
        counts = ByCounts(scorer, items.count_I, ranking.filter_seen)
        return Answerer(None, counts, request.short_history)
    run, mesh = model
    bias = None if scorer is None else bias_of(ranking, scorer)
    candidates = make_candidates(run.functions, run.state, catalogue, ranking, mesh, bias)
    counts = None
    if scorer is not None and request.short_history > 0:
        counts = ByCounts(scorer, candidates.counts_of_ranked(items.count_I), ranking.filter_seen)
    shapes = shapes_for(config.model.seq_len, config.eval.batch_size, mesh)
    encoder = UserEncoder(run.functions, run.state, shapes, mesh)
    return Answerer(ByModel(encoder, candidates), counts, request.short_history)


def _reader(
    config: Config,
    request: Request,
    logs: Logs,
    index: FileIndex,
    items: _RankedItems,
    devices: int,
) -> HistoryReader:
    """The reader of the histories."""
    return HistoryReader(
        ShownHistory.of(config),
        logs,
        index,
        ItemNumbers(items.catalogue.ids[config.loss.item_feature]),
        config.eval.batch_size * devices,
        with_empty=request.short_history > 0,
    )


def _made_for(
    config: Config,
    request: Request,
    model: _Model | None,
    index: FileIndex,
    items: _RankedItems,
    users: UserColumn | None,
) -> dict[str, Any]:
    """Everything that the parts depend on, as JSON; if it changes, all parts are computed again."""
    counted_in = items.counted_in
    return {
        # The version of the parts' format, and of the shapes in which users are encoded.
        "version": 8,
        "checkpoint": None if model is None else [model.run.step, model.run.fingerprint],
        "configuration": identity.of_run(config),
        "catalogue": items.catalogue.fingerprint(),
        "io.data_paths": None if counted_in is None else counted_in.identity(),
        "input": index.identity(),
        "--top_k": request.top_k,
        "--user_column": [request.user_column, str(None if users is None else users.type)],
        "--keep_seen": request.keep_seen,
        "--by": request.by,
        "--short_history": request.short_history,
        "eval.untrained": config.eval.untrained,
        "eval.neighbours": config.eval.neighbours,
        # Counts are added in its unit.
        "loss.temperature": config.loss.temperature if config.eval.neighbours else None,
    }
