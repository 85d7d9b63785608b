"""The split by time, compared with plain Python over the rows of the log, and commands that use it."""

import dataclasses
import datetime
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import of_config
import pyarrow as pa
import pytest
import small
from evaluations import config_file, user_vector
from jobs_of import job, lines, one_device
from logs import write_log
from places import REPO
from pyarrow import orc

from s2s_jax.cli.commands import evaluate
from s2s_jax.cli.exit import run_command
from s2s_jax.config import (
    ByTime,
    Config,
    FeatureConfig,
    LastEvents,
    LossConfig,
    TrainConfig,
    identity,
    load,
    validate,
)
from s2s_jax.config.settings import Items
from s2s_jax.config.times import seconds_of
from s2s_jax.data.encoding.held_out import Cut, TimeCut
from s2s_jax.data.logs.orc import OrcFile
from s2s_jax.errors import UserError
from s2s_jax.jobs.train import train
from s2s_jax.ranking.encode import item_vectors
from s2s_jax.ranking.evaluation import EvaluationSettings, Evaluator
from s2s_jax.ranking.restored import restore

DAY = 86_400
# 1 December 2000. Some events have this time; all events of this log are at midnight.
SPLIT = 975_628_800
VALIDATION = SPLIT - 5 * DAY
ROWS = 60


def dated(seconds):
    return datetime.date(1970, 1, 1) + datetime.timedelta(seconds=seconds)


# Type of a column's entries, unit of its numbers, and conversion from seconds.
KINDS = {
    "seconds": (pa.int64(), "s", int),
    "short": (pa.int32(), "s", int),
    "milliseconds": (pa.int64(), "ms", lambda t: t * 1000),
    "text of microseconds": (pa.string(), "us", lambda t: str(t * 10**6)),
    "timestamps": (pa.timestamp("us"), "s", lambda t: t * 10**6),
    "dates": (pa.date32(), "s", dated),
    "bags": (pa.list_(pa.int64()), "s", lambda t: [t]),
    "bags of text": (pa.list_(pa.string()), "s", lambda t: [None, str(t)]),
}


def make_rows(seed=0):
    """Rows of 0 to 11 events, mostly sorted by time; some times are missing."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(ROWS):
        length = int(rng.integers(12))
        days = rng.integers(-12, 10, length)
        if number % 5:
            days = np.sort(days)
        row = {
            "event": [number * 100 + position for position in range(length)],
            "item_id": [int(i) if rng.random() < 0.9 else None for i in rng.zipf(1.5, length) % 50],
            "time": [SPLIT + int(d) * DAY if rng.random() < 0.85 else None for d in days],
        }
        rows.append(row)
    # Rows without some columns, and rows on one side of the split.
    rows[7] = {"event": [700, 701], "item_id": [1, 2], "time": None}
    rows[8] = {"event": [800, 801], "item_id": None, "time": [SPLIT - DAY, SPLIT]}
    rows[9] = {"event": [900, 901], "item_id": [3, 3], "time": [SPLIT - 9 * DAY, SPLIT - 1]}
    rows[10] = {"event": [1000, 1001], "item_id": [3, 4], "time": [SPLIT, SPLIT + DAY]}
    rows[11] = {"event": [1100, 1101], "item_id": [5, 6], "time": [VALIDATION - 1, VALIDATION]}
    return rows


def write_logs(directory, rows, kind="seconds"):
    """Two files: one with stripes of 4 rows, one with a single stripe."""
    entry, _, stored = KINDS[kind]
    types = {name: pa.list_(pa.int64()) for name in ("event", "item_id")}
    types["time"] = pa.list_(entry)
    written = [
        row | {"time": row["time"] and [None if t is None else stored(t) for t in row["time"]]}
        for row in rows
    ]
    write_log(directory / "a.orc", written[:25], types, stripe_rows=4)
    write_log(directory / "b.orc", written[25:], types)
    return directory


def make_config(data_paths, kind="seconds", seq_len=5, **io):
    """A configuration whose time feature has another name than its column."""
    time = FeatureConfig(name="when", column="time", op="day_of_week", hash_bucket_size=7)
    config = Config()
    made = dataclasses.replace(
        config,
        io=dataclasses.replace(
            config.io,
            data_paths=str(data_paths),
            batch_size=ROWS,
            shuffle=False,
            thread_num=0,
            **io,
        ),
        features=(
            FeatureConfig(name="event", hash_bucket_size=10_000),
            dataclasses.replace(time, time_unit=KINDS[kind][1], bag_size=1),
            FeatureConfig(name="item_id", hash_bucket_size=100),
        ),
        model=dataclasses.replace(config.model, seq_len=seq_len),
        loss=LossConfig(target_features=("item_id",)),
        train=TrainConfig(train_steps=1),
    )
    return split_by_time(made, feature="when")


def split_by_time(config, at="2000-12-01", validation_at=None, feature=None, **settings):
    """Return `config` with a split by time; without `feature`, its time feature does not change."""
    if feature is None:
        feature = config.eval.split.feature if config.eval.split else "timestamp"
    split = ByTime(at=at, validation_at=validation_at, feature=feature)
    changed = dataclasses.replace(config.eval, split=split, **settings)
    made = dataclasses.replace(config, eval=changed)
    validate(made)
    return made


def before(row, at):
    """Number of a row's events before its first event at or after the time."""
    for position, time in enumerate(row["time"] or []):
        if time is not None and time >= at:
            return position
    return max(len(column or ()) for column in row.values())


