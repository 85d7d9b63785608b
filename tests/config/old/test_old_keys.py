"""Old keys of the configuration: an old `config.json` is read; elsewhere they are errors."""

import json

import pytest
from helpers.golden import REPO

from s2s_jax.config import (
    ByTime,
    Config,
    Cosine,
    Crop,
    EvalConfig,
    FeatureConfig,
    LastEvents,
    Linear,
    Pack,
    TableConfig,
    Truncate,
    identity,
    load,
    load_json,
    parse_json,
)
from s2s_jax.config.features import GROWING_KEYS
from s2s_jax.config.old.format import split_of_catalogue
from s2s_jax.errors import UserError

BASE = REPO / "configs" / "base.py"

# A configuration as s2s_jax 0.1 wrote it, without most keys that have not changed since.
OLD = {
    "io": {"batch_size": 8, "shuffle": True},
    "features": [
        {
            "name": "item_id",
            "emb_dim": 16,
            "hash_type": "murmur",
            "hash_bucket_size": 0,
            "capacity": 4096,
            "max_capacity": None,
            "on_full": "evict",
            "admit_after": 2,
            "unknown": "default_row",
            "evict_after_steps": 5,
            "evict_below": 0,
            "evict_every": 5,
            "shard_name": None,
            "bag_size": 1,
            "init_std": 0.02,
        },
        {
            "name": "last_item",
            "emb_dim": 16,
            "hash_type": "murmur",
            "hash_bucket_size": 0,
            "capacity": 4096,
            "max_capacity": None,
            "on_full": "evict",
            "admit_after": 2,
            "unknown": "default_row",
            "evict_after_steps": 5,
            "evict_below": 0,
            "evict_every": 5,
            "shard_name": "item_id",
            "bag_size": 1,
            "init_std": 0.02,
        },
        # As the first runs wrote it, before tables could grow.
        {"name": "cate_id", "hash_bucket_size": 30, "init_std": 0.5},
    ],
    "model": {"seq_len": 12},
    "lr": {"decay": "cosine", "decay_steps": 28, "final_ratio": 0.1, "warmup_steps": 3},
    "loss": {"log_q": True, "log_q_from": "stream", "negatives": "mixed"},
    "train": {"train_steps": 7},
    "eval": {"filter_seen": False},
}


def changed(section: str, **settings) -> str:
    """`OLD` with other values of a section, as JSON."""
    return json.dumps(OLD | {section: OLD[section] | settings})


def test_tables_are_read_from_the_features_that_had_their_settings():
    config = parse_json(json.dumps(OLD))
    assert config.tables == (
        TableConfig(
            name="item_id",
            init_std=0.02,
            capacity=4096,
            admit_after=2,
            unknown="default_row",
            evict_after_steps=5,
            evict_every=5,
        ),
        TableConfig(name="cate_id", init_std=0.5),
    )
    assert [f.table_name for f in config.features] == ["item_id", "item_id", "cate_id"]


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ({"log_q": False}, "none"),
        ({"log_q": False, "log_q_from": "stream"}, "none"),
        ({"log_q": True, "log_q_from": "catalogue"}, "catalogue"),
        ({"log_q": True, "log_q_from": "stream"}, "stream"),
    ],
)
def test_log_q_is_one_key(old, now):
    assert parse_json(changed("loss", **old)).loss.log_q == now


