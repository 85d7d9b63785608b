"""Recommendations without a model: `s2s recommend --by neighbours` and `--short_history`."""

import collections
import dataclasses
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import of_config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
from evaluations import config_file, evaluating, rows_of
from jobs_of import one_device
from logs import write_log

import s2s_jax as s2s
from s2s_jax.cli.commands import recommend
from s2s_jax.errors import UserError
from s2s_jax.jobs.recommend import Request
from s2s_jax.jobs.recommend import recommend as recommend_job
from s2s_jax.jobs.train import train

ITEMS, K = 25, 8


def write(path, rows, names):
    """Writes rows of items, as texts, in two stripes."""
    bags = [[[] if i < 0 else [f"item {i}"] for i in row] for row in rows]
    other = [[[0]] * len(row) for row in rows]
    written = [
        {"user": name, "item_id": mine, "behavior_id": rest, "tags": rest}
        for name, mine, rest in zip(names, bags, other, strict=True)
    ]
    ints = pa.list_(pa.list_(pa.int64()))
    types = {"user": pa.int64(), "item_id": pa.list_(pa.list_(pa.string()))}
    write_log(path, written, types | {"behavior_id": ints, "tags": ints}, stripe_rows=20)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Rows of training, and histories of all lengths from 0 on; -1 is an event without an item."""
    directory = tmp_path_factory.mktemp("logs")
    rng = np.random.default_rng(3)
    rows = [rng.zipf(1.5, rng.integers(0, 12)) % ITEMS for _ in range(40)]
    rows = [row.tolist() for row in rows]
    histories = [rng.integers(-1, ITEMS, n % 8).tolist() for n in range(40)]
    write(directory / "log" / "part-0.orc", rows, range(40))
    write(directory / "new" / "part-0.orc", histories, range(100, 140))
    return directory, rows, histories


def configured(logs, run_dir):
    config = evaluating(logs[0] / "log", run_dir)
    items = dataclasses.replace(config.features[0], hash_type="murmur")
    model = dataclasses.replace(config.model, num_layers=1)
    settings = dataclasses.replace(config.train, train_steps=4)
    features = (items, *config.features[1:])
    config = dataclasses.replace(config, features=features, model=model, train=settings)
    return small.growing(config)


@pytest.fixture(scope="module")
def trained(logs, tmp_path_factory):
    config = configured(logs, tmp_path_factory.mktemp("run") / "run")
    assert not train(config, one_device())
    return config


def by_counts(logs, config, filter_seen):
    """The items of each history and their counts, by hand. The last two events of rows are held out."""
    _, rows, histories = logs
    order = [int(text.split()[1]) for text in of_config.collect(config).item.to_pylist()]
    weights, popularity = collections.Counter(), collections.Counter()
    for row in (row[:-2] for row in rows):
        popularity.update(row)
        for distance in (1, 2, 3):
            for pair in zip(row, row[distance:], strict=False):
                weights[pair] += Fraction(1, distance)
    found = []
    for history in histories:
        scores = collections.Counter()
        for number, item in enumerate(history[::-1][:5], 1):
            for second in order:
                scores[second] += Fraction(weights[item, second]) / number
        left = [i for i in order if not (filter_seen and i in history)]
        best = sorted(left, key=lambda i: (-scores[i], -popularity[i], order.index(i)))[:K]
        found.append(([f"item {i}" for i in best], [float(scores[i]) for i in best]))
    return found


def recommended(config, logs, tmp_path, *more):
    arguments = ["--config", config_file(config, tmp_path), "--input", str(logs[0] / "new")]
    out = tmp_path / "recs.parquet"
    arguments += ["--output", str(out), "--top_k", str(K), "--user_column", "user", *more]
    assert recommend.main(arguments) == 0
    return pq.read_table(out).to_pylist()


def check_counts(row, expected):
    items, scores = expected
    assert row["items"] == items
    np.testing.assert_allclose(row["scores"], scores, rtol=1e-6)


@pytest.mark.parametrize("filter_seen", [True, False])
def test_neighbours_against_counts_by_hand_without_a_checkpoint(
    logs, tmp_path, capsys, filter_seen
):
    config = configured(logs, tmp_path / "never trained")
    Path(config.train.output_dir).mkdir()
    (tmp_path / "never trained" / "config.json").write_text(config.to_json())
    flags = [] if filter_seen else ["--keep_seen"]
    found = recommended(config, logs, tmp_path, "--by", "neighbours", *flags)
    expected = by_counts(logs, config, filter_seen)
    there = [n for n, history in enumerate(logs[2]) if history]
    assert [row["user"] for row in found] == [100 + n for n in there]
    for n, row in zip(there, found, strict=True):
        assert set(row) == {"user", "items", "scores"}
        check_counts(row, expected[n])
    # Not only popularity.
    assert len({tuple(row["items"][:3]) for row in found}) > 10
    printed = capsys.readouterr()
    assert f"by neighbours counted in {config.io.data_paths}" in printed.out
    assert "checkpoint" not in printed.out
    # The same with few scores in memory.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("s2s_jax.data.items.neighbours.MOST_SCORES", 20)
        assert found == recommended(config, logs, tmp_path, "--by", "neighbours", *flags)


def test_short_histories_are_answered_by_counts(trained, logs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("s2s_jax.jobs.recommend.make_mesh", one_device)
    by_model = {row["user"]: row for row in recommended(trained, logs, tmp_path)}
    capsys.readouterr()
    found = recommended(trained, logs, tmp_path, "--short_history", "3")
    printed = capsys.readouterr().out
    # Of 40 histories, 5 each have 0 to 7 events.
    assert "10 users are answered by neighbours (fewer than 3 events), 5 without events" in printed
    shown = sum(min(len(history), 6) for history in logs[2] if len(history) >= 3)
    assert f"of the {shown} events that the model was shown" in printed
    expected = by_counts(logs, trained, filter_seen=True)
    assert [row["user"] for row in found] == list(range(100, 140))
    for n, row in enumerate(found):
        events = len(logs[2][n])
        assert row["by"] == (
            "popularity" if not events else "neighbours" if events < 3 else "model"
        )
        if events < 3:
            check_counts(row, expected[n])
        else:
            assert row["items"] == by_model[row["user"]]["items"]
            np.testing.assert_allclose(row["scores"], by_model[row["user"]]["scores"], atol=2e-6)
    # The library does the same.
    run = s2s.Run(trained.train.output_dir, devices=jax.devices()[:1])
    histories = rows_of(logs[0] / "new")
    alike = run.recommend(histories, K, short_history=3)
    assert alike.items == [row["items"] for row in found]
    counted = run.recommend(histories, K, by="neighbours", short_history=1)
    for items, scores, by_hand in zip(counted.items, counted.scores, expected, strict=True):
        check_counts({"items": items, "scores": scores}, by_hand)
    without = run.recommend(histories, K, by="neighbours")
    assert [bool(items) for items in without.items] == [bool(history) for history in logs[2]]


@pytest.mark.slow
def test_short_histories_do_not_get_items_that_the_model_leaves_out(trained, logs, tmp_path):
    """Items of held-out events only were never trained."""
    drop, many = ("--eval.untrained", "drop"), ("--top_k", "1000")
    every = recommended(trained, logs, tmp_path, "--by", "neighbours", *many)
    kept = recommended(trained, logs, tmp_path, "--short_history", "100", *drop, *many)
    by_model = recommended(trained, logs, tmp_path, "--keep_seen", "True", *drop, *many)
    trained_items = {item for row in by_model for item in row["items"]}
    assert {item for row in kept for item in row["items"]} == trained_items
    assert {item for row in every for item in row["items"]} > trained_items


def test_impossible_requests_are_refused(trained, logs, tmp_path):
    new, out = str(logs[0] / "new"), tmp_path / "recs.parquet"
    run = s2s.Run(trained.train.output_dir)
    for request, words in (
        (Request(input=new, output=out, short_history=-1), "--short_history: expected at least 0"),
        (
            Request(input=new, output=out, by="neighbours", checkpoint="4"),
            "--checkpoint: expected nothing",
        ),
        (
            Request(input=new, output=out, user_column="scores"),
            "--user_column: expected another name than scores",
        ),
    ):
        with pytest.raises(UserError, match=words):
            recommend_job(trained, request, one_device())
    with pytest.raises(UserError, match="by: expected model or neighbours, found popularity"):
        run.recommend([], by="popularity")
    with pytest.raises(UserError, match="short_history: expected at least 0"):
        run.recommend([], short_history=-1)
    # Ids of another kind than in the log of training.
    numbers = tmp_path / "numbers"
    small.write_log(numbers, 9)
    with pytest.raises(UserError, match="column item_id holds whole numbers, expected text"):
        recommend_job(trained, Request(input=str(numbers), output=out, by="neighbours"))
