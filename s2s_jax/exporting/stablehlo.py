"""Writes a tower as StableHLO, which JAX and other users of OpenXLA can run.

Shapes: B batch, L positions, D width of an embedded event, E model width.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import export

from s2s_jax.exporting.tower import Tower
from s2s_jax.training.step.params import Tree

# The platforms that can run a file.
PLATFORMS = ("cpu", "cuda")
_LINES = "jax_traceback_in_locations_limit"


def to_stablehlo(tower: Tower) -> bytes:
    """Return a tower with its parameters, as `jax.export` serializes it.

    The function takes f32 `events` `[B, L, D]` and int32 `length` `[B]` and returns f32 `[B, E]`, for
    any B and any L up to `model.seq_len`; see `Tower.users`. The same tower always gives the same bytes.

    Examples:
      >>> call = jax.jit(export.deserialize(data).call)  # doctest: +SKIP
      >>> call(events_BLD, length_B).shape  # doctest: +SKIP
      (1, 128)
    """
    with _no_source_lines():
        made = export.export(jax.jit(tower.users), platforms=PLATFORMS)(*_any_events(tower))
        return bytes(made.serialize())


def check_lowering(tower: Tower) -> None:
    """Lowers a tower for all platforms, as `to_stablehlo` does, without its parameters.

    Args:
      tower: a tower whose parameters may be shapes.
    """

    def users(dense: Tree, events_BLD: jax.Array, length_B: jax.Array) -> jax.Array:
        return dataclasses.replace(tower, dense=dense).users(events_BLD, length_B)

    export.export(jax.jit(users), platforms=PLATFORMS)(tower.dense, *_any_events(tower))


def _any_events(tower: Tower) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return the shapes of `[B, L, D]` events and `[B]` lengths, for any B and L."""
    users, events_len = export.symbolic_shape("B, L", constraints=[f"L <= {tower.model.seq_len}"])
    events_BLD = jax.ShapeDtypeStruct((users, events_len, tower.width), jnp.float32)
    return events_BLD, jax.ShapeDtypeStruct((users,), jnp.int32)


@contextlib.contextmanager
def _no_source_lines() -> Iterator[None]:
    """Leaves source lines out of programs: paths of this machine, which differ from call to call."""
    limit = getattr(jax.config, _LINES)
    jax.config.update(_LINES, 0)
    try:
        yield
    finally:
        jax.config.update(_LINES, limit)
