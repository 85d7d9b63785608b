"""Every knob of s2s_jax: typed, documented, validated.

A config file is Python with a function `get_config() -> Config`; it derives from another one by
`load_file` and `dataclasses.replace`. `load` adds dotted overrides from the command line:

    config = load("configs/base.py", ["--model.num_layers", "4"])
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import tyro

from s2s_jax.errors import UserError

# Rows are addressed by int32 and the rows past the end mark missing ids, so leave room for both.
MAX_BUCKETS = 2_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class IOConfig:
    """Which logs are read, and how they become batches."""

    data_paths: str = ""
    """ORC files and directories, separated by commas. In a directory (searched recursively) the
    files ending in .orc are taken or, where there are none, all files; names starting with . or _
    are passed over"""
    batch_size: int = 16
    """Rows (users) of one device in one forward pass. An optimizer step consumes batch_size x
    devices x train.gradient_accumulation_steps rows"""
    thread_num: int = 2
    """Threads that read and decode batches; 0 reads in the main thread"""
    prefetch: int = 4
    """Batches that wait, ready, ahead of the training step"""
    drop_remainder: bool = False
    """Drop the last, partial batch of an epoch; otherwise rows that weigh nothing fill it"""
    shuffle: bool = True
    """Permute stripes, and rows within windows of shuffle_rows, anew in each epoch"""
    shuffle_rows: int = 4096
    """Rows decoded and shuffled together; memory grows with it"""
    seed: int = 42
    """Seed of the order of rows"""
    truncate_side: Literal["left", "right"] = "left"
    """Which end of a sequence longer than model.seq_len is dropped: left keeps the newest"""
    check_length: bool = False
    """Refuse sequences longer than model.seq_len instead of truncating them"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """One column of the logs and the embedding table that its ids look up."""

    name: str
    """Column of the ORC files: list<T> or list<list<T>> of integers or strings"""
    emb_dim: int = 128
    """Width of the embedding"""
    hash_type: Literal["murmur"] | None = None
    """How ids are hashed: murmur (MurmurHash64A, seed 0; an integer hashes as its 8 little-endian
    bytes) or None (integers as they are)"""
    hash_bucket_size: int
    """Rows of the table: the id or its hash, as an unsigned 64-bit number, modulo this. Without a
    hash, ids below it have a row each and larger ones wrap around"""
    shard_name: str | None = None
    """Name of the table; features that give the same name share it. None: the feature's own name"""
    combiner: Literal["mean", "sum"] = "mean"
    """How the embeddings of the several ids of a position become one"""
    bag_size: int = 1
    """Most ids that a position may hold; a fuller one is refused"""
    init_std: float = 0.001
    """Standard deviation of the truncated normal that initialises the table"""

    @property
    def table_name(self) -> str:
        """The table that this feature reads."""
        return self.name if self.shard_name is None else self.shard_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The causal transformer."""

    seq_len: int = 1024
    """Positions of a sequence; longer ones are truncated, shorter ones padded"""
    hidden_size: int = 1024
    """Width of the transformer"""
    num_layers: int = 8
    """Transformer layers"""
    nhead: int = 8
    """Attention heads; must divide hidden_size"""
    dim_feedforward: int = 1024
    """Width of the feed-forward layers"""
    dropout: float = 0.1
    """Dropout after the attention, after its projection and after the feed-forward"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that the dense part computes in; parameters, layer norms and the loss stay float32. auto:
    float32 on a CPU, bfloat16 elsewhere"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LRConfig:
    """The optimizers: AdamW for the dense part, sparse-row AdamW for the tables."""

    dense_lr: float = 1e-3
    """Peak learning rate of the dense part"""
    sparse_lr: float = 1e-3
    """Peak learning rate of the tables"""
    beta1: float = 0.9
    """Decay of the first moments"""
    beta2: float = 0.999
    """Decay of the second moments"""
    eps: float = 1e-8
    """Added to the root of the second moments"""
    weight_decay: float = 0.01
    """Decoupled weight decay; a table's row decays only in the steps that use it"""
    warmup_steps: int = 0
    """Steps over which both rates rise linearly from 0"""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the rates after the warm-up"""
    decay_steps: int | None = None
    """Step at which the decay ends; needed unless decay is constant"""
    final_ratio: float = 0.0
    """The rates at the end of the decay, relative to their peaks"""
    clip_norm: float | None = None
    """Largest global norm of the gradient, dense part and rows together; None: no clipping"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Softmax over cosine similarities between predictions and the events of the batch."""

    pairing: Literal["next", "previous"] = "next"
    """What a position is scored against: the event after it, or (as the RecIS example does) the
    event before it, which attention has already seen"""
    temperature: float = 0.05
    """Similarities are divided by this before the softmax"""
    mask_padding: bool = True
    """Leave padding out of queries, positives and negatives"""
    mask_same_item: bool = True
    """Do not count other events with the positive's item as negatives"""
    item_feature: str = "item_id"
    """The feature that says which item an event is about"""
    target_features: tuple[str, ...] | None = ("item_id", "cate_id")
    """Features that the scored events show; the others are zeroed because they are unknown when
    recommending. None: all"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    output_dir: str = "runs/default"
    """Run directory: config.json, metrics.jsonl, checkpoints/, tensorboard/. A directory with
    checkpoints is continued from the newest one"""
    train_steps: int | None = None
    """Optimizer steps in all; None: as many as train_epoch gives"""
    train_epoch: int | None = None
    """Passes over the data; None: as many as train_steps needs. The sooner of the two ends the run"""
    log_steps: int = 10
    """Steps between lines of metrics.jsonl; loss and hit_rate are means over them"""
    save_steps: int = 2000
    """Steps between checkpoints; the last step is always saved"""
    max_to_keep: int = 5
    """Newest checkpoints kept"""
    gradient_accumulation_steps: int = 1
    """Forward passes of batch_size rows a device that make one optimizer step, equal to one pass
    over all their rows (negatives included) at the memory of one and an additional forward pass"""
    seed: int = 42
    """Seed of the initial weights and of dropout"""
    tensorboard: bool = True
    """Write TensorBoard event files"""
    profile_steps: tuple[int, int] | None = None
    """First and last step of a profile written to output_dir/profile; None: no profile"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole training job."""

    io: IOConfig = IOConfig()
    features: tuple[FeatureConfig, ...] = ()
    model: ModelConfig = ModelConfig()
    lr: LRConfig = LRConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()

    def feature(self, name: str) -> FeatureConfig:
        """The feature called `name`, which must exist."""
        (feature,) = (f for f in self.features if f.name == name)
        return feature

    @property
    def target_features(self) -> tuple[str, ...]:
        """Names of the features that scored events show, in the order of `features`."""
        names = [f.name for f in self.features]
        shown = self.loss.target_features
        return tuple(n for n in names if shown is None or n in shown)

    def to_json(self) -> str:
        """The resolved configuration as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


# ---------------------------------------------------------------------------------- loading

_SECTION_OF_CLASS = {
    "IOConfig": "io.",
    "FeatureConfig": "features.N.",
    "ModelConfig": "model.",
    "LRConfig": "lr.",
    "LossConfig": "loss.",
    "TrainConfig": "train.",
    "Config": "",
}


def load_file(path: str | Path) -> Config:
    """Runs the config file at `path` and returns what its `get_config()` returns, not validated.

    Raises:
      UserError: the file is missing, fails, has no `get_config`, or uses a key that does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config: {path} is no file; give a config such as configs/base.py")
    spec = importlib.util.spec_from_file_location(f"s2s_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {path} is not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config: {path} defines no get_config() -> Config")
        config = module.get_config()
    except UserError:
        raise
    except TypeError as error:
        raise UserError(_explain_keyword(path, error)) from error
    except Exception as error:
        raise UserError(f"--config: {path} failed with {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(
            f"--config: get_config() of {path} returned {type(config).__name__}, expected Config"
        )
    return config


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The config file at `path` with `overrides` (`["--model.nhead", "4", …]`) applied, validated.

    Raises:
      UserError: an unknown key or an impossible value, named by its dotted path.
    """
    config = load_file(path)
    if overrides:
        config = _override(config, overrides)
    validate(config)
    return config


def print_help(config: Config, prog: str) -> None:
    """Prints every key with its type, default (the value in `config`) and meaning."""
    with contextlib.suppress(SystemExit):
        _parse(config, ["--help"], prog)


def _parse(config: Config, arguments: list[str], prog: str) -> Config:
    return tyro.cli(
        Config,
        default=config,
        args=arguments,
        prog=prog,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        use_underscores=True,
    )


def _override(config: Config, arguments: list[str]) -> Config:
    known = _hints(config)
    groups: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--"):
            key = _key(argument)
            if key not in known:
                raise UserError(f"{key}: no such key{_suggest(key, known)}")
            groups.append([argument])
        elif groups:
            groups[-1].append(argument)
        else:
            raise UserError(f"{argument}: expected --section.key value; --help lists all keys")
    parsed = _parse_quietly(config, arguments)
    if parsed is not None:
        return parsed
    for group in groups:
        if _parse_quietly(config, group) is None:
            found = " ".join(group[0].split("=")[1:] + group[1:]) or "nothing"
            key = _key(group[0])
            raise UserError(f"{key}: expected {_spell(known[key])}, found {found}")
    raise UserError(f"{' '.join(arguments)}: cannot be read together; --help lists all keys")


def _key(argument: str) -> str:
    return argument[2:].split("=")[0].replace("-", "_")


def _parse_quietly(config: Config, arguments: list[str]) -> Config | None:
    silence = io.StringIO()
    try:
        with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
            return _parse(config, arguments, "s2s_jax")
    except SystemExit:
        return None


def _hints(config: Any, prefix: str = "") -> dict[str, Any]:
    """The type of each leaf of a config by dotted path."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        value, path = getattr(config, name), prefix + name
        if dataclasses.is_dataclass(value):
            hints |= _hints(value, path + ".")
        elif name == "features":
            for i, feature in enumerate(value):
                hints |= _hints(feature, f"{path}.{i}.")
        else:
            hints[path] = hint
    return hints


