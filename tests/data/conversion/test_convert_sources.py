"""Which files and columns are converted: everything that was named, each once."""

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet
import pytest
from conversions import NAMES, events, run, write_csv, write_jsonl, write_parquet
from logs import write_log

from s2s_jax.data.conversion.convert import convert
from s2s_jax.data.conversion.settings import Settings
from s2s_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("engine")


def notes(out: Path, *paths: Path, **changes) -> str:
    made = Settings(paths=tuple(map(str, paths)), output=out, overwrite=True, **changes)
    return " / ".join(convert(made).notes)


def test_links_are_followed_and_each_file_is_read_once(tmp_path):
    write_csv(tmp_path / "away" / "b.csv", events(user_id=[2]))
    log = tmp_path / "log"
    write_csv(log / "2024-01-01" / "a.csv", events(user_id=[1]))
    (log / "away").symlink_to(tmp_path / "away")
    (log / "2024-01-01" / "circle").symlink_to(log)
    (log / "0-latest").symlink_to(log / "2024-01-01")
    (log / "c.csv").symlink_to(tmp_path / "away" / "b.csv")
    found = run(tmp_path / "out", log)
    assert {user: len(row["item_id"]) for user, row in found.items()} == {1: 1, 2: 1}
    printed = notes(tmp_path / "out", log)
    assert "2 linked files (" in printed
    assert "circle" in printed
    (log / "c.csv").unlink()
    (log / "c.csv").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"c\.csv"):
        run(tmp_path / "out2", log)
    with pytest.raises(UserError, match=r"c\.csv is a broken link"):
        run(tmp_path / "out2", log / "c.csv")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "csv.gz"])
def test_files_of_no_bytes_have_no_events(tmp_path, suffix):
    write = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}
    write[suffix.removesuffix(".gz")](
        tmp_path / f"b.{suffix.removesuffix('.gz')}", events(user_id=[1])
    )
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(b"") if suffix.endswith("gz") else b"")
    assert list(run(tmp_path / "out", tmp_path)) == [1]
    assert f"1 empty file ({tmp_path}/a.{suffix}) is treated as having no events" in notes(
        tmp_path / "out", tmp_path
    )


def test_files_that_a_directory_leaves_out_are_reported(tmp_path):
    log = tmp_path / "log"
    write_csv(log / "a.csv", events(user_id=[1]))
    assert notes(tmp_path / "out", log) == ""
    for name in ("000000_0", "000001_0"):
        write_csv(log / name, events(user_id=[2]))
    assert "2 files (" in notes(tmp_path / "out", log)
    assert "left out because of the name" in notes(tmp_path / "out", log)
    (log / "a.csv").unlink()
    assert list(run(tmp_path / "2", log, format="csv")) == [2]
    write_csv(log / "_old" / "b.csv", events(user_id=[2]))
    assert "b.csv) is left out" in notes(tmp_path / "2", log, format="csv")


def test_the_log_inside_the_directory_of_the_sources(tmp_path):
    write_csv(tmp_path / "a.csv", events(user_id=[1]))
    for _ in range(2):
        assert "files of one" not in notes(tmp_path / "log", tmp_path)
    orc = tmp_path / "log"
    assert notes(orc / "again", orc, format="orc") == ""
    assert "left out, being in --output" in notes(orc / "again", orc, format="orc")


@pytest.mark.parametrize(
    ("sign", "kind"),
    [
        ("_delta_log/0.json", "Delta"),
        (".hoodie/x", "Hudi"),
        ("metadata/v1.metadata.json", "Iceberg"),
        ("delete_delta_0000002_0000002/a", "Hive"),
    ],
)
def test_tables_that_keep_deleted_rows_are_refused(tmp_path, sign, kind):
    table = tmp_path / "lake" / "table"
    for inner in ("data/day=1", "data/day=2"):
        (table / inner).mkdir(parents=True)
        write_parquet(table / inner / "a.parquet", events(user_id=[1]))
    assert run(tmp_path / "out", table)
    (table / sign).parent.mkdir()
    (table / sign).touch()
    named = [table.parent, table]
    named += (
        [] if kind == "Hive" else [table / "data" / "day=1", table / "data" / "*" / "*.parquet"]
    )
    for path in named:
        with pytest.raises(UserError, match=f"table is an? {kind} .*plain Parquet files"):
            run(tmp_path / "out2", path)
    # A file that is named directly is read.
    assert run(tmp_path / "out2", table / "data" / "day=1" / "a.parquet")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_directories_with_values_that_files_lack(tmp_path, suffix):
    write = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}[suffix]
    for folder, user in [("user_id=5/day=2015%2D01", 1), (f"user_id=6/day={'__HIVE'}", 2)]:
        folder = folder.replace("__HIVE", "__HIVE_DEFAULT_PARTITION__")
        (tmp_path / "log" / folder).mkdir(parents=True)
        write(tmp_path / "log" / folder / f"a.{suffix}", events(user_id=[user]))
    found = run(tmp_path / "out", tmp_path / "log", features=("day", "item_id"))
    # Users are from the file, days from the directories.
    assert {user: row["day"] for user, row in found.items()} == {1: [["2015-01"]], 2: [[]]}


