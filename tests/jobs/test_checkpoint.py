"""`s2s checkpoint`: weights of the RecIS example in PyTorch, to and from runs."""

import dataclasses
import json
from pathlib import Path

import golden
import jax
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
import small
from evaluations import evaluating
from jobs_of import checkpoints_of, job, learned, lines, one_device

import s2s_serve
from s2s_jax.cli.commands import checkpoint as command
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import TimeGaps
from s2s_jax.errors import UserError
from s2s_jax.jobs.checkpoint import from_torch, to_torch
from s2s_jax.jobs.evaluate import evaluate
from s2s_jax.jobs.export import Request as ExportRequest
from s2s_jax.jobs.export import export
from s2s_jax.jobs.recommend import Request, recommend
from s2s_jax.jobs.train import train
from s2s_jax.ranking.restored import restore
from s2s_jax.runs.run_dir import write_config
from s2s_jax.training.growth import GrowthPlan
from s2s_jax.training.meters import Meters
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings

# The tensors of the example with the sizes of `small.config`.
HIDDEN, FEED_FORWARD, EVENT = 16, 24, 8 + 4 + 8
SHAPES = {
    "dense.proj.weight": (HIDDEN, EVENT),
    "dense.proj.bias": (HIDDEN,),
    **{
        f"dense.trans.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "norm1.weight": (HIDDEN,),
            "norm1.bias": (HIDDEN,),
            "attn.attn.weight": (3 * HIDDEN, HIDDEN),
            "attn.attn.bias": (3 * HIDDEN,),
            "attn.proj.weight": (HIDDEN, HIDDEN),
            "attn.proj.bias": (HIDDEN,),
            "norm2.weight": (HIDDEN,),
            "norm2.bias": (HIDDEN,),
            "ffn.net.0.weight": (FEED_FORWARD, HIDDEN),
            "ffn.net.0.bias": (FEED_FORWARD,),
            "ffn.net.2.weight": (HIDDEN, FEED_FORWARD),
            "ffn.net.2.bias": (HIDDEN,),
        }.items()
    },
    "dense.trans.final_layer_norm.weight": (HIDDEN,),
    "dense.trans.final_layer_norm.bias": (HIDDEN,),
    "sparse.item_id.weight": (300, 8),
    "sparse.behavior_id.weight": (9, 4),
}


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def save(path, found):
    safetensors.numpy.save_file(found, path)
    return path


def into(config, run_dir, **train_changes):
    changes = {"output_dir": str(run_dir)} | train_changes
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def assert_same_tensors(path, expected):
    found = safetensors.numpy.load_file(path)
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, 60)
    return directory


def test_weights_from_pytorch_train_as_in_pytorch(tmp_path):
    """The losses were recorded in PyTorch, from these weights and a new optimizer."""
    arrays = golden.load("golden_seed.npz")
    config = into(golden.recis_config(arrays), tmp_path / "run")
    given = golden.example_tensors(arrays, "w0")
    mesh = make_mesh(jax.devices()[:1])
    done = from_torch(save(tmp_path / "w0.safetensors", given), config, mesh)
    assert done.parameters == sum(x.size for x in given.values())
    run = restore(config, mesh)
    state, losses = run.state, []
    for step in range(len(arrays["losses"])):
        batch = put_batch(golden.batch(arrays, step), 1, mesh)
        state, metrics = run.functions.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, arrays["losses"], rtol=1e-5)
    to_torch(tmp_path / "run", tmp_path / "again.safetensors")
    assert_same_tensors(tmp_path / "again.safetensors", given)


