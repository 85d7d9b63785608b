"""Refuses to continue a run with an incompatible configuration, or from a later checkpoint format."""

from typing import Any

from s2s_jax.config import Config, identity, parse_json
from s2s_jax.errors import UserError
from s2s_jax.runs.run_dir import config_path
from s2s_jax.version import __version__
from s2s_serve.storage.address import Place

# Format of checkpoints; increased by one when older programs would misread newer checkpoints.
_FORMAT = 1
# Saved with each state: the format, under its original name, and the version of the writer.
VERSIONS = {"version": _FORMAT, "s2s_jax": __version__}


def check_config(run_dir: Place, config: Config) -> None:
    """Refuses a configuration with which the run in this directory cannot continue.

    Raises:
      UserError: names the first key that differs.
    """
    run_dir = run_dir.resolve()
    path = config_path(run_dir)
    try:
        before = identity.of_run(parse_json(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: expected the configuration of the checkpoints in this directory, but it cannot "
            f"be read ({error}); give another train.output_dir"
        ) from error
    now = identity.of_run(config)
    for key in before | now:
        if key not in now or key not in before or before[key] != now[key]:
            was = before[key] if key in before else "nothing"
            found = now[key] if key in now else "nothing"
            raise UserError(
                f"{key}: the checkpoints in {run_dir} were made with {was}, found {found}; "
                f"go back to {was} or give another train.output_dir"
            )


def of_known_format(saved: dict[str, Any], checkpoint: Place) -> dict[str, Any]:
    """The progress saved with a state, without `VERSIONS`.

    Raises:
      UserError: the checkpoint has a later format than this program knows.
    """
    # Checkpoints without a number have the first format.
    found = saved["version"] if "version" in saved else _FORMAT
    if found > _FORMAT:
        known = "s2s_jax" in saved
        writer = f"s2s_jax {saved['s2s_jax']}" if known else "a later version of s2s_jax"
        raise UserError(
            f"{checkpoint}: expected a checkpoint of format {_FORMAT} or before, found format {found}, "
            f"saved by {writer}; use that version"
        )
    return {name: value for name, value in saved.items() if name not in VERSIONS}
