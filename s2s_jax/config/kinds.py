"""The kinds of `io.sequences`, `lr.decay` and `eval.split`; see `choices`."""

import dataclasses
from typing import ClassVar, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truncate:
    """One sequence a row: its newest model.seq_len events (or oldest, see io.truncate_side)."""

    kind: ClassVar[str] = "truncate"
    windows: ClassVar[int] = 1
    windows_per_epoch: ClassVar[int | None] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crop:
    """One sequence a row: in half of the epochs as with truncate, else model.seq_len events that begin
    anywhere. So epochs cut longer rows differently."""

    kind: ClassVar[str] = "crop"
    windows_per_epoch: ClassVar[int | None] = 1
    windows: int
    """Windows' length of the newest events (or oldest, see io.truncate_side) of a longer row that
    sequences are taken from; at least 2"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack:
    """Several rows side by side in a row of the batch, as sequences that know nothing of each other.
    Longer rows are cut into windows."""

    kind: ClassVar[str] = "pack"
    rows: int | Literal["auto"] = "auto"
    """Rows of the log (users) of one device in one forward pass, which lie in its io.batch_size rows.
    Where they do not fit, the longest lose positions (cut_positions in the metrics counts these). auto:
    so many that they fill 85% of io.batch_size x model.seq_len positions on average, as some stripes of
    the log tell"""
    windows: int = 1
    """Windows of model.seq_len that a longer row is cut into at most, the newest ones (or oldest, see
    io.truncate_side); each shares an event with the next, so that every event is predicted once"""
    windows_per_epoch: int | None = None
    """Windows of a longer row that an epoch trains on: in half of the epochs those at the end that
    io.truncate_side keeps, otherwise as many that begin anywhere. So no user weighs more than so many
    windows, and epochs cut differently. Fewer than windows; needs io.shuffle. None: all of them"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The rates stay at their peaks."""

    kind: ClassVar[str] = "constant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """The rates fall along a straight line."""

    kind: ClassVar[str] = "linear"
    steps: int | None = None
    """Step at which the decay ends; None: the end of the run, as train_steps and train_epoch give it"""
    final_ratio: float = 0.0
    """The rates at the end of the decay, relative to their peaks"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """The rates fall along half a wave of the cosine."""

    kind: ClassVar[str] = "cosine"
    steps: int | None = None
    """Step at which the decay ends; None: the end of the run, as train_steps and train_epoch give it"""
    final_ratio: float = 0.0
    """The rates at the end of the decay, relative to their peaks"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastEvents:
    """Training never sees the last events of every row."""

    kind: ClassVar[str] = "last_events"
    events: int = 2
    """So many. The last of them is the test, the first the validation: 2 is leave-one-out as papers do
    it"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByTime:
    """Training never sees what happened from a time on."""

    kind: ClassVar[str] = "by_time"
    at: str
    """This time: 2000-12-01, 2000-12-01T12:00 (UTC) or seconds since 1970. The test is each user's first
    event at this time or later, after all before"""
    validation_at: str | None = None
    """Earlier time, from which on training sees nothing instead. The validation is each user's first
    event at this time or later that is before the other time. None: no validation"""
    feature: str = "timestamp"
    """The feature whose column has the times (in its time_unit)"""
