"""Events in a store, as `s2s convert` reads them: the same log and the same sentences as from a disk."""

import glob
import gzip
from pathlib import Path

import hypothesis
import pytest
from conversions import events, write_csv, write_jsonl, write_parquet
from hypothesis import strategies as st

from s2s_jax.cli.main import main
from s2s_jax.data.conversion.convert import convert
from s2s_jax.data.conversion.outcome import Converted
from s2s_jax.data.conversion.reading.fetching import _matches
from s2s_jax.data.conversion.settings import Settings
from s2s_jax.errors import MachineError, UserError
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import StorePath


@pytest.fixture(autouse=True)
def gone(copies):
    """No copy is left, whatever happens."""
    yield
    assert list(copies.iterdir()) == []


def put(directory: Path, top: StorePath) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    where = [(path, top / str(path.relative_to(directory))) for path in files]
    file_systems.copy_all(where, to_store=True)


def converted(output: Path, *paths: object, **changes) -> tuple[list[bytes], Converted]:
    done = convert(Settings(paths=tuple(map(str, paths)), output=output, **changes))
    return [path.read_bytes() for path in done.paths], done


@pytest.fixture
def days(tmp_path) -> Path:
    """Files of three days, with the day in the names of directories, and files that are not read."""
    made = tmp_path / "days"
    for day in (1, 2, 3):
        (made / f"day=2026-11-0{day}").mkdir(parents=True)
        rows = events(user_id=[1, 2, day], item_id=[10 * day, 10 * day + 1, 10 * day + 2])
        write_parquet(made / f"day=2026-11-0{day}/x.parquet", rows)
    (made / "_SUCCESS").touch()
    (made / "_raw").mkdir()
    (made / "_raw/y.parquet").write_bytes(b"unfinished")
    return made


def test_a_directory_with_days(any_store, days, tmp_path):
    put(days, any_store)
    how = {"time_column": "day"}
    from_disk, known = converted(tmp_path / "a", days, **how)
    from_store, done = converted(tmp_path / "b", any_store, **how)
    assert from_store == from_disk
    assert done.events == 9
    (note,) = done.notes
    assert note == known.notes[0].replace(str(days), str(any_store))
    assert f"{any_store}/_raw/y.parquet" in note


SLOW = ("day=*-01/*.parquet", "**/x.parquet", "day=2026-11-0?/x.*", "*/x.parquet")


@pytest.mark.parametrize(
    "pattern",
    ["day=2026-11-0[12]", *(pytest.param(pattern, marks=pytest.mark.slow) for pattern in SLOW)],
)
def test_patterns(of_s3, days, tmp_path, pattern):
    put(days, of_s3)
    how = {"time_column": "day"}
    from_disk, _ = converted(tmp_path / "a", days / pattern, **how)
    from_store, _ = converted(tmp_path / "b", f"{of_s3}/{pattern}", **how)
    assert from_store == from_disk


def test_several_sources_of_both_kinds_keep_their_order(of_s3, tmp_path):
    # All times are equal, so events keep the order of the sources.
    local = write_csv(tmp_path / "local.csv", events(user_id=[1, 2], item_id=[5, 6]))
    (tmp_path / "there/_new").mkdir(parents=True)
    write_csv(tmp_path / "there/a.csv", events(user_id=[1, 2], item_id=[7, 8]))
    write_csv(tmp_path / "there/_new/b.csv", events(user_id=[2], item_id=[9]))
    put(tmp_path / "there", of_s3)
    named = ["a.csv", "_new/b.csv"]
    expected, _ = converted(tmp_path / "1", *(tmp_path / "there" / name for name in named), local)
    found, _ = converted(tmp_path / "2", *(of_s3 / name for name in named), f"file://{local}")
    assert found == expected
    # The whole directory leaves out what one of the other sources names.
    both = [of_s3, of_s3 / "_new/b.csv"]
    expected, _ = converted(tmp_path / "3", tmp_path / "there", tmp_path / "there/_new/b.csv")
    assert converted(tmp_path / "4", *both)[0] == expected
    assert converted(tmp_path / "5", *reversed(both), time_column="timestamp")[1].events == 3


