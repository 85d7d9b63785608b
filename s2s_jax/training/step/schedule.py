"""Learning rates, and the clock that they follow.

A run may continue with other devices, another batch size or more files, so the rest of it takes more or
fewer steps than planned. Learning rates should follow the completed share of the run. So they follow a
clock instead of counting steps. The clock shows the number of steps that the run would have taken so
far if nothing had changed since its beginning. Until something changes, this is the number of steps.
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
      since_step: the step after which its speed last changed; 0: it never changed.
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
        """The time after `step` steps, which is a number or an int32 scalar array."""
        if self.since_step == 0:
            return step
        left = max(self.end_step - self.since_step, 1)
        return self.since + (step - self.since_step) * ((self.whole - self.since) / left)

    def get_state(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON."""
        return self._asdict() | {"ends": list(self.ends)}


class Position(NamedTuple):
    """The position of a run that begins or continues.

    Attributes:
      step: optimizer steps done.
      end_step: the step at which the run ends with the current settings.
      whole: the step at which it would end if it had used the current settings from the beginning.
      epochs: passes over the data done, including the fraction of the current one.
    """

    step: int
    end_step: int
    whole: int
    epochs: float


def clock_of(settings: TrainConfig, now: Position, saved: Mapping[str, Any] | None) -> Clock:
    """The clock of a run that begins or continues.

    If the run still ends at the planned step, the clock does not change. If it needs more or fewer
    steps to the same end, the clock goes slower or faster from here on. If the user has moved the end
    (`train.train_steps`, `train.train_epoch`), the clock's time at the end will be the same as in a run
    that had this end from the beginning, so that a decay continues as in that run.

    Args:
      settings: say where the run ends.
      now: position of the run.
      saved: the saved state from `Clock.get_state`; None: the run begins, or was saved by a version
        without clocks.
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
    shown = share * now.end_step if before is None else before.at(now.step)
    return Clock(round(shown / share), now.step, shown, now.end_step, ends)


def check_decay(config: LRConfig, clock: Clock) -> None:
    """Refuses a decay to the end of the run if the run ends before the decay begins.

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
    """Linear warm-up from 0 to `peak`, then the decay of `config.decay`.

    Args:
      config: the shape of the schedule, in time of the clock.
      peak: the largest rate.
      clock: clock of the run. None (for example in evaluation, which takes no steps): steps are
        counted, and a decay that ends with the run (`steps` None) never begins.

    Examples:
      >>> rate = learning_rate(LRConfig(warmup_steps=4), peak=0.1)
      >>> [round(float(rate(step)), 3) for step in range(6)]
      [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    """
    warmup = config.warmup_steps
    after = _decay(config, peak, clock)
    schedule = after
    if warmup > 0:
        # The first update is not zero: step t of the warm-up, counted from 1, has t / warmup of the
        # peak.
        rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
        schedule = optax.join_schedules([rise, after], [warmup])
    return schedule if clock is None else lambda step: schedule(clock.at(step))


def _decay(config: LRConfig, peak: float, clock: Clock | None) -> optax.Schedule:
    """The rates after the warm-up."""
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
