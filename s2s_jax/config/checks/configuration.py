"""Refuses impossible configurations: checks the types of all values, then section by section."""

import dataclasses
import math
import re
import typing

from s2s_jax.config.checks.addresses import refuse_addresses_in
from s2s_jax.config.checks.features import check_features, check_tables
from s2s_jax.config.checks.loss import check_initial_items, check_loss
from s2s_jax.config.checks.values import fits, require, spell
from s2s_jax.config.features import FeatureConfig, TableConfig
from s2s_jax.config.kinds import ByTime, Constant, Crop, LastEvents, Pack
from s2s_jax.config.old import keys as old_keys
from s2s_jax.config.plain import Dataclass
from s2s_jax.config.schema import Config, EvalConfig
from s2s_jax.config.times import meant_instead, seconds_of
from s2s_jax.errors import UserError


def validate(config: Config) -> None:
    """Refuses impossible configurations.

    Raises:
      UserError: names the dotted path, and says what was expected and found.
    """
    _check_types(config, "")
    _check_addresses(config)
    validate_reading(config)
    _check_lr(config)
    _check_train(config)


def validate_reading(config: Config) -> None:
    """Refuses settings with which no log could be read, regardless of paths and training.

    Raises:
      UserError: see `validate`.
    """
    _check_types(config, "")
    _check_io(config)
    check_features(config)
    check_tables(config)
    _check_model(config)
    check_loss(config)
    check_initial_items(config)
    _check_eval(config)


def _check_types(value: Dataclass, prefix: str) -> None:
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
                _check_types(typing.cast(Dataclass, item), path + ".")


def _check_types_of_each(path: str, items: object, cls: type) -> None:
    require(isinstance(items, tuple), path, f"a tuple of {cls.__name__}", items)
    for i, item in enumerate(typing.cast(tuple[Dataclass, ...], items)):
        require(isinstance(item, cls), f"{path}.{i}", f"a {cls.__name__}", item)
        _check_types(item, f"{path}.{i}.")


def _check_addresses(config: Config) -> None:
    """Checks all text keys except those of features and tables, which are names."""
    for section in dataclasses.fields(config):
        if section.name not in ("features", "tables"):
            refuse_addresses_in(getattr(config, section.name), f"{section.name}.")


def _check_io(config: Config) -> None:
    io_ = config.io
    for name in ("batch_size", "shuffle_rows", "shards"):
        require(getattr(io_, name) >= 1, f"io.{name}", "at least 1", getattr(io_, name))
    for name in ("thread_num", "prefetch"):
        require(getattr(io_, name) >= 0, f"io.{name}", "at least 0", getattr(io_, name))
    sequences = io_.sequences
    if isinstance(sequences, Crop):
        require(
            sequences.windows >= 2,
            "io.sequences.windows",
            "at least 2, since io.sequences is crop (truncate keeps one)",
            sequences.windows,
        )
        require(
            io_.shuffle,
            "io.shuffle",
            "True, since io.sequences is crop, which cuts rows at random places",
            io_.shuffle,
        )
    if isinstance(sequences, Pack):
        _check_packing(config, sequences)


def _check_packing(config: Config, pack: Pack) -> None:
    io_ = config.io
    most = io_.batch_size * config.model.seq_len
    require(pack.windows >= 1, "io.sequences.windows", "at least 1", pack.windows)
    if pack.windows_per_epoch is not None:
        require(
            io_.shuffle and 1 <= pack.windows_per_epoch < pack.windows,
            "io.sequences.windows_per_epoch",
            f"None, or at least 1 and fewer than io.sequences.windows ({pack.windows}), with "
            f"io.shuffle",
            pack.windows_per_epoch,
        )
    require(
        pack.rows == "auto" or 1 <= pack.rows <= most,
        "io.sequences.rows",
        f"auto or 1 to {most:,}, the positions of a batch (io.batch_size x model.seq_len)",
        pack.rows,
    )
    require(
        io_.layout == "dense",
        "io.layout",
        "dense, since io.sequences is pack, which leaves little padding",
        io_.layout,
    )


def _check_model(config: Config) -> None:
    model = config.model
    for name in ("hidden_size", "num_layers", "nhead", "dim_feedforward"):
        require(getattr(model, name) >= 1, f"model.{name}", "at least 1", getattr(model, name))
    require(model.seq_len >= 2, "model.seq_len", "at least 2", model.seq_len)
    for name in ("dropout", "input_dropout", "event_dropout"):
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
    biased = model.distance_bias or model.time_bias is not None
    require(
        model.attention != "cudnn" or not (biased or model.layer == "hstu"),
        "model.attention",
        "auto, blocked or xla, since cudnn is not used with model.distance_bias, model.time_bias or "
        "model.layer hstu",
        model.attention,
    )
    require(
        model.feed_forward == "gelu" or model.layer == "transformer",
        "model.feed_forward",
        f"gelu (the default), since layers of kind {model.layer} have no feed-forward part",
        model.feed_forward,
    )