def _explain_keyword(path: Path, error: TypeError) -> str:
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found or found.group(1) not in _SECTION_OF_CLASS:
        return f"--config: {path} failed with TypeError: {error}"
    cls = globals()[found.group(1)]
    section, key = _SECTION_OF_CLASS[found.group(1)], found.group(2)
    names = [f.name for f in dataclasses.fields(cls)]
    return f"{section}{key}: no such key in {path}{_suggest(key, names)}"


def _suggest(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; --help lists all keys"


# ------------------------------------------------------------------------------- validation


def validate(config: Config) -> None:
    """Refuses what no run could use.

    Raises:
      UserError: naming the dotted path, what was expected and what was found.
    """
    _check_types(config, "")
    _check_io(config)
    _check_features(config)
    _check_model(config)
    _check_lr(config)
    _check_loss(config)
    _check_train(config)


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
            _require(_fits(item, hints[field.name]), path, _spell(hints[field.name]), item)


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


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        kind = "one or more " if args[-1] is ... else f"{len(args)} "
        return kind + _spell(args[0]) + " values"
    if hint is bool:
        return "True or False"
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(arg) for arg in args)
    if hint is type(None):
        return "None"
    return {int: "a whole number", float: "a number", str: "text"}[hint]


def _check_io(config: Config) -> None:
    io_ = config.io
    for name in ("batch_size", "shuffle_rows"):
        _require(getattr(io_, name) >= 1, f"io.{name}", "at least 1", getattr(io_, name))
    for name in ("thread_num", "prefetch"):
        _require(getattr(io_, name) >= 0, f"io.{name}", "at least 0", getattr(io_, name))


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
        if feature.hash_bucket_size == 0:
            raise UserError(
                f"{path}.hash_bucket_size: 0 asks for a collision-free table, which this version "
                f"does not have; give {feature.name} a number of buckets"
            )
        _require(
            1 <= feature.hash_bucket_size <= MAX_BUCKETS,
            f"{path}.hash_bucket_size",
            f"1 to {MAX_BUCKETS:,}",
            feature.hash_bucket_size,
        )
        j, other = first_of_table.setdefault(feature.table_name, (i, feature))
        for key in ("emb_dim", "hash_bucket_size", "init_std"):
            _require(
                getattr(feature, key) == getattr(other, key),
                f"{path}.{key}",
                f"{getattr(other, key)} as in features.{j}, which has the same table",
                getattr(feature, key),
            )


