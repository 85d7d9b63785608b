"""Asks the devices that own ids about them; owners may change their state before they answer.

Runs inside `jax.shard_map` over one mesh axis of n devices, like `exchange`.

Shapes: U unique ids of a device, C words of a question, V ids about which an owner is asked.
"""

import math
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.embedding.id_map import NO_ROW
from s2s_jax.embedding.slices import places_from, put, swap

# Questions are small, so a round has room for twice the mean number per owner, and for a few more if the
# mean is small.
_ROOM = 2
_MORE = 32

Held = TypeVar("Held")
# `(held, asked_VC) -> (held, int32 [V])`, on the owner, which may change its state.
Answer: TypeAlias = Callable[[Held, jax.Array], tuple[Held, jax.Array]]


def ask_owners(
    asked_UC: jax.Array,
    begins_n1: jax.Array,
    fill: np.uint32,
    answer: Answer[Held],
    held: Held,
    axis: str,
) -> tuple[Held, jax.Array]:
    """Asks the owners of ids and returns their answers.

    Args:
      asked_UC: C words for each id; the ids of each owner are consecutive.
      begins_n1: places of each owner's ids, see `exchange.Needed`.
      fill: value of places without a question.
      answer: called in each round with the questions of all devices.
      held: state of the owner.
      axis: the mesh axis.

    Returns:
      The new state of the owner, and int32 `[U]` answers, `NO_ROW` for places without a question.
    """
    devices = jax.lax.axis_size(axis)
    if devices == 1:
        return answer(held, asked_UC)
    size, words = asked_UC.shape
    slice_rows, ends = _questions(size, devices), begins_n1[1:]
    rounds = rounds_of_asking(size, begins_n1, axis)

    def one_round(
        state: tuple[jax.Array, Held, jax.Array],
    ) -> tuple[jax.Array, Held, jax.Array]:
        number, held, answer_U = state
        places = places_from(begins_n1[:-1] + number * slice_rows, ends, slice_rows)
        sent = asked_UC.at[places.place].get(mode="clip")
        sent = jnp.where(places.valid[..., None], sent, jnp.asarray(fill, asked_UC.dtype))
        held, answers = answer(held, swap(sent, axis).reshape(-1, words))
        back = swap(answers.reshape(devices, slice_rows), axis)
        return number + 1, held, put(answer_U, places, back)

    nothing = jax.lax.pcast(jnp.full(size, NO_ROW, jnp.int32), axis, to="varying")
    start = (jnp.zeros((), jnp.int32), held, nothing)
    _, held, answer_U = jax.lax.while_loop(lambda state: state[0] < rounds, one_round, start)
    return held, answer_U


def rounds_of_asking(size: int, begins_n1: jax.Array, axis: str) -> jax.Array:
    """Number of rounds that `ask_owners` needs for `size` ids, the same on all devices."""
    longest = (begins_n1[1:] - begins_n1[:-1]).max()
    return jax.lax.pmax(-(-longest // _questions(size, jax.lax.axis_size(axis))), axis)


def _questions(size: int, devices: int) -> int:
    """Number of ids about which a device asks an owner in one round."""
    return min(size, math.ceil(_ROOM * size / devices) + _MORE)
