"""The parts of a step that `breakdown.py` times and describes.

Shapes: B rows, L positions, N heads, H head width, Y layers.
"""

import functools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from s2s_jax.cluster.mesh import replicated
from s2s_jax.config import Config
from s2s_jax.embedding.sharded import ShardedTables, Stored, present
from s2s_jax.model import layers
from s2s_jax.model.attention import causal_attention, choose
from s2s_jax.model.linear import compute_dtype
from s2s_jax.model.loss import Events, pair_up, softmax_loss
from s2s_jax.model.seq2seq import Encoded
from s2s_jax.training.step import optimizer as optimizers
from s2s_jax.training.step.batches import unpack
from s2s_jax.training.step.forward import model_graph
from s2s_jax.training.step.settings import StepSettings
from s2s_jax.training.step.state import TrainState


def implementation(config: Config) -> str:
    """The attention implementation that `config` uses on this machine."""
    model = config.model
    if model.attention != "auto":
        return model.attention
    dtype, head_width = compute_dtype(model), model.hidden_size // model.nhead
    biased = model.distance_bias or model.time_bias is not None
    is_plain = not biased and model.layer != "hstu"
    return choose(jax.default_backend(), dtype, head_width, is_plain)


def jitted(config: Config, mesh: Any) -> SimpleNamespace:
    """The parts as jitted pure functions."""
    model, tables = config.model, ShardedTables(config.features, config.tables, mesh)
    optimizer: Any = optimizers.make_optimizer(config.lr)
    graph = model_graph(StepSettings.of(config))

    def ids_of(batch):
        unpacked = unpack(StepSettings.of(config), batch)
        return {feature.name: unpacked[f"ids/{feature.name}"] for feature in config.features}

    def find(stored, batch):
        return tables.look_up(stored.values, stored.maps, ids_of(batch)).needed

    def look_up(stored, batch, step, d_embeddings):
        ids = ids_of(batch)
        stored, found = tables.admit(stored, ids, step)
        places, ids = jax.tree.map(lambda x: x[0], (found.places, ids))
        embeddings, pull = jax.vjp(lambda rows: tables.embed(rows, places, ids), found.rows)
        return stored, (embeddings, *pull(d_embeddings))

    def encode(dense, embeddings, d_encoded, key):
        def forward(dense, embeddings):
            return nnx.merge(graph, nnx.State(dense))(embeddings, key)

        # Uses all three; otherwise XLA would drop a part of their product.
        with mock.patch.object(layers, "causal_attention", lambda q, k, v, *_: q + k + v):
            encoded, pull = jax.vjp(forward, dense, embeddings)
            return encoded, *pull(d_encoded)

    def attend(q_BLNH, kv_YBLNH, d_BLNH):
        def layer(q_BLNH, kv):
            return causal_attention(q_BLNH, *kv, None, model.attention), None

        layer = layer if model.remat == "none" else jax.checkpoint(layer, prevent_cse=False)
        out_BLNH, pull = jax.vjp(lambda q, kv: jax.lax.scan(layer, q, kv)[0], q_BLNH, kv_YBLNH)
        return out_BLNH, *pull(d_BLNH)

    def score(encoded, batch):
        ids, item = jax.tree.map(lambda x: x[0], ids_of(batch)), config.loss.item_feature
        there_BL = present(config.feature(item), ids)[..., 0]
        events = Events(batch["length"][0], ids[item].reshape(*there_BL.shape, -1), there_BL)

        def mean(encoded):
            pairs = pair_up(config.loss, *encoded, events)
            sums = softmax_loss(config.loss, pairs, dtype=compute_dtype(model))
            return sums.loss / jnp.maximum(sums.pairs, 1)

        return jax.value_and_grad(mean)(encoded)

    def update(params, opt_state, gradients, needed):
        def reduce(gradients, visit, carry):
            return tables.reduce(needed, gradients, visit, carry) if needed else visit(carry, {})

        norm = optax.tree.norm(gradients["dense"])
        if config.lr.clip_norm is not None:
            norm = jnp.hypot(norm, optimizers.rows_norm(gradients["tables"], reduce))
        updates, opt_state = optimizer.update(
            gradients, opt_state, params, reduce=reduce, grad_norm=norm
        )
        return optimizers.apply_updates(params, updates), opt_state, norm

    # Everything is replicated on the one device, so that nothing is compiled for two shardings.
    jit: Any = functools.partial(jax.jit, out_shardings=replicated(mesh))
    return SimpleNamespace(
        copy=jit(lambda tree: jax.tree.map(jnp.copy, tree)),
        init=jit(optimizer.init),
        find=jit(find),
        look_up=jit(look_up, donate_argnums=0),
        encode=jit(encode),
        attend=jit(attend),
        score=jit(score),
        update=jit(update, donate_argnums=(0, 1)),
    )


