"""MovieLens-1M, or any log of its size, on a CPU: 10 epochs of 6,040 users in about ten minutes.

The ORC files are looked for in ml-1m under $S2S_JAX_DATA, by default ../shared/data beside the
checkout; any other place is a flag away: `--io.data_paths DIR`.
"""

import dataclasses
import os
from pathlib import Path

from s2s_jax.config import Config, FeatureConfig, ModelConfig, TrainConfig, load_file


def get_config() -> Config:
    here = Path(__file__).resolve()
    data = Path(os.environ.get("S2S_JAX_DATA", str(here.parents[2] / "shared" / "data")))
    base = load_file(here.with_name("base.py"))
    return dataclasses.replace(
        base,
        io=dataclasses.replace(
            base.io, data_paths=str(data / "ml-1m"), batch_size=32, thread_num=1, prefetch=4
        ),
        features=(
            # Murmur over 2^20 buckets: hardly a collision here, and it also serves logs whose ids
            # are large and sparse, such as Taobao's.
            FeatureConfig(
                name="item_id", emb_dim=64, hash_type="murmur", hash_bucket_size=1_048_576
            ),
            FeatureConfig(name="cate_id", emb_dim=32, hash_type="murmur", hash_bucket_size=65_536),
            FeatureConfig(
                name="behavior_id", emb_dim=16, hash_type="murmur", hash_bucket_size=1_024
            ),
            FeatureConfig(
                name="timestamp", emb_dim=16, hash_type="murmur", hash_bucket_size=262_144
            ),
        ),
        model=ModelConfig(
            seq_len=128, hidden_size=128, num_layers=2, nhead=4, dim_feedforward=256, dropout=0.2
        ),
        lr=dataclasses.replace(base.lr, warmup_steps=50, sparse_lr=1e-2),
        train=TrainConfig(output_dir="runs/ml1m", train_epoch=10, save_steps=200),
    )
