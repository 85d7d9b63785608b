"""Answers for raw rows of public logs, in a process without the trainer, are those of the trainer."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.orc as orc
import pytest
from places import DATA, REPO
from test_client import ALONE, assert_answers

import s2s_jax as s2s
import s2s_serve

K = 100

# In a process of its own, because tests compile for eight devices without optimization.
TRAINER = """
import json, sys
from pathlib import Path

import numpy as np
import pyarrow.orc

import s2s_jax as s2s
from s2s_jax.jobs.export import Request, export

log, rows, out, k = sys.argv[1:]
config = s2s.load(
    "configs/ml1m.py",
    {
        "io.data_paths": log,
        "train.output_dir": out + "/run",
        "train.train_steps": 30,
        "lr.warmup_steps": 10,
        "eval.every_steps": 1000,
        "eval.neighbours": 0.5,
    },
)
run = s2s.train(config)
export(config, Request(output=Path(out) / "export", index="no"))
table = pyarrow.orc.read_table(rows)
np.save(out + "/vectors.npy", run.encode(table))
Path(out + "/answers.json").write_text(json.dumps(run.recommend(table, int(k))))
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(REPO), "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("name", "users"), [("ml-1m", 1000), ("taobao", 200)])
def test_the_same_hundred_items(name, users, tmp_path):
    log, out = DATA / name, str(tmp_path)
    if not log.is_dir():
        pytest.skip(f"no log at {log}")
    files = [orc.read_table(str(path)) for path in sorted(log.glob("*.orc"))]
    rows = pa.concat_tables(files).slice(0, users)
    orc.write_table(rows, f"{out}/rows.orc")
    run(TRAINER, str(log), f"{out}/rows.orc", out, str(K))
    found = json.loads(run(ALONE, f"{out}/export", f"{out}/rows.orc", str(K)))
    assert len(found["answers"]) == len(rows) == users
    np.testing.assert_allclose(np.array(found["vectors"]), np.load(f"{out}/vectors.npy"), atol=1e-5)
    expected = s2s.Recommendations(*json.loads((tmp_path / "answers.json").read_text()))
    answers = [s2s_serve.Recommendation(*answer) for answer in found["answers"]]
    assert all(len(answer.items) == K for answer in answers)
    assert_answers(answers, expected)
