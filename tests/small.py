"""A small configuration and random batches for tests of the model and the step."""

import dataclasses

import numpy as np

from s2s_jax.config import Config, FeatureConfig, LRConfig, ModelConfig, TrainConfig, validate

SEQ_LEN = 6


def config(**changes) -> Config:
    """Two tables, one of them shared by two features of which one has bags of three."""
    made = Config(
        features=(
            FeatureConfig(name="item_id", emb_dim=8, hash_bucket_size=300, init_std=0.5),
            FeatureConfig(name="behavior_id", emb_dim=4, hash_bucket_size=9, init_std=0.5),
            FeatureConfig(
                name="tags",
                emb_dim=8,
                hash_bucket_size=300,
                init_std=0.5,
                bag_size=3,
                shard_name="item_id",
            ),
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


def batch(config: Config, rows: int, seed: int) -> dict[str, np.ndarray]:
    """A batch of random sequences, the first of them full and the last empty."""
    rng = np.random.default_rng(seed)
    seq_len = config.model.seq_len
    length = rng.integers(1, seq_len + 1, size=rows).astype(np.int32)
    length[0], length[-1] = seq_len, 0
    made: dict[str, np.ndarray] = {"length": length}
    for feature in config.features:
        shape = (rows, seq_len, feature.bag_size)
        ids = rng.integers(0, feature.hash_bucket_size, size=shape).astype(np.int32)
        # Bags have 0 to K ids, but for the item, which is always there.
        if feature.name != "item_id":
            count = rng.integers(0, feature.bag_size + 1, size=shape[:2])
            ids[np.arange(feature.bag_size) >= count[..., None]] = -1
        ids[np.arange(seq_len) >= length[:, None]] = -1
        made[f"ids/{feature.name}"] = ids
    return made
