"""The streamed softmax, compared with a dense one in NumPy float64, on one device and round a ring.

Shapes: N pairs of all devices, S sampled candidates of one device, D devices, C = N + D S candidates.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from s2s_jax.config import LossConfig
from s2s_jax.model import softmax_blocks
from s2s_jax.model.loss import Pairs, Sampled, softmax_loss
from s2s_jax.model.streamed_softmax import softmax_sums

N, E, S = 20, 6, 7
VECTORS = ("queries", "positives", "sampled")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Blocks of few queries, so that there are several and the last one is not full."""
    monkeypatch.setattr(softmax_blocks, "_BLOCK_BYTES_CPU", 1)
    monkeypatch.setattr(softmax_blocks, "_LEAST_ROWS", 3)


class Options(NamedTuple):
    """Options that change the traced program."""

    negatives: str = "in_batch"
    words: int = 1
    log_q: bool = False
    devices: int | None = None
    smoothing: float = 0.0


def make_batch(options, seed=0, padding=0.2, dtype=np.float32):
    """The inputs of a loss for some options, of all devices."""
    rng = np.random.default_rng(seed)
    sampled = S * (options.devices or 1)

    def vectors(rows):
        return (rng.normal(size=(rows, E)) * rng.uniform(0.2, 3, size=(rows, 1))).astype(dtype)

    def items(rows):
        return rng.integers(0, 4 if options.words < 3 else 2, (rows, options.words)).astype(
            np.int32
        )

    batch = {
        "queries": vectors(N),
        "positives": vectors(N),
        "valid": rng.random(N) >= padding,
        "item": items(N),
        "log_q": rng.normal(size=N).astype(dtype),
        "sampled": vectors(sampled),
        "sampled_item": items(sampled),
        "sampled_log_q": rng.normal(size=sampled).astype(dtype),
    }
    left_out = set()
    if options.words == 0:
        left_out |= {"item", "sampled_item"}
    if not options.log_q:
        left_out |= {"log_q", "sampled_log_q"}
    if options.negatives == "in_batch":
        left_out |= {"sampled", "sampled_item", "sampled_log_q"}
    return {name: x for name, x in batch.items() if name not in left_out}


def reference(options, batch, temperature):
    """Sums and gradients in float64, from the matrix of all logits."""
    wide = {name: batch[name].astype(np.float64) for name in batch if name in VECTORS}
    length = {name: np.linalg.norm(x, axis=1, keepdims=True) for name, x in wide.items()}
    unit = {name: x / length[name] for name, x in wide.items()}
    devices, count = options.devices or 1, len(unit.get("sampled", ()))
    candidates = np.concatenate([unit["positives"], unit.get("sampled", np.zeros((0, E)))])
    negative = np.ones((N, N + count), bool)
    negative[:, :N] = (
        (options.negatives in ("in_batch", "mixed")) & batch["valid"] & ~np.eye(N, dtype=bool)
    )
    device_N = np.arange(N) * devices // N
    negative[:, N:] = device_N[:, None] == np.arange(count) * devices // max(count, 1)
    if options.words:
        items = np.concatenate([batch["item"], batch.get("sampled_item", batch["item"][:0])])
        negative &= np.any(batch["item"][:, None] != items, axis=-1)
    log_q = np.zeros(N + count)
    if options.log_q:
        log_q[:N], log_q[N:] = batch["log_q"], batch.get("sampled_log_q", [])

    score = unit["queries"] @ candidates.T
    logits = score / temperature - log_q
    own = np.eye(N, N + count, dtype=bool)
    positive = logits[own]
    top = np.where(negative, logits, -np.inf).max(axis=1)
    logits = np.where(negative | own, logits, -np.inf)
    peak = logits.max(axis=1)
    log_total = np.log(np.exp(logits - peak[:, None]).sum(axis=1)) + peak
    counts = negative | own
    targets = (1 - options.smoothing) * own
    targets = targets + options.smoothing * counts / counts.sum(axis=1, keepdims=True)
    log_p = np.where(counts, logits, 0) - log_total[:, None]
    loss = -(targets * log_p).sum(axis=1)
    valid = batch["valid"]
    d_score = valid[:, None] * (np.exp(logits - log_total[:, None]) - targets) / temperature
    d_candidates = d_score.T @ unit["queries"]
    d_unit = {
        "queries": d_score @ candidates,
        "positives": d_candidates[:N],
        "sampled": d_candidates[N:],
    }
    gradients = {
        name: (d_unit[name] - u * (u * d_unit[name]).sum(axis=1, keepdims=True)) / length[name]
        for name, u in unit.items()
    }
    gradients["temperature"] = -(d_score * score).sum() / temperature
    return (loss[valid].sum(), (positive > top)[valid].sum(), valid.sum()), gradients


