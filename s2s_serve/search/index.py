"""An index that finds most of the best items of a user without comparing all of them.

k-means divides the items into groups of similar items, each with a center (an inverted file; Jégou et
al., Product Quantization for Nearest Neighbor Search, 2011). A search compares a user with all centers,
and then with the items of the best groups. The number of these groups is the effort of the search: more
groups find more of the best items. All groups find all of them, except for rounding: the index keeps
vectors in half precision. The score is the inner product, and vectors may have any lengths.

FAISS does both, and the index is a file of FAISS.

Shapes: I items, S items of the sample that k-means reads, P items of a part, G groups, U users, E width,
M items of a list.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2s_serve.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType

# Groups per square root of the number of items, and items per group that k-means reads.
_GROUPS_PER_ROOT = 4
_SAMPLE = 64
_ITERATIONS = 8
# Items that are read at a time, in numbers.
_PART = 2**23
# The best items of a user are at the near side of their group, so centers are moved outwards by this
# share of the distance between the items and the center (root of the mean square).
_OUTWARDS = 0.5
# Comparing all of fewer items takes a millisecond or two.
FEW_ITEMS = 50_000
# The length of a list that the effort of an index is meant for.
TUNED = 100


def build(
    vectors_IE: np.ndarray,
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Builds an index and writes it to a file.

    It needs memory for the index (2 bytes per number and 8 per item) and for the sample that k-means
    reads (0.8 GB for 10 million items of width 128). The same vectors and seed give the same file, with
    any number of threads, on the same kind of processor.

    Args:
      vectors_IE: f32, at least one item; may be a memory map, and is read in parts.
      path: the file to write.
      threads: number of threads; None: one for each core.
      seed: seed of the sample and of the first centers.
      progress: called with the share of the work that is done, up to 1.

    Raises:
      UserError: a vector is not finite, the file cannot be written, or FAISS is not installed.
    """
    faiss = _faiss()
    items, width = vectors_IE.shape
    assert items > 0, "there are items"
    groups = max(min(int(_GROUPS_PER_ROOT * items**0.5), items // 4), 1)
    sample = min(items, groups * _SAMPLE)
    # K-means and adding compare a vector with all centers.
    work, done = _ITERATIONS * sample + items, 0

    def advance(compared: int) -> None:
        nonlocal done
        done += compared
        if progress is not None:
            progress(done / work)

    scale = _scale(vectors_IE)
    with _threads(faiss, threads):
        row_S = np.sort(np.random.default_rng(seed).choice(items, sample, replace=False))
        by_distance, centers = _centers(faiss, vectors_IE[row_S] * scale, groups, seed, advance)
        index = _empty(faiss, centers)
        for part_PE in _parts(vectors_IE):
            part_PE = part_PE * scale
            group_P = by_distance.search(part_PE, 1)[1][:, 0].copy()
            pointers = faiss.swig_ptr(part_PE), None, faiss.swig_ptr(group_P)
            index.add_core(len(part_PE), *pointers)
            advance(len(part_PE))
        try:
            faiss.write_index(index, os.fspath(path))
        except RuntimeError:
            # FAISS's message has lines of its source code.
            raise UserError(
                f"{path}: expected a place for an index of about {items * (2 * width + 8):,} bytes, "
                f"found that it cannot be written; see that the directory exists and has space"
            ) from None


def _centers(
    faiss: "ModuleType",
    sample_SE: np.ndarray,
    groups: int,
    seed: int,
    advance: Callable[[int], None],
) -> tuple[Any, Any]:
    """Divides a sample of the items into groups, with k-means.

    Args:
      faiss: the library.
      sample_SE: f32, the vectors of the sample.
      groups: G, the number of groups.
      seed: seed of the first centers.
      advance: called with the number of vectors that were compared with all centers.

    Returns:
      FAISS's indexes of the means, which finds the group of an item, and of the centers.
    """
    sample, width = sample_SE.shape
    by_distance = faiss.IndexFlatL2(width)
    means = faiss.Clustering(width, groups)
    means.niter, means.seed = 1, seed
    # The sample is drawn before, and any number of items may be in a group.
    means.min_points_per_centroid, means.max_points_per_centroid = 1, sample
    for _ in range(_ITERATIONS):
        means.train(sample_SE, by_distance)
        advance(sample)
    center_GE = faiss.vector_to_array(means.centroids).reshape(groups, width)
    centers = faiss.IndexFlatIP(width)
    centers.add(_outwards(center_GE, sample_SE, by_distance))
    return by_distance, centers


def _empty(faiss: "ModuleType", centers: Any) -> Any:
    """Return an index without items, of the groups with these centers."""
    index = faiss.IndexIVFScalarQuantizer(
        centers,
        centers.d,
        centers.ntotal,
        faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT,
        False,  # not the difference from the center
    )
    # Half precision has nothing to learn.
    index.is_trained = True
    return index


class Index:
    """An index, mapped into memory: a search reads the groups that it compares. Safe for threads.

    Attributes:
      items: number of items.
      groups: number of groups, which is the highest effort.
      effort: number of groups that a search for up to 100 items compares with. Searches for more items
        compare with more groups: four times the items, twice the groups.
    """

    def __init__(self, faiss: "ModuleType", index: Any, effort: int):
        """See `open`."""
        self._faiss, self._index = faiss, index
        self.items: int = index.ntotal
        self.groups: int = index.nlist
        self.effort = effort

    @classmethod
    def open(cls, path: str | os.PathLike[str], items: int, width: int, effort: int = 1) -> "Index":
        """Opens an index.

        Args:
          path: a file that `build` wrote.
          items: the number of items that it must have.
          width: the width that they must have.
          effort: see the attribute.

        Raises:
          UserError: there is no such file, it is broken or of other items, or FAISS is not installed.
        """
        faiss = _faiss()
        expected = f"{path}: expected an index of {items:,} items of width {width}"
        remedy = "export again"
        if not Path(path).is_file():
            raise UserError(f"{expected}, found no file; {remedy}")
        try:
            found = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except (RuntimeError, MemoryError):
            # FAISS's message has lines of its source code.
            raise UserError(
                f"{expected}, found a file that is broken, or is no index; {remedy}"
            ) from None
        if not isinstance(found, faiss.IndexIVFScalarQuantizer):
            raise UserError(f"{expected}, found an index of another kind; {remedy}")
        if (found.ntotal, found.d) != (items, width):
            raise UserError(
                f"{expected}, found {found.ntotal:,} items of width {found.d}; {remedy}"
            )
        # By default, each search starts 32 threads that read ahead, which takes longer than the search.
        faiss.downcast_InvertedLists(found.invlists).prefetch_nthread = 0
        return cls(faiss, found, effort)

    def search(self, users_UE: np.ndarray, m: int, effort: int | None = None) -> np.ndarray:
        """Finds items with high inner products.

        Args:
          users_UE: f32, the vectors of users.
          m: M, at least 1.
          effort: number of groups to compare with; None: by the attribute. It is doubled for users whose
            groups have fewer than M items, until there are enough.

        Returns:
          int64 `[U, M]`, numbers of items, best first; -1 at the end if there are fewer than M items.
        """
        if effort is None:
            effort = math.ceil(self.effort * max(m / TUNED, 1) ** 0.5)
        effort = max(min(effort, self.groups), 1)
        users_UE = np.ascontiguousarray(users_UE, np.float32)
        item_UM = self._search(users_UE, m, effort)
        while effort < self.groups:
            (short,) = np.nonzero(item_UM[:, min(m, self.items) - 1] < 0)
            if not len(short):
                break
            effort = min(2 * effort, self.groups)
            item_UM[short] = self._search(users_UE[short], m, effort)
        return item_UM

    def _search(self, users_UE: np.ndarray, m: int, effort: int) -> np.ndarray:
        if not len(users_UE):
            return np.empty((0, m), np.int64)
        settings = self._faiss.SearchParametersIVF(nprobe=effort)
        return self._index.search(users_UE, m, params=settings)[1]


def check_installed() -> None:
    """Checks that an index can be built and searched, before anything takes time.

    Raises:
      UserError: FAISS is not installed.
    """
    _faiss()


def _faiss() -> "ModuleType":
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"index: expected the package faiss-cpu, found none that can be imported ({error}); pip "
            f"install faiss-cpu, or search exactly"
        ) from None
    return faiss


@contextlib.contextmanager
def _threads(faiss: "ModuleType", threads: int | None) -> Iterator[None]:
    """Sets the number of threads of FAISS for this thread."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _parts(vectors_IE: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(_PART // vectors_IE.shape[1], 1)
    for begin in range(0, len(vectors_IE), rows):
        yield np.ascontiguousarray(vectors_IE[begin : begin + rows], np.float32)


def _scale(vectors_IE: np.ndarray) -> np.float32:
    """Return a factor for all vectors that keeps their numbers in the range of half precision."""
    largest = 0.0
    begin = 0
    for part_PE in _parts(vectors_IE):
        largest_P = np.abs(part_PE).max(axis=1)
        if not np.isfinite(largest_P).all():
            item = begin + int(np.argmin(np.isfinite(largest_P)))
            raise UserError(
                f"vectors of items: expected finite numbers, found nan or inf in item number {item}; "
                f"use an earlier checkpoint"
            )
        largest = max(largest, float(largest_P.max()))
        begin += len(part_PE)
    # A power of two changes no digits.
    return np.float32(2.0 ** min(-np.frexp(largest)[1], 120)) if largest > 0 else np.float32(1)


def _outwards(center_GE: np.ndarray, sample_SE: np.ndarray, by_distance: Any) -> np.ndarray:
    """Return the centers, moved away from the origin."""
    groups = len(center_GE)
    squared, group = by_distance.search(sample_SE, 1)
    count_G = np.bincount(group[:, 0], minlength=groups)
    squared_G = np.bincount(group[:, 0], squared[:, 0], groups) / np.maximum(count_G, 1)
    length_G = np.linalg.norm(center_GE, axis=1)
    longer_G = length_G + _OUTWARDS * np.sqrt(squared_G)
    factor_G = np.where(length_G > 0, longer_G / np.where(length_G > 0, length_G, 1), 1)
    return (center_GE * factor_G[:, None]).astype(np.float32)