def test_a_pattern_may_name_what_directories_leave_out(of_s3, tmp_path):
    rows = events(user_id=[1, 2])
    for name in ("a.csv", "_b.csv", "x/_new/c.csv"):
        write_csv(tmp_path / "there" / name, rows)
    put(tmp_path / "there", of_s3)
    for pattern in ("*.csv", "*/_new/*.csv"):
        expected, known = converted(tmp_path / "1", tmp_path / "there" / pattern, overwrite=True)
        found, done = converted(tmp_path / "2", f"{of_s3}/{pattern}", overwrite=True)
        assert found == expected
        assert (done.events, done.notes) == (known.events, known.notes) == (known.events, ())


def test_other_formats(of_s3, tmp_path):
    rows = events(user_id=["a", "b", "a"], item_id=[1, 2, 3], timestamp=[3, 2, 1])
    (tmp_path / "lines").mkdir()
    write_jsonl(tmp_path / "lines/a.jsonl", rows)
    text = write_csv(tmp_path / "x.csv", rows).read_bytes()
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip/a.csv.gz").write_bytes(gzip.compress(text))
    (tmp_path / "ml").mkdir()
    (tmp_path / "ml/ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,7,4.5,3\n1,8,3,2\n"
    )
    (tmp_path / "ml/movies.csv").write_text("movieId,title,genres\n7,A,Drama\n8,B,Comedy|Drama\n")
    for name in ("lines", "zip", "ml"):
        put(tmp_path / name, of_s3 / name)
        expected, known = converted(tmp_path / f"{name}-1", tmp_path / name)
        found, done = converted(tmp_path / f"{name}-2", of_s3 / name)
        assert (found, done.notes) == (expected, known.notes)


def test_logs_are_rewritten_and_merged(of_s3, tmp_path):
    source = write_csv(tmp_path / "a.csv", events(user_id=[2, 1, 2], timestamp=[5, 4, 3]))
    converted(tmp_path / "log", source)
    put(tmp_path / "log", of_s3)
    expected, _ = converted(tmp_path / "1", tmp_path / "log")
    assert converted(tmp_path / "2", of_s3)[0] == expected
    # From a store into itself, and into the same directory.
    data, done = converted(of_s3 / "again", of_s3, merge=True)
    assert data == converted(tmp_path / "3", tmp_path / "log", merge=True)[0]
    assert done.notes == ()
    _, done = converted(of_s3 / "again", of_s3, overwrite=True)
    assert done.notes == (f"1 file ({of_s3}/again/part-0.orc) is left out, being in --output",)


def test_the_command_reads_and_writes_addresses(of_s3, tmp_path, capsys):
    write_csv(tmp_path / "new/a.csv", events(user_id=[2, 1, 2]))
    put(tmp_path / "new", of_s3 / "new")
    assert main(["convert", f"{of_s3}/new", "--output", f"{of_s3}/log"]) == 0
    assert f"with 2 users and 3 events to {of_s3}/log" in capsys.readouterr().out


def refused(tmp_path: Path, *paths: object, **changes) -> str:
    with pytest.raises(UserError) as caught:
        converted(tmp_path / "log", *paths, **changes)
    assert not (tmp_path / "log").exists()
    assert "s2s-copies" not in str(caught.value)
    return str(caught.value)


