"""Embedding tables, and the columns of the logs whose ids look them up."""

import dataclasses
from typing import Literal

from s2s_serve.encoding.feature import EventTime as EventTime
from s2s_serve.encoding.feature import FeatureConfig as FeatureConfig

# Sightings of an id without a row are counted up to this number.
MOST_SIGHTINGS = 2**10 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """An embedding table, which one or more features use.

    All keys except init, init_std and lr_ratio are for growing tables: those of features with
    hash_bucket_size 0.
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
    lr_ratio: float = 1.0
    """Learning rate of the table, relative to lr.sparse_lr"""
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
