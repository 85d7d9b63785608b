import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.orc
import pytest
from logs import write_log
from places import DATA

from s2s_jax.cli.commands.inspect import main
from s2s_jax.data.batching.order import Order
from s2s_jax.data.inspection.distinct import DistinctCounter, countable
from s2s_jax.data.inspection.log_shape import LogShape
from s2s_jax.errors import UserError

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
    assert cells(output, str(tmp_path / "a.orc"))[1:] == [
        *("3", "2", "0", f"{size:,}", "uncompressed")
    ]
    assert cells(output, str(tmp_path / "b.orc"))[1:3] == ["2", "1"]
    assert cells(output, str(tmp_path / "b.orc"))[5] == "zstd"
    # type, rows, missing rows, lengths of the other rows, missing positions, largest bag, distinct,
    # smallest, largest.
    assert cells(output, "user") == [
        *("user", "int32", "5", "1 (20.0%)", "-", "-", "-", "3", "-9", "8")
    ]
    assert cells(output, "item") == [
        *("item", "list<list<int64>>", "5", "1 (20.0%)", "1 / 2 / 2.2 / 4"),
        *("3 (33.3%)", "3", "5", "1", str(2**60)),
    ]
    assert cells(output, "flat") == [
        *("flat", "list<string>", "5", "1 (20.0%)", "1 / 3 / 4.0 / 9"),
        *("1 (6.2%)", "1", "5", "-", "-"),
    ]
    assert cells(output, "row") == ["row", "struct<x: int8>", "5", "1 (20.0%)", *"------"]
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