def test_keys_of_the_decay_belong_to_its_kind():
    assert parse_json(json.dumps(OLD)).lr.decay == Cosine(steps=28, final_ratio=0.1)
    linear = parse_json(changed("lr", decay="linear", decay_steps=None)).lr
    assert (linear.decay, linear.warmup_steps) == (Linear(final_ratio=0.1), 3)
    assert parse_json(changed("lr", decay="constant")).lr.decay.kind == "constant"


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ({}, Truncate()),
        ({"packing": None, "windows": 1, "windows_per_epoch": None}, Truncate()),
        ({"packing": None, "windows": 3, "windows_per_epoch": 1}, Crop(windows=3)),
        ({"packing": 8, "windows": 1, "windows_per_epoch": None}, Pack(rows=8)),
        (
            {"packing": "auto", "windows": 3, "windows_per_epoch": 2},
            Pack(windows=3, windows_per_epoch=2),
        ),
    ],
)
def test_windows_and_packing_are_kinds_of_sequences(old, now):
    io = parse_json(changed("io", **old)).io
    assert (io.sequences, io.batch_size) == (now, 8)


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ({}, None),
        ({"held_out": 0, "split_at": None, "time_feature": "t"}, None),
        ({"held_out": 3, "split_at": None, "time_feature": "t"}, LastEvents(events=3)),
        ({"held_out": 0, "split_at": "9"}, ByTime(at="9")),
        (
            {"held_out": 0, "split_at": "9", "validation_at": "7", "time_feature": "t"},
            ByTime(at="9", validation_at="7", feature="t"),
        ),
    ],
)
def test_ways_to_hold_out_are_kinds_of_splits(old, now):
    settings = parse_json(changed("eval", **old)).eval
    assert (settings.split, settings.filter_seen) == (now, False)


@pytest.mark.parametrize(
    ("saved", "split"),
    [
        ({"eval.held_out": 0, "eval.split_at": None, "eval.validation_at": None}, None),
        ({"eval.held_out": 2, "eval.split_at": None}, LastEvents(events=2)),
        (
            {
                "eval.held_out": 0,
                "eval.split_at": "9",
                "eval.validation_at": "7",
                "eval.time_feature": "item_id",
                "column of eval.time_feature": "item_id",
                "time_unit of eval.time_feature": "s",
            },
            ByTime(at="9", validation_at="7", feature="item_id"),
        ),
    ],
)
def test_the_split_of_an_old_catalogue_compares_equal(saved, split):
    config = Config(
        features=(FeatureConfig(name="item_id", hash_bucket_size=9),), eval=EvalConfig(split=split)
    )
    assert split_of_catalogue(saved) == identity.of_split(config)
    # One of the present version is left as it is.
    assert split_of_catalogue(identity.of_split(config)) == identity.of_split(config)


def test_what_is_written_is_read_again():
    config = parse_json(json.dumps(OLD))
    saved = json.loads(config.to_json())
    assert saved["format"] == 2
    assert parse_json(config.to_json()) == config
    assert identity.of_run(parse_json(config.to_json())) == identity.of_run(config)


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"format": 3, "s2s_jax": "9.9.9", "io": {}}))
    with pytest.raises(UserError) as caught:
        load_json(path)
    words = str(caught.value)
    assert str(path) in words
    assert "format 3, written by s2s_jax 9.9.9" in words
    assert "\n" not in words


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--features.0.capacity 4096", "give --tables.item_id.capacity 4096"),
        ("--features.behavior_id.max_capacity 4096", "give --tables.behavior_id.max_capacity 4096"),
        ("--features.2.on_full stop", "give --tables.behavior_id.on_full stop"),
        ("--features.2.admit_after 2", "give --tables.behavior_id.admit_after 2"),
        ("--features.2.unknown zeros", "give --tables.behavior_id.unknown zeros"),
        ("--features.2.evict_after_steps 9", "give --tables.behavior_id.evict_after_steps 9"),
        ("--features.2.evict-below 9", "give --tables.behavior_id.evict_below 9"),
        ("--features.2.evict_every=9", "give --tables.behavior_id.evict_every 9"),
        ("--features.3.init_std 0.5", "give --tables.timestamp.init_std 0.5"),
        ("--features.9.init_std 0.5", "give --tables.NAME.init_std 0.5"),
        ("--io.packing 9", "give --io.sequences pack --io.sequences.rows 9"),
        ("--io.packing None", "give --io.sequences truncate"),
        ("--io.windows 3", "give --io.sequences pack (or crop) --io.sequences.windows 3"),
        ("--io.windows 1", "give --io.sequences truncate"),
        (
            "--io.windows_per_epoch 1",
            "give --io.sequences pack --io.sequences.windows_per_epoch 1 (or, for 1 without packing, "
            "--io.sequences crop)",
        ),
        ("--eval.held_out 2", "give --eval.split last_events --eval.split.events 2"),
        ("--eval.held-out=0", "give --eval.split none"),
        ("--eval.split_at 2000-12-01", "give --eval.split by_time --eval.split.at 2000-12-01"),
        ("--eval.split_at None", "give --eval.split none"),
        ("--eval.validation_at 9", "give --eval.split by_time --eval.split.validation_at 9"),
        ("--eval.time_feature t", "give --eval.split by_time --eval.split.feature t"),
        ("--loss.log_q_from stream", "give --loss.log_q stream"),
        ("--lr.decay_steps 9", "give --lr.decay linear (or cosine) --lr.decay.steps 9"),
        ("--lr.final_ratio 0.5", "give --lr.decay linear (or cosine) --lr.decay.final_ratio 0.5"),
    ],
)
def test_an_old_key_on_the_command_line_has_a_sentence(arguments, sentence):
    with pytest.raises(UserError) as caught:
        load(BASE, arguments.split())
    words = str(caught.value)
    key = arguments.split("=")[0].split()[0].removeprefix("--").replace("-", "_")
    assert words.startswith(f"{key}: this key is now ")
    assert words.endswith(sentence)
    assert "\n" not in words


