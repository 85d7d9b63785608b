"""The weight of counted neighbours that training chooses (`eval.neighbours` auto), and who uses it."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import small
from evaluations import config_file, evaluating, rows_of
from jobs_of import lines, one_device

import s2s_jax as s2s
from s2s_jax.cli.commands import evaluate, recommend
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.data.items.neighbours import MOST_SCORES, Scorer
from s2s_jax.errors import UserError
from s2s_jax.jobs.report import report
from s2s_jax.jobs.train import train
from s2s_jax.ranking.evaluation import EvaluationSettings, Evaluator
from s2s_jax.ranking.restored import Saved, restore
from s2s_jax.training.evaluations import chosen_weight

USERS = 90
WEIGHTS = (0, 0.25, 0.5, 1, 2, 4)
# What only an evaluation that chose a weight has.
ADDED = ("step", "eval/neighbours_weight", "eval/model_alone/")


def with_neighbours(config, neighbours):
    settings = dataclasses.replace(config.eval, neighbours=neighbours)
    return dataclasses.replace(config, eval=settings)


def ending_at(config, run_dir, step):
    settings = dataclasses.replace(config.train, train_steps=step, output_dir=str(run_dir))
    return dataclasses.replace(config, train=settings)


def evaluated(run_dir):
    return [line for line in lines(Path(run_dir)) if "eval/mrr" in line]


def metrics_of(config, step, split="validation", mesh=None):
    """The metrics of a checkpoint with the weight that `config` gives."""
    mesh = one_device() if mesh is None else mesh
    run = restore(config, mesh, str(step))
    config = run.with_weight(config)
    found = Evaluator(EvaluationSettings.of(config), mesh)
    return found.evaluate(run.functions, run.state, split).metrics


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log") / "log"
    small.write_log(directory, USERS)
    return directory


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory):
    """Steps 10, 15, 20, … are saved, of which 20 and 40 are evaluated; with a growing table."""
    config = evaluating(
        log, tmp_path_factory.mktemp("run"), grows=True, every_steps=20, neighbours="auto"
    )
    settings = dataclasses.replace(config.train, save_steps=5, max_to_keep=10)
    config = dataclasses.replace(config, train=settings)
    assert not train(config, one_device())
    return config


def test_an_evaluation_has_the_numbers_of_its_weight_and_of_the_model_alone(trained):
    (first, line) = evaluated(trained.train.output_dir)
    assert (first["step"], line["step"]) == (20, 40)
    weight = line["eval/neighbours_weight"]
    assert weight > 0
    found = {name: x for name, x in line.items() if not name.startswith(ADDED)}
    assert found == metrics_of(with_neighbours(trained, weight), 40)
    without = metrics_of(with_neighbours(trained, 0.0), 40)
    alone = {name: without[f"eval/{name}"] for name in ("users", "hr@10", "ndcg@10", "mrr")}
    assert alone == {name: line[f"eval/model_alone/{name}"] for name in alone}
    assert alone["ndcg@10"] < line["eval/ndcg@10"]


@pytest.mark.slow
def test_an_evaluation_is_that_of_its_best_weight(trained):
    *_, line = evaluated(trained.train.output_dir)
    values = [
        metrics_of(with_neighbours(trained, weight), 40)["eval/ndcg@10"] for weight in WEIGHTS
    ]
    assert len(set(values)) > 2
    assert line["eval/neighbours_weight"] == WEIGHTS[values.index(max(values))]


@pytest.mark.slow
def test_commands_use_the_weight_of_their_checkpoint(trained, log, tmp_path, capsys, monkeypatch):
    for job in ("evaluate", "recommend", "report"):
        monkeypatch.setattr(f"s2s_jax.jobs.{job}.make_mesh", one_device)
    # Two evaluations that chose other weights.
    run_dir = tmp_path / "run"
    shutil.copytree(trained.train.output_dir, run_dir)
    chose = {20: 2.0, 40: 0.5}
    changed = [
        line | ({"eval/neighbours_weight": chose[line["step"]]} if "eval/mrr" in line else {})
        for line in lines(run_dir)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    moved = ending_at(trained, run_dir, 40)
    arguments = ["--config", config_file(trained, tmp_path), "--train.output_dir", str(run_dir)]
    # A step without an evaluation has the weight of the evaluation before it.
    out = tmp_path / "metrics.json"
    assert evaluate.main([*arguments, "--checkpoint", "35", "--output", str(out)]) == 0
    assert "neighbours of weight 2 " in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["neighbours"] == 2
    assert found["metrics"] == metrics_of(with_neighbours(moved, 2.0), 35, "test")
    run = s2s.Run(run_dir, checkpoint=35, devices=jax.devices()[:1])
    assert run.evaluate().metrics == found["metrics"]
    recs, lists = tmp_path / "recs.parquet", []
    arguments += ["--checkpoint", "40", "--input", str(log), "--output", str(recs), "--top_k", "5"]
    for more in ([], ["--eval.neighbours", "0.5"], ["--eval.neighbours", "0"]):
        assert recommend.main([*arguments, *more]) == 0
        added = "with neighbours of weight 0.5" in capsys.readouterr().out
        assert added == (more[-1:] != ["0"])
        lists.append(pq.read_table(recs).to_pydict())
    assert lists[0] == lists[1] != lists[2]
    run = s2s.Run(run_dir, checkpoint=40, devices=jax.devices()[:1])
    items, scores = run.recommend(rows_of(log), k=5)
    assert [items, scores] == [lists[0]["items"], lists[0]["scores"]]
    page = report(run_dir, users=2).read_text()
    assert "the model alone" in page
    assert "neighbours of weight" in page


@pytest.mark.slow
def test_a_checkpoint_without_a_weight_is_refused(trained, log, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained.train.output_dir, run_dir)
    config = ending_at(trained, run_dir, 40)
    expected = "eval.neighbours: expected a number, because no evaluation up to step 15"
    with pytest.raises(UserError, match=expected):
        metrics_of(config, 15)
    assert metrics_of(config, 20)
    # Runs of earlier versions have lines without a weight.
    before = [{n: x for n, x in line.items() if n not in ADDED[1:]} for line in lines(run_dir)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    with pytest.raises(UserError, match="up to step 20"):
        metrics_of(config, 20)
    assert metrics_of(with_neighbours(config, 1), 20)
    # What needs no ranking needs no weight.
    vectors = s2s.Run(run_dir, devices=jax.devices()[:1]).encode(rows_of(log)[:2])
    assert np.isfinite(vectors).all()


def test_the_newest_weight_counts_in_any_order_of_lines():
    weight = "eval/neighbours_weight"
    written = [{"step": 20, weight: 1.0}, {"step": 25, "loss": 1.0}, {"step": 10, weight: 0.0}]
    assert chosen_weight(written, 9) is None
    assert chosen_weight(written, 10) == 0.0
    assert chosen_weight(written, 19) == 0.0
    assert chosen_weight(written, 30) == 1.0


@pytest.mark.slow
def test_an_interrupted_run_chooses_the_same(trained, tmp_path):
    assert not train(ending_at(trained, tmp_path, 27), one_device())
    assert not train(ending_at(trained, tmp_path, 40), one_device())
    found, whole = evaluated(tmp_path), evaluated(trained.train.output_dir)
    assert [line["step"] for line in found] == [20, 27, 40]
    assert [line for line in found if line["step"] != 27] == whole


@pytest.mark.slow
def test_the_choice_does_not_depend_on_devices_or_batches(trained):
    chosen = []
    for devices, batch_users in ((1, 32), (2, 16), (4, 16), (8, 8)):
        settings = dataclasses.replace(EvaluationSettings.of(trained), batch_users=batch_users)
        mesh = make_mesh(jax.devices()[:devices])
        run = restore(trained, mesh, "40")
        found = Evaluator(settings, mesh).evaluate(run.functions, run.state, "validation")
        chosen.append(found.metrics)
    for other in chosen[1:]:
        assert other["eval/neighbours_weight"] == chosen[0]["eval/neighbours_weight"]
        assert other == pytest.approx(chosen[0], abs=1.5 / USERS)


@pytest.mark.slow
def test_few_scores_in_memory_change_nothing(trained, log, tmp_path, monkeypatch):
    monkeypatch.setattr("s2s_jax.jobs.recommend.make_mesh", one_device)
    arguments = ["--config", config_file(trained, tmp_path), "--input", str(log)]
    arguments += ["--output", str(tmp_path / "recs.parquet"), "--top_k", "5"]
    mesh, found, lists, parts = one_device(), [], [], []
    run = restore(trained, mesh, "40")
    evaluator = Evaluator(EvaluationSettings.of(trained), mesh, max_users=50)
    score = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda *of: parts.append(len(of[-1])) or score(*of))
    for most in (MOST_SCORES, 200, 1):
        monkeypatch.setattr("s2s_jax.data.items.neighbours.MOST_SCORES", most)
        found.append(evaluator.evaluate(run.functions, run.state, "validation").metrics)
        assert recommend.main(arguments) == 0
        lists.append(pq.read_table(tmp_path / "recs.parquet").to_pydict())
    assert found[0] == found[1] == found[2]
    assert found[0]["eval/users"] <= 50
    assert lists[0] == lists[1] == lists[2]
    assert set(parts) > {32, 1}


def test_of_equal_weights_the_smaller_is_chosen(trained, monkeypatch):
    monkeypatch.setattr("s2s_jax.ranking.evaluation.WEIGHTS", (0.0, 1.0, 1.0 + 1e-9, 1.0 - 1e-9))
    mesh = one_device()
    run = restore(trained, mesh, "40")
    found = Evaluator(EvaluationSettings.of(trained), mesh)
    metrics = found.evaluate(run.functions, run.state, "validation").metrics
    assert metrics["eval/neighbours_weight"] == 1.0
    assert metrics["eval/ndcg@10"] > metrics["eval/model_alone/ndcg@10"]


def test_imported_weights_are_used_by_themselves(trained, tmp_path):
    automatic = with_neighbours(trained, "auto")
    imported = Saved(0, "", {}, {}, None, tmp_path)
    assert imported.with_weight(automatic).eval.neighbours == 0
    with pytest.raises(UserError, match="no evaluation up to step 1 of"):
        imported._replace(step=1).with_weight(automatic)