@pytest.mark.parametrize(("devices", "sharding"), [(1, "replicated"), (4, "fsdp")])
def test_a_round_trip_changes_no_bit(tmp_path, devices, sharding):
    config = into(small.config(), tmp_path / "run", dense_sharding=sharding)
    given = tensors()
    file = save(tmp_path / "given.safetensors", given)
    from_torch(file, config, make_mesh(jax.devices()[:devices]))
    to_torch(tmp_path / "run", tmp_path / "found.safetensors")
    assert_same_tensors(tmp_path / "found.safetensors", given)
    # In the order of a `state_dict`.
    data = (tmp_path / "found.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header) == list(SHAPES)


def test_training_continues_as_if_it_had_begun_with_these_weights(tmp_path, log):
    """A run whose initial weights went through a file is the same run, to the last bit."""
    first = job(log, tmp_path / "first", train_steps=4, log_steps=1)
    assert not train(first, one_device())
    beginning = into(first, tmp_path / "beginning")
    functions = make_step_functions(StepSettings.of(beginning), one_device())
    checkpoints = checkpoints_of(beginning)
    plan = GrowthPlan(beginning.features, beginning.tables)
    progress = {"meters": Meters().get_state(), "growth": plan.get_state()}
    checkpoints.save(0, functions.init(), progress)
    checkpoints.close()
    write_config(tmp_path / "beginning", beginning)
    to_torch(tmp_path / "beginning", tmp_path / "weights.safetensors")
    second = into(first, tmp_path / "second")
    from_torch(tmp_path / "weights.safetensors", second, one_device())
    assert not train(second, one_device())
    assert learned(tmp_path / "second") == learned(tmp_path / "first")
    assert len(lines(tmp_path / "second")) == 4


@pytest.mark.slow
def test_other_commands_take_imported_weights(tmp_path, log):
    # With drop, the items must count as trained.
    config = evaluating(log, tmp_path / "run", untrained="drop")
    from_torch(save(tmp_path / "given.safetensors", tensors()), config, one_device())
    assert evaluate(config, mesh=one_device()).step == 0
    request = Request(input=str(log), output=tmp_path / "recs.parquet", top_k=5)
    assert recommend(config, request, one_device()).untrained_items == 0
    export(config, ExportRequest(output=tmp_path / "export"))
    model = s2s_serve.load(tmp_path / "export")
    recs = pyarrow.parquet.read_table(tmp_path / "recs.parquet").to_pylist()
    tables = [pyarrow.orc.read_table(str(path)) for path in sorted(log.glob("*.orc"))]
    answers = model.recommend(tables[0], k=5)
    for rec, answer in zip(recs, answers[:10], strict=False):
        np.testing.assert_allclose(answer.scores, rec["scores"], atol=1e-5)
    # Ids of the log are numbers, and texts would be hashed otherwise.
    names = [feature.column_name for feature in config.features]
    texts = {name: [[str(i)] for i in (3, 4)] for name in names}
    with pytest.raises(s2s_serve.UserError, match="expected whole numbers"):
        model.recommend([texts], k=5)
    # Numbers of parameters, under the names of the tower.
    dense = safetensors.numpy.load_file(tmp_path / "export/versions/1/dense.safetensors")
    np.testing.assert_array_equal(dense["proj.kernel"].T, tensors()["dense.proj.weight"])


def changed(**changes):
    return {name: x for name, x in (tensors() | changes).items() if x is not None}


QKV = "dense.trans.layers.1.attn.attn.weight"
DEEPER = {n.replace(".layers.1.", ".layers.2."): x for n, x in tensors().items()}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            changed(**{"sparse.item_id.weight": np.zeros((300, 9), np.float32)}),
            r"sparse\.item_id\.weight: expected shape \[300, 8\] \(from "
            r"features\.item_id\.hash_bucket_size, features\.item_id\.emb_dim\), found \[300, 9\]; set",
        ),
        (
            changed(**{QKV: tensors()[QKV].T.copy()}),
            r"attn\.attn\.weight: expected shape \[48, 16\] \(from model\.hidden_size\), found "
            r"\[16, 48\]",
        ),
        (
            {f"module.{name}": x for name, x in tensors().items()},
            r"dense\.proj\.weight: expected a tensor of shape \[16, 20\], found none of this name \(but "
            r"module\.dense",
        ),
        (
            changed(**{"dense.proj.bias": None}),
            r"dense\.proj\.bias: expected a tensor of shape \[16\], found none",
        ),
        (
            changed(**{"sparse.shop.weight": np.zeros((3, 4), np.float32)}),
            r"sparse\.shop\.weight: expected only tensors of the model, found this one of shape",
        ),
        (
            changed() | DEEPER,
            r"expected 2 layers \(from model\.num_layers\), found 3; set model\.num_layers to 3",
        ),
        (
            changed(**{"dense.proj.bias": np.zeros(HIDDEN)}),
            r"dense\.proj\.bias: expected numbers of type float32, found float64; convert",
        ),
        (
            changed(**{"dense.proj.bias": np.zeros(HIDDEN, np.float16)}),
            r"dense\.proj\.bias has numbers of type F16\); save a state_dict of float32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, found, message):
    file = save(tmp_path / "given.safetensors", found)
    with pytest.raises(UserError, match=message) as caught:
        from_torch(file, into(small.config(), tmp_path / "run"), one_device())
    assert str(file) in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("features.item_id.hash_bucket_size", small.growing(small.config())),
        ("model.position", {"position": "rope"}),
        ("model.position", {"position": "learned"}),
        ("model.input_norm", {"input_norm": True}),
        ("model.distance_bias", {"distance_bias": True}),
        ("model.time_bias", {"time_bias": TimeGaps()}),
        ("model.layer", {"layer": "hstu"}),
        ("model.feed_forward", {"feed_forward": "swiglu"}),
        ("model.norm", {"norm": "rms"}),
        ("model.norm_placement", {"norm_placement": "post"}),
        ("model.qk_norm", {"qk_norm": True}),
        ("model.gated_residuals", {"gated_residuals": True}),
    ],
)
def test_models_that_the_example_cannot_express_are_refused_by_their_key(tmp_path, key, config):
    if isinstance(config, dict):
        config = small.config(model=dataclasses.replace(small.config().model, **config))
    config = into(config, tmp_path / "run")
    file = save(tmp_path / "given.safetensors", tensors())
    with pytest.raises(UserError, match=f"^{key}: expected .*--config"):
        from_torch(file, config, one_device())
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", config)
    with pytest.raises(UserError, match=f"^{key}: expected .*s2s export"):
        to_torch(tmp_path / "run", tmp_path / "found.safetensors")
    assert not (tmp_path / "found.safetensors").exists()


