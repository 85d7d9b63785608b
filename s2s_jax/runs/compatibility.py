"""What a run cannot survive: another configuration, or checkpoints of a later format."""

from pathlib import Path
from typing import Any

from s2s_jax.config import Config, identity, parse_json
from s2s_jax.errors import UserError
from s2s_jax.runs.run_dir import config_path
from s2s_jax.version import __version__

# Of what checkpoints hold; raised by one when older programs would misunderstand newer ones.
_FORMAT = 1
# Saved beside each state: the format, under the name that it has had from the start, and who wrote it.
VERSIONS = {"version": _FORMAT, "s2s_jax": __version__}


def check_config(run_dir: Path, config: Config) -> None:
    """Refuses a configuration that the directory's checkpoints cannot be continued with.

    Raises:
      UserError: naming the first key that differs.
    """
    run_dir = run_dir.resolve()
    path = config_path(run_dir)
    try:
        before = identity.of_run(parse_json(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: expected the configuration that the checkpoints beside it were made with, "
            f"but it cannot be read ({error}); give another train.output_dir"
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


def of_known_format(saved: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """What was saved beside a state, without `VERSIONS`.

    Raises:
      UserError: it has a later format than this program knows.
    """
    # Without a number, checkpoints have the first format.
    found = saved["version"] if "version" in saved else _FORMAT
    if found > _FORMAT:
        known = "s2s_jax" in saved
        writer = f"s2s_jax {saved['s2s_jax']}" if known else "a later version of s2s_jax"
        raise UserError(
            f"{checkpoint}: expected a checkpoint of format {_FORMAT} or before, found format {found}, "
            f"saved by {writer}; use that version"
        )
    return {name: value for name, value in saved.items() if name not in VERSIONS}
