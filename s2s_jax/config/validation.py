"""Refuses what no run could use, naming the dotted path."""

import dataclasses
import re
import typing
from typing import Any

from s2s_jax.config import old_keys
from s2s_jax.config.addresses import refuse_addresses_in
from s2s_jax.config.checks import fits, require, spell
from s2s_jax.config.decay import Constant
from s2s_jax.config.feature_checks import check_features, check_tables
from s2s_jax.config.features import FeatureConfig, TableConfig
from s2s_jax.config.schema import Config
from s2s_jax.config.times import meant_instead, seconds_of
from s2s_jax.errors import UserError


def validate(config: Config) -> None:
    """Refuses what no run could use.

    Raises:
      UserError: naming the dotted path, what was expected and what was found.
    """
    _check_types(config, "")
    _check_addresses(config)
    _check_io(config)
    check_features(config)
    check_tables(config)
    _check_model(config)
    _check_lr(config)
    _check_loss(config)
    _check_train(config)
    _check_eval(config)


def _check_types(value: Any, prefix: str) -> None:
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        path, item = prefix + field.name, getattr(value, field.name)
        if path == "features":
            _check_types_of_each(path, item, FeatureConfig)
        elif path == "tables":
            _check_types_of_each(path, item, TableConfig)
        else:
            expected = spell(hints[field.name]) + old_keys.of_value(path, str(item))
            require(fits(item, hints[field.name]), path, expected, item)
            if dataclasses.is_dataclass(item):
                _check_types(item, path + ".")


def _check_types_of_each(path: str, items: Any, cls: type) -> None:
    require(isinstance(items, tuple), path, f"a tuple of {cls.__name__}", items)
    for i, item in enumerate(items):
        require(isinstance(item, cls), f"{path}.{i}", f"a {cls.__name__}", item)
        _check_types(item, f"{path}.{i}.")


def _check_addresses(config: Config) -> None:
    """Every key with a text but those of features, whose texts name columns."""
    for section in dataclasses.fields(config):
        settings = getattr(config, section.name)
        if dataclasses.is_dataclass(settings):
            refuse_addresses_in(settings, f"{section.name}.")


def _check_io(config: Config) -> None:
    io_ = config.io
    for name in ("batch_size", "shuffle_rows", "shards", "windows"):
        require(getattr(io_, name) >= 1, f"io.{name}", "at least 1", getattr(io_, name))
    for name in ("thread_num", "prefetch"):
        require(getattr(io_, name) >= 0, f"io.{name}", "at least 0", getattr(io_, name))
    if io_.windows_per_epoch is not None:
        require(
            io_.shuffle and 1 <= io_.windows_per_epoch < io_.windows,
            "io.windows_per_epoch",
            f"None, or at least 1 and fewer than io.windows ({io_.windows}), with io.shuffle",
            io_.windows_per_epoch,
        )
    if io_.packing is None:
        require(
            1 in (io_.windows, io_.windows_per_epoch),
            "io.windows",
            "1 unless io.packing lets a user fill rows, or io.windows_per_epoch is 1",
            io_.windows,
        )
        return
    most = io_.batch_size * config.model.seq_len
    require(
        io_.packing == "auto" or 1 <= io_.packing <= most,
        "io.packing",
        f"auto or 1 to {most:,}, the positions of a batch (io.batch_size x model.seq_len)",
        io_.packing,
    )
    require(
        io_.layout == "dense",
        "io.layout",
        "dense with io.packing, which leaves little padding",
        io_.layout,
    )


def _check_model(config: Config) -> None:
    model = config.model
    for name in ("hidden_size", "num_layers", "nhead", "dim_feedforward"):
        require(getattr(model, name) >= 1, f"model.{name}", "at least 1", getattr(model, name))
    require(model.seq_len >= 2, "model.seq_len", "at least 2", model.seq_len)
    for name in ("dropout", "input_dropout"):
        require(
            0 <= getattr(model, name) < 1, f"model.{name}", "0 to below 1", getattr(model, name)
        )
    require(
        model.hidden_size % model.nhead == 0,
        "model.nhead",
        f"a divisor of model.hidden_size ({model.hidden_size})",
        model.nhead,
    )
    head_width = model.hidden_size // model.nhead
    require(
        model.position != "rope" or head_width % 2 == 0,
        "model.position",
        f"learned or none, since heads have an odd width ({head_width})",
        model.position,
    )
    require(
        model.unroll == "auto" or 1 <= model.unroll <= model.num_layers,
        "model.unroll",
        f"auto or 1 to model.num_layers ({model.num_layers})",
        model.unroll,
    )
    require(
        model.attention != "cudnn" or model.dtype != "float32",
        "model.attention",
        "auto, blocked or xla, since cudnn does not compute in float32",
        model.attention,
    )


