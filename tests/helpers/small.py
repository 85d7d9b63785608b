"""A small configuration and random batches for tests of the model and the step."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import orc

from s2s_jax.config import (
    Config,
    FeatureConfig,
    LRConfig,
    ModelConfig,
    TableConfig,
    TrainConfig,
    validate,
)

SEQ_LEN = 6


def config(**changes) -> Config:
    """Return a configuration with two tables. Two features share one; one of them has bags of three."""
    made = Config(
        features=(
            FeatureConfig(name="item_id", emb_dim=8, hash_bucket_size=300),
            FeatureConfig(name="behavior_id", emb_dim=4, hash_bucket_size=9),
            FeatureConfig(
                name="tags",
                emb_dim=8,
                hash_bucket_size=300,
                bag_size=3,
                shard_name="item_id",
            ),
        ),
        tables=(
            TableConfig(name="item_id", init_std=0.5),
            TableConfig(name="behavior_id", init_std=0.5),
        ),
        model=ModelConfig(
            seq_len=SEQ_LEN,
            hidden_size=16,
            num_layers=2,
            nhead=4,
            dim_feedforward=24,
            dropout=0.0,
        ),
        lr=LRConfig(dense_lr=1e-2, sparse_lr=1e-2),
        loss=dataclasses.replace(Config().loss, target_features=("item_id", "tags")),
        train=TrainConfig(train_steps=1),
    )
    made = dataclasses.replace(made, **changes)
    validate(made)
    return made


def growing(config: Config, **settings) -> Config:
    """Return the configuration with a growing table, which items and tags share."""
    features = tuple(
        dataclasses.replace(f, hash_bucket_size=0) if f.table_name == "item_id" else f
        for f in config.features
    )
    config = dataclasses.replace(config, features=features)
    return with_table(config, "item_id", **{"capacity": 1} | settings)


def with_table(config: Config, name: str, **settings) -> Config:
    """Return the configuration with other settings of a table."""
    tables = tuple(
        dataclasses.replace(t, **settings) if t.name == name else t for t in config.tables
    )
    return dataclasses.replace(config, tables=tables)


def batch(config: Config, rows: int, seed: int) -> dict[str, np.ndarray]:
    """A batch of random sequences; the first one is full, and the last one is empty."""
    rng = np.random.default_rng(seed)
    seq_len = config.model.seq_len
    length = rng.integers(1, seq_len + 1, size=rows).astype(np.int32)
    length[0], length[-1] = seq_len, 0
    columns = []
    for feature in config.features:
        shape = (rows, seq_len, feature.bag_size)
        ids = rng.integers(0, feature.hash_bucket_size or 300, size=shape).astype(np.int32)
        # Bags have 0 to K ids; only the item is always there.
        if feature.name != "item_id":
            count = rng.integers(0, feature.bag_size + 1, size=shape[:2])
            ids[np.arange(feature.bag_size) >= count[..., None]] = -1
        ids[np.arange(seq_len) >= length[:, None]] = -1
        if feature.grows:
            ids = to_words(ids).reshape(*ids.shape[:2], -1)
        columns.append(ids)
    if config.model.time_bias is not None:
        # Gaps of all sizes, at the very edges of buckets.
        gap = 2 ** rng.integers(25, size=(rows, seq_len)) - rng.integers(2, size=(rows, seq_len))
        columns.append(gap.cumsum(axis=1).astype(np.int32)[..., None])
    return {"length": length, "ids": np.concatenate(columns, axis=-1)}


def to_words(ids: np.ndarray) -> np.ndarray:
    """The low and high words of integers, int32 `[…, 2]`."""
    return ids.astype("<i8")[..., None].view("<i4")


def write_log(directory: Path, users: int, files: int = 2, seed: int = 0) -> None:
    """Writes ORC files with the columns of `config`, in which i + 1 mostly follows item i."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    per_file = -(-users // files)
    for number in range(files):
        columns: dict[str, list] = {"item_id": [], "behavior_id": [], "tags": []}
        for _ in range(min(per_file, users - number * per_file)):
            length = int(rng.integers(2, 2 * SEQ_LEN))
            items = (int(rng.integers(300)) + np.arange(length)) % 300
            columns["item_id"].append([[int(i)] for i in items])
            columns["behavior_id"].append([[int(b)] for b in rng.integers(0, 4, length)])
            columns["tags"].append([[int(i) % 7, int(i) % 11] for i in items])
        types = pa.list_(pa.list_(pa.int64()))
        table = pa.table({name: pa.array(rows, types) for name, rows in columns.items()})
        orc.write_table(table, str(directory / f"part-{number}.orc"))
