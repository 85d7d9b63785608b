"""Reads the tables of a checkpoint one at a time, into the memory of this host."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from s2s_jax.embedding.id_map import IdMap, empty_map
from s2s_jax.embedding.row_averages import averaged
from s2s_jax.embedding.tables import NUM_SEGMENTS, TableSpec
from s2s_jax.errors import UserError
from s2s_jax.runs.checkpoints.compatibility import of_known_format
from s2s_jax.runs.checkpoints.files import LocalCheckpoint, complete_steps
from s2s_jax.runs.checkpoints.one_error import one_error
from s2s_jax.runs.checkpoints.restore_errors import explained, total_bytes
from s2s_jax.runs.checkpoints.saved_array import SavedArray, keys_of_arrays
from s2s_serve.storage.address import Place


class TablePart(NamedTuple):
    """Consecutive rows of a table.

    Attributes:
      values_RD: f32, the vectors.
      keys_R2: uint32, the keys of the rows' ids in a growing table; None for a bucket table.
      touched_R: bool, whether a row was ever trained; None if moments were not read.
    """

    values_RD: np.ndarray
    keys_R2: np.ndarray | None
    touched_R: np.ndarray | None


class Averaging(NamedTuple):
    """What the averages of a checkpoint depend on.

    Attributes:
      decay: `lr.average_decay` of the run.
      step: the step of the checkpoint.
    """

    decay: float
    step: int

    def rows(self, values_RD: np.ndarray, averages_RA: np.ndarray) -> np.ndarray:
        """Return f32 `[R, D]`: the averages of rows, see `row_averages.averaged`."""
        of_rows = jnp.asarray(values_RD), jnp.asarray(averages_RA)
        return np.asarray(averaged(self.decay, *of_rows, self.step))


class SavedAverages(NamedTuple):
    """The stored averages of a table.

    Attributes:
      of: what they depend on.
      array: f32 `[R, D + 1]`.
    """

    of: Averaging
    array: SavedArray


class TableParts(NamedTuple):
    """A reader of a table, see `SavedTables.in_parts`.

    Attributes:
      values: the vectors.
      averages: the averages of the vectors; None if the vectors themselves are read.
      keys: the keys of the rows' ids; None for a bucket table.
      moments: the moments of the optimizer; None if they are not read.
      rows_S: int64, the number of used rows of each segment.
      explaining: turns failures to read into errors that users understand.
    """

    values: SavedArray
    averages: "SavedAverages | None"
    keys: SavedArray | None
    moments: SavedArray | None
    rows_S: np.ndarray
    explaining: Callable[[object], contextlib.AbstractContextManager[None]]

    def read(self, begin: int, stop: int, at_once: int) -> Iterator[TablePart]:
        """Yields the rows of segments `begin` to `stop - 1`, about `at_once` rows at a time.

        The segments of a growing table are not divided.
        """
        segment_rows = self.values.shape[0] // len(self.rows_S)
        if self.keys is not None:
            at_once = max(at_once // segment_rows, 1) * segment_rows
        last = stop * segment_rows
        for first in range(begin * segment_rows, last, at_once):
            rows = first, min(first + at_once, last)
            with self.explaining(None):
                values_RD = self.values.read(*rows)
                if self.averages is not None:
                    stored_RA = self.averages.array.read(*rows)
                    values_RD = self.averages.of.rows(values_RD, stored_RA)
                keys_R2 = None if self.keys is None else self.keys.read(*rows)
                touched_R = None
                if self.moments is not None:
                    # The moments of a trained row never become zero again.
                    touched_R = (self.moments.read(*rows) != 0).any(axis=1)
            yield TablePart(values_RD, keys_R2, touched_R)


class SavedTables:
    """The tables of a checkpoint, each read as NumPy arrays when it is needed.

    All weights are averages if the run has `lr.average_decay`.

    Attributes:
      path: the directory of the checkpoint.
      progress: the progress that was saved with the state, see `Checkpoints.save`.
    """

    def __init__(self, run_dir: Place, step: int | None = None):
        """Opens the checkpoint of `step`, by default the newest one.

        Raises:
          UserError: there is no such checkpoint, or it cannot be read.
        """
        directory = (run_dir / "checkpoints").resolve()
        steps = complete_steps(run_dir)
        if not steps or step not in (None, *steps):
            listed = ", ".join(map(str, steps)) or "none"
            wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
            raise UserError(f"{directory}: expected {wanted}, found {listed}")
        self.path = directory / str(steps[-1] if step is None else step)
        self._local = LocalCheckpoint(self.path)
        self._earlier = max((each for each in steps if each < int(self.path.name)), default=None)
        with self._explaining(None), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            saved = checkpointer.restore(self._local.with_item("progress") / "progress")
        self.progress: dict[str, Any] = of_known_format(saved, self.path)
        self._averaging = None
        if "average_decay" in self.progress:
            self._averaging = Averaging(self.progress["average_decay"], int(self.path.name))
        self._weights = "params" if self._averaging is None else "averages"

    def values(self, spec: TableSpec) -> np.ndarray:
        """Returns the vectors of a table, float32 `[rows, width]`."""
        values_RD = self._array(("params", "tables", spec.name), (spec.rows, spec.emb_dim))
        if self._averaging is None:
            return values_RD
        shape = (spec.rows, spec.emb_dim + 1)
        averages_RA = self._array(("averages", "tables", spec.name), shape)
        return self._averaging.rows(values_RD, averages_RA)

    def default_row(self, spec: TableSpec) -> np.ndarray:
        """Returns the default row of a growing table that has one, float32 `[width]`."""
        return self._array((self._weights, "unknown", spec.name), (spec.emb_dim,))

    def id_map(self, spec: TableSpec) -> IdMap:
        """Returns the map from ids to rows of a growing table, with None for its sketch."""
        shapes = jax.eval_shape(lambda: empty_map(spec.rows, 1))
        wanted = {k: v for k, v in shapes._asdict().items() if k != "sketch_SW"}
        found = self._restore({"maps": {spec.name: wanted}})["maps"][spec.name]
        return IdMap(**found | {"sketch_SW": None})

    def dense(self, abstract: Any) -> Any:
        """Returns the parameters of the dense part, as NumPy arrays.

        Args:
          abstract: a tree of arrays, or shapes, with the structure of the parameters.
        """
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract)
        return self._restore({self._weights: {"dense": wanted}})[self._weights]["dense"]

    def in_parts(self, spec: TableSpec, moments: bool) -> "TableParts":
        """Returns a reader of a table that does not hold the whole table in memory.

        Args:
          spec: the table.
          moments: whether the moments of the optimizer are read, too.
        """
        with self._explaining(None):
            state = self._local.with_item("state") / "state"
            values = SavedArray(state, ("params", "tables", spec.name))
            averages = None
            if self._averaging is not None:
                array = SavedArray(state, ("averages", "tables", spec.name))
                averages = SavedAverages(self._averaging, array)
            keys, rows_S = None, np.full(NUM_SEGMENTS, spec.segment_rows)
            if spec.grows:
                keys = SavedArray(state, ("maps", spec.name, "keys_R2"))
                rows_S = SavedArray(state, ("maps", spec.name, "rows_S")).read(0, NUM_SEGMENTS)
            ending = ("moments", "tables", spec.name)
            of_moments = None
            if moments:
                (place,) = (k for k in keys_of_arrays(state) if k[-3:] == ending)
                of_moments = SavedArray(state, place)
        counts_S = rows_S.astype(np.int64)
        return TableParts(values, averages, keys, of_moments, counts_S, self._explaining)

    def _array(self, keys: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        """Reads one float32 array of the state; `keys` is its path in the tree."""
        wanted: object = jax.ShapeDtypeStruct(shape, np.float32)
        for key in reversed(keys):
            wanted = {key: wanted}
        found = self._restore(wanted)
        for key in keys:
            found = found[key]
        return found

    @contextlib.contextmanager
    def _explaining(self, wanted: object) -> Iterator[None]:
        try:
            with one_error():
                yield
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types.
            held_bytes = total_bytes(wanted)
            raise explained(error, self.path, self._earlier, held_bytes, devices=1) from error

    def _restore(self, item: object) -> Any:
        """Reads the part of the state with the structure of `item`, as NumPy arrays."""
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        handler = ocp.PyTreeCheckpointHandler()
        with self._explaining(item), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(
                self._local.with_item("state") / "state",
                args=ocp.args.PyTreeRestore(
                    item=item, restore_args=arguments, partial_restore=True
                ),
            )
