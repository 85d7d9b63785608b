"""A run as one page to look at: `python -m s2s_jax.report RUN_DIR [--users N] [--titles FILE]`.

Writes an HTML file that needs nothing besides itself: headline numbers, curves, growth of tables,
evaluations, the configuration and, for some users, their last events beside what the best checkpoint
recommends to them.
"""

import contextlib
import sys
from pathlib import Path

from s2s_jax.config import Config, Parser, load_json
from s2s_jax.errors import EXIT_DONE, UserError
from s2s_jax.reporting.record import read_record
from s2s_jax.reporting.report_page import make_page
from s2s_jax.reporting.shown_users import Shown, show_users
from s2s_jax.reporting.titles import read_titles


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
    config = load_json(arguments.run_dir / "config.json")
    titles = {} if arguments.titles is None else read_titles(arguments.titles)
    record = read_record(arguments.run_dir, config)
    shown = _shown(config, arguments.run_dir, arguments.users)
    out = arguments.out or arguments.run_dir / "report.html"
    _write(out, make_page(record, shown, titles))
    print(f"report of {arguments.run_dir} in {out}")
    return EXIT_DONE


def _shown(config: Config, run_dir: Path, users: int) -> Shown | str:
    """Users, or why there are none: the rest of the page does not need checkpoints and logs."""
    if users == 0:
        return ""
    try:
        return show_users(config, run_dir, users)
    except UserError as error:
        reason = str(error)
        paths = [Path(name.strip()).expanduser() for name in config.io.data_paths.split(",")]
        if reason.startswith("io.data_paths") and not all(path.is_absolute() for path in paths):
            reason += "; relative paths count from the directory in which this command is started"
        print(f"no users are shown: {reason}", file=sys.stderr, flush=True)
        return reason


def _write(out: Path, page: str) -> None:
    if out.is_dir():
        raise UserError(f"--out: {out} is a directory; give a file such as {out / 'report.html'}")
    # A page that is half written, and one that is read at the same time, are never seen.
    unfinished = out.with_name(f".{out.name}.tmp")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise UserError(
            f"--out: {out} cannot be written ({error}); give a file in a directory that exists"
        ) from error
