"""Reasons why a checkpoint cannot be restored, with real causes: only damage is reported as damage."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from saving import configured

import s2s_jax
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.embedding.tables import table_specs
from s2s_jax.errors import UserError
from s2s_jax.runs.checkpoints.saved_tables import SavedTables
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings

NOBODY = 65534


def one_layer(config):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))


def functions(config):
    return make_step_functions(StepSettings.of(config), make_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def saved():
    """A run directory with checkpoints 2 and 5, to which others may be added."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        config = one_layer(configured(Path(directory) / "connection corrupt"))
        made = functions(config)
        checkpoints = Checkpoints(Path(config.train.output_dir), config.train.max_to_keep)
        state = made.init()
        for step in (2, 5):
            checkpoints.save(step, state, {"at": step})
        checkpoints.close()
        yield config, made.abstract


def restore(config, abstract, run_dir, step=5):
    checkpoints = Checkpoints(run_dir, newest=None, read_only=True)
    with contextlib.closing(checkpoints):
        assert checkpoints.progress(step) == {"at": step}
        return checkpoints.restore(step, abstract)


def refusal(config, abstract, run_dir, step=5) -> str:
    with pytest.raises(UserError) as caught:
        restore(config, abstract, run_dir, step)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{run_dir / 'checkpoints' / str(step)}: ")
    return str(caught.value)


def data(checkpoint: Path) -> list[Path]:
    return [path for path in checkpoint.rglob("d/*") if path.is_file()]


def halve(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def harm_all(harm):
    return lambda checkpoint: [harm(path) for path in data(checkpoint)]


DAMAGES = {
    "half of the data": harm_all(halve),
    "empty data": harm_all(lambda path: path.write_bytes(b"")),
    "no data": harm_all(Path.unlink),
    "half a manifest": lambda checkpoint: halve(checkpoint / "state" / "manifest.ocdbt"),
    "no manifest": lambda checkpoint: (checkpoint / "state" / "manifest.ocdbt").unlink(),
    "half of the names": lambda checkpoint: halve(checkpoint / "state" / "_METADATA"),
    "no names": lambda checkpoint: (checkpoint / "state" / "_METADATA").unlink(),
    "no state": lambda checkpoint: shutil.rmtree(checkpoint / "state"),
    "half of the progress": lambda checkpoint: halve(checkpoint / "progress" / "metadata"),
    "no progress": lambda checkpoint: (checkpoint / "progress" / "metadata").unlink(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_reported_with_a_remedy_that_loses_nothing(saved, tmp_path, name):
    config, abstract = saved
    shutil.copytree(config.train.output_dir, tmp_path / "run")
    DAMAGES[name](tmp_path / "run" / "checkpoints" / "5")
    message = refusal(config, abstract, tmp_path / "run")
    assert "is damaged" in message
    aside = tmp_path / "run" / "damaged-5"
    assert f"move it to {aside}" in message
    assert "of step 2" in message
    # Follows the advice of the message.
    (tmp_path / "run" / "checkpoints" / "5").rename(aside)
    restore(config, abstract, tmp_path / "run", 2)
    DAMAGES[name](tmp_path / "run" / "checkpoints" / "2")
    assert "there is no earlier checkpoint" in refusal(config, abstract, tmp_path / "run", 2)


@contextlib.contextmanager
def as_nobody():
    """Changes to another user, since root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)


@pytest.mark.parametrize("what", ["data", "names", "all"])
def test_files_that_may_not_be_read_are_not_damaged(saved, what):
    config, abstract = saved
    run_dir = Path(config.train.output_dir)
    restore(config, abstract, run_dir)
    checkpoint = run_dir / "checkpoints" / "5"
    kinds = {"data": data(checkpoint), "names": [checkpoint / "state" / "_METADATA"]}
    paths = [checkpoint / "state"] if what == "all" else kinds[what]
    modes = {path: path.stat().st_mode for path in paths}
    try:
        for path in paths:
            path.chmod(0)
        with as_nobody():
            message = refusal(config, abstract, run_dir)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert "may not be read by this user" in message
    assert "move" not in message
    restore(config, abstract, run_dir)


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_not_damage(saved, monkeypatch, error):
    config, abstract = saved

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(jax, "device_put", fail)
    message = refusal(config, abstract, Path(config.train.output_dir))
    assert "too little memory" in message
    assert "device(s)" in message
    assert "move" not in message


def test_a_file_system_that_fails_is_not_damage(saved, monkeypatch):
    config, abstract = saved

    def fail(*_, **__):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(jax, "device_put", fail)
    message = refusal(config, abstract, Path(config.train.output_dir))
    assert "cannot be read at present" in message
    assert "move" not in message


def test_arrays_of_another_configuration_are_not_damage(saved):
    config, _ = saved
    for name, value in (("hidden_size", 32), ("input_norm", True)):
        model = dataclasses.replace(config.model, **{name: value})
        other = functions(dataclasses.replace(config, model=model)).abstract
        message = refusal(config, other, Path(config.train.output_dir))
        assert "its arrays do not match this configuration" in message
        assert "move" not in message


def test_tables_of_a_damaged_checkpoint_are_not_shown(saved, tmp_path):
    config, _ = saved
    shutil.copytree(config.train.output_dir, tmp_path / "run")
    harm_all(halve)(tmp_path / "run" / "checkpoints" / "5")
    tables = SavedTables(tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoints/5: is damaged \(.* of step 2$"):
        tables.values(table_specs(config.features, config.tables)["item_id"])
    halve(tmp_path / "run" / "checkpoints" / "5" / "progress" / "metadata")
    with pytest.raises(UserError, match=r"checkpoints/5: is damaged"):
        SavedTables(tmp_path / "run")


def test_checkpoints_of_a_later_format_are_refused(saved, tmp_path):
    config, abstract = saved
    shutil.copytree(config.train.output_dir, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "5" / "progress" / "metadata"
    contents = json.loads(path.read_text())
    assert contents["version"] == 1
    assert contents["s2s_jax"] == s2s_jax.__version__
    path.write_text(json.dumps(contents | {"version": 2, "s2s_jax": "1.2.3"}))
    assert "saved by s2s_jax 1.2.3" in refusal(config, abstract, tmp_path / "run")
    with pytest.raises(UserError, match="found format 2"):
        SavedTables(tmp_path / "run")
    # Checkpoints of version 0.1.0, and older ones without a format number.
    del contents["s2s_jax"]
    path.write_text(json.dumps(contents | {"version": 2}))
    assert "saved by a later version" in refusal(config, abstract, tmp_path / "run")
    for written in (contents, {name: contents[name] for name in contents if name != "version"}):
        path.write_text(json.dumps(written))
        restore(config, abstract, tmp_path / "run")


def test_a_directory_that_may_not_be_looked_at(saved):
    config, abstract = saved
    directory = Path(config.train.output_dir) / "checkpoints"
    mode = directory.stat().st_mode
    try:
        directory.chmod(0)
        with as_nobody(), pytest.raises(UserError, match=r"cannot be used .*Permission denied"):
            restore(config, abstract, directory.parent)
    finally:
        directory.chmod(mode)


def test_a_checkpoint_is_restored_on_as_many_devices_as_there_are(saved):
    config, _ = saved
    made = make_step_functions(StepSettings.of(config), make_mesh(jax.devices()[:8]))
    restore(config, made.abstract, Path(config.train.output_dir))
