"""Exact ranking of a catalogue: the best items of each user, and the rank of one item among all.

The score of an item is the dot product of its vector with the user's; for cosines, normalize both first.
The rows of items are sharded over the devices, and each device scores its items in blocks, so that the
memory in addition to the vectors is 4 bytes × users × `block_items` (about twice that at the peak), for
any number of items.

Every product has the same shape, P users by T items. For different shapes, kernels sum in different
orders, which changes the last bits of a score; with a single shape, a score depends only on the two
vectors. So results are the same, bit for bit, for any batch, block and number of devices of the same
kind, and items with equal vectors tie exactly. This requires that a kernel sums in the same way at all
places of a shape, which is tested on CPUs.

Shapes: B users, G groups of P users, E width, I items, R rows (I and padding), N tiles of T items in a
block, C items of a chunk, M chunks that are searched, K best items, S pairs of a user and an item.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from s2s_jax.cluster.mesh import DATA_AXIS, replicated, row_sharded
from s2s_jax.data.items.seen import Seen

_USERS = 64
_TILE = 2048
# Only the largest score of each chunk is sorted. Smaller chunks mean more sorting, larger ones more
# searching.
_CHUNK = 32
# Numbers of chunks to search if only few need it, as is usual after the first blocks.
_FEW_CHUNKS = (8, 32)
# Independent counters per user: summing a row into a single number would not be vectorized.
_LANES = 64
_BLOCK_ITEMS = 2**14
# Seen pairs are padded to a power of two, at least this, so that few programs are compiled.
_LEAST_PAIRS = 1024


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The vectors of all items, on their devices.

    Attributes:
      vectors_RE: f32, rows sharded over the devices; rows from `items` on are padding and never rank.
      items: I.
      blocks: number of blocks per device.
      mesh: the devices.
    """

    vectors_RE: jax.Array
    items: int
    blocks: int
    mesh: Mesh


class Best(NamedTuple):
    """The best items of each user: highest score first, for equal scores the lower index first.

    Attributes:
      index_BK: int32; -1 if fewer than K items are left.
      score_BK: f32; -inf at these places.
    """

    index_BK: jax.Array
    score_BK: jax.Array


class _Pairs(NamedTuple):
    """`Seen` on the devices: int32 `[S]` each; item -1 is padding."""

    user_S: jax.Array
    item_S: jax.Array


