"""Saves checkpoints to a store, and restores them.

Orbax 0.12 writes to directories and, with more packages, to Google Cloud Storage, but not to S3 or HDFS.
So it writes to a temporary directory of this machine, whose files are then copied. Its file
`_CHECKPOINT_METADATA` is copied last, and a checkpoint without it does not count.

In a job of several processes, each one has a temporary directory of its own, and copies the parts of the
arrays that it wrote. Then arrays are stored chunk by chunk in files of their own (Zarr without OCDBT),
because OCDBT has a file that lists the parts of all processes.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from s2s_jax.cluster import hosts
from s2s_jax.runs.checkpoints.files import COMPLETE, LocalCheckpoint, complete_steps
from s2s_jax.storage.lock import StillOurs
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import StorePath
from s2s_serve.storage.scratch import Scratch


class StoreManager:
    """Does for checkpoints in a store what Orbax's `CheckpointManager` does for those on a disk."""

    def __init__(
        self,
        run_dir: StorePath,
        kept: Callable[[Sequence[int]], set[int]],
        still_ours: StillOurs,
    ):
        """Finds the complete checkpoints.

        Args:
          run_dir: the run directory.
          kept: chooses which of some steps are kept.
          still_ours: raises an error if another process has taken over the run.
        """
        self._directory = run_dir / "checkpoints"
        self._kept, self._still_ours = kept, still_ours
        self._run_dir = run_dir
        self.reload()
        several = jax.process_count() > 1
        options = ocp.options.MultiprocessingOptions(primary_host=None if several else 0)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=options),
                state=ocp.StandardCheckpointHandler(
                    multiprocessing_options=options, use_ocdbt=not several
                ),
                progress=ocp.JsonCheckpointHandler(multiprocessing_options=options),
            ),
            multiprocessing_options=options,
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def reload(self) -> None:
        """Looks again which checkpoints are complete."""
        self._steps = complete_steps(self._run_dir)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return max(self._steps, default=None)

    def all_steps(self) -> list[int]:
        """The steps of all complete checkpoints."""
        return list(self._steps)

    def save(self, step: int, args: ocp.args.Composite) -> None:
        """Saves a checkpoint in the background; arrays are copied before this returns."""
        scratch = Scratch()
        directory = scratch.path / str(step)
        self._checkpointer.save(directory, args=args)

        def finish() -> None:
            try:
                self._checkpointer.wait_until_finished()
                self._copy(step, directory)
            except BaseException as error:
                self._error = error
            finally:
                scratch.remove()

        self._thread = threading.Thread(target=finish, name="s2s-save")
        self._thread.start()

    def is_saving_in_progress(self) -> bool:
        """Whether a checkpoint is still being saved."""
        return self._thread is not None and self._thread.is_alive()

    def wait_until_finished(self) -> None:
        """Waits for the last save, and raises its error."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore(self, step: int, args: ocp.args.Composite) -> Any:
        """Restores the items of `args`, see `CheckpointManager.restore`."""
        copy = LocalCheckpoint(self._directory / str(step))
        for name in args.keys():  # noqa: SIM118 - it is no mapping.
            directory = copy.with_item(name)
        return self._checkpointer.restore(directory, args=args)

    def close(self) -> None:
        """Waits for the last save, and frees threads."""
        try:
            self.wait_until_finished()
        finally:
            self._checkpointer.close()

    def _copy(self, step: int, directory: Path) -> None:
        """Copies a checkpoint to the store, and removes those that are no longer kept."""
        there = self._directory / str(step)
        files = [path for path in directory.rglob("*") if path.is_file() and path.name != COMPLETE]
        if not hosts.is_first():
            # What describes the arrays is the same in all processes.
            state = directory / "state"
            files = [
                path for path in files if path.is_relative_to(state) and path.name[0] not in "_."
            ]
        names = (path.relative_to(directory).as_posix() for path in files)
        copies = zip(files, map(there.__truediv__, names), strict=True)
        file_systems.copy_all(copies, to_store=True)
        hosts.meet_in_background(f"checkpoint {step} copied")
        self._steps.append(step)
        if hosts.is_first():
            # Copying takes long, and the process may have been paused.
            self._still_ours(fresh=True)
            file_systems.upload(directory / COMPLETE, there / COMPLETE)
        kept = self._kept(self._steps)
        for old in sorted(set(self._steps) - kept):
            if hosts.is_first():
                remove(self._directory / str(old))
            self._steps.remove(old)


def remove(checkpoint: StorePath) -> None:
    """Removes a checkpoint; it is not complete from the first moment on."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    file_systems.remove_below(checkpoint)


def remove_unfinished(directory: StorePath) -> None:
    """Removes what interrupted saves left behind."""
    for path in directory.iterdir():
        if path.name.isdecimal() and not (path / COMPLETE).exists():
            file_systems.remove_below(path)
