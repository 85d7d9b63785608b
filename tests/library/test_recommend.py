"""`Run.recommend` of plain histories gives what the command gives for the same rows in a log."""

import dataclasses
import shutil

import jax
import numpy as np
import of_config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
from evaluations import config_file, evaluating, rows_of, user_vector
from logs import write_log

import s2s_jax as s2s
from s2s_jax.cli.commands import recommend as command
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import (
    FeatureConfig,
    LastEvents,
    Pack,
    TableConfig,
    validate,
)
from s2s_jax.jobs.recommend import Request, recommend
from s2s_jax.jobs.train import train
from s2s_jax.ranking.restored import restore

USERS = 70
K = 7
BEGIN = 946_684_800


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, USERS)
    return directory


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory):
    """Tables of buckets, bags, the newest events kept."""
    config = evaluating(log, tmp_path_factory.mktemp("run") / "run")
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, train_steps=20, save_steps=10)
    )
    assert not train(config, make_mesh(jax.devices()[:1]))
    return config


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A log of texts and times, in several stripes, some events of which have no item."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        length = user % 17
        first, gaps = rng.integers(40), rng.integers(1, 50_000, length)
        rows.append(
            {
                "item_id": [
                    f"item {(first + n) % 40}" if n % 7 != 5 else None for n in range(length)
                ],
                "tags": [[int(tag) for tag in rng.integers(9, size=n % 4)] for n in range(length)],
                "timestamp": (BEGIN + np.cumsum(gaps)).tolist(),
            }
        )
    types = {
        "item_id": pa.list_(pa.string()),
        "tags": pa.list_(pa.list_(pa.int64())),
        "timestamp": pa.list_(pa.int64()),
    }
    directory = tmp_path_factory.mktemp("texts")
    write_log(directory / "log.orc", rows, types, stripe_rows=20)
    return directory


@pytest.fixture(scope="module")
def packed(texts, tmp_path_factory):
    """Growing tables, packed windows, times, the oldest events kept in training."""
    config = evaluating(texts, tmp_path_factory.mktemp("run") / "run", split=LastEvents(events=1))
    grows = {"hash_type": "murmur", "hash_bucket_size": 0}
    of_time = {"column": "timestamp", "emb_dim": 4}
    config = dataclasses.replace(
        config,
        features=(
            FeatureConfig(name="item_id", emb_dim=8, **grows),
            FeatureConfig(name="tags", emb_dim=4, bag_size=3, combiner="sum", **grows),
            FeatureConfig(name="gap", op="time_gap", hash_bucket_size=20, **of_time),
            FeatureConfig(
                name="hour", op="hour_of_day", utc_offset_hours=5.5, hash_bucket_size=24, **of_time
            ),
        ),
        tables=(
            TableConfig(name="item_id", capacity=16, init_std=0.5),
            TableConfig(name="tags", capacity=16, init_std=0.5),
            TableConfig(name="gap", init_std=0.5),
            TableConfig(name="hour", init_std=0.5),
        ),
        io=dataclasses.replace(
            config.io, sequences=Pack(rows=10, windows=2), truncate_side="right"
        ),
        train=dataclasses.replace(config.train, train_steps=12),
    )
    validate(config)
    assert not train(config, make_mesh(jax.devices()[:1]))
    return config


def of_the_command(config, log, out, mesh, **more):
    """Items and scores of each row of the log; empty for those without events."""
    recommend(config, Request(input=str(log), output=out, top_k=K, **more), mesh)
    table = pq.read_table(out)
    by_row = {}
    for row in table.to_pylist():
        by_row[row["file"], row["row"]] = row["items"], row["scores"]
    return by_row


def assert_same(found, expected, histories, config):
    assert len(found.items) == len(found.scores) == len(histories)
    there = [n for n, history in enumerate(histories) if history["item_id"]]
    assert len(there) == len(expected)
    for n, (items, scores) in zip(there, (expected[key] for key in sorted(expected)), strict=True):
        # Batches of other sizes may round otherwise, but nothing here is as close as that.
        assert found.items[n] == items
        np.testing.assert_allclose(found.scores[n], scores, atol=2e-6)
    for n in set(range(len(histories))) - set(there):
        assert found.items[n] == found.scores[n] == []


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        pytest.param(*other, marks=pytest.mark.slow)
        for other in (("trained", 1), ("trained", 4), ("packed", 1), ("packed", 4))
    ],
)
def test_recommends_the_same_items_as_the_command(name, devices, request, tmp_path):
    config = request.getfixturevalue(name)
    log = request.getfixturevalue({"trained": "log", "packed": "texts"}[name])
    expected = of_the_command(
        config, log, tmp_path / "recs.parquet", make_mesh(jax.devices()[:devices])
    )
    histories = rows_of(log)
    run = s2s.Run(config.train.output_dir, devices=jax.devices()[:devices])
    assert_same(run.recommend(histories, K), expected, histories, config)
    # Few at a time, as a table, and entries that are no lists.
    few = [run.recommend([history], K) for history in histories[:6]]
    joined = s2s.Recommendations([one.items[0] for one in few], [one.scores[0] for one in few])
    of_few = dict(sorted(expected.items())[: sum(bool(h["item_id"]) for h in histories[:6])])
    assert_same(joined, of_few, histories[:6], config)
    head = s2s.read_log(log).head(6)
    assert run.recommend(head, K) == run.recommend(histories[:6], K)


