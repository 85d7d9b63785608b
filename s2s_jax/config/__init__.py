"""All settings: typed, documented and validated. See `loading` for config files and overrides."""

from s2s_jax.config.checks.addresses import IN_STORES, refuse_addresses, refuse_addresses_in
from s2s_jax.config.checks.configuration import validate
from s2s_jax.config.features import FeatureConfig, TableConfig
from s2s_jax.config.kinds import (
    ByTime,
    Constant,
    Cosine,
    Crop,
    LastEvents,
    Linear,
    Pack,
    TimeGaps,
    Truncate,
)
from s2s_jax.config.loading import load, load_file, load_json, parse_json
from s2s_jax.config.schema import (
    Config,
    EvalConfig,
    IOConfig,
    LossConfig,
    LRConfig,
    ModelConfig,
    TrainConfig,
)

__all__ = [
    "IN_STORES",
    "ByTime",
    "Config",
    "Constant",
    "Cosine",
    "Crop",
    "EvalConfig",
    "FeatureConfig",
    "IOConfig",
    "LRConfig",
    "LastEvents",
    "Linear",
    "LossConfig",
    "ModelConfig",
    "Pack",
    "TableConfig",
    "TimeGaps",
    "TrainConfig",
    "Truncate",
    "load",
    "load_file",
    "load_json",
    "parse_json",
    "refuse_addresses",
    "refuse_addresses_in",
    "validate",
]
