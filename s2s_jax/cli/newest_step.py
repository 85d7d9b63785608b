"""Where a run stands, for scripts that start it: `python -m s2s_jax.cli.newest_step --config FILE …`.

Takes the arguments of `s2s_jax.train` and prints the step of the newest whole checkpoint (-1: none), a
tab and the run directory. Refuses what training would refuse in them, in a second.
"""

from pathlib import Path

from s2s_jax.config import ConfigParser
from s2s_jax.errors import EXIT_DONE, run_door
from s2s_jax.runs.steps import whole_steps


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: see `errors.run_door`.
    """
    read = ConfigParser("s2s_jax.cli.newest_step", "--config configs/base.py").read(argv)
    if read is not None:
        run_dir = Path(read[1].train.output_dir)
        print(newest_step(run_dir), run_dir, sep="\t")
    return EXIT_DONE


def newest_step(run_dir: Path) -> int:
    """The step of the newest whole checkpoint of `run_dir`, -1 if there is none."""
    return max(whole_steps(run_dir), default=-1)


if __name__ == "__main__":
    run_door(main)
