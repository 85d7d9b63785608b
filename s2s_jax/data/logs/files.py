"""Finds the ORC files in a list of files and directories."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from s2s_jax.config import refuse_addresses
from s2s_jax.errors import UserError
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath, place_of

# The first bytes of every ORC file.
_MAGIC = b"ORC"
# The most pieces that a path with commas in its name may be split into.
_MOST_PIECES = 16


class Found(NamedTuple):
    """The files of a log.

    Attributes:
      files: the files to read, in order.
      empty: those of 0 bytes.
      left_out: ORC files below the directories that are not read because of their names.
      circles: linked directories that are not followed because they lead back to a parent directory.
    """

    files: list[Place]
    empty: list[Place]
    left_out: list[Place]
    circles: list[Path]

    def notes(self) -> list[str]:
        """Notes on what the user may not expect, a sentence each."""
        notes = []
        if self.left_out:
            notes.append(
                f"warning: {_count(self.left_out, 'ORC file')} left out: names that start with . or _ "
                f"are skipped, and so are names that do not end in .orc if others in the directory do; "
                f"rename these files, or name them one by one to read them"
            )
        if self.circles:
            notes.append(
                f"{_count(self.circles, 'linked directory')} not followed, as it leads back to a "
                f"directory that it is in"
            )
        if self.empty:
            others = "" if len(self.empty) == 1 else f" and {len(self.empty) - 1:,} others"
            notes.append(f"{self.empty[0]}{others}: 0 bytes, read as a file without rows")
        return notes


def _count(paths: Sequence[Place], noun: str) -> str:
    if len(paths) == 1:
        return f"1 {noun} ({paths[0]}) is"
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{len(paths):,} {plural} ({paths[0]} and others) are"


def find(names: Sequence[str]) -> Found:
    """The ORC files at some paths, in order.

    A directory stands for all files below it that end in .orc or, if there are none, for all files
    below it, sorted by path. Links are followed. Files and directories whose names start with `.` or
    `_` are skipped: other programs keep unfinished or left-over files there (`_temporary`, `_SUCCESS`,
    `.ipynb_checkpoints`).

    Args:
      names: the paths, or the addresses in stores, of files and directories.

    Raises:
      UserError: `names` is empty, a path does not exist or cannot be accessed, a directory is empty, or
        a file is named twice.
      MachineError: a store cannot be reached.
    """
    if not names:
        raise UserError("io.data_paths: expected ORC files or directories, found none")
    refuse_addresses("io.data_paths", names, of_stores=False)
    found = Found([], [], [], [])
    for name in names:
        path = place_of(name)
        if isinstance(path, StorePath):
            _add_from_store(path, found)
            continue
        try:
            _add(path, found)
        except OSError as error:
            raise UserError(f"io.data_paths: {path} cannot be accessed ({error})") from error
    resolved: dict[str, Place] = {}
    for path in found.files:
        first = resolved.setdefault(_real(path), path)
        if first is not path:
            also = "" if first == path else f" (also as {first})"
            raise UserError(
                f"io.data_paths: {path} is named twice{also}; its rows would count double"
            )
    left_out = [path for path in found.left_out if _real(path) not in resolved]
    return found._replace(left_out=left_out)


def split_names(data_paths: str) -> list[str]:
    """The paths of a comma-separated list.

    A path may itself contain commas: pieces that do not exist on their own are joined if the joined path
    exists.
    """
    pieces = data_paths.split(",")
    # From the right: the number of pieces that a path takes, such that all later paths exist.
    taken: dict[int, int] = {}
    for first in reversed(range(len(pieces))):
        for count in range(1, min(_MOST_PIECES, len(pieces) - first) + 1):
            after = first + count
            name = ",".join(pieces[first:after]).strip()
            if (after == len(pieces) or after in taken) and (not name or _exists(name)):
                taken[first] = count
                break
    if 0 not in taken:
        return [piece.strip() for piece in pieces if piece.strip()]
    names, first = [], 0
    while first < len(pieces):
        names.append(",".join(pieces[first : first + taken[first]]).strip())
        first += taken[first]
    return [name for name in names if name]


def find_files(data_paths: str) -> list[Place]:
    """The ORC files in a comma-separated list of files and directories; see `find`."""
    return find(split_names(data_paths)).files


def _real(path: Place) -> str:
    return str(path) if isinstance(path, StorePath) else os.path.realpath(path)


def _exists(name: str) -> bool:
    path = place_of(name)
    if isinstance(path, StorePath):
        return True
    try:
        return path.exists()
    except OSError:
        # Opening the file later will report the reason.
        return True


def _add(path: Path, found: Found) -> None:
    if path.is_file():
        found.files.append(path)
        found.empty.extend([path] if path.stat().st_size == 0 else [])
        return
    if not path.is_dir():
        comma = " (paths are separated by commas)" if "," in str(path) else ""
        raise UserError(f"io.data_paths: {path} does not exist{comma}")
    inside, hidden = [], []
    for file in sorted(walk(path, found.circles)):
        (hidden if _hidden(file, path) else inside).append(file)
    named = [file for file in inside if file.suffix == ".orc"]
    chosen = named or inside
    if not chosen:
        raise UserError(f"io.data_paths: directory {path} holds no ORC files")
    found.files.extend(chosen)
    # A broken link is refused when it is read.
    found.empty.extend(p for p in chosen if p.exists() and p.stat().st_size == 0)
    found.left_out.extend(file for file in hidden if file.suffix == ".orc")
    if named:
        found.left_out.extend(f for f in inside if f.suffix != ".orc" and _is_orc(f))


def _add_from_store(path: StorePath, found: Found) -> None:
    listed = file_systems.files_below(path)
    if listed is None:
        raise UserError(f"io.data_paths: {path} does not exist")
    if [each.path for each in listed] != [path]:
        shown = [each for each in listed if not _is_hidden(each.path.parts_below(path))]
        named = [each for each in shown if each.path.suffix == ".orc"]
        hidden = [each.path for each in listed if each.path.suffix == ".orc" and each not in shown]
        found.left_out.extend(hidden)
        listed = named or shown
        if not listed:
            raise UserError(f"io.data_paths: directory {path} holds no ORC files")
    found.files.extend(each.path for each in listed)
    found.empty.extend(each.path for each in listed if each.size == 0)


def walk(directory: Path, circles: list[Path]) -> Iterator[Path]:
    """All files below a directory, following links; links that make a circle are added to `circles`.

    Raises:
      OSError: a directory cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    top = os.path.realpath(directory)
    above = {directory: (top, *map(str, Path(top).parents))}
    for name, directories, files in os.walk(directory, followlinks=True, onerror=refuse):
        here = Path(name)
        followed = []
        for inner in directories:
            path = here / inner
            real = os.path.realpath(path)
            if real in above[here]:
                circles.append(path)
            else:
                above[path] = (*above[here], real)
                followed.append(inner)
        directories[:] = followed
        del above[here]
        # A broken link is included: opening it gives an error, instead of leaving it out silently.
        yield from (p for p in (here / f for f in files) if p.is_file() or p.is_symlink())


def _hidden(path: Path, below: Path) -> bool:
    return _is_hidden(path.relative_to(below).parts)


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part[:1] in (".", "_") for part in parts)


def _is_orc(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False
