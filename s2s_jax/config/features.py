"""Columns of the logs, and the embedding tables that their ids look up."""

import dataclasses
from typing import Literal

# Marks a place without an id; if ids have two words, both are this.
NO_ID = -1
# Sightings of an id without a row are counted up to this number.
MOST_SIGHTINGS = 2**10 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """A column of the logs, and the embedding table that its ids look up."""

    name: str
    """Name of the feature, and of its column unless column is given"""
    column: str | None = None
    """Column of the ORC files: list<T> or list<list<T>> of integers, strings or times, or of floats for
    bucketize. None: the feature's name"""
    op: Literal["id", "bucketize", "time_gap", "hour_of_day", "day_of_week"] = "id"
    """How the entries of the column become ids. id: the entry or its hash, modulo hash_bucket_size;
    bucketize: the number of boundaries at or below the entry; time_gap: the logarithm of the time since
    the row's previous event (0 if there is none, 1 below a second, otherwise 2 + floor(log2(seconds)));
    hour_of_day: 0 to 23; day_of_week: 0 (Monday) to 6. Times are numbers, text of digits, or ORC
    timestamps"""
    boundaries: tuple[float, ...] | None = None
    """Ascending boundaries for bucketize"""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of times that are numbers or text, since 1970"""
    utc_offset_hours: float = 0.0
    """Hours to add to times for hour_of_day and day_of_week, to make them local"""
    of_next: bool = False
    """Give each event the value of the row's next event instead of its own (and the last event none).
    Use it for what is known about an event in advance, such as its hour or the gap before it. Evaluation
    is then time-aware: it knows this about the target. Recommendation does not. Not allowed for features
    in loss.target_features"""
    emb_dim: int = 128
    """Width of the embedding"""
    hash_type: Literal["murmur", "farm"] | None = None
    """Hash function of ids. murmur: MurmurHash64A with seed 0; farm: FarmHash Fingerprint64; both hash
    an integer as its 8 little-endian bytes. None: integers are used as they are"""
    hash_bucket_size: int
    """Number of rows of the table. With op id, the id or its hash, as an unsigned 64-bit number, is
    taken modulo this; without a hash, ids below it have their own rows, and larger ones wrap around.
    With other ops, it must be at least the number of their values; long time gaps share the last row.
    0: no buckets; each 64-bit id (or 63 bits of its hash) has its own row, in a growing table"""
    shard_name: str | None = None
    """Name of the table. Features with the same name share a table. None: the feature's own name"""
    combiner: Literal["mean", "sum"] = "mean"
    """How the embeddings of several ids of an event become one"""
    bag_size: int = 1
    """Maximum number of ids of an event. Larger bags are refused"""

    @property
    def grows(self) -> bool:
        """Whether its table grows and has a row for each id."""
        return self.hash_bucket_size == 0

    @property
    def id_words(self) -> int:
        """Number of int32 words of an id on its way to the devices."""
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
    """An embedding table, which one or more features use.

    All keys except init and init_std are for growing tables: those of features with hash_bucket_size 0.
    """

    name: str
    """Name of the table: the name of its feature, or the shard_name of its features"""
    init: Literal["normal", "neighbours"] = "normal"
    """What the rows begin with. normal: random numbers; neighbours: items that occur near the same
    items of the log begin with similar rows, and other rows with random numbers. neighbours is for the
    table of loss.item_feature. It learns much sooner on short histories and rare items"""
    init_std: float = 0.001
    """Standard deviation of the truncated normal that initializes the table. With init neighbours, the
    root mean square of an item's row"""
    capacity: int = 65_536
    """Initial number of rows, rounded up to a power of two. It is doubled when the table is nearly
    full"""
    max_capacity: int | None = None
    """Maximum number of rows, rounded up to a power of two. None: limited only by memory"""
    on_full: Literal["evict", "stop"] = "evict"
    """What happens when the table is full at max_capacity. evict: a new id takes the row of the
    least recently seen id in its two buckets; stop: the run is saved and ends"""
    admit_after: int = 1
    """Sightings after which an id gets a row, at most 1023. Until then it is unknown. Values above 1
    keep one-off ids out of the table. The sightings of an id are forgotten after many other ids have
    waited: two to three times as many as the table has rows"""
    unknown: Literal["zeros", "default_row"] = "zeros"
    """What represents an id without a row. zeros: zeros, or in training the id's own initial value,
    which learns nothing; default_row: an additional row of the table, which learns from ids that wait
    for admission, so admit_after must be at least 2"""
    evict_after_steps: int | None = None
    """Ids that were not seen for more than this many steps lose their row. None: never"""
    evict_below: int = 0
    """Ids that were seen fewer times than this lose their row when ids are evicted"""
    evict_every: int = 1000
    """Steps between evictions"""


# Keys that only growing tables use.
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
    """One `TableConfig` for each table that features use, in the order of their first use.

    Args:
      features: the features, which determine the tables.
      tables: tables that differ from the defaults; the others are added. A table that no feature uses is
        dropped if it has only defaults; otherwise it stays at the end, and `validate` will refuse it.
    """
    if not _all_are(features, FeatureConfig) or not _all_are(tables, TableConfig):
        return tables  # `validate` will refuse this.
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
