"""The catalogue, compared with plain Python dictionaries over the rows of the log."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import of_config
import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet
import pytest
from logs import write_log
from murmur import reference as murmur
from places import DATA, REPO

from s2s_jax.cli.commands.catalogue import main
from s2s_jax.config import (
    Config,
    EvalConfig,
    FeatureConfig,
    LastEvents,
    LossConfig,
    TrainConfig,
    load_file,
    validate,
)
from s2s_jax.data.encoding.held_out import Cut
from s2s_jax.data.items import item_counts
from s2s_jax.data.logs import orc
from s2s_jax.errors import UserError

FLAT = pa.list_(pa.int64())
BAGS = pa.list_(pa.list_(pa.int64()))
TEXTS = pa.list_(pa.list_(pa.string()))
TYPES = {"item_id": BAGS, "cate_id": FLAT, "tags": BAGS, "time": FLAT}

CATE = FeatureConfig(name="cate_id", hash_bucket_size=50)
TAGS = FeatureConfig(name="tags", hash_type="murmur", hash_bucket_size=1000, bag_size=3)
GROWING_TAGS = FeatureConfig(name="tags", hash_bucket_size=0, bag_size=3)
TIME = FeatureConfig(name="time", hash_bucket_size=100)
# Items 17 * i, some of which share one of 40 buckets, and 64-bit ids, negative or with a high word.
IDS = [0, -1, 2**40, -(2**63), 2**63 - 1, *(17 * i for i in range(1, 60))]


def make_config(data_paths, item=None, tags=TAGS, target=("item_id", "cate_id", "tags"), **io):
    """A configuration whose sequences are shorter than the rows, which must not matter."""
    config = Config()
    made = dataclasses.replace(
        config,
        io=dataclasses.replace(config.io, data_paths=str(data_paths), **io),
        features=(TIME, item or FeatureConfig(name="item_id", hash_bucket_size=40), tags, CATE),
        model=dataclasses.replace(config.model, seq_len=4),
        loss=LossConfig(target_features=target),
        train=TrainConfig(train_steps=1),
    )
    validate(made)
    return made


def make_rows(count, texts=False, seed=0):
    """Rows of 0 to 11 events; some items, categories and tags are missing."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = {"item_id": [], "cate_id": [], "tags": [], "time": []}
        for _ in range(int(rng.integers(12))):
            number = int(rng.zipf(1.4)) % len(IDS)
            there = f"item{number}" if texts else IDS[number]
            row["item_id"].append([[there], [], None, [None]][int(rng.choice(4, p=P_MISSING))])
            row["cate_id"].append([number % 6, 7, None][int(rng.choice(3, p=[0.6, 0.3, 0.1]))])
            row["tags"].append([int(t) for t in rng.integers(3, size=rng.integers(4))] or None)
            row["time"].append(int(rng.integers(1000)))
        rows.append(row)
    # Rows without some columns.
    rows[1] = rows[1] | {"item_id": None}
    rows[2] = rows[2] | {"tags": [], "cate_id": None}
    return rows


P_MISSING = [0.85, 0.05, 0.05, 0.05]


def write_logs(directory, rows, texts=False):
    """Two files: one with stripes of 3 rows, one with a single stripe."""
    types = TYPES | ({"item_id": TEXTS} if texts else {})
    middle = len(rows) // 2
    write_log(directory / "a.orc", rows[:middle], types, stripe_rows=3)
    write_log(directory / "b.orc", rows[middle:], types, compression="zstd")
    return directory


# ----------------------------------------------------------------------------------- reference


def encode(entry, feature):
    """The ids of an event, as integers; padded with None."""
    bag = entry if isinstance(entry, list) else [entry]
    found = []
    for value in (v for v in bag if v is not None):
        number = value
        if feature.hash_type is not None:
            text = isinstance(value, str)
            number = murmur(value.encode() if text else value.to_bytes(8, "little", signed=True))
            number = number & (2**63 - 1) if feature.grows else number
        number %= 2**64
        if feature.grows:
            # All bits set means a missing id.
            number = 0xD6E8FEB86659FD93 if number == 2**64 - 1 else number
        else:
            number %= feature.hash_bucket_size
        found.append(number)
    return (*found, *[None] * (feature.bag_size - len(found)))


