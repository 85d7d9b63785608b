"""Writes an HTML page about a run: `s2s report RUN_DIR [--users N] [--titles FILE]`."""

import dataclasses
from typing import Annotated

import tyro

from s2s_jax.cli.parsing import parse
from s2s_jax.errors import EXIT_DONE, UserError
from s2s_jax.jobs.report import report
from s2s_jax.storage.place_option import PlaceOption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The page is a single HTML file that needs no other files. It shows the main metrics, curves, the
    growth of tables, evaluations and the configuration. For some users, it shows their last events next
    to the recommendations of the best checkpoint.
    """

    run_dir: Annotated[PlaceOption, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Directory of the run (its train.output_dir)"""
    output: PlaceOption | None = None
    """HTML file to write; None: report.html in RUN_DIR"""
    users: int = 5
    """Number of users to show; 0: none"""
    titles: PlaceOption | None = None
    """CSV or Parquet file of item ids and titles, or movies.dat of MovieLens"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration or the data is wrong.
    """
    arguments = parse(Arguments, argv, "report", {"out": "output"})
    if arguments is None:
        return EXIT_DONE
    if arguments.users < 0:
        raise UserError(f"--users: expected at least 0, found {arguments.users}")
    output = report(arguments.run_dir, arguments.output, arguments.users, arguments.titles)
    print(f"wrote the report of {arguments.run_dir} to {output}")
    return EXIT_DONE
