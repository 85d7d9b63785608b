"""Sampled negatives in a step, and log-Q, the correction for the frequency of negatives.

`training.item_source` draws the items on the host.

Shapes: N pairs of a device, C candidates drawn from the catalogue, E model width.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from s2s_jax.config import FeatureConfig
from s2s_jax.config.settings import Items
from s2s_jax.model.loss import Pairs, Sampled
from s2s_jax.training.step.batches import NEGATIVES_SHARE, UNIFORM_SHARE, Batch

PREFIX = "negatives:"


def negative_features(items: Items) -> tuple[FeatureConfig, ...]:
    """Return the features of sampled negatives: those of items, with other names and the same tables."""
    return tuple(
        dataclasses.replace(f, name=PREFIX + f.name, shard_name=f.table_name)
        for f in items.item_side
    )


def split_ids(ids: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Split ids into those of events and those of negatives, both by the names of event features."""
    events = {name: x for name, x in ids.items() if not name.startswith(PREFIX)}
    drawn = {name.removeprefix(PREFIX): x for name, x in ids.items() if name.startswith(PREFIX)}
    return events, drawn


def with_log_q(
    pairs: Pairs, sampled: Sampled | None, batch: Batch, axis: str | None
) -> tuple[Sampled | None, jax.Array | None]:
    """Add log q: the logarithm of the expected number of times that a candidate is a negative.

    Args:
      pairs: the pairs of this device, with shares if the loss is corrected.
      sampled: the candidates drawn from the catalogue; None if there are none.
      batch: the batch of this device, with the shares of sampled candidates.
      axis: the mesh axis of `jax.shard_map` if the targets of all devices are candidates; None if only
        those of this device are.

    Returns:
      The sampled candidates with their log q, and the log q of the targets of pairs; the latter is None
      if the loss is not corrected.
    """
    if pairs.share_N is None:
        return sampled, None
    candidates = pairs.valid_N.sum(dtype=jnp.float32)
    candidates = candidates if axis is None else jax.lax.psum(candidates, axis)
    # Logits must be finite even if a batch has no pairs.
    candidates = jnp.maximum(candidates, 1)
    drawn = 0.0
    if sampled is not None:
        drawn = len(sampled.vectors_CE) * batch[UNIFORM_SHARE].reshape(())
        share_C = batch[NEGATIVES_SHARE].reshape(-1)
        sampled = sampled._replace(log_q_C=jnp.log(candidates * share_C + drawn))
    return sampled, jnp.log(candidates * pairs.share_N + drawn)
