"""Refuses what no run could use, naming the dotted path."""

import dataclasses
import itertools
import math
import re
import types
import typing
from typing import Any, Literal

from s2s_jax.config.addresses import refuse_addresses_in
from s2s_jax.config.schema import GROWING_KEYS, MOST_SIGHTINGS, Config, FeatureConfig
from s2s_jax.config.times import meant_instead, seconds_of
from s2s_jax.errors import UserError

# Rows are addressed by int32 and the rows past the end mark missing ids, so leave room for both.
MAX_BUCKETS = 2_000_000_000
_DEFAULT_OF_GROWING = {
    field.name: field.default
    for field in dataclasses.fields(FeatureConfig)
    if field.name in GROWING_KEYS
}
# What features that share a table must agree on.
_OF_TABLE = ("emb_dim", "hash_bucket_size", "init_std", *GROWING_KEYS)


def validate(config: Config) -> None:
    """Refuses what no run could use.

    Raises:
      UserError: naming the dotted path, what was expected and what was found.
    """
    _check_types(config, "")
    _check_addresses(config)
    _check_io(config)
    _check_features(config)
    _check_model(config)
    _check_lr(config)
    _check_loss(config)
    _check_train(config)
    _check_eval(config)


def _check_addresses(config: Config) -> None:
    """Every key with a text but those of features, whose texts name columns."""
    for section in dataclasses.fields(config):
        settings = getattr(config, section.name)
        if dataclasses.is_dataclass(settings):
            refuse_addresses_in(settings, f"{section.name}.")


def _require(ok: bool, path: str, expected: str, found: Any) -> None:
    if not ok:
        raise UserError(f"{path}: expected {expected}, found {found!r}")


