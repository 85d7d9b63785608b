"""`python -m s2s_jax.export`, the same as `s2s export`."""

from s2s_jax import signals

if __name__ == "__main__":
    signals.handle_while_starting()

from s2s_jax.cli.commands.export import main
from s2s_jax.cli.exit import run_command

if __name__ == "__main__":
    run_command(main)