@pytest.fixture
def imported(tmp_path):
    config = into(small.config(), tmp_path / "run")
    from_torch(save(tmp_path / "given.safetensors", tensors()), config, one_device())
    return config


def test_a_directory_with_a_run_is_left_alone(tmp_path, imported):
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"^--output: expected a directory without checkpoints"):
        from_torch(tmp_path / "given.safetensors", imported, one_device())
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path, imported, monkeypatch):
    output = tmp_path / "found.safetensors"
    output.write_bytes(b"before")
    # What a killed command left behind.
    (tmp_path / ".found.safetensors.tmp").write_bytes(b"half")
    with monkeypatch.context() as patched:
        full = OSError(28, "No space left on device")
        patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(UserError, match=r"found\.safetensors cannot be written \(No space"):
            to_torch(tmp_path / "run", output)
    assert output.read_bytes() == b"before"
    to_torch(tmp_path / "run", output)
    assert_same_tensors(output, tensors())
    assert not (tmp_path / ".found.safetensors.tmp").exists()


CONFIG = """
import small
def get_config():
    return small.config()
"""


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.py").write_text(CONFIG)
    save(Path("given.safetensors"), tensors())
    # As on the command line, on all eight devices.
    from_file = ["from-torch", "given.safetensors", "--config", "config.py", "--output", "run 1"]
    assert command.main([*from_file, "--lr.dense_lr", "0.5"]) == 0
    assert capsys.readouterr().out.endswith(
        "to train it: s2s train --config config.py --lr.dense_lr 0.5 --train.output_dir 'run 1'\n"
    )
    assert json.loads(Path("run 1/config.json").read_text())["lr"]["dense_lr"] == 0.5
    assert command.main(["to-torch", "run 1", "--output", "found.safetensors"]) == 0
    assert "from the checkpoint of step 0 to found.safetensors" in capsys.readouterr().out
    assert_same_tensors("found.safetensors", tensors())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sideways", "run", "--output", "x"], "DIRECTION: expected one of to-torch, from-torch"),
        (["to-torch", "run"], "--output: expected a path, found nothing"),
        (["to-torch", "run", "--output", "x.npz"], r"--output: .* ends in .safetensors or .pt"),
        (["to-torch", "run", "--output", "x.safetensors"], "expected the directory of a run"),
        (
            ["to-torch", "run", "--output", "x.safetensors", "--config", "config.py"],
            "--config: expected none with to-torch",
        ),
        (["from-torch", "x.safetensors", "--output", "y"], "--config: expected a path with from"),
        (
            ["from-torch", "x.safetensors", "--output", "y", "--checkpoint", "3"],
            "--checkpoint: expected none with from-torch",
        ),
        (
            ["from-torch", "x.bin", "--output", "y", "--config", "config.py"],
            r"FILE: .* ends in .safetensors",
        ),
        (
            ["from-torch", "x.safetensors", "--output", "y", "--config", "config.py"],
            "FILE: x.safetensors does not exist",
        ),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("config.py").write_text(CONFIG)
    with pytest.raises(UserError, match=message):
        command.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]
