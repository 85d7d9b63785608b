"""Decides which checkpoints of a run are kept."""

from collections.abc import Mapping, Sequence

import orbax.checkpoint as ocp


class NewestAndBest:
    """A policy for Orbax: keeps the newest checkpoints, and the best known one.

    Attributes:
      evaluations: the quality of evaluated states, by step; higher is better.
    """

    def __init__(self, newest: int | None):
        """Makes a policy that keeps the best and this many of the newest checkpoints; None keeps all."""
        self._newest = newest
        self.evaluations: Mapping[int, float] = {}

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        """Called by Orbax with all checkpoints, in ascending order of steps."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self.kept(steps)
        return [step in kept for step in steps]

    def kept(self, steps: Sequence[int]) -> set[int]:
        """The steps that are kept of some, in ascending order."""
        kept = set(steps if self._newest is None else steps[-self._newest :])
        evaluated = [step for step in steps if step in self.evaluations]
        if evaluated:
            # Of equally good ones, the first is kept, as in `training.evaluations`.
            kept.add(max(evaluated, key=lambda step: (self.evaluations[step], -step)))
        return kept
