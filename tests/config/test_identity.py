"""Which keys decide the meaning of a run: continuing, evaluating, caches and catalogues agree."""

import contextlib
import dataclasses
import json
import shutil
import types
import typing
from pathlib import Path
from typing import Any

import jax
import of_config
import pytest
import small
from logs import write_log

import s2s_jax.jobs.train
from s2s_jax.cli.commands import evaluate, recommend
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import (
    ByTime,
    Config,
    EvalConfig,
    FeatureConfig,
    IOConfig,
    LastEvents,
    Linear,
    Pack,
    TableConfig,
    TimeGaps,
    identity,
    validate,
)
from s2s_jax.config.identity import KEYS, Free
from s2s_jax.config.settings import Decoding, ReadingOrder, Split
from s2s_jax.data.encoding.cache import StripeCache
from s2s_jax.data.items import catalogue
from s2s_jax.errors import UserError
from s2s_jax.jobs.train import train
from s2s_jax.ranking.restored import restore
from s2s_jax.runs.checkpoints.compatibility import check_config
from s2s_jax.runs.checkpoints.store import Checkpoints
from s2s_jax.runs.run_dir import write_config

# Features of a run with one of everything; all are item-side.
FEATURES = (
    FeatureConfig(name="item_id", emb_dim=8, hash_bucket_size=300),
    FeatureConfig(name="kind", emb_dim=8, hash_bucket_size=300, shard_name="item_id"),
    FeatureConfig(name="price", op="bucketize", boundaries=(1.0, 10.0), hash_bucket_size=9),
    FeatureConfig(name="hour", column="time", op="hour_of_day", hash_bucket_size=24),
    FeatureConfig(name="gap", column="when", op="time_gap", hash_bucket_size=30, of_next=True),
    FeatureConfig(name="grown", hash_bucket_size=0),
    FeatureConfig(name="time", hash_bucket_size=9),
)
TABLES = (TableConfig(name="grown", admit_after=2),)
SHOWN = ("item_id", "kind", "price")

# Another value for each key, and the feature to change.
CHANGED = {
    "features.name": ("kinds", 1),
    "features.column": ("other", 1),
    "features.op": ("day_of_week", 3),
    "features.boundaries": ((5.0, 50.0), 2),
    "features.time_unit": ("ms", 3),
    "features.utc_offset_hours": (2.0, 3),
    "features.of_next": (False, 4),
    "features.emb_dim": (16, 2),
    "features.hash_type": ("farm", 1),
    "features.hash_bucket_size": (10, 2),
    "tables.unknown": ("default_row", "grown"),
    "features.shard_name": (None, 1),
    "features.combiner": ("sum", 1),
    "features.bag_size": (3, 1),
    "io.truncate_side": "right",
    "io.check_length": True,
    "io.sequences.windows": 2,
    "io.shuffle": False,
    "io.shuffle_rows": 9,
    "io.shards": 3,
    "io.seed": 7,
    "model.seq_len": 7,
    "model.hidden_size": 32,
    "model.num_layers": 3,
    "model.nhead": 2,
    "model.layer": "hstu",
    "model.dim_feedforward": 32,
    "model.feed_forward": "swiglu",
    "model.norm": "rms",
    "model.norm_placement": "post",
    "model.qk_norm": True,
    "model.gated_residuals": True,
    "model.input_norm": True,
    "model.position": "rope",
    "model.distance_bias": True,
    "model.time_bias": TimeGaps(column="item_id"),
    "model.time_bias.column": "kind",
    "model.time_bias.time_unit": "ms",
    "lr.dense_optimizer": "muon",
    "lr.average_decay": 0.9,
    "loss.pairing": "previous",
    "loss.similarity": "dot",
    "loss.item_feature": "kind",
    "loss.target_features": ("item_id", "price"),
    "eval.split": None,
    "eval.split.events": 1,
    "eval.split.at": "2001-01-01",
    "eval.split.validation_at": "1999-01-01",
    "eval.split.feature": "hour",
}
# Keys of a kind that `whole` does not have, and the settings that choose this kind.
OF_KIND = {
    "io.sequences.windows": {"io.sequences": Pack(rows=4)},
    "eval.split.events": {"eval.split": LastEvents(events=2)},
    "model.time_bias.column": {"model.time_bias": TimeGaps(column="item_id")},
    "model.time_bias.time_unit": {"model.time_bias": TimeGaps(column="item_id")},
}


