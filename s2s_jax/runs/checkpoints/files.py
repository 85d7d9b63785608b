"""Finds checkpoints and identifies them by their files, without restoring them."""

import hashlib
from pathlib import Path


def complete_steps(run_dir: Path) -> list[int]:
    """The steps of all complete checkpoints of `run_dir`, ascending."""
    # A checkpoint that is still being written has a longer name.
    names = (path.name for path in (run_dir / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def checkpoint_fingerprint(run_dir: Path, step: int) -> str:
    """A fingerprint that is unique for each saved checkpoint, and the same for copies of it."""
    directory = run_dir / "checkpoints" / str(step)
    # Data files have random names, and this file has the time of the save.
    times = directory / "_CHECKPOINT_METADATA"
    digest = hashlib.sha256(times.read_bytes() if times.exists() else b"")
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(directory)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
