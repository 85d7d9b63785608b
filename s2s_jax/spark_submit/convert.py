"""`spark-submit convert.py FILE_OR_DIR … --output DIR`, the same as `s2s convert --engine spark`.

It lies in a directory of its own, because spark-submit imports from the directory of its file.
"""

from s2s_jax.cli.commands.convert import main
from s2s_jax.cli.exit import run_command


def main_on_spark(argv: list[str]) -> int:
    """Runs `s2s convert` with Spark and returns the exit code.

    Raises:
      UserError: see `s2s_jax.cli.commands.convert.main`.
    """
    return main(["--engine", "spark", *argv])


if __name__ == "__main__":
    run_command(main_on_spark)
