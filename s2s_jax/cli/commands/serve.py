"""Answers requests over HTTP from an export: `s2s serve DIR [--port N …]`."""

import dataclasses
from typing import Annotated

import tyro

from s2s_jax.cli.parsing import parse
from s2s_jax.errors import EXIT_DONE
from s2s_jax.storage.place_option import PlaceOption
from s2s_serve.server.command import serve
from s2s_serve.server.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """When DIR gets a newer version, the server changes to it without a pause. SIGTERM or SIGINT ends it
    after the requests in flight.
    """

    directory: Annotated[PlaceOption, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Directory that s2s export wrote"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line or the export is wrong, or packages of the server are missing.
    """
    arguments = parse(Arguments, argv, "serve")
    if arguments is None:
        return EXIT_DONE
    serve(arguments.directory, arguments)
    return EXIT_DONE
