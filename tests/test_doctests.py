"""The examples in docstrings, which readers try first, give the results that they show."""

import doctest
import importlib
from pathlib import Path

import pytest
from places import REPO

MODULES = sorted(
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    for package in ("s2s_jax", "s2s_serve")
    for path in (REPO / package).rglob("*.py")
    if any(">>>" in line and "+SKIP" not in line for line in path.read_text().splitlines())
)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A directory like a checkout in which `make quickstart` has run, though not for as long."""
    import s2s_jax as s2s
    from s2s_jax.data.logs.synthesize import Settings, synthesize

    directory = tmp_path_factory.mktemp("quickstart")
    (directory / "configs").symlink_to(REPO / "configs")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(directory)
        synthesize(Settings(output=Path("data/quickstart")))
        changes = {"train.train_steps": 2, "train.log_steps": 1, "model.num_layers": 1}
        s2s.train(s2s.load("configs/quickstart.py", changes))
    return directory


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, request, monkeypatch):
    module = importlib.import_module(name)
    if name.startswith("s2s_jax.library"):
        monkeypatch.chdir(request.getfixturevalue("place"))
    failed, attempted = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert attempted > 0
    assert failed == 0