def _check_lr(config: Config) -> None:
    lr = config.lr
    for name in ("dense_lr", "sparse_lr", "weight_decay", "warmup_steps"):
        require(getattr(lr, name) >= 0, f"lr.{name}", "at least 0", getattr(lr, name))
    for name in ("beta1", "beta2"):
        require(0 <= getattr(lr, name) < 1, f"lr.{name}", "0 to below 1", getattr(lr, name))
    require(0 < lr.layer_decay <= 1, "lr.layer_decay", "more than 0, up to 1", lr.layer_decay)
    require(lr.eps > 0, "lr.eps", "more than 0", lr.eps)
    require(lr.clip_norm is None or lr.clip_norm > 0, "lr.clip_norm", "more than 0", lr.clip_norm)
    require(
        lr.average_decay is None or 0 < lr.average_decay < 1,
        "lr.average_decay",
        "None, or more than 0 and less than 1",
        lr.average_decay,
    )
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
    of_paths = {
        "train.output_dir": train.output_dir,
        "io.cache": config.io.cache,
        "loss.catalogue": config.loss.catalogue,
    }
    for key, path in of_paths.items():
        # It would be the current directory.
        require(path != "", key, "a path", path)
    if train.profile_steps is not None:
        first, last = train.profile_steps
        require(1 <= first <= last, "train.profile_steps", "first <= last", train.profile_steps)


def _check_split(config: Config) -> None:
    settings, split = config.eval, config.eval.split
    if split is None:
        if settings.every_steps is not None:
            raise UserError(
                "eval.split: expected last_events or by_time because eval.every_steps is set, found "
                "none; hold events out, or set eval.every_steps to None"
            )
    elif isinstance(split, LastEvents):
        require(split.events >= 1, "eval.split.events", "at least 1", split.events)
    else:
        _check_split_by_time(config, split)


def _check_split_by_time(config: Config, split: ByTime) -> None:
    for name in ("at", "validation_at"):
        text = getattr(split, name)
        if text is not None:
            expected = _expected_instead(text)
            require(expected is None, f"eval.split.{name}", str(expected), text)
    names = [f.name for f in config.features]
    require(
        split.feature in names,
        "eval.split.feature",
        f"a feature ({', '.join(names)}) that has times, because eval.split is by_time",
        split.feature,
    )
    if split.validation_at is None:
        require(
            config.eval.every_steps is None,
            "eval.split.validation_at",
            f"a time before eval.split.at ({split.at}) because eval.every_steps is set",
            split.validation_at,
        )
    else:
        require(
            seconds_of(split.validation_at) < seconds_of(split.at),
            "eval.split.validation_at",
            f"a time before eval.split.at ({split.at})",
            split.validation_at,
        )


def _expected_instead(text: str) -> str | None:
    """A description of what was expected instead of `text`; None if `text` is a valid time."""
    try:
        return meant_instead(text)
    except ValueError:
        return "a time such as 2000-12-01, 2000-12-01T12:00 (UTC) or seconds since 1970"


def _check_eval(config: Config) -> None:
    settings = config.eval
    for name in ("batch_size", "max_users", "every_steps", "patience"):
        value = getattr(settings, name)
        require(value in (None, "auto") or value >= 1, f"eval.{name}", "at least 1", value)
    _check_split(config)
    _check_neighbours(settings)
    require(
        bool(re.fullmatch(r"mrr|(hr|ndcg|recall)@(5|10|50|100|200)", settings.metric)),
        "eval.metric",
        "mrr, or hr, ndcg or recall @ 5, 10, 50, 100 or 200",
        settings.metric,
    )


def _check_neighbours(settings: EvalConfig) -> None:
    weight = settings.neighbours
    if weight == "auto":
        require(
            settings.every_steps is not None,
            "eval.every_steps",
            "auto or a number of steps, because eval.neighbours is auto and evaluations during training "
            "choose the weight (or give eval.neighbours a number)",
            settings.every_steps,
        )
    else:
        require(
            0 <= weight < math.inf,
            "eval.neighbours",
            "auto or a finite number of at least 0",
            weight,
        )
