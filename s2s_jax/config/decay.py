"""The kinds of `lr.decay`."""

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The rates stay at their peaks."""

    kind: ClassVar = "constant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """The rates fall along a straight line."""

    kind: ClassVar = "linear"
    steps: int | None = None
    """Step at which the decay ends; None: the end of the run, as train_steps and train_epoch give it"""
    final_ratio: float = 0.0
    """The rates at the end of the decay, relative to their peaks"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """The rates fall along half a wave of the cosine."""

    kind: ClassVar = "cosine"
    steps: int | None = None
    """Step at which the decay ends; None: the end of the run, as train_steps and train_epoch give it"""
    final_ratio: float = 0.0
    """The rates at the end of the decay, relative to their peaks"""
