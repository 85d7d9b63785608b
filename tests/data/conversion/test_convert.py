import csv
import dataclasses
import datetime
import gzip
import re
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import of_config
import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet
import pytest
from conversions import FEATURES, NAMES, events, run, write_csv, write_jsonl, write_parquet
from hypothesis import HealthCheck, assume, given, settings
from places import DATA, REPO

from s2s_jax.cli.commands.convert import main
from s2s_jax.config import load_file
from s2s_jax.config.settings import Reading
from s2s_jax.data.batching.batch_fill import with_packing
from s2s_jax.data.batching.reader import Reader
from s2s_jax.data.conversion.convert import convert
from s2s_jax.data.conversion.settings import Settings
from s2s_jax.data.logs import orc
from s2s_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("engine")
needs_raw = pytest.mark.skipif(
    not (DATA / "raw").is_dir(), reason="the raw logs are not at ../shared/data/raw"
)


def by_hand(rows: list[dict]) -> dict:
    """The expected log of events; each value of an event is None, a number or a text."""
    kept = {}
    for name in NAMES:
        texts = ["" if row[name] is None else str(row[name]) for row in rows]
        kept[name] = [None if t is None or t == "" else t for t in one_form(texts)]
    users = {}
    for i in sorted(range(len(rows)), key=lambda i: kept["timestamp"][i]):
        mine = users.setdefault(kept["user_id"][i], {name: [] for name in NAMES[1:]})
        for name in NAMES[1:]:
            mine[name].append([] if kept[name][i] is None else [kept[name][i]])
    return dict(sorted(users.items()))


def one_form(texts: list[str]) -> list:
    """Ids as they are written: as integers if all are whole numbers."""
    # Not str.isdigit: "²" is also a digit, and int("１") is 1.
    known = [text for text in texts if text]
    integers = [t for t in known if re.fullmatch("0|-?[1-9][0-9]*", t)]
    integers = [t for t in integers if -(2**63) <= int(t) < 2**63]
    numbers = integers + [t for t in known if re.fullmatch(r"-?(0|[1-9][0-9]*)\.[0-9]+", t)]
    whole = [t for t in numbers if float(t).is_integer()]
    if len(whole) == len(known):
        return [int(text.partition(".")[0]) if text else None for text in texts]
    if len(numbers) == len(known) and 0 < len(integers) < len(whole):
        return [f"{text}.0" if text in integers else text for text in texts]
    return texts


# ------------------------------------------------------------------------------------- real logs


@needs_raw
def test_movielens_as_downloaded(tmp_path):
    raw = DATA / "raw" / "ml-latest-small"
    with (raw / "movies.csv").open(encoding="utf-8", newline="") as file:
        genres = {row["movieId"]: row["genres"].split("|") for row in csv.DictReader(file)}
    genres = {movie: [] if g == ["(no genres listed)"] else g for movie, g in genres.items()}
    assert [] in genres.values()
    users = {}
    with (raw / "ratings.csv").open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["timestamp"]))
    for row in rows:
        mine = users.setdefault(int(row["userId"]), {name: [] for name in NAMES[1:]})
        mine["item_id"].append([int(row["movieId"])])
        mine["cate_id"].append(genres[row["movieId"]])
        mine["behavior_id"].append(["rate" + row["rating"]])
        mine["timestamp"].append([int(row["timestamp"])])
    assert run(tmp_path / "log", raw) == users
    schema = pyarrow.orc.ORCFile(tmp_path / "log" / "part-0.orc").schema
    assert schema.names == list(NAMES)
    assert schema.field("user_id").type == pa.int64()
    assert schema.field("item_id").type == pa.list_(pa.list_(pa.int64()))
    assert schema.field("cate_id").type == pa.list_(pa.list_(pa.string()))


@pytest.mark.slow
@needs_raw
def test_taobao_whose_last_line_is_cut_short(tmp_path):
    path = DATA / "raw" / "taobao" / "UserBehavior.csv"
    made = Settings(paths=(str(path),), columns=NAMES, output=tmp_path / "log")
    with pytest.raises(UserError, match=r"UserBehavior\.csv: line 84476 .*--on_error skip$"):
        convert(made)
    assert not made.output.exists()
    found = run(made.output, path, columns=NAMES, on_error="skip")
    with path.open(newline="") as file:
        rows = [dict(zip(NAMES, row, strict=True)) for row in csv.reader(file) if len(row) == 5]
    assert found == by_hand(rows)
    done = convert(dataclasses.replace(made, on_error="skip", overwrite=True))
    assert done.skipped == ("1 unreadable line",)
    assert (done.rows, done.events, done.bags) == (815, 84_475, {})


