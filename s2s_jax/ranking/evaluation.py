"""Evaluates a model: ranks the whole catalogue for every user and looks up the held-out event.

The key `eval.split` says which events are held out. With `last_events`, the catalogue holds every item
of the log, held-out events included. With `by_time`, it holds the items that training sees. Users whose
target is not in the catalogue are left out and counted. With `eval.filter_seen`, a target that is
already in the user's history counts as missed, because such items are not recommended. The history that
the model sees ends before the target; the target's time and behaviour stay unknown.

With `eval.neighbours` auto, every user is ranked with several weights of counted neighbours, and the
result is that of the best one.

Shapes: U users, I items, E width, W weights of counted neighbours.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import scipy.sparse
from jax.sharding import Mesh

from s2s_jax.cluster import hosts
from s2s_jax.config import Config
from s2s_jax.config.settings import Decoding, Logs, Ranking, ShownHistory, Split
from s2s_jax.data.batching.encoding_shapes import stretches
from s2s_jax.data.batching.histories import Histories, HistoryReader
from s2s_jax.data.encoding import held_out
from s2s_jax.data.encoding.held_out import SplitPart
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.items.catalogue import Catalogue, collect_for_evaluation
from s2s_jax.data.items.neighbours import Scorer, count_neighbours
from s2s_jax.errors import UserError
from s2s_jax.ranking.baselines import Neighbours, Popularity
from s2s_jax.ranking.candidates import Candidates, make_candidates
from s2s_jax.ranking.encode import Encoded, UserEncoder, shapes_for
from s2s_jax.ranking.neighbour_bias import WEIGHTS, NeighbourBias, scored_parts
from s2s_jax.ranking.ranked_items import no_bias
from s2s_jax.ranking.tally import COVERAGE_CUTOFFS, Evaluation, Ranked, Tally
from s2s_jax.training.step.functions import StepFunctions
from s2s_jax.training.step.state import TrainState
from s2s_serve.encoding.item_numbers import ItemNumbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What an evaluation reads, and how it ranks.

    Attributes:
      logs: the logs that are read.
      decoding: how rows of the logs are decoded.
      split: which events are held out.
      shown: the part of a history that the model sees.
      ranking: which items are ranked, and in which order.
      batch_users: number of users that each device ranks at a time.
      metric: the metric that chooses the weight of counted neighbours, if it is auto.
    """

    logs: Logs
    decoding: Decoding
    split: Split
    shown: ShownHistory
    ranking: Ranking
    batch_users: int
    metric: str

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the settings of `eval`."""
        return cls(
            logs=Logs.of(config),
            decoding=Decoding.of(config),
            split=Split.of(config),
            shown=ShownHistory.of(config),
            ranking=Ranking.of(config),
            batch_users=config.eval.batch_size,
            metric=config.eval.metric,
        )


class _Rankings(NamedTuple):
    """The rankings of an evaluation: by the model, and without it."""

    candidates: Candidates
    popularity: Popularity
    neighbours: Neighbours


class Evaluator:
    """Evaluates the states of a run, with the items and users of one log.

    Attributes:
      catalogue: the items that are ranked.
    """

    def __init__(self, settings: EvaluationSettings, mesh: Mesh, max_users: int | None = None):
        """Collects the items of the log.

        Args:
          settings: what is read, and how it is ranked.
          mesh: the devices.
          max_users: number of users to evaluate, the first of the log; None: all users.

        Raises:
          UserError: nothing is held out, or the log cannot be read.
        """
        # Refuses a configuration that holds nothing out.
        held_out.targets(settings.split, "test")
        self._settings = settings
        self._mesh = mesh
        self._max_users = max_users
        items, logs, split = settings.ranking.items, settings.logs, settings.split
        index = index_files(logs, settings.decoding)

        def count() -> tuple[Catalogue, np.ndarray, scipy.sparse.csr_matrix]:
            catalogue, count_I = collect_for_evaluation(items, logs, index, split)
            numbers = ItemNumbers(catalogue.ids[items.item.name])
            cut = held_out.training_cut(split)
            total = len(catalogue.item)
            return catalogue, count_I, count_neighbours(items, logs, index, cut, numbers, total)

        self.catalogue, self._count_I, counts_II = hosts.from_first(count)
        numbers = ItemNumbers(self.catalogue.ids[items.item.name])
        given = settings.ranking.neighbours
        self._weights = WEIGHTS if given == "auto" else (given,)
        self._scorer = Scorer(counts_II)
        alone = self._weights == (0,)
        temperature = settings.ranking.temperature
        self._bias = None if alone else NeighbourBias(self._scorer, self._weights, temperature)
        users = settings.batch_users * mesh.size
        self._reader = HistoryReader(settings.shown, logs, index, numbers, users)

    def evaluate(
        self,
        functions: StepFunctions,
        state: TrainState,
        part: SplitPart,
        in_lockstep: hosts.InLockstep = hosts.in_lockstep,
    ) -> Evaluation:
        """Ranks the catalogue for every user who has a target.

        Args:
          functions: the functions of the model.
          state: the state on the devices.
          part: which of the held-out events are the targets.
          in_lockstep: keeps hosts together, and may end the evaluation between two batches.

        Raises:
          UserError: no events are held out for `part`, or no user has both a history and a target.
        """
        targets = held_out.targets(self._settings.split, part)
        ranking = self._settings.ranking
        # Neighbours are added below, because the baseline needs their scores too.
        candidates = make_candidates(functions, state, self.catalogue, ranking, self._mesh, None)
        rankings = _Rankings(
            candidates,
            Popularity(self._count_I, candidates),
            Neighbours(self._count_I, candidates),
        )
        grows = ranking.items.item.grows
        tally = Tally(self.catalogue, self._count_I, candidates.trained_I, grows, self._weights)
        shapes = shapes_for(self._settings.shown.seq_len, self._settings.batch_users, self._mesh)
        encoder = UserEncoder(functions, state, shapes, self._mesh)
        read = self._reader.read_all(range(self._reader.stripes), targets, self._max_users)
        for stretch in in_lockstep(stretches(read, shapes), _fact):
            pairs = zip(stretch, encoder.encode(stretch), strict=True)
            for batch, encoded in in_lockstep(pairs, lambda pair: _fact(pair[:1])):
                for ranked in self._ranked(rankings, batch, encoded):
                    tally.add(ranked)
        if not tally.users:
            raise UserError(
                f"io.data_paths: expected a row of {self._settings.logs.paths} with a history and a "
                f"{part} event of a known item, found none (rows with an event of an unknown item: "
                f"{tally.unknown_targets:,}); evaluate a log with longer rows, or train with another "
                f"eval.split"
            )
        return tally.result(self._settings.metric)

    def _ranked(self, rankings: _Rankings, batch: Histories, encoded: Encoded) -> Iterator[Ranked]:
        """Yields the users of a batch, ranked; in several parts if they have very many scores."""
        candidates, begin = rankings.candidates, 0
        for of_part_UE, part, scores in scored_parts(self._scorer, encoded.users_UE, batch):
            stop = begin + len(part.events_U)
            bias = no_bias() if self._bias is None else self._bias.of(scores)
            lists = candidates.top_k_by_weight(of_part_UE, max(COVERAGE_CUTOFFS), part, bias)
            yield Ranked(
                part,
                rank_WU=candidates.ranks_by_weight(of_part_UE, part, bias),
                baselines={
                    "popularity": rankings.popularity.ranks(part),
                    "neighbours": rankings.neighbours.ranks(part, scores),
                },
                best_WUK=np.stack([of_weight.index_UK for of_weight in lists]),
                unknown_U=encoded.unknown_U[begin:stop],
            )
            begin = stop


def _fact(batches: Sequence[Histories]) -> int:
    """Return a number that depends on the users of some batches."""
    return zlib.crc32(b"".join(batch.row_U.tobytes() for batch in batches))
