"""Writes a tower as StableHLO, which JAX and other users of OpenXLA can run.

Shapes: B batch, L positions, D width of an embedded event, E model width.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import export

from s2s_jax.export.tower import Tower

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
    users, events_len = export.symbolic_shape("B, L", constraints=[f"L <= {tower.model.seq_len}"])
    events_BLD = jax.ShapeDtypeStruct((users, events_len, tower.width), jnp.float32)
    length_B = jax.ShapeDtypeStruct((users,), jnp.int32)
    with _no_source_lines():
        made = export.export(jax.jit(tower.users), platforms=PLATFORMS)(events_BLD, length_B)
        return bytes(made.serialize())


@contextlib.contextmanager
def _no_source_lines() -> Iterator[None]:
    """Leaves source lines out of programs: paths of this machine, which differ from call to call."""
    limit = getattr(jax.config, _LINES)
    jax.config.update(_LINES, 0)
    try:
        yield
    finally:
        jax.config.update(_LINES, limit)