def _check_model(config: Config) -> None:
    model = config.model
    for name in ("hidden_size", "num_layers", "nhead", "dim_feedforward"):
        _require(getattr(model, name) >= 1, f"model.{name}", "at least 1", getattr(model, name))
    _require(model.seq_len >= 2, "model.seq_len", "at least 2", model.seq_len)
    _require(0 <= model.dropout < 1, "model.dropout", "0 to below 1", model.dropout)
    _require(
        model.hidden_size % model.nhead == 0,
        "model.nhead",
        f"a divisor of model.hidden_size ({model.hidden_size})",
        model.nhead,
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
            lr.decay_steps is not None and lr.decay_steps > lr.warmup_steps,
            "lr.decay_steps",
            f"more than lr.warmup_steps ({lr.warmup_steps}) because lr.decay is {lr.decay}",
            lr.decay_steps,
        )


def _check_loss(config: Config) -> None:
    names = [f.name for f in config.features]
    loss = config.loss
    listed = ", ".join(names)
    _require(loss.temperature > 0, "loss.temperature", "more than 0", loss.temperature)
    _require(
        loss.item_feature in names, "loss.item_feature", f"a feature ({listed})", loss.item_feature
    )
    if loss.target_features is not None:
        _require(len(loss.target_features) > 0, "loss.target_features", "one or more", ())
        for name in loss.target_features:
            _require(name in names, "loss.target_features", f"features ({listed})", name)


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
