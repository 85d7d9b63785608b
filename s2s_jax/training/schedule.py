"""Learning rates, and the clock that they follow.

A run may go on with other devices, another batch size or more files, so that what is left of it takes
more or fewer steps than before. Its rates follow the share of the run that is done. So they do not count
steps but follow a clock, which shows the steps that the run would have taken so far if it had gone on as
it began. Until something changes, that is the number of steps.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import optax

from s2s_jax.config import Constant, Linear, LRConfig, TrainConfig
from s2s_jax.errors import UserError


class Clock(NamedTuple):
    """What the clock of a run shows after each step.

    Attributes:
      whole: what it shows at the end of the run: all steps, as the run began.
      since_step: the step after which it went at another speed for the last time; 0: it never did.
      since: what it showed then.
      end_step: the step at which the run ends.
      ends: `train.train_steps` and `train.train_epoch`, which say so.
    """

    whole: int
    since_step: int
    since: float
    end_step: int
    ends: tuple[int | None, int | None]

    def at(self, step: Any) -> Any:
        """What the clock shows after `step` steps, a number or an int32 scalar of a device."""
        if self.since_step == 0:
            return step
        left = max(self.end_step - self.since_step, 1)
        return self.since + (step - self.since_step) * ((self.whole - self.since) / left)

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint needs, as JSON."""
        return self._asdict() | {"ends": list(self.ends)}


class Position(NamedTuple):
    """Where a run stands that begins or goes on.

    Attributes:
      step: optimizer steps done.
      end_step: the step at which it ends, as it goes on now.
      whole: the step at which it would end if it began anew as it goes on now.
      epochs: passes over the data done, with the part of the one that was begun.
    """

    step: int
    end_step: int
    whole: int
    epochs: float


def clock_of(settings: TrainConfig, now: Position, saved: Mapping[str, Any] | None) -> Clock:
    """The clock of a run that begins or goes on.

    If it ends where it was to end, the clock goes on as it went. If it takes more or fewer steps to the
    same end, the clock goes slower or faster from here on. If the user has moved the end
    (`train.train_steps`, `train.train_epoch`), the clock shows as much at the end as in a run that had
    that end from the beginning, so that a decay goes on as in that run.

    Args:
      settings: say where the run ends.
      now: where it stands.
      saved: what `Clock.get_state` returned when it was saved; None: the run begins, or was saved before
        there were clocks.
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
    """Refuses a decay to the end of a run that is over before the decay begins.

    Raises:
      UserError: it is.
    """
    if isinstance(config.decay, Constant) or config.decay.steps is not None:
        return
    if clock.whole <= config.warmup_steps:
        raise UserError(
            f"lr.warmup_steps: expected fewer than the run's {clock.whole:,} steps because lr.decay is "
            f"{config.decay.kind}, found {config.warmup_steps:,}"
        )


def learning_rate(config: LRConfig, peak: float, clock: Clock | None = None) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then what `config.decay` says.

    Args:
      config: the shape of the rates, in steps of the clock.
      peak: the largest rate.
      clock: of the run. None, as for evaluating, which takes no steps: steps are counted, and a decay
        that ends with the run (`steps` None) does not begin.

    Examples:
      >>> rate = learning_rate(LRConfig(warmup_steps=4), peak=0.1)
      >>> [round(float(rate(step)), 3) for step in range(6)]
      [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    """
    warmup = config.warmup_steps
    after = _decay(config, peak, clock)
    schedule = after
    if warmup > 0:
        # The first update already moves: step t of the warm-up has t / warmup of the peak.
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
