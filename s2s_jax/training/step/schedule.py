"""Learning rates, and the clock that they follow.

Learning rates depend on the completed share of the run. A run may continue with other devices, another
batch size or more files, and then its end takes more or fewer steps than planned. So learning rates
follow a clock instead of the number of steps. The time of the clock is the number of steps that the run
would have taken so far if nothing had changed since its beginning. Until something changes, it is the
number of steps.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import optax

from s2s_jax.config import Constant, Linear, LRConfig, TrainConfig
from s2s_jax.errors import UserError


class Clock(NamedTuple):
    """The clock of a run: its time after each step.

    Attributes:
      whole: the time at the end of the run: the total number of steps planned at its beginning.
      since_step: the step after which the speed last changed; 0 if it never changed.
      since: the time at that step.
      end_step: the step at which the run ends.
      ends: `train.train_steps` and `train.train_epoch`, from which the end was computed.
    """

    whole: int
    since_step: int
    since: float
    end_step: int
    ends: tuple[int | None, int | None]

    def at(self, step: Any) -> Any:
        """Return the time after `step` steps, which is a number or an int32 scalar array."""
        if self.since_step == 0:
            return step
        left = max(self.end_step - self.since_step, 1)
        return self.since + (step - self.since_step) * ((self.whole - self.since) / left)

    def get_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON."""
        return self._asdict() | {"ends": list(self.ends)}


class Position(NamedTuple):
    """The position of a run that begins or continues.

    Attributes:
      step: the number of optimizer steps done.
      end_step: the step at which the run ends with the current settings.
      whole: the step at which it would end if it had used the current settings from the beginning.
      epochs: the number of epochs done, including the fraction of the current one.
    """

    step: int
    end_step: int
    whole: int
    epochs: float


def clock_of(settings: TrainConfig, now: Position, saved: Mapping[str, Any] | None) -> Clock:
    """Return the clock of a run that begins or continues.

    If the run still ends at the planned step, the clock does not change. If it takes more or fewer
    steps to the same end, the clock is slower or faster from this step on. If the user moved the end
    (`train.train_steps`, `train.train_epoch`), the time at the end is the same as in a run that had this
    end from the beginning, so that a decay continues as in that run.

    Args:
      settings: the settings of training, which determine the end of the run.
      now: the position of the run.
      saved: the saved state from `Clock.get_state`; None if the run begins, or if it was saved by a
        version without clocks.
    """
    ends = (settings.train_steps, settings.train_epoch)
    before = None
    if saved is not None:
        before = Clock(**{**saved, "ends": tuple(saved["ends"])})
        if before.end_step == now.end_step:
            return before._replace(ends=ends)
        if before.ends == ends:
            return Clock(before.whole, now.step, before.at(now.step), now.end_step, ends)
    if (before is None or before.since_step == 0) and now.end_step == now.whole:
        return Clock(now.whole, 0, 0, now.end_step, ends)
    done = zip((now.step, now.epochs), ends, strict=True)
    share = min(1.0, max(done / end for done, end in done if end is not None))
    time = share * now.end_step if before is None else before.at(now.step)
    return Clock(round(time / share), now.step, time, now.end_step, ends)


def check_decay(config: LRConfig, clock: Clock) -> None:
    """Refuse a decay to the end of the run if the run ends before the decay begins.

    Raises:
      UserError: the warm-up takes the whole run.
    """
    if isinstance(config.decay, Constant) or config.decay.steps is not None:
        return
    if clock.whole <= config.warmup_steps:
        raise UserError(
            f"lr.warmup_steps: expected fewer than the run's {clock.whole:,} steps because lr.decay is "
            f"{config.decay.kind}, found {config.warmup_steps:,}"
        )


def learning_rate(config: LRConfig, peak: float, clock: Clock | None = None) -> optax.Schedule:
    """Return the schedule: a linear warm-up from 0 to `peak`, then the decay of `config.decay`.

    Args:
      config: the shape of the schedule, in time of the clock.
      peak: the largest rate.
      clock: the clock of the run. If it is None (for example in evaluation, which takes no steps), the
        schedule follows the number of steps, and a decay to the end of the run (`steps` None) never
        begins.

    Examples:
      >>> rate = learning_rate(LRConfig(warmup_steps=4), peak=0.1)
      >>> [round(float(rate(step)), 3) for step in range(6)]
      [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    """
    warmup = config.warmup_steps
    after = _decay(config, peak, clock)
    schedule = after
    if warmup > 0:
        # Step t of the warm-up, counted from 1, has t / warmup of the peak, so the first update is not
        # zero.
        rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
        schedule = optax.join_schedules([rise, after], [warmup])
    return schedule if clock is None else lambda step: schedule(clock.at(step))


def _decay(config: LRConfig, peak: float, clock: Clock | None) -> optax.Schedule:
    """Return the schedule after the warm-up."""
    decay = config.decay
    if isinstance(decay, Constant):
        return optax.constant_schedule(peak)
    end_step = clock.whole if decay.steps is None and clock is not None else decay.steps
    if end_step is None:
        return optax.constant_schedule(peak)
    steps = end_step - config.warmup_steps
    if isinstance(decay, Linear):
        return optax.linear_schedule(peak, peak * decay.final_ratio, steps)
    return optax.cosine_decay_schedule(peak, steps, alpha=decay.final_ratio)
