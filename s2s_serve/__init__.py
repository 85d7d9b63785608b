"""Answers "what next?" from an export of s2s_jax, without JAX.

import s2s_serve

model = s2s_serve.load("exports/shop")
for answer in model.recommend([{"item_id": [17, 4, 11], ...}], k=10):
    print(answer.items, answer.scores, answer.unknown)
"""

import importlib
import os
from typing import TYPE_CHECKING

from s2s_serve.errors import UnknownItemError, UserError

if TYPE_CHECKING:
    from s2s_serve.model import Model, Recommendation, Similar, load

# Unless this is set before they are imported, official builds of ONNX Runtime report to Microsoft which
# models they run.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["Model", "Recommendation", "Similar", "UnknownItemError", "UserError", "load"]


def __getattr__(name: str) -> object:
    # Training imports the encoding alone.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("s2s_serve.model"), name)
    globals()[name] = value
    return value
