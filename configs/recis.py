"""An exact copy of the RecIS seq2seq example, including its known defects, for comparison.

Differences from `base.py`: positions are scored against the event *before* them (`loss.pairing`), there
is no temperature, padding and repeats of the item count as negatives, targets have all their features,
and truncation keeps the oldest positions.

As in RecIS, ids without a `hash_type` (item_id, cate_id) and those with `hash_bucket_size` 0
(behavior_id) have their own rows in growing tables.
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
