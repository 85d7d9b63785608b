"""Converts event logs to logs for training: `s2s convert FILE_OR_DIR… --output DIR`."""

import shlex

from s2s_jax.cli.parsing import parse
from s2s_jax.data.conversion.convert import convert
from s2s_jax.data.conversion.outcome import counted
from s2s_jax.data.conversion.settings import Settings
from s2s_jax.errors import EXIT_DONE
from s2s_jax.signals import StopSignals

_OLD_NAMES = {"out": "output", "layout": "format", "user": "user_column", "time": "time_column"}


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration or the data is wrong.
      Stopped: SIGTERM or SIGINT arrived; the files written so far have been removed.
    """
    settings = parse(Settings, argv, "convert", _OLD_NAMES)
    if settings is None:
        return EXIT_DONE
    with StopSignals() as signals, signals.at_once():
        done = convert(settings)
    for note in done.notes:
        print(note)
    left_out = ", ".join(done.skipped) or "nothing"
    print(
        f"wrote {counted(len(done.paths), 'file')} with {counted(done.rows, 'user')} and "
        f"{counted(done.events, 'event')} to {settings.output}; left out: {left_out}"
    )
    for name, most in done.bags.items():
        print(f"an event has up to {most:,} ids in {name}: set bag_size={most} for its feature")
    print(f"to look at the log: s2s inspect {shlex.quote(str(settings.output))}")
    return EXIT_DONE
