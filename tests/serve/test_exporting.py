"""The command `s2s export`: versions, failures that change nothing, catalogues, and its mistakes."""

import dataclasses
import errno
import json
import os
import shutil
import socket
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluations import config_file

import s2s_jax as s2s
import s2s_serve
from s2s_jax.cli.commands import catalogue as catalogue_command
from s2s_jax.cli.commands import export as command
from s2s_jax.errors import UserError
from s2s_jax.exporting import version_dir
from s2s_jax.jobs import export as jobs
from s2s_jax.jobs.export import Request, export
from s2s_serve import tensor_file


@pytest.fixture(scope="module")
def run(small_export):
    return s2s.Run(small_export.config.train.output_dir, devices=jax.devices()[:1])


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def test_each_export_is_a_version_of_its_own(small_export, tmp_path, capsys):
    output = tmp_path / "exports/shop"
    arguments = ["--config", config_file(small_export.config, tmp_path), "--output", str(output)]
    assert command.main(arguments) == 0
    assert command.main([*arguments, "--checkpoint", "3"]) == 0
    said = capsys.readouterr().out
    assert f"the checkpoint of step 6 to {output}/versions/1" in said
    assert f"the checkpoint of step 3 to {output}/versions/2" in said
    assert f"to serve it: s2s serve {output}" in said
    assert names_in(output) == ["current.json", "versions"]
    assert names_in(output / "versions") == ["1", "2"]
    assert (s2s_serve.load(output).version, s2s_serve.load(output).card["step"]) == (2, 3)
    assert s2s_serve.load(output, version=1).card["step"] == 6
    # Versions are not numbered again after the newest was deleted by hand.
    shutil.rmtree(output / "versions/2")
    done = export(small_export.config, Request(output=output))
    assert done.manifest.version == 3


@pytest.mark.parametrize("fails", ["a table", "the manifest"])
def test_a_full_disk_changes_nothing(small_export, tmp_path, monkeypatch, fails):
    output = tmp_path / "export"
    shutil.copytree(small_export.directory, output)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fails == "a table":
        monkeypatch.setattr(tensor_file, "write", full)
    else:
        monkeypatch.setattr("s2s_jax.exporting.version_dir._sync", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
        export(small_export.config, Request(output=output, index="no"))
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before


def test_what_killed_commands_left_is_removed(small_export, tmp_path):
    output = tmp_path / "export"
    versions = output / "versions"
    here = socket.gethostname()
    none = 2**22 + 1
    ended = f".unfinished-1-{here}-{none}-0123abcd"
    # In a container, the command that was killed may have had the number of this one.
    same_number = f".unfinished-1-{here}-{os.getpid()}-0123abcd"
    left = [
        f".unfinished-1-{here}-{os.getppid()}-0123abcd",
        f".unfinished-1-elsewhere-{none}-0123abcd",
        f".unfinished-1-gpu-{here}-{none}-0123abcd",
        f".unfinished-1-{here}-9-{none}-0123abcd",
    ]
    for name in (ended, same_number, *left):
        (versions / name / "tables").mkdir(parents=True)
    export(small_export.config, Request(output=output, index="no"))
    assert names_in(versions) == sorted(["1", *left])


def test_two_exports_of_one_process(small_export, tmp_path):
    with version_dir.new_version(tmp_path) as (first, path, _):
        with version_dir.new_version(tmp_path) as (second, other, _):
            assert first == second == 1
            assert path != other
            assert path.is_dir()
            assert other.is_dir()
        assert path.is_dir()
        assert not other.exists()


@pytest.mark.parametrize("newest", [1, 5])
def test_the_slower_of_two_commands_makes_the_next_version(
    small_export, tmp_path, monkeypatch, newest
):
    """Meanwhile, another command makes version 1, or five others do."""
    output = tmp_path / "export"
    finish = jobs.version_dir.finish

    def later(output, new, manifest):
        for version in {1, newest}:
            shutil.copytree(small_export.directory / "versions/1", output / f"versions/{version}")
        (output / "current.json").write_text(json.dumps({"version": newest}))
        return finish(output, new, manifest)

    monkeypatch.setattr(jobs.version_dir, "finish", later)
    done = export(small_export.config, Request(output=output, index="no"))
    expected = newest + 1
    assert names_in(output / "versions") == sorted({"1", str(newest), str(expected)})
    assert done.directory == output / f"versions/{expected}"
    assert done.manifest.version == s2s_serve.load(output).version == expected


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"titles": "none.csv"}, "--titles: .*none.csv cannot be read"),
        ({"item_columns": "none.parquet"}, "--item_columns: .*none.parquet cannot be read"),
        ({"output": "file"}, "--output: expected a directory, found the file"),
        ({"output": "file/export"}, "file/export/versions cannot be written"),
        ({"index": "yes"}, "expected the package faiss-cpu"),
    ],
)
def test_mistakes_are_found_before_the_log_is_read(
    small_export, tmp_path, monkeypatch, request_, words
):
    def too_late(*_):
        raise AssertionError("the log is read")

    monkeypatch.setattr(jobs, "index_files", too_late)
    monkeypatch.setitem(sys.modules, "faiss", None)
    (tmp_path / "file").write_text("")
    paths = {k: v if k == "index" else tmp_path / v for k, v in request_.items()}
    with pytest.raises(UserError, match=words):
        export(small_export.config, Request(**{"output": tmp_path / "export"} | paths))


def test_faiss_is_missed_before_tables_are_written(small_export, tmp_path, monkeypatch):
    def too_late(*_):
        raise AssertionError("tables are written")

    monkeypatch.setattr(jobs, "_write_tables", too_late)
    monkeypatch.setattr("s2s_serve.search.index.FEW_ITEMS", 39)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="expected the package faiss-cpu"):
        export(small_export.config, Request(output=tmp_path / "export", index="auto"))


