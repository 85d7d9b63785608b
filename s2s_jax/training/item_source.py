"""Negatives from the catalogue, drawn on the host, and the shares of items for log-Q.

Draws depend only on the seed, the step and the device, so a continued run draws the same items.

Shapes: I items, S items of one device, n devices, K ids of a bag.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.cluster.mesh import batch_sharded
from s2s_jax.config.settings import Items, Negatives
from s2s_jax.data.batching.order import integers
from s2s_jax.data.items.catalogue import Catalogue
from s2s_jax.data.items.item_counts import codes_of
from s2s_jax.training.step.batches import NEGATIVES_SHARE, SHARE_UNIT, UNIFORM_SHARE
from s2s_jax.training.step.negatives import PREFIX
from s2s_serve.encoding.features import id_columns
from s2s_serve.encoding.item_numbers import ItemNumbers

# Makes these draws independent of the order of rows, which may have the same seed.
_DRAWS = int.from_bytes(b"drawn")


def drawn_items(items: int, size: int, seed: int, step: int, device: int) -> np.ndarray:
    """Return int64 `[size]`: the numbers of the items that a device draws, with replacement."""
    return integers(items, size, seed, _DRAWS, step, device)


class ItemSource:
    """Draws negatives from the items of a log, and looks up the shares of items.

    Attributes:
      items: the number of items.
      fingerprint: the fingerprint of the items and their counts.
    """

    def __init__(self, items: Items, negatives: Negatives, catalogue: Catalogue, mesh: Mesh):
        """Number the items of the catalogue.

        Args:
          items: how items and their features are read from the log.
          negatives: how negatives are drawn.
          catalogue: the items that training sees, with their counts.
          mesh: the devices.
        """
        self._negatives, self._mesh = negatives, mesh
        self.fingerprint = catalogue.fingerprint()
        self._ids = catalogue.ids
        self._numbers = ItemNumbers(catalogue.ids[items.item.name])
        shares = np.rint(catalogue.count_I / catalogue.count_I.sum() * SHARE_UNIT)
        self._share_I = np.maximum(shares, 1).astype(np.int32)
        self._item_columns = id_columns(items.features)[items.item.name]
        self.items = len(catalogue.count_I)
        self._all: dict[str, jax.Array] | None = None

    def draw(self, step: int) -> dict[str, jax.Array]:
        """Return the negatives of a step, as arrays to add to its batch.

        Every device has each item once if `loss.negatives` is full, or if there are no more items than
        a device would draw.

        Returns:
          int32 ids `[1, n * S, 1, K]` (or `[1, n * S, 1, K, 2]`) for each feature of items, and the
          shares that log-Q needs. Empty if all negatives are in-batch.
        """
        kind, size = self._negatives.kind, self._negatives.number
        if kind == "in_batch":
            return {}
        if kind == "full" or self.items <= size:
            if self._all is None:
                everything = np.tile(np.arange(self.items), self._mesh.size)
                self._all = self._put(everything)
            return self._all
        seed = self._negatives.seed
        chosen = [
            drawn_items(self.items, size, seed, step, device) for device in range(self._mesh.size)
        ]
        return self._put(np.concatenate(chosen))

    def _put(self, chosen: np.ndarray) -> dict[str, jax.Array]:
        arrays = {f"ids/{PREFIX}{n}": ids[chosen][:, None] for n, ids in self._ids.items()}
        if self._negatives.item_shares:
            arrays[NEGATIVES_SHARE] = self._share_I[chosen]
        if self._negatives.uniform_share:
            arrays[UNIFORM_SHARE] = np.full(self._mesh.size, 1 / self.items, np.float32)
        sharding = batch_sharded(self._mesh)
        with jax.transfer_guard("allow"):
            return {
                name: jax.make_array_from_callback(
                    (1, *x.shape), sharding, lambda at, x=x: x[None][at]
                )
                for name, x in arrays.items()
            }

    def with_shares(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the arrays of a host's batch, with the shares of its items as the last column of ids.

        Without `loss.log_q` catalogue, the arrays do not change.
        """
        if not self._negatives.item_shares:
            return dict(arrays)
        name = "ids" if "ids" in arrays else "values"
        ids = arrays[name]
        words = self._item_columns.stop - self._item_columns.start
        number = self._numbers.of(codes_of(ids[..., self._item_columns].reshape(-1, words)))
        share = np.where(number >= 0, self._share_I[number], 1)
        column = share.reshape(*ids.shape[:-1], 1)
        return dict(arrays) | {name: np.concatenate([ids, column], axis=-1)}