def test_columns_of_one_name(tmp_path):
    text = "user_id,Item_id,item_id,timestamp,timestamp\n1,2,3,4,5\n"
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(
        UserError, match=r"a\.csv: timestamp \(--time_column\) is the name of several"
    ):
        run(tmp_path / "out", tmp_path, features=("item_id",))
    (tmp_path / "a.csv").write_text(text.replace(",timestamp\n", ",x\n"))
    columns = [pa.array([i]) for i in (2, 3, 1, 4)]
    table = pa.table(columns, names=["Item_id", "item_id", "user_id", "timestamp"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text('{"Item_id": 2, "item_id": 3, "user_id": 1, "timestamp": 4}')
    for name in ("a.csv", "a.parquet", "a.json"):
        (found,) = run(
            tmp_path / f"{name}.out", tmp_path / name, features=("item_id", "x=Item_id")
        ).values()
        assert (found["item_id"], found["x"]) == ([[3]], [[2]])
    doubled = table.append_column("item_id", pa.array([9]))
    pyarrow.parquet.write_table(doubled, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"item_id \(--features\) is the name of several"):
        run(tmp_path / "out", tmp_path / "a.parquet", features=("item_id",))


def test_a_file_that_is_named_in_two_ways_is_refused(tmp_path):
    write_csv(tmp_path / "a.csv", events(user_id=[1]))
    (tmp_path / "b.csv").symlink_to(tmp_path / "a.csv")
    for also in (tmp_path / "*.csv", tmp_path / "b.csv", tmp_path, Path(os.path.relpath(tmp_path))):
        with pytest.raises(UserError, match="is given twice"):
            run(tmp_path / "out", tmp_path / "a.csv", also)


def test_ratings_that_are_not_of_movielens(tmp_path):
    (tmp_path / "ratings.csv").write_text("user_id,book_id,rating,timestamp\n1,2,5,3\n")
    (found,) = run(tmp_path / "out", tmp_path, features=("item_id=book_id",)).values()
    assert found["item_id"] == [[2]]
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,5,3\n")
    assert "there is no movies.csv beside" in notes(tmp_path / "out2", tmp_path)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2.0,5,3\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n2,a,X|Y\n")
    assert notes(tmp_path / "out2", tmp_path) == ""
    (found,) = run(tmp_path / "out3", tmp_path).values()
    assert (found["item_id"], found["cate_id"]) == ([[2]], [["X", "Y"]])


def test_objects_in_objects_and_arrays(tmp_path):
    rows = [
        {"user": {"id": 1}, "a.b": 2**70, "timestamp": 1, "item_id": [1, None, "x"]},
        {"user": {"id": 1}, "a": {"b": 7}, "timestamp": 2, "item_id": None},
    ]
    write_jsonl(tmp_path / "lines.jsonl", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    changes = {"user_column": "user.id", "features": ("item_id", "x=a.b")}
    for name in ("lines.jsonl", "array.json"):
        (found,) = run(tmp_path / f"{name}.out", tmp_path / name, **changes).values()
        assert found["item_id"] == [["1", "x"], []]
        assert found["x"] == [[str(2**70)], ["7"]]
        for key in ({"user_column": "user"}, {"features": ("a",)}):
            with pytest.raises(UserError, match=r"expected numbers, texts .*give (user|a)\.KEY"):
                run(tmp_path / "out", tmp_path / name, **(changes | key))


def test_columns_in_another_order_and_of_other_types_in_each_file(tmp_path):
    types = dict.fromkeys(NAMES, pa.int64())
    for i, (kind, value) in enumerate([(pa.int8(), 7), (pa.string(), "7"), (pa.uint64(), 7)]):
        row = dict(reversed(list(events(item_id=[value])[0].items())))
        write_parquet(tmp_path / f"{i}.parquet", [row], types | {"item_id": kind})
    write_parquet(tmp_path / "3.parquet", events(item_id=[None]), types | {"item_id": pa.null()})
    (found,) = run(tmp_path / "out", tmp_path).values()
    assert found["item_id"] == [[7], [7], [7], []]


@pytest.mark.parametrize("nested", [False, True])
def test_rows_of_one_user_are_merged(tmp_path, nested):
    def times(*values: int) -> list:
        return [[value] for value in values] if nested else list(values)

    days = [
        [
            {"user": 1, "item_id": [[1], [2, 3]], "timestamp": times(10, 30), "x": "a"},
            {"user": 2, "item_id": [[]], "timestamp": times(5), "x": None},
        ],
        [{"user": 1, "item_id": [[4], None], "timestamp": times(20, 40), "x": "b"}],
    ]
    for day, rows in enumerate(days):
        write_log(tmp_path / "log" / f"{day}.orc", rows)
    (tmp_path / "log" / "2.orc").touch()
    changes = {"user_column": "user", "features": ("item_id", "x"), "merge": True}
    assert run(tmp_path / "out", tmp_path / "log", **changes) == {
        1: {
            "item_id": [[1], [4], [2, 3], []],
            "x": [["a"], ["b"], ["a"], ["b"]],
            "timestamp": [[10], [20], [30], [40]],
        },
        2: {"item_id": [[]], "x": [[]], "timestamp": [[5]]},
    }
    again = {"features": ("item_id", "x"), "merge": True}
    assert run(tmp_path / "again", tmp_path / "out", **again) == run(
        tmp_path / "out2", tmp_path / "log", **changes
    )
    write_csv(tmp_path / "a.csv", events(user_id=[1]))
    with pytest.raises(UserError, match="--merge: has no effect for sources of format csv"):
        run(tmp_path / "out3", tmp_path / "a.csv", merge=True)
    (tmp_path / "a.csv").write_text("user_id;item_id;timestamp\n1;2;3\n")
    with pytest.raises(UserError, match="; give the delimiter with --delimiter"):
        run(tmp_path / "out3", tmp_path / "a.csv")


def test_merging_finds_the_columns_and_takes_what_is_missing_for_missing(tmp_path):
    """Compares with plain Python; the files' names are not in the order of their days."""
    rng = random.Random(0)
    types = {
        "uid": pa.int64(),
        "item_id": pa.list_(pa.int64()),
        "tags": pa.list_(pa.list_(pa.string())),
        "ts": pa.list_(pa.int64()),
        "day": pa.int32(),
    }
    expected = {}
    for day in range(4):
        rows = []
        for user in range(30):
            length = rng.randrange(5)
            items = [rng.choice([None, 3, 4]) for _ in range(length)]
            tags = [["a", str(n)][: n % 3] for n in range(length)] if day else None
            times = [day * 100 + 10 * n for n in range(length)]
            rows.append({"uid": user, "item_id": items, "tags": tags, "ts": times, "day": day})
            if length:
                made = expected.setdefault(user, {"item_id": [], "tags": [], "timestamp": []})
                made["item_id"] += [[] if item is None else [item] for item in items]
                made["tags"] += tags or [[]] * length
                made["timestamp"] += [[time] for time in times]
        write_log(tmp_path / "log" / f"{9 - day}.orc", rows, types)
    made = Settings(
        paths=(str(tmp_path / "log"),), output=tmp_path / "out", format="orc", merge=True
    )
    assert "left out columns that do not have one entry per event: day" in convert(made).notes
    found = pyarrow.orc.read_table(str(tmp_path / "out" / "part-0.orc")).to_pylist()
    assert {row.pop("user_id"): row for row in found} == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"item_id": [1], "ts": [1]}, "--user_column: .* has no column user_id"),
        ({"user_id": 1, "item_id": [1]}, "--time_column: .* found none in user_id, item_id"),
        ({"user_id": 1, "item_id": [1], "ts": [1], "date": [1]}, "found ts and date"),
        ({"user_id": 1, "item_id": [1, 2], "ts": [1]}, "1 entries in ts but 2 in item_id"),
    ],
)
def test_what_cannot_be_merged(tmp_path, row, words):
    path = write_log(tmp_path / "a.orc", [row])
    with pytest.raises(UserError, match=words):
        convert(Settings(paths=(str(path),), output=tmp_path / "out", merge=True))
    assert not list((tmp_path / "out").glob("*.orc"))
