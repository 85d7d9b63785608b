"""Times of converted logs: which formats are read, and what is refused."""

import datetime
import json
from pathlib import Path

import hypothesis.strategies as st
import pyarrow as pa
import pytest
from conversions import NAMES, events, run, write_csv, write_jsonl, write_parquet
from hypothesis import HealthCheck, given, settings

from s2s_jax.data.conversion.convert import convert
from s2s_jax.data.conversion.settings import Settings
from s2s_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("engine")


def seconds(*when: int) -> int:
    return int(datetime.datetime(*when, tzinfo=datetime.UTC).timestamp())


def read(path: Path, texts: list, **changes) -> list[int]:
    write_csv(path / "a.csv", events(timestamp=texts, item_id=range(len(texts))))
    (found,) = run(path / "log", path / "a.csv", **changes).values()
    times = dict(
        zip((i for (i,) in found["item_id"]), (t for (t,) in found["timestamp"]), strict=True)
    )
    return [times[i] for i in range(len(texts))]


@pytest.mark.parametrize(
    ("formats", "texts", "expected"),
    [
        ("%d-%m-%y", ["01-02-14", "15-01-14"], [seconds(2014, 2, 1), seconds(2014, 1, 15)]),
        ("%m/%d/%Y %I:%M:%S %p", ["11/15/2019 8:55:22 PM"], [seconds(2019, 11, 15, 20, 55, 22)]),
        (
            "%a %b %d %H:%M:%S %z %Y",
            ["Tue Apr 03 18:00:09 +0000 2012", "Tue Apr 03 18:00:09 +0530 2012"],
            [seconds(2012, 4, 3, 18, 0, 9), seconds(2012, 4, 3, 12, 30, 9)],
        ),
        ("%Y%m%d", ["20150131", "20150201"], [seconds(2015, 1, 31), seconds(2015, 2, 1)]),
        ("%d.%m.%Y|%Y/%m", ["3.2.2020", "2020/05"], [seconds(2020, 2, 3), seconds(2020, 5, 1)]),
        ("number", ["20150131", "20150201"], [20150131, 20150201]),
        ("", ["2015-01-31", "2015/02/01 03:04"], [seconds(2015, 1, 31), seconds(2015, 2, 1, 3, 4)]),
    ],
)
def test_times_of_a_format(tmp_path, formats, texts, expected):
    made = tuple(formats.split("|")) if formats else ()
    assert read(tmp_path, texts, time_format=made) == expected


FORMATS = ["%d.%m.%Y %H:%M:%S", "%m/%d/%Y %I:%M:%S %p", "%H:%M:%S %d %b %Y", "%Y%m%d%H%M%S"]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(FORMATS),
    times=st.lists(st.integers(-(10**9), 4 * 10**9), min_size=1, max_size=9),
)
def test_any_time_of_a_format(tmp_path_factory, form, times):
    texts = [datetime.datetime.fromtimestamp(t, datetime.UTC).strftime(form) for t in times]
    assert read(tmp_path_factory.mktemp("x"), texts, time_format=(form,)) == times


@pytest.mark.parametrize(
    ("texts", "formats", "message"),
    [
        (["01-02-14", "28-12-13"], (), "found 01-02-14; .*--time_format"),
        (["11/15/2019 8:55:22 AM"], (), "found 11/15/2019 .*--time_format"),
        (["Tue Apr 03 18:00:09 +0000 2012"], (), "found Tue Apr .*--time_format"),
        (["2015-01-31", "0001-01-01 00:00:00"], (), "found 0001-01-01 00:00:00"),
        (["2015-01-31", "13/02/2015"], (), "found 13/02/2015; .*--time_format"),
        (
            ["20150131", "20150201"],
            (),
            r"a\.csv: column timestamp .* give --time_format '%Y%m%d' if",
        ),
        (["20150131235959"], (), "--time_format '%Y%m%d%H%M%S'"),
        (["13/02/2015"], ("%m/%d/%Y",), "expected a time of the format %m/%d/%Y, found 13/02"),
        (["12:30"], ("%H:%M",), "--time_format: expected number or a format with a year"),
        (["2015"], ("%Y %Q",), "--time_format %Y %Q: DuckDB failed: .*%Q"),
        (["5"], ("number", "%Y"), "expected number alone"),
    ],
)
def test_times_that_are_refused(tmp_path, texts, formats, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, texts, time_format=formats)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_numbers_that_are_dates_in_other_layouts(tmp_path, suffix):
    write = {"parquet": write_parquet, "jsonl": write_jsonl}[suffix]
    path = write(tmp_path / f"a.{suffix}", events(timestamp=[20150131, 20150201]))
    with pytest.raises(UserError, match="--time_format '%Y%m%d'"):
        run(tmp_path / "log", path)
    (found,) = run(tmp_path / "log", path, time_format=("%Y%m%d",)).values()
    assert found["timestamp"] == [[seconds(2015, 1, 31)], [seconds(2015, 2, 1)]]