def test_sentences_have_addresses(of_s3, tmp_path):
    (tmp_path / "bad").mkdir()
    write_csv(tmp_path / "bad/a.csv", events(user_id=[1, ""]))
    (tmp_path / "bad/table/_delta_log").mkdir(parents=True)
    (tmp_path / "bad/table/_delta_log/0.json").write_text("{}")
    write_parquet(tmp_path / "bad/table/a.parquet", events(user_id=[1]))
    for directory in ("table/day=1", "ice/data", "ice/metadata"):
        (tmp_path / "bad" / directory).mkdir(parents=True)
    write_parquet(tmp_path / "bad/table/day=1/b.parquet", events(user_id=[1]))
    write_parquet(tmp_path / "bad/ice/data/b.parquet", events(user_id=[1]))
    (tmp_path / "bad/ice/metadata/v1.metadata.json").write_text("{}")
    (tmp_path / "bad/x.parquet").write_bytes(b"not Parquet")
    put(tmp_path / "bad", of_s3)
    assert refused(tmp_path, of_s3 / "a.csv").startswith(f"{of_s3}/a.csv: row 2, column user_id")
    assert refused(tmp_path, of_s3 / "x.parquet").startswith(f"{of_s3}/x.parquet")
    assert refused(tmp_path, of_s3 / "table").startswith(f"{of_s3}/table is a Delta table")
    assert refused(tmp_path, of_s3 / "table/day=1").startswith(f"{of_s3}/table is a Delta table")
    assert refused(tmp_path, of_s3 / "ice/data").startswith(f"{of_s3}/ice is an Iceberg table")
    for name in ("never", "never/*.csv"):
        assert refused(tmp_path, of_s3 / name).startswith(f"{of_s3}/{name} does not exist")
    assert "twice" in refused(tmp_path, of_s3 / "a.csv", of_s3 / "a.csv")
    assert "let Spark read it" in refused(tmp_path, of_s3 / "a.csv", engine="spark")


def test_a_store_that_is_away(of_s3, tmp_path, proxy, monkeypatch):
    write_csv(tmp_path / "new/a.csv", events(user_id=[2, 1, 2]))
    put(tmp_path / "new", of_s3)
    monkeypatch.setattr(file_systems, "_ATTEMPTS", 1)
    file_systems._connected.cache_clear()
    proxy.failing, proxy.kinds = 1.0, ("503",)
    with pytest.raises(MachineError, match=f"{of_s3}.*: the store does not give it"):
        converted(tmp_path / "log", of_s3)


def test_a_file_that_is_removed_meanwhile(of_s3, tmp_path, monkeypatch):
    write_csv(tmp_path / "new/a.csv", events(user_id=[2, 1, 2]))
    put(tmp_path / "new", of_s3)
    listed = file_systems.files_below(of_s3)
    (of_s3 / "a.csv").unlink()
    monkeypatch.setattr(file_systems, "files_below", lambda _: listed)
    assert "a file was removed while the sources were copied" in refused(tmp_path, of_s3)


def test_a_full_disk(of_s3, tmp_path, monkeypatch):
    write_csv(tmp_path / "new/a.csv", events(user_id=[2, 1, 2]))
    put(tmp_path / "new", of_s3)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_systems, "download", full)
    found = refused(tmp_path, of_s3, temp_dir=tmp_path)
    assert found.startswith(f"--temp_dir: {tmp_path} cannot be written ([Errno 28] No space left")


TREE = ("a/x.c", "a/b/x.c", "a/b/c/y", "b1/a/x.c", "b1/y", "x.c", "ab/b1/a/b/x.c")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("tree")
    for name in TREE:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    return top


PARTS = st.sampled_from(["*", "**", "a", "b*", "?", "[ab]", "[!a]*", "x.c", "*.c", "b1"])


@hypothesis.given(patterns=st.lists(PARTS, min_size=1, max_size=4))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_patterns_are_those_of_glob(tree, patterns):
    found = glob.glob("/".join(patterns), root_dir=tree, recursive=True)
    below = {
        name for name in TREE for path in found if f"{name}/".startswith(f"{path}/".lstrip("/"))
    }
    assert {name for name in TREE if _matches(name.split("/"), patterns)} == below