class Parts:
    """The parts of a step that has been taken. Each part's inputs were made once by the parts before it.

    Attributes:
      calls: functions that dispatch each part, given the number of a batch.
    """

    def __init__(self, config: Config, mesh: Any, state: TrainState, batches: list[Any]):
        model, self.batches, self.run = config.model, batches, jitted(config, mesh)
        # Copied, because the step donates its state.
        self.now, params, moments, maps = self.run.copy(
            (state.step, state.params, optimizers.table_moments(state.opt_state), state.maps)
        )
        self.stored = Stored(params["tables"], moments, maps)
        self.dense = {"dense": params["dense"], "tables": {}}
        self.of_dense = self.run.init(self.dense)
        self.of_tables = self.run.init({"dense": {}, "tables": {}})
        self.key = self.run.copy(jax.random.key(1)) if model.dropout > 0 else None
        self.needed = [self.run.find(self.stored, batch) for batch in self.batches]
        rows, dtype = config.io.batch_size, compute_dtype(model)
        shape = (rows, model.seq_len)
        of_embeddings = {f.name: jnp.zeros((*shape, f.emb_dim)) for f in config.features}
        self.d_embeddings = self.run.copy(of_embeddings)
        self.embeddings, _ = self._tables(0)
        of_positions = jnp.zeros((rows * model.seq_len, model.hidden_size))
        self.d_encoded = self.run.copy(Encoded(of_positions, of_positions))
        self.encoded, *_ = self._rest(0)
        _, self.d_encoded = self._loss(0)
        _, self.d_dense, self.d_embeddings = self._rest(0)
        _, self.d_tables = self._tables(0)
        heads = (*shape, model.nhead, model.hidden_size // model.nhead)
        numbers = np.random.default_rng(0).standard_normal(heads, np.float32)
        x_BLNH = self.run.copy(jnp.asarray(numbers, dtype))
        x_YBLNH = jnp.tile(x_BLNH, (model.num_layers, 1, 1, 1, 1))
        self.qkv_d = (x_BLNH, (x_YBLNH, x_YBLNH), x_BLNH)
        self.calls = {
            "tables": self._tables,
            f"attention, {implementation(config)}": self._attention,
            "dense rest": self._rest,
            "loss": self._loss,
            "optimizer, dense": self._update_dense,
            "optimizer, tables": self._update_tables,
        }

    def _tables(self, number: int) -> Any:
        batch = self.batches[number]
        self.stored, made = self.run.look_up(self.stored, batch, self.now, self.d_embeddings)
        return made

    def _attention(self, _: int) -> Any:
        return self.run.attend(*self.qkv_d)

    def _rest(self, _: int) -> Any:
        return self.run.encode(self.dense["dense"], self.embeddings, self.d_encoded, self.key)

    def _loss(self, number: int) -> Any:
        return self.run.score(self.encoded, self.batches[number])

    def _update_dense(self, _: int) -> Any:
        gradients = {"dense": self.d_dense, "tables": {}}
        made = self.run.update(self.dense, self.of_dense, gradients, None)
        self.dense, self.of_dense, norm = made
        return norm

    def _update_tables(self, number: int) -> Any:
        params, gradients = (
            {"dense": {}, "tables": x} for x in (self.stored.values, self.d_tables)
        )
        state = optimizers.with_table_moments(self.of_tables, self.stored.moments)
        params, state, norm = self.run.update(params, state, gradients, self.needed[number])
        self.of_tables, moments = state, optimizers.table_moments(state)
        self.stored = self.stored._replace(values=params["tables"], moments=moments)
        return norm