@needs_raw
def test_what_is_converted_trains_with_the_config_of_movielens(tmp_path):
    path = DATA / "raw" / "taobao" / "UserBehavior.csv"
    run(tmp_path, path, columns=NAMES, on_error="skip")
    config = load_file(REPO / "configs" / "ml1m.py")
    config = dataclasses.replace(
        config, io=dataclasses.replace(config.io, data_paths=str(tmp_path))
    )
    reading = with_packing(Reading.of(config), of_config.index(config))
    reader = Reader(reading, 4 * reading.sequences.device_rows)
    assert next(reader).arrays["length"].max() == config.model.seq_len
    reader.close()


# ------------------------------------------------------------------------- any log, in any layout


IDS = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.sampled_from([2**40 + 1, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, 10**20, "007", "-0"]),
    st.sampled_from(["1", "1.0", "-2.0", "1.5"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=4),
    st.sampled_from(['"', 'a"b', "a,b", "ä|ö", "日本", " 1", "null", "a\nb"]),
)
COLUMNS = st.sampled_from(["integers", "big", "numbers", "any"])


@st.composite
def logs(draw):
    """Events with equal times and missing ids; some columns have only integers."""
    rows = draw(st.integers(1, 30))
    some = {
        "integers": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        "big": st.sampled_from([2**40, 2**53 + 1, 2**60 + 1, -1]),
        "numbers": st.sampled_from([None, 1, 1.0, "-2.0", 3, 0.5, "7.00"]),
        "any": IDS,
    }
    columns = {
        name: draw(st.lists(some[draw(COLUMNS)], min_size=rows, max_size=rows)) for name in FEATURES
    }
    users = draw(st.sampled_from([st.integers(-2, 2), st.sampled_from(["a", "ä", "B", "7", '"'])]))
    columns["user_id"] = draw(st.lists(users, min_size=rows, max_size=rows))
    columns["timestamp"] = draw(st.lists(st.integers(-2, 2), min_size=rows, max_size=rows))
    return events(**columns)


def as_text(rows: list[dict]) -> list[dict]:
    """The same rows with every value except None as text."""
    return [{n: v if v is None else str(v) for n, v in row.items()} for row in rows]


