"""The rows with which the items of a log begin, if `tables.NAME.init` is neighbours.

Shapes: I items, D width of the item table.
"""

import numpy as np

from s2s_jax.cluster import hosts
from s2s_jax.config import Config
from s2s_jax.config.settings import Decoding, Items, Logs, Split
from s2s_jax.data.encoding.held_out import training_cut
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.items.catalogue import items_of_training
from s2s_jax.data.items.item_vectors import item_vectors
from s2s_jax.data.items.neighbours import count_neighbours
from s2s_serve.encoding.item_numbers import ItemNumbers


def initial_items(config: Config) -> tuple[np.ndarray, np.ndarray] | None:
    """Counts which items follow each other, and makes the rows of the items from it.

    Args:
      config: the configuration of the run.

    Returns:
      The encoded ids of the items, the most frequent first, and f32 `[I, D]`: their rows; None if the
      item table begins with random rows.

    Raises:
      UserError: the log or the catalogue cannot be read.
    """
    items, logs = Items.of(config), Logs.of(config)
    item = items.item
    table = config.table(item.table_name)
    if table.init != "neighbours":
        return None
    split = Split.of(config)

    def count() -> tuple[np.ndarray, np.ndarray]:
        index = index_files(logs, Decoding.of(config))
        catalogue = items_of_training(items, split, logs, index, config.loss.catalogue)
        ids = catalogue.ids[item.name]
        neighbours_II = count_neighbours(
            items, logs, index, training_cut(split), ItemNumbers(ids), len(ids)
        )
        return ids, item_vectors(neighbours_II, item.emb_dim, config.train.seed)

    # One host for all also because rounding, which differs between kinds of CPUs, may turn the factors.
    ids, vectors_ID = hosts.from_first(count)
    known_I = vectors_ID.any(axis=1)
    # Rare items of a huge catalogue have no vectors.
    first = ids[: len(vectors_ID)]
    hosts.say(
        f"{known_I.sum():,} of {len(ids):,} items begin with vectors from counts of which items "
        f"follow each other"
    )
    return first[known_I], vectors_ID[known_I] * np.float32(table.init_std)
