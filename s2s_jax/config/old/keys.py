"""Keys of earlier versions, with a message about the new key for each."""

import re
from typing import NamedTuple

from s2s_jax.config.features import GROWING_KEYS
from s2s_jax.config.schema import Config


class _Renamed(NamedTuple):
    """A key of versions before 0.2.

    Attributes:
      now: the key that replaced it.
      command: the same setting on the command line; {} is the value.
      file: the same setting in a config file.
      without: the same setting on the command line for 0, 1 or None, if these meant "none"; None: they
        are ordinary values.
    """

    now: str
    command: str
    file: str
    without: str | None = None


_RENAMED = {
    "io.packing": _Renamed(
        "io.sequences",
        "--io.sequences pack --io.sequences.rows {}",
        "io=IOConfig(sequences=Pack(rows=…))",
        "--io.sequences truncate",
    ),
    "io.windows": _Renamed(
        "io.sequences",
        "--io.sequences pack (or crop) --io.sequences.windows {}",
        "io=IOConfig(sequences=Pack(windows=…)), or Crop(windows=…)",
        "--io.sequences truncate",
    ),
    "io.windows_per_epoch": _Renamed(
        "io.sequences",
        "--io.sequences pack --io.sequences.windows_per_epoch {} (or, for 1 without packing, "
        "--io.sequences crop)",
        "io=IOConfig(sequences=Pack(windows_per_epoch=…)), or Crop(…) for 1 without packing",
    ),
    "lr.decay_steps": _Renamed(
        "lr.decay", "--lr.decay linear (or cosine) --lr.decay.steps {}",
        "lr=LRConfig(decay=Linear(steps=…))"
    ),
    "lr.final_ratio": _Renamed(
        "lr.decay",
        "--lr.decay linear (or cosine) --lr.decay.final_ratio {}",
        "lr=LRConfig(decay=Linear(final_ratio=…))",
    ),
    "loss.log_q_from": _Renamed("loss.log_q", "--loss.log_q {}", 'loss=LossConfig(log_q="stream")'),
    "eval.held_out": _Renamed(
        "eval.split",
        "--eval.split last_events --eval.split.events {}",
        "eval=EvalConfig(split=LastEvents(events=…))",
        "--eval.split none",
    ),
    "eval.split_at": _Renamed(
        "eval.split",
        "--eval.split by_time --eval.split.at {}",
        "eval=EvalConfig(split=ByTime(at=…))",
        "--eval.split none",
    ),
    "eval.validation_at": _Renamed(
        "eval.split",
        "--eval.split by_time --eval.split.validation_at {}",
        "eval=EvalConfig(split=ByTime(at=…, validation_at=…))",
    ),
    "eval.time_feature": _Renamed(
        "eval.split",
        "--eval.split by_time --eval.split.feature {}",
        "eval=EvalConfig(split=ByTime(at=…, feature=…))",
    ),
}  # fmt: skip
_OF_TABLE = ("init_std", *GROWING_KEYS)
_NOTHING = ("0", "None", "False")


def on_command_line(key: str, value: str, config: Config) -> str | None:
    """A message about an old key given as `--key value`; None if it is not an old key.

    Args:
      key: the dotted key, with features by number or by name.
      value: the value, as given.
      config: the configuration that it should change.
    """
    of_feature = re.fullmatch(r"features\.(.+)\.(\w+)", key)
    if of_feature and of_feature[2] in _OF_TABLE:
        number_or_name, name = of_feature.groups()
        tables = [
            feature.table_name
            for number, feature in enumerate(config.features)
            if number_or_name in (str(number), feature.name.replace("-", "_"))
        ]
        now = f"tables.{tables[0] if tables else 'NAME'}.{name}"
        return f"{key}: this key is now {now}; give --{now} {value}"
    if key not in _RENAMED:
        return None
    renamed = _RENAMED[key]
    off = value in _NOTHING or (key == "io.windows" and value == "1")
    flags = renamed.without if off and renamed.without else renamed.command.format(value)
    return f"{key}: this key is now {renamed.now}; give {flags}"


def in_file(key: str, path: object) -> str | None:
    """A message about an old key in a config file; None if it is not an old key.

    Args:
      key: the dotted key; keys of features as `features.N.key`.
      path: the path of the config file.
    """
    name = key.removeprefix("features.N.")
    if name != key and name in _OF_TABLE:
        now, code = f"tables.NAME.{name}", f'Config(tables=(TableConfig(name="…", {name}=…), …))'
    elif key in _RENAMED:
        now, code = _RENAMED[key].now, _RENAMED[key].file
    else:
        return None
    return f"{key}: this key is now {now}; write {code} in {path}"


def of_value(key: str, value: str) -> str:
    """The end of a message about a value from an old key of this name; "" if it is not one."""
    if key == "loss.log_q" and value in ("True", "False"):
        return f" ({value} is now {'catalogue' if value == 'True' else 'none'})"
    return ""
