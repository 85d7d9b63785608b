"""The command `s2s export`: versions, failures that change nothing, catalogues, and its mistakes."""

import dataclasses
import errno
import json
import os
import shutil
import socket

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
    ended = f".unfinished-1-{here}-{2**22 + 1}"
    running = f".unfinished-1-{here}-{os.getppid()}"
    elsewhere = ".unfinished-1-elsewhere-17"
    for name in (ended, running, elsewhere):
        (versions / name / "tables").mkdir(parents=True)
    export(small_export.config, Request(output=output, index="no"))
    assert names_in(versions) == sorted(["1", running, elsewhere])


def test_two_commands_do_not_make_the_same_version(small_export, tmp_path, monkeypatch):
    output = tmp_path / "export"
    finish = jobs.version_dir.finish

    def later(output, path, manifest):
        shutil.copytree(small_export.directory / "versions/1", output / "versions/1")
        return finish(output, path, manifest)

    monkeypatch.setattr(jobs.version_dir, "finish", later)
    with pytest.raises(UserError, match="another command made this version meanwhile"):
        export(small_export.config, Request(output=output, index="no"))
    assert names_in(output / "versions") == ["1"]


def catalogue_file(small_export, tmp_path):
    path = tmp_path / "items.parquet"
    arguments = ["--config", config_file(small_export.config, tmp_path), "--output", str(path)]
    assert catalogue_command.main(arguments) == 0
    return path


@pytest.mark.parametrize("untrained", ["keep", "last", "drop"])
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
