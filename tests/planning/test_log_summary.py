"""The summary of a log, against counts in plain Python."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from logs import write_log

from s2s_jax.data.logs import orc
from s2s_jax.errors import UserError
from s2s_jax.planning.log_summary import absolute, read_index, summarize

IDS, BAGS = pa.list_(pa.int64()), pa.list_(pa.list_(pa.int64()))
TEXTS = pa.list_(pa.list_(pa.string()))


def rows_of(users=300, items=80, seed=0):
    """Rows in which the category and the tags depend on the item, and the behaviour does not."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        length = int(rng.integers(0, 15))
        chosen = rng.zipf(1.5, length) % items
        rows.append(
            {
                "user_id": user,
                "item_id": [[int(i) + 10**12] for i in chosen],
                "cate_id": [[f"c{i % 7}"] for i in chosen],
                "tags": [[int(i) % 5, int(i) % 11 + 20][: 1 + int(i) % 2] for i in chosen],
                "behavior_id": [int(b) for b in rng.choice(4, length, p=(0.9, 0.06, 0.03, 0.01))],
                "timestamp": [1_600_000_000 + int(t) for t in np.arange(length) // 2 * 60],
            }
        )
    return rows


KINDS = {
    "user_id": pa.int64(),
    "item_id": BAGS,
    "cate_id": TEXTS,
    "tags": BAGS,
    "behavior_id": IDS,
    "timestamp": IDS,
}


def summary_of(tmp_path, rows, kinds=None, item="item_id", stripe_rows=None, most_events=10**7):
    write_log(tmp_path / "log.orc", rows, kinds, stripe_rows)
    return summarize(read_index([str(tmp_path)]), str(tmp_path), item, most_events)


@pytest.mark.parametrize("kind", [IDS, BAGS])
def test_rows_that_end_with_an_item_that_they_had_before(tmp_path, kind):
    items = [[1, 2, 1], [3, 3, 4], [5, 6], [7, 7], [8], [], [None, 9, None], [2, 1, 2, 2]]
    if kind is BAGS:
        items = [[[] if i is None else [i] for i in row] for row in items]
    log = summary_of(
        tmp_path, [{"item_id": row} for row in items], {"item_id": kind}, stripe_rows=3
    )
    # 1, 7 and 2 were there before; 8 and the empty row are too short.
    assert log.returning == 3 / 6


def test_counts_are_those_of_the_rows(tmp_path):
    rows = rows_of()
    log = summary_of(tmp_path, rows, KINDS, stripe_rows=40)
    lengths = sorted(len(row["item_id"]) for row in rows)
    assert (log.rows, log.events, log.sampled) == (300, sum(lengths), False)
    assert log.lengths.mean == pytest.approx(np.mean(lengths))
    assert log.lengths.median == np.median(lengths)
    assert log.lengths.longest == lengths[-1]
    assert log.lengths.usable == pytest.approx(np.mean(np.array(lengths) >= 4))
    assert log.lengths.ranked == pytest.approx(np.mean(np.array(lengths) >= 3))
    upto = log.lengths.most_have
    assert np.mean(np.array(lengths) <= upto) >= 0.95 > np.mean(np.array(lengths) < upto)
    for column in (log.item, *log.columns):
        entries = [entry for row in rows for entry in row[column.name]]
        bags = [entry if isinstance(entry, list) else [entry] for entry in entries]
        counts = Counter(i for bag in bags for i in bag)
        assert column.distinct == len(counts)
        assert column.once == pytest.approx(np.mean([n == 1 for n in counts.values()]))
        assert column.repeats == pytest.approx(counts.total() / len(counts))
        assert column.largest_bag == max(map(len, bags))
        assert column.text == (column.name == "cate_id")
    assert {c.name: c.of_item for c in log.columns} == {
        "cate_id": True,
        "tags": True,
        "behavior_id": False,
    }
    assert log.unusable == ()
    # Two events in a row have the same time in every second place.
    assert any("2020-09-13" in sentence for sentence in log.times)
    odd = np.mean([n % 2 == 1 for n in lengths if n > 1])
    assert log.times[-1].startswith(f"In {odd:.0%} of the rows the last two times")


def test_a_few_wrong_categories_do_not_matter_but_independent_ones_do(tmp_path):
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(400):
        chosen = [int(i) for i in rng.integers(0, 60, 8)]
        rows.append(
            {
                "item_id": chosen,
                "noisy": [i % 6 if rng.random() < 0.98 else int(rng.integers(6)) for i in chosen],
                "chance": [int(rng.integers(6)) for _ in chosen],
                # Nearly always the same, so nearly always the most frequent value of the item.
                "rare": [int(rng.random() < 0.01) for _ in chosen],
            }
        )
    log = summary_of(tmp_path, rows, dict.fromkeys(rows[0], IDS))
    assert {c.name: c.of_item for c in log.columns} == {
        "noisy": True,
        "chance": False,
        "rare": False,
    }


def test_missing_rows_entries_and_ids_are_left_out(tmp_path):
    rows = [
        {"item_id": [[1], [2], [1], [3]], "cate_id": [[5], [], [5], [None]]},
        {"item_id": [[2], None, [3], [1]], "cate_id": None},
        {"item_id": None, "cate_id": None},
        {"item_id": [[1], [2], [1], [2], [1]], "cate_id": [[5], [6], [5], [6], [5]]},
    ]
    log = summary_of(tmp_path, rows, {"item_id": BAGS, "cate_id": BAGS})
    assert (log.rows, log.events) == (4, 13)
    assert log.item.distinct == 3
    (category,) = log.columns
    assert (category.distinct, category.of_item) == (2, True)


def test_columns_that_cannot_be_features_are_named(tmp_path):
    rows = [
        {
            "item_id": [n, n + 1, n, n + 1],
            "short": [1] * (4 - (n == 7)),
            "price": [0.5] * 4,
            "age": 30,
        }
        for n in range(20)
    ]
    kinds = {"item_id": IDS, "short": IDS, "price": pa.list_(pa.float64()), "age": pa.int64()}
    log = summary_of(tmp_path, rows, kinds, stripe_rows=5)
    assert log.columns == ()
    reasons = dict(log.unusable)
    assert set(reasons) == {"short", "price"}
    assert "differ in length" in reasons["short"]
    assert "bucketize" in reasons["price"]


def test_files_of_other_types(tmp_path):
    """A column that is no list in another file is left out, and times may be missing there."""
    rows = [{"item_id": [n, n + 1, n, n + 1], "shop": [1, 2, 1, 2]} for n in range(6)]
    times = [row | {"created_at": [10**9] * 4} for row in rows]
    write_log(tmp_path / "a.orc", times, {"item_id": IDS, "shop": IDS, "created_at": IDS})
    others = [row | {"shop": 1} for row in rows]
    small = pa.list_(pa.int32())
    write_log(tmp_path / "b.orc", others, {"item_id": small, "shop": pa.int64()})
    log = summarize(read_index([str(tmp_path)]), str(tmp_path), "item_id")
    assert (log.rows, log.item.distinct) == (12, 7)
    assert log.columns == ()
    assert log.times == ()
    reasons = dict(log.unusable)
    assert re.fullmatch(r"list<.*int64> in .*a\.orc, but int64 in .*b\.orc", reasons["shop"])
    write_log(tmp_path / "c.orc", [{"item_id": ["x"] * 4}], {"item_id": pa.list_(pa.string())})
    with pytest.raises(UserError, match=r"a\.orc: expected a column item_id of lists .*c\.orc"):
        summarize(read_index([str(tmp_path)]), str(tmp_path), "item_id")


def test_a_large_log_is_sampled(tmp_path, monkeypatch):
    rows = rows_of(users=4_000, items=3_000)
    path = write_log(tmp_path / "log.orc", rows, KINDS, stripe_rows=50)
    index = read_index([str(path)])
    whole = summarize(index, str(path), "item_id")
    read = []
    original = orc.read_stripe
    monkeypatch.setattr(orc, "read_stripe", lambda f, n, c: read.append(n) or original(f, n, c))
    log = summarize(index, str(path), "item_id", most_events=whole.events // 4)
    assert log.sampled
    # Each stripe once, and no more than asked for.
    assert len(read) == len(set(read))
    assert 8 < len(read) <= len(index.stripes) // 4
    assert log.rows == 4_000
    assert log.events == pytest.approx(whole.events, rel=0.1)
    assert log.lengths.mean == pytest.approx(whole.lengths.mean, rel=0.1)
    # An estimate of what was not read; the sample alone has fewer.
    assert log.item.distinct == pytest.approx(whole.item.distinct, rel=0.35)
    assert dataclasses.replace(log.columns[0], once=0, repeats=0) == dataclasses.replace(
        whole.columns[0], once=0, repeats=0
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"item_id": [1, 2, 3]}, {"item_id": [1]}], "at least 4 events .* found at most 3"),
        ([{"item_id": []}, {"item_id": []}], "only empty ones"),
        ([{"item_id": [7] * 9}], "several items in column item_id, found 1"),
    ],
)
def test_logs_without_anything_to_learn_are_refused(rows, message, tmp_path):
    with pytest.raises(UserError, match=message):
        summary_of(tmp_path, rows, {"item_id": IDS})


