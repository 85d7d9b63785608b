"""Combinations of options: all valid ones train, continue exactly from a checkpoint, and serve."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import options
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
import small
from jax.sharding import Mesh

import s2s_serve
from s2s_jax.cli.commands import recommend
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config
from s2s_jax.config.settings import Decoding, Logs
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.errors import UserError
from s2s_jax.jobs.export import Request, export
from s2s_jax.jobs.train import train
from s2s_jax.ranking.evaluation import EvaluationSettings, Evaluator
from s2s_jax.ranking.restored import restore
from s2s_jax.training.step.batches import ITEM_SHARE, unpack
from s2s_jax.training.step.settings import StepSettings

# Number of configurations that cover every value of every option.
FEW = 7
PARTS = 8


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("logs")
    options.write_logs(directory)
    return directory


def learned(run_dir: Path) -> list[dict]:
    """Lines of the metrics without speeds, which differ between runs."""
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = ("examples_per_sec", "tokens_per_sec", "step_ms", "input_wait_ms")
    return [{k: v for k, v in line.items() if k not in speeds} for line in lines]


def check(row: options.Row, logs: Path, directory: Path) -> None:
    """Trains three steps, continues from an earlier one, evaluates and recommends."""
    devices = options.FACTORS["devices"][row["devices"]]
    restored_at = options.FACTORS["restored at"][row["restored at"]]
    mesh = make_mesh(jax.devices()[:devices])
    run_dir, again_dir = directory / "run", directory / "again"
    config = options.config_of(row, logs, run_dir)
    assert not train(config, mesh)
    whole = learned(run_dir)
    losses = [line for line in whole if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3]
    assert all(math.isfinite(value) for line in whole for value in line.values())
    assert losses[0]["loss"] > 0
    # As if it had been killed after this checkpoint.
    shutil.copytree(run_dir, again_dir)
    for path in (again_dir / "checkpoints").iterdir():
        if int(path.name) > restored_at:
            shutil.rmtree(path)
    assert not train(options.config_of(row, logs, again_dir), mesh)
    assert learned(again_dir) == whole
    if config.feature("item_id").bag_size > 1:
        with pytest.raises(UserError, match=r"features\.0\.bag_size: expected 1"):
            recommends(config, directory, mesh)
        return
    if config.eval.split is not None:
        run = restore(config, mesh, "newest")
        found = Evaluator(EvaluationSettings.of(config), mesh).evaluate(
            run.functions, run.state, "test"
        )
        assert all(math.isfinite(value) for value in found.metrics.values())
    recommends(config, directory, mesh)
    serves(config, directory)


def serves(config: Config, directory: Path) -> None:
    """The export answers as `recommend` did, from the same checkpoint, the best."""
    export(config, Request(output=directory / "export", index="no"))
    model = s2s_serve.load(directory / "export")
    expected = pq.read_table(directory / "recs.parquet").to_pylist()
    files = index_files(Logs.of(config), Decoding.of(config)).files
    rows = {
        row["user"]: row for f in files for row in pyarrow.orc.read_table(str(f.path)).to_pylist()
    }
    answers = model.recommend([rows[row["user"]] for row in expected], 3)
    for answer, row in zip(answers, expected, strict=True):
        assert answer.by == "model"
        # Half precision is for training: an export computes in single precision.
        exact = config.model.dtype == "float32"
        np.testing.assert_allclose(answer.scores, row["scores"], atol=1e-5 if exact else 0.1)
        distinct = np.diff(row["scores"], append=-np.inf, prepend=np.inf)
        if exact and (np.abs(distinct) > 1e-5).all():
            assert answer.items == row["items"]


def recommends(config: Config, directory: Path, mesh: Mesh) -> None:
    path = directory / "config.py"
    path.write_text(
        "from pathlib import Path\n"
        "from s2s_jax.config import load_json\n"
        f"def get_config():\n    return load_json(Path({config.train.output_dir!r}) / 'config.json')\n"
    )
    out = directory / "recs.parquet"
    arguments = ["--config", str(path), "--input", config.io.data_paths, "--output", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("s2s_jax.jobs.recommend.make_mesh", lambda: mesh)
        assert recommend.main([*arguments, "--top_k", "3", "--user_column", "user"]) == 0
    table = pq.read_table(out)
    assert len(table) > 0
    assert all(math.isfinite(x) for row in table["scores"].to_pylist() for x in row)


@pytest.mark.parametrize(
    "number", [*(pytest.param(n, marks=pytest.mark.slow) for n in range(FEW - 1)), FEW - 1]
)
def test_options_together(number, logs, tmp_path):
    check(options.covering_rows(1)[number], logs, tmp_path)


def test_padding_made_on_the_device_has_a_share_with_a_logarithm():
    config = small.config()
    loss = dataclasses.replace(config.loss, log_q="catalogue")
    config = dataclasses.replace(config, loss=loss)
    values = np.ones((1, 1, 2 * small.SEQ_LEN, 6), np.int32)
    batch = {"length": jnp.array([[2, 0]]), "values": jnp.asarray(values)}
    assert (np.asarray(unpack(StepSettings.of(config), batch)[ITEM_SHARE]) > 0).all()


def test_every_value_is_tried():
    rows = options.covering_rows(1)
    assert len(rows) == FEW
    for name, values in options.FACTORS.items():
        assert {row[name] for row in rows} == set(range(len(values)))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_of_options(part, logs, tmp_path):
    """All valid pairs: about fifty configurations."""
    for number, row in enumerate(options.covering_rows()):
        if number % PARTS == part:
            directory = tmp_path / str(number)
            directory.mkdir()
            print(row)  # Shown if the test fails.
            check(row, logs, directory)
            shutil.rmtree(directory)
