"""Config files: they load to the configuration that they were written from, and read well."""

import ast
import dataclasses
import subprocess
import sys

import hypothesis
import plans
import pytest
from hypothesis import strategies as st

from s2s_jax.config import load, load_file
from s2s_jax.errors import UserError
from s2s_jax.planning.config_file import text_of, write
from s2s_jax.planning.rules import plan

ABOUT = ["A log.", "More about it."]


@hypothesis.given(log=plans.logs(), machine=plans.machines, paths=st.text(min_size=1))
@hypothesis.settings(max_examples=100)
def test_a_file_loads_to_the_configuration(tmp_path_factory, log, machine, paths):
    # Not an address, which the configuration refuses.
    log = dataclasses.replace(log, paths="/" + paths.replace("://", ""))
    made = plan(log, machine, "runs/mine")
    path = tmp_path_factory.mktemp("file") / "mine.py"
    write(made, ABOUT, path)
    assert load_file(path) == made.config


def test_a_file_has_the_format_of_the_project(tmp_path):
    path = tmp_path / "mine.py"
    write(plan(plans.log(), plans.CPU, "runs/mine"), ABOUT, path)
    assert all(len(line) <= 100 for line in path.read_text().splitlines())
    command = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "100", str(path)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    command = [sys.executable, "-m", "ruff", "check", "--select", "E,F,I", str(path)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_a_reason_stands_above_its_key():
    made = plan(plans.log(), plans.CPU, "runs/mine")
    text = text_of(made, ABOUT)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[lines.index("seq_len=200,") - 2].startswith("# 95% of the rows have at most 500")
    below = lines.index("# The items: 3,416 distinct numbers, 10% of them with one event.")
    assert lines[below + 1 : below + 3] == ["FeatureConfig(", 'name="item_id",']
    # All reasons are there, wrapped.
    comments = " ".join(line[2:] for line in lines if line.startswith("# "))
    for reason in made.why.values():
        assert reason in comments
    assert ast.get_docstring(ast.parse(text)) == "A log.\n\nMore about it."


def test_keys_may_be_overridden(tmp_path):
    path = tmp_path / "mine.py"
    write(plan(plans.log(), plans.CPU, "runs/mine"), ABOUT, path)
    assert load(path, ["--features.item_id.emb_dim", "64"]).features[0].emb_dim == 64


def test_a_file_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write(plan(plans.log(), plans.CPU, "runs/x"), ABOUT, tmp_path / "file" / "mine.py")