@pytest.mark.parametrize(
    "layout",
    [
        "csv",
        pytest.param("headless", marks=pytest.mark.slow),
        pytest.param("tsv", marks=pytest.mark.slow),
        "parquet",
        "jsonl",
    ],
)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=logs(), files=st.integers(1, 3))
def test_any_log(tmp_path_factory, layout, rows, files):
    # A key that no object has counts as a mistake.
    some = [any(row[name] not in (None, "") for row in rows) for name in NAMES]
    assume(layout != "jsonl" or all(some))
    path, changes = tmp_path_factory.mktemp("log"), {}
    parts = [rows[i * len(rows) // files : (i + 1) * len(rows) // files] for i in range(files)]
    for i, part in enumerate(part for part in parts if part):
        if layout == "parquet":
            write_parquet(path / f"{i}.parquet", as_text(part), dict.fromkeys(NAMES, pa.string()))
        elif layout == "jsonl":
            write_jsonl(path / f"{i}.jsonl", part)
        else:
            how = {"delimiter": "\t"} if layout == "tsv" else {}
            name = f"{i}.{'tsv' if layout == 'tsv' else 'csv'}"
            write_csv(path / name, part, layout != "headless", quoting=csv.QUOTE_ALL, **how)
    if layout == "headless":
        changes = {"columns": NAMES}
    assert run(path / "out", path, **changes) == by_hand(rows)


def test_features_may_be_named_like_what_conversions_sort_by(tmp_path):
    rows = events(user_id=[2, 1, 2, 1, 2], timestamp=[30, 20, 10, 20, 30])
    names = ("u", "Time", "place", "seconds", "f0")
    for row, value in zip(rows, (9, 8, 7, 6, 5), strict=True):
        row.update(dict.fromkeys(names, value))
    path = write_csv(tmp_path / "a.csv", rows)
    expected = {1: [[8], [6]], 2: [[7], [9], [5]]}
    found = run(tmp_path / "log", path, features=("item_id", *names))
    assert {user: row["timestamp"] for user, row in found.items()} == {
        1: [[20], [20]],
        2: [[10], [30], [30]],
    }
    for name in names:
        assert {user: row[name] for user, row in found.items()} == expected


def test_integers_of_parquet_are_exact(tmp_path):
    rows = events(
        user_id=[2**62 + 1, 2**62 + 1, -1],
        item_id=[2**53 + 1, -1, None],
        cate_id=[2**40, 1, 2],
        behavior_id=[2**64 - 1, 0, None],
        timestamp=[2**62 + 1, 2**62, 5],
    )
    types = dict.fromkeys(NAMES, pa.int64()) | {"cate_id": pa.uint64(), "behavior_id": pa.uint64()}
    found = run(tmp_path / "log", write_parquet(tmp_path / "a.parquet", rows, types))
    assert found == {
        -1: {"item_id": [[]], "cate_id": [[2]], "behavior_id": [[]], "timestamp": [[5]]},
        2**62 + 1: {
            "item_id": [[-1], [2**53 + 1]],
            "cate_id": [[1], [2**40]],
            "behavior_id": [["0"], [str(2**64 - 1)]],
            "timestamp": [[2**62], [2**62 + 1]],
        },
    }


def test_numbers_with_fractions_and_truth_values_are_texts(tmp_path):
    rows = events(item_id=[1.5, 2.0, float("nan")], cate_id=[True, None, False])
    path = write_parquet(tmp_path / "a.parquet", rows)
    (found,) = run(tmp_path / "log", path).values()
    assert found["item_id"] == [["1.5"], ["2.0"], []]
    assert found["cate_id"] == [["true"], [], ["false"]]


FLOATS = {"float32": (pa.float32(), 2**24), "float64": (pa.float64(), 2**53)}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "decimal", *FLOATS])
def test_ids_that_one_file_has_as_fractions(tmp_path, kind):
    whole = events(user_id=[7, 8], item_id=[12, 3], timestamp=[1, 2])
    holes = events(user_id=[7.0, 8.0], item_id=[12.0, None], cate_id=[4.5, 1.0], timestamp=[3, 4])
    if kind in ("csv", "jsonl"):
        write = {"csv": write_csv, "jsonl": write_jsonl}[kind]
        write(tmp_path / f"0.{kind}", whole)
        write(tmp_path / f"1.{kind}", holes)
    else:
        write_parquet(tmp_path / "0.parquet", whole)
        odd = pa.decimal128(38, 10) if kind == "decimal" else FLOATS[kind][0]
        types = dict.fromkeys(NAMES, odd) | {"timestamp": pa.int64()}
        table = pa.table({n: pa.array([r[n] for r in holes]).cast(types[n]) for n in NAMES})
        pyarrow.parquet.write_table(table, tmp_path / "1.parquet")
    found = run(tmp_path / "log", tmp_path)
    assert list(found) == [7, 8]
    assert [found[user]["item_id"] for user in found] == [[[12], [12]], [[3], []]]
    one = "1" if kind == "decimal" else "1.0"
    assert [found[user]["cate_id"] for user in found] == [[[one], ["4.5"]], [[one], [one]]]


@pytest.mark.parametrize("kind", FLOATS)
def test_numbers_that_lost_digits_are_refused(tmp_path, kind):
    odd, exact = FLOATS[kind]

    def write(name: str, value: float) -> Path:
        column = [[value]] if name == "cate_id" else [value]
        types = dict.fromkeys(NAMES, pa.int64())
        types |= {"timestamp": pa.int64(), name: pa.list_(odd) if name == "cate_id" else odd}
        return write_parquet(tmp_path / "a.parquet", events(**{name: column}), types)

    for name in ("item_id", "user_id", "cate_id"):
        run(tmp_path / f"{name}{kind}", write(name, float(exact - 1)))
        path = write(name, float(exact))
        with pytest.raises(UserError, match=f"column {name} .* has {exact} as {kind}, .*again as"):
            run(tmp_path / "log", path)
    path = write("timestamp", 1.6e9)
    if kind == "float64":
        assert run(tmp_path / "log", path)[1]["timestamp"] == [[1_600_000_000]]
        return
    with pytest.raises(
        UserError, match=r"column timestamp \(--time_column\) has 1600000000 as float32"
    ):
        run(tmp_path / "log", path)


@pytest.mark.parametrize("text", [f"{2**53}.0", "1.2e+16", "1E+20"])
def test_texts_of_numbers_that_lost_digits_are_refused(tmp_path, text):
    path = write_csv(tmp_path / "a.csv", events(item_id=[1, text], cate_id=["a", text]))
    with pytest.raises(
        UserError, match=r"column item_id \(--features\) has only numbers, and .*again"
    ):
        run(tmp_path / "log", path)
    (found,) = run(tmp_path / "log", path, features=("cate_id",)).values()
    assert found["cate_id"] == [["a"], [text]]