def words(ids, feature):
    """The ids as int32 words, as in a block."""
    if not feature.grows:
        return [-1 if i is None else i for i in ids]
    pairs = ([-1, -1] if i is None else list(np.array([i], "<u8").view("<i4")) for i in ids)
    return [[int(word) for word in pair] for pair in pairs]


def signed(number):
    return number - 2**64 if number >= 2**63 else number


def by_hand(rows, config, held_out=0):
    """[(item, count, {feature: ids})], collisions, and events of items that stand for several ids."""
    shown = [
        f for f in config.features if f.name in (*config.target_features, config.loss.item_feature)
    ]
    item = config.feature(config.loss.item_feature)
    counts, originals, combinations = Counter(), defaultdict(dict), defaultdict(Counter)
    for row in rows:
        length = max(len(row[name] or ()) for name in ("item_id", "cate_id", "tags", "time"))
        for at in range(max(length - held_out, 0)):
            entries = {f.name: row[f.name][at] if row[f.name] else None for f in shown}
            (code,) = encode(entries[item.name], item)
            if code is None:
                continue
            (original,) = (v for v in entries[item.name] if v is not None)
            counts[code] += 1
            originals[code].setdefault(original)
            combinations[code][tuple(encode(entries[f.name], f) for f in shown)] += 1
    # For ties, Counter.most_common gives the one that occurred first.
    made = [
        (
            next(iter(originals[code])),
            count,
            {
                f.name: words(ids, f)
                for f, ids in zip(shown, combinations[code].most_common(1)[0][0], strict=True)
            },
        )
        for code, count in sorted(counts.items(), key=lambda pair: (-pair[1], signed(pair[0])))
    ]
    collisions = sum(len(found) - 1 for found in originals.values())
    return made, collisions, sum(counts[code] for code, ids in originals.items() if len(ids) > 1)


def as_rows(found):
    return [
        (item, int(count), {name: ids[i].tolist() for name, ids in found.ids.items()})
        for i, (item, count) in enumerate(zip(found.item.to_pylist(), found.count_I, strict=True))
    ]


def item(**settings):
    return FeatureConfig(name="item_id", **settings)


SETTINGS = [
    (item(hash_bucket_size=40), TAGS, False),
    (item(hash_bucket_size=40, hash_type="murmur"), GROWING_TAGS, False),
    (item(hash_bucket_size=2**20, hash_type="murmur"), TAGS, True),
    (item(hash_bucket_size=7, hash_type="murmur"), TAGS, True),
    (item(hash_bucket_size=0), GROWING_TAGS, False),
    (item(hash_bucket_size=0, hash_type="murmur"), TAGS, True),
]


@pytest.mark.parametrize("held_out", [0, 2])
@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_a_catalogue_against_dictionaries(tmp_path, setting, held_out):
    of_item, tags, texts = SETTINGS[setting]
    rows = make_rows(150, texts)
    config = make_config(write_logs(tmp_path, rows, texts), of_item, tags, check_length=True)
    found = of_config.collect(config, Cut(held_out))
    expected, collisions, shared_events = by_hand(rows, config, held_out)
    assert as_rows(found) == expected
    assert (found.collisions, found.shared_events) == (collisions, shared_events)
    assert (collisions > 0) == (0 < of_item.hash_bucket_size < 1000)
    assert found.item.type == (pa.large_string() if texts else pa.int64())
    assert found.count_I.dtype == np.int64
    assert all(ids.dtype == np.int32 for ids in found.ids.values())


@pytest.mark.parametrize("target", [None, ("item_id",), ("cate_id", "tags")])
def test_target_features_and_the_item_are_kept(tmp_path, target):
    rows = make_rows(60)
    config = make_config(write_logs(tmp_path, rows), target=target)
    found = of_config.collect(config)
    assert set(found.ids) == {*config.target_features, "item_id"}
    assert as_rows(found) == by_hand(rows, config)[0]


