"""Adds counted neighbours to the scores of a model: what followed the user's newest items elsewhere.

A model learns slowly what items of few events have in common with others, but counting knows at once
which items follow each other. With a weight w, which `eval.neighbours` gives, the logit of an item (its
score divided by `loss.temperature`) becomes

    logit + w * log(1 + count / 0.05)

where the count is the score of `data.items.neighbours`. Items without a count keep their logit. This
multiplies the model's probabilities with a power of the counts: a product of experts (Hinton, "Training
products of experts by minimizing contrastive divergence", 2002).

Shapes: U users, E width, I items, S pairs of a user and an item, W weights.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from s2s_jax.config.settings import Decoding, Items, Logs, Ranking, Split
from s2s_jax.data.batching.histories import Histories
from s2s_jax.data.encoding.held_out import training_cut
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.data.items.neighbours import Scorer, Scores, count_neighbours
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.ranking.ranked_items import Bias
from s2s_serve.encoding import neighbour_scores
from s2s_serve.encoding.item_numbers import ItemNumbers

# The weights that training tries if `eval.neighbours` is auto; the first is the model alone.
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


class NeighbourBias:
    """The biases of users, for one or several weights.

    Attributes:
      scorer: scores items by their counts.
    """

    def __init__(self, scorer: Scorer, weights: Sequence[float], temperature: float):
        """Prepares the biases.

        Args:
          scorer: scores items by their counts. No item is left out here: those that may not be
            recommended are left out of the ranking.
          weights: the weights of the counts' logarithm in a logit.
          temperature: `loss.temperature`, because scores are logits times the temperature.
        """
        self.scorer = scorer
        self._weights, self._temperature = weights, temperature

    def of(self, scores: Scores) -> Bias:
        """Return the biases of users with these scores, for all pairs with a count."""
        of_weights = [
            neighbour_scores.bias_of(scores.score_S, weight, self._temperature)
            for weight in self._weights
        ]
        bias_WS = np.stack(of_weights)
        return Bias(scores.user_S, scores.item_S.astype(np.int32), bias_WS)


def scored_parts(
    scorer: Scorer, users_UE: np.ndarray, batch: Histories
) -> Iterator[tuple[np.ndarray, Histories, Scores]]:
    """Yields parts of a batch with few enough scores for memory, in order; usually the whole batch.

    Args:
      scorer: scores items by their counts.
      users_UE: f32, the vectors of the users of the batch.
      batch: users.
    """
    for of in scorer.slices(batch.item_P, batch.events_U):
        whole = of == slice(0, len(batch.events_U))
        part = batch if whole else batch.part(of)
        scores = scorer.score(part.item_P, part.events_U)
        yield users_UE if whole else users_UE[of], part, scores


def count_bias(
    ranking: Ranking, split: Split, logs: Logs, decoding: Decoding, catalogue: Catalogue
) -> NeighbourBias | None:
    """Counts the neighbours that a ranking needs, in the events that training sees.

    Args:
      ranking: which items are ranked, and how.
      split: which events are held out.
      logs: how the training log is read.
      decoding: how training decodes its rows.
      catalogue: the items that are ranked.

    Returns:
      The biases, with one weight; None if `eval.neighbours` is 0, without reading anything.

    Raises:
      UserError: the log cannot be read.
    """
    if ranking.weight == 0:
        return None
    index = index_files(logs, decoding)
    return bias_of(ranking, make_scorer(ranking.items, split, logs, index, catalogue))


def bias_of(ranking: Ranking, scorer: Scorer) -> NeighbourBias | None:
    """Return the biases of a ranking, with one weight; None if `eval.neighbours` is 0."""
    weight = ranking.weight
    return NeighbourBias(scorer, [weight], ranking.temperature) if weight else None


def make_scorer(
    items: Items, split: Split, logs: Logs, index: FileIndex, catalogue: Catalogue
) -> Scorer:
    """Counts the neighbours of a catalogue's items in the events that training sees.

    Args:
      items: what an item is.
      split: which events are held out.
      logs: how the training log is read.
      index: the index of the training log.
      catalogue: the items.

    Raises:
      UserError: the log cannot be read.
    """
    numbers = ItemNumbers(catalogue.ids[items.item.name])
    cut = training_cut(split)
    return Scorer(count_neighbours(items, logs, index, cut, numbers, len(catalogue.item)))
