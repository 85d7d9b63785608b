"""A run as one page to look at: `s2s report RUN_DIR [--users N] [--titles FILE]`."""

from pathlib import Path

from s2s_jax.config import Parser
from s2s_jax.errors import EXIT_DONE, UserError
from s2s_jax.jobs.report import report


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: see `errors.run_door`.
    """
    parser = Parser("s2s report", "RUN_DIR and whole numbers for --users")
    parser.add_argument("run_dir", type=Path, help="directory of a run, train.output_dir")
    parser.add_argument("--out", type=Path, help="HTML file; default: report.html in RUN_DIR")
    parser.add_argument("--users", type=int, default=5, help="users that are shown; 0: none")
    parser.add_argument(
        "--titles",
        type=Path,
        help="CSV or Parquet of item ids and titles, or MovieLens' movies.dat",
    )
    arguments = parser.parse_args(argv)
    if arguments.users < 0:
        raise UserError(f"--users: expected a number of users from 0 on, found {arguments.users}")
    out = report(arguments.run_dir, arguments.out, arguments.users, arguments.titles)
    print(f"report of {arguments.run_dir} in {out}")
    return EXIT_DONE
