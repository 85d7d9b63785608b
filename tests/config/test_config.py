import dataclasses
import inspect
import json
import typing

import pytest
from places import REPO

from s2s_jax import config as configs
from s2s_jax.cli.commands.train import main
from s2s_jax.config import (
    Config,
    FeatureConfig,
    Linear,
    ModelConfig,
    TableConfig,
    TrainConfig,
    load,
    validate,
)
from s2s_jax.errors import UserError

CONFIGS = REPO / "configs"


def refusal(overrides, file="base.py"):
    with pytest.raises(UserError) as caught:
        load(CONFIGS / file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_json(path):
    config = load(path)
    assert json.loads(config.to_json())["model"]["seq_len"] == config.model.seq_len


def test_base_has_the_sizes_of_the_example():
    config = load(CONFIGS / "base.py")
    assert [(f.name, f.emb_dim) for f in config.features] == [
        (name, 128) for name in ("item_id", "cate_id", "behavior_id", "timestamp")
    ]
    sizes = [f.hash_bucket_size for f in config.features if f.name != "behavior_id"]
    assert sizes == [2_048_000, 2_048, 2_048_000]
    model = config.model
    assert (model.seq_len, model.hidden_size, model.num_layers) == (1024, 1024, 8)
    assert (model.nhead, model.dim_feedforward, model.dropout) == (8, 1024, 0.1)
    assert (config.train.log_steps, config.train.save_steps, config.train.max_to_keep) == (
        10,
        2000,
        5,
    )


def test_recis_flips_each_correction():
    base, recis = load(CONFIGS / "base.py"), load(CONFIGS / "recis.py")
    assert (base.loss.pairing, recis.loss.pairing) == ("next", "previous")
    assert (base.loss.temperature, recis.loss.temperature) == (0.05, 1.0)
    assert (base.loss.mask_padding, recis.loss.mask_padding) == (True, False)
    assert (base.loss.mask_same_item, recis.loss.mask_same_item) == (True, False)
    assert base.target_features == ("item_id", "cate_id")
    assert recis.target_features == tuple(f.name for f in recis.features)
    assert (base.io.truncate_side, recis.io.truncate_side) == ("left", "right")


def test_overrides_are_typed():
    config = load(
        CONFIGS / "base.py",
        [
            "--model.num_layers",
            "3",
            "--lr.dense_lr=1e-4",
            "--io.shuffle",
            "False",
            "--loss.target_features",
            "item_id",
            "timestamp",
            "--features.1.emb-dim",
            "7",
            "--train.train_epoch",
            "None",
            "--train.train_steps",
            "5",
            "--train.profile_steps",
            "2",
            "3",
        ],
    )
    assert (config.model.num_layers, config.lr.dense_lr, config.io.shuffle) == (3, 1e-4, False)
    assert config.loss.target_features == ("item_id", "timestamp")
    assert config.features[1].emb_dim == 7
    assert (config.train.train_epoch, config.train.train_steps) == (None, 5)
    assert config.train.profile_steps == (2, 3)


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["--model.nhaed", "4"], "model.nhaed", ["did you mean model.nhead?"]),
        (["--model.nhead", "3"], "model.nhead", ["model.hidden_size (1024)", "found 3"]),
        (["--model.nhead", "four"], "model.nhead", ["whole number", "found four"]),
        (["--model.nhead"], "model.nhead", ["found nothing"]),
        (["--model.dtype", "float16"], "model.dtype", ["auto, float32, bfloat16", "found float16"]),
        (["--model.dropout", "1.5"], "model.dropout", ["below 1", "found 1.5"]),
        (["--model.seq_len", "1"], "model.seq_len", ["at least 2"]),
        (["--features.0.hash_bucket_size", "-4"], "features.0.hash_bucket_size", ["found -4"]),
        (["--features.0.hash_bucket_size", "-1"], "features.0.hash_bucket_size", ["row for each id"]),
        (["--tables.0.admit_after", "2"], "tables.item_id.admit_after", ["hash_bucket_size 0"]),
        (["--tables.2.max_capacity", "9"], "tables.behavior_id.max_capacity", ["capacity (4,096)"]),
        (["--tables.behavior_id.evict_after_steps", "0"],
         "tables.behavior_id.evict_after_steps", ["at least 1"]),
        (["--tables.item_id.init_std", "-1"], "tables.item_id.init_std", ["at least 0"]),
        (["--tables.item.capacity", "9"], "tables.item.capacity", ["mean tables.item_id.capacity?"]),
        (["--tables.2.name", "behaviour"], "tables.4.name", ["behavior_id, time", "'behaviour'"]),
        (["--features.item_id.emb_dim", "x"], "features.item_id.emb_dim", ["whole", "found x"]),
        (["--features.9.emb_dim", "4"], "features.9.emb_dim", ["no such key"]),
        (["--features.1.shard_name", "item_id"], "features.1.hash_bucket_size", ["2048000"]),
        (["--features.1.name", "item_id"], "features.1.name", ["used once"]),
        (["--loss.target_features", "itme_id"], "loss.target_features", ["item_id", "itme_id"]),
        (["--features.1.of_next", "True"], "features.1.of_next", ["cate_id, item_id", "True"]),
        (["--features.3.column", "item_id", "--features.3.of_next", "True"],
         "features.3.of_next", ["give the target away"]),
        (["--loss.item_feature", "sku"], "loss.item_feature", ["timestamp", "'sku'"]),
        (["--loss.log_q", "maybe"], "loss.log_q", ["none, catalogue, stream", "found maybe"]),
        (["--loss.temperature", "0"], "loss.temperature", ["more than 0"]),
        (["--io.batch_size", "0"], "io.batch_size", ["at least 1"]),
        (["--lr.decay", "cosine", "--lr.decay.steps", "9", "--lr.warmup_steps", "9"],
         "lr.decay.steps", ["found 9"]),
        (["--lr.decay", "cosine", "--lr.decay.final_ratio", "-1"],
         "lr.decay.final_ratio", ["at least 0"]),
        (["--lr.decay", "cosin"], "lr.decay", ["one of constant, linear, cosine", "found cosin"]),
        (["--lr.decay"], "lr.decay", ["one of constant, linear, cosine", "found nothing"]),
        (["--lr.decay.steps", "9"], "lr.decay.steps", ["lr.decay is constant", "--lr.decay linear"]),
        (["--lr.decay", "cosine", "--lr.decay.stesp", "9"], "lr.decay.stesp",
         ["did you mean lr.decay.steps?"]),
        (["--lr.decay", "cosine", "--lr.decay.steps", "x"], "lr.decay.steps", ["whole", "found x"]),
        (["--loss.objective", "gbce"], "loss.objective", ["softmax", "in_batch", "uniform"]),
        (["--loss.next_events", "0"], "loss.next_events", ["1 to"]),
        (["--loss.next_events", "2", "--loss.pairing", "previous"], "loss.next_events", ["previous"]),
        (["--loss.later_weight", "0"], "loss.later_weight", ["more than 0"]),
        (["--loss.calibration", "2"], "loss.calibration", ["0 to 1"]),
        (["--loss.hard_negatives", "0", "--loss.negatives", "full"], "loss.hard_negatives",
         ["at least 1"]),
        (["--loss.hard_negatives", "9"], "loss.hard_negatives", ["in_batch"]),
        (["--loss.hard_negatives", "9", "--loss.negatives", "full", "--loss.objective", "gbce"],
         "loss.hard_negatives", ["gbce"]),
        (["--loss.hard_negatives", "9", "--loss.negatives", "mixed", "--loss.log_q", "stream"],
         "loss.hard_negatives", ["log_q"]),
        (["--loss.label_smoothing", "1"], "loss.label_smoothing", ["below 1"]),
        (["--lr.layer_decay", "0"], "lr.layer_decay", ["more than 0"]),
        (["--tables.item_id.lr_ratio", "-1"], "tables.item_id.lr_ratio", ["at least 0"]),
        (["--lr.average_decay", "1"], "lr.average_decay", ["less than 1"]),
        (["--lr.clip_norm", "0"], "lr.clip_norm", ["more than 0"]),
        (["--eval.neighbours", "-1"], "eval.neighbours", ["auto or a finite number", "found -1"]),
        (["--eval.neighbours", "inf"], "eval.neighbours", ["finite", "found inf"]),
        (["--eval.neighbours", "best"], "eval.neighbours", ["auto", "a number", "found best"]),
        (["--eval.neighbours", "auto"], "eval.every_steps", ["eval.neighbours is auto"]),
        (["--eval.neighbours", "auto", "--eval.every_steps", "auto"], "eval.split", ["found none"]),
        (["--train.train_epoch", "None"], "train.train_steps", ["train.train_epoch"]),
        (["--train.output_dir", ""], "train.output_dir", ["a path", "found ''"]),
        (["--io.cache", ""], "io.cache", ["a path", "found ''"]),
        (["--loss.catalogue", ""], "loss.catalogue", ["a path", "found ''"]),
        (["--train.profile_steps", "5", "2"], "train.profile_steps", ["first <= last"]),
        (["nhead", "3"], "nhead", ["--section.key"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_by_their_path(overrides, path, words):
    message = refusal(overrides)
    assert message.startswith(f"{path}: ")
    for word in words:
        assert word in message


def write_config(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(
        "from s2s_jax.config import *\nimport dataclasses\n"
        f"from pathlib import Path\nbase = load_file(Path({str(CONFIGS / 'base.py')!r}))\n" + body
    )
    return path


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def get_config(): return Config(model=ModelConfig(nhaed=4))",
         ["model.nhaed", "did you mean nhead?"]),
        ("def get_config(): return dataclasses.replace(base.io, batchsize=4)",
         ["io.batchsize", "did you mean batch_size?"]),
        ("def get_config(): return dataclasses.replace(base, modle=1)", ["modle", "model?"]),
        ("def get_config(): return dataclasses.replace(base, model=ModelConfig(nhead='4'))",
         ["model.nhead", "a whole number", "'4'"]),
        ("def get_config(): return dataclasses.replace(base, features=('item_id',))",
         ["features.0", "FeatureConfig"]),
        ("def get_config(): return dataclasses.replace(base, features=())", ["features", "one"]),
        ("def get_config(): return dataclasses.replace(base, tables=('item_id',))",
         ["tables.0", "TableConfig"]),
        ("tables = (TableConfig(name='x', capacity=9),)\n"
         "def get_config(): return dataclasses.replace(base, tables=tables)",
         ["tables.4.name", "item_id, cate_id, behavior_id, timestamp", "'x'"]),
        ("def get_config(): return dataclasses.replace(base, tables=2 * base.tables)",
         ["tables.1.name", "used once"]),
        ("def get_config(): return dataclasses.replace(base, tables=(TableConfig(name='x', capa=9),))",
         ["tables.NAME.capa", "did you mean capacity?"]),
        ("def get_config(): return dataclasses.replace(base, lr=LRConfig(decay='linear'))",
         ["lr.decay", "Constant(…) or Linear(…) or Cosine(…)", "'linear'"]),
        ("def get_config(): return dataclasses.replace(base, lr=LRConfig(decay=Linear(stesp=3)))",
         ["lr.decay.stesp", "did you mean steps?"]),
        ("def get_config(): return dataclasses.replace(base, lr=base.model)", ["lr", "LRConfig"]),
        ("def get_config(): return FeatureConfig(name='x')",
         ["features.N.hash_bucket_size", "found nothing", "FeatureConfig(hash_bucket_size=…)"]),
        ("def get_config(): return 3", ["returned int"]),
        ("x = 1", ["get_config"]),
        ("def get_config(): return 1 / 0", ["ZeroDivisionError"]),
        ("def get_config(:", ["SyntaxError"]),
    ],
)  # fmt: skip
def test_mistakes_in_config_files(tmp_path, body, words):
    path = write_config(tmp_path, body)
    with pytest.raises(UserError) as caught:
        load(path)
    for word in words:
        assert word in str(caught.value)


