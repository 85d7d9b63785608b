"""Training in Python programs."""

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, validate
from s2s_jax.errors import Stopped, UserError
from s2s_jax.jobs import train as jobs
from s2s_jax.library.run import Run
from s2s_jax.runs.checkpoints.one_error import restore_hooks
from s2s_jax.signals import Stop


def train(config: Config, *, devices: Sequence[Any] | None = None) -> Run:
    """Trains until the end of the run, or continues it, and opens its directory (`train.output_dir`).

    The same as `s2s train`, but errors are raised, and the process is not changed: there are no signal
    handlers, allocator settings or logging filters. Progress is printed to stderr. Meanwhile, no other
    process can train in the directory.

    A `KeyboardInterrupt` (Ctrl-C, or the stop button of a notebook) ends training after the current
    step, saves it, and is then raised; the same call continues from there. A second one is raised at
    once, without waiting for the step.

    On several CPU devices, JAX's compilation cache is turned off for the rest of the process, because
    cached programs would compute wrong gradients.

    Args:
      config: the configuration, see `load`.
      devices: devices to train on; None: all.

    Raises:
      UserError: the configuration is impossible, the log cannot be read, or the run cannot be
        continued; all completed steps are saved.
      NotFiniteError: the loss or the gradient is not finite; the newest checkpoint is an earlier one.

    Examples:
      >>> from s2s_jax.library.loading import load
      >>> config = load("configs/quickstart.py", {"model.num_layers": 1, "train.train_steps": 2})
      >>> train(config).steps
      [2]
    """
    validate(config)
    if jax.process_count() > 1:
        raise UserError(
            f"s2s_jax.train: expected one process, found a job of {jax.process_count()}; start the "
            f"command s2s train on each host instead"
        )
    stop = Stop()
    with restore_hooks():
        _interruptible(lambda: jobs.train(config, make_mesh(devices), stop), stop)
    return Run(config.train.output_dir, devices=devices)


def _interruptible(work: Callable[[], object], stop: Stop) -> None:
    """Runs `work` in another thread, because Python may interrupt the main one even during a step."""
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="s2s-train", daemon=True).start()
    interrupted = None
    try:
        done.wait()
    except KeyboardInterrupt as interrupt:
        interrupted = interrupt
        stop.requested = "an interrupt"
        print("interrupted: saving; interrupt again not to wait", file=sys.stderr, flush=True)
        done.wait()
    if errors and not isinstance(errors[0], Stopped):
        raise errors[0]
    if interrupted is not None:
        raise interrupted
