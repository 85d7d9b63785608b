"""A log with several rows per user and ids that share table rows: every command warns about it."""

import dataclasses
import json
from pathlib import Path

import jax
import pyarrow as pa
import pytest
import small
from logs import write_log

from s2s_jax.cli.commands import evaluate, recommend
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import (
    Config,
    EvalConfig,
    FeatureConfig,
    LastEvents,
)
from s2s_jax.errors import UserError
from s2s_jax.jobs.train import train


def config(tmp_path: Path) -> Config:
    base = small.config()
    return dataclasses.replace(
        base,
        io=dataclasses.replace(base.io, data_paths=str(tmp_path / "log"), batch_size=8),
        features=(FeatureConfig(name="item_id", emb_dim=8, hash_bucket_size=30),),
        tables=(),
        model=dataclasses.replace(base.model, num_layers=1),
        loss=dataclasses.replace(base.loss, target_features=("item_id",)),
        train=dataclasses.replace(base.train, output_dir=str(tmp_path / "run"), tensorboard=False),
        eval=EvalConfig(split=LastEvents(events=1), batch_size=16),
    )


def test_what_each_command_warns_of(tmp_path, capsys):
    types = {"user_id": pa.int64(), "item_id": pa.list_(pa.int64())}
    for day in range(2):
        log = [{"user_id": n, "item_id": [n % 40, n % 7 + 3 * day, 5]} for n in range(40)]
        write_log(tmp_path / "log" / f"{day}.orc", log, types)
    made = config(tmp_path)
    assert not train(made, make_mesh(jax.devices()[:1]))
    output = capsys.readouterr().err
    assert output.count("40 users looked at have more than one row (column user_id)") == 1
    assert output.count("20 (50.0%) of the distinct ids looked at share a row of the table") == 1

    file = tmp_path / "config.py"
    file.write_text(
        "from pathlib import Path\nfrom s2s_jax.config import load_json\n"
        f"def get_config():\n    return load_json(Path({str(tmp_path / 'run' / 'config.json')!r}))\n"
    )
    out = tmp_path / "evaluation.json"
    assert evaluate.main(["--config", str(file), "--out", str(out)]) == 0
    # Ids 0 to 9 share table rows with ids 30 to 39.
    rows = [[n % 40, n % 7 + 3 * day, 5] for day in range(2) for n in range(40)]
    shared = sum(item < 10 or item >= 30 for row in rows for item in row) / 240
    assert json.loads(out.read_text())["metrics"]["eval/shared_rows"] == shared
    output = capsys.readouterr()
    assert f"{shared:.1%} of the log's events are of items whose id shares a table row" in " ".join(
        output.out.split()
    )
    assert output.err.count("40 users looked at have more than one row (column user_id)") == 1

    arguments = ["--config", str(file), "--input", str(tmp_path / "log"), "--top_k", "3"]
    recs = str(tmp_path / "recs.parquet")
    assert recommend.main([*arguments, "--output", recs, "--user_column", "user_id"]) == 0
    output = capsys.readouterr().out
    assert "10 more ids of the log share a row of the table with an item" in output
    assert "40 (100.0%) of the 40 users looked at have more than one row (column user_id)" in output

    # A log without any history, or without any readable row, is an error.
    write_log(tmp_path / "empty.orc", [{"user_id": 1, "item_id": None}], types)
    arguments[3] = str(tmp_path / "empty.orc")
    with pytest.raises(UserError, match=r"^--input: no row of .* has a history that can be read"):
        recommend.main([*arguments, "--output", recs])
    assert not Path(recs).exists()
