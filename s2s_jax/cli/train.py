"""The main job: `s2s train --config configs/base.py [--section.key value …]`.

Exit codes: 0 done, 2 a mistake to mend, 3 loss or gradient not finite, 75 stopped by SIGTERM or SIGINT
and saved.
"""

from s2s_jax.cluster import hosts
from s2s_jax.config import ConfigParser
from s2s_jax.errors import EXIT_DONE
from s2s_jax.jobs.train import train


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError, NotFiniteError: see `errors.run_door`.
    """
    # First, so that a mistake that only this process sees ends the others, too.
    hosts.join()
    with hosts.ending_together():
        read = ConfigParser("s2s train", "--config configs/base.py").read(argv)
    if read is None:
        return EXIT_DONE
    _, config = read
    code = train(config)
    hosts.leave()
    return code
