"""Values of all options, and small configurations that cover every pair of values."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.orc

from s2s_jax.config import (
    ByTime,
    Config,
    Constant,
    Cosine,
    Crop,
    FeatureConfig,
    LastEvents,
    Linear,
    Pack,
    TableConfig,
    TimeGaps,
    validate,
)
from s2s_jax.errors import UserError

SEQ_LEN = 6
DEVICES = (1, 2, 4)
# A pair counts as forbidden by validation after this many configurations were tried.
_TRIES = 400

_DAY = 86_400
_BEGIN = 946_684_800  # 2000-01-01

# How sequences are cut and laid out. Validation couples these options closely.
_SEQUENCES = (
    {},
    {"io.sequences": Pack(rows=10)},
    {"io.sequences": Pack(windows=3)},
    {"io.sequences": Pack(rows=8, windows=3, windows_per_epoch=2)},
    {"io.sequences": Crop(windows=3)},
)
_LOG_Q = (
    {},
    {"loss.log_q": "catalogue"},
    {"loss.log_q": "stream"},
)
_HELD_OUT = (
    {},
    {"eval.split": LastEvents(events=2)},
    {"eval.split": LastEvents(events=2), "eval.every_steps": 2, "eval.filter_seen": False},
    {"eval.split": ByTime(at="2000-01-09", validation_at="2000-01-08"), "eval.every_steps": 2},
    {"eval.split": ByTime(at="2000-01-09")},
)
_GROWING = {"capacity": 1}
_TABLES = (
    {},
    _GROWING,
    _GROWING | {"admit_after": 2},
    _GROWING
    | {"admit_after": 2, "unknown": "default_row", "evict_after_steps": 1, "evict_every": 1},
    _GROWING | {"evict_below": 2, "evict_every": 1, "max_capacity": 1},
    _GROWING | {"max_capacity": 1, "on_full": "stop"},
)
_TIME = {"column": "timestamp", "emb_dim": 4, "hash_bucket_size": 28}
_FURTHER = (
    None,
    {"op": "time_gap", **_TIME},
    {"op": "time_gap", "of_next": True, **_TIME},
    {"op": "hour_of_day", "of_next": True, "utc_offset_hours": 5.5, **_TIME},
    {"op": "day_of_week", **_TIME},
    {"op": "bucketize", **_TIME | {"column": "price", "boundaries": (1.0, 10.0)}},
)

# Values of each factor. Most factors are one key; some set several keys.
FACTORS: dict[str, tuple] = {
    "devices": DEVICES,
    "restored at": (1, 2),
    "sequences": _SEQUENCES,
    "log_q": _LOG_Q,
    "held out": _HELD_OUT,
    "table": _TABLES,
    "first rows": ("normal", "neighbours"),
    "further feature": _FURTHER,
    "item bag": (1, 2),
    "combiner": ("mean", "sum"),
    "hash_type": (None, "murmur", "farm"),
    "io.layout": ("dense", "flat"),
    "io.truncate_side": ("left", "right"),
    "io.drop_remainder": (False, True),
    "io.shuffle": (True, False),
    "io.thread_num": (2, 0),
    "cache": (False, True),
    "io.on_error": ("stop", "skip_stripe"),
    "model.dropout": (0.0, 0.2),
    "model.input_dropout": (0.0, 0.3),
    "model.event_dropout": (0.0, 0.3),
    "model.input_norm": (False, True),
    "model.layer": ("transformer", "hstu", "hstu_softmax"),
    "model.feed_forward": ("gelu", "swiglu"),
    "model.norm": ("layer", "rms"),
    "model.norm_placement": ("pre", "post"),
    "model.qk_norm": (False, True),
    "model.gated_residuals": (False, True),
    "model.dtype": ("float32", "bfloat16"),
    "model.position": ("none", "learned", "rope"),
    "model.distance_bias": (False, True),
    "model.time_bias": (None, TimeGaps()),
    "model.attention": ("blocked", "xla"),
    "model.remat": ("none", "attention", "full"),
    "model.unroll": ("auto", 1, 2),
    "lr.decay": (Constant(), Linear(), Cosine()),
    "lr.warmup_steps": (0, 2),
    "lr.clip_norm": (None, 0.5),
    "lr.average_decay": (None, 0.7),
    "lr.dense_optimizer": ("adamw", "muon"),
    "lr.layer_decay": (1.0, 0.5),
    "lr_ratio": (1.0, 0.5),
    "loss.pairing": ("next", "previous"),
    "loss.similarity": ("cosine", "dot"),
    "loss.mask_padding": (True, False),
    "loss.mask_same_item": (True, False),
    "loss.negative_scope": ("global", "local"),
    "loss.negatives": ("in_batch", "mixed", "uniform", "full"),
    "loss.num_negatives": (7, 4096),
    "loss.hard_negatives": (None, 5),
    "loss.label_smoothing": (0.0, 0.1),
    "loss.next_events": (1, 3),
    "loss.objective": ("softmax", "gbce"),
    "loss.target_features": (("item_id", "tags"), None, ("item_id",)),
    "train.gradient_accumulation_steps": (1, 2),
    "train.dense_sharding": ("replicated", "fsdp"),
}

# One value of each factor, as its index in `FACTORS`.
Row = dict[str, int]


def config_of(row: Row, log: Path, run_dir: Path) -> Config:
    """The configuration for some values.

    Raises:
      UserError: validation forbids it.
    """
    value: dict[str, Any] = {name: FACTORS[name][place] for name, place in row.items()}
    table = {"hash_type": value["hash_type"], "combiner": value["combiner"]}
    table |= {"hash_bucket_size": 0 if value["table"] else 300}
    features = [
        FeatureConfig(name="item_id", emb_dim=8, bag_size=value["item bag"], **table),
        FeatureConfig(name="tags", emb_dim=8, bag_size=3, shard_name="item_id", **table),
        FeatureConfig(name="behavior_id", emb_dim=4, hash_bucket_size=9),
        # The time of events, for a split by time.
        FeatureConfig(name="timestamp", op="day_of_week", emb_dim=4, hash_bucket_size=7),
    ]
    if value["further feature"] is not None:
        features.append(FeatureConfig(name="further", **value["further feature"]))
    changes: dict[str, Any] = {
        "io.data_paths": str(log / ("damaged" if value["io.on_error"] != "stop" else "whole")),
        "io.batch_size": 4,
        "io.shuffle_rows": 32,
        "io.cache": str(run_dir / "cache") if value["cache"] else None,
        "model.seq_len": SEQ_LEN,
        "model.hidden_size": 16,
        "model.num_layers": 2,
        "model.nhead": 2,
        "model.dim_feedforward": 16,
        "lr.dense_lr": 1e-2,
        "lr.sparse_lr": 1e-2,
        "train.output_dir": str(run_dir),
        "train.train_steps": 3,
        "train.log_steps": 1,
        "train.save_steps": 1,
        "train.tensorboard": False,
        "eval.batch_size": 32,
    }
    for name in ("sequences", "log_q", "held out"):
        changes |= value[name]
    changes |= {name: x for name, x in value.items() if "." in name}
    names = dict.fromkeys(feature.table_name for feature in features)
    of_items = value["table"] | {"init": value["first rows"], "lr_ratio": value["lr_ratio"]}
    tables = [
        TableConfig(name=n, init_std=0.5, **of_items if n == "item_id" else {}) for n in names
    ]
    config = dataclasses.replace(Config(), features=tuple(features), tables=tuple(tables))
    for path, x in changes.items():
        section, key = path.split(".")
        part = dataclasses.replace(getattr(config, section), **{key: x})
        config = dataclasses.replace(config, **{section: part})
    validate(config)
    return config


def is_valid(row: Row) -> bool:
    """Whether validation allows the row."""
    try:
        config_of(row, Path("log"), Path("run"))
    except UserError:
        return False
    return True


@functools.cache
def covering_rows(together: int = 2) -> tuple[Row, ...]:
    """A few rows (chosen greedily) that cover every valid combination of `together` values."""
    rng = np.random.default_rng(0)
    values = [[(name, place) for place in range(len(FACTORS[name]))] for name in FACTORS]
    left = {
        chosen
        for factors in itertools.combinations(values, together)
        for chosen in itertools.product(*factors)
    }

    def groups(row: Row) -> set:
        return set(itertools.combinations(((name, row[name]) for name in FACTORS), together))

    rows: list[Row] = []
    while left:
        first = min(left)
        candidates = []
        for _ in range(_TRIES):
            row = {name: int(rng.integers(len(values))) for name, values in FACTORS.items()}
            row |= dict(first)
            if is_valid(row):
                candidates.append(row)
            if len(candidates) == 10:
                break
        if not candidates:
            left.remove(first)
            continue
        best = max(candidates, key=lambda row: len(groups(row) & left))
        # Sets one factor after the other to the value that covers the most.
        for name, values in FACTORS.items():
            if name in dict(first):
                continue
            others = [best | {name: place} for place in range(len(values))]
            others.sort(key=lambda row: -len(groups(row) & left))
            best = next(row for row in others if row == best or is_valid(row))
        rows.append(best)
        left -= groups(best)
    return tuple(rows)


def write_logs(directory: Path, users: int = 70) -> None:
    """Writes a log, and the same log with an additional unreadable file."""
    rng = np.random.default_rng(0)
    whole = directory / "whole"
    damaged = directory / "damaged"
    whole.mkdir(parents=True)
    damaged.mkdir()
    for number in range(2):
        columns: dict[str, list] = {
            name: [] for name in ("user", "item_id", "tags", "behavior_id", "timestamp", "price")
        }
        for user in range(users // 2):
            # Some rows have no events, some have one, and some have more than fit in all windows.
            length = int(rng.choice([0, 1, 2, 5, 6, 7, 12, 30]))
            items = (int(rng.integers(60)) + np.arange(length)) % 60
            times = _BEGIN + np.sort(rng.integers(0, 10 * _DAY, length))
            columns["user"].append(number * users + user)
            columns["item_id"].append([[int(i)] if i % 13 else [] for i in items])
            columns["tags"].append([[int(i) % 7, int(i) % 11][: int(i) % 3] for i in items])
            columns["behavior_id"].append(None if user % 9 == 8 else (items % 4).tolist())
            columns["timestamp"].append([int(t) if t % 17 else None for t in times])
            columns["price"].append([float(i) if i % 5 else float("nan") for i in items])
        bags = pa.list_(pa.list_(pa.int64()))
        types = {
            "user": pa.int64(),
            "item_id": bags,
            "tags": bags,
            "behavior_id": pa.list_(pa.int64()),
            "timestamp": pa.list_(pa.int64()),
            "price": pa.list_(pa.float64()),
        }
        table = pa.table({name: pa.array(columns[name], kind) for name, kind in types.items()})
        for place in (whole, damaged):
            with pyarrow.orc.ORCWriter(
                str(place / f"part-{number}.orc"), stripe_size=1, batch_size=10
            ) as writer:
                for begin in range(0, len(table), 10):
                    writer.write(table.slice(begin, 10))
    (damaged / "part-2.orc").write_bytes(b"no ORC file")
