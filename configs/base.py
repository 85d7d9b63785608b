"""A starting point for real logs: the sizes of the RecIS seq2seq example, with a corrected objective.

Each position predicts the item of the next event. Padding and repeats of the same item are not used as
negatives. Long rows keep their newest events. `recis.py` starts from this and undoes each correction.
"""

from s2s_jax.config import Config, FeatureConfig, IOConfig, ModelConfig, TableConfig, TrainConfig


def get_config() -> Config:
    return Config(
        io=IOConfig(data_paths="data", batch_size=16, thread_num=4, prefetch=4),
        features=(
            FeatureConfig(name="item_id", hash_bucket_size=2_048_000),
            FeatureConfig(name="cate_id", hash_bucket_size=2_048),
            FeatureConfig(name="behavior_id", hash_type="murmur", hash_bucket_size=0),
            FeatureConfig(name="timestamp", hash_type="murmur", hash_bucket_size=2_048_000),
        ),
        tables=(TableConfig(name="behavior_id", capacity=4_096),),
        model=ModelConfig(),
        train=TrainConfig(output_dir="runs/base", train_epoch=1),
    )
