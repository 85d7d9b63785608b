"""The differentiable part of a step: from rows of the tables, through the model, to the loss.

Shapes: A microbatches, B rows of a microbatch, L positions, K ids of a bag, M = B L, n devices, U unique
rows per device, S negatives per device, C = n S, D table width, E model width.
"""

import dataclasses
from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from s2s_jax.cluster.mesh import DATA_AXIS
from s2s_jax.embedding.lookup import Arrays
from s2s_jax.embedding.sharded import ShardedTables, present
from s2s_jax.model.binary_loss import positive_weight
from s2s_jax.model.hard_negatives import hardest
from s2s_jax.model.linear import compute_dtype
from s2s_jax.model.loss import (
    Events,
    LossSums,
    LossTotal,
    Pairs,
    Sampled,
    binary_loss,
    pair_up,
    softmax_loss,
    weighted,
)
from s2s_jax.model.seq2seq import Encoded, Seq2Seq
from s2s_jax.training.step.batches import (
    ITEM_SHARE,
    SEQUENCE,
    TIME,
    UNIFORM_SHARE,
    Batch,
    ids_of,
)
from s2s_jax.training.step.negatives import split_ids, with_log_q
from s2s_jax.training.step.params import Tree
from s2s_jax.training.step.settings import StepSettings


def model_graph(settings: StepSettings) -> nnx.GraphDef:
    """Return the static structure of the model. Its parameters are in a separate tree of arrays."""

    def make() -> Seq2Seq:
        items = settings.items
        return Seq2Seq(items.features, items.shown, settings.model, nnx.Rngs(0))

    return nnx.graphdef(nnx.eval_shape(make))


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """Encodes events and scores them.

    Attributes:
      settings: the settings of the step.
      graph: the structure of the model.
      tables: the tables of events and sampled negatives.
      mesh: the devices.
    """

    settings: StepSettings
    graph: nnx.GraphDef
    tables: ShardedTables
    mesh: Mesh

    def encode(
        self, dense: Tree, rows: Arrays, places: Arrays, batch: Batch, key: jax.Array | None
    ) -> Encoded:
        """Encode the events of one microbatch.

        Args:
          dense: the parameters of the model.
          rows: f32 `[n * U, D]` for each table: the rows that all microbatches use.
          places: int32 `[B, L, K]` for each feature: the indices of its ids in the rows of their device.
          batch: `[B, L, …]`, see `batches.unpack`.
          key: the random key of dropout; None turns dropout off.
        """
        ids, _ = split_ids(ids_of(batch))
        embeddings = self.tables.embed(rows, {name: places[name] for name in ids}, ids)
        sequence_BL = batch[SEQUENCE] if SEQUENCE in batch else None
        time_BL = batch[TIME] if TIME in batch else None
        module = nnx.merge(self.graph, nnx.State(dense))
        return module(embeddings, key, sequence_BL, time_BL=time_BL)

    def negatives(
        self, dense: Tree, rows: Arrays, places: Arrays, batch: Batch
    ) -> jax.Array | None:
        """Return f32 `[C, E]`: the vectors of sampled negatives, or None if none are sampled.

        Args:
          dense: the parameters of the model.
          rows: see `encode`.
          places: the places of all features; int32 `[1, C, 1, K]` for each feature of the negatives.
          batch: the batch with the ids of the negatives, which have the shape of their places.
        """
        events, _ = split_ids(ids_of(batch))
        drawn = {name: x for name, x in ids_of(batch).items() if name not in events}
        if not drawn:
            return None
        places, ids = jax.tree.map(lambda x: x[0], ({name: places[name] for name in drawn}, drawn))
        _, embeddings = split_ids(self.tables.embed(rows, places, ids))
        return nnx.merge(self.graph, nnx.State(dense)).targets(embeddings)

    def loss(self, encoded: Encoded, negatives_CE: jax.Array | None, batch: Batch) -> LossTotal:
        """Return the loss sums of all microbatches together.

        Args:
          encoded: the encoded events of each microbatch, `[A, M, E]`.
          negatives_CE: f32, see `negatives`.
          batch: `[A, B, …]`, see `batches.unpack`.
        """
        spec, first = PartitionSpec(None, DATA_AXIS), PartitionSpec(DATA_AXIS)
        mapped = jax.shard_map(
            self._loss_on_device,
            mesh=self.mesh,
            in_specs=(spec, spec, first),
            out_specs=PartitionSpec(),
        )
        return mapped(encoded, dict(batch), negatives_CE)

    def _loss_on_device(
        self, encoded: Encoded, batch: Batch, negatives_CE: jax.Array | None
    ) -> LossTotal:
        config = self.settings.loss
        events, drawn = split_ids(ids_of(batch))
        sampled = None
        if negatives_CE is not None:
            item_CK = drawn[config.item_feature].reshape(len(negatives_CE), -1)
            sampled = Sampled(negatives_CE, item_CK if config.mask_same_item else None, None)
        by_distance = [
            self._sums(self._pairs(encoded, events, batch, distance), sampled, batch)
            for distance in range(1, config.next_events + 1)
        ]
        return jax.lax.psum(weighted(config, by_distance), DATA_AXIS)

    def _sums(self, pairs: Pairs, sampled: Sampled | None, batch: Batch) -> LossSums:
        """Return the sums of the pairs of a device."""
        config, dtype = self.settings.loss, compute_dtype(self.settings.model)
        if config.objective == "gbce":
            assert sampled is not None, "negatives are sampled"
            share = batch[UNIFORM_SHARE].reshape(())
            weight = positive_weight(config.calibration, len(sampled.vectors_CE), share)
            return binary_loss(config, pairs, sampled, weight, dtype)
        if config.hard_negatives is not None:
            assert sampled is not None, "negatives are sampled"
            # With all items, all devices choose the same.
            alike = DATA_AXIS if config.negatives == "full" else None
            sampled = hardest(config, pairs, sampled, alike)
        scope = DATA_AXIS if config.negative_scope == "global" else None
        sampled, log_q_N = with_log_q(pairs, sampled, batch, scope)
        return softmax_loss(config, pairs, scope, sampled, log_q_N, dtype)

    def _pairs(
        self, encoded: Encoded, events: Mapping[str, jax.Array], batch: Batch, distance: int
    ) -> Pairs:
        """Return the pairs of a device, with all its microbatches concatenated."""
        feature = self.settings.items.item
        ids = events[feature.name]
        there = present(feature, events)
        sequence = batch[SEQUENCE] if SEQUENCE in batch else None
        scored = (encoded, batch["length"], ids, there, sequence)
        together = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scored)
        (preds_ME, targets_ME), length_B, ids, there_BLK, sequence_BL = together
        item_BLK = ids.reshape(*ids.shape[:2], -1)
        share_BL = None
        if self.settings.loss.corrects:
            share_BL = batch[ITEM_SHARE].reshape(there_BLK.shape[:2])
        known = Events(length_B, item_BLK, there_BLK[..., 0], sequence_BL, share_BL)
        return pair_up(self.settings.loss, preds_ME, targets_ME, known, distance)
