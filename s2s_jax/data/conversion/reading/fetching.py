"""Copies sources of a conversion from stores to this machine, where DuckDB reads them.

The copies lie in a temporary directory, with the same names of directories below the bucket, because
these may have values (`day=2026-11-28`). Messages show the addresses.
"""

import contextlib
import dataclasses
import fnmatch
import glob
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from s2s_jax.data.conversion.progress import bar
from s2s_jax.data.conversion.reading.sources import TABLE_SIGNS, count
from s2s_jax.errors import UserError
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath, is_address, place_of
from s2s_serve.storage.scratch import Scratch


class Copies:
    """The copies of some sources.

    Attributes:
      paths: the sources, each a path of this machine or a pattern of such paths.
      notes: notes about what was not copied, a sentence each.
    """

    def __init__(self, paths: Sequence[str], above: Path | None):
        """Copies nothing.

        Args:
          paths: see above.
          above: the directory of all copies; None if there are none.
        """
        self.paths = tuple(paths)
        self.notes: list[str] = []
        self._above = above

    def path_of(self, place: Place) -> Path | None:
        """The path of this machine for a place; None for a store from which nothing is copied."""
        if not isinstance(place, StorePath):
            return place
        return None if self._above is None else _local(self._above, place)

    def with_addresses(self, text: str) -> str:
        """A message with addresses instead of the paths of copies."""
        if self._above is None:
            return text
        # `s3/bucket/key` is the copy of `s3://bucket/key`.
        for scheme in ("s3", "gs", "hdfs"):
            text = text.replace(f"{self._above}/{scheme}/", f"{scheme}://")
        return text


@contextlib.contextmanager
def local_copies(paths: Sequence[str], output: Place, temp_dir: Path | None) -> Iterator[Copies]:
    """Copies those of some sources that are in stores; the copies are removed in the end.

    Args:
      paths: files, directories and patterns, on this machine or in stores.
      output: files below this place are not copied, unless it is one of the sources.
      temp_dir: where the copies are; None: `TMPDIR`.

    Raises:
      UserError: a source does not exist, or there is no space for the copies. Errors that the `with`
        block raises have addresses instead of paths of the copies.
      MachineError: a store does not give a file.
    """
    if not any(is_address(path) for path in paths):
        yield Copies(paths, None)
        return
    with _explained(temp_dir):
        scratch = Scratch(temp_dir)
    copies = Copies([], scratch.path)
    try:
        with _explained(temp_dir):
            copied = [_copy(path, output, scratch.path, copies.notes) for path in paths]
        copies.paths = tuple(copied)
        yield copies
    except UserError as error:
        raise type(error)(copies.with_addresses(str(error))) from error
    finally:
        scratch.remove()


@contextlib.contextmanager
def _explained(temp_dir: Path | None) -> Iterator[None]:
    """Turns a failure to write copies into a `UserError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"FILE_OR_DIR …: a file was removed while the sources were copied ({error}); start again"
        ) from error
    except OSError as error:
        raise UserError(
            f"--temp_dir: {temp_dir or tempfile.gettempdir()} cannot be written ({error}); it has to "
            f"hold copies of the sources, so give a directory on a larger disk with --temp_dir"
        ) from error


def _copy(text: str, output: Place, above: Path, notes: list[str]) -> str:
    """Copies what a source stands for, and returns the path or pattern of the copies."""
    place = place_of(text) if is_address(text) else None
    if place is None or not isinstance(place, StorePath):
        return text if place is None else str(place)
    files = file_systems.files_below(place)
    if files is not None:
        # It exists, so it is no pattern, even if it looks like one.
        result, top, is_pattern = str(_local(above, place)), place, False
    else:
        names = place.key.split("/")
        fixed = next((i for i, name in enumerate(names) if glob.has_magic(name)), len(names))
        top, rest = dataclasses.replace(place, key="/".join(names[:fixed])), names[fixed:]
        below = file_systems.files_below(top) if rest else None
        files = [file for file in below or () if _matches(file.path.parts_below(top), rest)]
        if not files:
            raise UserError(f"{place} does not exist; give files or directories with events")
        result = str(Path(glob.escape(str(_local(above, top))), *rest))
        is_pattern = True
    _note_tables(top, above)
    everything = [file.path for file in files]
    own = [path for path in everything if _is_output(path, output, top)]
    if own:
        notes.append(f"{count(own, 'file')} left out, being in --output")
    copies = {path: _local(above, path) for path in sorted({*everything} - {*own})}
    # A pattern may name files that are left out of directories.
    _fetch(copies, lambda path: not is_pattern and _is_hidden(path.parts_below(top)))
    return result


def _is_hidden(names: Sequence[str]) -> bool:
    return any(name[:1] in (".", "_") for name in names if name)


def _note_tables(place: StorePath, above: Path) -> None:
    """Makes empty files for those above a directory that tell that it is in a table."""
    directory = place
    while directory.key:
        directory = directory.parent
        for sign in TABLE_SIGNS:
            # Directories above may have any number of files, so they are not listed.
            inside, _, pattern = sign.rpartition("/")
            found = directory / (inside or pattern)
            if not found.exists() or (inside and not list(found.glob(pattern))):
                continue
            copy = _local(above, found / pattern.replace("*", "x") if inside else found)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.touch()


def _fetch(copies: Mapping[StorePath, Path], is_hidden: Callable[[StorePath], bool]) -> None:
    """Copies files; of those that are not read, only the names."""
    wanted = []
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        if is_hidden(path):
            # They tell what a directory is.
            copy.touch()
        elif not copy.exists() or copy.stat().st_size == 0:
            # Otherwise, another source has it, too.
            wanted.append((copy, path))

    def share() -> float:
        return sum(copy.exists() for copy, _ in wanted) / max(len(wanted), 1)

    with bar("copying", share):
        file_systems.copy_all(wanted, to_store=False)


def _local(above: Path, place: StorePath) -> Path:
    return above / place.scheme / (place.authority or "default") / place.key


def _is_output(path: StorePath, output: Place, source: StorePath) -> bool:
    """Whether a file belongs to an earlier log at the output, inside of a source."""
    if not isinstance(output, StorePath) or output == source:
        return False
    above = f"{output}/"
    return str(path).startswith(above) and not str(source).startswith(above)


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether the names on the way to a file, or to a directory above it, match patterns of `glob`."""
    if not patterns:
        return True
    if patterns == ["**"]:
        # Of a directory, not of a file.
        return bool(names)
    if patterns[0] == "**":
        return any(_matches(names[i:], patterns[1:]) for i in range(len(names) + 1))
    if not names or (names[0].startswith(".") and not patterns[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
