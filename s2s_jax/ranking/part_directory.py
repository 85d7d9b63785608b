"""A directory of recommendations that several processes write, each its share of the parts.

A part is a Parquet file with the rows of some consecutive stripes. Which stripes a part has depends only
on the log, so any number of processes can continue what others began. They do not talk to each other: a
note in the directory says what the parts are made for, and whoever finds all parts there writes the
manifest and then an empty file, `_SUCCESS`. Processes that begin at the same moment in a store may all
write the note, so it is read again before each file, and parts have a digest of it. Readers of Parquet
ignore files whose names begin with _.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_jax.errors import UserError
from s2s_jax.ranking import part_files
from s2s_jax.ranking.part_files import Said
from s2s_jax.ranking.parts import locked
from s2s_jax.writing import replacing
from s2s_serve.storage.address import Place, StorePath

_NOTE, _MANIFEST, _SUCCESS = "_made_for.json", "_manifest.json", "_SUCCESS"
# The parts of a log have at most about this many rows, and there are at least about so many parts, so
# that many processes can share them.
_PART_ROWS, _PARTS = 2**15, 256


class Share(NamedTuple):
    """Which of the processes of a job this one is.

    Attributes:
      host: the number of this process.
      hosts: the number of processes.
    """

    host: int
    hosts: int


# The share of the only process of a job.
ALONE = Share(0, 1)


def divide(stripe_rows: Sequence[int]) -> list[range]:
    """Divides the stripes of a log into parts.

    Args:
      stripe_rows: the number of rows of each stripe.

    Returns:
      The stripes of each part.

    Examples:
      >>> divide([3, 3, 3])
      [range(0, 1), range(1, 2), range(2, 3)]
    """
    least = min(max(sum(stripe_rows) // _PARTS, 1), _PART_ROWS)
    parts, begin, rows = [], 0, 0
    for stripe, more in enumerate(stripe_rows):
        rows += more
        if rows >= least or stripe == len(stripe_rows) - 1:
            parts.append(range(begin, stripe + 1))
            begin, rows = stripe + 1, 0
    return parts


def parts_in(directory: Place) -> int:
    """The number of finished parts in a directory, which need not exist."""
    return sum(1 for _ in directory.glob("part-*.parquet"))


class PartDirectory:
    """The recommendations in a directory, and this process's share of them."""

    def __init__(
        self,
        directory: Place,
        made_for: Mapping[str, Any],
        stripe_rows: Sequence[int],
        share: Share,
    ):
        """Opens or makes the directory.

        Args:
          directory: the output.
          made_for: everything that the parts depend on, as JSON.
          stripe_rows: the number of rows of each stripe of the log.
          share: which process this is. It makes the parts whose number modulo the number of processes is
            its own number.

        Raises:
          UserError: the directory cannot be written, has other files, or its parts were made for
            something else; or another process does the same share.
        """
        self._dir, self._share = directory, share
        self._made_for = json.loads(json.dumps(made_for))
        self._digest = part_files.digest_of(self._made_for)
        self._parts = divide(stripe_rows)
        self._part_of = {stripe: n for n, part in enumerate(self._parts) for stripe in part}
        # The tables of the part that is being made, and their counts.
        self._tables: list[pa.Table] = []
        self._counts: Counter[str] = Counter()
        host, hosts = share
        in_use = (
            f"--output: another process is host {host} of {hosts} and writes {directory}; wait for "
            f"it or give another --output"
        )
        self._held = contextlib.ExitStack()
        try:
            # In a store, files could be written below the address of another file.
            if isinstance(directory, StorePath) and directory.is_file():
                raise UserError(
                    f"--output: expected a directory, found the file {directory}; give another path, "
                    f"or remove the file"
                )
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"_lock-{host}-of-{hosts}"
            self._still_ours = self._held.enter_context(locked(path, in_use))
            self._agree()
        except BaseException as error:
            self._held.close()
            if not isinstance(error, OSError):
                raise
            raise UserError(f"--output: {directory} cannot be written: {error}") from error

    def missing(self, stripes: int, complete: bool = False) -> list[int]:
        """Return the stripes of this process's share that are not done, ascending.

        Args:
          stripes: the number of stripes of the log.
          complete: whether parts in which rows were skipped are not done.

        Raises:
          UserError: a part of this share was made for something else.
        """
        assert stripes == len(self._part_of), "the directory was opened for this log"
        mine = range(self._share.host, len(self._parts), self._share.hosts)
        there = set(self._dir.glob("part-*.parquet"))
        paths = [self._path(n) for n in mine if self._path(n) in there]
        said = zip(paths, self._said_by(paths), strict=True)
        done = {path for path, each in said if not (complete and each.counts["skipped_rows"])}
        return [stripe for n in mine if self._path(n) not in done for stripe in self._parts[n]]

    def write(self, stripe: int, table: pa.Table, counts: Mapping[str, int]) -> None:
        """Adds a stripe, in the order of `missing`, and writes its part when it is complete.

        Raises:
          UserError: the part cannot be written, or the directory is now made for something else.
        """
        self._tables.append(table)
        self._counts.update(counts)
        number = self._part_of[stripe]
        if stripe != self._parts[number][-1]:
            return
        whole = pa.concat_tables(self._tables).unify_dictionaries()
        whole = part_files.signed(whole, self._digest, self._counts)
        self._tables, self._counts = [], Counter()
        self._still_ours(fresh=True)
        self._check_note()
        self._replace(self._path(number), lambda path: pq.write_table(whole, str(path)))

    def join(self) -> Counter[str] | None:
        """Completes the directory if all parts are there.

        Returns:
          The sums of the parts' counts; None if other processes have not finished.

        Raises:
          UserError: the directory cannot be written, or has parts that were made for something else.
        """
        self._check_note()
        paths = [self._path(number) for number in range(len(self._parts))]
        if not set(paths) <= set(self._dir.glob("part-*.parquet")):
            return None
        total: Counter[str] = Counter()
        parts = []
        for path, stripes, said in zip(paths, self._parts, self._said_by(paths), strict=True):
            total.update(said.counts)
            parts.append(
                {
                    "file": path.name,
                    "rows": said.rows,
                    "stripes": [stripes.start, stripes.stop],
                }
            )
        if not total["users"]:
            return total
        manifest = {
            "rows": sum(part["rows"] for part in parts),
            "counts": total,
            "parts": parts,
            "made_for": self._made_for,
        }
        text = json.dumps(manifest, indent=1)
        # Two processes may find all parts at the same time; they write the same.
        self._replace(self._dir / _MANIFEST, lambda path: path.write_text(text))
        self._still_ours(fresh=True)
        self._check_note()
        self._replace(self._dir / _SUCCESS, lambda path: path.touch())
        self._remove_leftovers()
        return total

    def discard(self) -> None:
        """Removes what was written; for recommendations without a row."""
        for path in [*self._dir.glob("part-*.parquet"), self._dir / _NOTE]:
            path.unlink(missing_ok=True)
        self._held.close()
        if isinstance(self._dir, Path):
            with contextlib.suppress(OSError):
                self._dir.rmdir()

    def close(self) -> None:
        """Releases the share."""
        self._held.close()

    def _path(self, number: int) -> Place:
        return self._dir / f"part-{number:06}.parquet"

    def _agree(self) -> None:
        """Writes what the parts are made for, or compares it with what others have written."""
        note = self._dir / _NOTE
        if not note.exists():
            foreign = [path.name for path in self._dir.iterdir() if path.name[0] not in "_."]
            if foreign:
                raise UserError(
                    f"--output: {self._dir} has other files (found {foreign[0]}); give a new directory"
                )
            self._write_note(note)
        self._check_note()

    def _check_note(self) -> None:
        """Compares what the parts are made for with what the note says."""
        try:
            before = json.loads((self._dir / _NOTE).read_text())
        except FileNotFoundError as error:
            raise UserError(
                f"--output: {self._dir / _NOTE} was removed meanwhile; give another --output"
            ) from error
        except ValueError:
            before = None
        if before == self._made_for:
            return
        before = before if isinstance(before, dict) else {}
        now = self._made_for
        changed = [key for key in now if key not in before or before[key] != now[key]]
        raise UserError(
            f"--output: the parts in {self._dir} are made with another {', '.join(changed)}; give all "
            f"processes the same, or give another --output"
        )

    def _write_note(self, note: Place) -> None:
        text = json.dumps(self._made_for)
        if isinstance(note, StorePath):
            # A process that began at the same moment may write its own after it; see `_check_note`.
            note.write_text(text)
            return
        unfinished = self._unfinished(note)
        unfinished.write_text(text)
        # Unlike a rename, this fails if another process was faster.
        try:
            os.link(unfinished, note)
        except FileExistsError:
            pass
        except OSError:
            # Some network file systems have no links.
            unfinished.replace(note)
        unfinished.unlink(missing_ok=True)

    def _said_by(self, paths: Sequence[Place]) -> list[Said]:
        """What parts say about themselves; refuses those that were made for something else."""
        read = []
        for path, said in zip(paths, part_files.read_all(paths), strict=True):
            if said is None or said.digest != self._digest:
                found = "is not complete" if said is None else "was made for something else"
                raise UserError(
                    f"--output: expected parts that were made for what {_NOTE} says, but {path} "
                    f"{found}; remove it and start again, or give another --output"
                )
            read.append(said)
        return read

    def _remove_leftovers(self) -> None:
        """Removes what killed processes left; others may still be about to rename their files."""
        if isinstance(self._dir, StorePath):
            return
        own = f"{self._share.host}-of-{self._share.hosts}"
        for path in self._dir.glob("_lock-*"):
            if path.name != f"_lock-{own}":
                # It is removed with that, unless another process has it.
                with contextlib.suppress(UserError), locked(path, "it is at work"):
                    pass
        at_work = {path.name.removeprefix("_lock-") for path in self._dir.glob("_lock-*")} - {own}
        for path in self._dir.glob("_unfinished-*"):
            if path.name.removeprefix("_unfinished-") not in at_work:
                path.unlink(missing_ok=True)

    def _unfinished(self, path: Path) -> Path:
        return path.with_name(f"_unfinished-{self._share.host}-of-{self._share.hosts}")

    def _replace(self, path: Place, write: Callable[[Path], Any]) -> None:
        """Writes a temporary file and moves it to `path`, so that no one reads a partial file."""
        if isinstance(path, StorePath):
            with replacing(path) as copied:
                write(copied)
            return
        unfinished = self._unfinished(path)
        try:
            write(unfinished)
            unfinished.replace(path)
        except OSError as error:
            # Where files cannot be locked, who completes the directory removes those of others.
            gone = isinstance(error, FileNotFoundError)
            if gone and path.exists() and (self._dir / _SUCCESS).exists():
                return
            raise UserError(f"--output: {path} cannot be written: {error}") from error
