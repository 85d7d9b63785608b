"""Every knob: typed, documented, validated. See `loading` for config files and overrides."""

from s2s_jax.config.addresses import refuse_addresses, refuse_addresses_in
from s2s_jax.config.decay import Constant, Cosine, Linear
from s2s_jax.config.features import FeatureConfig, TableConfig
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
from s2s_jax.config.validation import validate

__all__ = [
    "Config",
    "Constant",
    "Cosine",
    "EvalConfig",
    "FeatureConfig",
    "IOConfig",
    "LRConfig",
    "Linear",
    "LossConfig",
    "ModelConfig",
    "TableConfig",
    "TrainConfig",
    "load",
    "load_file",
    "load_json",
    "parse_json",
    "refuse_addresses",
    "refuse_addresses_in",
    "validate",
]
