"""Files of tensors. PyTorch is not installed where tests run, so a stand-in shows how it is called."""

import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from s2s_jax.errors import UserError
from s2s_jax.pytorch import files


class Tensor:
    """The part of `torch.Tensor` that is used."""

    def __init__(self, values, dtype):
        self.values, self.dtype = values, dtype

    def detach(self):
        return self

    def numpy(self):
        return self.values


@pytest.fixture
def torch(monkeypatch):
    """A stand-in for PyTorch, whose files are pickles of arrays, and the keywords of its calls."""
    module = types.ModuleType("torch")

    def load(path, **keywords):
        calls.append(keywords)
        return pickle.loads(Path(path).read_bytes())

    def save(found, path):
        Path(path).write_bytes(pickle.dumps(found))

    calls = []
    stand_in = {
        "Tensor": Tensor,
        "float32": "float32",
        "from_numpy": lambda x: Tensor(x, str(x.dtype)),
        "load": load,
        "save": save,
    }
    vars(module).update(stand_in)
    monkeypatch.setitem(sys.modules, "torch", module)
    return calls


TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(3, 2),
    "b": np.float32([0.5, -1, 2]),
}


def write(path):
    parts = {"a": [TENSORS["a"][:2], TENSORS["a"][2:]], "b": [TENSORS["b"]]}
    files.write("--output", path, {name: x.shape for name, x in TENSORS.items()}, parts)


def assert_same(found):
    assert list(found) == list(TENSORS)
    for name, x in TENSORS.items():
        np.testing.assert_array_equal(found[name], x)


def test_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path)
    assert_same(files.read("FILE", path))
    assert_same(safetensors.numpy.load_file(path))


def test_pt_files_never_run_code(tmp_path, torch):
    path = tmp_path / "x.pt"
    write(path)
    assert_same(files.read("FILE", path))
    (keywords,) = torch
    assert keywords["weights_only"] is True
    assert keywords["map_location"] == "cpu"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1, 2], r"x\.pt: expected a state_dict, found list"),
        ({"epoch": 3}, r"epoch: expected a tensor of type float32, found int"),
        ({"a": Tensor(np.zeros(2), "float64")}, r"a: expected .* float32, found float64"),
    ],
)
def test_pt_files_with_something_else_are_refused(tmp_path, torch, found, message):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(UserError, match=message):
        files.read("FILE", path)


@pytest.mark.parametrize("data", [b"", b"no tensors", pickle.dumps({})[:-3]])
def test_damaged_files_are_refused(tmp_path, torch, data):
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}: expected .*; save .*state_dict"):
            files.read("FILE", tmp_path / name)


def test_without_pytorch_the_other_kind_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for use in (files.check_kind, files.read):
        with pytest.raises(UserError, match=r"^FILE: .*pip install torch, or use a \.safetensors"):
            use("FILE", tmp_path / "x.pt")