def with_missing(items):
    """Return items as in batches, with -1 for missing ones."""
    return [-1 if item is None else item for item in items]


# ------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("validation_at", [None, "2000-11-26"])
def test_batches_hold_the_events_before_the_split(tmp_path, kind, validation_at):
    rows = make_rows()
    log = write_logs(tmp_path / "log", rows, kind)
    end = SPLIT if validation_at is None else VALIDATION
    for seq_len in (5, 20):
        kept = [row["event"][: before(row, end)][-seq_len:] for row in rows]
        for changes in ({}, {"layout": "flat"}, {"cache": str(tmp_path / "cache")}):
            config = make_config(log, kind, seq_len, **changes)
            config = split_by_time(config, validation_at=validation_at)
            # Twice: the second time reads what the first one wrote to the cache.
            for _ in range(2):
                reader = of_config.reader(config, ROWS)
                found = next(reader).arrays
                reader.close()
                assert found["length"].tolist() == [len(events) for events in kept]
                if "values" in found:
                    flat = found["values"][0, : found["length"].sum(), 0]
                    assert flat.tolist() == [event for events in kept for event in events]
                else:
                    for events, ids in zip(kept, found["ids"][..., 0], strict=True):
                        assert ids.tolist() == events + [-1] * (seq_len - len(events))


def test_caches_of_other_splits_are_others(tmp_path):
    log = write_logs(tmp_path / "log", make_rows())
    plain = make_config(log)
    different = [
        dataclasses.replace(plain, eval=dataclasses.replace(plain.eval, split=None)),
        plain,
        split_by_time(plain, "2000-12-02"),
        split_by_time(plain, validation_at="2000-11-26"),
    ]
    assert len({json.dumps(identity.of_decoding(config)) for config in different}) == 4


@pytest.mark.parametrize("kind", ["seconds", "text of microseconds", "bags"])
def test_the_catalogue_counts_the_events_before_the_split(tmp_path, kind):
    rows = make_rows()
    config = make_config(write_logs(tmp_path, rows, kind), kind)
    everything = Counter(i for row in rows for i in row["item_id"] or () if i is not None)
    for validation_at, end in ((None, SPLIT), ("974764800.0", SPLIT - 10 * DAY)):
        found = of_config.collect(split_by_time(config, validation_at=validation_at))
        counts = Counter(
            item
            for row in rows
            for item in (row["item_id"] or ())[: before(row, end)]
            if item is not None
        )
        assert dict(zip(found.item.to_pylist(), found.count_I.tolist(), strict=True)) == counts
        assert 0 < len(counts) < len(everything)