def test_bags(tmp_path):
    rows = events(
        item_id=["a|b", "", "c||NULL"], cate_id=["3 1", "-7", "NULL"], timestamp=[1, 2, 3]
    )
    path = write_csv(tmp_path / "a.csv", rows)
    (found,) = run(tmp_path / "1", path, bags=("item_id",), missing=("NULL",)).values()
    assert found["item_id"] == [["a", "b"], [], ["c"]]
    assert found["cate_id"] == [["3 1"], ["-7"], []]
    made = {"features": ("ids=cate_id",), "bags": ("ids",), "bag_separator": " "}
    (found,) = run(tmp_path / "2", path, **made, missing=("NULL",)).values()
    assert found == {"ids": [[3, 1], [-7], []], "timestamp": [[1], [2], [3]]}


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_bags_in_lists(tmp_path, layout):
    rows = events(item_id=[[3, 2**60 + 1], [], None], cate_id=[["a", None, ""], ["b"], ["c", "d"]])
    path = tmp_path / f"a.{layout}"
    write_jsonl(path, rows) if layout == "jsonl" else write_parquet(path, rows)
    done = convert(Settings(paths=(str(path),), output=tmp_path / "log"))
    assert done.bags == {"item_id": 2, "cate_id": 2}
    (found,) = run(tmp_path / "again", path).values()
    assert found["item_id"] == [[3, 2**60 + 1], [], []]
    assert found["cate_id"] == [["a"], ["b"], ["c", "d"]]


def test_objects_may_lack_keys_and_mix_kinds(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = [
        '{"user_id": "u", "timestamp": 5, "item_id": 7, "cate_id": "x"}',
        '{"timestamp": "4", "user_id": "u", "item_id": ["8", 9], "behavior_id": true, "more": {}}',
    ]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    (found,) = run(tmp_path / "log", path).values()
    assert found == {
        "item_id": [[8, 9], [7]],
        "cate_id": [[], ["x"]],
        "behavior_id": [["true"], []],
        "timestamp": [[4], [5]],
    }


def test_delimiters_quotes_and_compression(tmp_path):
    lines = "1::7::it's 5\"::x::3\r\n1::8::b::y::2\r\n"
    (tmp_path / "a.log").write_text(lines, newline="")
    made = {"columns": NAMES, "delimiter": "::", "quote": "", "format": "csv"}
    (found,) = run(tmp_path / "1", tmp_path / "a.log", **made).values()
    assert found["cate_id"] == [["b"], ["it's 5\""]]
    assert found["timestamp"] == [[2], [3]]
    text = "\ufefftimestamp\tuser\titem_id\n3\t1\t5\n2\t1\t'a\tb'\n"
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(text.encode()))
    made = {"quote": "'", "user_column": "user", "features": ("item_id",)}
    (found,) = run(tmp_path / "2", tmp_path / "b.tsv.gz", **made).values()
    assert found == {"item_id": [["a\tb"], ["5"]], "timestamp": [[2], [3]]}
    made |= {"delimiter": r"\t", "format": "csv"}
    assert list(run(tmp_path / "3", tmp_path / "b.tsv.gz", **made).values()) == [found]


@pytest.mark.parametrize("ends", [("\r\n", "\r\n"), ("\n", "\r\n"), ("\r\n", "\n"), ("\r", "\r")])
@pytest.mark.parametrize("delimiter", [",", "::"])
def test_ends_of_lines(tmp_path, ends, delimiter):
    rows = [NAMES, ("1", "a", "2", "3", "4"), ("1", "b", "2", "3", "5"), ("2", "c", "", "3", "6")]
    text = "".join(delimiter.join(row) + ends[i % 2] for i, row in enumerate(rows))
    (tmp_path / "a.csv").write_text(text, newline="")
    made = {"delimiter": delimiter, "quote": '"' if delimiter == "," else ""}
    if delimiter == "::" and ends[0] == "\r":
        return
    found = run(tmp_path / "log", tmp_path / "a.csv", **made)
    assert {user: row["item_id"] for user, row in found.items()} == {1: [["a"], ["b"]], 2: [["c"]]}
    assert found[2]["cate_id"] == [[]]


