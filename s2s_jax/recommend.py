"""`python -m s2s_jax.recommend`, the same as `s2s recommend`."""

from s2s_jax import signals

if __name__ == "__main__":
    signals.handle_while_starting()

from s2s_jax.cli.commands.recommend import main
from s2s_jax.cli.exit import run_command

if __name__ == "__main__":
    run_command(main)
