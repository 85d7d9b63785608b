"""A run as one page to look at: `s2s report RUN_DIR [--users N] [--titles FILE]`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from s2s_jax.cli.parsing import parse
from s2s_jax.errors import EXIT_DONE, UserError
from s2s_jax.jobs.report import report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The page is an HTML file that needs nothing besides itself. It has headline numbers, curves,
    growth of tables, evaluations, the configuration and, for some users, their last events beside
    what the best checkpoint recommends to them.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Directory of a run, its train.output_dir"""
    output: Path | None = None
    """HTML file to write; None: report.html in RUN_DIR"""
    users: int = 5
    """Users that are shown; 0: none"""
    titles: Path | None = None
    """CSV or Parquet of item ids and titles, or MovieLens' movies.dat"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: see `exit.run_command`.
    """
    arguments = parse(Arguments, argv, "report", {"out": "output"})
    if arguments is None:
        return EXIT_DONE
    if arguments.users < 0:
        raise UserError(f"--users: expected a number of users from 0 on, found {arguments.users}")
    output = report(arguments.run_dir, arguments.output, arguments.users, arguments.titles)
    print(f"report of {arguments.run_dir} in {output}")
    return EXIT_DONE
