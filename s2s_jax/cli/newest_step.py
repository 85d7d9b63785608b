"""Prints the progress of a run, for launch scripts: `python -m s2s_jax.cli.newest_step --config FILE …`.

Takes the arguments of `s2s train`, and refuses those that training would refuse. Prints the step of the
newest complete checkpoint (-1 if there is none), a tab, and the run directory. This takes a second.
"""

from pathlib import Path

from s2s_jax.cli.exit import run_command
from s2s_jax.cli.parsing import WithConfig, parse_with_config
from s2s_jax.errors import EXIT_DONE
from s2s_jax.runs.checkpoints.files import complete_steps


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line or the configuration is wrong.
    """
    given = parse_with_config(WithConfig, argv, "train")
    if given is not None:
        run_dir = Path(given[1].train.output_dir)
        print(max(complete_steps(run_dir), default=-1), run_dir, sep="\t")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
