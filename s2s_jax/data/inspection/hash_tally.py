"""Counts how often each of many 64-bit hashes occurs, in bounded memory.

Shapes: T hashes, U distinct hashes.
"""

import numpy as np

# Distinct hashes held, 24 bytes each.
_MOST = 2**21


class HashTally:
    """Counts hashes that belong to groups; if there are too many, counts a uniform sample of groups.

    A group is either wholly in the sample or not at all. It is in the sample if its hash is below a
    limit, which is halved whenever more than `most` hashes are held. Proportions in the sample are
    therefore close to those in all groups.
    """

    def __init__(self, most: int = _MOST):
        """Starts without hashes, and holds at most `most` distinct ones."""
        self._most = most
        # Groups whose hash fits in this many bits are in the sample.
        self._bits = 64
        self._held: list[np.ndarray] = [np.zeros((3, 0), np.uint64)]

    @property
    def exact(self) -> bool:
        """Whether all groups are in the sample."""
        return self._bits == 64

    def add(self, hash_T: np.ndarray, group_T: np.ndarray) -> None:
        """Adds hashes; `group_T` are the hashes of their groups. Both are uint64 `[T]`."""
        chosen = self._in_sample(group_T)
        first, counts = _first_and_count(hash_T[chosen])
        self._held.append(
            np.stack([hash_T[chosen][first], group_T[chosen][first], counts.astype(np.uint64)])
        )
        # Merged only when as many wait as are held, so that each hash is sorted only a few times.
        if sum(part.shape[1] for part in self._held[1:]) > self._held[0].shape[1]:
            self._merge()

    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The sample's hashes, sorted, their groups (both uint64 `[U]`) and counts (int64 `[U]`)."""
        self._merge()
        hash_U, group_U, count_U = self._held[0]
        return hash_U, group_U, count_U.astype(np.int64)

    def of_all(self, number: int) -> int:
        """Scales a number from the sample to an estimate for all groups."""
        return number << (64 - self._bits)

    def _in_sample(self, group_T: np.ndarray) -> np.ndarray:
        if self._bits == 64:
            return np.ones(len(group_T), bool)
        return group_T >> np.uint64(self._bits) == 0

    def _merge(self) -> None:
        hash_T, group_T, count_T = np.concatenate(self._held, axis=1)
        order_T = np.argsort(hash_T, kind="stable")
        first, _ = _first_and_count(hash_T[order_T], is_sorted=True)
        sums = np.add.reduceat(count_T[order_T], first) if len(first) else count_T
        kept = order_T[first]
        held = np.stack([hash_T[kept], group_T[kept], sums])
        while held.shape[1] > self._most and self._bits > 0:
            self._bits -= 1
            held = held[:, self._in_sample(held[1])]
        self._held = [held]


def _first_and_count(hash_T: np.ndarray, is_sorted: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """First index and count of each distinct hash."""
    if not is_sorted:
        _, first, counts = np.unique(hash_T, return_index=True, return_counts=True)
        return first, counts
    begins_T = np.ones(len(hash_T), bool)
    np.not_equal(hash_T[1:], hash_T[:-1], out=begins_T[1:])
    first = np.flatnonzero(begins_T)
    return first, np.diff(np.append(first, len(hash_T)))
