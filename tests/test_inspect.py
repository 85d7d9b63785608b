import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from logs import write_log

from s2s_jax.data.inspect import main
from s2s_jax.errors import UserError

DATA = Path(os.environ.get("S2S_JAX_DATA", str(Path(__file__).parents[2] / "shared" / "data")))

TYPES = {
    "user": pa.int32(),
    "item": pa.list_(pa.list_(pa.int64())),
    "flat": pa.list_(pa.string()),
    "row": pa.struct([("x", pa.int8())]),
}
ROWS = [
    {"user": 7, "item": [[1], [2, 3], [], None], "flat": ["a", None, "b", "b"], "row": {"x": 1}},
    {"user": None, "item": None, "flat": ["[bold]"], "row": None},
    {"user": -9, "item": [[None, None]], "flat": [], "row": {"x": 2}},
    {"user": 7, "item": [[2**60], [1, 1, 1, None]], "flat": ["a", "c"], "row": {"x": 3}},
    {"user": 8, "item": [[5], [1]], "flat": ["d"] * 9, "row": {"x": 3}},
]


def cells(output: str, first: str) -> list[str]:
    """The cells of the table line that begins with `first`."""
    (line,) = (x for x in output.splitlines() if x.split()[:1] == [first])
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_counts(tmp_path, capsys):
    write_log(tmp_path / "a.orc", ROWS[:3], TYPES, stripe_rows=2)
    write_log(tmp_path / "b.orc", ROWS[3:], TYPES, compression="zstd")
    assert main([str(tmp_path / "a.orc"), str(tmp_path / "b.orc"), "--rows", "0"]) == 0
    output = capsys.readouterr().out
    size = (tmp_path / "a.orc").stat().st_size
    assert cells(output, str(tmp_path / "a.orc"))[1:] == ["3", "2", f"{size:,}", "uncompressed"]
    assert cells(output, str(tmp_path / "b.orc"))[1:3] == ["2", "1"]
    assert cells(output, str(tmp_path / "b.orc"))[4] == "zstd"
    # type, rows, missing rows, lengths of the others, missing positions, largest bag, distinct,
    # smallest, largest.
    assert cells(output, "user") == ["user", "int32", "5", "1", "-", "-", "-", "3", "-9", "8"]
    assert cells(output, "item") == [
        *("item", "list<list<int64>>", "5", "1", "1 / 2 / 2.2 / 4", "3", "3", "5", "1", str(2**60))
    ]
    assert cells(output, "flat") == [
        *("flat", "list<string>", "5", "1", "1 / 3 / 4.0 / 9", "1", "1", "5", "-", "-")
    ]
    assert cells(output, "row") == ["row", "struct<x: int8>", "5", "1", *"------"]
    assert "First rows" not in output


def test_first_rows_cross_stripes_and_are_shortened(tmp_path, capsys):
    rows = [{"id": i, "text": ["x" * 500], "row": "[red]\n"} for i in range(30)]
    rows[2] |= {"text": [str(n) for n in range(1000)]}
    write_log(tmp_path / "a.orc", rows, stripe_rows=2)
    write_log(tmp_path / "b.orc", rows)
    assert main([str(tmp_path), "--rows", "5"]) == 0
    output = capsys.readouterr().out.split("First rows of ")[1]
    assert output.startswith(str(tmp_path / "a.orc"))
    shown = [line.split() for line in output.splitlines()[1:] if line.strip()]
    assert [line[2] for line in shown if "id" in line] == ["0", "1", "2", "3", "4"]
    assert "['0', '1', '2', '3', … 996 more]" in output
    assert output.count("'[red]\\n'") == 5
    assert max(map(len, output.splitlines())) < 160


def test_distinct_values_are_exact_over_many_stripes(tmp_path, capsys):
    rows = [{"id": [[i * i % 1009, i % 7]], "name": [f"n{i % 333}"]} for i in range(1000)]
    for part in range(4):
        write_log(tmp_path / f"{part}.orc", rows[part * 250 : part * 250 + 250], stripe_rows=9)
    assert main([str(tmp_path), "--rows", "0"]) == 0
    output = capsys.readouterr().out
    ids = {value for row in rows for value in row["id"][0]}
    assert cells(output, "id")[2:] == [
        *("1,000", "0", "1 / 1 / 1.0 / 1", "0", "2", f"{len(ids):,}", "0", str(max(ids)))
    ]
    assert cells(output, "name")[7] == "333"


def test_files_without_rows_and_with_other_columns(tmp_path, capsys):
    write_log(tmp_path / "a.orc", [], {"a": pa.list_(pa.int64())})
    write_log(tmp_path / "b.orc", [{"a": 1.5}, {"a": 1.5}])
    assert main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    lines = [line.split() for line in output.splitlines() if line.split()[:1] == ["a"]]
    assert lines == [
        ["a", "list<int64>", "0", "0", "-", "0", "0", "0", "-", "-"],
        ["a", "double", "2", "0", "-", "-", "-", "1", "-", "-"],
    ]


def test_what_cannot_be_read_is_told_and_the_rest_shown(tmp_path, capsys):
    rows = [{"good": i, "bad": f"{i * 7919 % 10007}"} for i in range(2000)]
    damaged = write_log(tmp_path / "b.orc", rows, compression="zstd")
    content = bytearray(damaged.read_bytes())
    content[3 : len(content) // 2] = b"\xff" * (len(content) // 2 - 3)
    damaged.write_bytes(content)
    write_log(tmp_path / "a.orc", [{"good": -5, "bad": "x"}])
    (tmp_path / "c.orc").write_bytes(b"no ORC file")
    assert main([str(tmp_path)]) == 2
    printed = capsys.readouterr()
    told = printed.err.splitlines()
    assert all(line.startswith("error: ") for line in told)
    assert any(f"{damaged}: stripe 0 cannot be read" in line for line in told)
    assert told[-1].startswith(f"error: {tmp_path / 'c.orc'}: expected an ORC file")
    assert cells(printed.out, str(tmp_path / "c.orc"))[1:] == ["-", "-", "-", "unreadable"]
    assert cells(printed.out, "good")[8] == "-5"


def test_values_that_python_cannot_hold(tmp_path, capsys):
    times = pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns"))
    rows = [{"time": time, "many": [time] * 3} for time in times]
    types = {"time": pa.timestamp("ns"), "many": pa.list_(pa.timestamp("ns"))}
    write_log(tmp_path / "a.orc", rows, types)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("22:13:20.123456789") == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "found none"),
        (["nowhere.orc"], "nowhere.orc does not exist"),
        (["x.orc", "--rows", "-1"], "--rows: expected at least 0"),
    ],
)
def test_commands_that_make_no_sense(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        main(arguments)
    assert "io.data_paths" not in str(caught.value)


def test_the_door_in_a_pipe(tmp_path):
    path = write_log(tmp_path / "a.orc", ROWS, TYPES)
    command = [sys.executable, "-m", "s2s_jax.data.inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "['[bold]']" in done.stdout


@pytest.mark.skipif(
    not (DATA / "orc_foreign").is_dir(), reason=f"no ORC files of other writers in {DATA}"
)
def test_files_of_other_writers_are_shown_or_refused(capsys):
    paths = sorted((DATA / "orc_foreign").glob("*.orc"))
    codes = [main([str(path)]) for path in paths]
    assert set(codes) == {0, 2}
    assert codes.count(0) > 0.8 * len(paths)
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) >= codes.count(2)
