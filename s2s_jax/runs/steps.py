"""Lists the checkpoints in a run directory without reading them."""

from pathlib import Path


def whole_steps(run_dir: Path) -> list[int]:
    """Steps of all complete checkpoints of `run_dir`, ascending."""
    # A checkpoint that is still being written has a longer name.
    names = (path.name for path in (run_dir / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())
