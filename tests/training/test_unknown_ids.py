"""Ids without a row in a growing table: the row that represents them, its training, and counts.

Shapes: B rows, L positions, K ids of a bag, E model width, N pairs, D width of a table.
"""

import collections
import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from evaluations import config_file, evaluating, rows_of
from flax import nnx
from growth import SMALLEST, rows_in_map
from jobs_of import checkpoints_of, one_device

from s2s_jax.cli.commands import evaluate, recommend
from s2s_jax.cli.commands import tables as inspect_tables
from s2s_jax.cluster.mesh import make_mesh, replicated
from s2s_jax.config import FeatureConfig, LRConfig, TableConfig, validate
from s2s_jax.embedding import id_keys
from s2s_jax.embedding.sharded import ShardedTables, Stored, with_default_rows
from s2s_jax.embedding.tables import rows_of_buckets
from s2s_jax.errors import UserError
from s2s_jax.jobs.stripe_recommender import StripeRecommender
from s2s_jax.runs.checkpoints.compatibility import check_config
from s2s_jax.runs.run_dir import write_config
from s2s_jax.training.growth import GrowthPlan, doubled
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.forward import model_graph
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.optimizer import state_of
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.encoding.features import id_columns

ROWS, STEPS, IDS = 16, 3, 300
LR = LRConfig(dense_lr=1e-2, sparse_lr=3e-3, clip_norm=1.0)


def waiting(config, unknown="default_row"):
    """The small configuration, with a table whose ids get a row at their second sighting."""
    model = dataclasses.replace(config.model, num_layers=1, dropout=0.0)
    config = dataclasses.replace(config, model=model, lr=LR)
    return small.growing(config, admit_after=2, unknown=unknown)


CONFIG = waiting(small.config())


@functools.cache
def functions(devices, unknown="default_row"):
    mesh = make_mesh(jax.devices()[:devices])
    return make_step_functions(StepSettings.of(waiting(small.config(), unknown)), mesh), mesh


def step_on(state, number, devices, microbatches):
    made, mesh = functions(devices)
    return made.train_step(state, put_batch(small.batch(CONFIG, ROWS, number), microbatches, mesh))


@functools.cache
def initial():
    return jax.device_get(functions(1)[0].init())


@functools.cache
def run(devices=1, microbatches=1):
    """The state and metrics of each step."""
    shardings = jax.tree.map(lambda x: x.sharding, functions(devices)[0].abstract)
    state, found = jax.device_put(initial(), shardings), []
    for number in range(STEPS):
        state, metrics = step_on(state, number, devices, microbatches)
        found.append(jax.device_get((state, metrics)))
    return found


def moments_of_default(state):
    adam = state_of(state.opt_state, "unknown")[0]
    return adam.mu["unknown"]["item_id"], adam.nu["unknown"]["item_id"]


class Expected(NamedTuple):
    """The state of the reference after a step."""

    loss: float
    grad_norm: float
    table: np.ndarray
    moments: tuple[np.ndarray, np.ndarray]
    waiting: set[int]


def ids_of_batch(number):
    """int `[B, L, K]` ids of each feature, and lengths; ids are small, so high words are 0."""
    batch, columns = small.batch(CONFIG, ROWS, number), id_columns(CONFIG.features)
    ids = {}
    for feature in CONFIG.features:
        x = batch["ids"][..., columns[feature.name]]
        ids[feature.name] = x[..., ::2] if feature.grows else x
    return ids, batch["length"]


def plain_loss(graph, params, places, ids, length):
    """The mean cross-entropy by definition, from whole tables."""

    def embedded(name):
        rows = params["items" if name != "behavior_id" else "behaviors"][places[name]]
        there = (ids[name] >= 0)[..., None]
        return (rows * there).sum(axis=2) / jnp.maximum(there.sum(axis=2), 1)

    encoded = nnx.merge(graph, nnx.State(params["dense"]))({name: embedded(name) for name in ids})
    shape = (*ids["item_id"].shape[:2], -1)
    queries = encoded.preds_ME.reshape(shape)[:, :-1]
    positives = encoded.targets_ME.reshape(shape)[:, 1:]
    queries, positives = (
        (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).reshape(-1, x.shape[-1])
        for x in (queries, positives)
    )
    valid_N = (jnp.arange(1, shape[1])[None] < length[:, None]).reshape(-1)
    item_N = ids["item_id"][:, 1:, 0].reshape(-1)
    other = ~jnp.eye(len(item_N), dtype=bool)
    masked = ~valid_N[None] | (other & (item_N[:, None] == item_N[None]))
    logits = jnp.where(masked, -jnp.inf, queries @ positives.T / CONFIG.loss.temperature)
    each = jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)
    return jnp.where(valid_N, each, 0).sum() / valid_N.sum()


