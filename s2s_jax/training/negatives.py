"""Items of the catalogue as negatives, and how often items come up.

Items are drawn on the host from (seed, step, device) alone, so a continued run draws the same.

Shapes: I items, S items of one device, n devices, B rows, L positions, C columns of ids.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from s2s_jax.config import Config, FeatureConfig
from s2s_jax.data.catalogue import collect, load
from s2s_jax.data.features import id_columns
from s2s_jax.data.histories import ItemNumbers
from s2s_jax.data.item_counts import codes_of
from s2s_jax.training.mesh import batch_sharded

_PREFIX = "negatives:"
# Shares of events travel as integers, in parts of this.
SHARE_UNIT = 2**30


def negative_features(config: Config) -> tuple[FeatureConfig, ...]:
    """What scored events show, once more for negatives that are drawn: they read the same tables."""
    if config.loss.negatives == "in_batch":
        return ()
    return tuple(
        dataclasses.replace(f, name=_PREFIX + f.name, shard_name=f.table_name)
        for f in config.features
        if f.name in config.target_features or f.name == config.loss.item_feature
    )


def split_ids(ids: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Ids of events, and those of negatives under their features' own names."""
    events = {name: x for name, x in ids.items() if not name.startswith(_PREFIX)}
    drawn = {name.removeprefix(_PREFIX): x for name, x in ids.items() if name.startswith(_PREFIX)}
    return events, drawn


class ItemSource:
    """The items of a log, as negatives and as numbers of events.

    Attributes:
      items: I.
    """

    def __init__(self, config: Config, mesh: Mesh):
        """Collects the items that training sees.

        Raises:
          UserError: see `data.catalogue.collect`.
        """
        self._config, self._mesh = config, mesh
        if config.loss.catalogue is None:
            catalogue = collect(config, config.eval.held_out)
        else:
            catalogue = load(config.loss.catalogue, config)
        self._ids = catalogue.ids
        self._numbers = ItemNumbers(catalogue, config)
        shares = np.rint(catalogue.count_I / catalogue.count_I.sum() * SHARE_UNIT)
        self._share_I = np.maximum(shares, 1).astype(np.int32)
        self._item_columns = id_columns(config.features)[config.loss.item_feature]
        self.items = len(catalogue.count_I)
        self._all: dict[str, jax.Array] | None = None

    def draw(self, step: int) -> dict[str, jax.Array]:
        """Ids of the negatives of a step, `[1, n * S, 1, K]` (or `[1, n * S, 1, K, 2]`).

        With `loss.negatives` full, or if there are no more items than a device would draw, every device
        has all items, each once.
        """
        kind = self._config.loss.negatives
        if kind == "in_batch":
            return {}
        if kind == "full" or self.items <= self._config.loss.num_negatives:
            if self._all is None:
                everything = np.tile(np.arange(self.items), self._mesh.size)
                self._all = self._put(everything)
            return self._all
        size = self._config.loss.num_negatives
        chosen = [
            np.random.default_rng((self._config.train.seed, step, device)).integers(
                self.items, size=size
            )
            for device in range(self._mesh.size)
        ]
        return self._put(np.concatenate(chosen))

    def _put(self, chosen: np.ndarray) -> dict[str, jax.Array]:
        arrays = {f"ids/{_PREFIX}{n}": ids[chosen][:, None] for n, ids in self._ids.items()}
        if self._config.loss.log_q:
            arrays["negatives_share"] = self._share_I[chosen]
            arrays["uniform_share"] = np.full(self._mesh.size, 1 / self.items, np.float32)
        sharding = batch_sharded(self._mesh)
        with jax.transfer_guard("allow"):
            return {
                name: jax.make_array_from_callback(
                    (1, *x.shape), sharding, lambda at, x=x: x[None][at]
                )
                for name, x in arrays.items()
            }

    def with_shares(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A host's batch; with `loss.log_q`, ids have one more column: the share of the item."""
        if not self._config.loss.log_q:
            return dict(arrays)
        name = "ids" if "ids" in arrays else "values"
        ids = arrays[name]
        words = self._item_columns.stop - self._item_columns.start
        number = self._numbers.of(codes_of(ids[..., self._item_columns].reshape(-1, words)))
        share = np.where(number >= 0, self._share_I[number], 1)
        column = share.reshape(*ids.shape[:-1], 1)
        return dict(arrays) | {name: np.concatenate([ids, column], axis=-1)}
