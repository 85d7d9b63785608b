"""Trains a model: `s2s train --config configs/base.py [--section.key value …]`."""

import dataclasses

from jax.sharding import Mesh

from s2s_jax.cli.console import OutputConsole
from s2s_jax.cli.parsing import WithConfig, parse_with_config
from s2s_jax.cluster import hosts
from s2s_jax.cluster.ending import ending_together, leave
from s2s_jax.cluster.joining import join
from s2s_jax.config import Config
from s2s_jax.data.batching.memory import keep_freed_memory
from s2s_jax.errors import EXIT_DONE, EXIT_STOPPED, Stopped
from s2s_jax.jobs.train import train
from s2s_jax.runs.place import place_of_run
from s2s_jax.runs.summary import print_summary
from s2s_jax.signals import StopSignals


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(WithConfig):
    """Exits with code 0 at the end of the run, 2 after a mistake that you can fix, 3 if the loss or the
    gradient is not finite, and 75 if SIGTERM or SIGINT stopped it. After 75, the run is saved; start the
    same command again to continue it.
    """


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration or the data is wrong.
      NotFiniteError: the loss or the gradient is not finite.
    """
    # First, so that a mistake that only this process notices also ends the other processes.
    join()
    with ending_together():
        given = parse_with_config(Arguments, argv, "train")
    if given is None:
        return EXIT_DONE
    _, config = given
    keep_freed_memory()
    # After training, only host 0 prints a summary; the others must know if it fails there.
    with ending_together():
        code = run(config)
    leave()
    return code


def run(config: Config, mesh: Mesh | None = None) -> int:
    """Trains until the end or a signal, prints how training ended, and returns the exit code.

    Raises:
      UserError, NotFiniteError: see `jobs.train.train`.
    """
    with StopSignals() as stop:
        try:
            stopped = train(config, mesh, stop)
        except Stopped:
            hosts.say(
                f"stopped by {stop.requested} before there was anything new to save; start the same "
                f"command again"
            )
            return EXIT_STOPPED
    if stopped:
        cause = stop.requested or "a signal to another host"
        hosts.say(f"stopped by {cause}; start the same command again to continue")
        return EXIT_STOPPED
    if hosts.is_first():
        print_summary(place_of_run(config.train.output_dir), OutputConsole())
    return EXIT_DONE
