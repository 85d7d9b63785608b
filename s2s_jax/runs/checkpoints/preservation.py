"""Decides which checkpoints of a run are kept."""

from collections.abc import Mapping, Sequence
from typing import Any


class NewestAndBest:
    """A policy for Orbax: keeps the newest checkpoints, and the best known one.

    Attributes:
      evaluations: the quality of states, by step.
    """

    def __init__(self, newest: int | None):
        """Args: newest is the number of newest checkpoints to keep; None: all."""
        self._newest = newest
        self.evaluations: Mapping[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Called by Orbax with all checkpoints, in ascending order of steps."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps if self._newest is None else steps[-self._newest :])
        evaluated = [step for step in steps if step in self.evaluations]
        if evaluated:
            # The first of equals, as in `training.evaluations`.
            kept.add(max(evaluated, key=lambda step: (self.evaluations[step], -step)))
        return [step in kept for step in steps]
