"""The training state, and one pure train step: look up, encode, score, differentiate, update.

Shapes: A microbatches, B rows of one, L positions, K ids of a bag, U unique rows, R rows and D width of
a table, E model width.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from s2s_jax.cluster import mesh as meshes
from s2s_jax.config import Config
from s2s_jax.embedding.sharded import (
    Arrays,
    Found,
    Maps,
    ShardedTables,
    Stored,
    present,
    with_default_rows,
)
from s2s_jax.embedding.tables import TableSpec, init_table
from s2s_jax.model.loss import Events, LossSums, Sampled, comparable, pair_up, softmax_loss
from s2s_jax.model.seq2seq import Encoded, Seq2Seq
from s2s_jax.model.transformer import compute_dtype
from s2s_jax.training.batches import ITEM_SHARE, SEQUENCE, Batch, count_rows, unpack
from s2s_jax.training.item_stream import ItemStream, empty_stream, with_stream_shares
from s2s_jax.training.negatives import negative_features, split_ids, with_log_q
from s2s_jax.training.optimizer import (
    Params,
    apply_updates,
    make_optimizer,
    rows_norm,
    table_moments,
    with_table_moments,
)
from s2s_jax.training.schedule import Clock

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step changes, and so all that a checkpoint holds of the devices.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: `{"dense": the model's parameters, "tables": {name: f32 [R, D]}}` and, if tables have
        default rows, `"unknown": {name: f32 [D]}`.
      opt_state: the optimizer's.
      maps: which id has which row, of the tables that grow.
      stream: how often items came so far; empty unless `loss.log_q_from` is stream.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    maps: Maps
    stream: ItemStream | dict[str, Any]

    def saved_parts(self) -> dict[str, Any]:
        """What a checkpoint holds: no `stream` where it is empty, as before there was one."""
        return {name: part for name, part in self._asdict().items() if name != "stream" or part}

    def with_saved_parts(self, parts: Mapping[str, Any]) -> "TrainState":
        """The state with what a checkpoint holds."""
        return self._replace(**parts)


class Users(NamedTuple):
    """What users will do next, and how much of their histories is known.

    Attributes:
      vectors_BE: f32, after each row's last event; dot products with items' vectors are similarities.
      unknown_B: int32, events whose item has no row in its growing table; 0 where no table grows.
    """

    vectors_BE: jax.Array
    unknown_B: jax.Array


class StepFunctions(NamedTuple):
    """The pure functions of a job, made by `make_step_functions`.

    Attributes:
      init: `() -> TrainState`, sharded from the start.
      abstract: the state's shapes, types and shardings, for restoring.
      train_step: `(state, batch) -> (state, metrics)`, jitted; the state passed in is donated.
      predict: `(state, batch) -> Encoded`, jitted, without dropout, for one microbatch; ids without a
        row in a growing table stay without one, and are zeros or the table's default row.
      user_vectors: `(state, batch) -> Users`, jitted, for one microbatch.
      item_vectors: `(state, ids) -> f32 [B, E]`, jitted: the vectors of items whose features have
        the ids `[1, B, 1, K]` (or `[1, B, 1, K, 2]`).
      items_trained: `(state, ids) -> bool [B]`, jitted: whether the row of an item's own id was ever
        trained (where items do not show their id, any row that they show). A bucket counts for all ids
        that share it; an id without a row in a growing table was not trained.
    """

    init: Callable[[], TrainState]
    abstract: TrainState
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    predict: Callable[[TrainState, Batch], Encoded]
    user_vectors: Callable[[TrainState, Batch], Users]
    item_vectors: Callable[[TrainState, Mapping[str, jax.Array]], jax.Array]
    items_trained: Callable[[TrainState, Mapping[str, jax.Array]], jax.Array]


def make_step_functions(
    config: Config,
    mesh: Mesh,
    capacities: Mapping[str, int] | None = None,
    clock: Clock | None = None,
) -> StepFunctions:
    """Builds the train step of `config` over `mesh`.

    Args:
      config: the configuration.
      mesh: the devices.
      capacities: rows of the tables that grow; None: those they start with.
      clock: of the run that takes steps, which learning rates follow.
    """
    seed = config.train.seed
    tables = ShardedTables(config.features, mesh, capacities, seed)
    specs = tables.specs
    # Negatives are looked up with the events.
    in_training = ShardedTables(
        (*config.features, *negative_features(config)), mesh, capacities, seed
    )
    widths_of_default_rows = {n: spec.emb_dim for n, spec in specs.items() if spec.default_row}
    optimizer = make_optimizer(config.lr, bool(widths_of_default_rows), clock)
    # The graph is static; from here on parameters are a plain tree of arrays.
    graph = nnx.graphdef(nnx.eval_shape(lambda: Seq2Seq(config, nnx.Rngs(0))))

    def init() -> TrainState:
        key = jax.random.key(config.train.seed)
        dense = nnx.to_pure_dict(nnx.state(Seq2Seq(config, nnx.Rngs(jax.random.fold_in(key, 0)))))
        values = {name: init_table(s, jax.random.fold_in(key, 1)) for name, s in specs.items()}
        params: Params = {"dense": dense, "tables": values}
        if widths_of_default_rows:
            params["unknown"] = {n: jnp.zeros(width) for n, width in widths_of_default_rows.items()}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            maps=tables.empty_maps(),
            stream=empty_stream() if config.loss.stream_shares else {},
        )

    fsdp = config.train.dense_sharding == "fsdp"
    abstract = _with_shardings(jax.eval_shape(init), specs, mesh, fsdp)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    model = _Model(config, graph, in_training, mesh)
    item = config.feature(config.loss.item_feature)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        key = key if config.model.drops_out else None
        sent, batch = batch, unpack(config, batch)
        stream = state.stream
        if isinstance(stream, ItemStream):
            stream, batch = with_stream_shares(config, mesh, stream, batch)
        stored = Stored(state.params["tables"], table_moments(state.opt_state), state.maps)
        stored, found = in_training.admit(stored, _ids(batch), state.step + 1)
        state = state._replace(
            params=state.params | {"tables": stored.values},
            opt_state=with_table_moments(state.opt_state, stored.moments),
            maps=stored.maps,
            stream=stream,
        )
        reduce = functools.partial(tables.reduce, found.asked)
        sums, gradients = model.gradients(state.params, found, batch, key)
        gradients["dense"] = jax.lax.with_sharding_constraint(
            gradients["dense"], shardings.params["dense"]
        )
        dense_norm = optax.tree.norm((gradients["dense"], _default_rows(gradients)))
        norm = None
        if config.lr.clip_norm is not None:
            norm = jnp.hypot(dense_norm, rows_norm(gradients["tables"], reduce))
        updated: Any = optimizer.update(
            gradients, state.opt_state, state.params, reduce=reduce, grad_norm=norm
        )
        updates, opt_state = updated
        if norm is None:
            norm = jnp.sqrt(dense_norm**2 + updates["tables"].square_norm.sum())
        params = apply_updates(state.params, updates)
        pairs = jnp.maximum(sums.pairs, 1)
        metrics = {
            "loss": sums.loss / pairs,
            "hit_rate": sums.hits / pairs,
            "pairs": sums.pairs,
            "grad_norm": norm,
            **count_rows(sent),
        }
        for name, of_table in state.maps.items():
            metrics[f"table/{name}/rows"] = of_table.rows_S.sum()
            metrics[f"table/{name}/capacity"] = jnp.asarray(specs[name].rows)
            # Since the run began: their sums may leave int32, so the host adds up.
            metrics[f"table/{name}/dropped"] = of_table.dropped_S
            metrics[f"table/{name}/evicted"] = of_table.evicted_S
        if "stop" in sent:
            metrics["stop"] = sent["stop"].max()
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, metrics

    def look_up(state: TrainState, ids: Mapping[str, jax.Array]) -> Found:
        found = tables.look_up(state.params["tables"], state.maps, ids)
        rows = with_default_rows(found.rows, found.unknown, _default_rows(state.params))
        return found._replace(rows=rows)

    def encode(state: TrainState, batch: Batch) -> tuple[Encoded, Found]:
        # One microbatch, as if accumulated alone.
        batch = jax.tree.map(lambda x: x[None], unpack(config, batch))
        found = look_up(state, _ids(batch))
        places, batch = jax.tree.map(lambda x: x[0], (found.places, batch))
        return model.encode(state.params["dense"], found.rows, places, batch, None), found

    def predict(state: TrainState, batch: Batch) -> Encoded:
        return encode(state, batch)[0]

    def user_vectors(state: TrainState, batch: Batch) -> Users:
        batch = jax.tree.map(lambda x: x[0], dict(batch))
        (preds_ME, _), found = encode(state, batch)
        length_B = batch["length"]
        preds_BLE = preds_ME.reshape(length_B.size, -1, preds_ME.shape[-1])
        last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
        last_BE = jnp.take_along_axis(preds_BLE, last_B1[..., None], axis=1)[:, 0]
        unknown_B = jnp.zeros_like(length_B)
        if item.grows:
            unknown_BLK = tables.without_row(found, item.name)[0]
            unknown_B = unknown_BLK.any(axis=-1).sum(axis=-1, dtype=jnp.int32)
        return Users(comparable(config.loss, last_BE), unknown_B)

    def item_vectors(state: TrainState, ids: Mapping[str, jax.Array]) -> jax.Array:
        found = look_up(state, ids)
        places, ids = jax.tree.map(lambda x: x[0], (found.places, dict(ids)))
        embeddings = tables.embed(found.rows, places, ids)
        module = nnx.merge(graph, nnx.State(state.params["dense"]))
        return comparable(config.loss, module.targets(embeddings))

    own = (item.name,) if item.name in config.target_features else config.target_features

    def items_trained(state: TrainState, ids: Mapping[str, jax.Array]) -> jax.Array:
        # A row that was ever trained has moments, which never become zeros again.
        found = tables.look_up(table_moments(state.opt_state), state.maps, ids)
        touched = {
            name: (rows_UD != 0).any(axis=1, keepdims=True).astype(jnp.float32)
            for name, rows_UD in found.rows.items()
        }
        places, ids = jax.tree.map(lambda x: x[0], (found.places, dict(ids)))
        touched_BL1 = tables.embed(touched, places, ids)
        return jnp.stack([touched_BL1[name][:, 0, 0] > 0 for name in own]).any(axis=0)

    everywhere = meshes.replicated(mesh)
    return StepFunctions(
        init=jax.jit(init, out_shardings=shardings),
        abstract=abstract,
        train_step=jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(shardings, everywhere),
        ),
        predict=jax.jit(predict),
        user_vectors=jax.jit(user_vectors, out_shardings=everywhere),
        item_vectors=jax.jit(item_vectors, out_shardings=everywhere),
        items_trained=jax.jit(items_trained, out_shardings=everywhere),
    )


class _Model(NamedTuple):
    """The differentiable part of a step, from gathered rows to the loss."""

    config: Config
    graph: nnx.GraphDef
    tables: ShardedTables
    mesh: Mesh

    def encode(
        self, dense: Any, rows: Any, places: Any, batch: Batch, key: jax.Array | None
    ) -> Encoded:
        """Encodes one microbatch `[B, L, …]` from the rows that were found for all."""
        ids, _ = split_ids(_ids(batch))
        embeddings = self.tables.embed(rows, {name: places[name] for name in ids}, ids)
        sequence_BL = batch[SEQUENCE] if SEQUENCE in batch else None
        return nnx.merge(self.graph, nnx.State(dense))(embeddings, key, sequence_BL)

    def negatives(self, dense: Any, found: Found, rows: Any, batch: Batch) -> jax.Array | None:
        """f32 `[n * S, E]`: how the drawn negatives look, None if none are drawn."""
        events, _ = split_ids(_ids(batch))
        drawn = {name: x for name, x in _ids(batch).items() if name not in events}
        if not drawn:
            return None
        places, ids = jax.tree.map(
            lambda x: x[0], ({name: found.places[name] for name in drawn}, drawn)
        )
        _, embeddings = split_ids(self.tables.embed(rows, places, ids))
        return nnx.merge(self.graph, nnx.State(dense)).targets(embeddings)

    def loss(self, encoded: Encoded, negatives_CE: jax.Array | None, batch: Batch) -> LossSums:
        """Loss sums of all microbatches: `encoded` is `[A, B*L, E]`, `batch` `[A, B, …]`."""
        config, axis = self.config.loss, meshes.DATA_AXIS
        feature = self.config.feature(config.item_feature)

        def on_device(encoded: Encoded, batch: Batch, negatives_CE: jax.Array | None) -> LossSums:
            events, drawn = split_ids(_ids(batch))
            ids = events[feature.name]
            there = present(feature, events)
            sequence = batch[SEQUENCE] if SEQUENCE in batch else None
            scored = (encoded, batch["length"], ids, there, sequence)
            together = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scored)
            (preds_ME, targets_ME), length_B, ids, there_BLK, sequence_BL = together
            item_BLK = ids.reshape(*ids.shape[:2], -1)
            share_BL = None
            if config.log_q:
                share_BL = batch[ITEM_SHARE].reshape(there_BLK.shape[:2])
            events = Events(length_B, item_BLK, there_BLK[..., 0], sequence_BL, share_BL)
            pairs = pair_up(config, preds_ME, targets_ME, events)
            scope = axis if config.negative_scope == "global" else None
            sampled = None
            if negatives_CE is not None:
                item_CK = drawn[feature.name].reshape(len(negatives_CE), -1)
                sampled = Sampled(negatives_CE, item_CK if config.mask_same_item else None, None)
            sampled, log_q_N = with_log_q(pairs, sampled, batch, scope)
            dtype = compute_dtype(self.config.model)
            sums = softmax_loss(config, pairs, scope, sampled, log_q_N, dtype)
            return jax.lax.psum(sums, axis)

        spec, first = PartitionSpec(None, axis), PartitionSpec(axis)
        mapped = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(spec, spec, first),
            out_specs=PartitionSpec(),
        )
        return mapped(encoded, dict(batch), negatives_CE)

    def gradients(
        self, params: Params, found: Found, batch: Batch, key: jax.Array | None
    ) -> tuple[LossSums, Params]:
        """Loss sums of all microbatches together, and gradients of the mean loss."""
        # Default rows join the others once for all microbatches, and take their gradients at the end.
        rows, pull_rows = jax.vjp(
            lambda rows, defaults: with_default_rows(rows, found.unknown, defaults),
            found.rows,
            _default_rows(params),
        )
        found = found._replace(rows=rows)
        sums, gradients = self._gradients(params["dense"], found, batch, key)
        d_rows, d_defaults = pull_rows(gradients["tables"])
        gradients["tables"] = d_rows
        if d_defaults:
            gradients["unknown"] = d_defaults
        return sums, gradients

    def _gradients(
        self, dense: Any, found: Found, batch: Batch, key: jax.Array | None
    ) -> tuple[LossSums, Params]:
        """As `gradients`, of the dense part and of the rows that were found.

        Several microbatches are encoded one after the other without keeping activations; the loss then
        sees all of them at once; and each is encoded again to send the loss's gradients through it
        (gradient caching: Gao et al., "Scaling deep contrastive learning batch size under memory
        limited setup", 2021). So the result is that of one large batch, negatives included.
        """
        rows, places = found.rows, found.places
        microbatches = batch["length"].shape[0]

        def mean_loss(
            encoded: Encoded, negatives_CE: jax.Array | None
        ) -> tuple[jax.Array, LossSums]:
            sums = self.loss(encoded, negatives_CE, batch)
            return sums.loss / jnp.maximum(sums.pairs, 1), sums

        def take(number: Any) -> tuple[Any, Batch, jax.Array | None]:
            # Negatives, of which there is one set, are left out.
            events = {name: x for name, x in batch.items() if x.shape[0] == microbatches}
            chosen = jax.tree.map(lambda x: x[number], (places, events))
            return *chosen, None if key is None else jax.random.fold_in(key, number)

        if microbatches == 1:

            def objective(dense: Any, rows: Any) -> tuple[jax.Array, LossSums]:
                encoded = self.encode(dense, rows, *take(0))
                negatives_CE = self.negatives(dense, found, rows, batch)
                return mean_loss(jax.tree.map(lambda x: x[None], encoded), negatives_CE)

            grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
            (_, sums), (d_dense, d_rows) = grad(dense, rows)
            return sums, {"dense": d_dense, "tables": d_rows}

        numbers = jnp.arange(microbatches)
        encoded = jax.lax.map(lambda number: self.encode(dense, rows, *take(number)), numbers)
        negatives_CE, pull_negatives = jax.vjp(
            lambda d, r: self.negatives(d, found, r, batch), dense, rows
        )
        grad = jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)
        (_, sums), (d_encoded, d_negatives) = grad(encoded, negatives_CE)

        def add_gradients(total: Any, part: tuple) -> tuple[Any, None]:
            number, d_micro = part
            _, pull = jax.vjp(lambda d, r: self.encode(d, r, *take(number)), dense, rows)
            return jax.tree.map(jnp.add, total, pull(d_micro)), None

        start = pull_negatives(d_negatives)
        (d_dense, d_rows), _ = jax.lax.scan(add_gradients, start, (numbers, d_encoded))
        return sums, {"dense": d_dense, "tables": d_rows}


def _default_rows(params: Params) -> Arrays:
    """f32 `[D]` of each table that has a default row, or what is beside it."""
    return params["unknown"] if "unknown" in params else {}


def _ids(batch: Batch) -> dict[str, jax.Array]:
    return {key.removeprefix("ids/"): a for key, a in batch.items() if key.startswith("ids/")}


def _with_shardings(
    state: TrainState, specs: Mapping[str, TableSpec], mesh: Mesh, fsdp: bool
) -> TrainState:
    """Tables and what is beside them (moments) by rows; the dense part on every device, or by rules."""

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        of_table = "tables" in names and names[-1] in specs
        if of_table or path[0] == jax.tree_util.GetAttrKey("maps"):
            sharding = meshes.row_sharded(mesh)
        elif fsdp and "dense" in names:
            sharding = meshes.fsdp_sharded("/".join(names), leaf.shape, mesh)
        else:
            sharding = meshes.replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)