def whole(run_dir: Path) -> Config:
    config = small.config()
    config = dataclasses.replace(
        config,
        features=FEATURES,
        tables=TABLES,
        loss=dataclasses.replace(config.loss, target_features=SHOWN),
        train=dataclasses.replace(config.train, output_dir=str(run_dir)),
        eval=EvalConfig(split=ByTime(at="2000-12-01", validation_at="2000-01-01", feature="time")),
    )
    validate(config)
    return config


def set_key(config: Config, key: str, value) -> Config:
    section, *names = key.split(".")
    part = getattr(config, section)
    if len(names) > 1:
        value = dataclasses.replace(getattr(part, names[0]), **{names[1]: value})
    changed = dataclasses.replace(part, **{names[0]: value})
    return dataclasses.replace(config, **{section: changed})


def having(config: Config, key: str) -> Config:
    """Return the configuration with the kind of value that has the key."""
    for other, value in (OF_KIND[key] if key in OF_KIND else {}).items():
        config = set_key(config, other, value)
    return config


def with_feature(config: Config, number: int, **settings) -> Config:
    features = list(config.features)
    features[number] = dataclasses.replace(features[number], **settings)
    return dataclasses.replace(config, features=tuple(features))


def changed(config: Config, key: str) -> tuple[Config, str]:
    """A valid configuration with another value for a key, and the path that messages should name."""
    if key.startswith("features."):
        value, number = CHANGED[key]
        name = key.removeprefix("features.")
        path = f"features.{number}.{name}"
        config = with_feature(config, number, **{name: value})
        if name == "name":
            shown = tuple(value if n == "kind" else n for n in SHOWN)
            config = set_key(config, "loss.target_features", shown)
    elif key.startswith("tables."):
        value, table = CHANGED[key]
        name = key.removeprefix("tables.")
        path = f"tables.{table}.{name}"
        config = small.with_table(config, table, **{name: value})
    else:
        config, path = set_key(having(config, key), key, CHANGED[key]), key
    validate(config)
    return config, path


def concern(*names: str) -> list[str]:
    return [key for key, of in KEYS.items() if of in names]


def test_every_key_is_decided_upon():
    """Every new key of the configuration must be added to `identity.KEYS`."""
    keys = set()
    for section in dataclasses.fields(Config):
        of_parts = {"features": FeatureConfig, "tables": TableConfig}
        parts = of_parts[section.name] if section.name in of_parts else type(section.default)
        for name, hint in typing.get_type_hints(parts).items():
            keys.add(f"{section.name}.{name}")
            for each in typing.get_args(hint):
                if dataclasses.is_dataclass(each):
                    of_kind = [field.name for field in dataclasses.fields(each)]
                    keys |= {f"{section.name}.{name}.{key}" for key in of_kind}
    assert set(KEYS) == keys
    assert all(of.reason for of in KEYS.values() if isinstance(of, Free))
    assert set(CHANGED) == {key for key, of in KEYS.items() if not isinstance(of, Free)}


OTHER_KINDS = {"lr.decay": Linear(), "io.sequences": Pack(rows=4)}


def other_value(config: Config, key: str) -> Config:
    """Return the configuration with another value of a key outside of features, valid or not."""
    if key in CHANGED:
        return changed(config, key)[0]
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    if isinstance(value, bool):
        other = not value
    elif isinstance(value, int | float):
        other = value + 1
    else:
        other = OTHER_KINDS[key] if key in OTHER_KINDS else "other"
    return set_key(config, key, other)


def without_fingerprints(value: Split | Decoding | ReadingOrder):
    if isinstance(value, Decoding):
        split = None if value.split is None else without_fingerprints(value.split)
        value = dataclasses.replace(value, split=split)
    return dataclasses.replace(value, fingerprint={})


@pytest.mark.parametrize("kind", [Split, Decoding, ReadingOrder])
@pytest.mark.parametrize(
    "key",
    [
        key
        for key in KEYS
        if not key.startswith(("features.", "tables.")) and (key in CHANGED or key.count(".") == 1)
    ],
)
def test_a_narrow_value_is_another_one_when_its_fingerprint_is(tmp_path, kind, key):
    """Each narrow value holds exactly the keys that decide it according to `KEYS`."""
    config = whole(tmp_path)
    before, after = (kind.of(each) for each in (config, other_value(config, key)))
    same = without_fingerprints(before) == without_fingerprints(after)
    assert same == (before.fingerprint == after.fingerprint)


