"""The items in the histories of users, stored sparsely.

Some users have a million times as many items as others. So items are stored as pairs, and not as a
rectangle that is as wide as the longest history.

Shapes: T pairs, U users, S places of a row.
"""

from typing import NamedTuple

import numpy as np


class Seen(NamedTuple):
    """Distinct pairs of a user and an item, sorted by user, then item.

    Attributes:
      user_T: int32, from 0.
      item_T: int32, from 0.
    """

    user_T: np.ndarray
    item_T: np.ndarray


def distinct(user_T: np.ndarray, item_T: np.ndarray) -> Seen:
    """Return the distinct pairs.

    Args:
      user_T: int users, in any order.
      item_T: int items; pairs with a negative item are left out.

    Examples:
      >>> user, item = distinct(np.array([1, 0, 1, 1]), np.array([5, 5, 5, -1]))
      >>> user.tolist(), item.tolist()
      ([0, 1], [5, 5])
    """
    there_T = item_T >= 0
    pair_T = user_T[there_T].astype(np.int64) << 32 | item_T[there_T].astype(np.int64)
    pair_T.sort()
    first_T = np.ones(len(pair_T), bool)
    np.not_equal(pair_T[1:], pair_T[:-1], out=first_T[1:])
    pair_T = pair_T[first_T]
    return Seen((pair_T >> 32).astype(np.int32), (pair_T & 0xFFFFFFFF).astype(np.int32))


def of_rows(item_US: np.ndarray) -> Seen:
    """Return the distinct items of each row; negative items are padding."""
    user_US = np.broadcast_to(np.arange(len(item_US))[:, None], item_US.shape)
    return distinct(user_US.ravel(), item_US.ravel())
