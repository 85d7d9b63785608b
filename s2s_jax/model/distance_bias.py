"""A learned number for each head and distance that attention adds to the scores.

Distances fall into buckets, as in the decoder of T5 (Raffel et al., "Exploring the limits of transfer
learning with a unified text-to-text transformer", 2020): short ones have a bucket each, and the others
share buckets that grow with the distance. T5's layers share these numbers. Here each layer has its own,
as in HSTU (Zhai et al., 2024): they are few, and layers may look at different distances.

Shapes: L positions, N heads, S buckets, Q queries of a block, K keys that they may see.
"""

import math

import jax
import jax.numpy as jnp

_EXACT, _BUCKETS, _FARTHEST = 16, 32, 128
_GROWTH = (_FARTHEST / _EXACT) ** (1 / (_BUCKETS - _EXACT))
# The least distance of each bucket: 0, 1, …, 16, 19, 21, …, 99, 113. The last bucket has no end.
BUCKET_BEGINS = (
    *range(_EXACT + 1),
    *(math.ceil(_EXACT * _GROWTH**i) for i in range(1, _BUCKETS - _EXACT)),
)


def bias_of_distances(table_NS: jax.Array, seq_len: int) -> jax.Array:
    """Return f32 `[N, L]`: the bias of each head for the distances 0 to L - 1.

    Args:
      table_NS: the number of each head and bucket.
      seq_len: L.

    Examples:
      >>> bias_of_distances(jnp.arange(32.0)[None], 130)[0, jnp.array([3, 16, 18, 19, 129])].tolist()
      [3.0, 16.0, 16.0, 17.0, 31.0]
    """
    distance_L1 = jnp.arange(seq_len, dtype=jnp.int32)[:, None]
    begin_1S = jnp.asarray(BUCKET_BEGINS[1:], jnp.int32)[None]
    bucket_L = (distance_L1 >= begin_1S).sum(axis=1)
    return table_NS[:, bucket_L]


def spread(bias_NL: jax.Array, begin: int, end: int) -> jax.Array:
    """Return `[N, K, Q]`: the bias of keys 0 to `end - 1` for queries `begin` to `end - 1`.

    The number at (k, q) is that of the distance q - k. What keys after their query have is of no
    importance, since they are not seen.

    All columns of this matrix are parts of one vector, each a step further than the one before. They
    are made by repeating the vector and cutting the result into shorter rows, so that its gradient is a
    plain sum. If each number were looked up, gradients would be added up one by one, and on GPUs in no
    fixed order.

    Examples:
      >>> spread(jnp.array([[5.0, 6.0, 7.0]]), 1, 3)[0].tolist()
      [[6.0, 7.0], [5.0, 6.0], [0.0, 5.0]]
    """
    heads, queries = bias_NL.shape[0], end - begin
    vector = jnp.pad(jnp.flip(bias_NL[:, :end], axis=1), ((0, 0), (1, queries - 1)))
    length = end + queries
    rows = jnp.broadcast_to(vector[:, None], (heads, queries, length))
    # Without the first Q numbers, rows that are one shorter begin a step earlier in each repetition.
    rows = rows.reshape(heads, length, queries)[:, 1:].reshape(heads, queries, length - 1)
    return rows[:, :, :end].swapaxes(1, 2)