def adamw(value, moments, gradient, t, eps):
    """A step of AdamW with the learning rate of tables, in NumPy."""
    m = LR.beta1 * moments[0] + (1 - LR.beta1) * gradient
    v = LR.beta2 * moments[1] + (1 - LR.beta2) * gradient**2
    corrected = m / (1 - LR.beta1**t), v / (1 - LR.beta2**t)
    step = corrected[0] / (np.sqrt(corrected[1]) + eps) + LR.weight_decay * value
    return value - LR.sparse_lr * step, (m, v)


@functools.cache
def reference():
    """The reference: a table with a row per id and one for all waiting ids, and dictionaries."""
    start = initial()
    tables = ShardedTables(CONFIG.features, CONFIG.tables, functions(1)[1], seed=CONFIG.train.seed)
    buckets = np.arange(IDS, dtype=np.uint32)
    keys = np.stack(id_keys.keys_of(buckets, np.zeros_like(buckets)), axis=1)
    items = np.zeros((IDS + 1, 8), np.float32)
    items[:IDS] = tables._growing["item_id"].initial_rows(keys)
    row = rows_of_buckets(tables.specs["behavior_id"], np.arange(9))
    params = {"items": items, "behaviors": start.params["tables"]["behavior_id"][row]}
    moments = {name: (np.zeros_like(x), np.zeros_like(x)) for name, x in params.items()}
    dense, optimizer = start.params["dense"], optax.adamw(LR.dense_lr, weight_decay=LR.weight_decay)
    dense_state = optimizer.init(dense)
    graph = model_graph(StepSettings.of(CONFIG))
    gradient_of = jax.jit(jax.value_and_grad(functools.partial(plain_loss, graph)))
    sightings, found = collections.Counter(), []
    for number in range(STEPS):
        ids, length = ids_of_batch(number)
        items_of_batch = np.concatenate([ids["item_id"].ravel(), ids["tags"].ravel()])
        sightings.update(items_of_batch[items_of_batch >= 0].tolist())
        waits = np.array([sightings[i] < 2 for i in range(IDS)])
        places = {n: np.where(waits[x] & (x >= 0), IDS, x) for n, x in ids.items()}
        places["behavior_id"] = ids["behavior_id"]
        loss, gradients = gradient_of(params | {"dense": dense}, places, ids, length)
        norm = float(optax.tree.norm(gradients))
        clipped = optax.tree.scale(min(1, LR.clip_norm / norm), gradients)
        gradients = jax.device_get(clipped)
        updates, dense_state = optimizer.update(gradients["dense"], dense_state, dense)
        dense = optax.apply_updates(dense, updates)
        for name, mine in (("items", ("item_id", "tags")), ("behaviors", ("behavior_id",))):
            used = np.unique([int(p) for f in mine for p in places[f][ids[f] >= 0]])
            of_used = tuple(x[used] for x in moments[name])
            t = number + 1
            # As in RecIS, rows of tables add eps before the bias correction of the second moment.
            eps = np.where(used == IDS, 1, 1 / np.sqrt(1 - LR.beta2**t))[:, None] * LR.eps
            new, of_used = adamw(params[name][used], of_used, gradients[name][used], t, eps)
            params[name][used] = new
            for moment, new_moment in zip(moments[name], of_used, strict=True):
                moment[used] = new_moment
        of_default = tuple(x[IDS].copy() for x in moments["items"])
        waits = {i for i in range(IDS) if sightings[i] == 1}
        found.append(Expected(float(loss), norm, params["items"].copy(), of_default, waits))
    return found


@pytest.mark.parametrize(
    ("devices", "microbatches"),
    [*(pytest.param(*n, marks=pytest.mark.slow) for n in ((2, 1), (4, 2))), (1, 1)],
)
def test_equals_a_table_in_which_waiting_ids_share_a_row(devices, microbatches):
    for (state, metrics), expected in zip(run(devices, microbatches), reference(), strict=True):
        assert len(expected.waiting) > 50
        np.testing.assert_allclose(metrics["loss"], expected.loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], expected.grad_norm, rtol=1e-5)
        ours = (*moments_of_default(state), state.params["unknown"]["item_id"])
        for mine, theirs in zip(ours, (*expected.moments, expected.table[IDS]), strict=True):
            assert np.abs(theirs).max() > 0
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    used = np.unique([i for n in range(STEPS) for f in (0, 2) for i in _ids_of(n, f)])
    admitted = np.array([i for i in used if i not in expected.waiting])
    assert metrics["table/item_id/rows"] == len(admitted) > 50
    where = rows_in_map(state, "item_id", admitted)
    rows = state.params["tables"]["item_id"][where]
    np.testing.assert_allclose(rows, expected.table[admitted], atol=2e-5)


