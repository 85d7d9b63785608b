"""Sampled negatives in a step, and the correction for how often items come up.

Items are drawn on the host from (seed, step, device) alone, so a continued run draws the same.

Shapes: I items, S items of one device, n devices, B rows, L positions, C columns of ids.
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
    """The features of sampled negatives: those of items under other names, with the same tables."""
    return tuple(
        dataclasses.replace(f, name=PREFIX + f.name, shard_name=f.table_name)
        for f in items.item_side
    )


def split_ids(ids: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Splits ids by feature into those of events and those of negatives, without the prefix."""
    events = {name: x for name, x in ids.items() if not name.startswith(PREFIX)}
    drawn = {name.removeprefix(PREFIX): x for name, x in ids.items() if name.startswith(PREFIX)}
    return events, drawn


def with_log_q(
    pairs: Pairs, sampled: Sampled | None, batch: Batch, axis: str | None
) -> tuple[Sampled | None, jax.Array | None]:
    """Adds log q, the logarithm of how often a candidate is expected to come up.

    Args:
      pairs: the pairs of this device, with shares if the loss is corrected.
      sampled: candidates drawn from the catalogue; None if there are none.
      batch: the batch of this device, with the shares of sampled candidates.
      axis: inside `jax.shard_map`, the mesh axis over which all devices' pairs are candidates; None:
        only this device's pairs are.

    Returns:
      The sampled candidates with their log q, and the log q of the pairs' positives; None if the loss is
      not corrected.
    """
    if pairs.share_N is None:
        return sampled, None
    candidates = pairs.valid_N.sum(dtype=jnp.float32)
    candidates = candidates if axis is None else jax.lax.psum(candidates, axis)
    # A batch may have no pairs, but its logits must be finite.
    candidates = jnp.maximum(candidates, 1)
    drawn = 0.0
    if sampled is not None:
        drawn = len(sampled.vectors_CE) * batch[UNIFORM_SHARE].reshape(())
        share_C = batch[NEGATIVES_SHARE].reshape(-1)
        sampled = sampled._replace(log_q_C=jnp.log(candidates * share_C + drawn))
    return sampled, jnp.log(candidates * pairs.share_N + drawn)
