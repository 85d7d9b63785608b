"""Checkpoints of a run, written by Orbax: all that a run needs to continue, except its configuration.

A checkpoint `checkpoints/<step>/` has `state` (model, tables, optimizer: sharded arrays) and `progress`
(JSON: reading position, running means). It is written in the background and renamed into place once it
is complete, so an unfinished checkpoint is never seen. `in_store` does the same in a store.
"""

import contextlib
import logging
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from s2s_jax.cluster import hosts
from s2s_jax.errors import MachineError, UserError
from s2s_jax.runs.checkpoints import in_store
from s2s_jax.runs.checkpoints.compatibility import VERSIONS, of_known_format
from s2s_jax.runs.checkpoints.files import checkpoint_fingerprint
from s2s_jax.runs.checkpoints.one_error import one_error
from s2s_jax.runs.checkpoints.preservation import NewestAndBest
from s2s_jax.runs.checkpoints.restore_errors import explained, total_bytes
from s2s_jax.storage.lock import StillOurs, always_ours
from s2s_jax.writing import reason_of_failed_write
from s2s_serve.storage.address import Place, StorePath

# Network file systems may show an old list of checkpoints for a minute: the number of looks at it, and
# seconds between two.
_LOOKS, _LOOK = 36, 2.0
# Part of the name of a directory that Orbax is still writing.
_UNFINISHED = ".orbax-checkpoint-tmp"
# Parts of an array are stored separately, so that a table can be read part by part.
_CHUNK_BYTES = 2**26
# Chunks that are smaller than this share of that would be too many.
_LEAST_SHARE = 64