def test_ids_of_other_types_are_kept_as_they_are(tmp_path):
    types = {"item_id": pa.list_(pa.int16()), "cate_id": FLAT, "tags": FLAT, "time": FLAT}
    rows = [{"item_id": [3, -4, 3], "cate_id": [1, 2, 1], "tags": [1] * 3, "time": [0] * 3}]
    write_log(tmp_path / "short.orc", rows, types)
    found = of_config.collect(make_config(tmp_path, item(hash_bucket_size=0)))
    assert found.item == pa.array([3, -4])
    write_log(tmp_path / "short.orc", rows, types | {"item_id": pa.list_(pa.date32())})
    found = of_config.collect(make_config(tmp_path, item(hash_bucket_size=0)))
    assert found.item == pa.array([3, -4], pa.date32())
    row = {"item_id": [b"\xff", b"a", b"a"], "cate_id": [1] * 3, "tags": [1] * 3, "time": [1] * 3}
    write_log(tmp_path / "short.orc", [row], types | {"item_id": pa.list_(pa.binary())})
    found = of_config.collect(make_config(tmp_path, item(hash_bucket_size=0, hash_type="farm")))
    assert found.item.to_pylist() == [b"a", b"\xff"]


def test_the_file_does_not_depend_on_the_number_of_threads(tmp_path):
    write_logs(tmp_path / "log", make_rows(200))
    files = []
    for threads in (0, 1, 4):
        config = make_config(tmp_path / "log", thread_num=threads)
        of_config.save(of_config.collect(config), tmp_path / f"{threads}.parquet", config)
        files.append((tmp_path / f"{threads}.parquet").read_bytes())
    assert files[0] == files[1] == files[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("0.parquet", "1.parquet", "4.parquet", "log")
    ]


def test_combinations_are_bounded_and_counts_exact(tmp_path, monkeypatch):
    """The time gives each event a different combination."""
    rows = make_rows(200)
    config = make_config(write_log(tmp_path / "a.orc", rows, TYPES, stripe_rows=3), target=None)
    monkeypatch.setattr(item_counts, "_SPARE_COMBINATIONS", 10)
    monkeypatch.setattr(item_counts, "_KEPT_COMBINATIONS", 2)
    held = []
    add = item_counts._Tally.add
    monkeypatch.setattr(
        item_counts._Tally, "add", lambda self, counts: (add(self, counts), held.append(self.rows))
    )
    found = as_rows(of_config.collect(config))
    expected = by_hand(rows, config)[0]
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    # Two for each of the log's 64 ids, which may be held twice, 10 spare ones, and those of a stripe.
    assert max(held) < 4 * len(IDS) + 10 + 3 * 11 < sum(count for _, count, _ in expected) / 2
    for row, right in zip(found, expected, strict=True):
        assert row[2]["item_id"] == right[2]["item_id"]


# ------------------------------------------------------------------------------------- the file


def test_a_saved_catalogue_comes_back(tmp_path):
    for number, (of_item, tags, texts) in enumerate(SETTINGS):
        directory = tmp_path / str(number)
        config = make_config(write_logs(directory, make_rows(40, texts), texts), of_item, tags)
        made = of_config.collect(config)
        of_config.save(made, directory / "deep" / "catalogue.parquet", config)
        # Settings that do not affect encoding may change.
        other = dataclasses.replace(
            config,
            features=tuple(dataclasses.replace(f, emb_dim=8) for f in config.features[::-1]),
            model=dataclasses.replace(config.model, seq_len=77),
            io=dataclasses.replace(config.io, truncate_side="right", data_paths="elsewhere"),
        )
        back = of_config.load(directory / "deep" / "catalogue.parquet", other)
        assert as_rows(back) == as_rows(made)
        assert back.item.type == made.item.type
        assert (back.collisions, back.shared_events) == (made.collisions, made.shared_events)
        for name, ids in made.ids.items():
            assert (back.ids[name].shape, back.ids[name].dtype) == (ids.shape, ids.dtype)


