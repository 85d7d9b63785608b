"""Spark and DuckDB write the same log, to the byte, from files and from tables."""

import filecmp
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet
import pytest
import stores
from conversions import events, run, write_csv, write_jsonl, write_parquet
from places import REPO

from s2s_jax.cli.commands.convert import main
from s2s_jax.data.conversion.convert import convert
from s2s_jax.data.conversion.settings import Settings
from s2s_jax.errors import UserError
from s2s_serve.storage.address import place_of

# PySpark starts Java by a fork, after which the child does nothing but begin another program.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")

WINDOW = "s2s_jax.data.conversion.spark.engine._WINDOW"


def random_events(count: int, seed: int) -> list[dict]:
    """Events with many equal times, missing ids, and ids that one file has as 1 and another as 1.0."""
    rng = random.Random(seed)
    return events(
        user_id=[rng.randrange(40) for _ in range(count)],
        item_id=[rng.choice([1, 1.0, 2, None]) for _ in range(count)],
        cate_id=[f"c{rng.randrange(9)}" for _ in range(count)],
        behavior_id=list(range(count)),
        timestamp=[rng.randrange(20) for _ in range(count)],
    )


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def both(tmp_path: Path, *paths: str | Path, **changes) -> dict:
    """Converts with both engines, expects the same files and outcomes, and returns the log."""
    done = {}
    for engine in ("duckdb", "spark"):
        made = Settings(
            paths=tuple(map(str, paths)), output=tmp_path / engine, engine=engine, **changes
        )
        outcome = convert(made)
        done[engine] = [outcome.rows, outcome.events, outcome.skipped, outcome.bags, outcome.notes]
    assert done["duckdb"] == done["spark"]
    assert same_files(tmp_path / "duckdb", tmp_path / "spark")
    return rows_of(tmp_path / "spark")


@pytest.mark.slow
def test_both_engines_write_the_same_files_to_a_store(tmp_path, monkeypatch, spark):
    (tmp_path / "hdfs").mkdir()
    stores.use_double_of_hdfs(tmp_path / "hdfs", monkeypatch)
    source = write_csv(tmp_path / "a.csv", random_events(300, seed=5))
    for engine in ("duckdb", "spark"):
        out = place_of(f"hdfs://node/{engine}")
        done = convert(
            Settings(paths=(str(source),), output=out, engine=engine, events_per_file=99)
        )
        assert [str(path) for path in done.paths] == [f"{out}/part-{n}.orc" for n in range(3)]
    assert same_files(tmp_path / "hdfs/duckdb", tmp_path / "hdfs/spark")


def rows_of(log: Path) -> dict:
    files = sorted(log.iterdir(), key=lambda path: int(path.stem.removeprefix("part-")))
    rows = [row for path in files for row in pyarrow.orc.read_table(str(path)).to_pylist()]
    return {row.pop("user_id"): row for row in rows}


def of_tables(out: Path, *names: str, **changes) -> dict:
    return run(out, *map(Path, names), engine="spark", format="table", **changes)


def test_both_engines_write_the_same_files(tmp_path, spark, monkeypatch):
    """Several windows of users, several files, bad lines, and users with few events."""
    monkeypatch.setattr(WINDOW, 300)
    for i in range(3):
        path = write_csv(tmp_path / "in" / f"{i}.csv", random_events(500, i))
        path.write_text(path.read_text() + "1,2\n,1,1,1,1\n1,1,1,1,\n")
    log = both(tmp_path, tmp_path / "in", on_error="skip", min_events=30, events_per_file=400)
    assert len(list((tmp_path / "spark").iterdir())) > 2
    assert 0 < len(log) < 40
    by_file = [event for i in range(3) for event in random_events(500, i)]
    for user, row in log.items():
        mine = sorted((e for e in by_file if e["user_id"] == user), key=lambda e: e["timestamp"])
        assert row["behavior_id"] == [[e["behavior_id"]] for e in mine]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_rows_that_hold_a_part_of_a_user(tmp_path, spark, suffix):
    """Lists of events, of one user in several rows and files; also without times."""
    rng = random.Random(0)
    expected = {}
    for file in range(3):
        rows = []
        for user in range(20):
            items = [rng.choice([3, 4, 5]) for _ in range(rng.randrange(4))]
            times = [rng.randrange(6) for _ in items]
            rows.append({"user_id": user, "item_id": items, "timestamp": times, "file": file})
            expected.setdefault(user, []).extend(zip(times, items, strict=True))
        path = tmp_path / "in" / f"{file}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        types = {
            "user_id": None,
            "item_id": pa.list_(pa.int64()),
            "timestamp": pa.list_(pa.int64()),
            "file": None,
        }
        write_jsonl(path, rows) if suffix == "jsonl" else write_parquet(path, rows, types)
    expected = {user: found for user, found in expected.items() if found}
    log = both(tmp_path / "1", tmp_path / "in", features=("item_id", "file"))
    for user, found in expected.items():
        assert log[user]["item_id"] == [[i] for _, i in sorted(found, key=lambda pair: pair[0])]
    made = {"features": ("item_id",), "time_column": "none", "grouped": True}
    log = both(tmp_path / "2", tmp_path / "in", **made)
    assert {u: row["item_id"] for u, row in log.items()} == {
        user: [[i] for _, i in found] for user, found in expected.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "orc"])
