"""Writes a synthetic log to try things out: `s2s synthesize --output DIR [--users N …]`."""

from s2s_jax.cli.parsing import parse
from s2s_jax.data.logs.synthesize import Settings, write_files
from s2s_jax.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration or the data is wrong.
    """
    settings = parse(Settings, argv, "synthesize", {"out": "output"})
    if settings is None:
        return EXIT_DONE
    written = list(write_files(settings))
    events = sum(events for _, events in written)
    print(
        f"wrote {len(written):,} files with {settings.users:,} users and {events:,} events "
        f"to {settings.output}"
    )
    return EXIT_DONE
