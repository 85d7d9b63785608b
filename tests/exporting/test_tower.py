"""The files of a tower give the vectors of `Inference`, for every option of the model.

ONNX runs in a process without JAX, as in a serving program.
"""

import dataclasses
import functools
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from places import REPO

from s2s_jax.cluster.mesh import make_mesh, replicated
from s2s_jax.config import LossConfig, ModelConfig, TimeGaps
from s2s_jax.embedding.sharded import ShardedTables
from s2s_jax.errors import UserError
from s2s_jax.exporting import onnx_layers, tower_files
from s2s_jax.exporting.onnx_tower import to_onnx
from s2s_jax.exporting.stablehlo import to_stablehlo
from s2s_jax.exporting.tower import Tower
from s2s_jax.model.linear import compute_dtype
from s2s_jax.training.step.batches import ids_of, put_batch, unpack
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings

ROWS, L = 8, small.SEQ_LEN
TOLERANCE = 1e-5
# Models that together have every option that changes what is computed.
MODELS = {
    "plain": {},
    "rope": {
        "position": "rope",
        "norm": "rms",
        "qk_norm": True,
        "feed_forward": "swiglu",
        "gated_residuals": True,
        "distance_bias": True,
        "time_bias": TimeGaps(),
        "num_layers": 1,
        "nhead": 2,
        "attention": "xla",
        "remat": "attention",
        "seq_len": L + 3,
    },
    "learned": {
        "position": "learned",
        "norm_placement": "post",
        "gated_residuals": True,
        "input_norm": True,
        "dim_feedforward": 40,
        "num_layers": 3,
        "unroll": 1,
        "remat": "full",
        "nhead": 1,
    },
    "hstu": {"layer": "hstu", "distance_bias": True, "time_bias": TimeGaps()},
    "dot": {
        "layer": "hstu_softmax",
        "norm": "rms",
        "norm_placement": "post",
        "qk_norm": True,
        "gated_residuals": True,
        "input_norm": True,
        "hidden_size": 20,
        "dropout": 0.4,
        "input_dropout": 0.3,
        "event_dropout": 0.2,
    },
}


def test_the_models_have_every_option():
    """A new option of the model must be one that ONNX has, too."""
    tested = {name for changes in MODELS.values() for name in changes}
    # Other tests are about types.
    assert tested | {"dtype"} == {field.name for field in dataclasses.fields(ModelConfig)}


def make_config(name):
    config = small.config()
    similarity = "dot" if name == "dot" else "cosine"
    return small.config(
        model=dataclasses.replace(config.model, **MODELS[name]),
        loss=LossConfig(similarity=similarity, target_features=("item_id", "tags")),
    )


class Made(NamedTuple):
    """A tower, events that the tables embedded, and their vectors from the functions of the step.

    Without a bias of time gaps, the times are any numbers.
    """

    tower: Tower
    events_BLD: np.ndarray
    length_B: np.ndarray
    time_BL: np.ndarray
    users_BE: np.ndarray
    events_ID: np.ndarray
    items_IE: np.ndarray


@functools.cache
def make(name: str) -> Made:
    settings, mesh = StepSettings.of(make_config(name)), make_mesh(jax.devices()[:1])
    functions = make_step_functions(settings, mesh)
    state = functions.init()
    # Initial biases, scales and positions are small or alike, which would hide that one is missing.
    dense = jax.tree.map(moved, state.params["dense"])
    state = state._replace(params=state.params | {"dense": dense})
    tables = ShardedTables(settings.items.features, settings.tables, mesh)

    @jax.jit
    def embed(ids):
        found = tables.look_up(state.params["tables"], state.maps, ids)
        places, ids = jax.tree.map(lambda x: x[0], (found.places, ids))
        embeddings = tables.embed(found.rows, places, ids)
        return jnp.concatenate([embeddings[f.name] for f in settings.items.features], axis=-1)

    batch = small.batch(make_config(name), ROWS, 0)
    time_BL = batch["ids"][..., -1]
    batch = put_batch(batch, 1, mesh)
    ids = ids_of(unpack(settings, batch))
    # The ids of one place of each history, as items.
    item_ids = {feature: of_feature[:, :, :1] for feature, of_feature in ids.items()}
    length_B = batch["length"][0]
    ids_MC = batch["ids"].reshape(-1, batch["ids"].shape[-1])
    seq_len = batch["ids"].shape[2]
    users_BE = np.array(functions.user_vectors(state, ids_MC, length_B, seq_len).vectors_BE)
    length_B = np.asarray(length_B)
    users_BE[length_B == 0] = 0
    return Made(
        Tower.of(settings, state.params),
        np.asarray(embed(ids)),
        length_B,
        time_BL,
        users_BE,
        np.asarray(embed(item_ids))[:, 0],
        np.asarray(functions.item_vectors(state, item_ids)),
    )


