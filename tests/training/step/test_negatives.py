"""Negatives from the catalogue and log-Q in whole steps, compared with NumPy."""

import dataclasses
import itertools

import jax
import numpy as np
import of_config
import pytest
import small
from jobs_of import lines
from sampling import ROWS, configured, expected_loss

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import validate
from s2s_jax.errors import UserError
from s2s_jax.jobs.train import train
from s2s_jax.training.item_source import drawn_items
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log") / "log"
    small.write_log(directory, 90)
    return directory


@pytest.mark.parametrize(
    ("loss", "grows"),
    [
        ({"negatives": "uniform", "num_negatives": 40, "objective": "gbce"}, False),
        (
            {
                "negatives": "mixed",
                "num_negatives": 40,
                "log_q": "catalogue",
                "next_events": 3,
                "later_weight": 0.3,
            },
            True,
        ),
        ({"negatives": "full", "hard_negatives": 9}, False),
        pytest.param({"negatives": "full"}, False, marks=pytest.mark.slow),
        pytest.param({"negatives": "uniform", "num_negatives": 40}, False, marks=pytest.mark.slow),
        # "mixed" also covers in-batch negatives.
        pytest.param({"log_q": "catalogue"}, False, marks=pytest.mark.slow),
        pytest.param(
            {"negatives": "mixed", "num_negatives": 40, "log_q": "stream"},
            True,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["gbce", "mixed", "hard", "full", "uniform", "in_batch", "mixed-stream"],
)
def test_a_step_against_numpy(log, tmp_path, loss, grows):
    config = configured(log, tmp_path, grows, **loss)
    mesh = make_mesh(jax.devices()[:1])
    functions = make_step_functions(StepSettings.of(config), mesh)
    source = of_config.item_source(config, mesh)
    plain = dataclasses.replace(
        config,
        features=tuple(dataclasses.replace(f, hash_bucket_size=300) for f in config.features),
    )
    batch = small.batch(plain if grows else config, ROWS, 0)
    if grows:
        words = small.to_words(batch["ids"])
        parts = [words[..., :1, :], words[..., 1:2, :1], words[..., 2:, :]]
        batch["ids"] = np.concatenate(
            [part.reshape(*part.shape[:2], -1) for part in parts], axis=-1
        )
    drawn = source.draw(1)
    state = functions.init()
    if grows:
        # All ids get rows, so that `predict` sees the same as the step.
        full = of_config.item_source(configured(log, tmp_path, True, negatives="full"), mesh).draw(
            1
        )
        still = dataclasses.replace(config.lr, dense_lr=0.0, sparse_lr=0.0, weight_decay=0.0)
        everything = configured(log, tmp_path, True, negatives="full").loss
        resting = dataclasses.replace(config, lr=still, loss=everything)
        step = make_step_functions(StepSettings.of(resting), mesh).train_step
        nothing = state.stream
        state, _ = step(state._replace(stream={}), put_batch(batch, 1, mesh) | full)
        state = state._replace(stream=nothing)
    chosen = []
    if config.loss.negatives == "full":
        chosen = range(source.items)
    elif config.loss.negatives != "in_batch":
        chosen = drawn_items(source.items, 40, config.train.seed, 1, 0)
    expected = expected_loss(config, functions, state, batch, mesh, chosen, [batch])
    sent = put_batch(source.with_shares(batch), 1, mesh) | drawn
    _, metrics = functions.train_step(state, sent)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("negatives", "hard"), [("mixed", None), ("full", None), ("full", 9), ("uniform", 100)]
)
def test_devices_and_accumulation_do_not_change_the_gradients(log, tmp_path, negatives, hard):
    config = configured(log, tmp_path, negatives=negatives, num_negatives=24, hard_negatives=hard)
    results = []
    for devices, microbatches in ((1, 1), (1, 4), (2, 2)):
        mesh = make_mesh(jax.devices()[:devices])
        functions = make_step_functions(StepSettings.of(config), mesh)
        batch = put_batch(small.batch(config, ROWS, 0), microbatches, mesh)
        # Both devices draw the same items.
        draw = of_config.item_source(config, make_mesh(jax.devices()[:1])).draw(1)
        source = of_config.item_source(config, mesh)
        if negatives == "full":
            draw = source.draw(1)
        else:
            rng = np.random.default_rng((config.train.seed, 1, 0))
            chosen = rng.integers(source.items, size=24)
            draw = source._put(np.tile(chosen, devices))
        _, metrics = functions.train_step(functions.init(), batch | draw)
        results.append([float(metrics[n]) for n in ("loss", "hit_rate", "grad_norm")])
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param({"negatives": "full"}, marks=pytest.mark.slow),
        pytest.param({"negatives": "mixed", "log_q": "catalogue"}, marks=pytest.mark.slow),
    ],
    ids=["full", "mixed"],
)
def test_training_with_the_catalogue(log, tmp_path, loss):
    config = configured(log, tmp_path / "run", num_negatives=64, **loss)
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, train_steps=15))
    mesh = make_mesh(jax.devices()[:2])
    assert not train(short, mesh)
    assert not train(config, mesh)
    straight = configured(log, tmp_path / "straight", num_negatives=64, **loss)
    assert not train(straight, mesh)
    ours, theirs = lines(tmp_path / "run"), lines(tmp_path / "straight")
    assert [x["loss"] for x in ours] == [x["loss"] for x in theirs]
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.5


