"""Which keys of the configuration must stay the same during a run, and which may change.

Checkpoints, reading positions, cached stripes and catalogue files outlive the command that made them.
When a command uses one of them, it compares the keys that matter with its own configuration. `KEYS`
says for every key what it affects, or why it may change; each comparison selects its keys from `KEYS`.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from s2s_jax.config import choices
from s2s_jax.config.features import FeatureConfig
from s2s_jax.config.kinds import ByTime
from s2s_jax.config.plain import Dataclass, Plain, to_plain
from s2s_jax.config.schema import Config

# Values that must be the same, by the paths of their keys.
Fingerprint = dict[str, Plain]

Concern = Literal["ids", "decoded", "rows", "split", "model", "order"]


class Free(NamedTuple):
    """A key that may change between commands that share a run.

    Attributes:
      reason: why the key may change.
    """

    reason: str


_PLACE = Free("where files are")
_SPEED = Free("speed and memory; results differ by rounding at most")
_LENGTH = Free("how long a run is, and how often it writes")
_RATE = Free("how fast weights change from here on")
_OBJECTIVE = Free("what weights are trained towards from here on; what they compute stays")
_GROWTH = Free("which ids keep a row from here on; existing rows keep their meaning")
_PROTOCOL = Free("how a state is measured; no state depends on it")
_TRAINING = Free("random in each step, and only in training")

# Concerns:
#   ids: how an entry of a column is encoded, and so which row of a table it reads
#   decoded: the form of decoded rows, or which rows are refused; the ids in them stay the same
#   rows: which positions of a row of the log are used
#   split: which events training never sees
#   model: what the same weights compute, and what is compared with what
#   order: the order of rows in an epoch
KEYS: dict[str, Concern | Free] = {
    "io.data_paths": Free("reading positions name the files and their contents"),
    "io.batch_size": _SPEED,
    "io.thread_num": _SPEED,
    "io.prefetch": _SPEED,
    "io.drop_remainder": Free("reading positions are rows, not batches"),
    "io.shuffle": "order",
    "io.shuffle_rows": "order",
    "io.shards": "order",
    "io.seed": "order",
    "io.truncate_side": "rows",
    "io.check_length": "decoded",
    "io.sequences": Free("how many rows make a batch; each keeps its own sequences"),
    "io.sequences.rows": Free("how many rows make a batch; each keeps its own sequences"),
    "io.sequences.windows": "decoded",
    "io.sequences.windows_per_epoch": Free("chosen from decoded rows, again in each epoch"),
    "io.layout": _SPEED,
    "io.cache": _PLACE,
    "io.on_error": Free("data that can be read means the same"),
    "io.new_files": Free("reading positions name the files and their contents"),
    "features.name": "ids",
    "features.column": "ids",
    "features.op": "ids",
    "features.boundaries": "ids",
    "features.time_unit": "ids",
    "features.utc_offset_hours": "ids",
    "features.of_next": "ids",
    "features.emb_dim": "model",
    "features.hash_type": "ids",
    "features.hash_bucket_size": "ids",
    "features.shard_name": "model",
    "features.combiner": "model",
    # A limit that may be raised during a run; see also `of_run`.
    "features.bag_size": "decoded",
    "tables.name": Free("features say which table they read"),
    "tables.init": Free("only new runs begin with it"),
    "tables.init_std": Free("only new rows begin with it"),
    "tables.lr_ratio": _RATE,
    "tables.capacity": _GROWTH,
    "tables.max_capacity": _GROWTH,
    "tables.on_full": _GROWTH,
    # But it may not change from 1 to more, or back; see `of_run`.
    "tables.admit_after": _GROWTH,
    "tables.unknown": "model",
    "tables.evict_after_steps": _GROWTH,
    "tables.evict_below": _GROWTH,
    "tables.evict_every": _GROWTH,
    "model.seq_len": "rows",
    "model.hidden_size": "model",
    "model.num_layers": "model",
    "model.nhead": "model",
    "model.layer": "model",
    "model.dim_feedforward": "model",
    "model.feed_forward": "model",
    "model.norm": "model",
    "model.norm_placement": "model",
    "model.qk_norm": "model",
    "model.gated_residuals": "model",
    "model.dropout": _TRAINING,
    "model.input_norm": "model",
    "model.input_dropout": _TRAINING,
    "model.event_dropout": _TRAINING,
    "model.dtype": _SPEED,
    "model.position": "model",
    "model.distance_bias": "model",
    "model.time_bias": "model",
    # The column of times is decoded like a feature.
    "model.time_bias.column": "ids",
    "model.time_bias.time_unit": "ids",
    "model.attention": _SPEED,
    "model.remat": _SPEED,
    "model.unroll": _SPEED,
    # Checkpoints have the state of the optimizer.
    "lr.dense_optimizer": "model",
    "lr.dense_lr": _RATE,
    "lr.layer_decay": _RATE,
    "lr.sparse_lr": _RATE,
    "lr.beta1": _RATE,
    "lr.beta2": _RATE,
    "lr.eps": _RATE,
    "lr.weight_decay": _RATE,
    "lr.warmup_steps": _RATE,
    "lr.decay": _RATE,
    "lr.decay.steps": _RATE,
    "lr.decay.final_ratio": _RATE,
    "lr.clip_norm": _RATE,
    # Checkpoints have averages, and steps at which they were computed with this decay.
    "lr.average_decay": "model",
    "loss.objective": _OBJECTIVE,
    "loss.calibration": _OBJECTIVE,
    # Whether a user's vector resembles the next event or the previous one.
    "loss.pairing": "model",
    "loss.next_events": _OBJECTIVE,
    "loss.later_weight": _OBJECTIVE,
    "loss.similarity": "model",
    "loss.temperature": _OBJECTIVE,
    "loss.mask_padding": _OBJECTIVE,
    "loss.mask_same_item": _OBJECTIVE,
    "loss.negative_scope": _OBJECTIVE,
    "loss.negatives": _OBJECTIVE,
    "loss.catalogue": Free("checkpoints name its contents"),
    "loss.num_negatives": _OBJECTIVE,
    "loss.hard_negatives": _OBJECTIVE,
    # But it may not change from stream to another value, or back; see `of_run`.
    "loss.log_q": _OBJECTIVE,
    "loss.label_smoothing": _OBJECTIVE,
    "loss.item_feature": "model",
    "loss.target_features": "model",
    "train.output_dir": _PLACE,
    "train.train_steps": _LENGTH,
    "train.train_epoch": _LENGTH,
    "train.log_steps": _LENGTH,
    "train.save_steps": _LENGTH,
    "train.max_to_keep": _PLACE,
    "train.gradient_accumulation_steps": _SPEED,
    "train.dense_sharding": _SPEED,
    "train.seed": Free("initial values, and random numbers of each step"),
    "train.tensorboard": _PLACE,
    "train.profile_steps": _PLACE,
    "eval.split": "split",
    "eval.split.events": "split",
    "eval.split.at": "split",
    "eval.split.validation_at": "split",
    "eval.split.feature": "split",
    "eval.filter_seen": _PROTOCOL,
    "eval.untrained": _PROTOCOL,
    "eval.neighbours": _PROTOCOL,
    "eval.batch_size": _SPEED,
    "eval.max_users": _PROTOCOL,
    "eval.every_steps": _LENGTH,
    "eval.metric": _PROTOCOL,
    "eval.patience": _LENGTH,
}


def of_run(config: Config) -> Fingerprint:
    """Return what must stay the same to continue a run, evaluate it or recommend with it."""
    values = _values(config, ("ids", "rows", "split", "model"))
    # Whether checkpoints have counts of ids that wait for a row.
    values |= {
        f"tables.{feature.table_name}.admit_after": (
            "1" if config.table(feature.table_name).admit_after == 1 else "more than 1"
        )
        for feature in config.features
        if feature.grows
    }
    # Whether checkpoints have counts of the items so far.
    values["loss.log_q"] = "stream" if config.loss.stream_shares else "none or catalogue"
    if config.loss.stream_shares:
        # Items are counted by their whole bags, including padding.
        values |= {
            f"features.{i}.bag_size": feature.bag_size
            for i, feature in enumerate(config.features)
            if feature.name == config.loss.item_feature
        }
    return values


def of_decoding(config: Config) -> Fingerprint:
    """Return everything that decoded rows depend on, except the files."""
    return _values(config, ("ids", "decoded", "rows", "split"))


def of_order(config: Config) -> Fingerprint:
    """Return everything that the order of rows depends on, except the files."""
    return _values(config, ("order",))


def of_split(config: Config) -> Fingerprint:
    """Return which events are held out and, with a split by time, the column and unit of the times."""
    values = _values(config, ("split",))
    if isinstance(config.eval.split, ByTime):
        feature = config.feature(config.eval.split.feature)
        values |= {
            "column of eval.split.feature": feature.column_name,
            "time_unit of eval.split.feature": feature.time_unit,
        }
    return values


def of_items(config: Config) -> Fingerprint:
    """Return everything that ids of items and target features depend on, except files and split."""
    names = (config.loss.item_feature, *config.target_features)
    return {
        "loss.item_feature": config.loss.item_feature,
        "features": {f.name: of_entries(f) for f in config.features if f.name in names},
    }


def of_features(features: Sequence[FeatureConfig]) -> Fingerprint:
    """Return everything that decoded rows depend on if no events are dropped, except the files."""
    return _of_features(features, ("ids", "decoded"))


def of_entries(feature: FeatureConfig) -> Fingerprint:
    """Return everything that the encoding of a feature's entries depends on, by key."""
    kept = _kept("features", feature, ("ids", "decoded"))
    return {name: _value(feature, name) for name in kept}