@pytest.mark.parametrize(
    ("encoding", "flag"),
    [("utf-16", None), ("utf-8-sig", None), ("latin-1", "latin-1"), ("cp1252", "cp1252")],
)
def test_encodings(tmp_path, encoding, flag):
    ids = ["café", "ü,x"] + (["“€”"] if encoding != "latin-1" else [])
    rows = events(item_id=ids, timestamp=range(len(ids)))
    path = write_csv(tmp_path / "a.csv", rows)
    path.write_bytes(path.read_text("utf-8").replace("\n", "\r\n").encode(encoding))
    (found,) = run(tmp_path / "log", path, encoding=flag).values()
    assert found["item_id"] == [[i] for i in ids]
    if flag:
        with pytest.raises(UserError, match="--encoding, such as latin-1"):
            run(tmp_path / "2", path)
        with pytest.raises(UserError, match=r"expected text in utf-16 \(--encoding\)"):
            run(tmp_path / "2", path, encoding="utf-16")
    with pytest.raises(UserError, match="--encoding: expected an encoding that Python knows"):
        run(tmp_path / "2", path, encoding="x")


def test_quotes_that_are_escaped(tmp_path):
    (tmp_path / "a.csv").write_text('user_id,item_id,timestamp\n1,"a\\"b,c",2\n1,"d\n\\\\",3\n')
    made = {"features": ("item_id",), "escape": "\\"}
    (found,) = run(tmp_path / "log", tmp_path / "a.csv", **made).values()
    assert found["item_id"] == [['a"b,c'], ["d\n\\"]]


def test_movielens_1m_as_downloaded(tmp_path):
    (tmp_path / "ratings.dat").write_text("2::10::5::9\n1::11::3::8\n2::12::1::8\n")
    movies = "10::Café (1990)::Drama|Comedy\n11::X::Drama\n"
    (tmp_path / "movies.dat").write_text(movies, encoding="latin-1")
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n")
    assert run(tmp_path / "log", tmp_path) == {
        1: {
            "item_id": [[11]],
            "cate_id": [["Drama"]],
            "behavior_id": [["rate3"]],
            "timestamp": [[8]],
        },
        2: {
            "item_id": [[12], [10]],
            "cate_id": [[], ["Drama", "Comedy"]],
            "behavior_id": [["rate1"], ["rate5"]],
            "timestamp": [[8], [9]],
        },
    }
    (tmp_path / "movies.dat").unlink()
    assert list(run(tmp_path / "2", tmp_path)[1]) == ["item_id", "behavior_id", "timestamp"]


# ---------------------------------------------------------------------------- times, users, files


@pytest.mark.parametrize(
    ("texts", "seconds"),
    [
        (["12", "-3", "007"], [-3, 7, 12]),
        (["2.5", "2.25", "-1.5"], [-2, 2, 2]),
        (["1970-01-02", "1970-01-01 00:00:01.9", "1969-12-31T23:59:59.5Z"], [-1, 1, 86_400]),
        (["1970-01-01T02:00:07+02:00", "1970-01-01 00:00:08", "1970-01-01 00:00:09"], [7, 8, 9]),
    ],
)
def test_times_as_texts(tmp_path, texts, seconds):
    path = write_csv(tmp_path / "a.csv", events(timestamp=texts, item_id=list("abc")))
    (found,) = run(tmp_path / "log", path).values()
    assert found["timestamp"] == [[second] for second in seconds]


def test_fractions_of_seconds_order_events(tmp_path):
    texts = ["1970-01-01 00:00:01.9", "1970-01-01 00:00:01.2", "1970-01-01 00:00:01.20"]
    path = write_csv(tmp_path / "a.csv", events(timestamp=texts, item_id=list("abc")))
    (found,) = run(tmp_path / "1", path).values()
    assert found["item_id"] == [["b"], ["c"], ["a"]]
    rows = events(timestamp=[1.9, 1.2, 1.2], item_id=list("abc"))
    (found,) = run(tmp_path / "2", write_parquet(tmp_path / "a.parquet", rows)).values()
    assert (found["item_id"], found["timestamp"]) == ([["b"], ["c"], ["a"]], [[1], [1], [1]])


