"""How often items come up, counted from batch to batch, so that log-Q needs no catalogue.

A count-min sketch (Cormode and Muthukrishnan, "An improved data stream summary: the count-min sketch and
its applications", 2005) with conservative updates (Estan and Varghese, "New directions in traffic
measurement and accounting", 2002): an item counts in a cell of each row, and the least of its cells,
which only others that share all of them can have raised, is its count. Frequencies from the stream, too,
but from the steps between two visits of an item, are used by Yi et al., "Sampling-bias-corrected neural
modeling for large corpus item recommendations", 2019.

Every device holds the sketch and counts the events of all, so it depends neither on their number nor on
the order of events in a batch.

Shapes: R rows and W cells of the sketch, M events, U distinct items, A microbatches, B rows of one, L
positions, K ids of a bag, n devices, S negatives of one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import replicated
from s2s_jax.config import Config
from s2s_jax.embedding.id_keys import EMPTY, is_there, keys_of, unique_keys
from s2s_jax.embedding.sharded import present
from s2s_jax.training.batches import ITEM_SHARE, NEGATIVES_SHARE, Batch, ids_of
from s2s_jax.training.negatives import split_ids

# The keys of items have 64 good bits: two cells' worth, and once more when scrambled again.
ROWS = 4
# 16 MB a device. A count is too high by more than e / CELLS (about 3 in a million) of all events with
# probability e^-ROWS (2 in a hundred) at most.
CELLS = 2**20
# When more events than this are counted, all counts are halved: what was long ago fades, and neither the
# total nor a cell ever leaves int32 (Einziger et al., "TinyLFU: a highly efficient cache admission
# policy", 2017).
MOST_EVENTS = 2**27


class ItemStream(NamedTuple):
    """What is known of the events so far.

    Attributes:
      count_RW: int32, the sketch.
      events: int32 scalar, events that were counted, halved whenever the counts are.
    """

    count_RW: jax.Array
    events: jax.Array


def empty_stream(cells: int = CELLS) -> ItemStream:
    """Nothing was counted yet; `cells` is a power of two."""
    return ItemStream(jnp.zeros((ROWS, cells), jnp.int32), jnp.zeros((), jnp.int32))


def item_keys(ids: jax.Array, there: jax.Array, words: int) -> jax.Array:
    """uint32 `[…, 2]`: keys of items, `EMPTY` where there is none.

    Bags of one id never share a key. Others, scrambled id after id, do so by chance, one in 2^64.

    Args:
      ids: int32 `[…, K]` or, with two words an id, `[…, K, 2]`.
      there: bool `[…]`, which positions count.
      words: of an id.
    """
    unsigned = jax.lax.bitcast_convert_type(ids, jnp.uint32)
    if words == 1:
        unsigned = jnp.stack([unsigned, jnp.zeros_like(unsigned)], axis=-1)
    low = high = jnp.zeros(there.shape, jnp.uint32)
    for k in range(unsigned.shape[-2]):
        low, high = keys_of(low ^ unsigned[..., k, 0], high ^ unsigned[..., k, 1])
    return jnp.where(there[..., None], jnp.stack([low, high], axis=-1), EMPTY)


def counted(stream: ItemStream, key_M2: jax.Array, most_events: int = MOST_EVENTS) -> ItemStream:
    """The stream after some more events, with `EMPTY` for what is none.

    Counts are halved before, so that those of the events at hand are whole.
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
    """f32 `[…]`: which part of the events so far each of the items with the keys `[…, 2]` has."""
    return _counts(stream.count_RW, keys) / jnp.maximum(stream.events, 1)


def _cells(count_RW: jax.Array, keys: jax.Array) -> jax.Array:
    """int32 `[R, …]`: the cell of each row that counts an item."""
    first, second = keys[..., 0], keys[..., 1]
    word_R = jnp.stack([first, second, *keys_of(first, second)])
    return (word_R & np.uint32(count_RW.shape[1] - 1)).astype(jnp.int32)


def _counts(count_RW: jax.Array, keys: jax.Array) -> jax.Array:
    cell_R = _cells(count_RW, keys)
    row_R = jnp.arange(ROWS).reshape(-1, *(1 for _ in keys.shape[:-1]))
    return count_RW.at[row_R, cell_R].get(mode="promise_in_bounds").min(axis=0)


def with_stream_shares(
    config: Config, mesh: Mesh, stream: ItemStream, batch: Batch
) -> tuple[ItemStream, dict[str, jax.Array]]:
    """Counts the events of a batch, and says of each which part of all so far its item has.

    Args:
      config: names the item feature.
      mesh: the devices.
      stream: before the batch.
      batch: see `batches.unpack`.

    Returns:
      The stream with the batch's real positions that have an item, and the batch with f32 `ITEM_SHARE`
      `[A, B, L]` and, if negatives were drawn, `NEGATIVES_SHARE` `[1, n * S]`, which is 0 for items that
      did not come yet.
    """
    feature = config.feature(config.loss.item_feature)
    of_events, of_drawn = split_ids(ids_of(batch))
    there = present(feature, of_events)[..., 0]
    real = (
        jax.lax.broadcasted_iota(jnp.int32, there.shape, there.ndim - 1)
        < batch["length"][..., None]
    )
    keys = item_keys(of_events[feature.name], there & real, feature.id_words)
    everywhere = jax.lax.with_sharding_constraint(keys.reshape(-1, 2), replicated(mesh))
    stream = counted(stream, everywhere)
    # Padding, which loss.mask_padding may score, counts as an item that came once.
    share = jnp.where(there & real, shares(stream, keys), 1 / jnp.maximum(stream.events, 1))
    added = {ITEM_SHARE: share}
    if of_drawn:
        ids = of_drawn[feature.name]
        is_item = present(feature, of_drawn)[..., 0]
        drawn = shares(stream, item_keys(ids, is_item, feature.id_words))
        added[NEGATIVES_SHARE] = jnp.where(is_item, drawn, 0.0).reshape(1, -1)
    return stream, dict(batch) | added