def moved(x):
    noise = np.random.default_rng(x.size).normal(size=x.shape)
    return x + 0.2 * jnp.asarray(noise, x.dtype)


def calls(made: Made):
    """Arguments for a tower, and the vectors that it must return: all histories, and short ones."""
    short_B = made.length_B <= 2
    assert short_B.sum() >= 2
    everything = made.events_BLD, made.length_B, *times_of(made)
    yield everything, made.users_BE
    yield (
        tuple(x[short_B, :2] if x.ndim > 1 else x[short_B] for x in everything),
        made.users_BE[short_B],
    )
    (one,) = np.nonzero(made.length_B == 1)
    one = one[:1]
    yield tuple(x[one, :1] if x.ndim > 1 else x[one] for x in everything), made.users_BE[one]
    # What is after the end of a history may be anything.
    rng = np.random.default_rng(1)
    after_BL = np.arange(made.events_BLD.shape[1]) >= made.length_B[:, None]
    noisy_BLD = np.where(after_BL[..., None], 9 * rng.normal(size=made.events_BLD.shape), 0)
    noisy_BLD[..., 0] = np.where(after_BL, np.nan, 0)
    noisy = np.float32(noisy_BLD + made.events_BLD), made.length_B
    yield (*noisy, *(np.where(after_BL, -7, time_BL) for time_BL in times_of(made))), made.users_BE


def times_of(made: Made) -> list[np.ndarray]:
    """The further argument of a timed tower, from another beginning."""
    return [made.time_BL + np.int32(1000)] if made.tower.timed else []


