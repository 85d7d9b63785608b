"""A run that cannot be exported says so when it starts."""

import dataclasses

import jax
import pytest
import small
from jobs_of import job

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.exporting import tower_files
from s2s_jax.exporting.dry_run import problem_of_export
from s2s_jax.jobs.train import train
from s2s_jax.model import layers
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings

NOTE = "note: s2s export will refuse this run: "


def problem(config):
    settings = StepSettings.of(config)
    abstract = make_step_functions(settings, make_mesh(jax.devices()[:1])).abstract
    return problem_of_export(settings, abstract.params["dense"])


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.setattr("s2s_jax.jobs.train.problem_of_export", problem_of_export)


def test_a_usual_run_can_be_exported():
    assert problem(small.config()) is None


@pytest.mark.slow
def test_bags_of_items_are_named_once_when_a_run_starts(tmp_path, tried, capfd):
    small.write_log(tmp_path / "log", 20)
    config = job(tmp_path / "log", tmp_path / "run")
    bags = dataclasses.replace(config.feature("item_id"), bag_size=2)
    features = tuple(bags if f.name == "item_id" else f for f in config.features)
    config = dataclasses.replace(config, features=features)
    assert not train(config, make_mesh(jax.devices()[:1]))
    said = capfd.readouterr().err
    assert said.count(f"{NOTE}features.0.bag_size: expected 1") == 1
    longer = dataclasses.replace(config.train, train_steps=config.train.train_steps + 1)
    assert not train(dataclasses.replace(config, train=longer), make_mesh(jax.devices()[:1]))
    assert NOTE not in capfd.readouterr().err


def test_a_model_that_is_too_large_is_named(monkeypatch):
    monkeypatch.setattr(tower_files, "_MOST_BYTES", 1000)
    assert problem(small.config()).startswith("model: expected at most 0.0 GB of parameters")


def test_a_model_that_jax_cannot_lower_for_other_machines_is_named(monkeypatch):
    def only_here(*_, **__):
        raise NotImplementedError("no rule for tpu_custom_call")

    monkeypatch.setattr(layers, "causal_attention", only_here)
    assert "NotImplementedError: no rule" in problem(small.config())
