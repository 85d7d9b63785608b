"""Counts how often items occur in the batches so far, so that log-Q needs no catalogue.

The counts are in a count-min sketch (Cormode and Muthukrishnan, "An improved data stream summary: the
count-min sketch and its applications", 2005) with conservative updates (Estan and Varghese, "New
directions in traffic measurement and accounting", 2002). Each row of the sketch has a cell for an item,
and the count of the item is the smallest of its cells. It is too high only if other items share all of
these cells. Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations",
2019, also estimate frequencies from the batches, but from the number of steps between two occurrences
of an item.

Every device has the complete sketch, and counts the events of all devices. So counts do not depend on
the number of devices or on the order of events in a batch.

Shapes: R rows and W cells of the sketch, M events, U distinct items, A microbatches, B rows of a
microbatch, L positions, K ids of a bag, n devices, S negatives per device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import replicated
from s2s_jax.config import FeatureConfig
from s2s_jax.embedding.id_keys import EMPTY, is_there, keys_of, unique_keys
from s2s_jax.embedding.sharded import present
from s2s_jax.training.step.batches import ITEM_SHARE, NEGATIVES_SHARE, Batch, ids_of
from s2s_jax.training.step.negatives import split_ids

# The keys of items have 64 random bits. They are enough for two cells; scrambled again, for two more.
ROWS = 4
# 16 MB per device. The probability that a count is too high by more than e / CELLS of all events (about
# 3 in a million) is at most e^-ROWS (about 2%).
CELLS = 2**20
# When more events than this have been counted, all counts are halved. So old events lose weight, and
# neither the total nor a cell overflows int32 (Einziger et al., "TinyLFU: a highly efficient cache
# admission policy", 2017).
MOST_EVENTS = 2**27


class ItemStream(NamedTuple):
    """The counts of the events so far.

    Attributes:
      count_RW: int32, the sketch.
      events: int32 scalar, the number of counted events; halved when the counts are halved.
    """

    count_RW: jax.Array
    events: jax.Array


def empty_stream(cells: int = CELLS) -> ItemStream:
    """Return a stream without counts; `cells` must be a power of two."""
    return ItemStream(jnp.zeros((ROWS, cells), jnp.int32), jnp.zeros((), jnp.int32))


def item_keys(ids: jax.Array, there: jax.Array, words: int) -> jax.Array:
    """Return uint32 `[…, 2]`: the keys of items; `EMPTY` where there is no item.

    Different items with a single id never share a key. The ids of a bag are scrambled one after the
    other, so two bags share a key with a probability of 2^-64.

    Args:
      ids: int32 `[…, K]` or, with two words per id, `[…, K, 2]`.
      there: bool `[…]`, whether a position has an item.
      words: the number of 32-bit words per id.
    """
    unsigned = jax.lax.bitcast_convert_type(ids, jnp.uint32)
    if words == 1:
        unsigned = jnp.stack([unsigned, jnp.zeros_like(unsigned)], axis=-1)
    low = high = jnp.zeros(there.shape, jnp.uint32)
    for k in range(unsigned.shape[-2]):
        low, high = keys_of(low ^ unsigned[..., k, 0], high ^ unsigned[..., k, 1])
    return jnp.where(there[..., None], jnp.stack([low, high], axis=-1), EMPTY)


def counted(stream: ItemStream, key_M2: jax.Array, most_events: int = MOST_EVENTS) -> ItemStream:
    """Return the stream after more events; `EMPTY` keys are not events.

    If counts must be halved, this happens before the new events are counted.
    """

    def halved(stream: ItemStream) -> ItemStream:
        return jax.tree.map(lambda x: x >> 1, stream)

    count_RW, events = jax.lax.cond(
        stream.events > most_events, halved, lambda stream: stream, stream
    )
    unique = unique_keys(key_M2)
    there_U = is_there(unique.keys_U2)
    raised_U = _counts(count_RW, unique.keys_U2) + unique.count_U
    cell_RU = jnp.where(there_U[None], _cells(count_RW, unique.keys_U2), count_RW.shape[1])
    count_RW = count_RW.at[jnp.arange(ROWS)[:, None], cell_RU].max(raised_U, mode="drop")
    return ItemStream(count_RW, events + is_there(key_M2).sum(dtype=jnp.int32))


def shares(stream: ItemStream, keys: jax.Array) -> jax.Array:
    """Return f32 `[…]`: each item's share of the events so far, for items with keys `[…, 2]`."""
    return _counts(stream.count_RW, keys) / jnp.maximum(stream.events, 1)


def _cells(count_RW: jax.Array, keys: jax.Array) -> jax.Array:
    """Return int32 `[R, …]`: the cell of an item in each row."""
    first, second = keys[..., 0], keys[..., 1]
    word_R = jnp.stack([first, second, *keys_of(first, second)])
    return (word_R & np.uint32(count_RW.shape[1] - 1)).astype(jnp.int32)


def _counts(count_RW: jax.Array, keys: jax.Array) -> jax.Array:
    cell_R = _cells(count_RW, keys)
    row_R = jnp.arange(ROWS).reshape(-1, *(1 for _ in keys.shape[:-1]))
    return count_RW.at[row_R, cell_R].get(mode="promise_in_bounds").min(axis=0)


def with_stream_shares(
    feature: FeatureConfig, mesh: Mesh, stream: ItemStream, batch: Batch
) -> tuple[ItemStream, dict[str, jax.Array]]:
    """Count the events of a batch, and add to it the share of each event's item in the events so far.

    Args:
      feature: the feature that says which item an event is about.
      mesh: the devices.
      stream: the stream before the batch.
      batch: see `batches.unpack`.

    Returns:
      The stream after the events of the batch that have an item, and the batch with f32 `ITEM_SHARE`
      `[A, B, L]` and, if negatives were sampled, `NEGATIVES_SHARE` `[1, n * S]`, which is 0 for items
      that have not occurred yet.
    """
    of_events, of_drawn = split_ids(ids_of(batch))
    there = present(feature, of_events)[..., 0]
    real = (
        jax.lax.broadcasted_iota(jnp.int32, there.shape, there.ndim - 1)
        < batch["length"][..., None]
    )
    keys = item_keys(of_events[feature.name], there & real, feature.id_words)
    everywhere = jax.lax.with_sharding_constraint(keys.reshape(-1, 2), replicated(mesh))
    stream = counted(stream, everywhere)
    # Padding, which is scored without loss.mask_padding, counts as an item that occurred once.
    share = jnp.where(there & real, shares(stream, keys), 1 / jnp.maximum(stream.events, 1))
    added = {ITEM_SHARE: share}
    if of_drawn:
        ids = of_drawn[feature.name]
        is_item = present(feature, of_drawn)[..., 0]
        drawn = shares(stream, item_keys(ids, is_item, feature.id_words))
        added[NEGATIVES_SHARE] = jnp.where(is_item, drawn, 0.0).reshape(1, -1)
    return stream, dict(batch) | added
