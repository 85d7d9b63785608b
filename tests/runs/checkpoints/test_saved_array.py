"""Arrays of checkpoints that are read part by part, also where files are missing."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from s2s_jax.runs.checkpoints.restore_errors import explained
from s2s_jax.runs.checkpoints.saved_array import SavedArray

ROWS = np.arange(512, dtype=np.float32).reshape(64, 8)


@pytest.fixture(params=["zarr", "zarr3"])
def checkpoint(request, tmp_path):
    """A checkpoint without OCDBT, as several processes write it to a store, in chunks of 16 rows."""
    tree = {"rows": jnp.asarray(ROWS), "zeros": jnp.zeros((64, 8)), "zero": jnp.zeros((), int)}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=request.param == "zarr3")
    with ocp.Checkpointer(handler) as checkpointer:
        sizes = {name: ocp.SaveArgs(chunk_byte_size=512) for name in tree}
        path = tmp_path / "run/checkpoints/7/state"
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=sizes))
    (path.parent / "progress").mkdir()
    (path.parent / "progress/metadata").touch()
    return path


def test_zeros_that_were_saved_are_read(checkpoint):
    np.testing.assert_array_equal(SavedArray(checkpoint, ("zeros",)).read(0, 64), np.zeros((64, 8)))
    np.testing.assert_array_equal(SavedArray(checkpoint, ("rows",)).read(5, 40), ROWS[5:40])


@pytest.mark.parametrize("name", ["rows", "zeros"])
def test_a_lost_file_is_not_read_as_zeros(checkpoint, name):
    (second,) = (
        path for path in (checkpoint / name).rglob("*") if path.name == "1.0" or path.match("1/0")
    )
    second.unlink()
    array = SavedArray(checkpoint, (name,))
    array.read(0, 16)
    with pytest.raises(ValueError, match="missing") as caught:
        array.read(10, 20)
    told = explained(caught.value, checkpoint.parent, None, 0, devices=1)
    assert f"/{name}/" in str(caught.value)
    assert f"{checkpoint.parent}: is damaged (NOT_FOUND" in str(told)
    assert "restore a copy of it" in str(told)