def test_missing_file_and_missing_flag(tmp_path):
    with pytest.raises(UserError, match="does not exist or is not a file"):
        load(tmp_path / "none.py")
    with pytest.raises(UserError, match="--config"):
        main([])


def test_help_shows_every_key_with_default_and_meaning(capsys):
    assert main(["--config", str(CONFIGS / "ml1m.py"), "--help"]) == 0
    shown = capsys.readouterr().out
    config = load(CONFIGS / "ml1m.py")
    keys = [
        f"--{section}.{field.name}"
        for section in ("io", "model", "lr", "loss", "train")
        for field in dataclasses.fields(getattr(config, section))
    ]
    keys += [f"--features.item_id.{field.name}" for field in dataclasses.fields(FeatureConfig)]
    keys += [f"--tables.item_id.{field.name}" for field in dataclasses.fields(TableConfig)]
    for key in keys:
        assert key in shown
    flat = " ".join(shown.replace("│", " ").split())
    assert "Attention heads. Must divide hidden_size (default: 2)" in flat


def dataclasses_in(cls):
    """A dataclass, and all dataclasses that its fields may hold."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for each in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(each):
                yield from dataclasses_in(each)


def test_every_key_is_documented():
    classes = list(dataclasses_in(Config))
    assert {FeatureConfig, TableConfig, ModelConfig, Linear} < set(classes)
    for section in [*classes[1:], TableConfig]:
        body = inspect.getsource(section)
        for field in dataclasses.fields(section):
            line = next(li for li in body.splitlines() if li.startswith(f"    {field.name}:"))
            following = body.split(line + "\n")[1].lstrip()
            assert following.startswith('"""'), f"{section.__name__}.{field.name} has no docstring"


