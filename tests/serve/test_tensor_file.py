"""Files of arrays, compared with the safetensors library."""

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import s2s_serve
from s2s_serve import tensor_file
from s2s_serve.tensor_file import Layout

TYPES = [np.float32, np.float64, np.int32, np.int64, np.uint64, np.uint8]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(TYPES), st.integers(0, 9), st.integers(1, 4), st.integers(0, 2**31)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_written_is_read_by_both(tmp_path_factory, arrays):
    made = {}
    for number, (dtype, rows, columns, seed) in enumerate(arrays):
        values = np.random.default_rng(seed).integers(0, 200, (rows, columns))
        made[f"array {number}"] = values.astype(dtype)
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    layouts = {name: Layout(x.dtype, x.shape) for name, x in made.items()}
    tensor_file.write(path, layouts, {name: [x[:2], x[2:]] for name, x in made.items()})
    for found in (tensor_file.read(path), safetensors.numpy.load_file(path)):
        assert set(found) == set(made)
        for name, x in made.items():
            assert found[name].dtype == x.dtype
            np.testing.assert_array_equal(found[name], x)
    safetensors.numpy.save_file(made, path)
    for name, x in tensor_file.read(path).items():
        np.testing.assert_array_equal(x, made[name])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 40,
        b"\x02" + b"\x00" * 7 + b"{}"[:1],
        b"\x04" + b"\x00" * 7 + b"null",
        b'\x0a\x00\x00\x00\x00\x00\x00\x00{"a": "b"}',
    ],
)
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(s2s_serve.UserError, match="expected arrays in the safetensors format"):
        tensor_file.read(tmp_path / "a")


def test_arrays_that_leave_the_file_are_refused(tmp_path):
    rows = np.arange(8, dtype=np.float32)
    path = tmp_path / "a"
    tensor_file.write(path, {"rows": Layout(rows.dtype, rows.shape)}, {"rows": [rows]})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(s2s_serve.UserError, match="rows at bytes"):
        tensor_file.read(path)
