"""The items that the loss needs besides the events of a batch."""

from jax.sharding import Mesh

from s2s_jax.cluster import hosts
from s2s_jax.config import Config
from s2s_jax.config.settings import Items, Logs, Negatives, Split
from s2s_jax.data.items.catalogue import items_of_training
from s2s_jax.data.logs.index import FileIndex
from s2s_jax.training.item_source import ItemSource


def make_item_source(config: Config, logs: Logs, index: FileIndex, mesh: Mesh) -> ItemSource | None:
    """Reads the items that the loss draws negatives from or corrects for; None if it needs none.

    Args:
      config: the configuration of the run.
      logs: the log.
      index: the index of the log's files.
      mesh: the devices.

    Raises:
      UserError: the log or the catalogue cannot be read.
    """
    if not config.loss.needs_catalogue:
        return None
    items = Items.of(config)
    catalogue = hosts.from_first(
        lambda: items_of_training(items, Split.of(config), logs, index, config.loss.catalogue)
    )
    return ItemSource(items, Negatives.of(config), catalogue, mesh)