def test_a_catalogue_of_another_split_is_refused(tmp_path):
    config = make_config(write_logs(tmp_path / "log", make_rows()))
    path = tmp_path / "catalogue.parquet"
    of_config.save(of_config.collect(config), path, config)
    of_config.load(path, config)
    for other in (
        split_by_time(config, "2000-12-02"),
        dataclasses.replace(config, eval=dataclasses.replace(config.eval, split=None)),
    ):
        with pytest.raises(UserError, match=r"^eval\.split(\.at)?: catalogue .* \(now "):
            of_config.load(path, other)


# ----------------------------------------------------------------------------------- histories


@pytest.mark.parametrize("kind", ["seconds", "timestamps", "bags of text"])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_histories_end_at_the_split_and_targets_follow(tmp_path, kind, split):
    rows = make_rows()
    config = make_config(write_logs(tmp_path, rows, kind), kind)
    config = split_by_time(config, validation_at="2000-11-26")
    catalogue = of_config.collect(config)
    items = catalogue.item.to_pylist()
    expected = []
    for row in rows:
        begin = before(row, SPLIT if split == "test" else VALIDATION)
        length = len(row["event"])
        end = length if split == "test" else before(row, SPLIT)
        if 0 < begin < end:
            item = (row["item_id"] or [None] * length)[begin]
            expected.append((row, begin, items.index(item) if item in items else -1))
    reader = of_config.history_reader(
        config, of_config.index(config), of_config.numbers(catalogue, config), 7
    )
    batches = [
        batch
        for stripe in range(reader.stripes)
        for batch in reader.read(stripe, of_config.targets(config, split))
    ]
    found = [(batch, n) for batch in batches for n in range(batch.users)]
    assert len(found) == len(expected) > 10
    assert {number < 0 for _, _, number in expected} == {True, False}
    for (batch, n), (row, begin, number) in zip(found, expected, strict=True):
        newest = row["event"][:begin][-5:]
        assert batch.shown_of(n)[:, 0].tolist() == newest
        assert batch.shown_U[n] == len(newest)
        assert batch.events_U[n] == begin
        assert batch.target_U[n] == number
        seen = [items.index(i) for i in (row["item_id"] or ())[:begin] if i in items]
        assert [i for i in batch.items_of(n) if i >= 0] == seen
        assert batch.known_events()[n] == len(seen)
        assert set(batch.seen.item_T[batch.seen.user_T == n]) == set(seen)
    whole = [b for stripe in range(reader.stripes) for b in reader.read(stripe, None)]
    assert sum(batch.users for batch in whole) == sum(len(row["event"]) > 0 for row in rows)


# Times, number of events before 10, number of events before 20.
BY_HAND = [
    ([1, 9, 10, 20], 2, 3),
    ([10, 10, 20, 20], 0, 2),
    ([20, 25], 0, 0),
    ([1, 2], 2, 2),
    ([], 0, 0),
    ([1, 20, 5, 10, 30], 1, 1),
    ([1, 15, 5, 20], 1, 3),
    ([None, 1, None, 10, None, 20, None], 3, 5),
    ([None, None], 2, 2),
    (None, 3, 3),
]


def test_rows_are_cut_at_the_first_time_that_is_not_before():
    times = pa.array([times for times, *_ in BY_HAND], pa.list_(pa.int64()))
    batch = pa.record_batch({"when": times})
    lengths = np.array([3 if times is None else len(times) for times, *_ in BY_HAND])
    file = OrcFile(Path("a.orc"), 1, batch.schema, (len(BY_HAND),), "")
    feature = FeatureConfig(name="when", hash_bucket_size=10)
    for part in (slice(0, len(BY_HAND)), slice(2, 7)):
        size = part.stop - part.start
        for at, column in (("10", 1), ("9.5", 1), ("20", 2)):
            cut = Cut(time=TimeCut(feature, seconds_of(at)))
            rows = batch.slice(part.start, size)
            found = cut.kept(rows, lengths[part], file, 0)
            assert found.tolist() == [row[column] for row in BY_HAND[part]]
    # Rows without any of the other columns have nothing to keep.
    assert not cut.kept(batch, 0 * lengths, file, 0).any()
    assert Cut(last=2).kept(batch, lengths, file, 0).tolist() == [2, 2, 0, 0, 0, 3, 2, 5, 0, 1]


