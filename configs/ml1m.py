"""MovieLens-1M, or any log of items, on a CPU: 40 epochs of 6,040 users in 80 to 95 minutes.

Each step packs as many users as fit. The number of steps is capped, so larger logs take no longer.

The ORC files are expected in the directory ml-1m of $S2S_JAX_DATA, by default ../shared/data next to the
checkout. `--io.data_paths DIR` reads another directory.

The last two events of every user are held out (leave-one-out). benchmarks/RESULTS.md shows the effect of
each of these choices.
"""

import dataclasses
import os
from pathlib import Path

from s2s_jax.config import (
    Config,
    EvalConfig,
    FeatureConfig,
    LastEvents,
    Linear,
    LossConfig,
    LRConfig,
    ModelConfig,
    Pack,
    TableConfig,
    TrainConfig,
    load_file,
)


def get_config() -> Config:
    here = Path(__file__).resolve()
    data = Path(os.environ.get("S2S_JAX_DATA", str(here.parents[2] / "shared" / "data")))
    base = load_file(here.with_name("base.py"))
    return dataclasses.replace(
        base,
        io=dataclasses.replace(
            base.io,
            data_paths=str(data / "ml-1m"),
            batch_size=8,
            sequences=Pack(rows="auto", windows=12),
            thread_num=1,
        ),
        # Ids are hashed to 63 bits and each gets its own row: no collisions, and ids may be text or
        # numbers.
        features=(
            FeatureConfig(name="item_id", emb_dim=128, hash_type="murmur", hash_bucket_size=0),
            FeatureConfig(name="cate_id", emb_dim=32, hash_type="murmur", hash_bucket_size=0),
            FeatureConfig(
                name="behavior_id", emb_dim=16, hash_type="murmur", hash_bucket_size=1_024
            ),
        ),
        tables=(
            TableConfig(name="item_id", capacity=16_384, init_std=0.02),
            TableConfig(name="cate_id", capacity=4_096, init_std=0.02),
            TableConfig(name="behavior_id", init_std=0.02),
        ),
        model=ModelConfig(
            seq_len=200,
            hidden_size=128,
            num_layers=4,
            nhead=2,
            dim_feedforward=256,
            dropout=0.3,
            input_norm=True,
            input_dropout=0.2,
            position="rope",
        ),
        lr=LRConfig(dense_lr=1e-3, sparse_lr=1e-3, warmup_steps=100, decay=Linear()),
        # All items, if there are no more than this.
        loss=LossConfig(negatives="uniform", num_negatives=4_096),
        eval=EvalConfig(split=LastEvents(events=2), every_steps="auto"),
        train=TrainConfig(
            output_dir="runs/ml1m",
            train_epoch=40,
            train_steps=30_240,
            log_steps=100,
            save_steps=3_024,
            max_to_keep=2,
        ),
    )
