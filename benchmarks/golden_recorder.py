"""A pytest plugin for `short_runs.golden`, which writes the numbers that the golden tests compute.

The golden tests start from given weights. No command can do this.
"""

import json
import os
from pathlib import Path
from types import ModuleType

import pytest

# Environment variable with the path of the output file: a line of JSON for each run.
OUT = "SAME_NUMBERS_GOLDEN_OUT"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Wraps the function `run` of each collected module, so that it also writes its results."""
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    for module in modules:
        assert isinstance(module, ModuleType)
        _record_run(module, Path(os.environ[OUT]))


def _record_run(module: ModuleType, out: Path) -> None:
    run = module.run

    def recorded(*args, **kwargs):
        losses, hit_rates, params = run(*args, **kwargs)
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].removesuffix(" (call)")
        with out.open("a") as file:
            print(json.dumps({"test": test, "loss": losses, "hit_rate": hit_rates}), file=file)
        return losses, hit_rates, params

    vars(module)["run"] = recorded