def test_tables_of_files(tmp_path, spark, form):
    """Spark's reader gives the log that the same files give, in the order of files and rows."""
    for i in range(3):
        rows = [event | {"item_id": int(event["item_id"] or 7)} for event in random_events(300, i)]
        table = pa.Table.from_pylist(rows)
        (tmp_path / "in").mkdir(exist_ok=True)
        path = tmp_path / "in" / f"{i}.{form}"
        if form == "orc":
            pyarrow.orc.write_table(table, path)
        else:
            pyarrow.parquet.write_table(table, path, row_group_size=100)
    changes = {"format": "orc", "merge": True} if form == "orc" else {}
    expected = run(tmp_path / "duckdb", tmp_path / "in", **changes)
    expected = {u: {n: r[n] for n in sorted(r)} for u, r in expected.items()}

    def sorted_columns(log: dict) -> dict:
        return {u: {n: r[n] for n in sorted(r)} for u, r in log.items()}

    # Small splits, so that a file is read by several tasks.
    spark.conf.set("spark.sql.files.maxPartitionBytes", "2000")
    try:
        found = of_tables(tmp_path / "1", f"{form}.`{tmp_path}/in`")
        assert sorted_columns(found) == expected
    finally:
        spark.conf.unset("spark.sql.files.maxPartitionBytes")
    spark.sql(f"CREATE TABLE t_{form} USING {form} LOCATION '{tmp_path}/in'")
    try:
        assert sorted_columns(of_tables(tmp_path / "2", f"default.t_{form}")) == expected
    finally:
        spark.sql(f"DROP TABLE t_{form}")


@pytest.fixture
def table(spark):
    """Makes a table of rows in Spark's SQL, and drops it at the end."""
    made = []

    def make(select: str) -> str:
        name = f"made_{len(made)}"
        made.append(name)
        spark.sql(f"CREATE TABLE {name} USING parquet AS {select}")
        return name

    yield make
    for name in made:
        spark.sql(f"DROP TABLE {name}")


@pytest.mark.slow
def test_types_of_tables(tmp_path, table):
    name = table(
        "SELECT 1 AS user_id, timestamp'1970-01-01 00:00:07' AS timestamp, "
        "cast('ä' AS binary) AS b, array(date'1970-01-02') AS d, cast(1.50 AS decimal(9,2)) AS n, "
        "true AS t, cast('NaN' AS float) AS f"
    )
    assert of_tables(tmp_path / "1", name, features=("b", "d", "n", "t", "f")) == {
        1: {
            "b": [["ä"]],
            "d": [[86_400]],
            "n": [["1.5"]],
            "t": [["true"]],
            "f": [[]],
            "timestamp": [[7]],
        }
    }
    more = table("SELECT 'x' AS user_id, 5 AS timestamp, '3' AS item_id")
    other = table("SELECT 2 AS user_id, 6 AS timestamp, 3L AS item_id")
    found = of_tables(tmp_path / "2", more, other, features=("item_id",))
    assert {user: row["item_id"] for user, row in found.items()} == {"2": [[3]], "x": [[3]]}


@pytest.mark.slow
def test_rows_without_files_are_sorted_by_their_values(tmp_path, spark):
    """The outcome may not depend on how Spark happens to deliver the rows of a view."""
    select = "id % 3 AS user_id, 5 AS timestamp, (id * 7919) % 101 AS item_id FROM range(90)"
    rows = [((i * 7919) % 101, i % 3) for i in range(90)]
    expected = {u: sorted(item for item, user in rows if user == u) for u in range(3)}
    made = {"features": ("item_id",)}
    for number, parts in enumerate((1, 4)):
        view = f"SELECT /*+ REPARTITION({parts}) */ * FROM (SELECT {select})"
        spark.sql(f"CREATE OR REPLACE GLOBAL TEMP VIEW v AS {view}")
        found = of_tables(tmp_path / str(number), "global_temp.v", **made)
        assert {u: [i for (i,) in row["item_id"]] for u, row in found.items()} == expected
    with pytest.raises(UserError, match=r"global_temp\.v: expected files, whose rows have an ord"):
        of_tables(tmp_path / "x", "global_temp.v", time_column="none", **made)