def sums_of(options, vectors, batch, temperature, axis=None):
    config = LossConfig(negatives=options.negatives, label_smoothing=options.smoothing)
    config = dataclasses.replace(config, temperature=temperature)
    batch = batch | vectors
    pairs = Pairs(batch["queries"], batch["positives"], batch["valid"], batch.get("item"))
    sampled = None
    if "sampled" in batch:
        sampled = Sampled(batch["sampled"], batch.get("sampled_item"), batch.get("sampled_log_q"))
    return softmax_loss(config, pairs, axis, sampled, batch.get("log_q"))


@functools.cache
def compiled(options, x64=False):
    """`(vectors, other arrays, temperature) -> ((loss, sums), gradients)`."""
    del x64  # Makes the cache trace again for other types.

    def loss(vectors, temperature, batch):
        def on_device(vectors, batch, temperature):
            return jax.lax.psum(sums_of(options, vectors, batch, temperature, "data"), "data")

        if options.devices is None:
            sums = sums_of(options, vectors, batch, temperature)
        else:
            mesh = jax.make_mesh((options.devices,), ("data",), axis_types=(AxisType.Auto,))
            by_rows, everywhere = PartitionSpec("data"), PartitionSpec()
            specs = (by_rows, by_rows, everywhere)
            mapped = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=everywhere)
            sums = mapped(vectors, batch, temperature)
        return sums.loss, sums

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def ours(options, batch, temperature, x64=False):
    vectors = {name: batch[name] for name in batch if name in VECTORS}
    (_, sums), (gradients, d_temperature) = compiled(options, x64)(
        vectors, jnp.asarray(temperature, batch["queries"].dtype), batch
    )
    return sums, gradients | {"temperature": d_temperature}


def assert_close(found, expected, tolerance):
    (loss, hits, pairs), gradients = expected
    np.testing.assert_allclose(found[0].loss, loss, rtol=tolerance, atol=tolerance * 1e-2)
    assert (found[0].hits, found[0].pairs) == (hits, pairs)
    assert found[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        close = tolerance * (np.abs(gradient).max() + 1e-3)
        np.testing.assert_allclose(found[1][name], gradient, rtol=0, atol=close, err_msg=name)


def tolerance_of(temperature):
    # A float32 similarity has an error of about 1e-7; a logit, or a probability, of 1e-7 / temperature.
    return 1e-5 * max(1.0, 0.1 / temperature)


COMBINATIONS = [
    Options(words=0),
    Options(words=1, log_q=True),
    Options(words=2),
    Options(words=3),
    Options("mixed", words=0, log_q=True),
    Options("mixed", words=1),
    Options("mixed", words=3, log_q=True),
    Options("uniform", words=0),
    Options("uniform", words=2, log_q=True),
    Options("full", words=3),
    Options("mixed", words=2, log_q=True, smoothing=0.2),
]


@pytest.mark.parametrize(
    "options",
    [
        *COMBINATIONS[1::2],
        *(o._replace(devices=4) for o in COMBINATIONS[::3]),
        *(pytest.param(o, marks=pytest.mark.slow) for o in COMBINATIONS[::2]),
        *(
            pytest.param(o._replace(devices=4), marks=pytest.mark.slow)
            for i, o in enumerate(COMBINATIONS)
            if i % 3
        ),
    ],
    ids=str,
)
def test_filling_up_to_the_tiles_of_tensor_cores_changes_nothing(options, monkeypatch):
    monkeypatch.setattr(softmax_blocks, "_ALIGNMENT_CPU", 16)
    assert N % (16 * (options.devices or 1))
    compiled.cache_clear()
    batch = make_batch(options, 0, 0.3)
    found = ours(options, batch, 0.05)
    compiled.cache_clear()
    assert_close(found, reference(options, batch, 0.05), tolerance_of(0.05))


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_one_device(options):
    @settings(max_examples=8, derandomize=True)
    @given(
        st.integers(0, 1000),
        st.sampled_from([0.01, 0.05, 0.3, 1.0]),
        st.sampled_from([0.0, 0.3, 1.0]),
    )
    def check(seed, temperature, padding):
        batch = make_batch(options, seed, padding)
        expected = reference(options, batch, temperature)
        assert_close(ours(options, batch, temperature), expected, tolerance_of(temperature))

    check()


RINGS = [
    Options(words=0, devices=4),
    Options(words=1, log_q=True, devices=2),
    Options(words=3, devices=4),
    Options("mixed", words=0, log_q=True, devices=2),
    Options("mixed", words=3, log_q=True, devices=4),
    Options("mixed", words=2, devices=1),
    Options("uniform", words=3, log_q=True, devices=2),
    Options("mixed", words=1, log_q=True, devices=4, smoothing=0.2),
]


@pytest.mark.parametrize("options", RINGS, ids=str)
def test_several_devices(options):
    for seed, (temperature, padding) in enumerate(
        [(0.01, 0.0), (0.05, 0.3), (1.0, 0.3), (0.3, 1.0)]
    ):
        batch = make_batch(options, seed, padding)
        expected = reference(options, batch, temperature)
        assert_close(ours(options, batch, temperature), expected, tolerance_of(temperature))


@pytest.mark.parametrize(
    "options",
    [
        Options(words=2, log_q=True, smoothing=0.3),
        Options("mixed", words=3, log_q=True, devices=2),
    ],
    ids=str,
)
def test_float64(options):
    with jax.enable_x64(True):
        for temperature in (0.01, 1.0):
            batch = make_batch(options, 5, dtype=np.float64)
            found = ours(options, batch, temperature, x64=True)
            assert found[0].loss.dtype == found[1]["queries"].dtype == jnp.float64
            assert_close(found, reference(options, batch, temperature), 1e-10)


def test_narrow_vectors_are_added_up_in_float32():
    options = Options("mixed", words=1)
    batch = make_batch(options)
    exact = reference(options, batch, 0.3)
    unit = {
        name: jnp.asarray(
            batch[name] / np.linalg.norm(batch[name], axis=1, keepdims=True), jnp.bfloat16
        )
        for name in VECTORS
    }
    queries = softmax_blocks.Queries(
        unit["queries"],
        unit["positives"],
        jnp.asarray(batch["valid"]),
        jnp.zeros(N),
        jnp.arange(N, dtype=jnp.int32),
        jnp.asarray(batch["item"]),
    )
    bias = jnp.where(batch["valid"], 0.0, softmax_blocks.MASKED)
    candidates = softmax_blocks.Candidates(unit["positives"], bias, queries.item_NK)
    local = softmax_blocks.Candidates(unit["sampled"], jnp.zeros(S), batch["sampled_item"])

    def loss(queries_NE):
        replaced = queries._replace(vectors_NE=queries_NE)
        return softmax_sums(replaced, candidates, 0.3, local=local)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(unit["queries"])
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, exact[0][0], rtol=1e-2)


