"""The server as a command: `python -m s2s_serve DIR`, and what `s2s serve DIR` runs."""

import argparse
import ast
import dataclasses
import inspect
import os
import signal
import sys
import textwrap
import threading
import typing
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from s2s_serve.errors import UserError
from s2s_serve.server.settings import Settings, check
from s2s_serve.storage.address import Place, place_of

_USER_ERROR = 2


def serve(directory: Place, settings: Settings) -> None:
    """Serves an export until SIGTERM or SIGINT.

    Args:
      directory: the export.
      settings: the options.

    Raises:
      UserError: an option is wrong, packages are missing, or the export cannot be served.
    """
    check(settings)
    _end_at_signals()
    try:
        from s2s_serve.server.run import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "s2s_serve":
            raise
        raise UserError(
            f"the server needs the package {error.name}, which is not installed; run pip install with "
            f"s2s-serve[server], or with s2s-jax[serve]"
        ) from None
    run(directory, settings)
    # Everything is finished, and the event loop has removed its handlers.
    _end_at_signals()


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit code: 2 for a mistake of the user, or 0."""
    _end_at_signals()
    try:
        directory, settings = parse(argv)
        serve(directory, settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return _USER_ERROR
    return 0


def _end_at_signals() -> None:
    """Makes a signal end the process with exit code 0, while there are no requests to finish."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)


def _end(_: int, __: FrameType | None) -> NoReturn:
    os._exit(0)


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists all options")


def parse(argv: Sequence[str]) -> tuple[Place, Settings]:
    """The export and the options that a command line names.

    Raises:
      UserError: an argument is missing, unknown or wrong.
    """
    parser = _Parser(
        prog="python -m s2s_serve",
        description="Answers recommendations over HTTP from an export.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("directory", metavar="DIR", type=place_of, help="the export")
    hints, texts = typing.get_type_hints(Settings), _texts()
    for field in dataclasses.fields(Settings):
        choices = typing.get_args(hints[field.name])
        parser.add_argument(
            f"--{field.name}",
            type=str if choices else hints[field.name],
            choices=choices or None,
            default=field.default,
            metavar=None if choices else field.name.upper(),
            help=texts[field.name].replace("%", "%%"),
        )
    given = vars(parser.parse_args(list(argv)))
    directory = given.pop("directory")
    return directory, Settings(**given)


def _texts() -> dict[str, str]:
    """The docstring of each option."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(Settings))).body
    assert isinstance(cls, ast.ClassDef)
    found = {}
    for field, after in zip(cls.body, cls.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            name, text = field.target, after.value
            assert isinstance(name, ast.Name)
            assert isinstance(text, ast.Constant)
            found[name.id] = " ".join(str(text.value).split())
    return found