ONE = "1 AS user_id, 2 AS timestamp"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("select", "changes", "words"),
    [
        (ONE, {}, r"made_0: no column x \(--features\); it has user_id, timestamp$"),
        (f"{ONE}, named_struct('a', 1) AS x", {}, "expected integers, .* found STRUCT"),
        (
            "1 AS user_id, array(1, 2) AS timestamp, array(3) AS x",
            {},
            r"made_0 \(file:.*user 1 has 2 entries in timestamp but 1 in x; lists",
        ),
        (
            "1 AS user_id, 'y' AS timestamp, 3 AS x",
            {},
            r"made_0 \(file:.*\): row 1, column timestamp: expected .*found y",
        ),
        (f"{ONE}, 3 AS x", {"grouped": True}, "expected lists in columns of --features"),
        (f"{ONE}, 3 AS x WHERE false", {}, "made_0: expected events, found none"),
        (f"{ONE}, 1e20D AS x", {}, r"column x \(--features\) has 1e\+20 as float64"),
    ],
)
def test_tables_that_are_refused(tmp_path, table, select, changes, words):
    name = table(f"SELECT {select}")
    with pytest.raises(UserError, match=words) as caught:
        of_tables(tmp_path / "log", name, features=("x",), **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "log").exists()


@pytest.mark.slow
def test_names_that_are_refused(tmp_path, spark):
    def refused(words: str, *names: str, **changes) -> None:
        made = {"format": "table", "engine": "spark"} | changes
        with pytest.raises(UserError, match=words) as caught:
            convert(Settings(paths=names, output=tmp_path / "log", **made))
        assert "\n" not in str(caught.value)

    refused("^nowhere: Spark cannot read this table .*nowhere", "nowhere")
    refused("^delta.`/x`: Spark cannot read this table .*delta", "delta.`/x`")
    refused("^expected names of tables, found none")
    refused("^t is given twice", "t", "t")
    refused("^--format table: only Spark reads tables", "t", engine="duckdb")
    refused(
        "^FILE_OR_DIR …: .*--format table and 'parquet.`hdfs://n/x`'", "hdfs://n/x", format="auto"
    )
    refused("^--memory_limit: has no effect on a Spark that is running", "t", memory_limit="1GB")


@pytest.mark.slow
def test_spark_submit_of_our_file(tmp_path):
    """Without a Spark that runs already; options, summary, errors and exit codes are those of s2s."""
    source = write_csv(tmp_path / "a.csv", random_events(50, 0))
    assert main([str(source), "--output", str(tmp_path / "duckdb")]) == 0
    program = str(REPO / "s2s_jax" / "spark_submit" / "convert.py")
    command = [str(Path(sys.executable).with_name("spark-submit")), "--master", "local[1]", program]
    arguments = [str(source), "--output", str(tmp_path / "spark")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    users = len({event["user_id"] for event in random_events(50, 0)})
    assert done.stdout.splitlines() == [
        f"wrote 1 file with {users} users and 50 events to {tmp_path}/spark; left out: nothing",
        f"to look at the log: s2s inspect {tmp_path}/spark",
    ]
    assert same_files(tmp_path / "duckdb", tmp_path / "spark")
    done = subprocess.run(
        [*command, *arguments[:2], str(tmp_path / "2"), "--user_column", "x"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    # spark-submit joins both streams of the program.
    assert f"error: {source}: no column x (--user_column); it has user_id" in done.stdout


@pytest.mark.slow
def test_without_java_and_without_pyspark(tmp_path):
    source = write_csv(tmp_path / "a.csv", events(item_id=[1]))
    command = [str(source), "--output", str(tmp_path / "log"), "--engine", "spark"]
    code = (
        "import sys; {}; from s2s_jax.cli.commands.convert import main\n"
        "from s2s_jax.cli.exit import run_command; run_command(main)"
    )

    def error(setup: str, **changes) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code.format(setup), *command],
            capture_output=True, text=True, check=False, **changes,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert not (tmp_path / "log").exists()
        return done.stderr

    assert error("sys.modules['pyspark'] = None") == (
        "error: PySpark, which --engine spark needs, is not installed; pip install 's2s-jax[spark]'\n"
    )
    no_java = "import os; os.environ.update(JAVA_HOME='/nowhere')"
    assert "error: --engine spark: Spark cannot be started" in error(no_java)
    assert "name its directory with JAVA_HOME\n" in error(no_java)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 12])
def test_a_signal_leaves_nothing_behind(tmp_path, after):
    """While Spark starts, and while its tasks run; Java ends with the program."""
    rng = random.Random(0)
    users = [rng.randrange(10**6) for _ in range(10**6)]
    made = pa.table({"user_id": users, "timestamp": range(10**6), "item_id": users})
    pyarrow.parquet.write_table(made, tmp_path / "a.parquet")
    command = [sys.executable, "-m", "s2s_jax", "convert", str(tmp_path / "a.parquet")]
    command += ["--output", str(tmp_path / "log"), "--engine", "spark", "--features", "item_id"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob("log/.sorting_*/*")):
            time.sleep(0.05)
        time.sleep(after)
        process.terminate()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == "stopped by SIGTERM; start again"
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
