"""The client: answers as those of the trainer, rules, similar items, and mistakes of the caller."""

import json
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pytest
from places import REPO

import s2s_jax as s2s
import s2s_serve
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config.settings import ShownHistory
from s2s_jax.data.batching.histories import HistoryEncoder
from s2s_jax.jobs.export import Request, export
from s2s_jax.ranking.encode import UserEncoder, shapes_for
from s2s_jax.ranking.restored import restore
from s2s_serve import model as model_module
from s2s_serve.encoding.plain_histories import HistorySource, to_rows

K = 7
BEGIN = 946_684_800

# Blocks the trainer's packages, as on a machine that does not have them.
ALONE = """
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        trainer = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "scipy", "s2s_jax")
        if name.split(".")[0] in trainer:
            raise ImportError(f"{name} is not on a serving machine")

sys.meta_path.insert(0, Blocked())
import pyarrow.orc
import s2s_serve

directory, log, k = sys.argv[1:]
table = pyarrow.orc.read_table(log)
model = s2s_serve.load(directory)
answers = model.recommend(table, int(k))
json.dump({"vectors": model.encode(table).tolist(), "answers": answers}, sys.stdout)
"""


@pytest.fixture(scope="module")
def model(small_export):
    return s2s_serve.load(small_export.directory)


@pytest.fixture(scope="module")
def run(small_export):
    return s2s.Run(small_export.config.train.output_dir, devices=jax.devices()[:1])


def assert_answers(answers, expected):
    """Compares with the trainer; items in another order must have nearly the same scores."""
    for answer, items, scores in zip(answers, expected.items, expected.scores, strict=True):
        np.testing.assert_allclose(answer.scores, scores, atol=2e-6)
        by_item = dict(zip(items, scores, strict=True))
        for item, score in zip(answer.items, answer.scores, strict=True):
            last = scores[-1] if scores else 0
            assert abs((by_item[item] if item in by_item else last) - score) < 2e-6


def test_answers_of_another_process_without_the_trainer_are_those_of_the_trainer(small_export, run):
    given = [str(small_export.directory), str(small_export.log / "log.orc"), str(K)]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *given], check=True, capture_output=True, text=True, cwd=REPO
    )
    found = json.loads(done.stdout)
    vectors = run.encode(small_export.rows)
    np.testing.assert_allclose(np.array(found["vectors"]), vectors, atol=1e-5)
    answers = [s2s_serve.Recommendation(*answer) for answer in found["answers"]]
    there = [n for n, row in enumerate(small_export.rows) if row["item_id"]]
    expected = run.recommend([small_export.rows[n] for n in there], K)
    assert_answers([answers[n] for n in there], expected)


def test_a_change_in_hashing_is_noticed(small_export, run, monkeypatch):
    """The client and the trainer share this code, so the trainer has to go first."""
    expected = run.encode(small_export.rows)
    monkeypatch.setattr(
        "s2s_serve.encoding.hashing.to_positive_ids",
        lambda hash_T: (hash_T >> np.uint64(2)).view(np.int64),
    )
    model = s2s_serve.load(small_export.directory)
    assert np.abs(model.encode(small_export.rows) - expected).max() > 1e-2


def test_a_history_with_seen_items_and_one_at_a_time(small_export, model, run):
    rows = [row for row in small_export.rows if row["item_id"]][:9]
    assert_answers(model.recommend(rows, K, keep_seen=True), run.recommend(rows, K, keep_seen=True))
    together = model.recommend(rows, K)
    for row, answer in zip(rows, together, strict=True):
        (alone,) = model.recommend([row], K)
        assert not set(row["item_id"]) & set(alone.items)
        np.testing.assert_allclose(alone.scores, answer.scores, atol=2e-6)
    assert model.recommend(pa.Table.from_pylist(rows), K) == together


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("users", [2, 3, 41])
def test_each_history_gets_its_own_vector_from_any_number_of_threads(small_export, threads, users):
    """Lengths differ, so that histories are encoded in another order than they are given."""
    rng = np.random.default_rng(users)
    rows = [small_export.rows[n] for n in rng.integers(0, len(small_export.rows), users)]
    rows[-1] = {"item_id": [], "tags": [], "timestamp": []}
    model = s2s_serve.load(small_export.directory, threads=threads)
    expected = np.concatenate([model.encode([row]) for row in rows])
    np.testing.assert_allclose(model.encode(rows), expected, atol=1e-6)
    assert not expected[-1].any()


def test_unknown_events_are_counted(model, small_export):
    """As the trainer does: events without a row, among those that the model sees."""
    known = model.items["item"].to_pylist()[:2]
    events = 20
    items = ["never seen", known[0], None] * 6 + ["never seen", known[1]]
    row = {"item_id": items, "tags": [[]] * events, "timestamp": list(range(BEGIN, BEGIN + events))}
    shown = small_export.config.model.seq_len
    (answer,) = model.recommend([row], K)
    assert answer.unknown == items[-shown:].count("never seen") > 0
    assert len(answer.items) == K


