"""Collects the ranks of users' targets, batch by batch, and computes the metrics of an evaluation.

Shapes: U users of a batch, N users of all batches, I items, K items of a list, W weights of counted
neighbours.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from s2s_jax.data.batching.histories import Histories
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.ranking import ranking_metrics
from s2s_jax.ranking.candidates import returns
from s2s_jax.ranking.ranking_metrics import PREFIX
from s2s_jax.training.evaluations import NEIGHBOURS_WEIGHT

# Coverage is computed for lists of these lengths.
COVERAGE_CUTOFFS = (5, 10, 50)
# Rankings without a model that every evaluation includes: see `ranking.baselines`.
BASELINES = ("popularity", "neighbours")
# Prefix of the metrics of the model without counted neighbours, if their weight was chosen.
MODEL_ALONE = f"{PREFIX}model_alone/"


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
      metrics: means over users, such as "eval/hr@10", also for slices of users and for the baselines.
        In addition:
        "eval/unknown_targets": the number of users who are left out because their target is not in the
        catalogue;
        "eval/returning_targets": the share of users whose target was in their history;
        "eval/untrained_items" and "eval/untrained_targets": the share of the catalogue, and of the
        targets, that was never trained;
        "eval/unknown_items", if the item table grows: the share of the events shown to the model whose
        item has no row;
        "eval/shared_rows", if ids of items share rows of their table: the share of the log's events that
        are about such ids;
        "eval/neighbours_weight" and, for example, "eval/model_alone/hr@10", if the weight of counted
        neighbours was chosen: the chosen weight, and the metrics of the model without them.
      values: the metrics of each user; see `ranking_metrics.user_values`.
    """

    metrics: dict[str, float]
    values: dict[str, np.ndarray]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return 95% bootstrap intervals of the means over all users; this takes a while."""
        return ranking_metrics.intervals(self.values)


class Ranked(NamedTuple):
    """A batch of users for whom the catalogue was ranked.

    Attributes:
      batch: the histories and the targets.
      rank_WU: int64 ranks of the targets by the model, from 0.
      baselines: int64 `[U]` ranks of the targets by each baseline, by its name.
      best_WUK: int32, the model's best items of each user; -1 where a list ends early.
      unknown_U: int32, number of events shown to the model whose item has no row in its table.
    """

    batch: Histories
    rank_WU: np.ndarray
    baselines: Mapping[str, np.ndarray]
    best_WUK: np.ndarray
    unknown_U: np.ndarray


class Tally:
    """Sums up ranked batches.

    Attributes:
      users: number of users with a target in the catalogue, so far.
      unknown_targets: number of users whose target is not in the catalogue, so far.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        count_I: np.ndarray,
        trained_I: np.ndarray,
        counts_unknown_items: bool,
        weights: Sequence[float],
    ):
        """Starts without users.

        Args:
          catalogue: the items that are ranked.
          count_I: int64, events of each item in training.
          trained_I: bool, whether an item was ever trained.
          counts_unknown_items: whether the result has "eval/unknown_items".
          weights: W; with several, the first is 0.
        """
        self.users = 0
        self.unknown_targets = 0
        self._catalogue = catalogue
        self._count_I = count_I
        self._trained_I = trained_I
        self._counts_unknown_items = counts_unknown_items
        self._weights = weights
        self._coverage = [ranking_metrics.Coverage(len(catalogue.item)) for _ in weights]
        self._ranks: list[np.ndarray] = []
        self._baselines: dict[str, list[np.ndarray]] = {}
        self._events: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._returning = 0
        self._shown_events = 0
        self._unknown_events = 0

    def add(self, ranked: Ranked) -> None:
        """Adds the users of a batch."""
        batch = ranked.batch
        chosen = np.flatnonzero(batch.target_U[: batch.users] >= 0)
        self.users += len(chosen)
        self.unknown_targets += batch.users - len(chosen)
        for coverage, best_UK in zip(self._coverage, ranked.best_WUK, strict=True):
            coverage.add(best_UK[chosen])
        self._ranks.append(ranked.rank_WU[:, chosen])
        for name, rank_U in ranked.baselines.items():
            self._baselines.setdefault(name, []).append(rank_U[chosen])
        self._events.append(batch.events_U[chosen])
        self._targets.append(batch.target_U[chosen])
        self._returning += int(returns(batch)[chosen].sum())
        self._shown_events += int(batch.shown_U[chosen].sum())
        self._unknown_events += int(ranked.unknown_U[chosen].sum())

    def result(self, metric: str) -> Evaluation:
        """Return the evaluation of all users added; there must be at least one.

        Args:
          metric: the metric by which the best weight is chosen, such as "ndcg@10"; for ties, the first.
        """
        of_weight = [
            ranking_metrics.user_values(rank_N) for rank_N in np.concatenate(self._ranks, axis=1)
        ]
        best = int(np.argmax([values[metric].mean() for values in of_weight]))
        values = of_weight[best]
        target_N = np.concatenate(self._targets)
        metrics = ranking_metrics.summarize(values)
        metrics |= self._coverage[best].summarize(COVERAGE_CUTOFFS)
        if len(self._weights) > 1:
            assert self._weights[0] == 0, "the first weight is the model alone"
            metrics[NEIGHBOURS_WEIGHT] = self._weights[best]
            metrics |= ranking_metrics.summarize(of_weight[0], MODEL_ALONE)
        for name, ranks in self._baselines.items():
            of_baseline = ranking_metrics.user_values(np.concatenate(ranks))
            metrics |= ranking_metrics.summarize(of_baseline, f"{PREFIX}{name}/")
        metrics |= ranking_metrics.by_length(values, np.concatenate(self._events))
        metrics |= ranking_metrics.by_popularity(values, target_N, self._count_I)
        metrics[f"{PREFIX}unknown_targets"] = self.unknown_targets
        shared_events = self._catalogue.shared_events
        if shared_events:
            share = shared_events / int(self._catalogue.count_I.sum())
            metrics[f"{PREFIX}shared_rows"] = share
        metrics[f"{PREFIX}returning_targets"] = self._returning / self.users
        metrics[f"{PREFIX}untrained_targets"] = float(1 - self._trained_I[target_N].mean())
        metrics[f"{PREFIX}untrained_items"] = float(1 - self._trained_I.mean())
        if self._counts_unknown_items:
            metrics[f"{PREFIX}unknown_items"] = self._unknown_events / self._shown_events
        return Evaluation(metrics, values)


def below_neighbours(metrics: Mapping[str, float], name: str, added: bool) -> str | None:
    """Return a sentence if a model ranks worse than counted neighbours; None if it does not.

    Args:
      metrics: of an evaluation; those of older versions have no neighbours.
      name: the metric to compare, such as "ndcg@10".
      added: whether the metrics are with neighbours, see `eval.neighbours`.
    """
    key = f"{PREFIX}neighbours/{name}"
    if key not in metrics or metrics[f"{PREFIX}{name}"] >= metrics[key]:
        return None
    value = metrics[f"{PREFIX}{name}"]
    found = f"{name} of the model is {value:.4f}, below {metrics[key]:.4f} of counting"
    remedy = "change the number of epochs, dropout or learning rates"
    if added:
        return (
            f"{found} alone (neighbours), although eval.neighbours adds these counts to its scores: "
            f"{remedy}, or recommend with --by neighbours"
        )
    return (
        f"{found} which items follow each other (neighbours): eval.neighbours adds these counts to its "
        f"scores; or {remedy}"
    )
