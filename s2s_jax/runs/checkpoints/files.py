"""Finds checkpoints and identifies them by their files, without restoring them."""

import hashlib
from pathlib import Path

from s2s_jax.errors import UserError
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath
from s2s_serve.storage.scratch import Scratch

# This file has the time of the save. In a store, it is written last: a checkpoint without it is not
# complete.
COMPLETE = "_CHECKPOINT_METADATA"


def complete_steps(run_dir: Place) -> list[int]:
    """The steps of all complete checkpoints of `run_dir`, ascending."""
    directory = run_dir / "checkpoints"
    if isinstance(directory, StorePath):
        below = file_systems.files_below(directory) or []
        parts = (each.path.parts_below(directory) for each in below)
        names = [each[0] for each in parts if each[1:] == (COMPLETE,)]
    else:
        # A checkpoint that is still being written has a longer name.
        names = [path.name for path in directory.glob("*")]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def checkpoint_fingerprint(run_dir: Place, step: int) -> str:
    """A fingerprint that is unique for each saved checkpoint, and the same for copies of it."""
    directory = run_dir / "checkpoints" / str(step)
    if isinstance(directory, StorePath):
        below = file_systems.files_below(directory) or []
        files = [("/".join(each.path.parts_below(directory)), each.size) for each in below]
    else:
        paths = (path for path in directory.rglob("*") if path.is_file())
        files = [(str(path.relative_to(directory)), path.stat().st_size) for path in paths]
    # Data files have random names.
    times = directory / COMPLETE
    digest = hashlib.sha256(times.read_bytes() if times.exists() else b"")
    for name, size in sorted(files, key=lambda each: each[0].split("/")):
        digest.update(f"{name} {size}\n".encode())
    return digest.hexdigest()[:16]


class LocalCheckpoint:
    """A checkpoint on this machine, or a copy of one that is in a store, as far as it was needed.

    A copy is in a temporary directory, which is removed with this object.

    Attributes:
      place: the directory of the checkpoint, `checkpoints/STEP`.
    """

    def __init__(self, place: Place):
        """Copies nothing yet."""
        self.place = place
        self._scratch: Scratch | None = None

    def with_item(self, name: str) -> Path:
        """The directory of the checkpoint, on this machine, with one of its items.

        Raises:
          UserError: the store does not give it, or the disk is full.
        """
        if not isinstance(self.place, StorePath):
            return self.place
        if self._scratch is None:
            self._scratch = Scratch()
        top = self._scratch.path / self.place.name
        if not (top / name).exists():
            below = [each.path for each in file_systems.files_below(self.place / name) or []]
            copies = [(top.joinpath(*path.parts_below(self.place)), path) for path in below]
            copies.append((top / COMPLETE, self.place / COMPLETE))
            try:
                file_systems.copy_all(copies, to_store=False)
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                raise UserError(
                    f"{self.place}: cannot be copied to {top} ({error.strerror or error}); free space "
                    f"there, or set TMPDIR to a directory with more"
                ) from error
        return top
