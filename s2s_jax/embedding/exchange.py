"""Rows of sharded tables: fetched from the devices that own them, and gradients brought back.

Everything here runs inside `jax.shard_map` over one mesh axis of n devices; shapes are those of one
device. Device d owns the contiguous rows `[d R/n, (d+1) R/n)` of every table. What a device wants of
an owner is a run of its unique rows, since these are sorted; runs travel through `all_to_all` in slices
of a fixed size, in as many rounds as the longest run needs. So nothing is lost however skewed the
runs are, and what travels is the rows that are used, whatever the number of devices.

Shapes: U unique rows asked by a device, n devices, C rows of a slice, W rows of a window,
R rows and D width of a table.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from s2s_jax.embedding import lookup
from s2s_jax.embedding.lookup import Arrays

# A round moves an eighth of what would be moved if every id of a batch had a row of its own, spread
# evenly: fewer slices would carry more padding, more would take longer to get going.
_SLICES = 8
# Bytes below which a single round (with room for uneven runs) is quicker whatever padding it carries.
_FEW_BYTES = 2**20
_ROOM = 1.25
# Rounds whose gradients are summed together: all, unless runs are very uneven.
_ROUNDS = 10
_NOWHERE = jnp.iinfo(jnp.int32).max
# Questions are small, so a round has room for runs that are twice as long as the mean, and for a few
# more where the mean is small.
_ROOM_FOR_QUESTIONS = 2
_MORE_QUESTIONS = 32

_Carry = TypeVar("_Carry")


class Asked(NamedTuple):
    """What a device wants of one table.

    Attributes:
      rows_U: int32 rows of the whole table, ascending and without repeats; unused places count on
        from R.
      begins_n1: int32 `[n + 1]`; what it wants of owner p begins at place `begins_n1[p]` and ends before
        `begins_n1[p + 1]`.
    """

    rows_U: jax.Array
    begins_n1: jax.Array


class Window(NamedTuple):
    """Rows that a device owns, each with the sum of all devices' gradients.

    Attributes:
      rows_W: int32 rows of the device's part of the table, ascending and without repeats; unused places
        count on from R/n.
      sums_WD: f32.
    """

    rows_W: jax.Array
    sums_WD: jax.Array


# Takes a carry and windows by table, returns the carry.
Visit: TypeAlias = Callable[[_Carry, dict[str, Window]], _Carry]


def ask(rows_U: jax.Array, table_rows: int, devices: int) -> Asked:
    """Finds the runs of each owner in the unique rows of `lookup.deduplicate`."""
    bounds = jnp.arange(devices + 1, dtype=jnp.int32) * (table_rows // devices)
    return Asked(rows_U, jnp.searchsorted(rows_U, bounds).astype(jnp.int32))


def fetch(tables: Mapping[str, jax.Array], asked: Mapping[str, Asked], axis: str) -> Arrays:
    """The rows that a device asked for, from all owners; tables of one width share the exchange.

    Args:
      tables: this device's part of each table, `[R/n, D]`.
      asked: what it wants of each.
      axis: the mesh axis.

    Returns:
      `[U, D]` for each table, zeros in unused places.
    """
    found: Arrays = {}
    for names in _by_width(tables).values():
        group = {name: tables[name] for name in names}
        found |= _fetch_group(group, {name: asked[name] for name in names}, axis)
    return found


def _fetch_group(tables: Arrays, asked: dict[str, Asked], axis: str) -> Arrays:
    devices = jax.lax.axis_size(axis)
    if devices == 1:
        return {name: lookup.gather(table, asked[name].rows_U) for name, table in tables.items()}
    slices = {n: _slice_rows(asked[n].rows_U, table, devices) for n, table in tables.items()}
    begins = {name: a.begins_n1[:-1] for name, a in asked.items()}
    ends = {name: a.begins_n1[1:] for name, a in asked.items()}
    rounds = _rounds_left(begins, ends, slices, axis)

    def one_round(state: tuple) -> tuple:
        number, found = state
        places = {
            name: _places(a.begins_n1[:-1] + number * slices[name], a.begins_n1[1:], slices[name])
            for name, a in asked.items()
        }
        wanted = {n: _at_owner(asked[n], places[n], tables[n].shape[0]) for n in tables}
        arrived = _split(_swap(_join(wanted), axis), slices)
        rows = {name: _gather(table, arrived[name]) for name, table in tables.items()}
        back = _split(_swap(_join(rows), axis), slices)
        return number + 1, {n: _put(found[n], places[n], back[n]) for n in tables}

    empty = {
        name: jax.lax.pcast(
            jnp.zeros((asked[name].rows_U.size, table.shape[1]), table.dtype), axis, to="varying"
        )
        for name, table in tables.items()
    }
    start = (jnp.zeros((), jnp.int32), empty)
    return jax.lax.while_loop(lambda state: state[0] < rounds, one_round, start)[1]


def query(
    asked_UC: jax.Array, begins_n1: jax.Array, fill: Any, answer: Any, carry: Any, axis: str
) -> tuple[Any, jax.Array]:
    """Asks the owners of ids, who may change what they hold, and brings back their answers.

    Args:
      asked_UC: C words for each id, the ids of each owner one after the other.
      begins_n1: as in `Asked`.
      fill: stands where nothing is asked.
      answer: `(carry, asked_VC) -> (carry, int32 [V])`, on the owner, for all devices' ids of a round.
      carry: what the owner holds.
      axis: the mesh axis.

    Returns:
      The carry and int32 `[U]` answers, -1 where nothing was asked.
    """
    devices = jax.lax.axis_size(axis)
    if devices == 1:
        return answer(carry, asked_UC)
    size, words = asked_UC.shape
    slice_rows, ends = _questions(size, devices), begins_n1[1:]
    rounds = query_rounds(size, begins_n1, axis)

    def one_round(state: tuple) -> tuple:
        number, carry, answer_U = state
        places = _places(begins_n1[:-1] + number * slice_rows, ends, slice_rows)
        sent = asked_UC.at[places.place].get(mode="clip")
        sent = jnp.where(places.valid[..., None], sent, jnp.asarray(fill, asked_UC.dtype))
        carry, answers = answer(carry, _swap(sent, axis).reshape(-1, words))
        back = _swap(answers.reshape(devices, slice_rows), axis)
        return number + 1, carry, _put(answer_U, places, back)

    nothing = jax.lax.pcast(jnp.full(size, -1, jnp.int32), axis, to="varying")
    start = (jnp.zeros((), jnp.int32), carry, nothing)
    return jax.lax.while_loop(lambda state: state[0] < rounds, one_round, start)[1:]


def query_rounds(size: int, begins_n1: jax.Array, axis: str) -> jax.Array:
    """Rounds that `query` takes for so many ids, the same on all devices."""
    longest = (begins_n1[1:] - begins_n1[:-1]).max()
    return jax.lax.pmax(-(-longest // _questions(size, jax.lax.axis_size(axis))), axis)


def _questions(size: int, devices: int) -> int:
    """Ids of which a device asks an owner in one round."""
    return min(size, math.ceil(_ROOM_FOR_QUESTIONS * size / devices) + _MORE_QUESTIONS)


def reduce(
    gradients: Mapping[str, jax.Array],
    asked: Mapping[str, Asked],
    local_rows: Mapping[str, int],
    visit: Visit[_Carry],
    carry: _Carry,
    axis: str,
) -> _Carry:
    """Brings gradients to the owners of their rows and sums them there, a window of rows at a time.

    Every device sends each owner its next rows, up to ten slices. If some run is longer, the owner takes
    the rows up to the least one at which what some device sent ends, because all gradients of these have
    come, and senders go on after it. So every row is in exactly one window, of a fixed size.

    Args:
      gradients: `[U, D]` of the rows asked for, by table.
      asked: what was asked.
      local_rows: R/n of each table.
      visit: called for each window: `(carry, {table: Window}) -> carry`.
      carry: its first value; arrays that differ between devices must already do so.
      axis: the mesh axis.
    """
    devices = jax.lax.axis_size(axis)
    if devices == 1:
        # Places outside the table may be ids without a row, whose gradients must not count anywhere.
        inside = {n: (asked[n].rows_U < local_rows[n])[:, None] for n in gradients}
        own = {n: jnp.where(inside[n], g, 0) for n, g in gradients.items()}
        return visit(carry, {n: Window(asked[n].rows_U, g) for n, g in own.items()})
    slices = {n: _slice_rows(asked[n].rows_U, g, devices) for n, g in gradients.items()}
    ends = {name: a.begins_n1[1:] for name, a in asked.items()}

    def one_window(state: tuple) -> tuple:
        left, begins, carry = state
        windows, following = {}, {}
        for names in _by_width(gradients).values():
            places = {n: _places(begins[n], ends[n], _ROUNDS * slices[n]) for n in names}
            sent = {n: _at_owner(asked[n], places[n], local_rows[n]) for n in names}
            values = {n: _take(gradients[n], places[n]) for n in names}
            sizes = {n: slices[n] for n in names}
            rounds = jnp.minimum(left, _ROUNDS)
            arrived = _send(sent, local_rows, sizes, rounds, axis)
            sums = _send(values, dict.fromkeys(names, 0), sizes, rounds, axis)
            # Where what is sent ends although the run goes on; nowhere, if all of it is sent.
            last = [
                jnp.where(
                    places[n].end > places[n].begin + sent[n].shape[1], sent[n][:, -1], _NOWHERE
                )
                for n in names
            ]
            complete = _swap(jnp.stack(last, axis=1), axis).min(axis=0)
            # Every sender learns how far each owner came.
            reached = jax.lax.all_gather(complete, axis)
            for i, n in enumerate(names):
                windows[n] = _sum(arrived[n], sums[n], complete[i], local_rows[n])
                taken = (sent[n] <= reached[:, i, None]) & places[n].valid
                following[n] = begins[n] + taken.sum(axis=1, dtype=jnp.int32)
        return _rounds_left(following, ends, slices, axis), following, visit(carry, windows)

    begins = {name: a.begins_n1[:-1] for name, a in asked.items()}
    start = (_rounds_left(begins, ends, slices, axis), begins, carry)
    return jax.lax.while_loop(lambda state: state[0] > 0, one_window, start)[2]


def _send(
    parts: Arrays, fill: Mapping[str, int], slices: Mapping[str, int], rounds: jax.Array, axis: str
) -> Arrays:
    """Sends `parts[p]` to device p, slice by slice; what comes in no round is `fill`."""

    def one_round(number: jax.Array, received: Arrays) -> Arrays:
        cut = {
            n: jax.lax.dynamic_slice_in_dim(part, number * slices[n], slices[n], axis=1)
            for n, part in parts.items()
        }
        arrived = _split(_swap(_join(cut), axis), slices)
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


class _Places(NamedTuple):
    """The next C places of each owner's run.

    Attributes:
      place: int32 `[n, C]`, places in `Asked.rows_U`.
      valid: bool `[n, C]`, whether they belong to the run.
      begin: int32 `[n]`.
      end: int32 `[n]`, of the run.
    """

    place: jax.Array
    valid: jax.Array
    begin: jax.Array
    end: jax.Array


def _places(begin_n: jax.Array, end_n: jax.Array, size: int) -> _Places:
    place_nC = begin_n[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    return _Places(place_nC, place_nC < end_n[:, None], begin_n, end_n)


def _at_owner(asked: Asked, places: _Places, local_rows: int) -> jax.Array:
    """int32 `[n, C]`: rows as their owners count them, R/n where there is none."""
    owner_n1 = jnp.arange(places.place.shape[0], dtype=jnp.int32)[:, None]
    rows_nC = asked.rows_U.at[places.place].get(mode="clip") - owner_n1 * local_rows
    return jnp.where(places.valid, rows_nC, local_rows)


def _take(values_UD: jax.Array, places: _Places) -> jax.Array:
    """`[n, C, D]` values of the places, zeros where there is none."""
    values_nCD = values_UD.at[places.place].get(mode="clip")
    return jnp.where(places.valid[..., None], values_nCD, 0)


def _put(values_UD: jax.Array, places: _Places, new_nCD: jax.Array) -> jax.Array:
    # Places that are not valid lie, each by itself, past the end.
    past_end = values_UD.shape[0] + jnp.arange(places.place.size).reshape(places.place.shape)
    index = jnp.where(places.valid, places.place, past_end)
    return values_UD.at[index].set(new_nCD, mode="drop", unique_indices=True)


def _gather(table_RD: jax.Array, rows: jax.Array) -> jax.Array:
    return table_RD.at[rows].get(mode="fill", fill_value=0)


def _sum(rows_nC: jax.Array, values_nCD: jax.Array, complete: jax.Array, local_rows: int) -> Window:
    """Adds up what several devices sent for the same rows, in the order of the devices."""
    usable_nC = (rows_nC <= complete) & (rows_nC < local_rows)
    rows_W = jnp.where(usable_nC, rows_nC, local_rows).reshape(-1)
    unique_W, place_W = jnp.unique(
        rows_W, size=rows_W.size, fill_value=local_rows, return_inverse=True
    )
    # Rows that come again in a later window must not count here.
    values_WD = jnp.where(usable_nC[..., None], values_nCD, 0).reshape(rows_W.size, -1)
    sums_WD = jnp.zeros_like(values_WD).at[place_W].add(values_WD)
    past_end_W = local_rows + jnp.arange(rows_W.size, dtype=rows_W.dtype)
    return Window(jnp.where(unique_W < local_rows, unique_W, past_end_W), sums_WD)


def _rounds_left(
    begins: Mapping[str, jax.Array],
    ends: Mapping[str, jax.Array],
    slices: Mapping[str, int],
    axis: str,
) -> jax.Array:
    """Rounds that the device with the longest run needs, the same on all devices."""
    left = [-(-(end - begins[n]).max() // slices[n]) for n, end in ends.items()]
    return jax.lax.pmax(jnp.stack(left).max(), axis)


def _slice_rows(rows_U: jax.Array, values: jax.Array, devices: int) -> int:
    """C: rows that travel to one owner in one round; `values` are rows of the table."""
    bytes_of_all = rows_U.size * values.shape[1] * values.dtype.itemsize
    slices = _SLICES if bytes_of_all >= _FEW_BYTES else 1 / _ROOM
    return math.ceil(rows_U.size / (slices * devices))


def _by_width(arrays: Mapping[str, jax.Array]) -> dict[tuple, list[str]]:
    """Names of the arrays that can travel together."""
    groups: dict[tuple, list[str]] = {}
    for name, array in arrays.items():
        groups.setdefault((array.shape[-1], array.dtype), []).append(name)
    return groups


def _swap(x: jax.Array, axis: str) -> jax.Array:
    """Sends `x[p]` to device p and returns what each device sent to this one."""
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)


def _join(parts: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.concatenate(list(parts.values()), axis=1)


def _split(joined: jax.Array, sizes: Mapping[str, int]) -> Arrays:
    parts, begin = {}, 0
    for name, size in sizes.items():
        parts[name] = joined[:, begin : begin + size]
        begin += size
    return parts
