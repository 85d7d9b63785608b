"""Small exports, which are made once."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from evaluations import evaluating
from logs import write_log

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, FeatureConfig, LastEvents, TableConfig, validate
from s2s_jax.jobs.export import Request, export
from s2s_jax.jobs.train import train

USERS, ITEMS = 60, 40
BEGIN = 946_684_800


class Small(NamedTuple):
    """An export, and what it was made from."""

    directory: Path
    config: Config
    log: Path
    rows: list[dict]


@pytest.fixture(scope="session")
def small_export(tmp_path_factory) -> Small:
    """Text ids with growing tables, bags, ops of times, counted neighbours, titles and genres."""
    log = tmp_path_factory.mktemp("log")
    rows = _rows()
    types = {
        "item_id": pa.list_(pa.string()),
        "tags": pa.list_(pa.list_(pa.int64())),
        "timestamp": pa.list_(pa.int64()),
    }
    write_log(log / "log.orc", rows, types, stripe_rows=20)
    config = _config(log, tmp_path_factory.mktemp("run") / "run")
    assert not train(config, make_mesh(jax.devices()[:1]))
    made = tmp_path_factory.mktemp("export")
    items = [f"item {n}" for n in range(ITEMS)]
    genres = [["even" if n % 2 == 0 else "odd", f"of {n % 3}"] for n in range(ITEMS)]
    table = pa.table({"item": items, "genre": genres, "price": list(range(ITEMS))})
    pyarrow.parquet.write_table(table, made / "columns.parquet")
    titles = "".join(f"item {n},Title of {n}\n" for n in range(ITEMS))
    (made / "titles.csv").write_text(titles)
    request = Request(
        output=made / "export",
        titles=made / "titles.csv",
        item_columns=made / "columns.parquet",
        index="no",
    )
    export(config, request)
    return Small(made / "export", config, log, rows)


def _rows() -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        length = user % 17
        first, gaps = rng.integers(ITEMS), rng.integers(1, 50_000, length)
        items = [f"item {(first + n) % ITEMS}" if n % 7 != 5 else None for n in range(length)]
        tags = [[int(tag) for tag in rng.integers(9, size=n % 4)] for n in range(length)]
        times = (BEGIN + np.cumsum(gaps)).tolist()
        rows.append({"item_id": items, "tags": tags, "timestamp": times})
    return rows


def _config(log: Path, run_dir: Path) -> Config:
    split = LastEvents(events=1)
    config = evaluating(log, run_dir, split=split, neighbours=1.0)
    grows = {"hash_type": "murmur", "hash_bucket_size": 0}
    of_time = {"column": "timestamp", "emb_dim": 4}
    config = dataclasses.replace(
        config,
        features=(
            FeatureConfig(name="item_id", emb_dim=8, **grows),
            FeatureConfig(name="tags", emb_dim=4, bag_size=3, combiner="mean", **grows),
            FeatureConfig(name="gap", op="time_gap", hash_bucket_size=20, **of_time),
            FeatureConfig(
                name="hour", op="hour_of_day", utc_offset_hours=5.5, hash_bucket_size=24, **of_time
            ),
        ),
        tables=(
            TableConfig(
                name="item_id", capacity=16, init_std=0.5, admit_after=2, unknown="default_row"
            ),
            TableConfig(name="tags", capacity=16, init_std=0.5),
            TableConfig(name="gap", init_std=0.5),
            TableConfig(name="hour", init_std=0.5),
        ),
        train=dataclasses.replace(config.train, train_steps=6, save_steps=3),
    )
    validate(config)
    return config
