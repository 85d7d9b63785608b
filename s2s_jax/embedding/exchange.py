"""Fetches rows of sharded tables from the devices that own them, and sends gradients back.

Everything here runs inside `jax.shard_map` over one mesh axis of n devices; shapes are those of one
device. Device d owns the contiguous rows `[d R/n, (d+1) R/n)` of every table. The unique rows of a
device are sorted, so the rows that it needs from an owner are consecutive. They are sent with
`all_to_all` in slices of a fixed size, in as many rounds as the device with the most rows for one owner
needs. So nothing is lost, however uneven these numbers are, and only rows that are used are sent, for
any number of devices.

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

# Gradients of up to this many rounds are summed together: usually all, unless a device needs very many
# rows of one owner.
_ROUNDS = 10
_NOWHERE = jnp.iinfo(jnp.int32).max

_Carry = TypeVar("_Carry")


class Needed(NamedTuple):
    """The rows of one table that a device needs.

    Attributes:
      rows_U: int32 rows of the whole table, ascending and without repeats; unused places continue with
        R, R + 1, …
      begins_n1: int32 `[n + 1]`; the rows of owner p are at places `begins_n1[p]` to
        `begins_n1[p + 1] - 1`.
    """

    rows_U: jax.Array
    begins_n1: jax.Array


class RowGradients(NamedTuple):
    """Rows that a device owns, each with the sum of all devices' gradients.

    Attributes:
      rows_G: int32 rows of the device's part of the table, ascending and without repeats; unused places
        continue with R/n, R/n + 1, …
      sums_GD: f32 sums of gradients.
    """

    rows_G: jax.Array
    sums_GD: jax.Array


# Takes a carry and gradients by table, and returns the new carry.
Visit: TypeAlias = Callable[[_Carry, dict[str, RowGradients]], _Carry]


def by_owner(rows_U: jax.Array, table_rows: int, devices: int) -> Needed:
    """Finds the rows of each owner among the unique rows of `lookup.deduplicate`."""
    bounds = jnp.arange(devices + 1, dtype=jnp.int32) * (table_rows // devices)
    return Needed(rows_U, jnp.searchsorted(rows_U, bounds).astype(jnp.int32))


def fetch(tables: Mapping[str, jax.Array], needed: Mapping[str, Needed], axis: str) -> Arrays:
    """Fetches the rows that a device needs from all owners; tables of the same width share the exchange.

    Args:
      tables: this device's part of each table, `[R/n, D]`.
      needed: the rows that it needs of each table.
      axis: the mesh axis.

    Returns:
      `[U, D]` for each table, with zeros in unused places.
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
    """Sends gradients to the owners of their rows and sums them there, some of the rows at a time.

    Every device sends each owner its next rows, up to ten slices. If a device has more rows for an
    owner, this owner only takes rows up to the smallest row at which some device's part ends, because
    all gradients of these rows have arrived; senders then continue after that row. So every row is
    visited exactly once, in arrays of a fixed size.

    Args:
      gradients: `[U, D]` of the rows that were fetched, by table.
      needed: these rows.
      local_rows: R/n of each table.
      visit: called each time: `(carry, {table: RowGradients}) -> carry`.
      carry: initial carry; arrays that will vary over devices must already be marked as varying.
      axis: the mesh axis.
    """
    devices = jax.lax.axis_size(axis)
    if devices == 1:
        # Places outside the table may be ids without a row, whose gradients must not count.
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
    """Sums gradients of some rows of tables of the same width; also returns where each device continues.

    Args:
      gradients: `[U, D]`.
      sent: int32 `[n, C]`, rows as numbered by their owners.
      places: places of these rows among all rows of a device.
      local_rows: R/n of each table.
      slices: number of rows sent per round.
      left: int32 scalar, number of rounds left.
      axis: the mesh axis.
    """
    values = {n: take(g, places[n]) for n, g in gradients.items()}
    rounds = jnp.minimum(left, _ROUNDS)
    arrived = _send(sent, local_rows, slices, rounds, axis)
    sums = _send(values, dict.fromkeys(gradients, 0), slices, rounds, axis)
    # The row at which a device's part ends although it has more for this owner; no row if it sends all.
    last = [
        jnp.where(places[n].end > places[n].begin + sent[n].shape[1], sent[n][:, -1], _NOWHERE)
        for n in gradients
    ]
    complete = swap(jnp.stack(last, axis=1), axis).min(axis=0)
    # Tells every sender how far each owner got.
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
    """Sends `parts[p]` to device p, slice by slice; places that no round sends are `fill`."""

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
    """int32 `[n, C]`: rows as numbered by their owners; R/n for no row."""
    owner_n1 = jnp.arange(places.place.shape[0], dtype=jnp.int32)[:, None]
    rows_nC = needed.rows_U.at[places.place].get(mode="clip") - owner_n1 * local_rows
    return jnp.where(places.valid, rows_nC, local_rows)


def _sum(
    rows_nC: jax.Array, values_nCD: jax.Array, complete: jax.Array, local_rows: int
) -> RowGradients:
    """Sums what several devices sent for the same rows, in the order of the devices."""
    usable_nC = (rows_nC <= complete) & (rows_nC < local_rows)
    rows_G = jnp.where(usable_nC, rows_nC, local_rows).reshape(-1)
    unique_G, place_G = jnp.unique(
        rows_G, size=rows_G.size, fill_value=local_rows, return_inverse=True
    )
    # Rows that will be sent again later must not count here.
    values_GD = jnp.where(usable_nC[..., None], values_nCD, 0).reshape(rows_G.size, -1)
    sums_GD = jnp.zeros_like(values_GD).at[place_G].add(values_GD)
    past_end_G = local_rows + jnp.arange(rows_G.size, dtype=rows_G.dtype)
    return RowGradients(jnp.where(unique_G < local_rows, unique_G, past_end_G), sums_GD)