@pytest.mark.parametrize("key", [key for key in CHANGED if key.startswith("features.")])
def test_decoding_is_another_one_with_other_ids(tmp_path, key):
    config = whole(tmp_path)
    before, after = Decoding.of(config), Decoding.of(changed(config, key)[0])
    assert (before.fingerprint != after.fingerprint) == (KEYS[key] in ("ids", "decoded"))
    assert before.features != after.features


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory that has only what checks of the configuration read."""
    config = whole(tmp_path_factory.mktemp("run"))
    run_dir = Path(config.train.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(run_dir, config)
    return config


def refusal(config: Config) -> str:
    try:
        check_config(Path(config.train.output_dir), config)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", concern("ids", "rows", "split", "model"))
def test_a_run_is_not_continued_nor_used_with_another_value(made, key, tmp_path):
    before = set_key(having(made, key), "train.output_dir", str(tmp_path))
    write_config(tmp_path, before)
    config, path = changed(before, key)
    words = refusal(config)
    assert words.startswith(f"{path}: the checkpoints in ")
    assert "\n" not in words


def test_training_and_evaluating_refuse_another_value(made, monkeypatch):
    config, path = changed(made, "model.nhead")
    monkeypatch.setattr(Checkpoints, "newest_step", 3)
    (Path(config.train.output_dir) / "checkpoints").mkdir(exist_ok=True)
    for use in (lambda: train(config, make_mesh()), lambda: restore(config, make_mesh())):
        with pytest.raises(UserError, match=f"^{path}: the checkpoints in "):
            use()


def test_all_other_keys_may_change(made):
    free = {
        "io.data_paths": "elsewhere",
        "io.batch_size": 3,
        "io.seed": 7,
        "io.sequences": Pack(rows=8, windows=2),
        "model.dropout": 0.5,
        "lr.dense_lr": 0.5,
        "lr.decay": Linear(),
        "loss.log_q": "catalogue",
        "loss.temperature": 0.5,
        "loss.negatives": "mixed",
        "train.seed": 7,
        "eval.max_users": 7,
        "eval.filter_seen": False,
    }
    config = made
    for key, value in free.items():
        config = set_key(config, key, value)
    # The remedy of the message about a position with more ids.
    config = with_feature(config, 1, bag_size=3)
    config = small.with_table(config, "grown", capacity=2**20, admit_after=5, evict_after_steps=7)
    # A name that is the default, given explicitly.
    config = with_feature(config, 0, column="item_id", shard_name="item_id")
    config = set_key(config, "loss.target_features", SHOWN[::-1])
    validate(config)
    assert refusal(config) == ""


def test_whether_ids_wait_for_a_row_is_decided_when_a_run_begins(made):
    config = small.with_table(made, "grown", admit_after=1)
    words = refusal(config)
    assert words.startswith("tables.grown.admit_after: the checkpoints in ")
    assert "made with more than 1, found 1;" in words


def test_whether_items_are_counted_as_they_come_is_decided_when_a_run_begins(made):
    config = set_key(made, "loss.log_q", "stream")
    words = refusal(config)
    assert words.startswith("loss.log_q: the checkpoints in ")
    assert "made with none or catalogue, found stream;" in words


def test_items_that_were_counted_by_their_bags_keep_the_size_of_them(made):
    counting = set_key(made, "loss.log_q", "stream")
    wider = with_feature(counting, 0, bag_size=2)
    assert identity.of_run(counting) != identity.of_run(wider)


def test_runs_from_before_keys_existed_have_what_was_the_rule_then(made):
    path = Path(made.train.output_dir) / "config.json"
    now = path.read_text()
    saved = json.loads(now)
    for feature in saved["features"]:
        for name in ("utc_offset_hours", "combiner"):
            del feature[name]
    for table in saved["tables"]:
        del table["unknown"]
    for name in ("position", "input_norm"):
        del saved["model"][name]
    try:
        path.write_text(json.dumps(saved))
        assert refusal(made) == ""
        config, key = changed(made, "features.combiner")
        assert refusal(config).startswith(f"{key}: ")
        saved["model"]["of_tomorrow"] = 1
        path.write_text(json.dumps(saved))
        assert "of_tomorrow" in refusal(made)
    finally:
        path.write_text(now)


@pytest.mark.parametrize("key", concern("order"))
def test_a_reading_position_is_not_used_in_another_order(tmp_path, key):
    rows = [{"item_id": [[n]]} for n in range(20)]
    write_log(tmp_path / "a.orc", rows, stripe_rows=5)
    config = Config(io=IOConfig(data_paths=str(tmp_path)), features=FEATURES[:1])
    state = of_config.reader(config, 4).get_state()
    with pytest.raises(UserError, match=rf"^{key}: "):
        of_config.reader(set_key(config, key, CHANGED[key]), 4).set_state(state)


@pytest.mark.parametrize("key", concern("ids", "rows", "split", "decoded"))
def test_stripes_that_were_decoded_otherwise_are_not_used(made, tmp_path, key):
    """The cache has a separate directory for each value of the key."""
    config, _ = changed(made, key)
    for each in (having(made, key), config):
        StripeCache(str(tmp_path), Decoding.of(each))
    assert len(list(tmp_path.iterdir())) == 2


# Features of the next event are never the item's.
CATALOGUE_KEYS = [
    *(
        key
        for key in concern("ids", "decoded", "split")
        if key.startswith(("features.", "eval.")) and key != "features.of_next"
    ),
    "loss.item_feature",
    "loss.target_features",
]


@pytest.mark.parametrize("key", CATALOGUE_KEYS)
def test_a_catalogue_is_not_used_with_another_value(made, key):
    made = set_key(made, "loss.target_features", ("item_id", "kind", "price", "hour"))
    made = having(made, key)
    config, _ = changed(made, key)
    saved = json.loads(json.dumps(of_config.catalogue_made_for(made)))
    catalogue._check_made_for(Path("c.parquet"), saved, of_config.catalogue_made_for(made))
    with pytest.raises(UserError, match=r"catalogue c\.parquet was made with"):
        catalogue._check_made_for(Path("c.parquet"), saved, of_config.catalogue_made_for(config))


@pytest.mark.parametrize("new_files", ["refuse", "next_epoch"])
def test_a_catalogue_file_with_other_items_is_like_new_files(made, new_files):
    of_file = set_key(set_key(made, "loss.catalogue", "c.parquet"), "io.new_files", new_files)

    def check(config, before, now):
        items: Any = None if now is None else types.SimpleNamespace(fingerprint=now)
        s2s_jax.jobs.train._check_catalogue(config, items, before)

    check(of_file, {"catalogue": "a"}, "a")
    # Saved before catalogues were recorded; without a catalogue, then or now; collected from the files.
    check(of_file, {}, "a")
    check(of_file, {"catalogue": None}, "a")
    check(of_file, {"catalogue": "a"}, None)
    check(set_key(of_file, "loss.catalogue", None), {"catalogue": "a"}, "b")
    with pytest.raises(UserError) if new_files == "refuse" else contextlib.nullcontext() as caught:
        check(of_file, {"catalogue": "a"}, "b")
    if new_files == "refuse":
        assert str(caught.value).startswith(
            "loss.catalogue: the checkpoint was made with other items"
        )


def test_programs_refuse_what_would_read_the_same_weights_otherwise(tmp_path):
    small.write_log(tmp_path / "log", 20)
    config = small.config()
    config = dataclasses.replace(
        config,
        io=dataclasses.replace(config.io, data_paths=str(tmp_path / "log"), batch_size=8),
        model=dataclasses.replace(config.model, num_layers=1),
        train=dataclasses.replace(
            config.train, output_dir=str(tmp_path / "run"), tensorboard=False
        ),
        eval=EvalConfig(split=LastEvents(events=1)),
    )
    assert not train(config, make_mesh(jax.devices()[:1]))
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    file = tmp_path / "config.py"
    combined = with_feature(config, 2, combiner="sum")
    file.write_text(
        f"import json\nfrom s2s_jax.config import parse_json\n"
        f"def get_config():\n    return parse_json({combined.to_json()!r})\n"
    )
    with pytest.raises(UserError, match=r"^features\.2\.combiner: .* made with mean, found sum"):
        train(combined, make_mesh(jax.devices()[:1]))
    with pytest.raises(UserError, match=r"^features\.2\.combiner: "):
        restore(combined, make_mesh(jax.devices()[:1]))
    with pytest.raises(UserError, match=r"^features\.2\.combiner: "):
        evaluate.main(["--config", str(file)])
    with pytest.raises(UserError, match=r"^features\.2\.combiner: "):
        recommend.main(
            [
                "--config",
                str(file),
                "--input",
                str(tmp_path / "log"),
                "--output",
                str(tmp_path / "o"),
            ]
        )
