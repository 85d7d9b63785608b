"""Columns of the logs, and the embedding tables that their ids look up."""

import dataclasses
from typing import Literal

# Marks a place that holds no id; of an id of two words, both are this.
NO_ID = -1
# Sightings of an id without a row that can be told apart.
MOST_SIGHTINGS = 2**10 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """One column of the logs and the embedding table that its ids look up."""

    name: str
    """Name of the feature, and of its column unless column is given"""
    column: str | None = None
    """Column of the ORC files: list<T> or list<list<T>> of integers, strings, times or, to bucketize
    them, floats. None: the feature's name"""
    op: Literal["id", "bucketize", "time_gap", "hour_of_day", "day_of_week"] = "id"
    """What an entry of the column becomes: id (hashed or as it is, modulo hash_bucket_size), bucketize
    (the number of boundaries at or below it), time_gap (log2 of the seconds since the row's event before
    it: 0 if there is none, 1 below a second, 2 + floor(log2(seconds)) else), hour_of_day or day_of_week
    (0 is Monday). Times are numbers, text of digits or ORC timestamps"""
    boundaries: tuple[float, ...] | None = None
    """Rising boundaries for bucketize"""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of times that are numbers or text, since 1970"""
    utc_offset_hours: float = 0.0
    """Added to times for hour_of_day and day_of_week, to make them local"""
    of_next: bool = False
    """Each event shows the value of the row's next event instead of its own (the last event none): what
    is known of an event when it is asked for, such as its hour or the gap before it. Makes evaluation
    time-aware, since it knows this of the events to be found; recommending does not. Not for what
    scored events show (loss.target_features)"""
    emb_dim: int = 128
    """Width of the embedding"""
    hash_type: Literal["murmur", "farm"] | None = None
    """How ids are hashed: murmur (MurmurHash64A, seed 0), farm (FarmHash Fingerprint64; both take an
    integer as its 8 little-endian bytes) or None (integers as they are)"""
    hash_bucket_size: int
    """Rows of the table. With op id: the id or its hash, as an unsigned 64-bit number, is taken modulo
    this; without a hash, ids below it have a row each and larger ones wrap around. With other ops: at
    least as many as they have values; long time gaps share the last row. 0: no buckets; each 64-bit id
    (or, hashed, 63 bits of its hash) has a row of its own, in a table that grows"""
    shard_name: str | None = None
    """Name of the table; features that give the same name share it. None: the feature's own name"""
    combiner: Literal["mean", "sum"] = "mean"
    """How the embeddings of the several ids of a position become one"""
    bag_size: int = 1
    """Most ids that a position may hold; a fuller one is refused"""

    @property
    def grows(self) -> bool:
        """Whether its table has a row for each id and grows."""
        return self.hash_bucket_size == 0

    @property
    def id_words(self) -> int:
        """int32 words of an id on its way to the devices."""
        return 2 if self.grows else 1

    @property
    def column_name(self) -> str:
        """The column that this feature reads."""
        return self.name if self.column is None else self.column

    @property
    def table_name(self) -> str:
        """The table that this feature reads."""
        return self.name if self.shard_name is None else self.shard_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """An embedding table, which one or more features read.

    All keys but init_std are for tables that grow, those of features with hash_bucket_size 0.
    """

    name: str
    """Name of the table: that of its feature, or the shard_name of its features"""
    init_std: float = 0.001
    """Standard deviation of the truncated normal that initialises the table"""
    capacity: int = 65_536
    """Rows that the table starts with, rounded up to a power of two; it is doubled when it is nearly
    full"""
    max_capacity: int | None = None
    """Most rows that the table may have, rounded up to a power of two; None: as many as memory
    holds"""
    on_full: Literal["evict", "stop"] = "evict"
    """What happens when the table is full at max_capacity: evict gives a new id the row of the one in
    its two buckets that was not seen for longest; stop ends the run, saved"""
    admit_after: int = 1
    """Sightings after which an id gets a row, at most 1023; until then it is unknown. More than 1
    keeps one-off ids out. Sightings are forgotten when some two to three times as many other waiting ids
    as the table has rows were seen since"""
    unknown: Literal["zeros", "default_row"] = "zeros"
    """What stands for an id that has no row: zeros (in training its own initial value, which learns
    nothing), or default_row, one more row of the table, which learns from the ids that wait for
    admission, so admit_after must be at least 2"""
    evict_after_steps: int | None = None
    """Ids not seen for more steps than this lose their row; None: never"""
    evict_below: int = 0
    """Ids seen fewer times than this lose their row when ids are evicted (every evict_every steps)"""
    evict_every: int = 1000
    """Steps between looking for ids to evict"""


# Keys of a table that only tables that grow have a use for.
GROWING_KEYS = (
    "capacity",
    "max_capacity",
    "on_full",
    "admit_after",
    "unknown",
    "evict_after_steps",
    "evict_below",
    "evict_every",
)


def complete(
    features: tuple[FeatureConfig, ...], tables: tuple[TableConfig, ...]
) -> tuple[TableConfig, ...]:
    """One `TableConfig` for each table that features read, in the order of their first use.

    Args:
      features: say which tables there are.
      tables: those that differ from the defaults; the others are added. One that no feature reads is
        left out if it has only defaults, and otherwise stays, at the end, for `validate` to refuse.
    """
    if not _all_are(features, FeatureConfig) or not _all_are(tables, TableConfig):
        return tables  # For `validate` to refuse.
    resolved: list[TableConfig] = []
    read = dict.fromkeys(feature.table_name for feature in features)
    for name in read:
        given = [table for table in tables if table.name == name]
        resolved += given or [TableConfig(name=name)]
    unread = [table for table in tables if table.name not in read]
    resolved += [table for table in unread if table != TableConfig(name=table.name)]
    return tuple(resolved)


def _all_are(values: object, cls: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, cls) for value in values)
