"""Adds counted neighbours to the scores of a model: what followed the user's newest items elsewhere.

A model learns slowly what items of few events have in common with others, but counting knows at once
which items follow each other. With the weight w of `eval.neighbours`, the logit of an item (its score
divided by `loss.temperature`) becomes

    logit + w * log(1 + count / 0.05)

where the count is the score of `data.items.neighbours`. Items without a count keep their logit. This
multiplies the model's probabilities with a power of the counts: a product of experts (Hinton, "Training
products of experts by minimizing contrastive divergence", 2002).

Shapes: U users, I items, S pairs of a user and an item.
"""

import numpy as np
import scipy.sparse

from s2s_jax.config.settings import Decoding, Logs, Ranking, Split
from s2s_jax.data.batching.histories import Histories
from s2s_jax.data.encoding.held_out import training_cut
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.data.items.item_numbers import ItemNumbers
from s2s_jax.data.items.neighbours import Neighbours, count_neighbours
from s2s_jax.ranking.ranked_items import Bias

# A pair that was never counted is taken for one that was counted this often.
_PRIOR = 0.05


class NeighbourBias:
    """The biases of a batch of users."""

    def __init__(self, neighbours_II: scipy.sparse.csr_matrix, scale: float):
        """Prepares the counts.

        Args:
          neighbours_II: how often items follow each other; see `count_neighbours`.
          scale: the weight of the counts' logarithm in a score, `eval.neighbours * loss.temperature`.
        """
        # No item is left out here: those that may not be recommended are left out of the ranking.
        items = len(neighbours_II.indptr) - 1
        self._scorer = Neighbours(neighbours_II, np.zeros(items, np.int64))
        self._scale = scale

    def of(self, batch: Histories) -> Bias:
        """Return the biases of the users of a batch, f32, for all pairs with a count."""
        user_S, item_S, score_S = self._scorer.score(batch.item_P, batch.events_U, None)
        bias_S = self._scale * np.log1p(score_S / _PRIOR)
        return Bias(user_S, item_S.astype(np.int32), bias_S.astype(np.float32))


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
      The biases; None if `eval.neighbours` is 0, without reading anything.

    Raises:
      UserError: the log cannot be read.
    """
    if ranking.neighbours_scale == 0:
        return None
    index = index_files(logs, decoding)
    numbers = ItemNumbers(catalogue.ids[ranking.items.item.name])
    cut = training_cut(split)
    items = len(catalogue.item)
    counts_II = count_neighbours(ranking.items, logs, index, cut, numbers, items)
    return NeighbourBias(counts_II, ranking.neighbours_scale)
