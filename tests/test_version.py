"""The version is the same everywhere."""

import importlib
import re
import tomllib

import golden

import s2s_jax


def test_the_version_is_written_once_and_the_same_elsewhere():
    project = tomllib.loads((golden.REPO / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert "version" not in project["project"]
    module, _, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    assert getattr(importlib.import_module(module), name) == s2s_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", s2s_jax.__version__)
    citation = (golden.REPO / "CITATION.cff").read_text()
    assert f"\nversion: {s2s_jax.__version__}\n" in citation
    assert f"\n## [{s2s_jax.__version__}]" in (golden.REPO / "CHANGELOG.md").read_text()
