"""A growing table on a mesh: finds or claims the rows of a batch's ids at their owners.

Everything here runs inside `jax.shard_map` over one mesh axis of n devices; shapes are those of one
device.

Shapes: M places for ids, U = M unique ids of a device, V ids about which an owner is asked, C new ids
that are placed together, R rows and D width of the table.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2s_jax.embedding import id_keys, id_map
from s2s_jax.embedding.claiming import Policy, find_or_claim
from s2s_jax.embedding.id_keys import UniqueKeys
from s2s_jax.embedding.id_map import NO_ROW, IdMap
from s2s_jax.embedding.lookup import Arrays
from s2s_jax.embedding.owners import Answer, Held, ask_owners, rounds_of_asking
from s2s_jax.embedding.tables import NUM_SEGMENTS, TableSpec


class FoundRows(NamedTuple):
    """The rows of the unique ids of a device.

    Attributes:
      rows_U: int32, ascending and without repeats; ids without a row and unused places continue with R,
        R + 1, …
      places: int32 `[A, B, L, K]` for each feature of the table: indices of its ids in `rows_U`.
      keys_U2: keys of the ids.
      unknown_U: bool, whether an id has no row.
    """

    rows_U: jax.Array
    places: Arrays
    keys_U2: jax.Array
    unknown_U: jax.Array


class Rows(NamedTuple):
    """The contents of a table's rows.

    Attributes:
      values_RD: f32, the table.
      moments_RM: f32, moments of the optimizer, M = 2 D.
      averages_RA: f32, averages of the rows, A = D + 1; None if there are none.
    """

    values_RD: jax.Array
    moments_RM: jax.Array
    averages_RA: jax.Array | None = None


class _Questions(NamedTuple):
    """The questions of a device, and what it needs to answer the questions of others.

    Attributes:
      device: int32 scalar, number of the device.
      first_segment: int32 scalar, the first segment of the device.
      begins_n1: places of each owner's ids, see `exchange.Needed`.
      asked_U3: uint32, the two words of each id's key, and its count.
    """

    device: jax.Array
    first_segment: jax.Array
    begins_n1: jax.Array
    asked_U3: jax.Array


@dataclasses.dataclass(frozen=True)
class GrowingTable:
    """Finds the rows of ids, and gives rows to new ones.

    Attributes:
      spec: the table.
      policy: policy for new ids.
      seed: seed of initial rows.
      axis: the mesh axis.
      devices: n.
    """

    spec: TableSpec
    policy: Policy
    seed: int
    axis: str
    devices: int

    def unique_keys(self, ids: Arrays) -> UniqueKeys:
        """Keys of the ids of all features of the table: int32 words `[…, 2]` by feature."""
        words_M2 = jnp.concatenate([ids[name].reshape(-1, 2) for name in self.spec.features])
        words_M2 = jax.lax.bitcast_convert_type(words_M2, jnp.uint32)
        keys_M2 = jnp.stack(id_keys.keys_of(words_M2[:, 0], words_M2[:, 1]), axis=1)
        return id_keys.unique_keys(keys_M2)

    def find(self, unique: UniqueKeys, of_table: IdMap) -> jax.Array:
        """int32 `[U]` row of each key, `NO_ROW` if it has none.

        Args:
          unique: the keys.
          of_table: this device's part of the map.
        """
        return self._find(self._questions(unique), of_table)

    def claim(
        self, unique: UniqueKeys, of_table: IdMap, rows: Rows, step: jax.Array
    ) -> tuple[IdMap, Rows, jax.Array]:
        """Gives rows to new ids according to the policy, and finds the rows of all keys.

        Args:
          unique: the keys.
          of_table: this device's part of the map.
          rows: this device's part of the rows.
          step: int32, this step.

        Returns:
          The map, the rows, and the row of each key.
        """
        questions = self._questions(unique)
        if self.policy.evict and self.devices > 1:
            of_table = self._record_all_seen(questions, of_table, step)

        def answer(
            held: tuple[IdMap, Rows, jax.Array], asked_V3: jax.Array
        ) -> tuple[tuple[IdMap, Rows, jax.Array], jax.Array]:
            of_table, rows, moved = held
            keys_V2, count_V = asked_V3[:, :2], asked_V3[:, 2].astype(jnp.int32)
            number_V = jnp.arange(count_V.size, dtype=jnp.int32)
            asked = UniqueKeys(keys_V2, count_V, number_V)
            if self.devices > 1:
                asked = id_keys.unique_keys(keys_V2, count_V)
            claimed = find_or_claim(
                of_table,
                asked,
                questions.first_segment,
                step,
                self.policy,
                rows,
                self._with_new_rows,
            )
            held = claimed.id_map, claimed.attached, moved + claimed.moved
            return held, self._in_table(claimed.row_U[asked.place_M], questions.device)

        moved = jnp.zeros_like(of_table.rows_S[0])
        (of_table, rows, moved), row_U = self._ask(questions, answer, (of_table, rows, moved))
        # Some rows may have been found before they moved.
        row_U = jax.lax.cond(
            jax.lax.psum(moved, self.axis) > 0,
            lambda: self._find(questions, of_table),
            lambda: row_U,
        )
        return of_table, rows, row_U

    def found_rows(
        self, unique: UniqueKeys, row_U: jax.Array, ids: Mapping[str, jax.Array]
    ) -> FoundRows:
        """The rows of unique keys, in the order in which they can be fetched.

        Args:
          unique: the keys.
          row_U: int32 row of each key, `NO_ROW` if it has none.
          ids: the ids of the keys, see `unique_keys`.
        """
        rows = self.spec.rows
        number_U = jnp.arange(row_U.size, dtype=jnp.int32)
        rows_U, from_U = jax.lax.sort(
            (jnp.where(row_U >= 0, row_U, rows + number_U), number_U), num_keys=1
        )
        place_U = jnp.zeros_like(number_U).at[from_U].set(number_U, unique_indices=True)
        place_M = place_U[unique.place_M]
        places, begin = {}, 0
        for name in self.spec.features:
            shape = ids[name].shape[:-1]
            size = int(np.prod(shape))
            places[name] = place_M[begin : begin + size].reshape(shape)
            begin += size
        keys_U2 = unique.keys_U2[from_U]
        unknown_U = (rows_U >= rows) & id_keys.is_there(keys_U2)
        return FoundRows(rows_U, places, keys_U2, unknown_U)

    def initial_rows(self, keys_C2: jax.Array) -> jax.Array:
        """f32 `[C, D]`: initial rows of new ids."""
        seed = zlib.crc32(f"{self.seed} {self.spec.name}".encode())
        return id_keys.initial_rows(seed, self.spec.init_std, keys_C2, self.spec.emb_dim)

    def _questions(self, unique: UniqueKeys) -> _Questions:
        device = jax.lax.axis_index(self.axis)
        segments = NUM_SEGMENTS // self.devices
        first_segment = device * segments
        there_U = id_keys.is_there(unique.keys_U2)
        segment_U = jnp.where(there_U, id_keys.segment_of(unique.keys_U2), NUM_SEGMENTS)
        bounds = jnp.arange(self.devices + 1, dtype=jnp.int32) * segments
        begins_n1 = jnp.searchsorted(segment_U, bounds).astype(jnp.int32)
        asked_U3 = jnp.concatenate(
            [unique.keys_U2, unique.count_U[:, None].astype(jnp.uint32)], axis=1
        )
        return _Questions(device, first_segment, begins_n1, asked_U3)

    def _ask(
        self, questions: _Questions, answer: Answer[Held], held: Held
    ) -> tuple[Held, jax.Array]:
        return ask_owners(
            questions.asked_U3, questions.begins_n1, id_keys.EMPTY, answer, held, self.axis
        )

    def _find(self, questions: _Questions, of_table: IdMap) -> jax.Array:
        def answer(of_table: IdMap, asked_V3: jax.Array) -> tuple[IdMap, jax.Array]:
            row_V = id_map.find(of_table, asked_V3[:, :2], questions.first_segment)
            return of_table, self._in_table(row_V, questions.device)

        return self._ask(questions, answer, of_table)[1]

    def _record_all_seen(self, questions: _Questions, of_table: IdMap, step: jax.Array) -> IdMap:
        """If asking takes several rounds, records in the map that all ids occur in this step.

        This keeps new ids of one round from taking the rows of ids in a later round.
        """

        def answer(of_table: IdMap, asked_V3: jax.Array) -> tuple[IdMap, jax.Array]:
            of_table = id_map.record_seen(of_table, asked_V3[:, :2], questions.first_segment, step)
            return of_table, jnp.full(len(asked_V3), NO_ROW, jnp.int32)

        size = len(questions.asked_U3)
        return jax.lax.cond(
            rounds_of_asking(size, questions.begins_n1, self.axis) > 1,
            lambda of_table: self._ask(questions, answer, of_table)[0],
            lambda of_table: of_table,
            of_table,
        )

    def _in_table(self, row_V: jax.Array, device: jax.Array) -> jax.Array:
        """Turns rows of a device's part into rows of the whole table."""
        return jnp.where(row_V >= 0, row_V + device * (self.spec.rows // self.devices), NO_ROW)

    def _with_new_rows(self, rows: Rows, rows_C: jax.Array, keys_C2: jax.Array) -> Rows:
        """Writes the rows of new ids, see `claiming.MakeRows`."""
        new_CD = self.initial_rows(keys_C2)

        def zeros(x_R: jax.Array) -> jax.Array:
            no_C = jnp.zeros((rows_C.size, x_R.shape[1]), x_R.dtype)
            return x_R.at[rows_C].set(no_C, mode="drop", unique_indices=True)

        values_RD = rows.values_RD.at[rows_C].set(new_CD, mode="drop", unique_indices=True)
        others = rows.moments_RM, rows.averages_RA
        return Rows(values_RD, *jax.tree.map(zeros, others))