def test_without_gradients_the_sums_are_the_same():
    for options in COMBINATIONS[1], RINGS[2]:
        batch = make_batch(options, 3)
        alone = jax.jit(functools.partial(sums_of, options, {}))(batch, jnp.float32(0.05))
        np.testing.assert_allclose(
            np.array(alone), np.array(ours(options, batch, 0.05)[0]), rtol=1e-6
        )


def test_no_device_holds_all_candidates():
    options = Options(devices=4)
    batch = make_batch(options)
    vectors = {name: batch[name] for name in batch if name in VECTORS}
    program = compiled(options).lower(vectors, jnp.float32(0.05), batch).compile().as_text()
    assert "collective-permute" in program
    assert f"f32[{N // 4},{E}]" in program
    assert f"[{N},{E}]" not in program
    assert f"[{E},{N}]" not in program


def test_candidates_of_infinite_probability_do_not_count():
    options = Options("mixed", log_q=True)
    batch = make_batch(options, 1)
    batch["sampled_log_q"][:] = np.inf
    sums, gradients = ours(options, batch, 0.05)
    alone, of_pairs = ours(
        Options(log_q=True), {n: x for n, x in batch.items() if "sam" not in n}, 0.05
    )
    np.testing.assert_allclose(np.array(sums), np.array(alone), rtol=1e-6)
    np.testing.assert_allclose(gradients["positives"], of_pairs["positives"], rtol=1e-5, atol=1e-5)
    assert not np.any(gradients["sampled"])


def test_ties_are_not_hits_around_a_ring():
    options = Options(words=0, devices=4)
    batch = make_batch(options, padding=0)
    for name in ("queries", "positives"):
        batch[name] = np.ones_like(batch[name])
    sums, _ = ours(options, batch, 0.05)
    assert sums.hits == 0
    np.testing.assert_allclose(sums.loss, N * np.log(N), rtol=1e-6)


def test_negatives_and_sampled_candidates_go_together():
    batch = make_batch(Options("mixed"))
    with pytest.raises(ValueError, match="'in_batch', but there are some"):
        sums_of(Options("in_batch"), {}, batch, 0.05)
    with pytest.raises(ValueError, match="'full', but there are no"):
        sums_of(Options("full"), {}, make_batch(Options()), 0.05)
    del batch["sampled_item"]
    with pytest.raises(ValueError, match="need items"):
        sums_of(Options("mixed"), {}, batch, 0.05)
