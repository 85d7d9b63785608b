"""Evaluation agrees with recommendations, also for items in the history and for small catalogues."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import of_config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
from evaluations import config_file, evaluating
from jax.sharding import NamedSharding, PartitionSpec
from jobs_of import one_device
from places import REPO
from pyarrow import orc

from s2s_jax.cli.commands import evaluate, recommend
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import FeatureConfig, LossConfig
from s2s_jax.data.items.seen import distinct
from s2s_jax.jobs.report import show_users
from s2s_jax.jobs.train import train
from s2s_jax.ranking.ranking_metrics import MISSED, user_values
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.encoding.features import id_columns

ITEMS, USERS = 30, 48


def write(path, rows):
    """Writes rows of items, one stripe per file."""
    path.mkdir(parents=True)
    columns = {"item_id": rows, "behavior_id": [[0] * len(row) for row in rows], "tags": rows}
    types = pa.list_(pa.list_(pa.int64()))
    for number in range(3):
        table = {
            name: pa.array([[[i] for i in row] for row in column[number::3]], types)
            for name, column in columns.items()
        }
        orc.write_table(pa.table(table), str(path / f"part-{number}.orc"))


def as_read(rows):
    """The order in which commands read the rows of `write`."""
    return [row for number in range(3) for row in rows[number::3]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Half of the users cycle through three items of their own, the others go on to new items."""
    rng = np.random.default_rng(0)
    rows = [
        np.tile(rng.permutation(ITEMS)[:3], 3).tolist()
        if user % 2
        else rng.permutation(ITEMS)[:9].tolist()
        for user in range(USERS)
    ]
    directory = tmp_path_factory.mktemp("agreement")
    write(directory / "log", rows)
    # The rows without their last event.
    write(directory / "before", [row[:-1] for row in rows])
    config = evaluating(directory / "log", directory / "run")
    model = dataclasses.replace(config.model, num_layers=1)
    short = dataclasses.replace(config.train, train_steps=5)
    config = dataclasses.replace(config, model=model, train=short)
    assert not train(config, one_device())
    return config, directory, as_read(rows)


@pytest.fixture
def command(trained, tmp_path, monkeypatch):
    """Runs either command on the run."""
    config, directory, _ = trained
    for job in ("evaluate", "recommend"):
        monkeypatch.setattr(f"s2s_jax.jobs.{job}.make_mesh", one_device)

    def call(module, *more, log=directory / "before"):
        out = tmp_path / ("metrics.json" if module is evaluate else "recs.parquet")
        flag = "--out" if module is evaluate else "--output"
        arguments = ["--config", config_file(config, tmp_path), flag, str(out), *more]
        if module is recommend:
            arguments += ["--input", str(log)]
        assert module.main(arguments) == 0
        if module is evaluate:
            return json.loads(out.read_text())["metrics"]
        return pq.read_table(out)["items"].to_pylist()

    return call


def check_agreement(found, rows, lists):
    """Checks that metrics agree with the lists, and that lists are as long as possible."""
    for k in (5, 10, 50):
        hits = [row[-1] in items[:k] for row, items in zip(rows, lists, strict=True)]
        assert found[f"eval/hr@{k}"] == np.mean(hits)
    reciprocal = [
        1 / (items.index(row[-1]) + 1) if row[-1] in items else 0.0
        for row, items in zip(rows, lists, strict=True)
    ]
    assert found["eval/mrr"] == pytest.approx(np.mean(reciprocal), rel=1e-12)