@pytest.mark.parametrize(
    "time_type",
    [pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "Asia/Tokyo"), pa.date32()],
)
def test_times_of_parquet(tmp_path, time_type):
    days = [datetime.date(2020, 1, 2), datetime.date(1969, 12, 31)]
    whole = [
        int(datetime.datetime(d.year, d.month, d.day, tzinfo=datetime.UTC).timestamp())
        for d in days
    ]
    values = days if time_type == pa.date32() else whole
    if pa.types.is_timestamp(time_type):
        values = pa.array(whole, pa.timestamp("s")).cast(pa.timestamp(time_type.unit))
        values = (
            values.cast(time_type).to_pylist()
            if time_type.tz is None
            else [datetime.datetime.fromtimestamp(w, datetime.UTC) for w in whole]
        )
    rows = events(timestamp=values, item_id=values)
    types = dict.fromkeys(NAMES, pa.int64()) | {"timestamp": time_type, "item_id": time_type}
    (found,) = run(tmp_path / "log", write_parquet(tmp_path / "a.parquet", rows, types)).values()
    assert found["timestamp"] == found["item_id"] == [[whole[1]], [whole[0]]]


def test_sources_are_read_in_order(tmp_path):
    for i, name in enumerate(["b/2.csv", "b/10.csv", "a.csv", "c.csv"]):
        write_csv(tmp_path / name, events(item_id=[10 * i, 10 * i + 1]))
    (tmp_path / "b" / "_SUCCESS").touch()
    (tmp_path / "b" / "README.txt").touch()
    # Columns in another order, and an additional one.
    write_csv(
        tmp_path / "c.csv", [dict(reversed(e.items())) | {"x": 0} for e in events(item_id=[30])]
    )
    pattern, directory = tmp_path / "[ac].csv", tmp_path / "b"
    (found,) = run(tmp_path / "1", pattern, directory).values()
    assert found["item_id"] == [[20], [21], [30], [10], [11], [0], [1]]
    (found,) = run(tmp_path / "2", directory, pattern).values()
    assert found["item_id"] == [[10], [11], [0], [1], [20], [21], [30]]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize(
    ("name", "other"),
    [("a[1]", "a1"), ("a*b", "axb"), ("a?", "ab"), ("{a,b}", "a"), ("[!a]", "b"), ("**", "a")],
)
def test_a_name_means_that_file(tmp_path, suffix, name, other):
    write = {"csv": write_csv, "parquet": write_parquet, "jsonl": write_jsonl}[suffix]
    for user, (folder, file) in enumerate([(name, name), (other, name), (name, other)]):
        (tmp_path / folder).mkdir(exist_ok=True)
        write(tmp_path / folder / f"{file}.{suffix}", events(user_id=[user]))
    assert list(run(tmp_path / "log", tmp_path / name / f"{name}.{suffix}")) == [0]


def test_a_name_that_could_be_a_pattern(tmp_path):
    path = write_csv(tmp_path / "a\\[1].csv", events(user_id=[1]))
    with pytest.raises(UserError, match=r"1\]\.csv: a name with .* cannot be read; rename it"):
        run(tmp_path / "log", path)