def test_the_item_column_must_exist_and_have_one_item_for_each_event(tmp_path):
    rows = [{"sku": [[1, 2], [3], [4], [5]], "user": 1, "size": [0.5]}]
    kinds = {"sku": BAGS, "user": pa.int64(), "size": pa.list_(pa.float32())}
    for item, message in (
        ("item_id", "expected a column item_id .* found sku, user, size; .*--item_feature"),
        ("sku", "one item for each event, found up to 2 in column sku"),
        ("user", "lists of ids.*found int64"),
        ("size", "lists of ids.*fractions"),
    ):
        with pytest.raises(UserError, match=message):
            summary_of(tmp_path, rows, kinds, item)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"does not exist"):
        read_index([str(tmp_path / "nothing")])
    (tmp_path / "broken.orc").write_bytes(b"ORC nonsense")
    with pytest.raises(UserError, match=r"broken\.orc: expected an ORC file"):
        read_index([str(tmp_path)])
    (tmp_path / "broken.orc").unlink()
    write_log(tmp_path / "empty.orc", [], {"item_id": IDS})
    with pytest.raises(UserError, match="expected ORC files with rows, found none"):
        read_index([str(tmp_path)])


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute(["log", "/data/x"]) == [str(tmp_path / "log"), "/data/x"]
