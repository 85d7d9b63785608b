"""A learned number for each head and time gap that attention adds to the scores.

The gap of a query and a key is the time from the event of the key to that of the query. It falls into a
bucket by its logarithm: this is the bias of time gaps in HSTU (Zhai et al., "Actions Speak Louder than
Words: Trillion-Parameter Sequential Transducers for Generative Recommendations", 2024), which extends
the bias of distances in T5 (see `distance_bias`). The code of that paper measures gaps from the time of
the event to be predicted. Here they are measured from the time of the query's own event, because a
server does not know when the next event will be.

Shapes: B batch, L positions, N heads, S buckets, Q queries of a block, K keys that they may see.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# 0: less than a second; s: from 2^(s-1) seconds to below 2^s. Gaps are below 2^31 seconds.
BUCKETS = 32


class GapBias(NamedTuple):
    """What attention adds to scores by time gaps.

    Attributes:
      table_NS: f32, the number of each head and bucket.
      time_BL: int32, the time of each event in seconds, from any beginning in the sequence.
    """

    table_NS: jax.Array
    time_BL: jax.Array


def bucket_of(gap: jax.Array) -> jax.Array:
    """Return int32: the bucket of each gap, given in seconds as int32; negative gaps count as 0.

    Examples:
      >>> bucket_of(jnp.array([0, 1, 2, 3, 4, 60, 86_400, 2**31 - 1])).tolist()
      [0, 1, 2, 2, 3, 6, 17, 31]
    """
    return BUCKETS - jax.lax.clz(jnp.maximum(gap, 0))


def of_block(bias: GapBias, begin: int, end: int) -> jax.Array:
    """Return f32 `[B, N, K, Q]`: the bias of keys 0 to `end - 1` for queries `begin` to `end - 1`.

    What pairs of different sequences have is of no importance, since they do not see each other.
    """
    time_BL = bias.time_BL
    gap_BKQ = time_BL[:, None, begin:end] - time_BL[:, :end, None]
    return _looked_up(bias.table_NS, bucket_of(gap_BKQ))


def gradient_of_block(bias: GapBias, begin: int, end: int, d_out_BNKQ: jax.Array) -> jax.Array:
    """Return f32 `[N, S]`: the gradient of the table, given that of `of_block`."""
    _, pull = jax.vjp(
        lambda table_NS: of_block(bias._replace(table_NS=table_NS), begin, end), bias.table_NS
    )
    return pull(d_out_BNKQ)[0]


@jax.custom_vjp
def _looked_up(table_NS: jax.Array, bucket_BKQ: jax.Array) -> jax.Array:
    return table_NS[:, bucket_BKQ].swapaxes(0, 1)


def _look_up(table_NS: jax.Array, bucket_BKQ: jax.Array) -> tuple[jax.Array, tuple]:
    return _looked_up(table_NS, bucket_BKQ), (table_NS, bucket_BKQ)


def _add_up(saved: tuple, d_out_BNKQ: jax.Array) -> tuple[jax.Array, None]:
    table_NS, bucket_BKQ = saved
    if jax.default_backend() == "cpu":
        d_out_NBKQ = d_out_BNKQ.swapaxes(0, 1)
        return jnp.zeros_like(table_NS).at[:, bucket_BKQ].add(d_out_NBKQ), None

    # GPUs would add these up one by one, in no fixed order.
    def sum_of(bucket: jax.Array) -> jax.Array:
        inside_B1KQ = (bucket_BKQ == bucket)[:, None]
        return jnp.where(inside_B1KQ, d_out_BNKQ, 0).sum(axis=(0, 2, 3))

    return jax.lax.map(sum_of, jnp.arange(BUCKETS)).T, None


_looked_up.defvjp(_look_up, _add_up)
