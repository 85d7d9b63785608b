"""Refuses impossible features and tables."""

import dataclasses
import itertools
import math
import re

from s2s_jax.config.checks.values import require
from s2s_jax.config.features import GROWING_KEYS, MOST_SIGHTINGS, FeatureConfig, TableConfig
from s2s_jax.config.schema import Config
from s2s_jax.errors import UserError

# Rows are numbered with int32, and rows past the end mark missing ids, so there must be room for both.
MAX_BUCKETS = 2_000_000_000
_DEFAULT_OF_GROWING = {
    field.name: field.default
    for field in dataclasses.fields(TableConfig)
    if field.name in GROWING_KEYS
}
_REPLACE_TABLES = (
    "remove it (a config file that replaces the features of another one must replace its tables "
    "too)"
)
# Keys on which features that share a table must agree.
_OF_TABLE = ("emb_dim", "hash_bucket_size")


def check_features(config: Config) -> None:
    """Refuses impossible features.

    Raises:
      UserError: names the dotted path.
    """
    require(len(config.features) > 0, "features", "at least one feature", config.features)
    first_of_table: dict[str, tuple[int, FeatureConfig]] = {}
    names: set[str] = set()
    for i, feature in enumerate(config.features):
        path = f"features.{i}"
        require(feature.name not in names, f"{path}.name", "a name used once", feature.name)
        names.add(feature.name)
        require(
            bool(re.fullmatch(r"[\w.-]+", feature.table_name)),
            f"{path}.{'name' if feature.shard_name is None else 'shard_name'}",
            "letters, digits, _, . and - (it names a table in checkpoints)",
            feature.table_name,
        )
        require(feature.emb_dim >= 1, f"{path}.emb_dim", "at least 1", feature.emb_dim)
        require(feature.bag_size >= 1, f"{path}.bag_size", "at least 1", feature.bag_size)
        _check_op(feature, path)
        _check_rows(feature, path)
        j, other = first_of_table.setdefault(feature.table_name, (i, feature))
        for key in _OF_TABLE:
            require(
                getattr(feature, key) == getattr(other, key),
                f"{path}.{key}",
                f"{getattr(other, key)} as in features.{j}, which has the same table",
                getattr(feature, key),
            )


def _check_rows(feature: FeatureConfig, path: str) -> None:
    rows = feature.hash_bucket_size
    require(
        0 <= rows <= MAX_BUCKETS,
        f"{path}.hash_bucket_size",
        f"1 to {MAX_BUCKETS:,}, or 0 for a row for each id",
        rows,
    )


def _check_op(feature: FeatureConfig, path: str) -> None:
    if feature.op == "id":
        require(
            feature.boundaries is None, f"{path}.boundaries", "None with op id", feature.boundaries
        )
        return
    require(
        feature.hash_type is None,
        f"{path}.hash_type",
        f"None with op {feature.op}",
        feature.hash_type,
    )
    least = {"time_gap": 3, "hour_of_day": 24, "day_of_week": 7}
    if feature.op == "bucketize":
        limits = feature.boundaries or ()
        require(
            len(limits) > 0
            and all(math.isfinite(b) for b in limits)
            and all(a < b for a, b in itertools.pairwise(limits)),
            f"{path}.boundaries",
            "one or more ascending numbers, because op is bucketize",
            feature.boundaries,
        )
        least["bucketize"] = len(limits) + 1
    else:
        require(
            feature.bag_size == 1, f"{path}.bag_size", f"1 with op {feature.op}", feature.bag_size
        )
        require(
            feature.boundaries is None,
            f"{path}.boundaries",
            f"None with op {feature.op}",
            feature.boundaries,
        )
    require(
        feature.hash_bucket_size >= least[feature.op],
        f"{path}.hash_bucket_size",
        f"at least {least[feature.op]}, the values of op {feature.op}",
        feature.hash_bucket_size,
    )


def check_tables(config: Config) -> None:
    """Refuses impossible settings of tables; features must have passed `check_features`.

    Raises:
      UserError: names the dotted path.
    """
    grows = {feature.table_name: feature.grows for feature in config.features}
    names: set[str] = set()
    for i, table in enumerate(config.tables):
        if table.name not in grows:
            raise UserError(
                f"tables.{i}.name: expected a table that a feature uses ({', '.join(grows)}), found "
                f"{table.name!r}; {_REPLACE_TABLES}"
            )
        require(table.name not in names, f"tables.{i}.name", "a name used once", table.name)
        names.add(table.name)
        path = f"tables.{table.name}"
        require(table.init_std >= 0, f"{path}.init_std", "at least 0", table.init_std)
        require(table.lr_ratio >= 0, f"{path}.lr_ratio", "at least 0", table.lr_ratio)
        if grows[table.name]:
            _check_growing(table, path)
        else:
            _check_buckets(table, path)


def _check_buckets(table: TableConfig, path: str) -> None:
    for key, default in _DEFAULT_OF_GROWING.items():
        found = getattr(table, key)
        if found != default:
            raise UserError(
                f"{path}.{key}: expected {default}, because only tables with hash_bucket_size 0 grow, "
                f"found {found!r}; {_REPLACE_TABLES}"
            )


def _check_growing(table: TableConfig, path: str) -> None:
    for key in ("capacity", "admit_after", "evict_every"):
        require(getattr(table, key) >= 1, f"{path}.{key}", "at least 1", getattr(table, key))
    require(
        table.admit_after <= MOST_SIGHTINGS,
        f"{path}.admit_after",
        f"at most {MOST_SIGHTINGS}",
        table.admit_after,
    )
    for key in ("capacity", "max_capacity"):
        value = getattr(table, key)
        require(value is None or value <= 2**30, f"{path}.{key}", f"at most {2**30:,}", value)
    most = table.max_capacity
    require(
        most is None or most >= table.capacity,
        f"{path}.max_capacity",
        f"at least capacity ({table.capacity:,})",
        most,
    )
    require(
        table.unknown == "zeros" or table.admit_after >= 2,
        f"{path}.admit_after",
        "at least 2, because unknown is default_row, which learns only from ids that wait to be "
        "admitted (or set unknown to zeros)",
        table.admit_after,
    )
    after = table.evict_after_steps
    require(after is None or after >= 1, f"{path}.evict_after_steps", "at least 1", after)
    require(table.evict_below >= 0, f"{path}.evict_below", "at least 0", table.evict_below)
