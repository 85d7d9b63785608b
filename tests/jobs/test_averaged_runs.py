"""What commands read from a run with averages is the average over a run without."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from jobs_of import job, one_device

from s2s_jax.embedding.tables import table_specs
from s2s_jax.errors import UserError
from s2s_jax.jobs.train import train
from s2s_jax.ranking.restored import restore
from s2s_jax.runs.checkpoints.saved_tables import SavedTables
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings

DECAY, STEPS = 0.7, 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run without averages and one with."""
    directory = tmp_path_factory.mktemp("runs")
    small.write_log(directory / "log", 40)
    times = {"train_steps": STEPS, "save_steps": 1, "log_steps": 1}
    plain = job(directory / "log", directory / "plain", **times)
    config = job(directory / "log", directory / "averaged", **times)
    config = dataclasses.replace(config, lr=dataclasses.replace(config.lr, average_decay=DECAY))
    for each in (plain, config):
        assert not train(each, one_device())
    return plain, config


def mean(values):
    weights = DECAY ** np.arange(STEPS - 1, -1, -1.0)
    return np.tensordot(weights / weights.sum(), np.asarray(values, np.float64), axes=1)


@pytest.mark.slow
def test_weights_are_read_as_averages(runs):
    plain, config = runs
    steps = [SavedTables(Path(plain.train.output_dir), s) for s in range(1, STEPS + 1)]
    saved = SavedTables(Path(config.train.output_dir), STEPS)
    for spec in table_specs(config.features, config.tables).values():
        expected = mean([each.values(spec) for each in steps])
        np.testing.assert_allclose(saved.values(spec), expected, atol=1e-6)
        parts = [part.values_RD for part in saved.in_parts(spec, True).read(0, 256, 100)]
        np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-6)
        assert np.abs(steps[-1].values(spec) - expected).max() > 1e-3
    abstract = make_step_functions(StepSettings.of(config), one_device()).abstract.params["dense"]
    expected = jax.tree.map(lambda *x: mean(x), *[each.dense(abstract) for each in steps])
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6),
        saved.dense(abstract),
        expected,
    )


def test_averages_cannot_be_turned_on_or_off_in_a_run(runs):
    plain, config = runs
    off = dataclasses.replace(config, lr=plain.lr)
    on = dataclasses.replace(plain, lr=config.lr)
    for each, was in ((off, "0.7"), (on, "None")):
        with pytest.raises(UserError, match=f"lr.average_decay: .* made with {was}, found "):
            train(each, one_device())
        with pytest.raises(UserError, match=r"lr.average_decay: "):
            restore(each, one_device())