@pytest.mark.parametrize("bad", [pytest.param(1, marks=pytest.mark.slow), 2, 99])
def test_bad_stripes_are_skipped_when_the_recall_is_measured(
    small_export, tmp_path, monkeypatch, bad
):
    """The first stripes cannot be read any more; with none left, users like items are used."""
    catalogue = catalogue_file(small_export, tmp_path)
    read, tried = jobs.orc.read_stripe, []

    def failing(file, number, columns):
        tried.append(number)
        if number < bad:
            raise UserError(f"stripe {number} is bad")
        return read(file, number, columns)

    users, write_index = [], jobs.index_file.write_index

    def keeping(path, users_UE, wanted):
        users.append(len(users_UE))
        return write_index(path, users_UE, wanted)

    monkeypatch.setattr(jobs.orc, "read_stripe", failing)
    monkeypatch.setattr(jobs.index_file, "write_index", keeping)
    # The items come from a file, so that only the users are read from the log.
    monkeypatch.setattr(jobs, "make_scorer", lambda *_: SimpleNamespace(matrix=None))
    request = Request(output=tmp_path / "export", catalogue=str(catalogue), index="yes")
    with pytest.raises(UserError, match="stripe 0 is bad"):
        export(small_export.config, request)
    io = dataclasses.replace(small_export.config.io, on_error="skip_stripe")
    tried.clear()
    done = export(dataclasses.replace(small_export.config, io=io), request)
    assert done.manifest.index is not None
    assert tried == list(range(min(bad + 1, 3)))
    of_stripe = [row for row in small_export.rows[20 * bad :][:20] if any(row["item_id"])]
    assert users == [len(of_stripe)]


def catalogue_file(small_export, tmp_path):
    path = tmp_path / "items.parquet"
    arguments = ["--config", config_file(small_export.config, tmp_path), "--output", str(path)]
    assert catalogue_command.main(arguments) == 0
    return path


@pytest.mark.parametrize(
    "untrained", ["keep", *(pytest.param(u, marks=pytest.mark.slow) for u in ("last", "drop"))]
)
def test_items_of_a_catalogue_that_were_never_trained(small_export, tmp_path, untrained):
    """Half of the items of the catalogue get other ids, which are in no table."""
    path = catalogue_file(small_export, tmp_path)
    table = pq.read_table(path)
    ids = table["ids/item_id"].to_pylist()
    changed = [[-7, n] if n % 2 else each for n, each in enumerate(ids)]
    kind = table.schema.field("ids/item_id").type
    place = table.schema.get_field_index("ids/item_id")
    pq.write_table(table.set_column(place, "ids/item_id", pa.array(changed, kind)), path)
    settings = dataclasses.replace(small_export.config.eval, untrained=untrained)
    config = dataclasses.replace(small_export.config, eval=settings)
    shutil.copytree(config.train.output_dir, tmp_path / "run")
    moved = dataclasses.replace(config.train, output_dir=str(tmp_path / "run"))
    config = dataclasses.replace(config, train=moved)
    (tmp_path / "run/config.json").write_text(config.to_json())
    request = Request(output=tmp_path / "export", catalogue=str(path), index="no")
    done = export(config, request)
    run = s2s.Run(tmp_path / "run", devices=jax.devices()[:1], catalogue=path)
    rows = [row for row in small_export.rows if row["item_id"]]
    expected = run.recommend(rows, len(table))
    model = s2s_serve.load(tmp_path / "export")
    trained = model.items["trained"].to_numpy()
    assert 0 < trained.sum() < len(table)
    for answer, items, scores in zip(
        model.recommend(rows, len(table)), expected.items, expected.scores, strict=True
    ):
        np.testing.assert_allclose(answer.scores, scores, atol=2e-6)
        assert set(answer.items) == set(items)
    assert done.manifest.untrained == untrained


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "77"], "checkpoint"),
        (["--titles", "titles.csv"], r"--titles: .*titles\.csv cannot be read"),
        (["--titles", "other.csv"], "--titles: .*expected titles of the 40 items"),
        (["--item_columns", "none.parquet"], "--item_columns: .*cannot be read"),
        (["--item_columns", "twice.parquet"], "--item_columns: .*expected each item once"),
        (["--item_columns", "other.parquet"], "--item_columns: .*expected rows of the 40 items"),
        (["--item_columns", "taken.parquet"], "--item_columns: .*not called item, code"),
        (["--output", "other.csv"], "--output: expected a directory, found the file"),
    ],
)
def test_mistakes_are_explained(small_export, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("nowhere,Nothing\n")
    tables = {
        "twice": {"id": ["item 1", "item 1"], "genre": ["a", "b"]},
        "other": {"id": ["nowhere"], "genre": ["a"]},
        "taken": {"id": ["item 1"], "count": [5]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), f"{name}.parquet")
    arguments = ["--config", config_file(small_export.config, tmp_path), "--output", "export"]
    with pytest.raises(UserError, match=words):
        command.main([*arguments, *options])
    assert not list(tmp_path.glob("export/versions/*"))


def test_the_evaluation_of_the_checkpoint_is_told(small_export, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(small_export.config.train.output_dir, run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        figures = {"step": 6, "eval/hr@10": 0.25, "eval/popularity/hr@10": 0.125}
        file.write(json.dumps(figures) + "\n")
    settings = dataclasses.replace(small_export.config.train, output_dir=str(run_dir))
    config = dataclasses.replace(small_export.config, train=settings)
    export(config, Request(output=tmp_path / "export", checkpoint="6", index="no"))
    assert s2s_serve.load(tmp_path / "export").card["evaluation"] == {"eval/hr@10": 0.25}
