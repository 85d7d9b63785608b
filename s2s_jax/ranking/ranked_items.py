"""Puts the vectors of items and users on the devices, and the pairs that a ranking treats differently.

Shapes: B users, E width, I items, R rows (I and padding), S pairs of a user and an item, W weights.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import replicated, row_sharded
from s2s_jax.data.items.seen import Seen
from s2s_jax.ranking import scores
from s2s_jax.ranking.scores import Biases, Pairs, pad_rows

# Approximate number of items that each device scores at once.
_BLOCK_ITEMS = 2**14
# Pairs are padded to one of these numbers or, if there are more, to a power of two, so that few programs
# are compiled.
_FEW_PAIRS = (2**10, 2**12, 2**14, 2**16)


@dataclasses.dataclass(frozen=True)
class RankedItems:
    """The vectors of all items, on their devices.

    Attributes:
      vectors_RE: f32, rows sharded over the devices; rows from `items` on are padding and never rank.
      items: I, the number of items.
      blocks: the number of blocks on each device.
      mesh: the devices.
    """

    vectors_RE: jax.Array
    items: int
    blocks: int
    mesh: Mesh


def put_items(
    vectors_IE: np.ndarray | jax.Array, mesh: Mesh, block_items: int = _BLOCK_ITEMS
) -> RankedItems:
    """Pads vectors and shards their rows over the devices of a mesh with one axis.

    Args:
      vectors_IE: finite numbers. Each device gets only its own rows of a NumPy array; with several
        hosts, every host must have the whole array. A JAX array is copied, which takes as much memory
        again.
      mesh: see `s2s_jax.cluster.mesh.make_mesh`.
      block_items: approximate number of items that each device scores at once.

    Raises:
      ValueError: there are no items, or more than int32 can number.
    """
    items, width = vectors_IE.shape
    if not 0 < items < 2**31 - mesh.size * (block_items + scores.TILE):
        raise ValueError(f"expected 1 to about 2^31 items, found {items}")
    tiles = -(-items // (mesh.size * scores.TILE))
    blocks = -(-tiles // max(1, block_items // scores.TILE))
    rows = mesh.size * blocks * -(-tiles // blocks) * scores.TILE
    sharding = row_sharded(mesh)
    if isinstance(vectors_IE, jax.Array):
        pad = jax.jit(lambda x_IE: pad_rows(x_IE, rows, 0), out_shardings=sharding)
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
    return RankedItems(vectors_RE, items, blocks, mesh)


class Bias(NamedTuple):
    """What is added to the scores of some distinct pairs of a user and an item, sorted like `Seen`.

    There may be several weights, each of which gives a ranking of its own.

    Attributes:
      user_S: int32, index of the user in the batch.
      item_S: int32.
      bias_WS: f32, finite.
    """

    user_S: np.ndarray
    item_S: np.ndarray
    bias_WS: np.ndarray

    def of(self, item_B: np.ndarray) -> np.ndarray:
        """Return f32 `[W, B]`: the bias of one item for each user; 0 for pairs without one."""
        mine_S = self.item_S == item_B[self.user_S]
        bias_WB = np.zeros((len(self.bias_WS), len(item_B)), np.float32)
        bias_WB[:, self.user_S[mine_S]] = self.bias_WS[:, mine_S]
        return bias_WB


def no_bias() -> Bias:
    """Return the bias of no pair, with one weight."""
    none = np.zeros(0, np.int32)
    return Bias(none, none, np.zeros((1, 0), np.float32))


def padded(
    users_BE: np.ndarray | jax.Array, seen: Seen | None, bias: Bias, ranked: RankedItems
) -> tuple[jax.Array, Pairs, Biases]:
    """Return the users, padded to whole groups, and the seen and biased pairs, padded with item -1.

    Every device has all of them.
    """
    width = ranked.vectors_RE.shape[1]
    if users_BE.ndim != 2 or users_BE.shape[1] != width:
        raise ValueError(f"expected users of width {width}, found shape {users_BE.shape}")
    none = np.zeros(0, np.int32)
    user_S, item_S = (none, none) if seen is None else seen
    if user_S.shape != item_S.shape or user_S.max(initial=-1) >= len(users_BE):
        raise ValueError(
            f"expected items seen by {len(users_BE)} users, found {user_S.shape} users up to "
            f"{user_S.max(initial=-1)} and {item_S.shape} items"
        )
    rows = -(-len(users_BE) // scores.USERS) * scores.USERS
    users = pad_rows(users_BE.astype(np.float32), rows, 0)
    size = _padded_size(len(user_S))
    pairs = pad_rows(user_S, size, 0), pad_rows(item_S, size, -1)
    size = _padded_size(len(bias.user_S))
    bias_WS = np.pad(bias.bias_WS, ((0, 0), (0, size - len(bias.user_S))))
    biases = pad_rows(bias.user_S, size, 0), pad_rows(bias.item_S, size, -1), bias_WS
    users, pairs, biases = jax.device_put((users, pairs, biases), replicated(ranked.mesh))
    return users, Pairs(*pairs), Biases(Pairs(*biases[:2]), biases[2])


def _padded_size(pairs: int) -> int:
    if not pairs:
        return 0
    return next((size for size in _FEW_PAIRS if pairs <= size), 2 ** int(pairs - 1).bit_length())
