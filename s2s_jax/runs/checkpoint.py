"""What a run directory keeps to be continued: configuration, and Orbax checkpoints of everything else.

A checkpoint `checkpoints/<step>/` holds `state` (model, tables, optimizer: sharded arrays) and
`progress` (JSON: reading position, running means). It is written in the background and renamed into
place when whole, so one that did not finish is never seen.
"""

import contextlib
import fcntl
import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from s2s_jax.cluster import hosts
from s2s_jax.config import Config, identity, parse_json, refuse_addresses
from s2s_jax.embedding.id_map import IdMap, empty_map
from s2s_jax.embedding.tables import TableSpec
from s2s_jax.errors import UserError
from s2s_jax.runs.one_error import one_error
from s2s_jax.runs.preservation import NewestAndBest
from s2s_jax.runs.restore_errors import explained
from s2s_jax.version import __version__
from s2s_jax.writing import replacing, trouble_in

# Orbax's mark of a directory that is still being written.
_UNFINISHED = ".orbax-checkpoint-tmp"
# Of what checkpoints hold; raised by one when older programs would misunderstand newer ones.
_FORMAT = 1
# Saved beside each state: the format, under the name that it has had from the start, and who wrote it.
_VERSIONS = {"version": _FORMAT, "s2s_jax": __version__}


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Makes `run_dir` where it does not exist and keeps other processes from training in it.

    Raises:
      UserError: it cannot be used as a directory, or another process trains in it.
    """
    refuse_addresses("train.output_dir", run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"train.output_dir: {run_dir} cannot be used: {error}") from error
    with file:
        if not hosts.is_first():
            yield
            return
        try:
            # Held until the process ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"train.output_dir: another process is training in {run_dir}; wait for it or give "
                f"another directory"
            ) from error
        except OSError:
            pass  # Some network file systems have no locks.
        yield


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
    """What is trained, in named parts: a `training.step.TrainState`."""

    def _asdict(self) -> dict[str, Any]: ...

    def _replace(self, **parts: Any) -> Self: ...


_State = TypeVar("_State", bound=State)


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(self, config: Config, read_only: bool = False):
        """Opens the checkpoints in `train.output_dir`; a run may write them while others only read.

        Raises:
          UserError: the directory cannot be used.
        """
        self._config = config
        self._run_dir = Path(config.train.output_dir).resolve()
        if hosts.is_first() and not read_only:
            _remove_unfinished(self._run_dir / "checkpoints")
        hosts.wait_for_all("unfinished checkpoints removed")
        self._kept = NewestAndBest(config.train.max_to_keep)
        self._saving: int | None = None
        self._failed = False
        # Of a save that fails in the background, others of its writes may fail at any time after.
        self._one_error = contextlib.ExitStack()
        self._absl = logging.getLogger("absl")
        self._absl.addFilter(_no_tracebacks)
        directory = self._run_dir / "checkpoints"
        # Orbax warns of all that reading only implies, though it was asked to read only.
        with _errors_only("absl") if read_only else contextlib.nullcontext():
            try:
                self._manager = ocp.CheckpointManager(
                    directory,
                    item_names=("state", "progress"),
                    options=ocp.CheckpointManagerOptions(
                        read_only=read_only,
                        preservation_policy=self._kept,
                        enable_async_checkpointing=True,
                    ),
                )
            except OSError as error:
                raise UserError(
                    f"train.output_dir: {directory} cannot be used ({error}); nothing in it was changed"
                ) from error

    @property
    def newest_step(self) -> int | None:
        """Step of the newest whole checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all whole checkpoints."""
        return sorted(self._manager.all_steps())

    def check_config(self) -> None:
        """Refuses a configuration that the directory's checkpoints cannot be continued with.

        Raises:
          UserError: naming the first key that differs.
        """
        if self.newest_step is None:
            return
        path = self._run_dir / "config.json"
        try:
            before = identity.of_run(parse_json(path.read_text()))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: expected the configuration that the checkpoints beside it were made with, "
                f"but it cannot be read ({error}); give another train.output_dir"
            ) from error
        now = identity.of_run(self._config)
        for key in before | now:
            if key not in now or key not in before or before[key] != now[key]:
                was = before[key] if key in before else "nothing"
                found = now[key] if key in now else "nothing"
                raise UserError(
                    f"{key}: the checkpoints in {self._run_dir} were made with {was}, found {found}; "
                    f"go back to {was} or give another train.output_dir"
                )

    def write_config(self) -> None:
        """Writes the resolved configuration to `config.json`.

        Raises:
          UserError: it cannot be written.
        """
        if not hosts.is_first():
            return
        path = self._run_dir / "config.json"
        with replacing(path) as unfinished:
            unfinished.write_text(self._config.to_json())

    def save(
        self,
        step: int,
        state: State,
        progress: dict[str, Any],
        evaluations: Mapping[int, float] | None = None,
    ) -> None:
        """Saves in the background; the arrays are copied before it returns, so they may be donated.

        Besides the newest checkpoints, the best is kept of those that have been evaluated.

        Args:
          step: its number.
          state: of the devices.
          progress: all else that a run needs to continue.
          evaluations: by step, how good states were so far; more is better.

        Raises:
          UserError: this checkpoint, or the one before it, cannot be written.
        """
        self._kept.evaluations = {} if evaluations is None else evaluations
        # What went wrong with the one before would be taken for a failure of this one.
        self.wait()
        self._saving = step
        self._one_error.enter_context(one_error())
        with self._explained():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_held(state)),
                    progress=ocp.args.JsonSave(_VERSIONS | progress),
                ),
            )

    def restore(self, step: int, abstract: _State) -> _State:
        """Restores the state of `step` into the shapes and shardings of `abstract`.

        Raises:
          UserError: it cannot be read.
        """
        wanted = _held(abstract)
        held = self._restore(step, wanted, state=ocp.args.StandardRestore(wanted))
        return abstract._replace(**held)

    def progress(self, step: int) -> dict[str, Any]:
        """What was saved beside the state of `step`.

        Raises:
          UserError: it cannot be read.
        """
        path = self._run_dir / "checkpoints" / str(step)
        return _of_known_format(self._restore(step, None, progress=ocp.args.JsonRestore()), path)

    def fingerprint(self, step: int) -> str:
        """Of the checkpoint of `step`."""
        return checkpoint_fingerprint(self._run_dir, step)

    def _restore(self, step: int, wanted: Any, **item: Any) -> Any:
        ((name, _),) = item.items()
        try:
            with one_error():
                return self._manager.restore(step, args=ocp.args.Composite(**item))[name]
        except Exception as error:  # Orbax and TensorStore raise many types.
            earlier = max((each for each in self.steps if each < step), default=None)
            directory = self._run_dir / "checkpoints" / str(step)
            devices = jax.device_count()
            raise explained(error, directory, earlier, _bytes(wanted), devices) from error

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; nothing more is saved then."""
        return self._failed

    def check(self) -> None:
        """Looks, without waiting, whether what was saved in the background failed.

        Raises:
          UserError: it did.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          UserError: it cannot be written.
        """
        with self._explained():
            self._manager.wait_until_finished()
        self._saving = None
        self._one_error.close()

    def close(self) -> None:
        """Waits for saves and frees threads.

        Raises:
          UserError: what was saved cannot be written, and nothing has said so before.
        """
        try:
            # Of one failure there is one message.
            with contextlib.suppress(Exception) if self._failed else self._explained():
                self._manager.close()
            if not self._failed:
                self._one_error.close()
        finally:
            self._absl.removeFilter(_no_tracebacks)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns a failure of the disk, in whichever wrapping Orbax raises it, into a sentence."""
        try:
            yield
        except Exception as error:
            self._failed = True
            reason = trouble_in(error)
            if reason is None:
                raise
            directory = self._run_dir / "checkpoints"
            if hosts.is_first():
                _remove_unfinished(directory)
            newest = max((step for step in self.steps if step != self._saving), default=None)
            left = (
                "there is none yet" if newest is None else f"the newest whole one is of {newest:,}"
            )
            raise UserError(
                f"{directory}: the checkpoint of step {self._saving:,} cannot be written ({reason}); "
                f"{left}; free space or mend the permission there, and start the same command again"
            ) from error


def _no_tracebacks(record: logging.LogRecord) -> bool:
    """Leaves out Orbax' stack traces of errors, which it raises as well."""
    return record.exc_info is None


