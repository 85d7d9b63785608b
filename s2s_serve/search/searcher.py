"""Searches the items of an export for users: exactly, or with the index.

With the index, the best items are found in three steps: the index gives more items than asked for,
those with counted neighbours are added, and all of these are scored exactly. Rules always hold: an item
that is left out or not allowed is never found, and if the index gives too few items, all are compared.

Shapes: U users, E width, I items, K items of a list, M items from the index, S pairs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from s2s_serve.errors import UserError
from s2s_serve.items import Items
from s2s_serve.manifest import Manifest
from s2s_serve.search import exact
from s2s_serve.search.exact import NO_PAIRS, Best, Pairs
from s2s_serve.search.index import FEW_ITEMS, Index

Search = Literal["auto", "exact", "index"]
# The index is used if at least this share of the items is allowed.
_MOSTLY_ALLOWED = 0.5
# More items than needed are asked from the index, because it misses some.
_SPARE = 16
# Lists of up to this length are searched together.
_FEWEST = 128
_BLOCK = 2**18


class Asked(NamedTuple):
    """What is searched.

    Attributes:
      users_UE: f32, the vectors of users.
      left_out: pairs of a user and an item that is not recommended.
      biased: pairs whose scores change, and f32 `[S]`, what is added; None: there are none.
      allowed_I: bool, the items that may be recommended to anyone; None: all.
    """

    users_UE: np.ndarray
    left_out: tuple[np.ndarray, np.ndarray]
    biased: tuple[Pairs, np.ndarray] | None
    allowed_I: np.ndarray | None


class Searcher:
    """Searches the items of an export.

    Attributes:
      name: how items are searched: exact or index.
      ranked_I: bool, the items that are recommended at all.
    """

    def __init__(self, directory: Path, manifest: Manifest, items: Items, search: Search):
        """Opens the index, if it is used.

        Args:
          directory: the directory of the version.
          manifest: its manifest.
          items: its items.
          search: how items are searched.

        Raises:
          UserError: the index is wanted and is not there, or is broken.
        """
        self._vectors_IE = items.vectors_IE
        self._cosine = manifest.similarity == "cosine"
        self.ranked_I = np.ones(len(items), bool)
        self._groups: list[np.ndarray | None] = [None]
        if not items.trained_I.all():
            if manifest.untrained == "drop":
                self.ranked_I = items.trained_I
                self._groups = [items.trained_I]
            elif manifest.untrained == "last":
                self._groups = [items.trained_I, ~items.trained_I]
        entry = manifest.index
        if search == "index" and entry is None:
            raise UserError(
                f"search: expected auto or exact, because {directory} has no index, found index; export "
                f"again with --index"
            )
        self._index: Index | None = None
        if entry is not None and (
            search == "index" or (search == "auto" and len(items) > FEW_ITEMS)
        ):
            path = directory / entry.file
            self._index = Index.open(path, len(items), manifest.width, entry.effort)
        self.name = "exact" if self._index is None else "index"
        if self._index is None:
            # In memory: a memory map is read again and again.
            self._vectors_IE = np.array(items.vectors_IE)

    def top_k(self, asked: Asked, k: int) -> Best:
        """Return the K best items that may be recommended to each user."""
        k = min(k, len(self._vectors_IE))
        if self._index is not None and len(self._groups) == 1 and self._mostly(asked.allowed_I):
            return self._with_index(self._index, asked, k)
        return self._exact(asked, k)

    def similar(self, number: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the items with the largest cosines with an item, except itself, and the cosines."""
        k = min(k, len(self._vectors_IE))
        vector_E = _unit(np.asarray(self._vectors_IE[number : number + 1]))[0]
        if self._index is not None and self._cosine:
            (found_M,) = self._index.search(vector_E[None], k + 1 + _SPARE)
            found_M = np.sort(found_M[(found_M >= 0) & (found_M != number)])
            found_M = found_M[self.ranked_I[found_M]]
            if len(found_M) >= k:
                return exact.best_of(found_M, self._vectors_IE[found_M] @ vector_E, k)
        cosine_I = np.empty(len(self._vectors_IE), np.float32)
        for begin in range(0, len(cosine_I), _BLOCK):
            part = _unit(np.asarray(self._vectors_IE[begin : begin + _BLOCK]))
            cosine_I[begin : begin + _BLOCK] = part @ vector_E
        cosine_I[~self.ranked_I] = -np.inf
        cosine_I[number] = -np.inf
        return exact.best_of(np.arange(len(cosine_I)), cosine_I, k)

    def _mostly(self, allowed_I: np.ndarray | None) -> bool:
        return allowed_I is None or float(allowed_I.mean()) >= _MOSTLY_ALLOWED

    def _exact(self, asked: Asked, k: int) -> Best:
        found: Best | None = None
        biased, bias_S = (NO_PAIRS, None) if asked.biased is None else asked.biased
        for group_I in self._groups:
            masks = [mask for mask in (group_I, asked.allowed_I) if mask is not None]
            allowed_I = np.logical_and.reduce(masks) if masks else None
            best = exact.top_k(
                asked.users_UE,
                self._vectors_IE,
                k,
                Pairs(*asked.left_out),
                biased,
                bias_S,
                allowed_I,
            )
            found = best if found is None else _appended(found, best)
            if (found.item_UK >= 0).all():
                break
        assert found is not None, "there is at least one group"
        return found

    def _with_index(self, index: Index, asked: Asked, k: int) -> Best:
        users = len(asked.users_UE)
        best = Best(np.full((users, k), -1, np.int64), np.full((users, k), -np.inf, np.float32))
        (allowed_I,) = self._groups
        if asked.allowed_I is not None:
            allowed_I = asked.allowed_I if allowed_I is None else asked.allowed_I & allowed_I
        of_left_out, left_out = _by_user(*asked.left_out, users)
        pairs, bias_S = (
            (NO_PAIRS, np.zeros(0, np.float32)) if asked.biased is None else asked.biased
        )
        of_biased, biased = _by_user(*pairs, users)
        wanted_U = k + np.diff(of_left_out) + _SPARE
        if allowed_I is not None:
            wanted_U = (wanted_U / max(float(allowed_I.mean()), 0.01)).astype(np.int64)
        wanted_U = np.minimum(wanted_U, len(self._vectors_IE))
        for user, found_M in _found(index, asked.users_UE, wanted_U):
            mine = slice(of_biased[user], of_biased[user + 1])
            candidates = np.union1d(found_M[found_M >= 0], biased[mine])
            scores = self._vectors_IE[candidates] @ asked.users_UE[user]
            scores[np.searchsorted(candidates, biased[mine])] += bias_S[mine]
            gone = np.isin(candidates, left_out[of_left_out[user] : of_left_out[user + 1]])
            if allowed_I is not None:
                gone |= ~allowed_I[candidates]
            item, score = exact.best_of(candidates[~gone], scores[~gone], k)
            if len(item) < k:
                item, score = self._of_one(asked, user, k)
            best.item_UK[user, : len(item)], best.score_UK[user, : len(item)] = item, score
        return best

    def _of_one(self, asked: Asked, user: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the exactly best items of one user."""

        def mine(user_S: np.ndarray, item_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            item = item_S[user_S == user]
            return np.zeros(len(item), np.int64), item

        biased = None
        if asked.biased is not None:
            pairs, bias_S = asked.biased
            biased = Pairs(*mine(*pairs)), bias_S[pairs.user_S == user]
        one = Asked(asked.users_UE[user : user + 1], mine(*asked.left_out), biased, asked.allowed_I)
        best = self._exact(one, k)
        there = best.item_UK[0] >= 0
        return best.item_UK[0][there], best.score_UK[0][there]


def _found(
    index: Index, users_UE: np.ndarray, wanted_U: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each user and the items that the index finds, at least as many as wanted, -1 for none.

    Users who want about as many are searched together, so that a long list does not slow others.
    """
    size_U = np.ceil(np.log2(np.maximum(wanted_U, _FEWEST))).astype(np.int64)
    for size in np.unique(size_U):
        (users,) = np.nonzero(size_U == size)
        found_UM = index.search(users_UE[users], int(wanted_U[users].max()))
        yield from zip(users.tolist(), found_UM, strict=True)


def _by_user(user_S: np.ndarray, item_S: np.ndarray, users: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first pair of each user (and the end), and the items; pairs are sorted by user."""
    return np.searchsorted(user_S, np.arange(users + 1)), item_S


def _unit(vectors_IE: np.ndarray) -> np.ndarray:
    """Return the vectors with length 1; zeros stay zeros."""
    norm_I1 = np.linalg.norm(vectors_IE, axis=1, keepdims=True)
    return vectors_IE / np.maximum(norm_I1, np.finfo(np.float32).tiny)


def _appended(first: Best, second: Best) -> Best:
    """Fills the free places at the end of the first lists with the second lists."""
    k = first.item_UK.shape[1]
    item = np.concatenate([first.item_UK, second.item_UK], axis=1)
    score = np.concatenate([first.score_UK, second.score_UK], axis=1)
    order = np.argsort(item < 0, axis=1, kind="stable")[:, :k]
    return Best(np.take_along_axis(item, order, 1), np.take_along_axis(score, order, 1))