@pytest.mark.parametrize("filter_seen", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_hits_are_what_recommending_gives(trained, command, capsys, filter_seen):
    rows = trained[2]
    flag = ["--eval.filter_seen", str(filter_seen)]
    found = command(evaluate, *flag)
    output = capsys.readouterr()
    lists = command(recommend, *flag, "--top_k", str(ITEMS + 9))
    returning = [row[-1] in row[:-1] for row in rows]
    assert found["eval/returning_targets"] == np.mean(returning) == 0.5
    assert "returning targets" in output.out
    assert ("set eval.filter_seen to False" in output.out) == filter_seen
    for row, items in zip(rows, lists, strict=True):
        left = set(range(ITEMS)) - (set(row[:-1]) if filter_seen else set())
        assert set(items) == left, "all that may be recommended, each once"
    check_agreement(found, rows, lists)
    # Items that cannot be recommended are never found, however long the list.
    assert found["eval/hr@50"] == found["eval/popularity/hr@50"] == (0.5 if filter_seen else 1.0)


def test_neighbours_are_added_alike_when_evaluating_and_recommending(trained, command):
    rows = trained[2]
    flags = ["--eval.neighbours", "2", "--eval.filter_seen", "False"]
    found = command(evaluate, *flags)
    lists = command(recommend, *flags, "--top_k", str(ITEMS))
    check_agreement(found, rows, lists)
    assert lists != command(recommend, "--eval.filter_seen", "False", "--top_k", str(ITEMS))


def test_keep_seen_overrides_the_configuration(trained, command):
    rows = trained[2]
    kept = command(recommend, "--keep_seen", "--top_k", str(ITEMS))
    assert all(len(items) == ITEMS for items in kept)
    left_out = command(
        recommend, "--eval.filter_seen", "False", "--no-keep_seen", "--top_k", str(ITEMS)
    )
    for row, items in zip(rows, left_out, strict=True):
        assert not set(items) & set(row[:-1])


@pytest.mark.parametrize(
    "untrained", [pytest.param("keep", marks=pytest.mark.slow), "last", "drop"]
)
def test_items_of_a_newer_log_are_reported_and_ranked_as_configured(
    trained, command, tmp_path, capsys, untrained
):
    """Half of the users continue with one of ten items that training never saw."""
    new = set(range(ITEMS, ITEMS + 10))
    rows = [[*r[:-1], ITEMS + n // 2 % 10 if n % 2 else r[-1]] for n, r in enumerate(trained[2])]
    write(tmp_path / "newer", rows)
    write(tmp_path / "cut", [row[:-1] for row in rows])
    rows = as_read(rows)
    flags = ["--io.data_paths", str(tmp_path / "newer"), "--eval.untrained", untrained]
    found = command(evaluate, *flags)
    assert "25.0% of the items were never trained" in capsys.readouterr().out
    lists = command(recommend, *flags, "--top_k", str(ITEMS + 10), log=tmp_path / "cut")
    assert "10 of the 40 items of the catalogue were never trained" in capsys.readouterr().out
    assert found["eval/untrained_items"] == 0.25
    assert found["eval/untrained_targets"] == np.mean([row[-1] in new for row in rows]) == 0.5
    check_agreement(found, rows, lists)
    for row, items in zip(rows, lists, strict=True):
        expected = set(range(ITEMS)) - set(row[:-1])
        assert set(items) == (expected if untrained == "drop" else expected | new)
        if untrained == "last":
            assert set(items[-10:]) == new


@pytest.mark.parametrize(
    ("devices", "grows"), [pytest.param(1, True, marks=pytest.mark.slow), (4, False)]
)
def test_trained_items_are_those_of_the_batches(devices, grows):
    config = small.config()
    config = small.growing(config) if grows else config
    mesh = make_mesh(jax.devices()[:devices])
    functions = make_step_functions(StepSettings.of(config), mesh)
    batch = small.batch(small.config(), 8, 0)
    sent = put_batch(small.batch(config, 8, 0), 1, mesh)
    state, _ = functions.train_step(functions.init(), sent)
    # Items and tags share a table; there is nothing to learn from a row of one event.
    shown = batch["ids"][batch["length"] > 1]
    columns = id_columns(small.config().features)
    ids = np.concatenate([shown[..., columns[name]].ravel() for name in ("item_id", "tags")])
    items = np.arange(300, dtype=np.int32)
    asked = {}
    for feature in config.features:
        own = np.full((1, 300, 1, feature.bag_size), -1, np.int32)
        if feature.name == "item_id":
            own[0, :, 0, 0] = items
        asked[feature.name] = small.to_words(own) if feature.grows else own
    found = functions.items_trained(
        state, jax.device_put(asked, NamedSharding(mesh, PartitionSpec(None, "data")))
    )
    np.testing.assert_array_equal(found, np.isin(items, ids))
    assert 0 < np.asarray(found).sum() < 300


@pytest.mark.slow
def test_the_report_recommends_as_recommending_does(trained, command):
    config, directory, rows = trained
    shown = show_users(config, directory / "run", 6)
    lists = command(recommend, "--top_k", "10")
    files = [f"part-{n}.orc" for n in range(3) for _ in rows[n::3]]
    place = {(file, files[:n].count(file)): n for n, file in enumerate(files)}
    for user in shown.users:
        n = place[user.file, user.row]
        assert [int(one.item) for one in user.best] == lists[n]
        assert user.returns == (rows[n][-1] in rows[n][:-1]) == (user.rank is None)


def test_batches_are_filled_over_stripes(trained, monkeypatch):
    config, _, rows = trained
    numbers = of_config.numbers(of_config.collect(config), config)
    index = of_config.index(config)
    assert len(index.stripes) == 3
    reader = of_config.history_reader(config, index, numbers, 20)
    assert [b.users for b in reader.read_all(range(3), None)] == [20, 20, 8]
    whole = list(reader.read_all(range(3), None))
    # Few events fit into a batch: batches are small, but have the same users in the same order.
    monkeypatch.setattr("s2s_jax.data.batching.histories._MOST_POSITIONS", 20)
    small_ones = list(reader.read_all(range(3), None))
    assert {b.users for b in small_ones} == {2}
    monkeypatch.setattr("s2s_jax.data.batching.histories._MOST_POSITIONS", 1)
    alone = list(reader.read_all(range(3), None))
    assert {b.users for b in alone} == {1}
    for batches in (whole, small_ones, alone):
        items = [b.items_of(n).tolist() for b in batches for n in range(b.users)]
        assert items == [numbers.of(np.array(row)).tolist() for row in rows]
        stripes = np.concatenate([b.stripe_U for b in batches])
        assert np.bincount(stripes).tolist() == [16, 16, 16]
        ids = [b.shown_of(n)[:, 0] for b in batches for n in range(b.users)]
        assert [x.tolist() for x in ids] == [row[-small.SEQ_LEN :] for row in rows]
        for batch in batches:
            expected = {(n, i) for n in range(batch.users) for i in batch.items_of(n)}
            pairs = list(zip(*batch.seen, strict=True))
            assert set(pairs) == expected
            assert len(pairs) == len(expected)


def test_one_huge_row_does_not_decide_the_memory(tmp_path):
    """A rectangle as wide as the history would take 1 GB here; 16 bytes per event are 5 MB."""
    events, rng = 300_000, np.random.default_rng(0)
    rows = [rng.integers(0, ITEMS, 5).tolist() for _ in range(500)]
    items = [*rows[:250], rng.integers(0, 10_000, events).tolist(), *rows[250:]]
    feature = FeatureConfig(name="item_id", emb_dim=8, hash_bucket_size=10_000)
    config = small.config(
        features=(feature,), tables=(), loss=LossConfig(target_features=("item_id",))
    )
    io = dataclasses.replace(config.io, data_paths=str(tmp_path / "log.orc"), thread_num=0)
    config = dataclasses.replace(config, io=io)
    orc.write_table(pa.table({"item_id": items}), str(tmp_path / "log.orc"))
    numbers = of_config.numbers(of_config.collect(config), config)
    reader = of_config.history_reader(config, of_config.index(config), numbers, 256)
    tracemalloc.start()
    try:
        batches = list(reader.read_all(range(reader.stripes), None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(batch.users for batch in batches) == 501
    assert len(batches[0].seen.item_T) < 10_000 + 256 * 5
    assert peak < 120 * events


def test_pairs_are_distinct_and_in_order():
    seen = distinct(np.array([2, 0, 2, 0, 1]), np.array([3, 5, 3, -1, 2**31 - 1]))
    assert seen.user_T.tolist() == [0, 1, 2]
    assert seen.item_T.tolist() == [5, 2**31 - 1, 3]


def test_items_that_cannot_be_recommended_score_zero():
    values = user_values(np.array([[0, MISSED], [MISSED, -1]]))
    assert values["hr@5"].tolist() == [1, 0]
    assert values["recall@200"].tolist() == [0.5, 0]
    assert values["ndcg@200"][1] == values["mrr"][1] == 0


@pytest.mark.slow
def test_two_million_events_of_one_user_fit_in_two_gigabytes():
    """Measures complete commands, including JAX."""
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/ranking_memory.py",
            *("--users", "2000", "--stripes", "2", "--items", "200000", "--huge", "2000000"),
        ],
        cwd=REPO,
        # One device, as usual for users.
        env=os.environ | {"PYTHONPATH": str(REPO), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = dict(re.findall(r"^s2s_jax\.(\w+) .* peak ([\d.]+) GiB$", done.stdout, re.MULTILINE))
    assert {"evaluate", "recommend"} <= set(peaks), done.stdout
    assert all(float(peak) < 2 for peak in peaks.values()), peaks
