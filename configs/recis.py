"""The RecIS seq2seq example to the letter, its known defects included, for comparing with it.

The switches that differ from `base.py`: positions are scored against the event *before* them
(`loss.pairing`), without temperature, padding and repeats of the item count as negatives, scored
events show all their features, and truncation keeps the oldest positions.

One thing differs from RecIS: its behavior_id has an unbounded table (`hash_bucket_size` 0). Here
it is a bucket table of 131,072 rows, so that two of the few behaviours of a log are very unlikely to
share a row. Likewise item_id and cate_id, which RecIS keeps unbounded because they have no
`hash_type`, are taken modulo their bucket sizes.
"""

import dataclasses
from pathlib import Path

from s2s_jax.config import Config, LossConfig, load_file


def get_config() -> Config:
    base = load_file(Path(__file__).with_name("base.py"))
    features = tuple(
        dataclasses.replace(f, hash_bucket_size=131_072) if f.name == "behavior_id" else f
        for f in base.features
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