@contextlib.contextmanager
def _errors_only(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class State(Protocol):
    """The trained state: a `training.step.state.TrainState`."""

    def saved_parts(self) -> dict[str, object]:
        """The parts that are saved in a checkpoint, by name."""
        ...

    def with_saved_parts(self, parts: Mapping[str, object]) -> Self:
        """The same state with other values for these parts."""
        ...


_State = TypeVar("_State", bound=State)


class Checkpoints:
    """The checkpoints of a run directory.

    Attributes:
      still_ours: see `run_dir.locked`.
    """

    def __init__(
        self,
        run_dir: Place,
        newest: int | None,
        read_only: bool = False,
        still_ours: StillOurs = always_ours,
    ):
        """Opens the checkpoints of a run; the run may write them while other processes read them.

        Args:
          run_dir: the run directory.
          newest: the number of newest checkpoints to keep; None keeps all.
          read_only: whether to leave the directory as it is.
          still_ours: see `run_dir.locked`.

        Raises:
          UserError: the directory cannot be used, or hosts see other checkpoints there.
          MachineError: the file system does not show all hosts the same checkpoints.
        """
        self._directory: Place = run_dir.resolve() / "checkpoints"
        if hosts.is_first() and not read_only:
            _remove_unfinished(self._directory)
        hosts.wait_for_all("unfinished checkpoints removed")
        self._kept = NewestAndBest(newest)
        self.still_ours = still_ours
        self._saving: int | None = None
        self._failed = False
        # When a save fails in the background, more of its writes may fail at any later time.
        self._one_error = contextlib.ExitStack()
        self._absl = logging.getLogger("absl")
        self._absl.addFilter(_no_tracebacks)
        # Opened read-only, Orbax warns about each consequence.
        with _errors_only("absl") if read_only else contextlib.nullcontext():
            if isinstance(run_dir, StorePath):
                self._manager = in_store.StoreManager(run_dir, self._kept.kept, still_ours)
            else:
                directory = run_dir.resolve() / "checkpoints"
                self._manager = _manager(directory, self._kept, read_only)
            self._agree_on_steps(MachineError if not read_only else UserError)

    def _agree_on_steps(self, error: type[UserError]) -> None:
        """Waits until all hosts see the same checkpoints, from which they will choose one."""
        for _ in range(_LOOKS):
            other = hosts.first_other(str(self.steps))
            if other is None:
                return
            time.sleep(_LOOK)
            self._manager.reload()
        listed = ", ".join(map(str, self.steps)) or "none"
        raise error(
            f"train.output_dir: host {other} sees other checkpoints in {self._directory} than host 0 "
            f"(host {jax.process_index()} sees {listed}); give all hosts the same directory or, if they "
            f"have it, wait until its file system shows them the same, and start again"
        )

    @property
    def newest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: State,
        progress: dict[str, Any],
        evaluations: Mapping[int, float] | None = None,
    ) -> None:
        """Saves a checkpoint in the background.

        Arrays are copied before this returns, so they may be donated afterwards.

        Keeps the newest checkpoints, and the best of those that have been evaluated.

        Args:
          step: the number of steps done.
          state: the state on the devices.
          progress: everything else that a run needs to continue.
          evaluations: the quality of earlier states, by step; higher is better.

        Raises:
          UserError: this checkpoint, or the previous one, cannot be written.
        """
        assert jax.process_count() == 1 or sys.exception() is None, "see `_meet_unless_failed`"
        self._kept.evaluations = {} if evaluations is None else evaluations
        # Otherwise a failure of the previous save would be taken for a failure of this one.
        self.wait()
        self._saving = step
        self._one_error.enter_context(one_error())
        parts = state.saved_parts()
        in_chunks = jax.tree.map(_in_chunks, parts)
        with self._explained():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(parts, save_args=in_chunks),
                    progress=ocp.args.JsonSave(VERSIONS | progress),
                ),
            )

    def restore(self, step: int, abstract: _State) -> _State:
        """Restores the state of `step` with the shapes and shardings of `abstract`.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        wanted = abstract.saved_parts()
        saved = self._restore(step, wanted, state=ocp.args.StandardRestore(wanted))
        return abstract.with_saved_parts(saved)

    def progress(self, step: int) -> dict[str, Any]:
        """The progress that was saved with the state of `step`.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        saved = self._restore(step, None, progress=ocp.args.JsonRestore())
        return of_known_format(saved, self._directory / str(step))

    def fingerprint(self, step: int) -> str:
        """The fingerprint of the checkpoint of `step`, see `checkpoint_fingerprint`."""
        return checkpoint_fingerprint(self._directory.parent, step)

    def _restore(self, step: int, wanted: object, **item: ocp.args.CheckpointArgs) -> Any:
        """Restores one item of a checkpoint, with arrays like those of `wanted`."""
        ((name, _),) = item.items()
        try:
            with one_error():
                return self._manager.restore(step, args=ocp.args.Composite(**item))[name]
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types.
            earlier = max((each for each in self.steps if each < step), default=None)
            held_bytes, devices = total_bytes(wanted), jax.device_count()
            directory = self._directory / str(step)
            raise explained(error, directory, earlier, held_bytes, devices) from error

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; then nothing more is saved."""
        return self._failed

    def check(self) -> None:
        """Checks, without waiting, whether a save in the background has failed, or the run was lost.

        Raises:
          UserError: a save has failed, or another process has taken over the run.
        """
        try:
            self.still_ours()
        except UserError:
            # Nothing is saved any more.
            self._failed = True
            raise
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          UserError: the checkpoint cannot be written.
        """
        with self._explained():
            self._manager.wait_until_finished()
        self._saving = None
        self._one_error.close()

    def close(self) -> None:
        """Waits for saves and frees threads.

        Raises:
          UserError: the last save cannot be written, and this has not been raised before.
        """
        try:
            # There is only one message for a failure.
            with contextlib.suppress(Exception) if self._failed else self._explained():
                self._manager.close()
            if not self._failed:
                self._one_error.close()
        finally:
            self._absl.removeFilter(_no_tracebacks)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns a failure of the disk, whatever exception Orbax wraps it in, into a `UserError`."""
        try:
            yield
        except Exception as error:
            self._failed = True
            reason = reason_of_failed_write(error)
            if reason is None:
                raise
            if hosts.is_first() and isinstance(self._directory, Path):
                _remove_unfinished(self._directory)
            newest = max((step for step in self.steps if step != self._saving), default=None)
            left = (
                "there is none yet"
                if newest is None
                else f"the newest complete one is of step {newest:,}"
            )
            if isinstance(error, MachineError):
                raise MachineError(
                    f"the checkpoint of step {self._saving:,} cannot be written; {left}; {reason}, and "
                    f"start the same command again"
                ) from error
            where = "there"
            if isinstance(self._directory, StorePath):
                where = f"in {tempfile.gettempdir()}, or set TMPDIR to another directory"
            raise UserError(
                f"{self._directory}: the checkpoint of step {self._saving:,} cannot be written "
                f"({reason}); {left}; free space or fix the permissions {where}, and start the same "
                f"command again"
            ) from error


def _in_chunks(array: jax.Array | np.ndarray) -> ocp.SaveArgs:
    """Return how an array is stored: in chunks of about `_CHUNK_BYTES`.

    Orbax divides the part of a device only by divisors of its shape. If a length has a large prime
    factor, there may be none that makes chunks of this size, only tiny ones. Then chunks are larger.
    """
    is_on_devices = isinstance(array, jax.Array)
    part = array.sharding.shard_shape(array.shape) if is_on_devices else array.shape
    size, item_bytes = _CHUNK_BYTES, array.dtype.itemsize
    whole_bytes = math.prod(part) * item_bytes
    while (
        size < whole_bytes and _chunk_bytes(part, item_bytes, size) < _CHUNK_BYTES // _LEAST_SHARE
    ):
        size *= 2
    return ocp.SaveArgs(chunk_byte_size=size)


def _chunk_bytes(part: tuple[int, ...], item_bytes: int, largest: int) -> int:
    """Return the bytes of the chunks that Orbax makes of the part of a device."""
    shape = list(part)
    divisors = [_divisors(length) for length in part]
    while math.prod(shape) * item_bytes > largest and max(shape) > 1:
        # Its longest axis is divided first.
        axis = shape.index(max(shape))
        shape[axis] = max(each for each in divisors[axis] if each < shape[axis])
    return math.prod(shape) * item_bytes


def _divisors(number: int) -> set[int]:
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return {*small, *(number // each for each in small)}


def _no_tracebacks(record: logging.LogRecord) -> bool:
    """Removes Orbax's stack traces of errors that it also raises."""
    return record.exc_info is None


def _manager(directory: Path, kept: NewestAndBest, read_only: bool) -> ocp.CheckpointManager:
    try:
        return ocp.CheckpointManager(
            directory,
            item_names=("state", "progress"),
            options=ocp.CheckpointManagerOptions(
                read_only=read_only,
                preservation_policy=kept,
                enable_async_checkpointing=True,
                async_options=ocp.options.AsyncOptions(barrier_sync_fn=_meet_unless_failed),
            ),
        )
    except OSError as error:
        raise UserError(
            f"train.output_dir: {directory} cannot be used ({error}); nothing in it was changed"
        ) from error


def _meet_unless_failed(*, key: str, timeout_ms: int) -> None:
    """Waits for the other hosts, unless the work of this thread has failed.

    After a failed write, too, Orbax waits until all hosts are done before it reports the error. But the
    others wait elsewhere, for this host to finish writing, so all would wait for 20 minutes.
    """
    if sys.exception() is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _remove_unfinished(directory: Place) -> None:
    """Removes what unfinished saves left behind.

    Orbax can do this, but in a thread that nothing waits for, and that prints a traceback if the process
    ends first.
    """
    if isinstance(directory, StorePath):
        in_store.remove_unfinished(directory)
        return
    for path in directory.glob(f"*{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