def make_catalogue(
    vectors_IE: np.ndarray | jax.Array, mesh: Mesh, block_items: int = _BLOCK_ITEMS
) -> Catalogue:
    """Pads vectors and shards their rows over the devices of a mesh with one axis.

    Args:
      vectors_IE: finite numbers. Of a NumPy array, each device gets only its own rows; with several
        hosts, each host must have the whole array. A JAX array needs memory for a second one.
      mesh: see `s2s_jax.cluster.mesh.make_mesh`.
      block_items: approximate number of items that each device scores at once.

    Raises:
      ValueError: there are no items, or more than int32 can number.
    """
    items, width = vectors_IE.shape
    if not 0 < items < 2**31 - mesh.size * (block_items + _TILE):
        raise ValueError(f"expected 1 to about 2^31 items, found {items}")
    tiles = -(-items // (mesh.size * _TILE))
    blocks = -(-tiles // max(1, block_items // _TILE))
    rows = mesh.size * blocks * -(-tiles // blocks) * _TILE
    sharding = row_sharded(mesh)
    if isinstance(vectors_IE, jax.Array):
        pad = jax.jit(lambda x_IE: _pad_rows(x_IE, rows, 0), out_shardings=sharding)
        vectors_RE = pad(jax.device_put(vectors_IE, replicated(mesh)).astype(jnp.float32))
    else:

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            rows_read = slice(None) if index is None else index[0]
            begin, end, _ = rows_read.indices(rows)
            part_XE = np.zeros((end - begin, width), np.float32)
            real_XE = vectors_IE[begin:end]
            part_XE[: len(real_XE)] = real_XE
            return part_XE

        vectors_RE = jax.make_array_from_callback((rows, width), sharding, read)
    return Catalogue(vectors_RE, items, blocks, mesh)


def top_k(
    users_BE: np.ndarray | jax.Array,
    catalogue: Catalogue,
    k: int,
    seen: Seen | None = None,
) -> Best:
    """The K best items of each user.

    Args:
      users_BE: f32, finite.
      catalogue: the items.
      k: K, at least 1; may exceed the number of items.
      seen: items that are left out; users are indices into `users_BE`. None: all items count.

    Raises:
      ValueError: shapes do not fit, or k is less than 1.

    Examples:
      >>> from s2s_jax.cluster.mesh import make_mesh
      >>> items = make_catalogue(np.array([[1.0, 0], [0, 1], [0.5, 0]]), make_mesh(jax.devices()[:1]))
      >>> top_k(np.array([[2.0, 1]]), items, k=2).score_BK.tolist()
      [[2.0, 1.0]]
      >>> top_k(np.array([[2.0, 1]]), items, k=2).index_BK.tolist()  # of equals the first
      [[0, 1]]
    """
    if k < 1:
        raise ValueError(f"expected k of at least 1, found {k}")
    users, pairs = _padded(users_BE, seen, catalogue)
    best = _top_k(
        users, catalogue.vectors_RE, catalogue.items, pairs, k, catalogue.blocks, catalogue.mesh
    )
    return Best(best.index_BK[: len(users_BE)], best.score_BK[: len(users_BE)])


def ranks(
    users_BE: np.ndarray | jax.Array,
    target_B: np.ndarray | jax.Array,
    catalogue: Catalogue,
    seen: Seen | None = None,
) -> jax.Array:
    """int32 `[B]`: the number of other items with at least the score of the user's target; 0 is best.

    Args:
      users_BE: f32.
      target_B: int32 target item of each user; an item outside the catalogue has rank I.
      catalogue: the items.
      seen: items that do not count, as in `top_k`; the target is ranked even if it is one of them.

    Raises:
      ValueError: shapes do not fit.
    """
    if target_B.shape != (len(users_BE),):
        raise ValueError(f"expected {len(users_BE)} targets, found shape {target_B.shape}")
    users, pairs = _padded(users_BE, seen, catalogue)
    target = _pad_rows(target_B.astype(np.int32), len(users), -1)
    target = jax.device_put(target, replicated(catalogue.mesh))
    rank_B = _ranks(
        users,
        target,
        catalogue.vectors_RE,
        catalogue.items,
        pairs,
        catalogue.blocks,
        catalogue.mesh,
    )
    return rank_B[: len(users_BE)]


def _padded(
    users_BE: np.ndarray | jax.Array, seen: Seen | None, catalogue: Catalogue
) -> tuple[jax.Array, _Pairs]:
    """Users padded to whole groups, and padded seen pairs (item -1 is padding), on all devices."""
    width = catalogue.vectors_RE.shape[1]
    if users_BE.ndim != 2 or users_BE.shape[1] != width:
        raise ValueError(f"expected users of width {width}, found shape {users_BE.shape}")
    user_S, item_S = (np.zeros(0, np.int32),) * 2 if seen is None else seen
    if user_S.shape != item_S.shape or user_S.max(initial=-1) >= len(users_BE):
        raise ValueError(
            f"expected items seen by {len(users_BE)} users, found {user_S.shape} users up to "
            f"{user_S.max(initial=-1)} and {item_S.shape} items"
        )
    rows = -(-len(users_BE) // _USERS) * _USERS
    users = _pad_rows(users_BE.astype(np.float32), rows, 0)
    size = max(_LEAST_PAIRS, 2 ** int(len(user_S) - 1).bit_length()) if len(user_S) else 0
    pairs = _Pairs(_pad_rows(user_S, size, 0), _pad_rows(item_S, size, -1))
    return jax.device_put((users, pairs), replicated(catalogue.mesh))


def _pad_rows(x: Any, rows: int, value: int) -> Any:
    widths = [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    # np.pad needs no compilation for each shape.
    pad = jnp.pad if isinstance(x, jax.Array) else np.pad
    return pad(x, widths, constant_values=value)


@functools.partial(jax.jit, static_argnames=("k", "blocks", "mesh"))
def _top_k(
    users_BE: jax.Array,
    vectors_RE: jax.Array,
    items: int,
    seen: _Pairs,
    k: int,
    blocks: int,
    mesh: Mesh,
) -> Best:
    def on_device(users_BE, vectors_XE, items, seen):
        first = jax.lax.axis_index(DATA_AXIS) * vectors_XE.shape[0]
        tiles = vectors_XE.shape[0] // _TILE // blocks

        def visit(block: jax.Array, best: Best) -> Best:
            begin = first + block * (tiles * _TILE)
            scores_NBT = _score(
                users_BE, vectors_XE, block * tiles, tiles, items - begin, _after(seen, begin)
            )
            return _improve(best, scores_NBT, begin)

        start = Best(
            jnp.full((users_BE.shape[0], k), -1, jnp.int32),
            jnp.full((users_BE.shape[0], k), -jnp.inf),
        )
        start = jax.lax.pcast(start, DATA_AXIS, to="varying")
        return jax.lax.fori_loop(0, blocks, visit, start)

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(DATA_AXIS), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(None, DATA_AXIS),
    )
    # Devices have ascending items, so the lower index still comes first among equal scores.
    all_best = mapped(users_BE, vectors_RE, items, seen)
    all_best = jax.lax.with_sharding_constraint(all_best, replicated(mesh))
    score_BK, place_BK = jax.lax.top_k(all_best.score_BK, k)
    index_BK = jnp.take_along_axis(all_best.index_BK, place_BK, axis=1)
    return Best(jnp.where(score_BK == -jnp.inf, -1, index_BK), score_BK)


@functools.partial(jax.jit, static_argnames=("blocks", "mesh"))
def _ranks(
    users_BE: jax.Array,
    target_B: jax.Array,
    vectors_RE: jax.Array,
    items: int,
    seen: _Pairs,
    blocks: int,
    mesh: Mesh,
) -> jax.Array:
    def on_device(users_BE, target_B, vectors_XE, items, seen):
        first = jax.lax.axis_index(DATA_AXIS) * vectors_XE.shape[0]
        tiles = vectors_XE.shape[0] // _TILE // blocks
        score_B = _target_scores(users_BE, _fetch(vectors_XE, target_B - first))
        # The target is excluded by its index, not by its score.
        user_B = jnp.arange(users_BE.shape[0], dtype=jnp.int32)
        left_out = _Pairs(
            jnp.concatenate([seen.user_S, user_B]), jnp.concatenate([seen.item_S, target_B])
        )

        def visit(block: jax.Array, count_BL: jax.Array) -> jax.Array:
            begin = first + block * (tiles * _TILE)
            scores_NBT = _score(
                users_BE, vectors_XE, block * tiles, tiles, items - begin, _after(left_out, begin)
            )
            # Written so that NaN scores count as at least as large.
            at_least_NBT = ~(scores_NBT < score_B[None, :, None])
            lanes_NBXL = at_least_NBT.reshape(*at_least_NBT.shape[:2], -1, _LANES)
            return count_BL + jnp.where(lanes_NBXL, 1, 0).sum(axis=(0, 2))

        start = jnp.zeros((users_BE.shape[0], _LANES), jnp.int32)
        start = jax.lax.pcast(start, DATA_AXIS, to="varying")
        count_BL = jax.lax.fori_loop(0, blocks, visit, start)
        return jax.lax.psum(count_BL.sum(axis=1), DATA_AXIS)

    everywhere = PartitionSpec()
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(everywhere, everywhere, PartitionSpec(DATA_AXIS), everywhere, everywhere),
        out_specs=everywhere,
    )
    rank_B = mapped(users_BE, target_B, vectors_RE, items, seen)
    return jnp.where((target_B >= 0) & (target_B < items), rank_B, items)


def _product(users_PE: jax.Array, tile_TE: jax.Array) -> jax.Array:
    """f32 `[P, T]`: the only product that computes scores."""
    # XLA must not fuse the operands' computation into the product, which might change the order of sums.
    users_PE, tile_TE = jax.lax.optimization_barrier((users_PE, tile_TE))
    scores_PT = jax.lax.dot_general(
        users_PE, tile_TE, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    # Sorting would distinguish -0 from 0.
    return jnp.where(scores_PT == 0, 0.0, scores_PT)


def _score(
    users_BE: jax.Array,
    vectors_XE: jax.Array,
    first_tile: jax.Array,
    tiles: int,
    items: jax.Array,
    left_out: _Pairs,
) -> jax.Array:
    """Scores of one block.

    Args:
      users_BE: f32.
      vectors_XE: f32, all vectors of this device.
      first_tile: int32 scalar, first tile of the block.
      tiles: N.
      items: int32 scalar; places of the block from here on are padding.
      left_out: places of the block that get -inf; places outside the block are ignored.

    Returns:
      f32 `[N, B, T]`, -inf for items that are left out and for padding.
    """
    users_GPE = users_BE.reshape(-1, _USERS, users_BE.shape[1])
    users = users_BE.shape[0]

    def one_tile(_, number: jax.Array) -> tuple[None, jax.Array]:
        row = (first_tile + number) * _TILE
        tile_TE = jax.lax.dynamic_slice_in_dim(vectors_XE, row, _TILE)
        scores_GPT = jax.lax.map(lambda users_PE: _product(users_PE, tile_TE), users_GPE)
        real_T = number * _TILE + jnp.arange(_TILE, dtype=jnp.int32) < items
        return None, jnp.where(real_T[None], scores_GPT.reshape(users, _TILE), -jnp.inf)

    scores_NBT = jax.lax.scan(one_tile, None, jnp.arange(tiles, dtype=jnp.int32))[1]
    inside_S = (left_out.item_S >= 0) & (left_out.item_S < tiles * _TILE)
    place_S = jnp.where(inside_S, left_out.item_S, tiles * _TILE)
    at = (place_S // _TILE, left_out.user_S, place_S % _TILE)
    return scores_NBT.at[at].set(-jnp.inf, mode="drop")


def _after(pairs: _Pairs, begin: jax.Array) -> _Pairs:
    """The same pairs, with items counted from `begin`."""
    return _Pairs(pairs.user_S, pairs.item_S - begin)


def _improve(best: Best, scores_NBT: jax.Array, begin: jax.Array) -> Best:
    """Merges the scores of one more block, of items from `begin` on, into the best.

    Only chunks whose largest score beats a user's K-th best so far can improve that user's list, and of
    these only the K chunks with the largest such scores (for equal scores the earlier chunk): every item
    elsewhere has K better ones. The number of chunks needed is known before they are searched.
    """
    tiles, users, _ = scores_NBT.shape
    k = best.score_BK.shape[1]
    chunks_NBXC = scores_NBT.reshape(tiles, users, -1, _CHUNK)
    per_tile = chunks_NBXC.shape[2]
    greatest_BX = chunks_NBXC.max(axis=3).transpose(1, 0, 2).reshape(users, tiles * per_tile)
    needed = (greatest_BX > best.score_BK[:, -1:]).sum(axis=1).max()

    def look_into(count: int) -> Best:
        # In ascending order, so that the lower index comes first among equal scores.
        chunk_BM = jnp.sort(jax.lax.top_k(greatest_BX, count)[1], axis=1)
        user_B1 = jnp.arange(users)[:, None]
        found_BMC = chunks_NBXC[chunk_BM // per_tile, user_B1, chunk_BM % per_tile]
        within_C = jnp.arange(_CHUNK, dtype=jnp.int32)
        index_BMC = begin + chunk_BM[..., None] * _CHUNK + within_C[None, None]
        score = jnp.concatenate([best.score_BK, found_BMC.reshape(users, -1)], axis=1)
        index = jnp.concatenate([best.index_BK, index_BMC.reshape(users, -1)], axis=1)
        score_BK, place_BK = jax.lax.top_k(score, k)
        return Best(jnp.take_along_axis(index, place_BK, axis=1), score_BK)

    most = min(k, tiles * per_tile)
    counts = [*(count for count in _FEW_CHUNKS if count < most), most]
    branches = [lambda: best, *(functools.partial(look_into, count) for count in counts)]
    return jax.lax.switch(jnp.searchsorted(jnp.asarray([0, *counts[:-1]]), needed), branches)


def _fetch(vectors_XE: jax.Array, row_B: jax.Array) -> jax.Array:
    """f32 `[B, E]` rows, numbered relative to this device, from whichever device has them; else 0."""
    mine_B = (row_B >= 0) & (row_B < vectors_XE.shape[0])
    rows_BE = vectors_XE.at[jnp.where(mine_B, row_B, 0)].get(mode="clip")
    return jax.lax.psum(jnp.where(mine_B[:, None], rows_BE, 0), DATA_AXIS)


def _target_scores(users_BE: jax.Array, targets_BE: jax.Array) -> jax.Array:
    """f32 `[B]` scores of each user's target, bit for bit the same as in its block."""
    width = users_BE.shape[1]

    def one_group(both: tuple[jax.Array, jax.Array]) -> jax.Array:
        users_PE, targets_PE = both
        return jnp.diagonal(_product(users_PE, _pad_rows(targets_PE, _TILE, 0)))

    shape = (-1, _USERS, width)
    score_GP = jax.lax.map(one_group, (users_BE.reshape(shape), targets_BE.reshape(shape)))
    # Below all scores that count, but above items that are left out.
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(jnp.isnan(score_GP), lowest, score_GP).reshape(-1)