@pytest.mark.parametrize(
    "name",
    [n if n in ("rope", "hstu") else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)
def test_users_are_those_of_inference(name):
    made = make(name)
    assert set(made.length_B) >= {0, 1, made.tower.model.seq_len}
    users = jax.jit(made.tower.users)
    for arguments, expected_BE in calls(made):
        np.testing.assert_allclose(users(*arguments), expected_BE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["plain", "dot"])
def test_items_are_those_of_inference(name):
    made = make(name)
    items_IE = jax.jit(made.tower.item_vectors)(made.events_ID)
    np.testing.assert_allclose(items_IE, made.items_IE, atol=TOLERANCE)
    assert np.abs(made.items_IE[0] - made.items_IE[1]).max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_stablehlo(name):
    made = make(name)
    data = to_stablehlo(made.tower)
    read = export.deserialize(bytearray(data))
    assert read.platforms == ("cpu", "cuda")
    users = jax.jit(read.call)
    for arguments, expected_BE in calls(made):
        np.testing.assert_allclose(users(*arguments), expected_BE, atol=TOLERANCE)


# Runs each model of a directory on the calls in its file.
RUN_ONNX = """
import sys
from typing import NamedTuple
from pathlib import Path
import numpy as np
import onnxruntime
for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
    runtime = onnxruntime.InferenceSession(path)
    with np.load(path.with_suffix(".npz")) as given:
        names = [each.name for each in runtime.get_inputs()]
        found = [
            runtime.run(["users"], {name: given[f"{name}{i}"] for name in names})[0]
            for i in range(len(given.files) // len(names))
        ]
    np.savez(path.with_suffix(".found.npz"), *found)
assert not {"jax", "flax", "s2s_jax"} & set(sys.modules)
"""


def test_onnx_runs_without_jax(tmp_path):
    for name in MODELS:
        (tmp_path / f"{name}.onnx").write_bytes(to_onnx(make(name).tower))
        given = {}
        for i, (arguments, _) in enumerate(calls(make(name))):
            names = ("events", "length", "times")[: len(arguments)]
            given |= {f"{key}{i}": x for key, x in zip(names, arguments, strict=True)}
        np.savez(tmp_path / f"{name}.npz", **given)
    subprocess.run([sys.executable, "-c", RUN_ONNX, str(tmp_path)], check=True)
    for name in MODELS:
        with np.load(tmp_path / f"{name}.found.npz") as found:
            for i, (_, expected_BE) in enumerate(calls(make(name))):
                users_BE = found[f"arr_{i}"]
                np.testing.assert_allclose(users_BE, expected_BE, atol=TOLERANCE, err_msg=name)


def test_bfloat16_is_kept_by_stablehlo_and_float32_in_onnx():
    exact = make("plain").tower
    rough = dataclasses.replace(exact, model=dataclasses.replace(exact.model, dtype="bfloat16"))
    (arguments, expected_BE), *_ = calls(make("plain"))
    users_BE = export.deserialize(bytearray(to_stablehlo(rough))).call(*arguments)
    assert users_BE.dtype == jnp.float32
    assert 1e-4 < np.abs(users_BE - expected_BE).max() < 0.05
    assert to_onnx(rough) == to_onnx(exact)


def test_auto_stands_for_float32_on_every_machine(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    settings = StepSettings.of(make_config("plain"))
    assert compute_dtype(settings.model) == jnp.bfloat16
    tower = Tower.of(settings, {"dense": make("plain").tower.dense, "tables": {}})
    assert compute_dtype(tower.model) == jnp.float32


def test_sharded_parameters_give_the_same_tower():
    tower = make("plain").tower
    mesh = make_mesh(jax.devices()[:4])
    over_devices = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))

    def spread(x):
        return jax.device_put(x, over_devices if x.shape[0] % 4 == 0 else replicated(mesh))

    params = {"dense": jax.tree.map(spread, tower.dense), "tables": {}}
    again = Tower.of(StepSettings.of(make_config("plain")), params)
    assert to_onnx(again) == to_onnx(tower)


def test_files_have_the_same_bytes_each_time_and_no_paths(tmp_path):
    tower = make("learned").tower
    for run in ("one", "other"):
        (tmp_path / run).mkdir()
        tower_files.write_tower(tower, tmp_path / run)
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"tower.stablehlo", "tower.onnx"}
    for path in (tmp_path / "one").iterdir():
        data = path.read_bytes()
        assert data == (tmp_path / "other" / path.name).read_bytes()
        assert str(REPO).encode() not in data
        assert b"tower.py" not in data


def test_a_history_longer_than_learned_positions_is_refused():
    made = make("learned")
    users = export.deserialize(bytearray(to_stablehlo(made.tower))).call
    with pytest.raises(ValueError, match=r"(?i)shape"):
        users(np.zeros((1, L + 1, made.tower.width), np.float32), np.ones(1, np.int32))


def test_onnx_that_differs_from_jax_is_not_written(monkeypatch):
    monkeypatch.setattr(onnx_layers, "LAYER_NORM_EPS", 0.5)
    with pytest.raises(AssertionError, match="ONNX and JAX differ"):
        to_onnx(make("plain").tower)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_extra_is_named(monkeypatch, missing, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"^{missing}, .*pip install 's2s-jax\[export\]'$"):
        tower_files.write_tower(make("plain").tower, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_large_for_a_file_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(tower_files, "_MOST_BYTES", 1000)
    with pytest.raises(UserError, match=r"^model: expected at most .* found"):
        tower_files.write_tower(make("plain").tower, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_explained(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        tower_files.write_tower(make("plain").tower, tmp_path / "missing")