def test_unknown_events_are_those_of_the_trainer(model, small_export):
    config = small_export.config
    restored = restore(config, make_mesh(jax.devices()[:1]), "best")
    rows = [row for row in small_export.rows if row["item_id"]]
    plain = to_rows(rows, config.features, restored.kinds)
    encoder = HistoryEncoder(ShownHistory.of(config), None)
    part = encoder.encode(plain, HistorySource(plain.schema), 0, 0, None)
    batch = encoder.batch([part], 64)
    mesh = make_mesh(jax.devices()[:1])
    shapes = shapes_for(config.model.seq_len, 64, mesh)
    (encoded,) = UserEncoder(restored.functions, restored.state, shapes, mesh).encode([batch])
    expected = encoded.unknown_U
    found = [answer.unknown for answer in model.recommend(rows, 1)]
    assert found == np.asarray(expected)[: len(rows)].tolist()
    assert sum(found) > 0


def test_numpy_rules_and_numbers(model, small_export):
    rows = [row for row in small_export.rows if row["item_id"]][:3]
    barred = ["item 3", "item 5"]
    expected = model.recommend(rows, 4, exclude=barred, where={"price": [1, 2, 3]})
    where = {"price": np.array([1, 2, 3])}
    assert model.recommend(rows, np.int64(4), exclude=np.array(barred), where=where) == expected
    with pytest.raises(s2s_serve.UserError, match="threads: expected a whole number"):
        s2s_serve.load(small_export.directory, threads="2")
    with pytest.raises(s2s_serve.UserError, match="directory: expected a path"):
        s2s_serve.load(None)


def test_few_histories_at_a_time_give_the_same_answers(small_export, model, monkeypatch):
    rows = small_export.rows
    expected = model.recommend(rows, K)
    for most_users, most_scores in ((1, 2**20), (64, 1), (7, 60)):
        monkeypatch.setattr(model_module, "_MOST_USERS", most_users)
        monkeypatch.setattr(model_module, "_MOST_SCORES", most_scores)
        for found, answer in zip(model.recommend(rows, K), expected, strict=True):
            assert (found.unknown, found.by) == answer[2:]
            np.testing.assert_allclose(found.scores, answer.scores, atol=1e-6)
            # Sums of other sizes are rounded otherwise: only items of nearly equal scores may swap.
            rounded = answer.scores[-1] + 2e-6
            for one, other in ((found, answer), (answer, found)):
                scores = dict(zip(other.items, other.scores, strict=True))
                for item, score in zip(one.items, one.scores, strict=True):
                    assert item in scores or score <= rounded
                    assert abs(scores.get(item, score) - score) <= 1e-6


def test_an_empty_history_gets_popular_items(model, small_export):
    counts = {}
    for row in small_export.rows:
        for item in row["item_id"][:-1]:
            if item is not None:
                counts[item] = counts.get(item, 0) + 1
    empty = {"item_id": [], "tags": [], "timestamp": []}
    (answer,) = model.recommend([empty], K)
    assert answer.by == "popularity"
    assert answer.scores == sorted(counts.values(), reverse=True)[:K]
    assert [counts[item] for item in answer.items] == answer.scores
    (without,) = model.recommend([empty], K, exclude=answer.items[:3])
    assert without.items[: K - 3] == answer.items[3:]
    assert model.recommend([], K) == []


def test_rules_hold_exactly(model, small_export):
    rows = [row for row in small_export.rows if row["item_id"]][:5]
    everything = len(model.items)
    whole = model.recommend(rows, everything, keep_seen=True)
    assert all(len(answer.items) == everything for answer in whole)

    def check(found, is_allowed):
        for answer, of_all in zip(found, whole, strict=True):
            pairs = zip(of_all.items, of_all.scores, strict=True)
            assert answer.items == [item for item, _ in pairs if is_allowed(item)][:K]

    number = {item: int(item.split()[1]) for item in model.items["item"].to_pylist()}
    kept = {"keep_seen": True}
    excluded = ["item 3", "item 5", "nowhere"]
    check(model.recommend(rows, K, exclude=excluded, **kept), lambda item: item not in excluded)
    allowed = ["item 1", "item 2", "item 30", "nowhere"]
    check(model.recommend(rows, K, allow=allowed, **kept), lambda item: item in allowed)
    found = model.recommend(rows, K, where={"genre": ["even"], "price": [2, 3, 4, 8]}, **kept)
    check(found, lambda item: number[item] in (2, 4, 8))
    found = model.recommend(rows, K, where={"genre": ["of 1"]}, exclude=["item 4"], **kept)
    check(found, lambda item: number[item] % 3 == 1 and item != "item 4")
    assert all(answer.items == [] for answer in model.recommend(rows, K, allow=[]))
    assert all(answer.items == [] for answer in model.recommend(rows, K, where={"genre": []}))


