"""What to expect of a run, computed from a trial, and the number of steps that fit into a budget."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from s2s_jax.errors import UserError
from s2s_jax.planning.rules import EVALUATIONS, USUAL_MINUTES, Plan

# Evaluations together take at most this share of a run, a twentieth of the time of its steps. In a short
# run, this would be so few users that the best checkpoint, and the weight of neighbours, would be chosen
# by chance. So evaluations may take so many seconds if the budget has room for them.
EVALUATION_SHARE = 0.05 / 1.05
EVALUATION_SECONDS = 120.0
# The first steps of a run meet many new ids, and wait for the first batches.
UNSETTLED_STEPS = 10
# The share of the trial's evaluations that is taken not to depend on the number of users: encoding all
# items, and the last batch of each length. With 11,200 items, 2,048 users took 1.4 s of CPU time, 8,192
# took 5.2 s and 20,000 took 13 s: 0.16 s and 0.64 ms a user.
_FIXED = 0.1
# Fewer users would say little about which checkpoint is best.
LEAST_USERS = 512
# A whole run needs more memory than its beginning. Two trials took 1.9 GB, and their runs of 3 minutes,
# with ten evaluations, 2.07 and 2.26 GB.
_MORE_MEMORY = 1.1
_BUSY = "Other programs used the machine during the trial, so this is only true if they go on."
# Lines of metrics in a run.
_LINES = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The times of a trial, in seconds, and its memory.

    Attributes:
      around: all but steps and evaluations: reading, counting items, compiling, ending.
      steps: the time of each step.
      evaluations: the times of the evaluations, each with the checkpoint before it; the first one also
        compiles. Empty if the run never evaluates.
      users: the number of users of each evaluation.
      memory: bytes of the process at the peak.
      device_memory: bytes of the fullest device at the peak; None on CPUs.
    """

    around: float
    steps: Sequence[float]
    evaluations: Sequence[float]
    users: int
    memory: int
    device_memory: int | None = None

    @property
    def step(self) -> float:
        """The time of a usual step. The median is robust to other programs that run for a moment."""
        settled = self.steps[UNSETTLED_STEPS:] or self.steps
        return statistics.median(settled)

    @property
    def once(self) -> float:
        """The time of all that a run does once."""
        compiling = self.evaluations[0] - self.evaluations[-1] if self.evaluations else 0.0
        return self.around + max(compiling, 0.0)

    def evaluation(self, users: int) -> float:
        """The time of an evaluation of `users` users, after the first one."""
        if not self.evaluations:
            return 0.0
        return self.evaluations[-1] * (_FIXED + (1 - _FIXED) * users / self.users)

    def users_in(self, seconds: float) -> int:
        """How many users an evaluation of `seconds` seconds ranks; may be negative."""
        share = (seconds / self.evaluations[-1] - _FIXED) / (1 - _FIXED)
        return int(share * self.users)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a run will take.

    Attributes:
      steps: number of steps.
      epochs: number of passes over the log.
      once: seconds to start and to end.
      stepping: seconds of all steps.
      evaluating: seconds of all evaluations.
      memory: bytes of the process at the peak.
      device_memory: bytes of the fullest device at the peak; None on CPUs.
    """

    steps: int
    epochs: float
    once: float
    stepping: float
    evaluating: float
    memory: int
    device_memory: int | None = None

    @property
    def seconds(self) -> float:
        """The time of the whole run."""
        return self.once + self.stepping + self.evaluating


def fit(
    plan: Plan,
    measured: Measured,
    steps_per_epoch: int,
    rows: int,
    budget_minutes: float | None,
) -> tuple[Plan, Expectation]:
    """Fits the length of a run and its evaluations to a budget.

    Args:
      plan: the plan that was tried.
      measured: the measurements of the trial.
      steps_per_epoch: the number of steps of an epoch.
      rows: the number of rows of the log.
      budget_minutes: how long training may take; None: as long as is usual.

    Returns:
      The plan for the whole run, and what to expect of it.

    Raises:
      UserError: the budget is too short for anything.
    """
    train = plan.config.train
    assert train.train_epoch is not None, "rules give a number of epochs"
    budget = 60 * (USUAL_MINUTES if budget_minutes is None else budget_minutes)
    wanted = train.train_epoch * steps_per_epoch
    whole = min(budget, (measured.once + wanted * measured.step) / (1 - EVALUATION_SHARE))
    spare = budget - measured.once - wanted * measured.step
    longest = max(EVALUATION_SHARE * whole, min(EVALUATION_SECONDS, spare))
    evaluations = _evaluations(measured, rows, longest)
    evaluating = evaluations.number * measured.evaluation(evaluations.users)
    left = budget - measured.once - evaluating
    # A multiple of ten, so that the last of the evaluations is at the last step.
    steps = min(wanted, int(left / measured.step) // EVALUATIONS * EVALUATIONS)
    if steps < EVALUATIONS:
        least = budget - left + EVALUATIONS * measured.step
        raise UserError(
            f"--budget_minutes: expected at least {least / 60:.1f}, of which {measured.once / 60:.1f} "
            f"to start and to end, found {budget / 60:.3g}; give more"
        )
    expected = Expectation(
        steps=steps,
        epochs=steps / steps_per_epoch,
        once=measured.once,
        stepping=steps * measured.step,
        evaluating=evaluating,
        memory=round(_MORE_MEMORY * measured.memory),
        device_memory=measured.device_memory,
    )
    return _fitted(plan, expected, wanted, evaluations, rows), expected


class _Evaluations(NamedTuple):
    """The evaluations of a run.

    Attributes:
      number: how many there are.
      users: the number of users of each.
    """

    number: int
    users: int


def _evaluations(measured: Measured, rows: int, seconds: float) -> _Evaluations:
    """As many users as can be evaluated in `seconds` seconds; fewer evaluations if these are few."""
    if not measured.evaluations:
        return _Evaluations(0, 0)
    users = min(measured.users_in(seconds / EVALUATIONS), rows)
    # Half of the users of a small log would not be much cheaper than all.
    least = rows if rows <= 2 * LEAST_USERS else LEAST_USERS
    if users >= least:
        # Two digits: the exact number depends on the noise of the trial.
        unit = 1 if users == rows else 10 ** max(len(str(users)) - 2, 0)
        return _Evaluations(EVALUATIONS, users // unit * unit)
    return _Evaluations(max(int(seconds / measured.evaluation(least)), 1), least)


def _fitted(
    plan: Plan, expected: Expectation, wanted: int, evaluations: _Evaluations, rows: int
) -> Plan:
    """The plan with the numbers that depend on the length of the run."""
    config, why = plan.config, dict(plan.why)
    steps = expected.steps
    why["train"] = f"{expected.epochs:,.3g} passes over the log."
    if steps < wanted:
        why["train.train_steps"] = "The time allows no more."
    settings = config.eval
    if 0 < evaluations.users < rows:
        why["eval.max_users"] = (
            "The first rows of the log, so that evaluations take little of the run. s2s evaluate ranks "
            "all."
        )
        settings = dataclasses.replace(settings, max_users=evaluations.users)
    if 0 < evaluations.number < EVALUATIONS:
        why["eval.every_steps"] = "More often would take too much of the time."
        every = -(-steps // evaluations.number)
        settings = dataclasses.replace(settings, every_steps=every, patience=None)
    return Plan(
        config=dataclasses.replace(
            config,
            lr=dataclasses.replace(
                config.lr, warmup_steps=min(config.lr.warmup_steps, steps // 10)
            ),
            eval=settings,
            train=dataclasses.replace(
                config.train,
                train_steps=steps if steps < wanted else None,
                log_steps=max(steps // _LINES, 10),
                save_steps=max(steps // EVALUATIONS, 1),
            ),
        ),
        why=why,
    )


def sentences(expected: Expectation, evaluates: bool, busy: bool = False) -> list[str]:
    """An expectation in words.

    Args:
      expected: what to expect.
      evaluates: whether the run may end early because evaluations are no better.
      busy: whether other programs used the machine during the trial.
    """
    per_step = 1e3 * expected.stepping / expected.steps
    parts = (
        f"{minutes(expected.stepping)} for {expected.steps:,} steps of {per_step:,.0f} ms "
        f"({expected.epochs:,.3g} epochs), {minutes(expected.evaluating)} for evaluations, "
        f"{minutes(expected.once)} to start and to end"
    )
    early = ", less if evaluations stop getting better" if evaluates else ""
    on_device = (
        ""
        if expected.device_memory is None
        else f", and {expected.device_memory / 1e9:.2g} GB on each GPU"
    )
    return [
        f"Training takes about {minutes(expected.seconds)}{early}: {parts}.",
        f"It needs about {expected.memory / 1e9:.2g} GB of memory at its peak{on_device}.",
        *([_BUSY] if busy else []),
    ]


def minutes(seconds: float) -> str:
    """A time in words, with two or three digits.

    Examples:
      >>> minutes(12), minutes(130), minutes(5_400), minutes(36_000)
      ('12 seconds', '2.2 minutes', '90 minutes', '10 hours')
    """
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    if seconds < 600:
        return f"{seconds / 60:.1f} minutes"
    if seconds < 3 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.3g} hours"
