"""The exchange of rows between devices against NumPy, for any skew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from s2s_jax.cluster.mesh import DATA_AXIS, make_mesh
from s2s_jax.embedding import exchange, slices

# Tables of the same width share an exchange; the third has its own.
ROWS = {"a": 768, "b": 256, "c": 512}
WIDTH = {"a": 4, "b": 4, "c": 3}
ASKED = 64


def exchanged(devices, rows, tables, gradients):
    """The rows that each device fetches, the sums that arrive, visits of each row, and totals."""
    mesh = make_mesh(jax.devices()[:devices])
    spec = PartitionSpec(DATA_AXIS)

    def on_device(rows, tables, gradients):
        needed = {name: exchange.by_owner(r, ROWS[name], devices) for name, r in rows.items()}
        found = exchange.fetch(tables, needed, DATA_AXIS)

        def visit(carry, summed):
            return {
                name: (
                    sums.at[summed[name].rows_G].add(summed[name].sums_GD, mode="drop"),
                    visits.at[summed[name].rows_G].add(1, mode="drop"),
                    total + summed[name].sums_GD.sum(axis=0, keepdims=True),
                )
                for name, (sums, visits, total) in carry.items()
            }

        carry = {
            name: (jnp.zeros_like(t), jnp.zeros_like(t[:, 0]), jnp.zeros_like(t[:1]))
            for name, t in tables.items()
        }
        local_rows = {name: size // devices for name, size in ROWS.items()}
        return found, exchange.reduce(gradients, needed, local_rows, visit, carry, DATA_AXIS)

    flat = {name: r.reshape(-1) for name, r in rows.items()}
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(mapped)(flat, tables, gradients)


def check(devices, wanted):
    """`wanted[name][d]`: the rows that device d requests from a table."""
    rng = np.random.default_rng(0)
    tables = {n: rng.normal(size=(ROWS[n], WIDTH[n])).astype(np.float32) for n in ROWS}
    shape = (devices * ASKED,)
    gradients = {n: rng.normal(size=(*shape, WIDTH[n])).astype(np.float32) for n in ROWS}
    rows = {}
    for name, by_device in wanted.items():
        lists = [np.unique(np.asarray(asked, np.int32)) for asked in by_device]
        padded = [np.append(r, ROWS[name] + np.arange(ASKED - len(r))) for r in lists]
        rows[name] = np.stack(padded).astype(np.int32)
    found, reduced = exchanged(devices, rows, tables, gradients)
    for name, table in tables.items():
        flat = rows[name].reshape(-1)
        real = flat < ROWS[name]
        expected = np.where(real[:, None], table[np.minimum(flat, ROWS[name] - 1)], 0)
        np.testing.assert_array_equal(found[name], expected)
        sums, visits, totals = reduced[name]
        expected = np.zeros_like(table)
        np.add.at(expected, flat[real], gradients[name][real])
        np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
        # Gradients of places without a row count nowhere, not even in norms.
        np.testing.assert_allclose(totals.sum(axis=0), expected.sum(axis=0), rtol=1e-4, atol=1e-4)
        times = np.zeros(ROWS[name])
        times[flat[real]] = 1
        np.testing.assert_array_equal(visits, times)


@pytest.fixture(autouse=True, params=["one round", "several", "several visits"], scope="module")
def _slices(request):
    """The behaviour for little data and for much data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "_FEW_BYTES", 2**30 if request.param == "one round" else 0)
        if request.param == "several visits":
            patch.setattr(exchange, "_ROUNDS", 2)
        yield


CASES = ["random", "one row", "one owner", "all of one owner", "none"]


@pytest.mark.parametrize(
    ("case", "devices"),
    [
        (case, devices)
        if case == "random" or devices == 4
        else pytest.param(case, devices, marks=pytest.mark.slow)
        for case in CASES
        for devices in (1, 2, 4, 8)
    ],
)
def test_no_gradient_is_lost_with_any_skew(case, devices):
    rng = np.random.default_rng(1)

    def asked(name, device):
        part = ROWS[name] // devices
        if case == "random":
            return rng.integers(0, ROWS[name], ASKED)
        if case == "one row":
            return [ROWS[name] - 1]
        if case == "one owner":
            # One device requests as much as it can from one owner, the others a little of everything.
            few = rng.integers(0, ROWS[name], 3)
            return np.arange(min(part, ASKED)) if device == devices - 1 else few
        if case == "all of one owner":
            return part * (devices - 1) + rng.permutation(part)[:ASKED]
        return []

    check(devices, {n: [asked(n, d) for d in range(devices)] for n in ROWS})


@settings(max_examples=3)
@given(st.data())
def test_any_rows(data):
    devices = data.draw(st.sampled_from([2, 4]))
    wanted = {}
    for name, size in ROWS.items():
        # From a narrow range, so that devices share rows, or from all rows.
        low = data.draw(st.integers(0, size - 1))
        high = data.draw(st.sampled_from([min(size - 1, low + 40), size - 1]))
        rows = st.lists(st.integers(low, high), max_size=ASKED)
        wanted[name] = [data.draw(rows) for _ in range(devices)]
    check(devices, wanted)
