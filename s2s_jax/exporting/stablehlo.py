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

    The function takes f32 `events` `[B, L, D]`, int32 `length` `[B]` and, if the tower is timed, int32
    `times` `[B, L]`. It returns f32 `[B, E]`, for any B and any L up to `model.seq_len`; see
    `Tower.users`. The same tower always gives the same bytes.

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

    def users(dense: Tree, *of_events: jax.Array) -> jax.Array:
        return dataclasses.replace(tower, dense=dense).users(*of_events)

    export.export(jax.jit(users), platforms=PLATFORMS)(tower.dense, *_any_events(tower))


def _any_events(tower: Tower) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shapes of `[B, L, D]` events, `[B]` lengths and `[B, L]` times, for any B and L."""
    users, events_len = export.symbolic_shape("B, L", constraints=[f"L <= {tower.model.seq_len}"])
    events_BLD = jax.ShapeDtypeStruct((users, events_len, tower.width), jnp.float32)
    length_B = jax.ShapeDtypeStruct((users,), jnp.int32)
    time_BL = jax.ShapeDtypeStruct((users, events_len), jnp.int32)
    return (events_BLD, length_B, time_BL) if tower.timed else (events_BLD, length_B)


@contextlib.contextmanager
def _no_source_lines() -> Iterator[None]:
    """Leaves source lines out of programs: paths of this machine, which differ from call to call."""
    limit = getattr(jax.config, _LINES)
    jax.config.update(_LINES, 0)
    try:
        yield
    finally:
        jax.config.update(_LINES, limit)
