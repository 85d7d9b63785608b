"""The kinds of `io.sequences`, `model.time_bias`, `lr.decay` and `eval.split`; see `choices`."""

import dataclasses
from typing import ClassVar, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truncate:
    """Each row is one sequence: its newest model.seq_len events (or oldest, see io.truncate_side)."""

    kind: ClassVar[str] = "truncate"
    windows: ClassVar[int] = 1
    windows_per_epoch: ClassVar[int | None] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crop:
    """Each row is one sequence: in half of the epochs the same as with truncate, otherwise
    model.seq_len events from a random place. So long rows are cut differently in different epochs."""

    kind: ClassVar[str] = "crop"
    windows_per_epoch: ClassVar[int | None] = 1
    windows: int
    """Number of windows of model.seq_len events, at least 2. Sequences of a long row are taken from as
    many of its newest events (or oldest, see io.truncate_side) as these windows cover"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack:
    """Several rows share one row of the batch, as sequences that do not see each other. Long rows are
    cut into windows."""

    kind: ClassVar[str] = "pack"
    rows: int | Literal["auto"] = "auto"
    """Rows of the log (users) that each device packs into its io.batch_size rows in one forward pass.
    If they do not fit, the longest ones are cut (counted as cut_positions in the metrics). auto: as
    many as fill 85% of io.batch_size x model.seq_len positions on average, estimated from some stripes
    of the log"""
    windows: int = 1
    """Maximum number of windows of model.seq_len events into which a long row is cut. The newest ones
    (or oldest, see io.truncate_side) are kept. Each window shares an event with the next, so that every
    event is predicted once"""
    windows_per_epoch: int | None = None
    """Maximum number of windows of a long row per epoch: in half of the epochs those at the end that
    io.truncate_side keeps, otherwise as many from a random place. This limits the weight of a user, and
    long rows are cut differently in different epochs. Must be less than windows; needs io.shuffle.
    None: all windows"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeGaps:
    """Attention adds a learned number to each score, by head and the gap between the times of the two
    events. There is a number for gaps below a second, below 2, 4, 8 … seconds, up to 68 years. All are 0
    at first, and each layer has its own."""

    kind: ClassVar[str] = "gaps"
    column: str = "timestamp"
    """Column with the times of events, which must never step back within a row. It need not be a
    feature. An event without a time has that of the event before it"""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of times that are numbers or text, since 1970"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The learning rates stay at their peaks."""

    kind: ClassVar[str] = "constant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """The learning rates fall along a straight line."""

    kind: ClassVar[str] = "linear"
    steps: int | None = None
    """Step at which the decay ends. None: the end of the run (train.train_steps or
    train.train_epoch)"""
    final_ratio: float = 0.0
    """Learning rates at the end of the decay, relative to their peaks"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """The learning rates fall along half a cosine wave."""

    kind: ClassVar[str] = "cosine"
    steps: int | None = None
    """Step at which the decay ends. None: the end of the run (train.train_steps or
    train.train_epoch)"""
    final_ratio: float = 0.0
    """Learning rates at the end of the decay, relative to their peaks"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastEvents:
    """Training never sees the last events of every row."""

    kind: ClassVar[str] = "last_events"
    events: int = 2
    """Number of events at the end of every row. The last of them is the test event, the first the
    validation event. 2 is leave-one-out, as in most papers"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByTime:
    """Training never sees events from a time on."""

    kind: ClassVar[str] = "by_time"
    at: str
    """Time of the split: 2000-12-01, 2000-12-01T12:00 (UTC) or seconds since 1970. The test event is
    each user's first event at or after it; the history has all events before that"""
    validation_at: str | None = None
    """An earlier time; if given, training only sees events before it. The validation event is each
    user's first event at or after it, if that is before the time of the split. None: no validation
    events"""
    feature: str = "timestamp"
    """The feature whose column has the times (in its time_unit)"""
