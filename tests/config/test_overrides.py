"""Overrides of the command line: names of features and tables, and kinds."""

import dataclasses

import pytest
from helpers.golden import REPO

from s2s_jax.cli.main import main as command
from s2s_jax.config import Constant, Cosine, FeatureConfig, Linear, TableConfig, load
from s2s_jax.errors import UserError

CONFIGS = REPO / "configs"


def test_features_and_tables_go_by_name_and_by_number():
    named = ["--features.cate_id.emb_dim", "7", "--tables.behavior_id.capacity=8192"]
    numbered = ["--features.1.emb-dim", "7", "--tables.2.capacity", "8192"]
    config = load(CONFIGS / "base.py", named)
    assert config == load(CONFIGS / "base.py", numbered)
    assert config.feature("cate_id").emb_dim == 7
    assert config.table("behavior_id").capacity == 8192


def test_names_may_have_hyphens_and_dots(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from s2s_jax.config import *\n"
        "features = (FeatureConfig(name='a-b.c', hash_bucket_size=0),)\n"
        "loss = LossConfig(item_feature='a-b.c', target_features=None)\n"
        "def get_config():\n"
        "    return Config(features=features, loss=loss, train=TrainConfig(train_steps=1))\n"
    )
    config = load(path, ["--tables.a-b.c.capacity", "99", "--features.a-b.c.emb_dim", "3"])
    assert (config.table("a-b.c").capacity, config.feature("a-b.c").emb_dim) == (99, 3)


NAMES = """
from s2s_jax.config import *
features = tuple(FeatureConfig(name=n, hash_bucket_size=0) for n in {names})
loss = LossConfig(item_feature={names}[0], target_features=None)
def get_config():
    return Config(features=features, loss=loss, train=TrainConfig(train_steps=1))
"""


def test_a_name_may_begin_with_another_one(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(NAMES.format(names=["item", "item.category"]))
    config = load(path, ["--features.item.category.emb_dim", "16", "--features.item.emb_dim", "3"])
    assert [feature.emb_dim for feature in config.features] == [3, 16]
    config = load(path, ["--tables.item.category.lr_ratio", "2"])
    assert [table.lr_ratio for table in config.tables] == [1, 2]


def test_names_that_differ_only_in_hyphens_go_by_number(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(NAMES.format(names=["a-b", "a_b"]))
    for given in ("a-b", "a_b"):
        with pytest.raises(UserError, match=r"features\.a_b\.emb_dim: .*\(a-b and a_b\)"):
            load(path, [f"--features.{given}.emb_dim", "16"])
    config = load(path, ["--features.1.emb_dim", "16"])
    assert [feature.emb_dim for feature in config.features][1] == 16
    assert command(["config", str(path), "--help"]) == 0
    assert "--features.1.emb_dim" in capsys.readouterr().out


def test_every_table_has_settings():
    config = load(CONFIGS / "base.py")
    assert [table.name for table in config.tables] == [f.name for f in config.features]
    assert config.table("item_id") == TableConfig(name="item_id")
    # A default table that lost its feature is left out.
    fewer = dataclasses.replace(config, features=config.features[:3])
    assert [table.name for table in fewer.tables] == ["item_id", "cate_id", "behavior_id"]
    other = FeatureConfig(name="other", hash_bucket_size=8, shard_name="behavior_id")
    assert dataclasses.replace(config, features=(*config.features, other)).tables == config.tables


def test_settings_go_with_a_table_that_gets_another_name():
    config = load(
        CONFIGS / "ml1m.py",
        ["--features.behavior_id.shard_name", "acts", "--tables.acts.init_std", "0.5"],
    )
    assert [table.name for table in config.tables] == ["item_id", "cate_id", "acts"]
    config = load(CONFIGS / "ml1m.py", ["--features.2.name", "act"])
    assert config.table("act") == TableConfig(name="act", init_std=0.02)


def test_a_feature_may_come_to_share_a_table():
    shared = ["--features.cate_id.shard_name", "item_id", "--features.cate_id.emb_dim", "128"]
    config = load(CONFIGS / "ml1m.py", shared)
    assert [table.name for table in config.tables] == ["item_id", "behavior_id"]
    assert config.table("item_id").capacity == 16_384


@pytest.mark.parametrize("arguments", [["--lr.decay", "cosine"], ["--lr.decay=cosine"]])
def test_a_kind_is_chosen(arguments):
    assert load(CONFIGS / "base.py", arguments).lr.decay == Cosine()
    # The kind may come before or after its keys.
    keys = ["--lr.decay.steps", "9", *arguments, "--lr.decay.final_ratio", "0.5"]
    assert load(CONFIGS / "base.py", keys).lr.decay == Cosine(steps=9, final_ratio=0.5)


def test_the_kind_of_the_file_keeps_its_keys(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses\nfrom s2s_jax.config import *\n"
        f"base = load_file({str(CONFIGS / 'base.py')!r})\n"
        "def get_config():\n"
        "    lr = LRConfig(decay=Linear(steps=99, final_ratio=0.5))\n"
        "    return dataclasses.replace(base, lr=lr)\n"
    )
    assert load(path, ["--lr.decay.steps", "7"]).lr.decay == Linear(steps=7, final_ratio=0.5)
    again = load(path, ["--lr.decay", "linear", "--lr.decay.steps", "7"])
    assert again.lr.decay == Linear(steps=7, final_ratio=0.5)
    assert load(path, ["--lr.decay", "cosine"]).lr.decay == Cosine()
    assert load(path, ["--lr.decay", "constant"]).lr.decay == Constant()


def test_a_key_of_another_kind_is_refused_naming_it():
    with pytest.raises(UserError) as caught:
        load(CONFIGS / "base.py", ["--lr.decay.steps", "7"])
    assert str(caught.value) == (
        "lr.decay.steps: expected no such key where lr.decay is constant, found 7; add --lr.decay "
        "linear, which has it"
    )


def test_a_key_that_its_kind_cannot_do_without_is_asked_for():
    with pytest.raises(UserError) as caught:
        load(CONFIGS / "base.py", ["--eval.split", "by_time"])
    assert str(caught.value) == (
        "eval.split.at: expected text because eval.split is by_time, found nothing; give "
        "--eval.split.at too"
    )


def test_none_is_a_kind_where_there_is_one():
    for none in ("none", "None"):
        arguments = ["--eval.split", none, "--eval.every_steps", "None"]
        assert load(CONFIGS / "ml1m.py", arguments).eval.split is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--io.shuffle"], True), (["--io.shuffle", "True"], True), (["--io.shuffle=true"], True),
        (["--io.shuffle", "False"], False), (["--io.shuffle", "false"], False),
        (["--io.no_shuffle"], False), (["--io.no-shuffle"], False),
        (["--io.no_shuffle", "--io.shuffle"], True),
    ],
)  # fmt: skip
def test_booleans_are_given_like_those_of_commands(words, expected):
    for before in ("True", "False"):
        config = load(CONFIGS / "base.py", ["--io.shuffle", before, *words, "--io.batch_size", "3"])
        assert (config.io.shuffle, config.io.batch_size) == (expected, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--io.shuffle", "yes"], "io.shuffle: expected True or False, found yes"),
        (["--io.no_shuffle", "True"], "io.no_shuffle: no such key; did you mean io.shuffle?"),
        (["--io.no_batch_size"], "io.no_batch_size: no such key"),
        (["--features.item_id.no_of_next", "x"], "features.item_id.no_of_next: no such key"),
    ],
)
def test_a_boolean_refuses_other_words(words, message):
    with pytest.raises(UserError, match=f"^{message}"):
        load(CONFIGS / "base.py", words)