def _check_lr(config: Config) -> None:
    lr = config.lr
    for name in ("dense_lr", "sparse_lr", "weight_decay", "warmup_steps"):
        require(getattr(lr, name) >= 0, f"lr.{name}", "at least 0", getattr(lr, name))
    for name in ("beta1", "beta2"):
        require(0 <= getattr(lr, name) < 1, f"lr.{name}", "0 to below 1", getattr(lr, name))
    require(lr.eps > 0, "lr.eps", "more than 0", lr.eps)
    require(lr.clip_norm is None or lr.clip_norm > 0, "lr.clip_norm", "more than 0", lr.clip_norm)
    if not isinstance(lr.decay, Constant):
        require(
            lr.decay.final_ratio >= 0, "lr.decay.final_ratio", "at least 0", lr.decay.final_ratio
        )
        require(
            lr.decay.steps is None or lr.decay.steps > lr.warmup_steps,
            "lr.decay.steps",
            f"more than lr.warmup_steps ({lr.warmup_steps}) because lr.decay is {lr.decay.kind}",
            lr.decay.steps,
        )


def _check_loss(config: Config) -> None:
    names = [f.name for f in config.features]
    loss = config.loss
    listed = ", ".join(names)
    require(loss.num_negatives >= 1, "loss.num_negatives", "at least 1", loss.num_negatives)
    require(
        not loss.corrects or loss.negatives in ("in_batch", "mixed"),
        "loss.log_q",
        f"none with loss.negatives {loss.negatives}, whose candidates come up equally often",
        loss.log_q,
    )
    require(loss.temperature > 0, "loss.temperature", "more than 0", loss.temperature)
    require(
        loss.item_feature in names, "loss.item_feature", f"a feature ({listed})", loss.item_feature
    )
    if loss.needs_catalogue or config.eval.every_steps is not None:
        i = names.index(loss.item_feature)
        for key, expected in (("op", "id"), ("bag_size", 1)):
            found = getattr(config.features[i], key)
            require(
                found == expected,
                f"features.{i}.{key}",
                f"{expected}, because {loss.item_feature} is loss.item_feature and an item of the "
                f"catalogue, which the loss or eval.every_steps needs, has one id",
                found,
            )
    if loss.target_features is not None:
        require(len(loss.target_features) > 0, "loss.target_features", "one or more", ())
        for name in loss.target_features:
            require(name in names, "loss.target_features", f"features ({listed})", name)
    shown = {config.feature(name).column_name for name in config.target_features}
    for i, feature in enumerate(config.features):
        require(
            not feature.of_next or feature.column_name not in shown,
            f"features.{i}.of_next",
            f"False for columns that scored events show ({', '.join(sorted(shown))}), which would give "
            "the event away",
            feature.of_next,
        )


def _check_train(config: Config) -> None:
    train = config.train
    for name in ("log_steps", "save_steps", "max_to_keep", "gradient_accumulation_steps"):
        require(getattr(train, name) >= 1, f"train.{name}", "at least 1", getattr(train, name))
    for name in ("train_steps", "train_epoch"):
        value = getattr(train, name)
        require(value is None or value >= 1, f"train.{name}", "at least 1", value)
    if train.train_steps is None and train.train_epoch is None:
        raise UserError(
            "train.train_steps: expected this or train.train_epoch to end the run, found neither"
        )
    if train.profile_steps is not None:
        first, last = train.profile_steps
        require(1 <= first <= last, "train.profile_steps", "first <= last", train.profile_steps)


def _check_split(config: Config) -> None:
    settings = config.eval
    for name in ("split_at", "validation_at"):
        text = getattr(settings, name)
        if text is not None:
            expected = _expected_instead(text)
            require(expected is None, f"eval.{name}", str(expected), text)
    split, validation = settings.split_at, settings.validation_at
    if split is None:
        require(validation is None, "eval.validation_at", "None without eval.split_at", validation)
        return
    require(
        settings.held_out == 0,
        "eval.held_out",
        f"0 because eval.split_at ({split}) holds events out",
        settings.held_out,
    )
    names = [f.name for f in config.features]
    require(
        settings.time_feature in names,
        "eval.time_feature",
        f"a feature ({', '.join(names)}) that has times, because eval.split_at is set",
        settings.time_feature,
    )
    if validation is None:
        require(
            settings.every_steps is None,
            "eval.validation_at",
            f"a time before eval.split_at ({split}) because eval.every_steps is set",
            validation,
        )
    else:
        require(
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
        require(value in (None, "auto") or value >= 1, f"eval.{name}", "at least 1", value)
    require(settings.held_out >= 0, "eval.held_out", "at least 0", settings.held_out)
    _check_split(config)
    if settings.every_steps is not None and settings.split_at is None:
        require(
            settings.held_out >= 1,
            "eval.held_out",
            "at least 1 (or a time as eval.split_at) because eval.every_steps is set",
            settings.held_out,
        )
    require(
        bool(re.fullmatch(r"mrr|(hr|ndcg|recall)@(5|10|50|100|200)", settings.metric)),
        "eval.metric",
        "mrr, or hr, ndcg or recall @ 5, 10, 50, 100 or 200",
        settings.metric,
    )
