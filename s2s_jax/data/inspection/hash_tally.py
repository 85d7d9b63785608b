"""How often each of many 64-bit hashes comes, in bounded memory.

Shapes: T hashes, U different ones.
"""

import numpy as np

# Different hashes that are held: 24 bytes each.
_MOST = 2**21


class HashTally:
    """Counts hashes, each in a group; where there are too many, those of an even sample of groups.

    A group is in the sample as a whole or not at all. It is if its hash is below a limit, which is
    halved whenever more hashes are held than `most`, so shares that are taken of the sample are those
    of the whole, about.
    """

    def __init__(self, most: int = _MOST):
        """Args: most is the number of different hashes that may be held."""
        self._most = most
        # Groups whose hash has no bit set above this one are in the sample.
        self._bits = 64
        self._held: list[np.ndarray] = [np.zeros((3, 0), np.uint64)]

    @property
    def exact(self) -> bool:
        """Whether all groups are in the sample."""
        return self._bits == 64

    def add(self, hash_T: np.ndarray, group_T: np.ndarray) -> None:
        """Counts `hash_T`, whose groups have the hashes `group_T`; both are uint64 `[T]`."""
        chosen = self._in_sample(group_T)
        first, counts = _first_and_count(hash_T[chosen])
        self._held.append(
            np.stack([hash_T[chosen][first], group_T[chosen][first], counts.astype(np.uint64)])
        )
        # Merged only when as many wait as are held, so that a hash is sorted few times.
        if sum(part.shape[1] for part in self._held[1:]) > self._held[0].shape[1]:
            self._merge()

    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The hashes of the sample, rising, their groups (uint64 `[U]`) and counts (int64 `[U]`)."""
        self._merge()
        hash_U, group_U, count_U = self._held[0]
        return hash_U, group_U, count_U.astype(np.int64)

    def of_all(self, number: int) -> int:
        """How many there are of what there are `number` of in the sample, about."""
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
    """Place and number of each different hash."""
    if not is_sorted:
        _, first, counts = np.unique(hash_T, return_index=True, return_counts=True)
        return first, counts
    begins_T = np.ones(len(hash_T), bool)
    np.not_equal(hash_T[1:], hash_T[:-1], out=begins_T[1:])
    first = np.flatnonzero(begins_T)
    return first, np.diff(np.append(first, len(hash_T)))
