"""The RecIS seq2seq example to the letter, its known defects included, for comparing with it.

The switches that differ from `base.py`: positions are scored against the event *before* them
(`loss.pairing`), without temperature, padding and repeats of the item count as negatives, scored
events show all their features, and truncation keeps the oldest positions.

As there, ids without a `hash_type` (item_id, cate_id) and those with `hash_bucket_size` 0 (behavior_id)
have a row each, in tables that grow.
"""

import dataclasses
from pathlib import Path

from s2s_jax.config import Config, LossConfig, load_file


def get_config() -> Config:
    base = load_file(Path(__file__).with_name("base.py"))
    features = tuple(
        f if f.hash_type else dataclasses.replace(f, hash_bucket_size=0) for f in base.features
    )
    return dataclasses.replace(
        base,
        io=dataclasses.replace(base.io, truncate_side="right"),
        features=features,
        loss=LossConfig(
            pairing="previous",
            temperature=1.0,
            mask_padding=False,
            mask_same_item=False,
            target_features=None,
        ),
        train=dataclasses.replace(base.train, output_dir="runs/recis"),
    )