def test_cuts_are_exact_with_every_unit():
    nanoseconds = [SPLIT * 10**9 - 1, SPLIT * 10**9, SPLIT * 10**9 + 1]
    for type_, unit in ((pa.int64(), "ns"), (pa.timestamp("ns"), "s"), (pa.uint64(), "ns")):
        batch = pa.record_batch({"when": pa.array([nanoseconds], pa.list_(type_))})
        file = OrcFile(Path("a.orc"), 1, batch.schema, (1,), "")
        feature = FeatureConfig(name="when", hash_bucket_size=10, time_unit=unit)
        for at, kept in (
            ("2000-12-01", 1),
            ("2000-12-01T01:00+01:00", 1),
            (f"{SPLIT}", 1),
            (f"{SPLIT}.000000001", 2),
            (f"{SPLIT - 1}.999999999", 0),
            ("99999999999999999999", 3),
            ("-99999999999999999999", 0),
        ):
            cut = Cut(time=TimeCut(feature, seconds_of(at)))
            assert cut.kept(batch, np.array([3]), file, 0).tolist() == [kept]


def test_text_that_is_no_time_is_named(tmp_path):
    rows = [{"event": [1, 2], "item_id": [1, 2], "time": [1, 2]} for _ in range(30)]
    log = write_logs(tmp_path, rows, "text of microseconds")
    types = {"event": pa.list_(pa.int64()), "item_id": pa.list_(pa.int64())}
    rows = [row | {"time": ["1", "noon" if n == 6 else None]} for n, row in enumerate(rows)]
    write_log(log / "a.orc", rows, types | {"time": pa.list_(pa.string())}, stripe_rows=4)
    config = make_config(log, "text of microseconds")
    reader = of_config.reader(config, ROWS)
    for call in (lambda: next(reader), lambda: of_config.collect(config)):
        with pytest.raises(UserError, match=r"a\.orc: row 6, column time: .* found 'noon'"):
            call()
    reader.close()


def test_columns_without_times_are_refused(tmp_path):
    types = {name: pa.list_(pa.int64()) for name in ("event", "item_id")}
    types["time"] = pa.list_(pa.float64())
    write_log(tmp_path / "a.orc", [{"event": [1], "item_id": [1], "time": [1.0]}], types)
    config = make_config(tmp_path)
    number = dataclasses.replace(config.features[1], op="bucketize", boundaries=(1.0,))
    config = dataclasses.replace(
        config, features=(config.features[0], number, *config.features[2:])
    )
    with pytest.raises(UserError, match=r"column time: expected .* of times .* found list<"):
        of_config.index(config)


# ------------------------------------------------------------------------------------- mistakes

BY_TIME = ("--eval.split", "by_time", "--eval.split.at")
VALIDATION_AT = "--eval.split.validation_at"


