"""A run directory in Python programs: its metrics and checkpoints, and its model."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from s2s_jax.config import Config, load_json
from s2s_jax.config.settings import Decoding, Items, Logs, Ranking, ShownHistory, Split
from s2s_jax.data.encoding import held_out
from s2s_jax.data.encoding.held_out import SplitPart
from s2s_jax.data.encoding.indexing import check_kinds, index_files
from s2s_jax.data.items import catalogue as catalogues
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.errors import UserError
from s2s_jax.runs.checkpoints.files import complete_steps
from s2s_jax.runs.checkpoints.one_error import restore_hooks
from s2s_jax.runs.metrics_file import read_lines
from s2s_jax.runs.place import place_of_run
from s2s_jax.training.evaluations import best_step
from s2s_serve.encoding.plain_histories import Histories
from s2s_serve.storage.address import Place, StorePath

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from s2s_jax.data.items.neighbours import Scorer
    from s2s_jax.library.ranker import Ranker, Recommendations
    from s2s_jax.ranking.candidates import Candidates
    from s2s_jax.ranking.restored import Restored


class Evaluated(NamedTuple):
    """The result of an evaluation on held-out events.

    Attributes:
      step: step of the checkpoint.
      metrics: means over users, such as `eval/hr@10`.
      intervals: 95% bootstrap intervals (low, high) of some of the metrics.
    """

    step: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


class Run:
    """A training run, opened from its directory.

    Reading files such as metrics needs no device. The model is restored, and the items are read from the
    log, when they are first needed.

    Examples:
      >>> run = Run("runs/quickstart")
      >>> run.metrics().column_names[:3]
      ['step', 'loss', 'hit_rate']
      >>> history = {
      ...     "item_id": [17, 4, 4],
      ...     "cate_id": [3, 1, 1],
      ...     "behavior_id": ["pv", "pv", "buy"],
      ...     "timestamp": ["1700000000", "1700000060", "1700000100"],
      ... }
      >>> items, scores = run.recommend([history], k=5)
      >>> len(items[0]), scores[0] == sorted(scores[0], reverse=True)
      (5, True)
      >>> run.encode([history]).shape
      (1, 64)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | StorePath,
        *,
        checkpoint: str | int = "best",
        data_paths: str | None = None,
        catalogue: str | os.PathLike[str] | StorePath | None = None,
        devices: Sequence[Any] | None = None,
    ):
        """Opens a run.

        Args:
          directory: `train.output_dir` of the run, or a copy of it; may be an address in a store.
          checkpoint: the checkpoint to use: `"best"` (by `eval.metric`; the newest if none was
            evaluated), `"newest"` or a step.
          data_paths: paths of the log, if it has moved since training; relative paths start from the
            working directory.
          catalogue: a file written by `s2s catalogue`, with the items to recommend; None: the items are
            read from the log.
          devices: devices for the model; None: all.

        Raises:
          UserError: the directory has no run that this version can read.
        """
        self._directory = place_of_run(directory)
        config = load_json(self._directory / "config.json")
        train = dataclasses.replace(config.train, output_dir=str(directory))
        paths = config.io.data_paths if data_paths is None else data_paths
        io = dataclasses.replace(config.io, data_paths=paths)
        self._config = dataclasses.replace(config, io=io, train=train)
        self._checkpoint = str(checkpoint)
        self._catalogue = catalogue
        self._devices = devices

    def __repr__(self) -> str:
        return f"Run({str(self._directory)!r})"

    @property
    def directory(self) -> Place:
        """The run directory."""
        return self._directory

    @property
    def config(self) -> Config:
        """The configuration of the run, with its current paths."""
        return self._config

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that the run has now, ascending."""
        return complete_steps(self._directory)

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint by `eval.metric`; of the newest if none was evaluated.

        None if there is no checkpoint.
        """
        steps = self.steps
        best = best_step(self._directory, self._config.eval, steps)
        return best if best is not None or not steps else steps[-1]

    def metrics(self) -> pa.Table:
        """The contents of `metrics.jsonl` now: a row for each line, and a column for each name.

        Lines of training have `loss` and others, lines of evaluations have names such as `eval/hr@10`;
        missing values are null. `.to_pandas()` turns the table into a data frame.
        """
        lines = read_lines(self._directory)
        if not lines:
            return pa.table({"step": pa.array([], pa.int64())})
        names = dict.fromkeys(name for line in lines for name in line)
        return pa.table(
            {name: [line[name] if name in line else None for line in lines] for name in names}
        )

    def encode(self, histories: Histories) -> np.ndarray:
        """The vectors of histories, which are compared with those of items.

        Args:
          histories: N histories, see `recommend`.

        Returns:
          f32 `[N, model.hidden_size]`; zeros for a history without events.

        Raises:
          UserError: a history cannot be read, or the checkpoint does not exist.
        """
        return self._ranker.encode(histories)

    def recommend(
        self,
        histories: Histories,
        k: int = 10,
        *,
        keep_seen: bool | None = None,
        by: Literal["model", "neighbours"] = "model",
        short_history: int = 0,
    ) -> "Recommendations":
        """Recommends the most likely next items for each history, as `s2s recommend` does.

        Args:
          histories: a list of `{feature: list of entries}`, oldest event first. An entry is an id as
            stored in the log, a list of ids, or None for no id. All lists of a history have the same
            length, or are empty if the user has nothing for that feature. A feature that reads a column
            with another name may be given by either name; other keys are ignored. May also be a table,
            such as the result of `Log.head`.
          k: number of items for each history; fewer if the catalogue has fewer.
          keep_seen: whether to recommend items of the history too; None: only if `eval.filter_seen`
            is False.
          by: what ranks the items: `"model"`, or `"neighbours"`: which items follow each other in the
            log.
          short_history: histories of fewer events are answered by neighbours, and those without events
            by popularity.

        Returns:
          `items` and `scores`, a list for each history, best first; empty for a history without events,
          unless `short_history` is at least 1.

        Raises:
          UserError: a history cannot be read, the checkpoint does not exist, or the log cannot be read.
        """
        if not isinstance(k, int | np.integer) or k < 1:
            raise UserError(f"k: expected a whole number of at least 1, found {k}")
        if by not in ("model", "neighbours"):
            raise UserError(f"by: expected model or neighbours, found {by}")
        if short_history < 0:
            raise UserError(f"short_history: expected at least 0, found {short_history}")
        ranker = self._ranker
        if not ranker.has_items:
            ranker.set_items(self._items[0])
        if by == "model" and not ranker.has_candidates:
            ranker.set_candidates(self._candidates())
        if (by == "neighbours" or short_history) and not ranker.has_counts:
            ranker.set_counts(self._scorer, self._items[1])
        if keep_seen is None:
            keep_seen = not self._config.eval.filter_seen
        return ranker.recommend(histories, k, keep_seen, by, short_history)

    def evaluate(self, split: SplitPart = "test") -> Evaluated:
        """Ranks every user's held-out event among the items of the log, as `s2s evaluate` does.

        Args:
          split: `"test"` or `"validation"`.

        Returns:
          Metrics and their 95% intervals; no files are written.

        Raises:
          UserError: nothing is held out, the checkpoint does not exist, or the log cannot be read.
        """
        if split not in ("test", "validation"):
            raise UserError(f"split: expected test or validation, found {split}")
        # Refuses an impossible split before anything is read.
        held_out.targets(Split.of(self._config), split)
        run = self._restored
        config = run.with_weight(self._config)
        files = index_files(Logs.of(self._config), Decoding.of(self._config)).files
        check_kinds(files, run.kinds, "as the run was trained with", self._config.features)
        from s2s_jax.ranking.evaluation import EvaluationSettings, Evaluator

        evaluator = Evaluator(EvaluationSettings.of(config), self._mesh)
        found = evaluator.evaluate(run.functions, run.state, split)
        return Evaluated(run.step, found.metrics, found.intervals())

    @functools.cached_property
    def _items(self) -> tuple[Catalogue, np.ndarray]:
        """The items to rank, and int64 `[I]`: the number of their events in training."""
        items, split = Items.of(self._config), Split.of(self._config)
        if self._catalogue is not None:
            catalogue = catalogues.load(self._catalogue, items, split)
            return catalogue, catalogue.count_I
        return catalogues.collect_for_evaluation(items, *self._log, split)

    @property
    def _log(self) -> tuple[Logs, FileIndex]:
        """The log of training, and its index."""
        logs = Logs.of(self._config)
        return logs, index_files(logs, Decoding.of(self._config))

    # JAX takes seconds to import, so only the methods that need it do so.

    def _candidates(self) -> "Candidates":
        from s2s_jax.ranking.candidates import make_candidates
        from s2s_jax.ranking.neighbour_bias import bias_of

        run = self._restored
        ranking = Ranking.of(run.with_weight(self._config))
        bias = bias_of(ranking, self._scorer) if ranking.weight else None
        catalogue = self._items[0]
        return make_candidates(run.functions, run.state, catalogue, ranking, self._mesh, bias)

    @functools.cached_property
    def _scorer(self) -> "Scorer":
        from s2s_jax.ranking.neighbour_bias import make_scorer

        items, split = Items.of(self._config), Split.of(self._config)
        return make_scorer(items, split, *self._log, self._items[0])

    @functools.cached_property
    def _mesh(self) -> "Mesh":
        from s2s_jax.cluster.mesh import make_mesh

        return make_mesh(self._devices)

    @functools.cached_property
    def _restored(self) -> "Restored":
        from s2s_jax.ranking.restored import restore

        with restore_hooks():
            return restore(self._config, self._mesh, self._checkpoint)

    @functools.cached_property
    def _ranker(self) -> "Ranker":
        from s2s_jax.library.ranker import Ranker

        config = self._config
        return Ranker(
            self._restored,
            ShownHistory.of(config),
            config.model.hidden_size,
            config.eval.batch_size,
            self._mesh,
        )
