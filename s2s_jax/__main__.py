"""`python -m s2s_jax COMMAND …`, the same as `s2s COMMAND …`."""

from s2s_jax.cli.main import run

if __name__ == "__main__":
    run()