def test_unreadable_files_are_reported_and_the_rest_is_shown(tmp_path, capsys):
    rows = [{"good": i, "bad": f"{i * 7919 % 10007}"} for i in range(2000)]
    damaged = write_log(tmp_path / "b.orc", rows, compression="zstd")
    content = bytearray(damaged.read_bytes())
    content[3 : len(content) // 2] = b"\xff" * (len(content) // 2 - 3)
    damaged.write_bytes(content)
    write_log(tmp_path / "a.orc", [{"good": -5, "bad": "x"}])
    (tmp_path / "c.orc").write_bytes(b"no ORC file")
    assert main([str(tmp_path)]) == 2
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert all(line.startswith("error: ") for line in errors)
    assert any(f"{damaged}: stripe 0 cannot be read" in line for line in errors)
    assert errors[-1].startswith(f"error: {tmp_path / 'c.orc'}: expected an ORC file")
    assert cells(printed.out, str(tmp_path / "c.orc"))[1:] == [*"----", "unreadable"]
    assert cells(printed.out, str(damaged))[1:4] == ["2,000", "1", "1 (100.0%)"]
    assert "Unreadable: 1 of 3 files, and 1 stripes of the others" in printed.out
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
        ([], "FILE_OR_DIR …: .*found nothing"),
        (["nowhere.orc"], "nowhere.orc does not exist"),
        (["x.orc", "--rows", "-1"], "--rows: expected at least 0"),
        (["x.orc", "--seq_len", "0"], "--seq_len: expected at least 1"),
    ],
)
def test_commands_that_make_no_sense(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        main(arguments)
    assert "io.data_paths" not in str(caught.value)


def test_the_command_in_a_pipe(tmp_path):
    path = write_log(tmp_path / "a.orc", ROWS, TYPES)
    command = [sys.executable, "-m", "s2s_jax", "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "['[bold]']" in done.stdout


# ---------------------------------------------------------------------------- distinct values


def test_distinct_values_are_estimated_beyond_those_kept():
    rng = np.random.default_rng(0)
    for distinct in (10, 4095, 4096, 30_000, 500_000):
        counter = DistinctCounter(kept=4096)
        values = rng.choice(2**40, size=distinct, replace=False)
        for part in np.array_split(np.concatenate([values, values[::-1]]), 7):
            counter.add(pa.array(part))
        assert counter.exact == (distinct < 4096)
        if counter.exact:
            assert str(counter) == f"{distinct:,}"
        else:
            # Four standard errors of 1 / sqrt(4096).
            assert counter.count() == pytest.approx(distinct, rel=4 / 64)
            assert str(counter) == f"about {float(f'{counter.count():.2e}'):,.0f}"


@pytest.mark.parametrize(
    "values",
    [
        [-(2**63), 2**63 - 1, 0, -1, 0],
        ["", "a", "a\0", "á", "a", ""],
        [b"\xff", b"", b"\xff\xff"],
        [True, False, True],
        [0.0, -0.0, 1.5, float("nan"), -float("nan"), float("inf")],
        pa.array([1.5, 2.5, 1.5], pa.float32()),
        pa.array([2**31 - 1, -(2**31), 5], pa.date32()),
        pa.array([2**62, -(2**62), 2**62], pa.timestamp("ns")),
        pa.array([1, 2, 1], pa.int32()).cast(pa.decimal128(38, 6)),
        pa.array([2**64 - 1, 0, 2**63], pa.uint64()),
    ],
)
def test_values_of_every_type_are_distinguished(values):
    values = pa.array(values)
    counter = DistinctCounter()
    counter.add(values)
    counter.add(values[1:])
    numbers = {pa.date32(): pa.int32(), pa.timestamp("ns"): pa.int64()}
    plain = values.view(numbers[values.type]) if values.type in numbers else values
    # All zeros are one value, and so are all NaNs.
    known = {"nan" if value != value else value for value in plain.to_pylist()}
    assert countable(values.type)
    assert counter.count() == len(known)


# ------------------------------------------------------------------------------ rows and stripes


def bars(output: str) -> dict[str, tuple[str, int]]:
    """The histogram: the text of each bin, and the length of its bar."""
    lines = output.split("Rows by their number of positions\n")[1].split("\nRows: ")[0].splitlines()
    found = {}
    for line in lines:
        parts = [part.strip() for part in line.split("  ") if part.strip()]
        if len(parts) > 1 and parts[0] != "positions":
            found[parts[0]] = (parts[1], line.count("▇"))
    return found


def sentence(output: str, beginning: str) -> str:
    (line,) = (x for x in output.splitlines() if x.startswith(beginning))
    return line


def test_row_lengths(tmp_path, capsys):
    lengths = [0, 0, 1, 2, 3, 3, 3, 4, 5, 7, *[9] * 78, 15, 40]
    rows = [{"user": i, "a": [[i]] * n, "b": [f"{i}"] * n} for i, n in enumerate(lengths)]
    rows[4] |= {"b": []}
    write_log(tmp_path / "a.orc", rows, stripe_rows=30)
    assert main([str(tmp_path), "--rows", "0", "--seq_len", "4"]) == 0
    output = capsys.readouterr().out
    assert bars(output) == {
        "0": ("2 (2.2%)", 2),
        "1": ("1 (1.1%)", 1),
        "2 to 3": ("4 (4.4%)", 3),
        "4 to 7": ("3 (3.3%)", 2),
        "8 to 15": ("79 (87.8%)", 40),
        "16 to 31": ("0", 0),
        "32 to 63": ("1 (1.1%)", 1),
    }
    total = sum(lengths)
    assert sentence(output, "Rows: ") == (
        f"Rows: 90, with {total} positions; 10% up to 5, 50% up to 9, 90% up to 9, 99% up to 40, "
        f"the longest 40"
    )
    longer = [n - 4 for n in lengths if n > 4]
    assert sentence(output, "At a seq_len of 4, ") == (
        f"At a seq_len of 4, {len(longer)} ({len(longer) / 90:.1%}) of the rows are truncated and "
        f"{sum(longer)} ({sum(longer) / total:.1%}) of the positions dropped"
    )
    stripes = [sum(lengths[start : start + 30]) for start in (0, 30, 60)]
    assert sentence(output, "Stripes: ") == (
        f"Stripes: 3, of 30 / 30 / 30 rows and {min(stripes)} / {statistics.median(stripes)} / "
        f"{max(stripes)} positions (min/median/max)"
    )
    assert "disagree" not in output
    assert "warning" not in output
    assert main([str(tmp_path)]) == 0
    assert "At a seq_len of 1,024, 0 of the rows" in capsys.readouterr().out


def test_rows_whose_columns_disagree(tmp_path, capsys):
    rows = [{"a": [[1]] * n, "b": [2] * n, "c": [1] * n} for n in range(10)]
    write_log(tmp_path / "a.orc", rows)
    rows[3] |= {"b": [2, 2]}
    rows[7] |= {"c": [1, 1]}
    # Missing columns, and columns that cannot be features, do not count.
    rows[5] |= {"c": []}
    rows = [row | {"struct": [{"x": 1}] * 99} for row in rows]
    path = write_log(tmp_path / "b.orc", rows, stripe_rows=2)
    assert main([str(tmp_path), "--rows", "0"]) == 0
    output = capsys.readouterr().out
    assert sentence(output, "In ") == (
        f"In 2 (10.0%) of the rows, columns disagree in length, so not all of them can be features "
        f"together; the first is {path}, row 3: a has 3, b has 2, c has 3"
    )
    assert sentence(output, "Rows: ").endswith("the longest 9")


def test_nothing_that_can_be_a_feature(tmp_path, capsys):
    write_log(tmp_path / "a.orc", [{"x": 1, "y": [{"z": 1}]}])
    assert main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "No column that was read is a list<T> or list<list<T>>" in output
    assert "▇" not in output


def shards(stripes: int) -> int:
    return Order([110] * stripes, 16, 4096, shuffle=True, seed=0).shards


SMALL = "small stripes: half of them hold 100,000 positions or fewer, and 0.2 to 0.8 million"
LARGE = "large stripes: half of them hold 900,000 positions or more, and 0.2 to 0.8 million"
HUGE = "huge stripes: 1 of 601 hold more than 1.6 million positions, up to 1,700,000"
FEW = (
    "few stripes (300): a shuffle never uses more than one shard for 32 stripes, so it draws from 9 "
    "instead of 16 (io.shards), for which there should be 512"
)


@pytest.mark.parametrize(
    ("sizes", "rows", "words"),
    [
        ({500_000: 600}, 110, []),
        # The sizes that the writer makes for a log of a million positions.
        ({16_100: 61}, 110, []),
        ({100_000: 1600}, 110, [SMALL]),
        ({900_000: 600}, 110, [LARGE]),
        ({500_000: 600, 1_700_000: 1}, 110, [HUGE]),
        ({500_000: 300}, 110, [FEW]),
        # So small that even smaller stripes would cost more than they gain.
        ({100_000: 40}, 110, []),
        ({900_000: 300}, 110, ["few stripes (300): ", LARGE]),
    ],
)
def test_stripes_are_warned_about(sizes, rows, words):
    """`sizes` maps positions of a stripe to the number of such stripes; each has `rows` rows."""
    shape = LogShape()
    for size, count in sizes.items():
        offsets = pa.array(np.linspace(0, size, rows + 1).astype(np.int32))
        lists = pa.ListArray.from_arrays(offsets, pa.nulls(size, pa.int8()))
        for _ in range(count):
            shape.add_stripe_rows(rows)
            shape.add(Path("x"), 0, {"a": lists})
    warnings = shape.warnings(["the log", "b"])
    for warning, beginning in zip(warnings, words, strict=True):
        assert warning.startswith(f"warning: {beginning}")
        command = "s2s convert 'the log' b --format orc --output DIR"
        assert warning.endswith(f"; rewrite the log: {command}")


# --------------------------------------------------------------------------------- files of others


@pytest.mark.skipif(not (DATA / "ml-1m").is_dir(), reason=f"no MovieLens-1M in {DATA}")
def test_movielens_has_the_numbers_that_are_known_of_it(capsys):
    assert main([str(DATA / "ml-1m"), "--rows", "0", "--seq_len", "200"]) == 0
    output = capsys.readouterr().out
    items = [
        row
        for path in sorted((DATA / "ml-1m").glob("*.orc"))
        for row in pyarrow.orc.ORCFile(path).read(columns=["item_id"])["item_id"].to_pylist()
    ]
    lengths = [len(row) for row in items]
    assert cells(output, "user_id")[2:] == ["6,040", "0", "-", "-", "-", "6,040", "1", "6040"]
    assert cells(output, "item_id")[2:8] == [
        *("6,040", "0", "18 / 96 / 165.5 / 2,277", "0", "1", "3,416")
    ]
    assert cells(output, "cate_id")[7] == "18"
    assert cells(output, "behavior_id")[7] == "5"
    expected = Counter((n.bit_length() - 1) for n in lengths)
    assert [text for text, _ in bars(output).values()] == [
        f"{expected[b]:,} ({expected[b] / 6040:.1%})".replace("(0.0%)", "(<0.1%)")
        for b in range(4, 12)
    ]
    ranked = sorted(lengths)
    upto = ", ".join(f"{p}% up to {ranked[-(-p * 6040 // 100) - 1]}" for p in (10, 50, 90, 99))
    assert sentence(output, "Rows: ") == (
        f"Rows: 6,040, with 999,611 positions; {upto}, the longest 2,277"
    )
    longer = [n - 200 for n in lengths if n > 200]
    assert sentence(output, "At a seq_len of 200, ") == (
        f"At a seq_len of 200, {len(longer):,} ({len(longer) / 6040:.1%}) of the rows are truncated "
        f"and {sum(longer):,} ({sum(longer) / 999_611:.1%}) of the positions dropped"
    )
    assert sentence(output, "Stripes: 8, of 755 / 755 / 755 rows")


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


@pytest.mark.skipif(
    not (DATA / "orc_foreign").is_dir(), reason=f"no ORC files of other writers in {DATA}"
)
def test_encrypted_columns_are_marked(capsys):
    assert main([str(DATA / "orc_foreign" / "encrypted_sample1.orc")]) == 0
    output = capsys.readouterr().out
    types = [cells(output.split("First rows")[0], name)[1] for name in ("ssn", "email", "name")]
    assert types == ["string (encrypted)", "string (encrypted)", "string"]
