"""Operations of a step, compared with a calculation for base.py and with XLA's count."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from places import REPO

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import (
    Config,
    ModelConfig,
    Pack,
    load,
)
from s2s_jax.config.settings import Sequences
from s2s_jax.training.flops import AtPeak, attention_flops, peak_flops, step_flops
from s2s_jax.training.meters import Meters
from s2s_jax.training.step.batches import count_rows, put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings


def flops_of(config: Config, devices: int, items: int = 0) -> float:
    return step_flops(StepSettings.of(config), Sequences.of(config), devices, items)


def test_flops_of_the_base_configuration():
    """16 x 1,024 positions: 5.00 for matrices, .83 for attention, 1.65 for the loss, times 10^12."""
    config = load(Path(REPO) / "configs" / "base.py")
    np.testing.assert_allclose(flops_of(config, 1) / 1e12, 7.47, atol=0.01)
    local = dataclasses.replace(
        config, loss=dataclasses.replace(config.loss, negative_scope="local")
    )
    assert flops_of(local, 8) == flops_of(config, 1) < flops_of(config, 8)


def test_flops_against_the_count_of_xla():
    """An unrolled model whose matrices dominate; attention without blocks computes all scores."""
    model = ModelConfig(
        seq_len=64,
        hidden_size=256,
        num_layers=2,
        nhead=2,
        dim_feedforward=512,
        dropout=0.0,
        unroll=2,
        attention="xla",
    )
    config = small.config(model=model)
    mesh = make_mesh(jax.devices()[:1])
    functions = make_step_functions(StepSettings.of(config), mesh)
    batch = put_batch(small.batch(config, 16, 0), 1, mesh)
    cost = functions.train_step.lower(functions.abstract, batch).compile().cost_analysis()
    config = dataclasses.replace(config, io=dataclasses.replace(config.io, batch_size=16))
    uncausal = 12 * 16 * 2 * 256 * 64**2 - 6 * 16 * 2 * 256 * 64 * 65
    expected = flops_of(config, 1) + uncausal
    assert 0.9 < expected / cost["flops"] < 1.02


@pytest.mark.parametrize(
    ("changes", "matrices"),
    [
        ({"feed_forward": "swiglu"}, 16 * 24),
        ({"gated_residuals": True}, 2 * 16 * 16),
        ({"layer": "hstu"}, 5 * 16 * 16 - (4 * 16 * 16 + 2 * 16 * 24)),
        ({"layer": "hstu_softmax", "gated_residuals": True}, 6 * 256 - (4 * 256 + 2 * 16 * 24)),
    ],
)
def test_flops_of_further_matrices(changes, matrices):
    """Two layers of width 16, with a hidden layer of 24; six operations per weight and position."""
    config = small.config()
    other = small.config(model=dataclasses.replace(config.model, **changes))
    positions = config.io.batch_size * small.SEQ_LEN
    assert flops_of(other, 1) - flops_of(config, 1) == 6 * positions * 2 * matrices


def test_a_cpu_has_no_known_peak():
    assert peak_flops(small.config().model) is None


@pytest.mark.parametrize(
    ("negatives", "items", "per_pair", "encoded"),
    [
        ("in_batch", 0, 2 * 32 * 5, 0),
        ("mixed", 500, 2 * 32 * 5 + 100, 100),
        ("mixed", 40, 2 * 32 * 5 + 40, 40),
        ("uniform", 500, 100, 100),
        ("uniform", 40, 40, 40),
        ("full", 500, 500, 500),
    ],
)
def test_flops_of_negatives(negatives, items, per_pair, encoded):
    """Two devices with 32 rows each; a device draws 100 items or, if there are fewer, uses all."""
    config = small.config()
    loss = dataclasses.replace(config.loss, negatives=negatives, num_negatives=100)
    io = dataclasses.replace(config.io, batch_size=32)
    config = dataclasses.replace(config, loss=loss, io=io)
    alone = dataclasses.replace(
        config, loss=dataclasses.replace(loss, negatives="full", num_negatives=1)
    )
    found = flops_of(config, 2, items) - flops_of(alone, 2)
    pairs, width, shown = 32 * 5, 16, 8 + 8  # item_id and tags
    assert found == 6 * pairs * per_pair * width + 6 * encoded * shown * width


def test_attention_of_packed_sequences_against_counting():
    model = small.config().model
    sequence = np.array([[[0, 0, 1, 1, 1, -1], [0, 1, 2, 2, -1, -1]]], np.int32)
    batch = {
        "length": np.array([[5, 4]], np.int32),
        "sequence": sequence,
        **{name: np.zeros((1, 1), np.int32) for name in ("examples", "skipped", "cut")},
    }
    attended = count_rows(jax.tree.map(jnp.asarray, batch))["attended"]
    sees = [
        (row, query, key)
        for row, one in enumerate(sequence[0])
        for query in range(6)
        for key in range(query + 1)
        if one[query] == one[key] != -1
    ]
    assert float(attended) == len(sees)
    # A score and a weighted value for each such pair, once forward and twice backward.
    of_pair = 3 * 2 * 2 * model.hidden_size * model.num_layers
    assert attention_flops(model, len(sees)) == of_pair * len(sees)
    packed = small.config()
    packed = dataclasses.replace(packed, io=dataclasses.replace(packed.io, sequences=Pack(rows=40)))
    rows, seq_len = packed.io.batch_size, model.seq_len
    unpacked = flops_of(small.config(), 1) - flops_of(packed, 1)
    assert unpacked == of_pair * rows * seq_len * (seq_len + 1) / 2


def test_mfu_counts_the_attention_of_packed_sequences():
    now = iter([0.0, 10.0, 10.0])
    meters = Meters(AtPeak(step=1.0, attended=0.01), clock=lambda: next(now))
    for attended in (50, 150):
        numbers = {"loss": 1, "hit_rate": 0, "grad_norm": 1, "examples": 1, "tokens": 1}
        meters.add(numbers | {"attended": attended}, 0.0)
    assert meters.take_line(2)["mfu"] == (2 * 1.0 + 200 * 0.01) / 10
