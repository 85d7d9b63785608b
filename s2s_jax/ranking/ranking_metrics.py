"""Metrics of rankings: means over users, and bootstrap intervals.

A rank is the number of other items with at least the target's score; 0 is best
(`s2s_jax.ranking.ranks`). Results are dicts from names such as "eval/hr@10" to numbers.

Shapes: U users, T targets of a user, I items, K items of a top-K list, M values of a user, N resamples.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from s2s_jax.data.batching.order import integers

# The rank of a target that cannot be recommended: beyond any list, even of the whole catalogue.
MISSED = np.iinfo(np.int64).max
CUTOFFS = (5, 10, 50, 100, 200)
PREFIX = "eval/"
# The longest history of each slice of users; one more slice has all longer histories.
LENGTH_BINS = (5, 20, 50, 200)
# Cumulative shares of all events: the head, head and middle together, and all items.
POPULARITY_SHARES = {"head": 0.5, "middle": 0.8, "tail": 1.0}
_CONFIDENCE = 0.95
_RESAMPLES = 1000
# Maximum number of drawn users in memory at once.
_DRAWS = 2**22


def user_values(rank_UT: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, np.ndarray]:
    """Computes the metrics of each user.

    Args:
      rank_UT: int ranks of each user's targets, from 0; -1 is padding, and `MISSED` stands for a target
        that cannot be recommended. `[U]` if each user has one target.
      cutoffs: the values of k.

    Returns:
      f64 `[U]` by name: "hr@k", 1 if a target is among the best k; "recall@k", the share of targets
      among the best k; "ndcg@k", the sum of 1 / log2(rank + 2) over these, divided by the maximum;
      "mrr", 1 / (rank + 1) of the best target, or 0 if none can be recommended.

    Raises:
      ValueError: a user has no target, or there are no users.

    Examples:
      >>> values = user_values(np.array([0, 2, 12]), cutoffs=[10])
      >>> values["hr@10"].tolist(), values["ndcg@10"].tolist()
      ([1.0, 1.0, 0.0], [1.0, 0.5, 0.0])
    """
    # Devices return ranks of 32 bits, but `MISSED` needs 64.
    rank_UT = np.asarray(rank_UT, np.int64)
    rank_UT = rank_UT[:, None] if rank_UT.ndim == 1 else rank_UT
    real_UT = rank_UT >= 0
    targets_U = real_UT.sum(axis=1)
    if not targets_U.size or not targets_U.all():
        raise ValueError("expected at least one user, and at least one target of each")
    found_UT = real_UT & (rank_UT != MISSED)
    gain_UT = np.where(found_UT, 1 / np.log2(np.maximum(rank_UT, 0) + 2.0), 0)
    # ideal[n] is the sum for n targets at the first n places.
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(rank_UT.shape[1]) + 2.0))])
    values: dict[str, np.ndarray] = {}
    for k in cutoffs:
        hit_UT = real_UT & (rank_UT < k)
        values[f"hr@{k}"] = hit_UT.any(axis=1).astype(float)
        values[f"recall@{k}"] = hit_UT.sum(axis=1) / targets_U
        values[f"ndcg@{k}"] = (gain_UT * hit_UT).sum(axis=1) / ideal[np.minimum(targets_U, k)]
    best_U = np.where(found_UT, rank_UT, MISSED).min(axis=1)
    return values | {"mrr": np.where(best_U == MISSED, 0.0, 1 / (best_U + 1.0))}


def summarize(values: Mapping[str, np.ndarray], prefix: str = PREFIX) -> dict[str, float]:
    """Return the means of `user_values` over all users, and the number of "users".

    All names begin with `prefix`.
    """
    users = len(next(iter(values.values())))
    means = {f"{prefix}{name}": float(value_U.mean()) for name, value_U in values.items()}
    return means | {f"{prefix}users": users}


def intervals(
    values: Mapping[str, np.ndarray], seed: int = 0, resamples: int = _RESAMPLES
) -> dict[str, tuple[float, float]]:
    """Computes 95% bootstrap intervals of the means by drawing users with replacement.

    Args:
      values: the result of `user_values`.
      seed: the seed of the draws; all metrics use the same draws.
      resamples: N.

    Returns:
      The 2.5% and 97.5% quantiles of the N means, with the names of `summarize`.
    """
    value_UM = np.stack(list(values.values()), axis=1)
    users = len(value_UM)
    at_once = max(1, _DRAWS // users)
    means = []
    for begin in range(0, resamples, at_once):
        count = min(at_once, resamples - begin)
        drawn = np.stack(
            [n * users + integers(users, users, seed, begin + n) for n in range(count)]
        )
        times_NU = np.bincount(drawn.reshape(-1), minlength=count * users).reshape(count, users)
        means.append(times_NU @ value_UM / users)
    tail = (1 - _CONFIDENCE) / 2
    low_M, high_M = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    pairs = zip(low_M.tolist(), high_M.tolist(), strict=True)
    return {f"{PREFIX}{name}": pair for name, pair in zip(values, pairs, strict=True)}


def by_length(values: Mapping[str, np.ndarray], length_U: np.ndarray) -> dict[str, float]:
    """Computes means over slices of users by length of history, such as "eval/length_1-5/hr@10".

    Args:
      values: the result of `user_values`.
      length_U: int, number of events before the target.

    Returns:
      The result of `summarize` for each slice that has users.
    """
    bounds = (0, *LENGTH_BINS)
    names = [f"{low + 1}-{high}" for low, high in zip(bounds, LENGTH_BINS, strict=False)]
    # Users without any history belong to the first slice.
    slice_U = np.searchsorted(LENGTH_BINS, length_U)
    return _by_slice(values, slice_U, [f"length_{name}" for name in [*names, f"{bounds[-1] + 1}+"]])


def by_popularity(
    values: Mapping[str, np.ndarray], target_U: np.ndarray, count_I: np.ndarray
) -> dict[str, float]:
    """Computes means over slices of users by popularity of the target: "eval/target_tail/hr@10".

    The head has the most popular items, which together have half of all events. The middle has the next
    ones, up to 80% of the events. The tail has all others.

    Args:
      values: the result of `user_values`, with one target per user.
      target_U: int, the target item of each user; an item outside the catalogue belongs to the tail.
      count_I: int, number of events of each item in training.

    Returns:
      The result of `summarize` for each slice that has users.
    """
    count_I = np.asarray(count_I)
    order_I = np.argsort(-count_I, kind="stable")
    before_I = np.cumsum(count_I[order_I]) - count_I[order_I]
    shares = list(POPULARITY_SHARES.values())
    slice_I = np.empty(count_I.size, np.int64)
    # The first event of an item decides its slice, so the head is never empty.
    slice_I[order_I] = np.searchsorted(shares[:-1], before_I / max(1, count_I.sum()), side="right")
    slice_I[count_I == 0] = len(shares) - 1
    known_U = (target_U >= 0) & (target_U < count_I.size)
    slice_U = np.where(known_U, slice_I[np.where(known_U, target_U, 0)], len(shares) - 1)
    return _by_slice(values, slice_U, [f"target_{name}" for name in POPULARITY_SHARES])


def _by_slice(
    values: Mapping[str, np.ndarray], slice_U: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    results: dict[str, float] = {}
    for number, name in enumerate(names):
        inside_U = slice_U == number
        if inside_U.any():
            sliced = {key: value_U[inside_U] for key, value_U in values.items()}
            results |= summarize(sliced, f"{PREFIX}{name}/")
    return results


class Coverage:
    """Measures the share of the catalogue that is recommended to at least one user.

    Attributes:
      first_I: int64, the best place of each item in any list.
    """

    def __init__(self, items: int):
        """Starts without lists, for a catalogue of `items` items."""
        self.first_I = np.full(items, np.iinfo(np.int64).max)

    def add(self, index_UK: np.ndarray) -> None:
        """Adds the lists of more users, best first; -1 where a list ends early."""
        index_UK = np.asarray(index_UK)
        place_UK = np.broadcast_to(np.arange(index_UK.shape[1]), index_UK.shape)
        real_UK = index_UK >= 0
        np.minimum.at(self.first_I, index_UK[real_UK], place_UK[real_UK])

    def summarize(self, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
        """Return the share of items among the first k of any list, such as "eval/coverage@10".

        If lists are shorter than k, all of their items count.
        """
        return {f"{PREFIX}coverage@{k}": float((self.first_I < k).mean()) for k in cutoffs}