def test_a_fingerprint_is_of_the_contents(tmp_path):
    config = make_config(write_logs(tmp_path / "log", make_rows(10, texts=True), texts=True))
    config = change(config, "item_id", hash_type="murmur")
    found = of_config.collect(config)
    of_config.save(found, tmp_path / "catalogue.parquet", config)
    assert (
        of_config.load(tmp_path / "catalogue.parquet", config).fingerprint() == found.fingerprint()
    )
    more = found.count_I.copy()
    more[-1] += 1
    others = [
        found._replace(count_I=more),
        found._replace(item=found.item.take(pa.array(np.roll(np.arange(len(more)), 1)))),
        found._replace(ids=found.ids | {"tags": found.ids["tags"] + 1}),
    ]
    assert len({each.fingerprint() for each in [found, *others]}) == 4


def test_the_columns_of_the_file(tmp_path):
    config = make_config(write_logs(tmp_path, make_rows(40)), item(hash_bucket_size=0))
    of_config.save(of_config.collect(config), tmp_path / "catalogue.parquet", config)
    schema = pyarrow.parquet.read_schema(tmp_path / "catalogue.parquet")
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        "item": pa.int64(),
        "count": pa.int64(),
        "ids/item_id": pa.list_(pa.int32(), 2),
        "ids/tags": pa.list_(pa.int32(), 3),
        "ids/cate_id": pa.list_(pa.int32(), 1),
    }


def change(config, name, **settings):
    features = (
        dataclasses.replace(f, **settings) if f.name == name else f for f in config.features
    )
    return dataclasses.replace(config, features=tuple(features))


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (
            lambda c: change(c, "item_id", hash_bucket_size=41),
            "hash_bucket_size of feature item_id",
        ),
        (lambda c: change(c, "item_id", hash_type="farm"), "hash_type of feature item_id"),
        (lambda c: change(c, "tags", bag_size=4), "bag_size of feature tags"),
        (lambda c: change(c, "cate_id", column="time"), "column of feature cate_id"),
        (
            lambda c: dataclasses.replace(c, loss=LossConfig(target_features=("item_id", "time"))),
            "loss.target_features",
        ),
        (
            lambda c: dataclasses.replace(
                c, loss=dataclasses.replace(c.loss, item_feature="cate_id")
            ),
            "loss.item_feature",
        ),
    ],
)
def test_a_catalogue_of_other_settings_is_refused(tmp_path, changed, what):
    config = make_config(write_logs(tmp_path, make_rows(10)))
    path = tmp_path / "catalogue.parquet"
    of_config.save(of_config.collect(config), path, config)
    with pytest.raises(UserError) as caught:
        of_config.load(path, changed(config))
    assert str(caught.value).startswith(f"{what}: catalogue {path} was made with ")
    assert "\n" not in str(caught.value)


