"""Events that are grouped into rows, and logs that are written again."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.orc
import pytest
from hypothesis import given
from logs import write_log

from s2s_jax.data.conversion.convert import convert
from s2s_jax.data.conversion.grouping import Grouping
from s2s_jax.data.conversion.settings import Settings
from s2s_jax.data.logs import orc
from s2s_jax.errors import UserError


@given(
    users=st.lists(st.integers(0, 4), max_size=40).map(sorted),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=9),
)
def test_users_may_cross_batches(users, sizes):
    table = pa.table({"user_id": pa.array(users, pa.int64()), "item": np.arange(len(users))})
    batches, start = [], 0
    while start < len(users):
        size = sizes[len(batches) % len(sizes)] or 1
        batches += table.slice(start, size).to_batches()
        start += size
    rows = [row for t in Grouping(1).rows(batches) for row in t.to_pylist()]
    assert [row["user_id"] for row in rows] == sorted(set(users))
    assert [i for row in rows for (i,) in row["item"]] == list(range(len(users)))
    assert [len(row["item"]) for row in rows] == [users.count(u) for u in sorted(set(users))]


TYPES = {
    "user": pa.int32(),
    "item": pa.list_(pa.list_(pa.int64())),
    "flat": pa.list_(pa.string()),
    "when": pa.list_(pa.timestamp("ns")),
    "share": pa.float64(),
    "row": pa.struct([("x", pa.int8())]),
}


def orc_rows(count: int, start: int = 0) -> list[dict]:
    return [
        {
            "user": None if i % 7 == 0 else i,
            "item": None if i % 5 == 0 else [[2**60 + i], [], None, [i, i]][: i % 4 + 1],
            "flat": [f"ä{i}"] * (i % 13) + [None],
            "when": [i * 10**9 + 1],
            "share": i / 3,
            "row": {"x": i % 100} if i % 2 else None,
        }
        for i in range(start, start + count)
    ]


def test_orc_logs_are_written_anew(tmp_path):
    write_log(tmp_path / "a" / "x.orc", orc_rows(300), TYPES, stripe_rows=7)
    write_log(tmp_path / "a" / "y.orc", orc_rows(200, 300), TYPES, stripe_rows=50)
    before = [orc_rows(300), orc_rows(200, 300)]
    made = Settings(paths=(str(tmp_path / "a"),), output=tmp_path / "log")
    done = convert(made)
    assert (len(done.paths), done.rows) == (1, 500)
    table = pyarrow.orc.read_table(str(done.paths[0]))
    first = pyarrow.orc.read_table(str(tmp_path / "a" / "x.orc"))
    assert table.schema == first.schema
    expected = pa.concat_tables([first, pyarrow.orc.read_table(str(tmp_path / "a" / "y.orc"))])
    assert table.equals(expected)
    assert table.num_rows == sum(map(len, before))
    # In place, and into several files.
    again = Settings(
        paths=(str(made.output),), output=made.output, overwrite=True, events_per_file=1000
    )
    done = convert(again)
    assert len(done.paths) == 4
    tables = [pyarrow.orc.read_table(str(path)) for path in done.paths]
    assert pa.concat_tables(tables).equals(expected)
    assert sorted(made.output.iterdir()) == done.paths


def test_other_columns_begin_another_file(tmp_path):
    write_log(tmp_path / "a" / "0.orc", [{"id": [[1]]}])
    write_log(tmp_path / "a" / "1.orc", [{"id": [["x"]]}])
    done = convert(Settings(paths=(str(tmp_path / "a"),), output=tmp_path / "log"))
    tables = [pyarrow.orc.read_table(str(path)).to_pylist() for path in done.paths]
    assert tables == [[{"id": [[1]]}], [{"id": [["x"]]}]]


def test_stripes_of_rewritten_logs(tmp_path):
    rng = np.random.default_rng(0)
    lengths = np.append(np.full(9000, 100), [300_000])
    ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    bags = 1 + np.arange(lengths.sum()) % 3
    values = pa.array(rng.integers(0, 2**40, bags.sum()))
    bag_ends = pa.array(np.concatenate([[0], np.cumsum(bags)]), pa.int32())
    item = pa.ListArray.from_arrays(ends, pa.ListArray.from_arrays(bag_ends, values))
    flat = pa.ListArray.from_arrays(ends, pa.array(rng.integers(0, 9, lengths.sum())))
    table = pa.table({"item": item, "flat": flat})
    with pyarrow.orc.ORCWriter(str(tmp_path / "a.orc"), batch_size=2**22) as writer:
        writer.write(table)
    assert len(orc.read_footer(tmp_path / "a.orc").stripe_rows) == 1
    done = convert(Settings(paths=(str(tmp_path / "a.orc"),), output=tmp_path / "log"))
    assert done.events == 1_200_000
    # A row with more entries than any earlier row begins a new file.
    assert len(done.paths) == 2
    stripes = orc.read_footer(done.paths[0]).stripe_rows
    assert len(stripes) > 40
    assert max(stripes) <= 165
    found = pa.concat_tables([pyarrow.orc.read_table(str(path)) for path in done.paths])
    assert found.equals(table)


def test_stripes_that_cannot_be_read(tmp_path):
    rows = [{"item_id": [[(i * 7919 + p) ** 2 % 99_991] for p in range(20)]} for i in range(400)]
    path = write_log(tmp_path / "a" / "0.orc", rows, compression="zstd")
    write_log(tmp_path / "a" / "1.orc", rows, compression="zstd")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = b"\xa5" * 200
    path.write_bytes(content)
    made = Settings(paths=(str(tmp_path / "a"),), output=tmp_path / "log")
    with pytest.raises(UserError, match=r"0\.orc: stripe 0 cannot be read .*--on_error skip$"):
        convert(made)
    assert not made.output.exists()
    done = convert(dataclasses.replace(made, on_error="skip"))
    assert (done.rows, done.skipped) == (400, (f"400 rows of stripe 0 of {path}",))
    assert pyarrow.orc.read_table(str(done.paths[0])).to_pylist() == rows
    with pytest.raises(UserError, match=r"0\.orc: no stripe of the files can be read"):
        convert(Settings(paths=(str(path),), output=tmp_path / "2", on_error="skip"))
    empty = write_log(tmp_path / "empty.orc", [], TYPES)
    with pytest.raises(UserError, match=r"empty\.orc: expected rows, found none"):
        convert(Settings(paths=(str(empty),), output=tmp_path / "2"))