def checkpoint_fingerprint(run_dir: Path, step: int) -> str:
    """Another one for each checkpoint that was ever saved; a copy of the directory keeps it."""
    directory = run_dir / "checkpoints" / str(step)
    # Names of data files are random, and this one tells when they were written.
    times = directory / "_CHECKPOINT_METADATA"
    digest = hashlib.sha256(times.read_bytes() if times.exists() else b"")
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        told = f"{path.relative_to(directory)} {path.stat().st_size}\n"
        digest.update(told.encode())
    return digest.hexdigest()[:16]


class SavedTables:
    """The tables in a checkpoint, one at a time in the memory of this host, for looking at them.

    Attributes:
      path: of the checkpoint.
      progress: what was saved beside the state.
    """

    def __init__(self, run_dir: Path, step: int | None = None):
        """Opens the checkpoint of `step`, by default the newest.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        directory = (run_dir / "checkpoints").resolve()
        steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal())
        if not steps or step not in (None, *steps):
            listed = ", ".join(map(str, steps)) or "none"
            wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
            raise UserError(f"{directory}: expected {wanted}, found {listed}")
        self.path = directory / str(steps[-1] if step is None else step)
        self._earlier = max((each for each in steps if each < int(self.path.name)), default=None)
        with self._explaining(None), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            saved = checkpointer.restore(self.path / "progress")
        self.progress: dict[str, Any] = _of_known_format(saved, self.path)

    def values(self, spec: TableSpec) -> np.ndarray:
        """f32 `[R, D]` of a table."""
        shape = jax.ShapeDtypeStruct((spec.rows, spec.emb_dim), np.float32)
        return self._restore({"params": {"tables": {spec.name: shape}}})["params"]["tables"][
            spec.name
        ]

    def default_row(self, spec: TableSpec) -> np.ndarray:
        """f32 `[D]`: what stands for ids without a row, of a table that has it."""
        shape = jax.ShapeDtypeStruct((spec.emb_dim,), np.float32)
        return self._restore({"params": {"unknown": {spec.name: shape}}})["params"]["unknown"][
            spec.name
        ]

    def id_map(self, spec: TableSpec) -> IdMap:
        """The map of a table that grows; its sketch is left out."""
        shapes = jax.eval_shape(lambda: empty_map(spec.rows, 1))
        wanted = {k: v for k, v in shapes._asdict().items() if k != "sketch_SW"}
        found = self._restore({"maps": {spec.name: wanted}})["maps"][spec.name]
        return IdMap(**found | {"sketch_SW": None})

    @contextlib.contextmanager
    def _explaining(self, wanted: Any) -> Iterator[None]:
        try:
            with one_error():
                yield
        except Exception as error:  # Orbax and TensorStore raise many types.
            raise explained(error, self.path, self._earlier, _bytes(wanted), devices=1) from error

    def _restore(self, item: Any) -> Any:
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        handler = ocp.PyTreeCheckpointHandler()
        with self._explaining(item), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(
                self.path / "state",
                args=ocp.args.PyTreeRestore(
                    item=item, restore_args=arguments, partial_restore=True
                ),
            )


def _of_known_format(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """What was saved beside a state; refuses what has a later format."""
    # Without a number, checkpoints have the first format.
    found = saved["version"] if "version" in saved else _FORMAT
    if found > _FORMAT:
        known = "s2s_jax" in saved
        writer = f"s2s_jax {saved['s2s_jax']}" if known else "a later version of s2s_jax"
        raise UserError(
            f"{path}: expected a checkpoint of format {_FORMAT} or before, found format {found}, "
            f"saved by {writer}; use that version"
        )
    return {name: value for name, value in saved.items() if name not in _VERSIONS}


def _bytes(wanted: Any) -> int:
    """Of all arrays of a tree of shapes; None: of none."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(wanted))


def _held(state: State) -> dict[str, Any]:
    """What a checkpoint holds of the state: no `stream` where it is empty, as before there was one."""
    return {name: part for name, part in state._asdict().items() if name != "stream" or part}


def _remove_unfinished(directory: Path) -> None:
    """Removes what saves that did not finish left behind.

    Orbax can do it, but in a thread that nothing waits for, and that writes a traceback where the
    process ends sooner.
    """
    for path in directory.glob(f"*{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
