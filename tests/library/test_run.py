"""A run directory and a log, as Python programs see them."""

import dataclasses
import json
import shutil

import jax
import pyarrow as pa
import pytest
import small
from evaluations import config_file, evaluating, rows_of
from jobs_of import lines
from logs import write_log

import s2s_jax as s2s
from s2s_jax.cli.commands import evaluate as command
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.jobs.train import train

USERS = 60


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    small.write_log(directory, USERS)
    return directory


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory):
    config = evaluating(log, tmp_path_factory.mktemp("run") / "run", every_steps=10)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, train_steps=20, max_to_keep=3)
    )
    assert not train(config, make_mesh(jax.devices()[:1]))
    return config


def test_metrics_is_a_table_of_all_lines(trained):
    run = s2s.Run(trained.train.output_dir)
    expected = lines(run.directory)
    table = run.metrics()
    assert isinstance(table, pa.Table)
    assert table.column_names[:2] == ["step", "loss"]
    for row, line in zip(table.to_pylist(), expected, strict=True):
        assert {name: value for name, value in row.items() if value is not None} == line
    losses = table.filter(pa.compute.is_valid(table["loss"]))
    assert losses["step"].to_pylist() == [5, 10, 15, 20]
    evaluated = table.filter(pa.compute.is_valid(table["eval/ndcg@10"]))
    assert evaluated["step"].to_pylist() == [10, 20]


def test_steps_and_the_best(trained, tmp_path):
    run = s2s.Run(trained.train.output_dir)
    values = {x["step"]: x["eval/ndcg@10"] for x in lines(run.directory) if "eval/ndcg@10" in x}
    assert run.steps == [10, 20]
    assert run.best_step == max(values, key=lambda step: (values[step], -step))
    shutil.copytree(run.directory, tmp_path / "run")
    copy = s2s.Run(tmp_path / "run")
    assert copy.config.train.output_dir == str(tmp_path / "run")
    # Without the best checkpoint, the other one is the best.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(run.best_step))
    assert [copy.best_step] == copy.steps
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert [copy.best_step] == copy.steps
    assert copy.metrics().num_rows == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert copy.best_step is None
    assert copy.steps == []
    with pytest.raises(s2s.UserError, match="no checkpoints"):
        copy.encode([])


@pytest.mark.parametrize("split", ["test", pytest.param("validation", marks=pytest.mark.slow)])
def test_evaluates_as_the_command_does(trained, split, tmp_path, capsys):
    arguments = ["--config", config_file(trained, tmp_path), "--split", split]
    assert command.main([*arguments, "--out", str(tmp_path / "out.json")]) == 0
    saved = json.loads((tmp_path / "out.json").read_text())
    before = sorted(path.name for path in s2s.Run(trained.train.output_dir).directory.iterdir())
    found = s2s.Run(trained.train.output_dir).evaluate(split)
    assert found.step == saved["step"]
    assert found.metrics == pytest.approx(saved["metrics"], abs=1e-9)
    assert found.intervals == {name: tuple(ends) for name, ends in saved["intervals_95"].items()}
    assert (
        sorted(path.name for path in s2s.Run(trained.train.output_dir).directory.iterdir())
        == before
    )


def test_runs_that_cannot_be_opened_or_evaluated(trained, tmp_path):
    with pytest.raises(s2s.UserError, match=r"config\.json"):
        s2s.Run(tmp_path)
    run = s2s.Run(trained.train.output_dir, checkpoint=7)
    with pytest.raises(s2s.UserError, match="expected best, newest or one of 10, 20, found 7"):
        run.encode([])
    with pytest.raises(s2s.UserError, match="split: expected test or validation, found all"):
        run.evaluate("all")  # pyright: ignore[reportArgumentType]


def test_a_log_is_read_only_as_far_as_needed(log):
    rows = rows_of(log)
    found = s2s.read_log(log)
    assert found.rows == USERS
    assert found.column_names == ["item_id", "behavior_id", "tags"]
    assert "60 rows in 2 files" in repr(found)
    for count in (0, 5, 40, 100):
        head = found.head(count)
        assert head.to_pylist() == rows[:count]
        assert head.schema.equals(found.schema)


def test_a_file_that_is_not_a_log(log, tmp_path):
    with pytest.raises(s2s.UserError, match="nowhere"):
        s2s.read_log(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.orc").touch()
    with pytest.raises(s2s.UserError, match="expected ORC files with rows"):
        s2s.read_log(tmp_path / "empty")
    write_log(tmp_path / "other" / "a.orc", [{"item_id": [1]}])
    with pytest.raises(s2s.UserError, match=r"a\.orc: expected the columns of .*part-0"):
        s2s.read_log(f"{log},{tmp_path / 'other'}")