def test_similar_items(model, run):
    items = model.items["item"].to_pylist()
    vectors = np.array(model._items.vectors_IE, np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = vectors @ vectors[4]
    cosine[4] = -np.inf
    found = model.similar(items[4], 5)
    np.testing.assert_allclose(found.scores, np.sort(cosine)[::-1][:5], atol=1e-6)
    assert items[4] not in found.items
    with pytest.raises(s2s_serve.UnknownItemError, match=r"expected one of the .* items"):
        model.similar("nowhere")


def test_what_the_model_says_of_itself(model, small_export):
    assert model.version == 1
    assert model.features == ("item_id", "tags", "timestamp")
    card = json.loads(json.dumps(model.card))
    assert card["items"] == len(model.items)
    assert card["step"] == 6
    assert [f["kind"] for f in card["features"]] == ["text", "whole numbers", None, None]
    assert model.items["title"].to_pylist()[0] == model.items["item"].to_pylist()[0].replace(
        "item", "Title of"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"k": 0}, "k: expected a whole number"),
        ({"k": True}, "k: expected a whole number"),
        ({"k": "3"}, "k: expected a whole number"),
        ({"keep_seen": "no"}, "keep_seen: expected True, False or None"),
        ({"where": ["genre"]}, "where: expected allowed values by column"),
        ({"histories": [{"item_id": ["a"]}]}, "row 0 has no tags"),
        ({"histories": {"item_id": []}}, "expected a list of histories"),
        ({"histories": [{"item_id": [1], "tags": [[]], "timestamp": [5]}]}, "expected text"),
        ({"exclude": "item 1"}, "exclude: expected a list"),
        ({"exclude": [1]}, "exclude: item_id holds whole numbers, expected text"),
        ({"allow": [["a", "b"]]}, "allow: row 0, column item_id: a position holds 2 ids"),
        ({"where": {"colour": ["red"]}}, "where: expected columns of items"),
        ({"where": {"price": ["cheap"]}}, "where: price: expected values of type int64"),
        ({"where": {"price": 4}}, "where: price: expected a list"),
    ],
)
def test_mistakes_are_explained(model, given, words):
    row = {"item_id": ["item 1"], "tags": [[]], "timestamp": [1_000_000_000]}
    with pytest.raises(s2s_serve.UserError, match=words):
        model.recommend(**{"histories": [row]} | given)


def test_an_index_gives_nearly_the_same_answers_and_keeps_the_rules(small_export, tmp_path):
    request = Request(output=tmp_path / "export", index="yes", checkpoint="6")
    done = export(small_export.config, request)
    assert done.manifest.index is not None
    assert done.manifest.index.recall["recall@10"] > 0.9
    indexed = s2s_serve.load(tmp_path / "export", search="index")
    exact = s2s_serve.load(tmp_path / "export", search="exact")
    assert (indexed.card["search"], exact.card["search"]) == ("index", "exact")
    assert s2s_serve.load(tmp_path / "export").card["search"] == "exact"
    rows = [row for row in small_export.rows if row["item_id"]]
    found, expected = (model.recommend(rows, K) for model in (indexed, exact))
    same = [set(a.items) == set(b.items) for a, b in zip(found, expected, strict=True)]
    assert np.mean(same) > 0.8
    for answer, row in zip(found, rows, strict=True):
        assert len(answer.items) == K
        assert not set(answer.items) & set(row["item_id"])
    barred = expected[0].items[:2]
    for answer in indexed.recommend(rows, K, exclude=barred):
        assert len(answer.items) == K
        assert not set(answer.items) & set(barred)
    # Few items are allowed: all of them are compared.
    allowed = [f"item {n}" for n in range(0, 40, 3)]
    assert indexed.recommend(rows, K, allow=allowed) == exact.recommend(rows, K, allow=allowed)
    everything = len(exact.items)
    for answer, of_all in zip(
        indexed.recommend(rows[:3], everything), exact.recommend(rows[:3], everything), strict=True
    ):
        assert answer.items == of_all.items
        np.testing.assert_allclose(answer.scores, of_all.scores, atol=1e-6)
    assert set(indexed.similar(barred[0], 5).items) == set(exact.similar(barred[0], 5).items)


def test_a_search_with_an_index_needs_one(small_export):
    with pytest.raises(s2s_serve.UserError, match="--index"):
        s2s_serve.load(small_export.directory, search="index")