def _ids_of(number, feature):
    x = ids_of_batch(number)[0][CONFIG.features[feature].name]
    return x[x >= 0].tolist()


FEATURE = FeatureConfig(name="f", emb_dim=2, hash_bucket_size=0)
TABLE = TableConfig(name="f", capacity=1, admit_after=2, unknown="default_row")


def embedded(tables, found, ids, defaults):
    """Embeddings `[B, L, D]`, and whether ids `[B, L, K]` have no row."""
    rows = with_default_rows(found.rows, found.unknown, defaults)
    places = jax.tree.map(lambda x: x[0], found.places)
    return tables.embed(rows, places, {"f": ids[0]})["f"], tables.without_row(found, "f")[0]


@functools.cache
def overfull():
    """A table of two devices after a step with too many ids, the embeddings, and ids without a row."""
    tables = ShardedTables((FEATURE,), (TABLE,), make_mesh(jax.devices()[:2]))

    @jax.jit
    def admit(stored, ids):
        stored, found = tables.admit(stored, {"f": ids}, jnp.int32(1))
        return stored, *embedded(tables, found, ids, {"f": jnp.array([7.0, -7.0])})

    # Each id occurs twice, so that all would be admitted.
    ids = small.to_words(np.repeat(np.arange(6000), 2)).reshape(1, 8, -1, 1, 2)
    stored = Stored(
        {"f": jnp.zeros((SMALLEST, 2))}, {"f": jnp.zeros((SMALLEST, 4))}, tables.empty_maps()
    )
    return jax.device_get(admit(stored, ids))


def test_ids_without_room_have_the_default_row():
    stored, rows, without = overfull()
    without = without.reshape(-1, 2)[:, 0]
    assert without.sum() == stored.maps["f"].dropped_S.sum() > 6000 - SMALLEST
    dropped = without[:, None, None]
    is_default = rows.reshape(-1, 2, 2) == [7, -7]
    assert (is_default == dropped).all()


@pytest.mark.parametrize("unknown", ["default_row", "zeros"])
def test_the_default_row_stands_for_ids_that_were_never_seen(unknown):
    stored, admitted, without = overfull()
    tables = ShardedTables(
        (FEATURE,), (dataclasses.replace(TABLE, unknown=unknown),), make_mesh(jax.devices()[:2])
    )
    defaults = {"f": jnp.array([7.0, -7.0])} if unknown == "default_row" else {}

    @jax.jit
    def look_up(stored, ids):
        found = tables.look_up(stored.values, stored.maps, {"f": ids})
        return embedded(tables, found, ids, defaults)

    known = int(np.argmin(without.reshape(-1, 2)[:, 0]))
    ids = small.to_words(np.array([10**15 + 7, -5, -1, known] * 4)).reshape(1, 4, 4, 1, 2)
    rows, absent = look_up(stored, ids)
    stands = [7, -7] if unknown == "default_row" else [0, 0]
    expected = np.array([stands, stands, [0, 0], admitted.reshape(-1, 2, 2)[known, 0]])
    np.testing.assert_array_equal(rows, np.tile(expected.astype(np.float32), (4, 1, 1)))
    assert (np.asarray(absent)[..., 0] == [True, True, False, False]).all()


def test_zeros_do_not_change_the_state():
    made = functions(1, "zeros")[0].abstract
    assert set(made.params) == {"dense", "tables"}
    assert len(made.opt_state) == 3
    with_row = functions(1)[0].abstract
    assert with_row.params["unknown"]["item_id"].shape == (8,)
    same = with_row._replace(
        params={name: x for name, x in with_row.params.items() if name != "unknown"}
    )
    assert jax.tree.map(lambda x: x.shape, same.params) == jax.tree.map(
        lambda x: x.shape, made.params
    )


def test_default_rows_are_on_all_devices_also_with_fsdp():
    settings = dataclasses.replace(CONFIG.train, dense_sharding="fsdp")
    mesh = make_mesh(jax.devices()[:4])
    abstract = make_step_functions(
        StepSettings.of(dataclasses.replace(CONFIG, train=settings)), mesh
    ).abstract
    assert abstract.params["unknown"]["item_id"].sharding == replicated(mesh)
    assert moments_of_default(abstract)[0].sharding == replicated(mesh)