def _values(config: Config, concerns: Collection[Concern]) -> Fingerprint:
    """The values of all keys of some concerns, by path, in the form in which JSON returns them."""
    values = _of_features(config.features, concerns)
    for table in config.tables:
        kept = _kept("tables", table, concerns)
        values |= {f"tables.{table.name}.{name}": to_plain(getattr(table, name)) for name in kept}
    for section in (field.name for field in dataclasses.fields(config)):
        if section not in ("features", "tables"):
            values |= _of_section(section, getattr(config, section), concerns)
    if "loss.target_features" in values:
        values["loss.target_features"] = list(config.target_features)
    if "decoded" in concerns:
        # Regardless of the kind.
        values["io.sequences.windows"] = config.io.sequences.windows
    return values


def _of_features(features: Sequence[FeatureConfig], concerns: Collection[Concern]) -> Fingerprint:
    values: Fingerprint = {}
    for i, feature in enumerate(features):
        kept = _kept("features", feature, concerns)
        values |= {f"features.{i}.{name}": _value(feature, name) for name in kept}
    return values


def _of_section(section: str, settings: Dataclass, concerns: Collection[Concern]) -> Fingerprint:
    """The values of a section's keys; for a key with several kinds, the kind and its keys."""
    values: Fingerprint = {}
    for name, hint in choices.types_of(type(settings)).items():
        path, value = f"{section}.{name}", getattr(settings, name)
        if choices.kinds(hint):
            values[path] = choices.kind_of(value)
            of_kind = [] if value is None else [f.name for f in dataclasses.fields(value)]
            values |= {f"{path}.{key}": to_plain(getattr(value, key)) for key in of_kind}
        else:
            values[path] = to_plain(value)
    return {path: value for path, value in values.items() if KEYS[path] in concerns}


def _kept(section: str, settings: Dataclass, concerns: Collection[Concern]) -> list[str]:
    names = [field.name for field in dataclasses.fields(settings)]
    return [name for name in names if KEYS[f"{section}.{name}"] in concerns]


def _value(feature: FeatureConfig, name: str) -> Plain:
    """The value of a feature's key; if it defaults to the feature's name, that name."""
    if name == "column":
        return feature.column_name
    if name == "shard_name":
        return feature.table_name
    return to_plain(getattr(feature, name))
