"""`s2s_jax.load`: overrides as a mapping mean what they mean on the command line."""

import pytest
from places import REPO

import s2s_jax as s2s

FILE = REPO / "configs" / "quickstart.py"


def test_a_mapping_is_a_command_line():
    words = [
        "--model.num_layers",
        "1",
        "--loss.target_features",
        "item_id",
        "--lr.clip_norm",
        "1.5",
    ]
    words += ["--io.data_paths", "logs/a", "--io.shuffle", "False", "--train.train_steps", "None"]
    words += ["--train.profile_steps", "1", "2", "--train.train_epoch", "3", "--lr.eps", "1e-09"]
    values = {
        "model.num_layers": 1,
        "loss.target_features": ("item_id",),
        "lr.clip_norm": 1.5,
        "io.data_paths": "logs/a",
        "io.shuffle": False,
        "train.train_steps": None,
        "train.profile_steps": [1, 2],
        "train.train_epoch": 3,
        "lr.eps": 1e-9,
        "features.item_id.emb_dim": 16,
        "eval.split": "by_time",
        "eval.split.at": "2023-12-01",
        "eval.split.feature": "timestamp",
    }
    words += ["--features.item_id.emb_dim", "16", "--eval.split", "by_time"]
    words += ["--eval.split.at", "2023-12-01", "--eval.split.feature", "timestamp"]
    config = s2s.load(FILE, values)
    assert config == s2s.load(str(FILE), words)
    assert (config.lr.eps, config.io.shuffle, config.train.train_steps) == (1e-9, False, None)
    assert config.feature("item_id").emb_dim == 16
    assert config.eval.split == s2s.ByTime(at="2023-12-01", feature="timestamp")
    assert s2s.load(FILE) == s2s.load(FILE, {}) == s2s.load(FILE, [])


def test_texts_may_look_like_options():
    paths = "--odd=name,b c"
    assert s2s.load(FILE, {"io.data_paths": paths}).io.data_paths == paths


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.num_layer": 1}, ["model.num_layer", "model.num_layers"]),
        ({"model.num_layers": "many"}, ["model.num_layers", "whole number", "many"]),
        ({"model.nhead": 3}, ["model.nhead"]),
        (["model.nhead", "4"], ["--section.key value"]),
    ],
)
def test_mistakes_name_the_key(overrides, words):
    with pytest.raises(s2s.UserError) as caught:
        s2s.load(FILE, overrides)
    for word in words:
        assert word in str(caught.value)
