"""Rows of sharded tables: fetched from the devices that own them, and gradients brought back.

Everything here runs inside `jax.shard_map` over one mesh axis of n devices; shapes are those of one
device. Device d owns the contiguous rows `[d R/n, (d+1) R/n)` of every table. What a device needs of an
owner lies together in its unique rows, since these are sorted; it travels through `all_to_all` in slices
of a fixed size, in as many rounds as the device with the most rows for one owner needs. So nothing is
lost however uneven these numbers are, and what travels is the rows that are used, whatever the number of
devices.

Shapes: U unique rows of a device, n devices, C rows of a slice, G rows whose gradients are summed
together, R rows and D width of a table.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from s2s_jax.embedding.lookup import Arrays, read_rows
from s2s_jax.embedding.slices import (
    Places,
    by_width,
    places_from,
    put,
    rounds_left,
    slice_rows,
    swap,
    swap_together,
    take,
)

# Rounds whose gradients are summed together: all, unless some owner has very many of a device's rows.
_ROUNDS = 10
_NOWHERE = jnp.iinfo(jnp.int32).max

_Carry = TypeVar("_Carry")


class Needed(NamedTuple):
    """What a device needs of one table.

    Attributes:
      rows_U: int32 rows of the whole table, ascending and without repeats; unused places count on
        from R.
      begins_n1: int32 `[n + 1]`; what it needs of owner p begins at place `begins_n1[p]` and ends before
        `begins_n1[p + 1]`.
    """

    rows_U: jax.Array
    begins_n1: jax.Array


class RowGradients(NamedTuple):
    """Rows that a device owns, each with the sum of all devices' gradients.

    Attributes:
      rows_G: int32 rows of the device's part of the table, ascending and without repeats; unused places
        count on from R/n.
      sums_GD: f32.
    """

    rows_G: jax.Array
    sums_GD: jax.Array


# Takes a carry and gradients by table, returns the carry.
Visit: TypeAlias = Callable[[_Carry, dict[str, RowGradients]], _Carry]


def by_owner(rows_U: jax.Array, table_rows: int, devices: int) -> Needed:
    """Finds what is of each owner in the unique rows of `lookup.deduplicate`."""
    bounds = jnp.arange(devices + 1, dtype=jnp.int32) * (table_rows // devices)
    return Needed(rows_U, jnp.searchsorted(rows_U, bounds).astype(jnp.int32))


def fetch(tables: Mapping[str, jax.Array], needed: Mapping[str, Needed], axis: str) -> Arrays:
    """The rows that a device needs, from all owners; tables of one width share the exchange.

    Args:
      tables: this device's part of each table, `[R/n, D]`.
      needed: what it needs of each.
      axis: the mesh axis.

    Returns:
      `[U, D]` for each table, zeros in unused places.
    """
    fetched: Arrays = {}
    for names in by_width(tables):
        group = {name: tables[name] for name in names}
        fetched |= _fetch_group(group, {name: needed[name] for name in names}, axis)
    return fetched


def _fetch_group(tables: Arrays, needed: dict[str, Needed], axis: str) -> Arrays:
    devices = jax.lax.axis_size(axis)
    if devices == 1:
        return {name: read_rows(table, needed[name].rows_U) for name, table in tables.items()}
    slices = {n: slice_rows(needed[n].rows_U, table, devices) for n, table in tables.items()}
    begins = {name: each.begins_n1[:-1] for name, each in needed.items()}
    ends = {name: each.begins_n1[1:] for name, each in needed.items()}
    rounds = rounds_left(begins, ends, slices, axis)

    def one_round(state: tuple[jax.Array, Arrays]) -> tuple[jax.Array, Arrays]:
        number, fetched = state
        places = {
            name: places_from(
                each.begins_n1[:-1] + number * slices[name], each.begins_n1[1:], slices[name]
            )
            for name, each in needed.items()
        }
        wanted = {n: _at_owner(needed[n], places[n], tables[n].shape[0]) for n in tables}
        arrived = swap_together(wanted, axis)
        rows = {
            name: table.at[arrived[name]].get(mode="fill", fill_value=0)
            for name, table in tables.items()
        }
        back = swap_together(rows, axis)
        return number + 1, {n: put(fetched[n], places[n], back[n]) for n in tables}

    empty = {
        name: jax.lax.pcast(
            jnp.zeros((needed[name].rows_U.size, table.shape[1]), table.dtype), axis, to="varying"
        )
        for name, table in tables.items()
    }
    start = (jnp.zeros((), jnp.int32), empty)
    return jax.lax.while_loop(lambda state: state[0] < rounds, one_round, start)[1]


def reduce(
    gradients: Mapping[str, jax.Array],
    needed: Mapping[str, Needed],
    local_rows: Mapping[str, int],
    visit: Visit[_Carry],
    carry: _Carry,
    axis: str,
) -> _Carry:
    """Brings gradients to the owners of their rows and sums them there, some of the rows at a time.

    Every device sends each owner its next rows, up to ten slices. If it has more for some owner, that
    owner takes the rows up to the least one at which what some device sent ends, because all gradients
    of these have come, and senders go on after it. So every row is visited exactly once, in arrays of a
    fixed size.

    Args:
      gradients: `[U, D]` of the rows that were fetched, by table.
      needed: which these were.
      local_rows: R/n of each table.
      visit: called each time: `(carry, {table: RowGradients}) -> carry`.
      carry: its first value; arrays that differ between devices must already do so.
      axis: the mesh axis.
    """
    devices = jax.lax.axis_size(axis)
    if devices == 1:
        # Places outside the table may be ids without a row, whose gradients must not count anywhere.
        inside = {n: (needed[n].rows_U < local_rows[n])[:, None] for n in gradients}
        own = {n: jnp.where(inside[n], g, 0) for n, g in gradients.items()}
        return visit(carry, {n: RowGradients(needed[n].rows_U, g) for n, g in own.items()})
    slices = {n: slice_rows(needed[n].rows_U, g, devices) for n, g in gradients.items()}
    ends = {name: each.begins_n1[1:] for name, each in needed.items()}

    def some_rows(state: tuple[jax.Array, Arrays, _Carry]) -> tuple[jax.Array, Arrays, _Carry]:
        left, begins, carry = state
        summed: dict[str, RowGradients] = {}
        following: Arrays = {}
        for names in by_width(gradients):
            group = {n: gradients[n] for n in names}
            places = {n: places_from(begins[n], ends[n], _ROUNDS * slices[n]) for n in names}
            sent = {n: _at_owner(needed[n], places[n], local_rows[n]) for n in names}
            sizes = {n: slices[n] for n in names}
            sums, after = _sum_group(group, sent, places, local_rows, sizes, left, axis)
            summed |= sums
            following |= after
        return rounds_left(following, ends, slices, axis), following, visit(carry, summed)

    begins = {name: each.begins_n1[:-1] for name, each in needed.items()}
    start = (rounds_left(begins, ends, slices, axis), begins, carry)
    return jax.lax.while_loop(lambda state: state[0] > 0, some_rows, start)[2]


def _sum_group(
    gradients: Arrays,
    sent: Arrays,
    places: dict[str, Places],
    local_rows: Mapping[str, int],
    slices: Mapping[str, int],
    left: jax.Array,
    axis: str,
) -> tuple[dict[str, RowGradients], Arrays]:
    """Sums of the gradients of some rows of tables of one width, and where each device goes on.

    Args:
      gradients: `[U, D]`.
      sent: int32 `[n, C]` the rows as their owners count them.
      places: of these rows among all of a device.
      local_rows: R/n of each table.
      slices: rows that travel in a round.
      left: int32 scalar, rounds that are left to take.
      axis: the mesh axis.
    """
    values = {n: take(g, places[n]) for n, g in gradients.items()}
    rounds = jnp.minimum(left, _ROUNDS)
    arrived = _send(sent, local_rows, slices, rounds, axis)
    sums = _send(values, dict.fromkeys(gradients, 0), slices, rounds, axis)
    # Where what is sent ends although there is more for that owner; nowhere, if all of it is sent.
    last = [
        jnp.where(places[n].end > places[n].begin + sent[n].shape[1], sent[n][:, -1], _NOWHERE)
        for n in gradients
    ]
    complete = swap(jnp.stack(last, axis=1), axis).min(axis=0)
    # Every sender learns how far each owner came.
    reached = jax.lax.all_gather(complete, axis)
    summed, following = {}, {}
    for i, n in enumerate(gradients):
        summed[n] = _sum(arrived[n], sums[n], complete[i], local_rows[n])
        taken = (sent[n] <= reached[:, i, None]) & places[n].valid
        following[n] = places[n].begin + taken.sum(axis=1, dtype=jnp.int32)
    return summed, following


def _send(
    parts: Arrays, fill: Mapping[str, int], slices: Mapping[str, int], rounds: jax.Array, axis: str
) -> Arrays:
    """Sends `parts[p]` to device p, slice by slice; what comes in no round is `fill`."""

    def one_round(number: jax.Array, received: Arrays) -> Arrays:
        cut = {
            n: jax.lax.dynamic_slice_in_dim(part, number * slices[n], slices[n], axis=1)
            for n, part in parts.items()
        }
        arrived = swap_together(cut, axis)
        return {
            n: jax.lax.dynamic_update_slice_in_dim(
                received[n], arrived[n], number * slices[n], axis=1
            )
            for n in parts
        }

    empty = {
        n: jax.lax.pcast(jnp.full(part.shape, fill[n], part.dtype), axis, to="varying")
        for n, part in parts.items()
    }
    return jax.lax.fori_loop(0, rounds, one_round, empty)


def _at_owner(needed: Needed, places: Places, local_rows: int) -> jax.Array:
    """int32 `[n, C]`: rows as their owners count them, R/n where there is none."""
    owner_n1 = jnp.arange(places.place.shape[0], dtype=jnp.int32)[:, None]
    rows_nC = needed.rows_U.at[places.place].get(mode="clip") - owner_n1 * local_rows
    return jnp.where(places.valid, rows_nC, local_rows)


def _sum(
    rows_nC: jax.Array, values_nCD: jax.Array, complete: jax.Array, local_rows: int
) -> RowGradients:
    """Adds up what several devices sent for the same rows, in the order of the devices."""
    usable_nC = (rows_nC <= complete) & (rows_nC < local_rows)
    rows_G = jnp.where(usable_nC, rows_nC, local_rows).reshape(-1)
    unique_G, place_G = jnp.unique(
        rows_G, size=rows_G.size, fill_value=local_rows, return_inverse=True
    )
    # Rows that come again later must not count here.
    values_GD = jnp.where(usable_nC[..., None], values_nCD, 0).reshape(rows_G.size, -1)
    sums_GD = jnp.zeros_like(values_GD).at[place_G].add(values_GD)
    past_end_G = local_rows + jnp.arange(rows_G.size, dtype=rows_G.dtype)
    return RowGradients(jnp.where(unique_G < local_rows, unique_G, past_end_G), sums_GD)
