"""How well held-out events are found among the items of the log.

Every user is ranked over the whole catalogue. If `eval.split` is last_events it holds every item
of the log, held-out events included; if by_time, the items that training sees. Users whose event is of
no item of the catalogue are left out and counted. Events of items that recommending leaves out, as the
user had them before (`eval.filter_seen`), are missed. The history ends before the event to be found,
whose time and behaviour stay unknown.

Shapes: U users, I items, E width.
"""

import sys
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster import hosts
from s2s_jax.config import Config
from s2s_jax.config.settings import Decoding, Items, Logs, ShownHistory, Split
from s2s_jax.data.batching.histories import Histories, HistoryReader, ItemNumbers
from s2s_jax.data.encoding import held_out
from s2s_jax.data.encoding.held_out import SplitPart, Targets
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.items.catalogue import collect_for_evaluation
from s2s_jax.errors import UserError
from s2s_jax.ranking import ranking_metrics
from s2s_jax.ranking.candidates import make_candidates, returns
from s2s_jax.ranking.encode import user_vectors
from s2s_jax.ranking.ranking_metrics import PREFIX
from s2s_jax.training.step.functions import StepFunctions
from s2s_jax.training.step.state import TrainState

# Lengths of the lists from which coverage is taken.
_COVERAGE = (5, 10, 50)


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
      metrics: means over users, "eval/hr@10" …, with slices and the popularity baseline;
        "eval/unknown_targets", users left out because their event is of no item of the catalogue;
        "eval/returning_targets", the share of users whose event is of an item that they had before;
        "eval/untrained_items" and "eval/untrained_targets", the shares of the catalogue and of the
        users' events that are items which were never trained; where the table of items grows,
        "eval/unknown_items", the share of those of the histories' events that the model was shown whose
        item has no row; and, where ids of items share rows of their table, "eval/shared_rows", the
        share of the log's events that are of such ids.
      values: of each user, see `ranking_metrics.user_values`.
    """

    metrics: dict[str, float]
    values: dict[str, np.ndarray]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% bootstrap intervals of the means over all users, which take a while to compute."""
        return ranking_metrics.intervals(self.values)


class Evaluator:
    """Evaluates states of one configuration.

    Attributes:
      catalogue: the items that are ranked.
    """

    def __init__(self, config: Config, mesh: Mesh, max_users: int | None = None):
        """Reads the log's items.

        Args:
          config: the configuration.
          mesh: the devices.
          max_users: users that are looked at, the first of the log; None: all.

        Raises:
          UserError: nothing is held out, or the log cannot be read.
        """
        # Refuses a configuration that holds nothing out.
        self._split = Split.of(config)
        held_out.targets(self._split, "test")
        self._config = config
        self._mesh = mesh
        self._max_users = max_users
        items, logs, shown = Items.of(config), Logs.of(config), ShownHistory.of(config)
        index = index_files(logs, Decoding.of(config))
        self.catalogue, self._count_I = collect_for_evaluation(items, logs, index, self._split)
        numbers = ItemNumbers(self.catalogue.ids[items.item.name])
        users = config.eval.batch_size * mesh.size
        self._reader = HistoryReader(shown, logs, index, numbers, users)

    def evaluate(
        self,
        functions: StepFunctions,
        state: TrainState,
        split: SplitPart,
        in_step: hosts.InStep = hosts.in_step,
    ) -> Evaluation:
        """Ranks the events of `split`.

        Args:
          functions: over the state.
          state: of the devices.
          split: which events.
          in_step: keeps hosts together, and may end the evaluation between batches of users.

        Raises:
          UserError: `split` is not held out, or no user has a history and an event to be found.
        """
        targets = held_out.targets(self._split, split)
        candidates = make_candidates(functions, state, self.catalogue, self._config, self._mesh)
        # Popularity ranks the same items.
        count_I = np.where(candidates.left_out_I, -1, self._count_I)
        rank, popular, events, target = [], [], [], []
        shown = unknown = unknown_targets = returning = 0
        coverage = ranking_metrics.Coverage(len(self.catalogue.item))
        batches = in_step(self._batches(targets), lambda item: zlib.crc32(item[0].row_U.tobytes()))
        for batch, users in batches:
            users_UE, unknown_U = user_vectors(functions, state, batch, self._mesh)
            chosen = np.flatnonzero(batch.target_U[:users] >= 0)
            unknown_targets += users - len(chosen)
            returning += int(returns(batch)[chosen].sum())
            rank.append(candidates.ranks(users_UE, batch)[chosen])
            best = candidates.top_k(users_UE, max(_COVERAGE), batch)
            coverage.add(best.index_UK[chosen])
            popular_U = ranking_metrics.popularity_ranks(
                count_I, batch.target_U, candidates.seen(batch)
            )
            popular_U = np.where(candidates.can_be_found(batch), popular_U, ranking_metrics.MISSED)
            popular.append(popular_U[chosen])
            events.append(batch.events_U[chosen])
            target.append(batch.target_U[chosen])
            shown += int(batch.arrays["length"][chosen].sum())
            unknown += int(np.asarray(unknown_U)[chosen].sum())
        if not sum(map(len, rank)):
            raise UserError(
                f"io.data_paths: no row of {self._config.io.data_paths} has an event before the "
                f"{split} event and one of a known item there ({unknown_targets:,} have one of an "
                f"unknown item); evaluate a log with longer rows, or train with another "
                f"eval.split"
            )
        found = self._result(rank, popular, events, target, coverage)
        found.metrics[f"{PREFIX}unknown_targets"] = unknown_targets
        shared_events = self.catalogue.shared_events
        if shared_events:
            share = shared_events / int(self.catalogue.count_I.sum())
            found.metrics[f"{PREFIX}shared_rows"] = share
        found.metrics[f"{PREFIX}returning_targets"] = returning / sum(map(len, rank))
        trained_U = candidates.trained_I[np.concatenate(target)]
        found.metrics[f"{PREFIX}untrained_targets"] = float(1 - trained_U.mean())
        found.metrics[f"{PREFIX}untrained_items"] = float(1 - candidates.trained_I.mean())
        if self._config.feature(self._config.loss.item_feature).grows:
            found.metrics[f"{PREFIX}unknown_items"] = unknown / shown
        return found

    def _batches(self, targets: Targets) -> Iterator[tuple[Histories, int]]:
        """Batches, and how many of their users are looked at."""
        left = sys.maxsize if self._max_users is None else self._max_users
        for batch in self._reader.read_all(range(self._reader.stripes), targets):
            yield batch, min(batch.users, left)
            left -= batch.users
            if left <= 0:
                return

    def _result(
        self,
        rank: list,
        popular: list,
        events: list,
        target: list,
        coverage: ranking_metrics.Coverage,
    ) -> Evaluation:
        values = ranking_metrics.user_values(np.concatenate(rank))
        baseline = ranking_metrics.user_values(np.concatenate(popular))
        found = ranking_metrics.summarize(values)
        found |= coverage.summarize(_COVERAGE)
        found |= ranking_metrics.summarize(baseline, f"{PREFIX}popularity/")
        found |= ranking_metrics.by_length(values, np.concatenate(events))
        found |= ranking_metrics.by_popularity(values, np.concatenate(target), self._count_I)
        return Evaluation(found, values)
