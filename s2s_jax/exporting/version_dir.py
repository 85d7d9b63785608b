"""Makes the next version of an export: written beside the others, then renamed and named as current.

In a store, its files are copied from a temporary directory. Its manifest is the last one, and a version
without it does not count.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from s2s_jax.errors import UserError
from s2s_jax.storage import lock
from s2s_jax.writing import explained, replacing
from s2s_serve import manifest as manifests
from s2s_serve.manifest import FileEntry, Manifest
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath
from s2s_serve.storage.scratch import Scratch
from s2s_serve.versions import CURRENT, current_version, sha256_of

# The directories that this process is writing. Others with its number are of an earlier process: in a
# container, all commands may have the same number.
_writing: set[str] = set()
# A file that is written to a store to see whether that is allowed.
_TRIED = ".tried"


class NewVersion(NamedTuple):
    """A version that is being made.

    Attributes:
      number: its number.
      path: the directory for its files, on this machine.
      still_ours: checks that no other command has taken over; see `lock.StoreLock.check`.
    """

    number: int
    path: Path
    still_ours: lock.StillOurs


def check_output(output: Place) -> None:
    """Checks that versions can be written, before anything takes time.

    Args:
      output: the directory of the export; it is made.

    Raises:
      UserError: the directory cannot be used.
    """
    if output.exists() and not output.is_dir():
        raise UserError(
            f"--output: expected a directory, found the file {output}; give another path"
        )
    versions = output / "versions"
    if isinstance(versions, StorePath):
        (versions / _TRIED).write_text("")
        (versions / _TRIED).unlink(missing_ok=True)
        next_number(output)
        return
    with explained(versions):
        versions.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=versions):
            pass
    next_number(output)


@contextlib.contextmanager
def new_version(output: Place) -> Iterator[NewVersion]:
    """Makes a directory for the files of the next version.

    The caller has to call `finish` in the end. Otherwise, and if anything fails, the directory is
    removed, and the export stays as it was.

    Args:
      output: the directory of the export.

    Raises:
      UserError: the directory cannot be used, or a file cannot be written.
    """
    check_output(output)
    if isinstance(output, StorePath):
        with _new_version_in_store(output) as found:
            yield found
        return
    versions = output / "versions"
    with explained(versions):
        _remove_abandoned(versions)
        number = next_number(output)
        # `_remove_abandoned` knows these names.
        name = f".unfinished-{number}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        path = versions / name
        _writing.add(name)
        try:
            path.mkdir()
            yield NewVersion(number, path, lock.always_ours)
        finally:
            shutil.rmtree(path, ignore_errors=True)
            _writing.discard(name)


@contextlib.contextmanager
def _new_version_in_store(output: StorePath) -> Iterator[NewVersion]:
    versions = output / "versions"
    in_use = f"--output: another command writes a version in {output}; wait for it"
    with lock.held(versions / ".lock", in_use) as held:
        for path in versions.iterdir():
            # What killed commands left behind.
            if path.name.isdecimal() and not (path / manifests.NAME).exists():
                file_systems.remove_below(path)
        scratch = Scratch()
        try:
            number = next_number(output)
            path = scratch.path / str(number)
            with explained(path):
                path.mkdir()
                yield NewVersion(number, path, held.check)
        finally:
            scratch.remove()


def next_number(output: Place) -> int:
    """Return the number after the largest that a version has, or had if it was the current one.

    Raises:
      UserError: `current.json` is broken.
    """
    names = [path.name for path in (output / "versions").glob("*")]
    numbers = [int(name) for name in names if name.isdecimal()]
    if (output / CURRENT).exists():
        numbers.append(current_version(output))
    return max(numbers, default=0) + 1


def finish(output: Place, new: NewVersion, manifest: Manifest) -> tuple[Place, Manifest]:
    """Writes the manifest, gives the directory its name, and points `current.json` to it.

    If another command made a version with this number meanwhile, this one gets the next number.

    Args:
      output: the directory of the export.
      new: what `new_version` yielded; its directory has all files except the manifest.
      manifest: the manifest.

    Returns:
      The directory of the version, and the manifest that was written.

    Raises:
      UserError: `current.json` is broken, or another command has taken over the export.
      OSError: a file cannot be written.
    """
    path = new.path
    (path / manifests.NAME).write_text(manifest.to_json())
    for written in path.rglob("*"):
        _sync(written)
    while not _published(new, final := output / "versions" / str(manifest.version)):
        manifest = dataclasses.replace(manifest, version=next_number(output))
        (path / manifests.NAME).write_text(manifest.to_json())
        _sync(path / manifests.NAME)
    if isinstance(final, Path):
        _sync(final.parent)
    new.still_ours(fresh=True)
    # Another command may have made a newer version since then.
    if not (output / CURRENT).exists() or current_version(output) < manifest.version:
        with replacing(output / CURRENT) as current:
            current.write_text(json.dumps({"version": manifest.version}) + "\n")
            _sync(current)
    return final, manifest


def file_entries(path: Path) -> dict[str, FileEntry]:
    """Return the sizes and checksums of all files in a directory, by their paths in it."""
    files = sorted(each for each in path.rglob("*") if each.is_file())
    return {
        file.relative_to(path).as_posix(): FileEntry(
            bytes=file.stat().st_size, sha256=sha256_of(file)
        )
        for file in files
    }


def now() -> str:
    """Return the time, as in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _remove_abandoned(versions: Path) -> None:
    """Removes what killed commands of this host left behind."""
    host = re.escape(socket.gethostname())
    pattern = re.compile(rf"\.unfinished-\d+-{host}-(\d+)-[0-9a-f]{{8}}")
    for path in versions.iterdir():
        found = pattern.fullmatch(path.name)
        if found is not None and path.name not in _writing and not _runs(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    """Return whether a process other than this one runs on this host."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _published(new: NewVersion, final: Place) -> bool:
    """Gives a directory its final name, or copies its files there; returns False if that is taken."""
    path = new.path
    if isinstance(final, StorePath):
        if (final / manifests.NAME).exists():
            return False
        files = [each for each in path.rglob("*") if each.is_file() and each.name != manifests.NAME]
        names = (each.relative_to(path).as_posix() for each in files)
        copies = zip(files, map(final.__truediv__, names), strict=True)
        # Another command would write its files to the same place.
        new.still_ours(fresh=True)
        file_systems.copy_all(copies, to_store=True)
        new.still_ours(fresh=True)
        file_systems.upload(path / manifests.NAME, final / manifests.NAME)
        return True
    try:
        path.rename(final)
    except OSError:
        if final.exists():
            return False
        raise
    return True


def _sync(path: Path) -> None:
    """Waits until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
