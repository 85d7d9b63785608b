"""Sequence models of user behaviour, from ORC event logs to next-event predictions, in JAX.

    import s2s_jax as s2s

    config = s2s.load("configs/quickstart.py", {"train.train_steps": 200})
    run = s2s.train(config)
    items, scores = run.recommend([{"item_id": [17, 4, 11], ...}], k=10)

Names are imported when they are first used, so `import s2s_jax` itself is fast.
"""

import importlib
from typing import TYPE_CHECKING

from s2s_jax.version import __version__

if TYPE_CHECKING:
    from s2s_jax.config import (
        ByTime,
        Config,
        Constant,
        Cosine,
        Crop,
        EvalConfig,
        FeatureConfig,
        IOConfig,
        LastEvents,
        Linear,
        LossConfig,
        LRConfig,
        ModelConfig,
        Pack,
        TableConfig,
        TimeGaps,
        TrainConfig,
        Truncate,
    )
    from s2s_jax.errors import NotFiniteError, UserError
    from s2s_jax.library.loading import load
    from s2s_jax.library.log import Log, read_log
    from s2s_jax.library.ranker import Recommendations
    from s2s_jax.library.run import Evaluated, Run
    from s2s_jax.library.train import train

__all__ = [
    "ByTime",
    "Config",
    "Constant",
    "Cosine",
    "Crop",
    "EvalConfig",
    "Evaluated",
    "FeatureConfig",
    "IOConfig",
    "LRConfig",
    "LastEvents",
    "Linear",
    "Log",
    "LossConfig",
    "ModelConfig",
    "NotFiniteError",
    "Pack",
    "Recommendations",
    "Run",
    "TableConfig",
    "TimeGaps",
    "TrainConfig",
    "Truncate",
    "UserError",
    "__version__",
    "load",
    "read_log",
    "train",
]

# The modules of names that are not classes of the configuration.
_MODULES = {
    "NotFiniteError": "s2s_jax.errors",
    "UserError": "s2s_jax.errors",
    "load": "s2s_jax.library.loading",
    "Log": "s2s_jax.library.log",
    "read_log": "s2s_jax.library.log",
    "Recommendations": "s2s_jax.library.ranker",
    "Evaluated": "s2s_jax.library.run",
    "Run": "s2s_jax.library.run",
    # Nothing may import the module s2s_jax.train: it would replace the function of the same name.
    "train": "s2s_jax.library.train",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_MODULES[name] if name in _MODULES else "s2s_jax.config")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
