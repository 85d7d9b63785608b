"""A tiny model for a laptop's CPU, for logs made by `s2s synthesize`."""

import dataclasses
from pathlib import Path

from s2s_jax.config import (
    Config,
    EvalConfig,
    FeatureConfig,
    LastEvents,
    ModelConfig,
    TrainConfig,
    load_file,
)


def get_config() -> Config:
    base = load_file(Path(__file__).with_name("base.py"))
    return dataclasses.replace(
        base,
        io=dataclasses.replace(
            base.io, data_paths="data/quickstart", batch_size=32, thread_num=1, prefetch=4
        ),
        features=(
            FeatureConfig(name="item_id", emb_dim=32, hash_type="murmur", hash_bucket_size=65_536),
            FeatureConfig(name="cate_id", emb_dim=16, hash_bucket_size=1_024),
            FeatureConfig(
                name="behavior_id", emb_dim=8, hash_type="murmur", hash_bucket_size=1_024
            ),
            FeatureConfig(name="timestamp", emb_dim=8, hash_type="murmur", hash_bucket_size=65_536),
        ),
        tables=(),
        model=ModelConfig(
            seq_len=48, hidden_size=64, num_layers=2, nhead=4, dim_feedforward=128, dropout=0.1
        ),
        lr=dataclasses.replace(base.lr, sparse_lr=1e-2, warmup_steps=20),
        train=TrainConfig(
            output_dir="runs/quickstart", train_steps=400, log_steps=10, save_steps=100
        ),
        # Training does not use the last two events of a user; the last one tests the model. In this log,
        # users return to items, so items of the history are ranked, too.
        eval=EvalConfig(split=LastEvents(events=2), filter_seen=False),
    )
