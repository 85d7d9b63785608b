"""Several rows of a user become one, in the order of time, with what each event had."""

import numpy as np
import pyarrow as pa
import pyarrow.orc
import pytest
from logs import write_log

from s2s_jax.data.merge import Settings, main, merge
from s2s_jax.errors import UserError

TYPES = {
    "user_id": pa.int64(),
    "item_id": pa.list_(pa.int64()),
    "tags": pa.list_(pa.list_(pa.string())),
    "ts": pa.list_(pa.int64()),
    "day": pa.int32(),
}


def daily_rows(day: int, users: int, rng: np.random.Generator) -> list[dict]:
    rows = []
    for user in range(users):
        length = int(rng.integers(0, 5))
        rows.append(
            {
                "user_id": user,
                "item_id": [None if x == 0 else int(x) for x in rng.integers(0, 9, length)],
                "tags": [["a", str(x)][: int(x) % 3] for x in range(length)] if day else None,
                "ts": [day * 100 + 10 * n for n in range(length)],
                "day": day,
            }
        )
    return rows


def test_rows_of_a_user_become_one(tmp_path, capsys):
    rng = np.random.default_rng(0)
    days = {day: daily_rows(day, 30, rng) for day in range(4)}
    # Files are named against the order of their days.
    for day, rows in days.items():
        write_log(tmp_path / "log" / f"{9 - day}.orc", rows, TYPES)
    assert main([str(tmp_path / "log"), "--out", str(tmp_path / "out")]) == 0
    assert "left out columns without an entry an event: day" in capsys.readouterr().out
    found = pyarrow.orc.read_table(str(tmp_path / "out" / "part-0.orc")).to_pylist()
    expected = {}
    for rows in days.values():
        for row in rows:
            if not row["ts"]:
                continue
            made = expected.setdefault(row["user_id"], {"item_id": [], "tags": [], "timestamp": []})
            made["item_id"] += [[] if x is None else [x] for x in row["item_id"]]
            made["tags"] += row["tags"] or [[]] * len(row["ts"])
            made["timestamp"] += [[time] for time in row["ts"]]
    assert {row.pop("user_id"): row for row in found} == expected
    assert not list((tmp_path / "out").glob(".merging_*"))


def test_times_in_lists_and_another_name(tmp_path):
    lists = pa.list_(pa.list_(pa.int64()))
    rows = [
        {"who": "a", "item_id": [[1], [2]], "when": [[5], [6]]},
        {"who": "a", "item_id": [[3]], "when": [[1]]},
    ]
    path = write_log(
        tmp_path / "a.orc", rows, {"who": pa.string(), "item_id": lists, "when": lists}
    )
    made = Settings(paths=(str(path),), out=tmp_path / "out", user="who", time="when")
    done, left_out = merge(made)
    assert (done.rows, done.events, left_out) == (1, 3, [])
    (row,) = pyarrow.orc.read_table(str(tmp_path / "out" / "part-0.orc")).to_pylist()
    assert row == {"user_id": "a", "item_id": [[3], [1], [2]], "timestamp": [[1], [5], [6]]}


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"item_id": [1], "ts": [1]}, {}, "--user: .* found none that names users"),
        ({"user_id": 1, "item_id": [1], "ts": [1]}, {"user": "x"}, "found no such column x"),
        ({"user_id": 1, "item_id": [1]}, {}, "--time: .* found none in user_id, item_id"),
        ({"user_id": 1, "item_id": [1], "ts": [1], "date": [1]}, {}, "found ts and date"),
        (
            {"user_id": 1, "item_id": [1, 2], "ts": [1]},
            {},
            "row 0, column ts has 1 entries and another column 2",
        ),
    ],
)
def test_what_cannot_be_merged(tmp_path, row, settings, words):
    path = write_log(tmp_path / "a.orc", [row])
    with pytest.raises(UserError, match=words):
        merge(Settings(paths=(str(path),), out=tmp_path / "out", **settings))
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True