def test_the_order_of_lines_is_the_order(tmp_path):
    rows = events(user_id=[1, 2, 1], item_id=[7, 8, 9])
    for i in range(2):
        write_csv(tmp_path / f"{i}.csv", [{n: r[n] for n in NAMES[:2]} for r in rows])
    made = {"features": ("item_id",)}
    with pytest.raises(
        UserError, match=r"no column timestamp .* order of events: --time_column none"
    ):
        run(tmp_path / "log", tmp_path, **made)
    assert run(tmp_path / "log", tmp_path, time_column="none", **made) == {
        1: {"item_id": [[7], [9], [7], [9]], "timestamp": [[0], [2], [3], [5]]},
        2: {"item_id": [[8], [8]], "timestamp": [[1], [4]]},
    }


GROUPED = [
    {"user_id": 1, "item_id": [5, 3, 4], "timestamp": [30, 10, 20], "city": "x"},
    {"user_id": 2, "item_id": [], "timestamp": [], "city": "y"},
    {"user_id": 3, "item_id": [9], "timestamp": [1], "city": None},
]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_rows_that_are_grouped_already(tmp_path, suffix):
    path, made = tmp_path / f"a.{suffix}", {"features": ("item_id", "city")}

    def write(rows: list[dict]) -> None:
        if suffix == "json":
            path.write_text(json.dumps(rows))
        else:
            {"parquet": write_parquet, "jsonl": write_jsonl}[suffix](path, rows)

    nothing = {"user_id": 0, "item_id": None, "timestamp": None, "city": None}
    write([nothing, *GROUPED])
    expected = {
        1: {"item_id": [[3], [4], [5]], "city": [["x"]] * 3, "timestamp": [[10], [20], [30]]},
        3: {"item_id": [[9]], "city": [[]], "timestamp": [[1]]},
    }
    assert run(tmp_path / "log", path, **made) == expected
    bags = [GROUPED[0] | {"item_id": [[5, 6], [], [4]]}]
    write(bags)
    (found,) = run(tmp_path / "2", path, **made).values()
    assert found["item_id"] == [[], [4], [5, 6]]
    write([*GROUPED, GROUPED[2] | {"user_id": 4, "item_id": [1, 2]}])
    with pytest.raises(
        UserError, match="user 4 has 1 entries in timestamp but 2 in item_id; lists"
    ):
        run(tmp_path / "3", path, **made)


def test_lists_of_dates(tmp_path):
    days = [datetime.date(2020, 1, 2), datetime.date(2020, 1, 1)]
    rows = [{"user_id": 1, "item_id": ["a", "b"], "timestamp": days}]
    (found,) = run(
        tmp_path / "log", write_parquet(tmp_path / "a.parquet", rows), features=("item_id",)
    ).values()
    assert found["item_id"] == [["b"], ["a"]]
    texts = [rows[0] | {"timestamp": ["2.1.2020", "1.1.2020"]}]
    made = {"features": ("item_id",), "time_format": ("%d.%m.%Y",)}
    path = write_parquet(tmp_path / "b.parquet", texts)
    assert list(run(tmp_path / "2", path, **made).values()) == [found]


def test_one_event_of_each_user_with_a_list_is_reported(tmp_path):
    rows = events(user_id=[1, 2], item_id=[[1, 2], [3]])
    path = write_parquet(
        tmp_path / "a.parquet", rows, dict.fromkeys(NAMES, pa.int64()) | {"item_id": None}
    )
    done = convert(Settings(paths=(str(path),), output=tmp_path / "log"))
    (note,) = done.notes
    assert note.startswith("warning: every user has one event")