def _check_types(value: Any, prefix: str) -> None:
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        path, item = prefix + field.name, getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            _check_types(item, path + ".")
        elif path == "features":
            _require(isinstance(item, tuple), path, "a tuple of FeatureConfig", item)
            for i, feature in enumerate(item):
                _require(
                    isinstance(feature, FeatureConfig), f"{path}.{i}", "a FeatureConfig", feature
                )
                _check_types(feature, f"{path}.{i}.")
        else:
            _require(_fits(item, hints[field.name]), path, spell(hints[field.name]), item)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        kinds = [args[0]] * len(value) if isinstance(value, tuple) and args[-1] is ... else args
        return (
            isinstance(value, tuple)
            and len(value) == len(kinds)
            and all(_fits(v, kind) for v, kind in zip(value, kinds, strict=True))
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def spell(hint: Any) -> str:
    """A type in words a user knows."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        kind = "one or more " if args[-1] is ... else f"{len(args)} "
        return kind + spell(args[0]) + " values"
    if hint is bool:
        return "True or False"
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell(arg) for arg in args)
    if hint is type(None):
        return "None"
    return {int: "a whole number", float: "a number", str: "text"}[hint]


def _check_io(config: Config) -> None:
    io_ = config.io
    for name in ("batch_size", "shuffle_rows", "shards", "windows"):
        _require(getattr(io_, name) >= 1, f"io.{name}", "at least 1", getattr(io_, name))
    for name in ("thread_num", "prefetch"):
        _require(getattr(io_, name) >= 0, f"io.{name}", "at least 0", getattr(io_, name))
    if io_.windows_per_epoch is not None:
        _require(
            io_.shuffle and 1 <= io_.windows_per_epoch < io_.windows,
            "io.windows_per_epoch",
            f"None, or at least 1 and fewer than io.windows ({io_.windows}), with io.shuffle",
            io_.windows_per_epoch,
        )
    if io_.packing is None:
        _require(
            1 in (io_.windows, io_.windows_per_epoch),
            "io.windows",
            "1 unless io.packing lets a user fill rows, or io.windows_per_epoch is 1",
            io_.windows,
        )
        return
    most = io_.batch_size * config.model.seq_len
    _require(
        io_.packing == "auto" or 1 <= io_.packing <= most,
        "io.packing",
        f"auto or 1 to {most:,}, the positions of a batch (io.batch_size x model.seq_len)",
        io_.packing,
    )
    _require(
        io_.layout == "dense",
        "io.layout",
        "dense with io.packing, which leaves little padding",
        io_.layout,
    )


def _check_features(config: Config) -> None:
    _require(len(config.features) > 0, "features", "at least one feature", config.features)
    first_of_table: dict[str, tuple[int, FeatureConfig]] = {}
    names: set[str] = set()
    for i, feature in enumerate(config.features):
        path = f"features.{i}"
        _require(feature.name not in names, f"{path}.name", "a name used once", feature.name)
        names.add(feature.name)
        _require(
            bool(re.fullmatch(r"[\w.-]+", feature.table_name)),
            f"{path}.{'name' if feature.shard_name is None else 'shard_name'}",
            "letters, digits, _, . and - (it names a table in checkpoints)",
            feature.table_name,
        )
        _require(feature.emb_dim >= 1, f"{path}.emb_dim", "at least 1", feature.emb_dim)
        _require(feature.bag_size >= 1, f"{path}.bag_size", "at least 1", feature.bag_size)
        _require(feature.init_std >= 0, f"{path}.init_std", "at least 0", feature.init_std)
        _check_op(feature, path)
        _check_rows(feature, path)
        j, other = first_of_table.setdefault(feature.table_name, (i, feature))
        for key in _OF_TABLE:
            _require(
                getattr(feature, key) == getattr(other, key),
                f"{path}.{key}",
                f"{getattr(other, key)} as in features.{j}, which has the same table",
                getattr(feature, key),
            )


def _check_rows(feature: FeatureConfig, path: str) -> None:
    rows = feature.hash_bucket_size
    _require(
        0 <= rows <= MAX_BUCKETS,
        f"{path}.hash_bucket_size",
        f"1 to {MAX_BUCKETS:,}, or 0 for a row for each id",
        rows,
    )
    if not feature.grows:
        for key, default in _DEFAULT_OF_GROWING.items():
            _require(
                getattr(feature, key) == default,
                f"{path}.{key}",
                f"{default}, because only tables with hash_bucket_size 0 grow",
                getattr(feature, key),
            )
        return
    for key in ("capacity", "admit_after", "evict_every"):
        _require(getattr(feature, key) >= 1, f"{path}.{key}", "at least 1", getattr(feature, key))
    _require(
        feature.admit_after <= MOST_SIGHTINGS,
        f"{path}.admit_after",
        f"at most {MOST_SIGHTINGS}",
        feature.admit_after,
    )
    for key in ("capacity", "max_capacity"):
        value = getattr(feature, key)
        _require(value is None or value <= 2**30, f"{path}.{key}", f"at most {2**30:,}", value)
    most = feature.max_capacity
    _require(
        most is None or most >= feature.capacity,
        f"{path}.max_capacity",
        f"at least capacity ({feature.capacity:,})",
        most,
    )
    _require(
        feature.unknown == "zeros" or feature.admit_after >= 2,
        f"{path}.admit_after",
        "at least 2, because unknown is default_row, which learns only from ids that wait to be "
        "admitted (or set unknown to zeros)",
        feature.admit_after,
    )
    after = feature.evict_after_steps
    _require(after is None or after >= 1, f"{path}.evict_after_steps", "at least 1", after)
    _require(feature.evict_below >= 0, f"{path}.evict_below", "at least 0", feature.evict_below)


def _check_op(feature: FeatureConfig, path: str) -> None:
    if feature.op == "id":
        _require(
            feature.boundaries is None, f"{path}.boundaries", "None with op id", feature.boundaries
        )
        return
    _require(
        feature.hash_type is None,
        f"{path}.hash_type",
        f"None with op {feature.op}",
        feature.hash_type,
    )
    least = {"time_gap": 3, "hour_of_day": 24, "day_of_week": 7}
    if feature.op == "bucketize":
        limits = feature.boundaries or ()
        _require(
            len(limits) > 0
            and all(math.isfinite(b) for b in limits)
            and all(a < b for a, b in itertools.pairwise(limits)),
            f"{path}.boundaries",
            "one or more rising numbers, because op is bucketize",
            feature.boundaries,
        )
        least["bucketize"] = len(limits) + 1
    else:
        _require(
            feature.bag_size == 1, f"{path}.bag_size", f"1 with op {feature.op}", feature.bag_size
        )
        _require(
            feature.boundaries is None,
            f"{path}.boundaries",
            f"None with op {feature.op}",
            feature.boundaries,
        )
    _require(
        feature.hash_bucket_size >= least[feature.op],
        f"{path}.hash_bucket_size",
        f"at least {least[feature.op]}, the values of op {feature.op}",
        feature.hash_bucket_size,
    )


def _check_model(config: Config) -> None:
    model = config.model
    for name in ("hidden_size", "num_layers", "nhead", "dim_feedforward"):
        _require(getattr(model, name) >= 1, f"model.{name}", "at least 1", getattr(model, name))
    _require(model.seq_len >= 2, "model.seq_len", "at least 2", model.seq_len)
    for name in ("dropout", "input_dropout"):
        _require(
            0 <= getattr(model, name) < 1, f"model.{name}", "0 to below 1", getattr(model, name)
        )
    _require(
        model.hidden_size % model.nhead == 0,
        "model.nhead",
        f"a divisor of model.hidden_size ({model.hidden_size})",
        model.nhead,
    )
    head_width = model.hidden_size // model.nhead
    _require(
        model.position != "rope" or head_width % 2 == 0,
        "model.position",
        f"learned or none, since heads have an odd width ({head_width})",
        model.position,
    )
    _require(
        model.unroll == "auto" or 1 <= model.unroll <= model.num_layers,
        "model.unroll",
        f"auto or 1 to model.num_layers ({model.num_layers})",
        model.unroll,
    )
    _require(
        model.attention != "cudnn" or model.dtype != "float32",
        "model.attention",
        "auto, blocked or xla, since cudnn does not compute in float32",
        model.attention,
    )


def _check_lr(config: Config) -> None:
    lr = config.lr
    for name in ("dense_lr", "sparse_lr", "weight_decay", "warmup_steps", "final_ratio"):
        _require(getattr(lr, name) >= 0, f"lr.{name}", "at least 0", getattr(lr, name))
    for name in ("beta1", "beta2"):
        _require(0 <= getattr(lr, name) < 1, f"lr.{name}", "0 to below 1", getattr(lr, name))
    _require(lr.eps > 0, "lr.eps", "more than 0", lr.eps)
    _require(lr.clip_norm is None or lr.clip_norm > 0, "lr.clip_norm", "more than 0", lr.clip_norm)
    if lr.decay != "constant":
        _require(
            lr.decay_steps is None or lr.decay_steps > lr.warmup_steps,
            "lr.decay_steps",
            f"more than lr.warmup_steps ({lr.warmup_steps}) because lr.decay is {lr.decay}",
            lr.decay_steps,
        )


def _check_loss(config: Config) -> None:
    names = [f.name for f in config.features]
    loss = config.loss
    listed = ", ".join(names)
    _require(loss.num_negatives >= 1, "loss.num_negatives", "at least 1", loss.num_negatives)
    _require(
        not loss.log_q or loss.negatives in ("in_batch", "mixed"),
        "loss.log_q",
        f"False with loss.negatives {loss.negatives}, whose candidates come up equally often",
        loss.log_q,
    )
    _require(
        loss.log_q or loss.log_q_from == "catalogue",
        "loss.log_q_from",
        "catalogue where loss.log_q is False, which has no use for what is counted",
        loss.log_q_from,
    )
    _require(loss.temperature > 0, "loss.temperature", "more than 0", loss.temperature)
    _require(
        loss.item_feature in names, "loss.item_feature", f"a feature ({listed})", loss.item_feature
    )
    if loss.needs_catalogue or config.eval.every_steps is not None:
        i = names.index(loss.item_feature)
        for key, expected in (("op", "id"), ("bag_size", 1)):
            found = getattr(config.features[i], key)
            _require(
                found == expected,
                f"features.{i}.{key}",
                f"{expected}, because {loss.item_feature} is loss.item_feature and an item of the "
                f"catalogue, which the loss or eval.every_steps needs, has one id",
                found,
            )
    if loss.target_features is not None:
        _require(len(loss.target_features) > 0, "loss.target_features", "one or more", ())
        for name in loss.target_features:
            _require(name in names, "loss.target_features", f"features ({listed})", name)
    shown = {config.feature(name).column_name for name in config.target_features}
    for i, feature in enumerate(config.features):
        _require(
            not feature.of_next or feature.column_name not in shown,
            f"features.{i}.of_next",
            f"False for columns that scored events show ({', '.join(sorted(shown))}), which would give "
            "the event away",
            feature.of_next,
        )


def _check_train(config: Config) -> None:
    train = config.train
    for name in ("log_steps", "save_steps", "max_to_keep", "gradient_accumulation_steps"):
        _require(getattr(train, name) >= 1, f"train.{name}", "at least 1", getattr(train, name))
    for name in ("train_steps", "train_epoch"):
        value = getattr(train, name)
        _require(value is None or value >= 1, f"train.{name}", "at least 1", value)
    if train.train_steps is None and train.train_epoch is None:
        raise UserError(
            "train.train_steps: expected this or train.train_epoch to end the run, found neither"
        )
    if train.profile_steps is not None:
        first, last = train.profile_steps
        _require(1 <= first <= last, "train.profile_steps", "first <= last", train.profile_steps)


def _check_split(config: Config) -> None:
    settings = config.eval
    for name in ("split_at", "validation_at"):
        text = getattr(settings, name)
        if text is not None:
            expected = _expected_instead(text)
            _require(expected is None, f"eval.{name}", str(expected), text)
    split, validation = settings.split_at, settings.validation_at
    if split is None:
        _require(validation is None, "eval.validation_at", "None without eval.split_at", validation)
        return
    _require(
        settings.held_out == 0,
        "eval.held_out",
        f"0 because eval.split_at ({split}) holds events out",
        settings.held_out,
    )
    names = [f.name for f in config.features]
    _require(
        settings.time_feature in names,
        "eval.time_feature",
        f"a feature ({', '.join(names)}) that has times, because eval.split_at is set",
        settings.time_feature,
    )
    if validation is None:
        _require(
            settings.every_steps is None,
            "eval.validation_at",
            f"a time before eval.split_at ({split}) because eval.every_steps is set",
            validation,
        )
    else:
        _require(
            seconds_of(validation) < seconds_of(split),
            "eval.validation_at",
            f"a time before eval.split_at ({split})",
            validation,
        )


def _expected_instead(text: str) -> str | None:
    """What should stand instead of `text`, which should be a time; None if it is one."""
    try:
        return meant_instead(text)
    except ValueError:
        return "a time such as 2000-12-01, 2000-12-01T12:00 (UTC) or seconds since 1970"


def _check_eval(config: Config) -> None:
    settings = config.eval
    for name in ("batch_size", "max_users", "every_steps", "patience"):
        value = getattr(settings, name)
        _require(value in (None, "auto") or value >= 1, f"eval.{name}", "at least 1", value)
    _require(settings.held_out >= 0, "eval.held_out", "at least 0", settings.held_out)
    _check_split(config)
    if settings.every_steps is not None and settings.split_at is None:
        _require(
            settings.held_out >= 1,
            "eval.held_out",
            "at least 1 (or a time as eval.split_at) because eval.every_steps is set",
            settings.held_out,
        )
    _require(
        bool(re.fullmatch(r"mrr|(hr|ndcg|recall)@(5|10|50|100|200)", settings.metric)),
        "eval.metric",
        "mrr, or hr, ndcg or recall @ 5, 10, 50, 100 or 200",
        settings.metric,
    )