def test_log_q_needs_negatives_of_unequal_frequency(log, tmp_path):
    with pytest.raises(UserError, match=r"loss\.log_q: expected none with loss\.negatives full"):
        validate(configured(log, tmp_path, negatives="full", log_q="catalogue"))


@pytest.mark.parametrize("negatives", ["uniform", "mixed"])
def test_all_items_are_used_once_if_there_are_few(log, tmp_path, negatives):
    mesh = make_mesh(jax.devices()[:2])
    config = configured(log, tmp_path, negatives=negatives, num_negatives=10_000)
    source = of_config.item_source(config, mesh)
    drawn = np.asarray(source.draw(3)["ids/negatives:item_id"]).reshape(2, -1)
    known = sorted(of_config.collect(config).item.to_pylist())
    assert [sorted(of_device.tolist()) for of_device in drawn] == [known, known]
    fewer = configured(log, tmp_path, negatives=negatives, num_negatives=len(known) - 1)
    one, other = (
        of_config.item_source(fewer, mesh).draw(step)["ids/negatives:item_id"] for step in (3, 4)
    )
    assert one.shape == (1, 2 * (len(known) - 1), 1, 1)
    assert not np.array_equal(one, other)


def test_draws_are_uniform_and_depend_only_on_seed_step_and_device():
    """The expected numbers are written here, so they do not depend on NumPy's version either."""
    assert drawn_items(1000, 5, 42, 7, 1).tolist() == [631, 916, 829, 756, 557]
    items, size = 97, 4096
    keys = [(42, 1, 0), (43, 1, 0), (42, 2, 0), (42, 1, 1), (42, 0, 1), (1, 42, 0)]
    drawn = [drawn_items(items, size, *key) for key in keys]
    np.testing.assert_array_equal(drawn[0], drawn_items(items, size, *keys[0]))
    for one, other in itertools.combinations(drawn, 2):
        # As many agree as in two independent draws.
        assert abs((one == other).mean() - 1 / items) < 5 / np.sqrt(items * size)
    # Chi-squared over many steps: the mean is items - 1, the standard deviation sqrt(2 items).
    many = np.concatenate([drawn_items(items, 64, 42, step, 3) for step in range(1000)])
    count = np.bincount(many, minlength=items)
    assert len(count) == items
    expected = len(many) / items
    assert abs(((count - expected) ** 2 / expected).sum() - items) < 5 * np.sqrt(2 * items)
    # Steps of a long run, devices and neighbouring seeds all draw differently.
    firsts = {
        tuple(drawn_items(10**6, 4, seed, step, device))
        for seed in (0, 1)
        for step in range(500)
        for device in range(8)
    }
    assert len(firsts) == 2 * 500 * 8
    assert drawn_items(2**40, 100, 0, 0, 0).max() > 2**39