def test_a_table_that_grows_keeps_its_default_row():
    state, mesh = run()[0][0], functions(1)[1]
    grown = doubled(jax.device_put(state, replicated(mesh)), "item_id", mesh)
    assert jax.tree.structure(grown) == jax.tree.structure(state)
    assert grown.params["tables"]["item_id"].shape == (2 * SMALLEST, 8)
    np.testing.assert_array_equal(
        grown.params["unknown"]["item_id"], state.params["unknown"]["item_id"]
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log") / "log"
    small.write_log(directory, 40)
    return directory


@pytest.fixture(scope="module")
def saved(log, tmp_path_factory):
    """A run directory with the state after two steps."""
    config = waiting(evaluating(log, tmp_path_factory.mktemp("run")))
    checkpoints = checkpoints_of(config)
    write_config(Path(config.train.output_dir), config)
    progress = {"growth": GrowthPlan(config.features, config.tables).get_state()}
    checkpoints.save(2, run()[1][0], progress)
    checkpoints.wait()
    checkpoints.close()
    return config


def test_a_restored_state_continues_with_identical_bits(saved):
    checkpoints = checkpoints_of(saved)
    state = checkpoints.restore(2, functions(1)[0].abstract)
    checkpoints.close()
    after = jax.device_get(step_on(state, 2, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, after, run()[2])


def test_the_setting_for_unknown_ids_cannot_change(saved):
    config = waiting(saved, unknown="zeros")
    with pytest.raises(
        UserError, match=r"tables\.item_id\.unknown: .* made with default_row, found zer"
    ):
        check_config(Path(config.train.output_dir), config)
    path = Path(saved.train.output_dir) / "config.json"
    before = json.loads(path.read_text())
    for table in before["tables"]:
        del table["unknown"]
    now = path.read_text()
    try:
        path.write_text(json.dumps(before))
        check_config(Path(config.train.output_dir), config)
    finally:
        path.write_text(now)


def test_inspect_tables_shows_the_default_row(saved, capsys):
    assert inspect_tables.main([saved.train.output_dir]) == 0
    norm = np.linalg.norm(run()[1][0].params["unknown"]["item_id"])
    assert f"{norm:.4g}" in capsys.readouterr().out


def unknown_events(log, left_out):
    """The newest events of all histories, and those whose item has no row, after two steps."""
    sightings = collections.Counter(i for n in range(2) for f in (0, 2) for i in _ids_of(n, f))
    shown = unknown = 0
    for row in rows_of(log):
        history = [i for (i,) in row["item_id"]]
        history = history[: len(history) - left_out][-small.SEQ_LEN :]
        shown += len(history)
        unknown += sum(sightings[i] < 2 for i in history)
    return unknown, shown


def test_evaluate_reports_the_share_of_unknown_events(saved, log, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("s2s_jax.jobs.evaluate.make_mesh", one_device)
    out = tmp_path / "result.json"
    assert evaluate.main(["--config", config_file(saved, tmp_path), "--out", str(out)]) == 0
    unknown, shown = unknown_events(log, left_out=1)
    assert 0 < unknown < shown
    assert json.loads(out.read_text())["metrics"]["eval/unknown_items"] == unknown / shown
    assert f"{unknown / shown:.4f}" in capsys.readouterr().out


def test_recommend_counts_unknown_events_after_an_interruption_too(
    saved, log, tmp_path, monkeypatch, capsys
):
    arguments = ["--config", config_file(saved, tmp_path), "--input", str(log), "--top_k", "3"]
    arguments += ["--output", str(tmp_path / "recs.parquet")]
    monkeypatch.setattr("s2s_jax.jobs.recommend.make_mesh", one_device)
    whole = StripeRecommender.recommend

    def interrupted(self, stripes):
        yield next(whole(self, stripes))
        raise KeyboardInterrupt

    monkeypatch.setattr("s2s_jax.jobs.stripe_recommender.StripeRecommender.recommend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recommend.main(arguments)
    monkeypatch.setattr("s2s_jax.jobs.stripe_recommender.StripeRecommender.recommend", whole)
    assert recommend.main(arguments) == 0
    unknown, shown = unknown_events(log, left_out=0)
    output = capsys.readouterr().out
    assert f"{unknown:,} of the {shown:,} events that the model was shown" in output
    assert "40 users" in output
    assert "its default row is used" in output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"admit_after": 1},
            ["tables.item_id.admit_after", "at least 2", "default_row", "found 1"],
        ),
        ({"unknown": "nothing"}, ["tables.0.unknown", "zeros, default_row"]),
    ],
)
def test_default_rows_that_nothing_would_train_are_refused(changes, words):
    with pytest.raises(UserError) as caught:
        validate(small.with_table(CONFIG, "item_id", **changes))
    for word in words:
        assert word in str(caught.value)


def test_default_rows_are_for_tables_that_grow():
    config = dataclasses.replace(small.config(), tables=CONFIG.tables)
    config = small.with_table(config, "item_id", capacity=65_536, admit_after=1)
    with pytest.raises(UserError, match=r"tables\.item_id\.unknown: expected zeros, because only"):
        validate(config)
