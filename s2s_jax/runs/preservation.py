"""Which checkpoints of a run are kept."""

from collections.abc import Mapping, Sequence
from typing import Any


class NewestAndBest:
    """Which checkpoints Orbax keeps: the newest, and the best as far as it is known.

    Attributes:
      evaluations: how good the states of some steps are.
    """

    def __init__(self, newest: int | None):
        """Args: how many of the newest are kept; None: all."""
        self._newest = newest
        self.evaluations: Mapping[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax' question, about all checkpoints by rising step."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps if self._newest is None else steps[-self._newest :])
        evaluated = [step for step in steps if step in self.evaluations]
        if evaluated:
            # Of equals the first, as `training.evaluations` has it.
            kept.add(max(evaluated, key=lambda step: (self.evaluations[step], -step)))
        return [step in kept for step in steps]
