"""What is promised of a run, against a simulation of the run."""

import dataclasses

import hypothesis
import plans
import pytest
from hypothesis import strategies as st

from s2s_jax.config import validate
from s2s_jax.errors import UserError
from s2s_jax.planning.promise import Measured, fit, sentences
from s2s_jax.planning.rules import plan
from s2s_jax.training.evaluations import Evaluations

PLAN = plan(plans.log(), plans.CPU, "runs/mine")
ROWS = 6_040


def measured_of(step=0.2, evaluation=2.0, once=20.0, users=2_048):
    """A trial of a machine that takes these times, with some slow steps."""
    steps = [step] * 60
    steps[:10] = [3 * step] * 10
    steps[30:35] = [9 * step] * 5
    return Measured(
        around=once - 5.0,
        steps=steps,
        evaluations=[evaluation + 5.0, evaluation],
        users=users,
        memory=2 * 10**9,
    )


def simulated(config, steps_per_epoch, step=0.2, evaluation=2.0, once=20.0, users=2_048):
    """The seconds of a run, step by step, on a machine on which a tenth of an evaluation is fixed."""
    last = config.train.train_epoch * steps_per_epoch
    last = min(last, config.train.train_steps or last)
    evaluations = Evaluations(config.eval)
    seconds = once
    for number in range(1, last + 1):
        seconds += step
        if evaluations.due(number, last):
            seconds += evaluation * (0.1 + 0.9 * (config.eval.max_users or ROWS) / users)
    return seconds


def test_a_promise_is_the_time_of_the_run():
    made, expected = fit(PLAN, measured_of(), 756, ROWS, None)
    assert made.config.train.train_steps is None or made.config.train.train_steps < 40 * 756
    assert expected.seconds == pytest.approx(simulated(made.config, 756), rel=0.01)
    assert expected.seconds <= 90 * 60
    # All rows are evaluated, because that takes less than a twentieth of the time.
    assert made.config.eval.max_users is None


@hypothesis.given(
    step=st.floats(0.001, 2),
    evaluation=st.floats(0.01, 60),
    once=st.floats(5, 600),
    steps_per_epoch=st.integers(1, 5_000),
    budget=st.none() | st.floats(0.5, 300),
)
def test_no_budget_is_exceeded_and_none_is_wasted(step, evaluation, once, steps_per_epoch, budget):
    measured = measured_of(step, evaluation, once)
    seconds = 60 * (90 if budget is None else budget)
    try:
        made, expected = fit(PLAN, measured, steps_per_epoch, ROWS, budget)
    except UserError:
        assert once + 10 * step + evaluation > 0.8 * seconds
        return
    config = made.config
    validate(config)
    run = simulated(config, steps_per_epoch, step, evaluation, once)
    assert expected.seconds == pytest.approx(run, rel=0.12)
    assert expected.seconds <= seconds * 1.001
    if config.train.train_steps is not None:
        assert expected.seconds + 10 * step > 0.999 * seconds - evaluation
        assert expected.steps == config.train.train_steps
    else:
        assert expected.steps == 40 * steps_per_epoch
    assert config.lr.warmup_steps < expected.steps


def test_the_first_steps_do_not_count():
    measured = dataclasses.replace(measured_of(), steps=[3.0] * 10 + [1.0] * 6)
    assert measured.step == 1
    # Unless there are no others.
    assert dataclasses.replace(measured, steps=[3.0] * 5).step == 3


def test_evaluations_take_a_twentieth_or_are_fewer():
    for evaluation in (0.1, 1.0, 4.0, 20.0):
        made, expected = fit(PLAN, measured_of(evaluation=evaluation), 756, ROWS, 5.0)
        users = made.config.eval.max_users or ROWS
        assert users >= 512
        assert expected.evaluating <= 0.05 * 300
    # An evaluation of 512 users takes 6.5 s, so there is time for two.
    assert made.config.eval.every_steps == expected.steps / 2
    assert made.config.eval.patience is None


def test_a_short_run_has_time_to_evaluate_enough_rows():
    """40 epochs take 84 s, a twentieth of which would be 0.4 s an evaluation: too few to choose by."""
    made, expected = fit(PLAN, measured_of(step=0.2), 8, ROWS, None)
    assert expected.steps == 320
    assert made.config.eval.max_users is None
    assert 0.05 * expected.seconds < expected.evaluating <= 120
    # There is no room for more than a twentieth if epochs must be left out.
    _, less = fit(PLAN, measured_of(step=0.2), 8, ROWS, 1.2)
    assert less.steps < 320
    assert less.evaluating <= 0.05 * 1.2 * 60


def test_all_rows_of_a_small_log_are_evaluated():
    made, expected = fit(PLAN, measured_of(evaluation=20.0, users=800), 100, 800, 5.0)
    assert made.config.eval.max_users is None
    assert made.config.eval.every_steps == expected.steps


def test_a_budget_that_is_too_short_is_refused():
    with pytest.raises(UserError, match=r"--budget_minutes: expected at least 0\.\d.*found 0\.2"):
        fit(PLAN, measured_of(), 756, ROWS, 0.2)


def test_a_run_without_evaluations():
    never = dataclasses.replace(
        PLAN,
        config=dataclasses.replace(
            PLAN.config,
            eval=dataclasses.replace(PLAN.config.eval, every_steps=None, patience=None),
        ),
    )
    measured = dataclasses.replace(measured_of(), evaluations=[], users=0)
    made, expected = fit(never, measured, 100, ROWS, 10.0)
    assert expected.evaluating == 0
    assert made.config.eval == never.config.eval
    assert expected.seconds == pytest.approx(15.0 + 0.2 * expected.steps)


def test_the_expectation_in_words():
    _, expected = fit(PLAN, measured_of(), 100, ROWS, None)
    text = " ".join(sentences(expected, evaluates=True))
    assert "4,000 steps of 200 ms (40 epochs)" in text
    assert "less if evaluations stop getting better" in text
    # A tenth more than in the trial.
    assert "about 2.2 GB of memory" in text
    assert "GPU" not in text
    assert "Other programs" not in text
    assert "Other programs" in " ".join(sentences(expected, evaluates=True, busy=True))
    on_gpu = dataclasses.replace(expected, device_memory=31 * 10**9)
    assert "31 GB on each GPU" in " ".join(sentences(on_gpu, evaluates=False))
