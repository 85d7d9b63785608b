"""How counts of neighbours score items for a user, and change the scores of a model.

An item's score for a user is the weighted sum of its weights as a neighbour of the user's newest five
events: the newest event counts 1, the one before it 1/2, and so on. With a weight w and a temperature t,
the score of a model is changed by w * t * log(1 + score / 0.05).

Shapes: P events, U users, E newest events of a user, S scored pairs of a user and an item.
"""

import numpy as np

# Weights of pairs are counted in sixths, so that sums are exact in any order.
PAIR_UNIT = 6
# Weights of the newest five events, the newest first, in sixtieths.
EVENT_WEIGHTS = (60, 30, 20, 15, 12)
# A pair that was never counted is taken for one that was counted this often.
_PRIOR = 0.05


def newest_items(item_P: np.ndarray, events_U: np.ndarray) -> np.ndarray:
    """Return int `[U, E]`: the items of the newest events, the newest first; -1 where there is none.

    Args:
      item_P: int items of all events, user after user, oldest first; negative if the item has no number.
      events_U: int, number of events of each user.

    Examples:
      >>> newest_items(np.array([7, 8, 9]), np.array([2, 1])).tolist()
      [[8, 7, -1, -1, -1], [9, -1, -1, -1, -1]]
    """
    end_U = np.cumsum(events_U)
    newest_E = np.arange(len(EVENT_WEIGHTS))
    place_UE = end_U[:, None] - 1 - newest_E
    there_UE = newest_E < np.asarray(events_U)[:, None]
    return np.where(there_UE, np.append(item_P, -1)[np.where(there_UE, place_UE, -1)], -1)


def bias_of(score_S: np.ndarray, weight: float, temperature: float) -> np.ndarray:
    """Return f32 `[S]`: what is added to a model's scores.

    Args:
      score_S: f64, scores by counts.
      weight: the weight of the counts' logarithm in a logit.
      temperature: `loss.temperature`, because scores are logits times the temperature.
    """
    return (weight * temperature * np.log1p(score_S / _PRIOR)).astype(np.float32)