def test_recommends_the_same_items_as_the_command_with_seen_items(trained, log, tmp_path):
    expected = of_the_command(
        trained, log, tmp_path / "recs.parquet", make_mesh(jax.devices()[:1]), keep_seen=True
    )
    run = s2s.Run(trained.train.output_dir, devices=jax.devices()[:1])
    histories = rows_of(log)
    flat = [history | {"item_id": [i for (i,) in history["item_id"]]} for history in histories]
    without = run.recommend(flat, K)
    assert_same(run.recommend(flat, K, keep_seen=True), expected, histories, trained)
    for history, items in zip(flat, without.items, strict=True):
        assert not set(history["item_id"]) & set(items)
    assert run.recommend(flat, K, keep_seen=False) == without == run.recommend(flat, K)


def test_recommends_the_same_items_as_the_command_on_all_devices(trained, log, tmp_path):
    """A run that was moved, a catalogue file, and a checkpoint by its step."""
    shutil.copytree(trained.train.output_dir, tmp_path / "moved")
    of_config.save(of_config.collect(trained), tmp_path / "items.parquet", trained)
    arguments = ["--config", config_file(trained, tmp_path), "--input", str(log), "--top_k", str(K)]
    arguments += ["--checkpoint", "10", "--output", str(tmp_path / "recs.parquet")]
    assert command.main(arguments) == 0
    table = pq.read_table(tmp_path / "recs.parquet")
    run = s2s.Run(tmp_path / "moved", checkpoint=10, catalogue=tmp_path / "items.parquet")
    found = run.recommend(rows_of(log), K)
    assert found.items == table["items"].to_pylist()
    np.testing.assert_allclose(found.scores, table["scores"].to_pylist(), atol=2e-6)


def test_encode_returns_the_predictions_of_the_model(trained, log):
    run = s2s.Run(trained.train.output_dir, devices=jax.devices()[:1])
    rows = rows_of(log)[:11]
    mesh = make_mesh(jax.devices()[:1])
    expected = user_vector(trained, restore(trained, mesh, "best"), rows, mesh)
    empty = {name: [] for name in rows[0]}
    vectors = run.encode([*rows, empty])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[:-1], expected, atol=2e-6)
    assert not vectors[-1].any()
    assert run.encode([]).shape == (0, trained.model.hidden_size)
    assert run.recommend([]) == ([], [])


def test_encode_needs_no_log(trained, tmp_path):
    run = s2s.Run(trained.train.output_dir, data_paths=str(tmp_path / "gone"))
    history = {"item_id": [5], "behavior_id": [1], "tags": [[1, 2]]}
    assert np.isfinite(run.encode([history])).all()
    with pytest.raises(s2s.UserError, match="gone"):
        run.recommend([history])


def test_repeated_calls_compile_nothing(trained, log, monkeypatch):
    run = s2s.Run(trained.train.output_dir, devices=jax.devices()[:1])
    rows = rows_of(log)
    run.recommend(rows, K)
    run.recommend(rows[:1], K)

    def compiles(*_, **__):
        raise AssertionError("compiles")

    monkeypatch.setattr("jax._src.compiler.compile_or_get_cached", compiles)
    for n in (2, 3, 4, 33, 40):
        run.recommend(rows[:n], K)
    with pytest.raises(AssertionError, match="compiles"):
        run.recommend(rows, 4 * K + 3)


@pytest.mark.slow
def test_more_items_than_there_are_cost_nothing(trained, log, tmp_path):
    mesh = make_mesh(jax.devices()[:1])
    run = s2s.Run(trained.train.output_dir, devices=jax.devices()[:1])
    items = len(of_config.collect(trained).item)
    # So large a list would not fit into memory.
    for k in (10**12, np.int64(2**62)):
        found = run.recommend(s2s.read_log(log).head(2).to_pylist(), k, keep_seen=True)
        assert [len(listed) for listed in found.items] == [items] * 2
    request = Request(input=str(log), output=tmp_path / "x.parquet", top_k=10**12, keep_seen=True)
    recommend(trained, request, mesh)
    listed = pq.read_table(tmp_path / "x.parquet")["items"]
    assert max(map(len, listed)) == items


@pytest.mark.parametrize(
    ("histories", "k", "words"),
    [
        ([{"item_id": [1]}], 5, "row 0 has no behavior_id"),
        ([{"item_id": [1, 2], "behavior_id": [1], "tags": [[1], [1]]}], 5, "disagree in length"),
        ([{"item_id": ["a"], "behavior_id": [1], "tags": [[1]]}], 5, "expected whole numbers"),
        ([{"item_id": [1], "behavior_id": [1], "tags": [[1, 2, 3, 4]]}], 5, "holds 4 ids"),
        ([], 0, "k: expected a whole number of at least 1, found 0"),
        ([], 3.0, "k: expected a whole number of at least 1, found 3.0"),
    ],
)
def test_mistakes_are_explained(trained, histories, k, words):
    run = s2s.Run(trained.train.output_dir, devices=jax.devices()[:1])
    with pytest.raises(s2s.UserError, match=words):
        run.recommend(histories, k)
