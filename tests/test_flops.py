"""Operations of a step: the design's figure for base.py, and what XLA counts."""

import dataclasses
from pathlib import Path

import golden
import jax
import numpy as np
import small

from s2s_jax.config import ModelConfig, load
from s2s_jax.training.batches import put_batch
from s2s_jax.training.flops import peak_flops, step_flops
from s2s_jax.training.mesh import make_mesh
from s2s_jax.training.step import make_step_functions


def test_of_base():
    """16 x 1,024 positions: 5.00 of matrices, .83 of attention, 1.65 of the loss, in 10^12."""
    config = load(Path(golden.REPO) / "configs" / "base.py")
    np.testing.assert_allclose(step_flops(config, 1) / 1e12, 7.47, atol=0.01)
    local = dataclasses.replace(
        config, loss=dataclasses.replace(config.loss, negative_scope="local")
    )
    assert step_flops(local, 8) == step_flops(config, 1) < step_flops(config, 8)


def test_against_what_xla_counts():
    """Of an unrolled model whose matrices dwarf all else; attention that is not blocked does all."""
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
    functions = make_step_functions(config, mesh)
    batch = put_batch(small.batch(config, 16, 0), 1, mesh)
    cost = functions.train_step.lower(functions.abstract, batch).compile().cost_analysis()
    config = dataclasses.replace(config, io=dataclasses.replace(config.io, batch_size=16))
    uncausal = 12 * 16 * 2 * 256 * 64**2 - 6 * 16 * 2 * 256 * 64 * 65
    expected = step_flops(config, 1) + uncausal
    assert 0.9 < expected / cost["flops"] < 1.02


def test_a_cpu_has_no_known_peak():
    assert peak_flops(small.config()) is None