@pytest.mark.parametrize(
    ("overrides", "start", "words"),
    [
        (
            ["--eval.split", "last_events", "--eval.split.events", "0"],
            "eval.split.events",
            "least 1",
        ),
        ([*BY_TIME, "1 December"], "eval.split.at", "2000-12-01T12:00"),
        ([*BY_TIME, "nan"], "eval.split.at", "seconds since 1970"),
        ([*BY_TIME, "20001201"], "eval.split.at", "2000-12-01 if it is a date"),
        ([*BY_TIME, "1009843200000"], "eval.split.at", "before the year 10,000"),
        (BY_TIME[:2], "eval.split.at", "text because eval.split is by_time, found nothing"),
        ([*BY_TIME, "9", VALIDATION_AT, "x"], "eval.split.validation_at", "a time"),
        ([VALIDATION_AT, "2000-12-01"], "eval.split.validation_at", "add --eval.split by_time"),
        ([*BY_TIME, "9", VALIDATION_AT, "9"], "eval.split.validation_at", "before"),
        (
            [*BY_TIME, "2000-12-01", VALIDATION_AT, "2001-01-01"],
            "eval.split.validation_at",
            "a time before eval.split.at (2000-12-01), found '2001-01-01'",
        ),
        (
            [*BY_TIME, "9", "--eval.split.feature", "ts"],
            "eval.split.feature",
            "item_id, cate_id, behavior_id, timestamp",
        ),
        ([*BY_TIME, "9", "--eval.every_steps", "5"], "eval.split.validation_at", "every_steps"),
        (["--eval.every_steps", "5"], "eval.split", "last_events or by_time because"),
        (["--eval.split", "by_date"], "eval.split", "last_events, by_time, none, found by_date"),
        (
            [],
            "eval.split",
            "expected last_events or by_time, because there must be held-out events",
        ),
        (
            ["--split", "validation", *BY_TIME, "9"],
            "eval.split.validation_at",
            "because validation events are asked for",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_end_with_2(overrides, start, words, monkeypatch, capsys):
    base = str(REPO / "configs" / "base.py")
    monkeypatch.setattr(sys, "argv", ["evaluate", "--config", base, *overrides])
    with pytest.raises(SystemExit) as ended:
        run_command(evaluate.main)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {start}: ")
    assert words in line


def test_a_split_is_read_from_the_command_line():
    overrides = [
        *("--eval.split", "by_time", "--eval.split.at", "975628800"),
        *("--eval.split.validation_at", "2000-11-26"),
    ]
    config = load(REPO / "configs" / "base.py", overrides)
    assert config.eval.split == ByTime(at="975628800", validation_at="2000-11-26")
    assert of_config.training_cut(config).time == TimeCut(config.feature("timestamp"), VALIDATION)


# ------------------------------------------------------------------ a run, and its commands


def timed_rows(directory):
    """Rows of a log with times below 1,000; some rows end with an event without an item."""
    small.write_log(directory, 90)
    rng = np.random.default_rng(1)
    rows = []
    for path in sorted(directory.glob("*.orc")):
        mine = orc.read_table(str(path)).to_pylist()
        for row in mine:
            times = np.sort(rng.integers(1000, size=len(row["item_id"])))
            row["timestamp"] = [[int(t)] for t in times]
            if rng.random() < 0.2:
                row["item_id"][-1] = []
        bags = pa.list_(pa.list_(pa.int64()))
        write_log(path, mine, dict.fromkeys(mine[0], bags))
        rows += mine
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The configuration of a run of a few steps, and the rows of its log."""
    directory = tmp_path_factory.mktemp("timed") / "log"
    rows = timed_rows(directory)
    config = job(directory, tmp_path_factory.mktemp("run"), train_steps=6, save_steps=6)
    time = FeatureConfig(name="timestamp", emb_dim=4, hash_bucket_size=1000)
    config = dataclasses.replace(config, features=(*config.features, time))
    config = small.with_table(config, "timestamp", init_std=0.5)
    config = split_by_time(config, "700", validation_at="500", every_steps=3, batch_size=32)
    assert not train(config, one_device())
    return config, rows


@pytest.mark.slow
def test_the_evaluate_command_against_numpy(run, tmp_path, monkeypatch, capsys):
    config, rows = run
    mesh = one_device()
    # Avoids compiling again for other devices.
    monkeypatch.setattr("s2s_jax.jobs.evaluate.make_mesh", one_device)
    restored = restore(config, mesh, "newest")
    out = tmp_path / "result.json"
    arguments = ["--config", config_file(config, tmp_path), "--out", str(out)]
    evaluator = Evaluator(EvaluationSettings.of(config), mesh)
    items = evaluator.catalogue.item.to_pylist()
    ends = [sum(t < 500 for (t,) in row["timestamp"]) for row in rows]
    trained_on = Counter(
        i for row, end in zip(rows, ends, strict=True) for bag in row["item_id"][:end] for i in bag
    )
    counts = dict(zip(items, evaluator._count_I.tolist(), strict=True))
    assert counts == trained_on
    vectors = item_vectors(
        restored.functions, restored.state, evaluator.catalogue, Items.of(config), mesh
    )
    for split, begin, end in (("test", 700, 1000), ("validation", 500, 700)):
        wanted, unknown = [], 0
        for row in rows:
            at = sum(t < begin for (t,) in row["timestamp"])
            if 0 < at < sum(t < end for (t,) in row["timestamp"]):
                target = row["item_id"][at]
                known = bool(target) and target[0] in trained_on
                unknown += not known
                if known:
                    wanted.append((target[0], {name: column[:at] for name, column in row.items()}))
        users = user_vector(config, restored, [history for _, history in wanted], mesh)
        ranks = []
        for (target, history), user in zip(wanted, users, strict=True):
            scores = dict(zip(items, (vectors @ user).tolist(), strict=True))
            seen = {i for bag in history["item_id"] for i in bag} - {target}
            least = scores[target] - 1e-7
            ranks.append(sum(scores[i] >= least for i in items if i not in seen) - 1)
        ranks = np.array(ranks)
        assert evaluate.main([*arguments, "--checkpoint", "newest", "--split", split]) == 0
        result = json.loads(out.read_text())
        found = result["metrics"]
        assert (result["split"], result["split_at"], result["validation_at"]) == (
            split,
            "700",
            "500",
        )
        assert found["eval/users"] == len(ranks) > 10
        assert found["eval/unknown_targets"] == unknown > 0
        assert f"{unknown} more users" in capsys.readouterr().out
        # Scores that only differ by rounding may change places.
        near = {"abs": 2.5 / len(ranks)}
        for k in (5, 10, 50):
            assert found[f"eval/hr@{k}"] == pytest.approx((ranks < k).mean(), **near)
        assert found["eval/mrr"] == pytest.approx((1 / (ranks + 1)).mean(), abs=0.03)
    written = [line for line in lines(Path(config.train.output_dir)) if "eval/mrr" in line]
    assert [line["step"] for line in written] == [3, 6]
    assert written[-1]["eval/unknown_targets"] == unknown
    assert written[-1]["eval/mrr"] == pytest.approx(found["eval/mrr"])


def test_both_protocols_count_users_whose_event_has_no_known_item(run):
    config, rows = run
    mesh = one_device()
    restored = restore(config, mesh, "newest")
    changed = dataclasses.replace(config.eval, split=LastEvents(events=1))
    leaving_one_out = dataclasses.replace(config, eval=changed)
    for users in (None, 17):
        found = Evaluator(EvaluationSettings.of(leaving_one_out), mesh, users).evaluate(
            restored.functions, restored.state, "test"
        )
        missing = [not row["item_id"][-1] for row in rows][:users]
        assert found.metrics["eval/unknown_targets"] == sum(missing) > 0
        assert found.metrics["eval/users"] == len(missing) - sum(missing)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--eval.split.at", "800"], r"eval\.split\.at: .* made with 700, found 800"),
        ([VALIDATION_AT, "400"], r"eval\.split\.validation_at: .* made with 500, found 400"),
        (["--features.3.time_unit", "ms"], "features.3.time_unit: .* made with s, found ms"),
        (
            ["--eval.split.feature", "item_id"],
            r"eval\.split\.feature: .* timestamp, found item_id",
        ),
        (
            [*("--eval.every_steps", "None"), *("--eval.split", "last_events")],
            r"eval\.split: .* made with by_time, found last_events",
        ),
    ],
)
def test_another_split_than_the_runs_is_refused(run, tmp_path, overrides, words):
    config, _ = run
    arguments = ["--config", config_file(config, tmp_path)]
    with pytest.raises(UserError, match=words):
        evaluate.main([*arguments, *overrides])


def test_a_run_of_before_there_were_splits_is_refused_one(run, tmp_path):
    config, _ = run
    shutil.copytree(config.train.output_dir, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    del saved["eval"]["split"]
    path.write_text(json.dumps(saved))
    moved = dataclasses.replace(config.train, output_dir=str(tmp_path / "run"))
    moved = dataclasses.replace(config, train=moved)
    with pytest.raises(UserError, match=r"eval\.split: .* made with none, found by_time"):
        restore(moved, one_device())