@pytest.mark.parametrize(
    ("feature", "place", "found"),
    [
        ("FeatureConfig(name='shop', hash_bucket_size=9)", "tables.1.name", "'behavior_id'"),
        (
            "FeatureConfig(name='behavior_id', hash_bucket_size=9)",
            "tables.behavior_id.capacity",
            "4096",
        ),
    ],
)
def test_a_file_that_replaces_features_must_replace_tables(tmp_path, feature, place, found):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\nfrom s2s_jax.config import *\n"
        "def get_config():\n"
        f"    base = load_file({str(CONFIGS / 'base.py')!r})\n"
        f"    return dataclasses.replace(base, features=({feature},))\n"
    )
    message = refusal([], tmp_path / "mine.py")
    assert message.startswith(f"{place}: expected ")
    assert message.endswith(
        f", found {found}; remove it (a config file that replaces the features of another one must "
        f"replace its tables too)"
    )


def test_validate_accepts_shared_tables():
    features = (
        FeatureConfig(name="item_id", hash_bucket_size=8),
        FeatureConfig(name="last_item", hash_bucket_size=8, shard_name="item_id"),
    )
    config = Config(
        features=features,
        model=ModelConfig(),
        loss=configs.LossConfig(target_features=None),
        train=TrainConfig(train_steps=1),
    )
    validate(config)
