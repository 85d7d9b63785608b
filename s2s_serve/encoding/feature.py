"""A feature: a column of the logs, and how its entries become ids."""

import dataclasses
from typing import Literal

# Marks a place without an id; if ids have two words, both are this.
NO_ID = -1


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
class EventTime(FeatureConfig):
    """The column with the times of events, for a model whose attention depends on time gaps.

    It is decoded like a feature, as one number for each event, but looks up no table: the number is the
    time in seconds, see `ids.event_times`. So it is not among the features of a model.
    """

    name: str = "time of the event"
    op: Literal["time_gap"] = "time_gap"
    hash_bucket_size: int = 1
