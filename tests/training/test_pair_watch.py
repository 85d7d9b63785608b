"""A run whose steps have nothing to learn from ends with a message, without a useless checkpoint."""

import dataclasses
from pathlib import Path

import jax
import pytest
import small

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import (
    Config,
    Pack,
)
from s2s_jax.errors import UserError
from s2s_jax.jobs.train import train
from s2s_jax.training.pair_watch import PairWatch


def job(tmp_path: Path, **io) -> Config:
    base = small.config()
    return dataclasses.replace(
        base,
        io=dataclasses.replace(base.io, data_paths=str(tmp_path / "log"), batch_size=4, **io),
        model=dataclasses.replace(base.model, num_layers=1),
        train=dataclasses.replace(
            base.train,
            train_steps=6,
            save_steps=2,
            output_dir=str(tmp_path / "run"),
            tensorboard=False,
        ),
    )


def metrics(pairs: int, examples: int = 4, skipped: int = 0) -> dict[str, float]:
    return {"pairs": pairs, "tokens": 9, "examples": examples, "skipped_rows": skipped}


@pytest.mark.slow
def test_packing_that_leaves_each_user_one_event(tmp_path):
    """For any log, and again when the command is started again."""
    small.write_log(tmp_path / "log", 200)
    config = job(tmp_path, sequences=Pack(rows=4 * small.SEQ_LEN))
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"^io\.sequences\.rows: the 6 steps to step 6 found no pair"
        ):
            train(config, make_mesh(jax.devices()[:1]))
        assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_an_epoch_without_a_pair_ends_a_run(tmp_path):
    watch = PairWatch(tmp_path, None, step=0, steps_per_epoch=3, total_steps=100)
    for step, pairs in enumerate([0, 0, 5, 0, 0], 1):
        watch.update(step, metrics(pairs, examples=1, skipped=3))
        assert watch.reason_to_end is None
    assert not watch.nothing_learned
    watch.update(6, metrics(0, examples=1, skipped=3))
    assert watch.reason_to_end is not None
    assert "the 3 steps to step 6" in watch.reason_to_end
    assert "9 rows could not be read; skipped.jsonl" in watch.reason_to_end


def test_the_end_of_a_continued_run_may_have_no_pair(tmp_path):
    watch = PairWatch(tmp_path, None, step=8, steps_per_epoch=5, total_steps=10)
    for step in (9, 10):
        watch.update(step, metrics(0))
    assert watch.reason_to_end is None
    assert not watch.nothing_learned


def test_padding_alone_does_not_count_as_a_pair(tmp_path):
    """If padding is scored, pairs are counted even without events."""
    watch = PairWatch(tmp_path, None, step=0, steps_per_epoch=2, total_steps=10)
    for step in (1, 2):
        watch.update(step, metrics(20) | {"tokens": 0})
    assert watch.reason_to_end is not None