def test_more_events_than_memory_holds(tmp_path, engine):
    rng = np.random.default_rng(0)
    count = 1_000_000
    user = rng.integers(0, 5000, count)
    time = rng.integers(0, 1000, count)
    text = pa.array(np.arange(count)).cast(pa.string())
    table = pa.table(
        {"user_id": user, "timestamp": time, "item_id": np.arange(count), "cate_id": text}
    )
    for i in range(2):
        half = table.slice(i * count // 2, count // 2)
        pyarrow.parquet.write_table(half, tmp_path / f"{i}.parquet", row_group_size=100_000)
    made = {"features": ("item_id", "cate_id"), "temp_dir": tmp_path}
    if engine == "duckdb":
        made["memory_limit"] = "100MB"
    done = convert(
        Settings(
            paths=(f"{tmp_path}/*.parquet",),
            output=tmp_path / "log",
            events_per_file=300_000,
            **made,
        )
    )
    assert (len(done.paths), done.rows, done.events) == (4, 5000, count)
    log = pa.concat_tables([pyarrow.orc.read_table(str(path)) for path in done.paths])
    order = np.lexsort([time, user])
    for name, expected in {"item_id": order, "timestamp": time[order]}.items():
        found = log[name].combine_chunks().flatten().flatten().to_numpy()
        np.testing.assert_array_equal(found, expected)
    assert log["user_id"].to_pylist() == list(range(5000))
    assert not list(tmp_path.glob(".*"))
    for path in done.paths[:3]:
        # 160 stripes would be shorter than a stripe can be.
        footer = orc.read_footer(path)
        assert 300_000 / 36_000 < len(footer.stripe_rows) < 300_000 / 12_000


def test_users_with_few_events_are_left_out_and_counted(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", events(user_id=[1, 2, 2, 3, 3, 3, 4]))
    assert list(run(tmp_path / "1", path, min_events=2)) == [2, 3]
    assert main([str(path), "--out", str(tmp_path / "2"), "--min_events", "3"]) == 0
    assert (
        "left out: 3 users with fewer than 3 events, 4 events of these users\n"
        in capsys.readouterr().out
    )


def test_bad_events_are_left_out_and_counted(tmp_path, capsys):
    text = "user_id,timestamp,item_id\n1,5,a\n1\n,5,b\n1,x,c\n1,4,d,e\n\n2,1,f\n3,,g\n"
    (tmp_path / "a.csv").write_text(text)
    made = [str(tmp_path / "a.csv"), "--features", "item_id", "--out", str(tmp_path / "log")]
    assert main([*made, "--on_error", "skip"]) == 0
    found = pyarrow.orc.read_table(str(tmp_path / "log" / "part-0.orc")).to_pylist()
    assert [(row["user_id"], row["item_id"]) for row in found] == [(1, [["a"]]), (2, [["f"]])]
    assert capsys.readouterr().out.splitlines()[0] == (
        f"wrote 1 file with 2 users and 2 events to {tmp_path / 'log'}; left out: 2 unreadable lines, "
        f"1 event without user_id, 2 events without timestamp"
    )
    lines = ['{"user_id": 1, "timestamp": 2, "item_id": 3}', "{broken", '{"timestamp": 5}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    made = {"features": ("item_id",), "on_error": "skip"}
    assert list(run(tmp_path / "2", tmp_path / "a.jsonl", **made)) == [1]
    with pytest.raises(UserError, match=r"row 2, column user_id: .*object.*skip \(2 in all\)"):
        run(tmp_path / "3", tmp_path / "a.jsonl", features=("item_id",))


# ----------------------------------------------------------------------------------------- errors


GOOD = "user_id,timestamp,item_id,cate_id,behavior_id\n1,2,3,4,5\n"


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (GOOD + "1,x,3,4,5\n", {}, "a.csv: row 2, column timestamp: expected a time as a whole"),
        (
            GOOD + "1,,3,4,5\n",
            {},
            "column timestamp: expected a time as a whole number, found none",
        ),
        (
            GOOD + "1,9e9,3,4,5\n",
            {},
            "found 9e9; fix it .*, or leave such rows out with --on_error",
        ),
        (GOOD + f"1,{2**63},3,4,5\n", {}, f"found {2**63}"),
        (GOOD.replace("1,2", "1,2020-01-01") + "1,2020-13-01,3,4,5\n", {}, "found 2020-13-01"),
        (GOOD + ",2,3,4,5\n", {}, "a.csv: row 2, column user_id: expected a user, found none"),
        (GOOD + "1,2,3,4\n", {}, "a.csv: line 3 cannot be read .*: 1,2,3,4; fix it, or leave"),
        (GOOD + '"1,2,3,4,5\n1,2,3,4,5\n', {"on_error": "skip"}, "line 3 .*--quote ''"),
        (GOOD + "1,2,\udcff,4,5\n", {}, "a.csv: line 3 cannot be read .*utf-8"),
        ("", {}, "a.csv: expected a line with the names of columns, found an empty file"),
        (GOOD[:46], {}, "a.csv: expected events, found none"),
        (
            GOOD,
            {"user_column": "uid"},
            r"a.csv: no column uid \(--user_column\); it has user_id, timestamp, item_id",
        ),
        (GOOD, {"features": ("x=y",)}, r"a.csv: no column y \(--features\); it has user_id"),
        (GOOD, {"features": ("x=",)}, "--features: expected NAME=COLUMN or NAME, found x="),
        (GOOD, {"features": ("x=item_id", "x=cate_id")}, "--features: x is given twice"),
        (
            GOOD,
            {"features": ("timestamp",)},
            "--features: timestamp is always written.*--time_column",
        ),
        (GOOD, {"bags": ("x",)}, "--bags: expected names of --features .*found x"),
        (GOOD, {"bags": ("item_id",), "bag_separator": ""}, "--bag_separator: expected at least"),
        (GOOD, {"columns": ("a", "b")}, "a.csv: no column user_id"),
        (GOOD, {"format": "parquet"}, "--columns|a.csv: DuckDB failed"),
        (GOOD, {"format": "orc"}, "a.csv: expected an ORC file"),
        (GOOD, {"format": "jsonl"}, "a.csv: row 1, column user_id: expected a JSON obj"),
        (GOOD, {"format": "movielens"}, "--format: movielens is one directory with ratings.dat"),
        (
            GOOD,
            {"format": "orc", "user_column": "x"},
            "--user_column: has no effect for sources of format orc",
        ),
        (GOOD, {"min_events": 0}, "--min_events: expected at least 1, found 0"),
        (GOOD, {"min_events": 2}, "--min_events: no user has 2 events; lower it"),
        (GOOD, {"events_per_file": 0}, "--events_per_file: expected at least 1, found 0"),
        (GOOD, {"memory_limit": "lots"}, "--memory_limit: expected a size such as 4GB, found lots"),
        (GOOD, {"temp_dir": Path("/dev/null")}, "--temp_dir: /dev/null cannot be written"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(tmp_path, text, changes, message):
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message) as caught:
        convert(Settings(paths=(str(path),), output=tmp_path / "log", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "log").exists()


def test_mistakes_in_names_of_files(tmp_path):
    def refused(message: str, *paths: Path, **changes) -> None:
        with pytest.raises(UserError, match=message) as caught:
            convert(Settings(paths=tuple(map(str, paths)), output=tmp_path / "log", **changes))
        assert "\n" not in str(caught.value)

    refused("expected files or directories with events, found none")
    refused("nowhere does not exist", tmp_path / "nowhere")
    refused("x.csv does not exist", tmp_path / "*x.csv")
    refused("contains no files whose names end in .csv, .tsv, .parquet", tmp_path)
    (tmp_path / "a.log").touch()
    refused(
        "a.log: the format cannot be found from its name; give it with --format", tmp_path / "a.log"
    )
    path = write_csv(tmp_path / "a.csv", events(item_id=[1]))
    refused("a.csv is given twice", path, tmp_path)
    write_jsonl(tmp_path / "a.json", events(item_id=[1]))
    refused("expected files of one format, found .*csv and .*json; ", tmp_path)
    assert list(run(tmp_path / "1", tmp_path, format="jsonl")) == [1]
    refused(r"a.json: expected objects with the key x", tmp_path / "a.json", features=("x",))
    (tmp_path / "a.parquet").write_text("nothing")
    refused("a.parquet: DuckDB failed: ", tmp_path / "a.parquet")
    rows = events(item_id=[{"a": 1}])
    refused(
        r"column item_id \(--features\): expected .*found STRUCT",
        write_parquet(tmp_path / "b.pq", rows),
    )
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3,4\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,a,b\n1,a,c\n")
    refused("movies.csv: line 3: expected a movie, .*found movie 1 twice", tmp_path)


def test_a_failed_conversion_leaves_the_log_before_it(tmp_path):
    path = write_csv(tmp_path / "a.csv", events(item_id=[1]))
    before = run(tmp_path / "log", path)
    with pytest.raises(UserError, match=r"^--output: .*part-0\.orc.*--overwrite True"):
        convert(Settings(paths=(str(path),), output=tmp_path / "log"))
    path.write_text(path.read_text() + "1\n")
    with pytest.raises(UserError, match="line 3"):
        convert(Settings(paths=(str(path),), output=tmp_path / "log", overwrite=True))
    assert [p.name for p in (tmp_path / "log").iterdir()] == ["part-0.orc"]
    assert run(tmp_path / "log", path, overwrite=True, on_error="skip") == before


def test_the_command_and_its_errors(tmp_path):
    path = write_csv(tmp_path / "a.csv", events(item_id=[1]))
    command = [
        sys.executable,
        "-m",
        "s2s_jax",
        "convert",
        str(path),
        "--out",
        str(tmp_path / "log"),
    ]
    done = subprocess.run([*command, "--user", "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {path}: no column x (--user_column); it has "
        f"user_id, item_id, cate_id, behavior_id, timestamp\n"
    )
    code = (
        "import sys; sys.modules['duckdb'] = None; from s2s_jax.cli.commands.convert import main\n"
        "from s2s_jax.cli.exit import run_command; assert 'jax' not in sys.modules; run_command(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command[4:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: DuckDB, which sorts events, is not installed; pip install 's2s-jax[convert]'\n"
    )


def test_the_summary(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", events(item_id=[[1, 2], [3]]))
    assert (
        main([str(path), "--output", str(tmp_path / "my log"), "--features", "item=item_id"]) == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        f"wrote 1 file with 1 user and 2 events to {tmp_path / 'my log'}; left out: nothing",
        "an event has up to 2 ids in item: set bag_size=2 for its feature",
        f"to look at the log: s2s inspect '{tmp_path / 'my log'}'",
    ]
