"""`import s2s_jax` is fast, and `s2s_jax.train` is the function, whatever else was imported."""

import ast
import subprocess
import sys

import pytest
from places import REPO

import s2s_jax as s2s

# The package's functions may have the names of these modules, so nothing in the package imports them.
ENTRY_POINTS = ("train", "evaluate", "recommend", "report")
ENTRY_MODULES = [f"s2s_jax.{name}" for name in ENTRY_POINTS]


def fresh(code: str) -> str:
    """The output of `code` in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_neither_jax_nor_arrow():
    heavy = ("jax", "pyarrow", "numpy", "tyro", "flax", "orbax", "grain")
    code = f"import sys, s2s_jax; print([name for name in {heavy} if name in sys.modules])"
    assert fresh(code) == "[]"


def test_metrics_and_steps_need_no_jax():
    names = "s2s_jax.Run, s2s_jax.load, s2s_jax.read_log"
    assert fresh(f"import sys, s2s_jax; {names}; print('jax' in sys.modules)") == "False"


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import s2s_jax.jobs.train",
        pytest.param("import s2s_jax.cli.main", marks=pytest.mark.slow),
        pytest.param("import s2s_jax.cli.commands.train", marks=pytest.mark.slow),
    ],
)
def test_train_is_the_function(before):
    code = f"{before}\nfrom s2s_jax import train\nprint(type(train).__name__, train.__module__)"
    assert fresh(code) == "function s2s_jax.library.train"


def test_nothing_imports_an_entry_point():
    for path in (REPO / "s2s_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "s2s_jax":
                assert not {alias.name for alias in node.names} & set(ENTRY_POINTS), path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in ENTRY_MODULES, path
            elif isinstance(node, ast.Import):
                named = {alias.name for alias in node.names}
                assert not named & set(ENTRY_MODULES), path


def test_every_name_is_there():
    for name in s2s.__all__:
        assert getattr(s2s, name) is not None
        assert name in dir(s2s)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        s2s.trian  # noqa: B018


def test_the_classes_of_the_configuration_are_all_there():
    from s2s_jax import config

    classes = {name for name in config.__all__ if isinstance(getattr(config, name), type)}
    assert classes <= set(s2s.__all__)
