"""The manifest of an export: all that is needed to use its files, and their checksums.

`s2s_jax.exporting` writes it; `docs/reference/export_format.md` describes it for other programs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from s2s_serve.encoding.feature import EventTime, FeatureConfig
from s2s_serve.errors import UserError

# Raised when a reader of an earlier version could not use the files correctly.
FORMAT = 1
NAME = "manifest.json"
_CHECKSUM = "checksum"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry:
    """The size of a file, and its checksum."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableEntry:
    """An embedding table.

    Attributes:
      emb_dim: the width of a row.
      grows: whether each id has its own row, found by its key.
      segment_rows: of a bucket table: the number of rows of each of its 256 segments, see
        `table_layout`; 0 for a table that grows.
      shards: the files, which have the rows in order.
      default_row: the row for ids without a row; None: zeros.
    """

    emb_dim: int
    grows: bool
    segment_rows: int
    shards: tuple[str, ...]
    default_row: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """An index for approximate search.

    Attributes:
      file: the file of the index.
      library: what reads it.
      effort: the effort of a search with which the recall was measured, see `Index.effort`.
      recall: the share of the exactly best items that the index finds, such as `{"recall@10": 0.99}`.
    """

    file: str
    library: str
    effort: int
    recall: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimesEntry:
    """The times of events, which the tower needs.

    Attributes:
      column: the column of a history that has them.
      time_unit: the unit of times that are numbers or text, since 1970.
    """

    column: str
    time_unit: Literal["s", "ms", "us", "ns"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of an export.

    Attributes:
      format: the version of the format of the files.
      version: the number of the export.
      created: the time, as in ISO 8601.
      made_by: the program and its version.
      step: the step of the checkpoint.
      evaluation: the figures of the checkpoint's evaluation, such as `eval/hr@10`; empty if it had none.
      features: the features of an event, in the order of their columns in the tower's input.
      kinds: the kind of the ids of each feature in the training log.
      item_feature: the feature that says which item an event is about.
      target_features: the features that items have.
      seq_len: the maximum number of events that the tower takes.
      shown_len: the number of newest events that the model sees.
      width: the width of the vectors of users and items.
      similarity: cosine or dot: what a score is, without counted neighbours.
      temperature: a score is a logit times this.
      items: the number of items.
      filter_seen: whether items of the history are left out.
      untrained: how items that were never trained are ranked: keep, last or drop.
      neighbours: the weight of counted neighbours in a logit; 0: there are none.
      tables: the embedding tables by name.
      index: the index for approximate search; None: there is none.
      times: the times of events; None: the tower does not need them.
      files: all other files of the export, by path.
    """

    format: int
    version: int
    created: str
    made_by: str
    step: int
    evaluation: dict[str, float]
    features: tuple[FeatureConfig, ...]
    kinds: dict[str, str]
    item_feature: str
    target_features: tuple[str, ...]
    seq_len: int
    shown_len: int
    width: int
    similarity: Literal["cosine", "dot"]
    temperature: float
    items: int
    filter_seen: bool
    untrained: Literal["keep", "last", "drop"]
    neighbours: float
    tables: dict[str, TableEntry]
    index: IndexEntry | None
    times: TimesEntry | None = None
    files: dict[str, FileEntry]

    def to_json(self) -> str:
        """Return the text of `manifest.json`, with a checksum of everything else in it."""
        values = dataclasses.asdict(self)
        return json.dumps(values | {_CHECKSUM: checksum_of(values)}, indent=2) + "\n"

    @property
    def item(self) -> FeatureConfig:
        """The feature that says which item an event is about."""
        (item,) = (f for f in self.features if f.name == self.item_feature)
        return item

    @property
    def decoded(self) -> tuple[FeatureConfig, ...]:
        """What is decoded of a history: the features and then, if the tower needs them, the times."""
        if self.times is None:
            return self.features
        times = EventTime(column=self.times.column, time_unit=self.times.time_unit)
        return (*self.features, times)


def checksum_of(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the values of a manifest, without `checksum`, as sorted compact JSON."""
    others = {name: value for name, value in values.items() if name != _CHECKSUM}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def load(directory: Path) -> Manifest:
    """Reads the manifest of an export.

    Raises:
      UserError: there is none, it is of a newer version, or it is broken.
    """
    path = directory / NAME
    try:
        raw = json.loads(path.read_bytes())
        found = raw["format"]
        if not isinstance(found, int):
            raise TypeError(f"format is {found!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(_broken(path, error)) from error
    if found > FORMAT:
        raise UserError(
            f"{path}: expected format {FORMAT} or earlier, found {found}; install the version of "
            f"s2s_serve that belongs to the export ({raw.get('made_by')})"
        )
    try:
        if raw[_CHECKSUM] != checksum_of(raw):
            raise ValueError("its contents are not those of the export: its checksum differs")
        manifest = _from_json({name: raw[name] for name in raw if name != _CHECKSUM})
        _check(manifest)
        return manifest
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(_broken(path, error)) from error


def _from_json(raw: dict[str, Any]) -> Manifest:
    features = []
    for each in raw["features"]:
        limits = each["boundaries"]
        features.append(
            FeatureConfig(**each | {"boundaries": None if limits is None else tuple(limits)})
        )
    tables = {}
    for name, each in raw["tables"].items():
        default = each["default_row"]
        lists = {
            "shards": tuple(each["shards"]),
            "default_row": None if default is None else tuple(default),
        }
        tables[name] = TableEntry(**each | lists)
    index = raw["index"]
    # Exports of earlier versions have no times.
    times = raw["times"] if "times" in raw else None
    found = raw | {
        "features": tuple(features),
        "target_features": tuple(raw["target_features"]),
        "tables": tables,
        "index": None if index is None else IndexEntry(**index),
        "times": None if times is None else TimesEntry(**times),
        "files": {name: FileEntry(**each) for name, each in raw["files"].items()},
    }
    return Manifest(**found)


def _check(manifest: Manifest) -> None:
    """Refuses values that no export has.

    Raises:
      ValueError: says which.
    """
    names = [feature.name for feature in manifest.features]
    tables = {feature.table_name for feature in manifest.features}
    wrong = {
        "item_feature": manifest.item_feature not in names,
        "target_features": not set(manifest.target_features) <= set(names),
        "tables": set(manifest.tables) != tables,
        "shown_len": not 1 <= manifest.shown_len <= manifest.seq_len,
        "width": manifest.width < 1,
        "items": manifest.items < 1,
        "similarity": manifest.similarity not in ("cosine", "dot"),
        "untrained": manifest.untrained not in ("keep", "last", "drop"),
        "kinds": not isinstance(manifest.kinds, dict),
        "times": manifest.times is not None
        and manifest.times.time_unit not in ("s", "ms", "us", "ns"),
    }
    for feature in manifest.features:
        table = manifest.tables[feature.table_name] if not wrong["tables"] else None
        wrong[f"feature {feature.name}"] = (
            feature.op not in ("id", "bucketize", "time_gap", "hour_of_day", "day_of_week")
            or feature.hash_type not in (None, "murmur", "farm")
            or feature.combiner not in ("mean", "sum")
            or feature.time_unit not in ("s", "ms", "us", "ns")
            or (table is not None and table.emb_dim != feature.emb_dim)
            or (table is not None and table.grows != feature.grows)
        )
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{name} has a value that no export has")


def _broken(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
    return (
        f"{path}: expected the manifest of an export, found none ({reason}); export the run again"
    )
