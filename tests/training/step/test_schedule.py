"""Learning rates follow the completed share of a run, also if it continues with other settings."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from jobs_of import checkpoints_of

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Constant, Cosine, Linear, LRConfig, TrainConfig
from s2s_jax.errors import UserError
from s2s_jax.jobs.train import train
from s2s_jax.training.loop import Loop
from s2s_jax.training.step import optimizer
from s2s_jax.training.step.schedule import Position, check_decay, clock_of, learning_rate

ROWS = 960
PEAK = 2.0


def rate_at(share: float, steps: int, lr: LRConfig) -> float:
    """The rate of the update at which `share` of a run of `steps` steps is done."""
    count = share * steps
    if count < lr.warmup_steps:
        return PEAK * min(count + 1, lr.warmup_steps) / lr.warmup_steps
    assert not isinstance(lr.decay, Constant)
    end = steps if lr.decay.steps is None else lr.decay.steps
    done = min((count - lr.warmup_steps) / (end - lr.warmup_steps), 1)
    height = {"linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}[lr.decay.kind]
    return PEAK * (lr.decay.final_ratio + (1 - lr.decay.final_ratio) * height)


class Run:
    """Counts rows as a run does, and reads the rate of each step from the current schedule."""

    def __init__(self, lr: LRConfig):
        self.lr, self.saved, self.step, self.rows = lr, None, 0, 0

    def go_on(self, batch_rows: int, steps: int | None, **ends) -> list[tuple[float, float]]:
        """Takes some or all remaining steps; returns the share done before each step, and its rate."""
        settings = TrainConfig(**ends)

        def end(step, rows):
            left = -(-(ROWS * settings.train_epoch - rows) // batch_rows)
            return min(settings.train_steps or 10**9, step + left)

        if settings.train_epoch is None:
            settings = dataclasses.replace(settings, train_epoch=10**6)
        now = Position(self.step, end(self.step, self.rows), end(0, 0), self.rows / ROWS)
        clock = clock_of(TrainConfig(**ends), now, self.saved)
        check_decay(self.lr, clock)
        schedule = learning_rate(self.lr, PEAK, clock)
        found = []
        while self.step < clock.end_step and len(found) != steps:
            done = [self.rows / ROWS / ends["train_epoch"]] if "train_epoch" in ends else []
            if "train_steps" in ends:
                done.append(self.step / ends["train_steps"])
            found.append((max(done), float(schedule(np.int32(self.step)))))
            self.step, self.rows = self.step + 1, self.rows + batch_rows
        self.saved = clock.get_state()
        return found


@pytest.mark.parametrize("decay", [Linear, Cosine], ids=lambda decay: decay.kind)
@pytest.mark.parametrize("warmup", [0, 50])
@pytest.mark.parametrize("decay_steps", [None, 300])
def test_the_rate_of_the_completed_share_continues_with_another_batch_size(
    decay, warmup, decay_steps
):
    lr = LRConfig(warmup_steps=warmup, decay=decay(steps=decay_steps, final_ratio=0.1))
    run, found = Run(lr), []
    # The run begins with 400 steps of 24 rows; the first change is during the warm-up.
    for batch_rows, steps in ((24, 20), (48, 30), (12, 40), (96, 10), (24, None)):
        found += run.go_on(batch_rows, steps, train_epoch=10)
    assert run.rows == 10 * ROWS
    for share, rate in found:
        np.testing.assert_allclose(rate, rate_at(share, 400, lr), rtol=1e-4)


def test_rates_of_a_run_with_a_number_of_steps_do_not_depend_on_the_batch_size():
    lr = LRConfig(warmup_steps=10, decay=Linear())
    run, found = Run(lr), []
    for batch_rows, steps in ((24, 30), (48, 30), (12, None)):
        found += run.go_on(batch_rows, steps, train_steps=100)
    assert len(found) == 100
    for step, (_, rate) in enumerate(found):
        np.testing.assert_allclose(rate, rate_at(step / 100, 100, lr), rtol=1e-5)


def test_the_clock_stays_the_same_if_nothing_changed():
    lr = LRConfig(warmup_steps=10, decay=Cosine())
    straight, stopped = Run(lr), Run(lr)
    expected = straight.go_on(24, 100, train_epoch=10) + straight.go_on(48, None, train_epoch=10)
    found = []
    for batch_rows, steps in ((24, 7), (24, 93), (48, 50), (48, 1), (48, None)):
        found += stopped.go_on(batch_rows, steps, train_epoch=10)
    assert found == expected
    assert stopped.saved == straight.saved


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [
        ({"train_steps": 100}, {"train_steps": 400}, 400),
        ({"train_epoch": 10}, {"train_epoch": 5}, 200),
        ({"train_epoch": 2}, {"train_epoch": 10}, 400),
        ({"train_epoch": 10}, {"train_steps": 150}, 150),
    ],
)
@pytest.mark.parametrize("batch_rows", [24, 48])
def test_a_run_with_a_new_end_continues_like_a_run_of_that_length(before, after, steps, batch_rows):
    """This includes a run that had ended, with a rate of 0."""
    lr = LRConfig(warmup_steps=20, decay=Linear())
    run = Run(lr)
    run.go_on(24, 60, **before)
    if batch_rows != 24:
        run.go_on(batch_rows, 10, **before)
    found = run.go_on(batch_rows, None, **after)
    assert found
    for share, rate in found:
        np.testing.assert_allclose(rate, rate_at(share, steps, lr), rtol=0.03, atol=1e-6 * PEAK)


def test_runs_continue_from_checkpoints_without_a_clock():
    lr = LRConfig(warmup_steps=10, decay=Linear())
    for batch_rows in (24, 48):
        run = Run(lr)
        run.go_on(24, 200, train_epoch=10)
        run.saved = None
        for share, rate in run.go_on(batch_rows, None, train_epoch=10):
            steps = 400 if batch_rows == 24 else run.step
            np.testing.assert_allclose(rate, rate_at(share, steps, lr), rtol=1e-4)


def test_a_decay_that_never_begins_is_refused():
    with pytest.raises(
        UserError, match=r"^lr\.warmup_steps: expected fewer than the run's 40 steps"
    ):
        Run(LRConfig(warmup_steps=40, decay=Linear())).go_on(24, 1, train_epoch=1)


def test_a_run_that_moves_between_devices_and_batches(tmp_path, monkeypatch):
    """On one device, then two, then twice the batch, and back; steps are built but not run."""
    small.write_log(tmp_path / "log", 96)
    config = small.config()
    config = dataclasses.replace(
        config,
        io=dataclasses.replace(config.io, data_paths=str(tmp_path / "log"), shuffle_rows=32),
        model=dataclasses.replace(config.model, num_layers=1),
        lr=LRConfig(dense_lr=PEAK, warmup_steps=6, decay=Linear()),
        train=dataclasses.replace(
            config.train,
            output_dir=str(tmp_path / "run"),
            train_epoch=4,
            train_steps=None,
            tensorboard=False,
        ),
    )
    schedules = []
    make = optimizer.learning_rate

    def noted(lr, peak, clock):
        made = make(lr, peak, clock)
        if peak == PEAK:
            schedules.append(made)
        return made

    monkeypatch.setattr(optimizer, "learning_rate", noted)
    found, first, rows = [], 0, 0
    # It begins with 48 steps of 8 rows.
    for devices, batch_size, steps in ((1, 8, 4), (2, 8, 6), (2, 16, 3), (1, 8, None)):
        io = dataclasses.replace(config.io, batch_size=batch_size)
        here = dataclasses.replace(config, io=io)
        taken = []

        def compiled(loop, arrays):
            loop._functions = loop._job.functions(loop._plan, loop._clock, loop._step + 1)
            loop._compiled_step = object()
            return True

        def passed(loop, batch, arrays, input_wait, steps=steps, taken=taken):
            loop._step += 1
            loop._place = batch.after
            # Without pairs to learn from, nothing would be saved.
            loop._pairs.nothing_learned = False
            taken.append(loop._step)
            if len(taken) == steps:
                loop._stop._stop.requested = "SIGTERM"

        monkeypatch.setattr(Loop, "_compile", compiled)
        monkeypatch.setattr(Loop, "_take_step", passed)
        stopped = train(here, make_mesh(jax.devices()[:devices]))
        assert stopped == (steps is not None)
        for step in range(first, first + len(taken)):
            found.append((rows / (4 * 96), float(schedules[-1](np.int32(step)))))
            rows += devices * batch_size
        first += len(taken)
    assert rows == 4 * 96
    for share, rate in found:
        np.testing.assert_allclose(rate, rate_at(share, 48, config.lr), rtol=1e-4)
    checkpoints = checkpoints_of(config)
    assert checkpoints.newest_step == first
    checkpoints.close()
