"""Prints how far a job is, for launch scripts: `python -m s2s_jax.progress train --config FILE …`.

Takes the name of a command (train, evaluate or recommend) and its arguments, and refuses those that the
command would refuse. Prints a number that grows as the job goes on, a tab, and what is kept if it is
interrupted.
"""

from s2s_jax.cli.exit import run_command
from s2s_jax.cli.parsing import WithConfig, parse_with_config
from s2s_jax.errors import EXIT_DONE, UserError
from s2s_jax.runs.checkpoints.files import complete_steps
from s2s_jax.runs.place import place_of_run


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line or the configuration is wrong.
    """
    command, rest = argv[0] if argv else "", argv[1:]
    if command not in _PROGRESS_OF:
        raise UserError(f"expected one of {', '.join(_PROGRESS_OF)}, found {command!r}")
    found = _PROGRESS_OF[command](rest)
    if found is not None:
        print(*found, sep="\t")
    return EXIT_DONE


def _of_train(argv: list[str]) -> tuple[int, str] | None:
    given = parse_with_config(WithConfig, argv, "train")
    if given is None:
        return None
    step = max(complete_steps(place_of_run(given[1].train.output_dir)), default=-1)
    return step, "no checkpoint" if step < 0 else f"step {step:,}"


def _of_evaluate(argv: list[str]) -> tuple[int, str] | None:
    # Imported here because it takes seconds, which training need not wait for.
    from s2s_jax.cli.commands.evaluate import OLD_NAMES, Arguments

    given = parse_with_config(Arguments, argv, "evaluate", OLD_NAMES)
    return None if given is None else (0, "nothing")


def _of_recommend(argv: list[str]) -> tuple[int, str] | None:
    # See above.
    from s2s_jax.cli.commands.recommend import OLD_NAMES, Arguments
    from s2s_jax.ranking import part_directory, parts

    given = parse_with_config(Arguments, argv, "recommend", OLD_NAMES)
    if given is None:
        return None
    output = given[0].output
    done = part_directory.parts_in(output) + parts.parts_of(output)
    return done, f"{done:,} finished parts"


_PROGRESS_OF = {"train": _of_train, "evaluate": _of_evaluate, "recommend": _of_recommend}

if __name__ == "__main__":
    run_command(main)
