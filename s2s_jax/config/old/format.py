"""Reads the `config.json` of earlier versions.

Format 1 (s2s_jax 0.1, which did not write the number) had the settings of a table in each feature that
uses it, and pairs of keys where there are kinds now.
"""

from typing import Any

from s2s_jax.config.features import GROWING_KEYS

# The format that `Config.to_json` writes.
FORMAT = 2

_OF_TABLE = ("init_std", *GROWING_KEYS)
_OF_SPLIT = ("held_out", "split_at", "validation_at", "time_feature")

_Values = dict[str, Any]


def to_present_format(values: _Values) -> _Values:
    """Converts the JSON object of a `config.json` to the current format, without format and version.

    Raises:
      ValueError: it has a later format.
    """
    found = values["format"] if "format" in values else 1
    if found > FORMAT:
        raise ValueError(
            f"it has format {found}, written by s2s_jax {values['s2s_jax']}, but this version only "
            f"knows formats up to {FORMAT}; use that version"
        )
    values = {name: each for name, each in values.items() if name not in ("format", "s2s_jax")}
    return values if found == FORMAT else _from_1(values)


def _from_1(values: _Values) -> _Values:
    values = dict(values)
    if "features" in values:
        values["tables"] = _tables(values["features"])
        values["features"] = [_without(feature, _OF_TABLE) for feature in values["features"]]
    for section, change in (("io", _io), ("lr", _lr), ("loss", _loss), ("eval", _eval)):
        if section in values:
            values[section] = change(values[section])
    return values


def _tables(features: list[_Values]) -> list[_Values]:
    tables: dict[str, _Values] = {}
    for feature in features:
        name = _value(feature, "shard_name", None) or feature["name"]
        settings = {key: feature[key] for key in _OF_TABLE if key in feature}
        # Features that share a table have the same settings.
        tables[name] = {"name": name} | settings
    return list(tables.values())


def _io(io: _Values) -> _Values:
    rows, windows = _value(io, "packing", None), _value(io, "windows", 1)
    per_epoch = _value(io, "windows_per_epoch", None)
    if rows is not None:
        sequences = {
            "kind": "pack",
            "rows": rows,
            "windows": windows,
            "windows_per_epoch": per_epoch,
        }
    elif windows > 1:
        # Without packing, an epoch trained on one window.
        sequences = {"kind": "crop", "windows": windows}
    else:
        sequences = {"kind": "truncate"}
    return _without(io, ("packing", "windows", "windows_per_epoch")) | {"sequences": sequences}


def _lr(lr: _Values) -> _Values:
    kind = _value(lr, "decay", "constant")
    decay: _Values = {"kind": kind}
    if kind != "constant":
        decay |= {
            "steps": _value(lr, "decay_steps", None),
            "final_ratio": _value(lr, "final_ratio", 0.0),
        }
    return _without(lr, ("decay_steps", "final_ratio")) | {"decay": decay}


def _loss(loss: _Values) -> _Values:
    log_q = _value(loss, "log_q_from", "catalogue") if _value(loss, "log_q", False) else "none"
    return _without(loss, ("log_q_from",)) | {"log_q": log_q}


def _eval(settings: _Values) -> _Values:
    at, events = _value(settings, "split_at", None), _value(settings, "held_out", 0)
    split: _Values | None = None
    if at is not None:
        split = {
            "kind": "by_time",
            "at": at,
            "validation_at": _value(settings, "validation_at", None),
            "feature": _value(settings, "time_feature", "timestamp"),
        }
    elif events > 0:
        split = {"kind": "last_events", "events": events}
    return _without(settings, _OF_SPLIT) | {"split": split}


def split_of_catalogue(saved: _Values) -> _Values:
    """The split in a catalogue file, with the keys of the current version."""
    renamed = {
        "eval.split_at": "eval.split.at",
        "eval.validation_at": "eval.split.validation_at",
        "eval.time_feature": "eval.split.feature",
        "column of eval.time_feature": "column of eval.split.feature",
        "time_unit of eval.time_feature": "time_unit of eval.split.feature",
    }
    if "eval.held_out" not in saved:
        return saved
    if _value(saved, "eval.split_at", None) is not None:
        by_time = {now: saved[old] for old, now in renamed.items() if old in saved}
        return {"eval.split": "by_time"} | by_time
    events = saved["eval.held_out"]
    if events > 0:
        return {"eval.split": "last_events", "eval.split.events": events}
    return {"eval.split": "none"}


def _value(values: _Values, key: str, default: object) -> Any:
    """The value of a key, or the default of the time before it existed."""
    return values[key] if key in values else default


def _without(values: _Values, keys: tuple[str, ...]) -> _Values:
    return {key: value for key, value in values.items() if key not in keys}