def test_what_is_no_catalogue_is_refused(tmp_path):
    config = make_config(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        of_config.load(tmp_path / "none.parquet", config)
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(UserError, match="cannot be read"):
        of_config.load(tmp_path / "text.parquet", config)
    pyarrow.parquet.write_table(pa.table({"item": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="expected a catalogue"):
        of_config.load(tmp_path / "other.parquet", config)


def test_a_catalogue_that_cannot_be_written_is_refused(tmp_path):
    config = make_config(write_logs(tmp_path / "log", make_rows(10)))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "log", tmp_path / "file" / "catalogue.parquet"):
        with pytest.raises(UserError, match="the catalogue cannot be written"):
            of_config.save(of_config.collect(config), path, config)
    assert not list(tmp_path.glob(".*.tmp"))


# ---------------------------------------------------------------------------------- mistakes


def test_unreadable_stripes_stop_or_are_skipped(tmp_path, monkeypatch, capsys):
    rows = make_rows(60)
    write_logs(tmp_path, rows)
    (tmp_path / "c.orc").write_text("no ORC")
    read = orc.read_stripe

    def damaged(file, stripe, columns):
        if file.path.name == "a.orc" and stripe == 4:
            raise UserError("a.orc: stripe 4 cannot be read")
        return read(file, stripe, columns)

    def refuse(*_):
        raise UserError("cannot be read")

    monkeypatch.setattr(orc, "read_stripe", damaged)
    skipping = make_config(tmp_path, on_error="skip_stripe")
    assert as_rows(of_config.collect(skipping)) == by_hand(rows[:12] + rows[15:], skipping)[0]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"skipped: {tmp_path / 'c.orc'}: ")
    assert lines[1:] == ["skipped: a.orc: stripe 4 cannot be read"]
    with pytest.raises(UserError, match=r"c\.orc"):
        of_config.collect(make_config(tmp_path))
    (tmp_path / "c.orc").unlink()
    with monkeypatch.context() as broken:
        broken.setattr(orc, "read_stripe", refuse)
        with pytest.raises(UserError, match=r"no stripe of .* can be read"):
            of_config.collect(skipping)
    for threads in (0, 3):
        with pytest.raises(UserError, match="stripe 4 cannot be read"):
            of_config.collect(make_config(tmp_path, thread_num=threads))


def test_items_that_are_no_single_ids_are_refused(tmp_path):
    directory = write_logs(tmp_path, make_rows(5))
    bag = item(hash_bucket_size=40, bag_size=2)
    with pytest.raises(UserError, match=r"^features\.1\.bag_size: expected 1, .* found 2$"):
        of_config.collect(make_config(directory, bag))
    number = item(hash_bucket_size=40, op="bucketize", boundaries=(1.0,))
    with pytest.raises(UserError, match=r"^features\.1\.op: expected id, .* found bucketize$"):
        of_config.collect(make_config(directory, number))


def test_files_that_disagree_on_the_type_of_items_are_refused(tmp_path):
    hashed = item(hash_bucket_size=40, hash_type="murmur")
    write_log(tmp_path / "a.orc", make_rows(5), TYPES)
    write_log(tmp_path / "b.orc", make_rows(5, texts=True), TYPES | {"item_id": TEXTS})
    with pytest.raises(
        UserError, match=r"b\.orc: column item_id holds text, expected whole numbers"
    ):
        of_config.collect(make_config(tmp_path, hashed))


def test_a_log_without_items_is_refused(tmp_path):
    row = {"item_id": None, "cate_id": [1], "tags": [[1]], "time": [1]}
    write_log(tmp_path / "a.orc", [row], TYPES)
    with pytest.raises(UserError, match=r"no event of .* has an item \(column item_id\)"):
        of_config.collect(make_config(tmp_path))


# ------------------------------------------------------------------------------- the command

CONFIG = """
from s2s_jax.config import Config, FeatureConfig, IOConfig, TrainConfig

def get_config():
    return Config(
        io=IOConfig(data_paths={paths!r}),
        features=(
            FeatureConfig(name="item_id", hash_bucket_size=40),
            FeatureConfig(name="cate_id", hash_bucket_size=50),
        ),
        train=TrainConfig(train_steps=1),
    )
"""


def test_the_command_line(tmp_path, capsys):
    rows = make_rows(60)
    paths = str(write_logs(tmp_path / "log", rows))
    (tmp_path / "config.py").write_text(CONFIG.format(paths=paths))
    config = load_file(tmp_path / "config.py")
    out = str(tmp_path / "catalogue.parquet")
    assert main(["--config", str(tmp_path / "config.py"), "--out", out]) == 0
    expected, collisions, shared_events = by_hand(rows, config)
    assert as_rows(of_config.load(out, config)) == expected
    lines = capsys.readouterr().out.splitlines()
    events = sum(count for _, count, _ in expected)
    assert lines[0] == f"wrote {len(expected)} items of {events} events to {out}"
    assert lines[1].startswith(f"most frequent: {expected[0][0]} ({expected[0][1]}), ")
    assert lines[2].startswith(f"{collisions} more ids of the log share a row of the table")
    share = shared_events / sum(count for _, count, _ in expected)
    assert f"({share:.1%} of the events are of such items)" in lines[2]
    wide = ["--features.0.hash_bucket_size", "0"]
    assert main(["--config", str(tmp_path / "config.py"), "--out", out, *wide]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "no two ids share a bucket"
    assert main(["--help"]) == 0
    assert "--io.data_paths" in capsys.readouterr().out


def test_mistakes_of_the_command_line_are_one_line(tmp_path):
    for argv, what in (
        ([], "--config: expected a path, found nothing; give "),
        (["--config"], "--config: expected a path, found nothing"),
        (["--config", "x.py"], "--output: expected a path, found nothing; give "),
    ):
        with pytest.raises(UserError, match=f"^{what}"):
            main(argv)
    (tmp_path / "config.py").write_text(CONFIG.format(paths=str(tmp_path / "log")))
    command = [
        sys.executable,
        "-m",
        "s2s_jax",
        "catalogue",
        "--config",
        "config.py",
        "--out",
        "x",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"error: io.data_paths: {tmp_path / 'log'} does not exist\n"
    assert not (tmp_path / "x").exists()


def test_what_is_held_out_does_not_get_into_training_by_a_file(tmp_path):
    write_logs(tmp_path / "log", make_rows(20))
    config = make_config(tmp_path / "log")
    path = tmp_path / "config.py"
    path.write_text(f"from s2s_jax.config import *\n\ndef get_config():\n    return {config!r}\n")
    out = tmp_path / "catalogue.parquet"
    split = ["--eval.split", "last_events", "--eval.split.events", "1"]
    assert main(["--config", str(path), "--out", str(out), *split]) == 0
    held_out = dataclasses.replace(config, eval=EvalConfig(split=LastEvents(events=1)))
    assert as_rows(of_config.load(out, held_out)) == as_rows(of_config.collect(config, Cut(1)))
    with pytest.raises(UserError, match=r"eval\.split: catalogue .* with last_events \(now none\)"):
        of_config.load(out, config)


# ----------------------------------------------------------------------------------- MovieLens


@pytest.mark.skipif(
    not (DATA / "ml-1m").is_dir(), reason="MovieLens is not at ../shared/data/ml-1m"
)
def test_movielens_without_the_last_event_of_each_user():
    config = dataclasses.replace(load_file(REPO / "configs" / "ml1m.py"), tables=())
    config = change(config, "item_id", hash_bucket_size=0, hash_type=None)
    config = change(config, "cate_id", hash_bucket_size=65_536)
    config = dataclasses.replace(
        config, io=dataclasses.replace(config.io, data_paths=str(DATA / "ml-1m"))
    )
    found = of_config.collect(config, Cut(1))
    counts, categories = Counter(), defaultdict(set)
    for path in sorted((DATA / "ml-1m").glob("*.orc")):
        table = pyarrow.orc.read_table(path, columns=["item_id", "cate_id"])
        columns = (table[name].to_pylist() for name in ("item_id", "cate_id"))
        for items, cates in zip(*columns, strict=True):
            for (one,), (category,) in zip(items[:-1], cates[:-1], strict=True):
                counts[one] += 1
                categories[one].add(category)
    assert len(found.item) == 3416
    assert found.count_I.sum() == 999_611 - 6040
    expected = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    assert list(zip(found.item.to_pylist(), found.count_I.tolist(), strict=True)) == expected
    assert found.ids["item_id"].shape == (3416, 1, 2)
    np.testing.assert_array_equal(found.ids["item_id"][:, 0, 0], found.item.to_numpy())
    # A movie has exactly one first genre.
    hashed = {g: encode(g, config.feature("cate_id"))[0] for g in set.union(*categories.values())}
    genres = [hashed[next(iter(categories[one]))] for one in found.item.to_pylist()]
    assert found.ids["cate_id"][:, 0].tolist() == genres
    assert found.collisions == 0
