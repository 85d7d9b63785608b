"""Rules that a reader can rely on: imports go in one direction, and data/ never imports JAX."""

import ast
import subprocess
import sys
import tomllib

from places import REPO

PACKAGE, SERVE = REPO / "s2s_jax", REPO / "s2s_serve"
# Each room may import those above it.
ORDER = [
    "version",
    "errors",
    "signals",
    "writing",
    "storage",
    "config",
    "data.logs",
    "data.encoding",
    "data.items",
    "data.batching",
    "data.inspection",
    "data.conversion",
    "embedding",
    "model",
    "cluster",
    "runs",
    "runs.checkpoints",
    "training.step",
    "training",
    "ranking",
    "exporting",
    "pytorch",
    "reporting",
    "jobs",
    "library",
    "planning",
    "cli",
    "cli.commands",
    "entry points",
]

# The rooms that use the rest of s2s_serve too.
SERVING = ("exporting", "pytorch", "jobs", "cli.commands")


def room(module: str) -> str:
    parts = module.split(".")[1:]
    for name in (".".join(parts[:2]), parts[0] if parts else "errors"):
        if name in ORDER:
            return name
    return "entry points"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        here = room(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        for name in imports(path):
            if name.startswith("s2s_jax."):
                assert ORDER.index(room(name)) <= ORDER.index(here), f"{path} imports {name}"
    # data does not depend on tables or models, embedding not on models, and models not on embedding.
    for path in PACKAGE.glob("embedding/*.py"):
        assert not any(n.startswith("s2s_jax.data.") for n in imports(path))
    for path in PACKAGE.glob("model/*.py"):
        rooms = {room(n) for n in imports(path) if n.startswith("s2s_jax.")}
        assert not any(r.startswith("data") for r in rooms)
        assert "embedding" not in rooms


def test_data_room_never_imports_jax():
    """Grain may import JAX for its helpers; files, features and hashing work without it."""
    for path in PACKAGE.glob("data/**/*.py"):
        assert not any(n.split(".")[0] in ("jax", "flax", "optax", "orbax") for n in imports(path))
    modules = "s2s_serve.encoding.features, s2s_jax.data.batching.order"
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_serving_needs_nothing_of_training():
    """A serving machine has neither JAX nor s2s_jax, and both sides encode with the same code."""
    without = ("jax", "flax", "optax", "orbax", "grain", "scipy", "s2s_jax")
    for path in SERVE.rglob("*.py"):
        assert not any(name.split(".")[0] in without for name in imports(path)), path
    encoding = SERVE / "encoding"
    for path in encoding.glob("*.py"):
        own = ("s2s_serve.encoding", "s2s_serve.errors")
        assert all(name.startswith(own) for name in imports(path) if name.startswith("s2s_")), path
    # Training encodes, but does not serve.
    for path in PACKAGE.rglob("*.py"):
        if room(".".join(path.relative_to(REPO).with_suffix("").parts)) not in SERVING:
            of_serving = [name for name in imports(path) if name.startswith("s2s_serve")]
            assert all(name.startswith((*own, "s2s_serve.storage")) for name in of_serving), path


def test_the_small_distribution_has_every_room_of_serving():
    listed = tomllib.loads((SERVE / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = (path.parent.relative_to(REPO).parts for path in SERVE.rglob("__init__.py"))
    rooms = {".".join(parts) for parts in found if "build" not in parts}
    assert set(listed) == rooms