@pytest.mark.parametrize(("old", "now"), [("True", "catalogue"), ("False", "none")])
def test_old_values_of_log_q_have_a_sentence(tmp_path, old, now):
    with pytest.raises(UserError, match=rf"^loss\.log_q: .*{old} is now {now}"):
        load(BASE, ["--loss.log_q", old])
    path = tmp_path / "mine.py"
    path.write_text(
        "from s2s_jax.config import *\n"
        f"def get_config():\n    return Config(loss=LossConfig(log_q={old}))\n"
    )
    with pytest.raises(UserError, match=rf"^loss\.log_q: .*{old} is now {now}"):
        load(path)


@pytest.mark.parametrize(
    ("made", "key", "remedy"),
    [
        *(
            (f"FeatureConfig(name='x', {key}=1)", f"features.N.{key}", f'(name="…", {key}=…)')
            for key in ("init_std", *GROWING_KEYS)
        ),
        ("LossConfig(log_q_from='stream')", "loss.log_q_from", 'LossConfig(log_q="stream")'),
        ("IOConfig(packing=3)", "io.packing", "IOConfig(sequences=Pack(rows=…))"),
        ("IOConfig(windows=3)", "io.windows", "Pack(windows=…)), or Crop(windows=…)"),
        ("IOConfig(windows_per_epoch=1)", "io.windows_per_epoch", "Pack(windows_per_epoch=…)"),
        ("EvalConfig(held_out=2)", "eval.held_out", "EvalConfig(split=LastEvents(events=…))"),
        ("EvalConfig(split_at='9')", "eval.split_at", "EvalConfig(split=ByTime(at=…))"),
        ("EvalConfig(validation_at='9')", "eval.validation_at", "ByTime(at=…, validation_at=…)"),
        ("EvalConfig(time_feature='t')", "eval.time_feature", "ByTime(at=…, feature=…)"),
        ("LRConfig(decay_steps=3)", "lr.decay_steps", "LRConfig(decay=Linear(steps=…))"),
        ("LRConfig(final_ratio=1)", "lr.final_ratio", "LRConfig(decay=Linear(final_ratio=…))"),
    ],
)
def test_an_old_key_in_a_config_file_has_a_sentence(tmp_path, made, key, remedy):
    path = tmp_path / "mine.py"
    path.write_text(f"from s2s_jax.config import *\ndef get_config():\n    return {made}\n")
    with pytest.raises(UserError) as caught:
        load(path)
    words = str(caught.value)
    assert words.startswith(f"{key}: this key is now ")
    assert remedy in words
    assert str(path) in words
    assert "\n" not in words
