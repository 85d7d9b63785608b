"""Makes the next version of an export: written beside the others, then renamed and named as current."""

import contextlib
import datetime
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from s2s_jax.errors import UserError
from s2s_jax.writing import explained, replacing
from s2s_serve import manifest as manifests
from s2s_serve.manifest import FileEntry, Manifest
from s2s_serve.versions import CURRENT, current_version, sha256_of

_UNFINISHED = ".unfinished-"


@contextlib.contextmanager
def new_version(output: Path) -> Iterator[tuple[int, Path]]:
    """Makes a directory for the files of the next version.

    The caller has to call `finish` in the end. Otherwise, and if anything fails, the directory is
    removed, and the export stays as it was.

    Args:
      output: the directory of the export.

    Yields:
      The number of the version, and the directory.

    Raises:
      UserError: the directory cannot be used, or a file cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise UserError(
            f"--output: expected a directory, found the file {output}; give another path"
        )
    versions = output / "versions"
    with explained(versions):
        versions.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(versions)
        number = next_number(output)
        path = versions / f"{_UNFINISHED}{number}{_of_this_host()}{os.getpid()}"
        path.mkdir()
        try:
            yield number, path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def next_number(output: Path) -> int:
    """Return the number after the largest that a version has, or had if it was the current one.

    Raises:
      UserError: `current.json` is broken.
    """
    names = [path.name for path in (output / "versions").glob("*")]
    numbers = [int(name) for name in names if name.isdecimal()]
    if (output / CURRENT).exists():
        numbers.append(current_version(output))
    return max(numbers, default=0) + 1


def finish(output: Path, path: Path, manifest: Manifest) -> Path:
    """Writes the manifest, gives the directory its name, and points `current.json` to it.

    Args:
      output: the directory of the export.
      path: the directory from `new_version`, with all files except the manifest.
      manifest: the manifest.

    Returns:
      The directory of the version.

    Raises:
      UserError: another process made this version meanwhile.
      OSError: a file cannot be written.
    """
    (path / manifests.NAME).write_text(manifest.to_json())
    for written in path.rglob("*"):
        _sync(written)
    final = output / "versions" / str(manifest.version)
    try:
        path.rename(final)
    except OSError as error:
        if final.exists():
            raise UserError(
                f"{final}: another command made this version meanwhile; start this one again"
            ) from error
        raise
    _sync(final.parent)
    with replacing(output / CURRENT) as current:
        current.write_text(json.dumps({"version": manifest.version}) + "\n")
        _sync(current)
    return final


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
    for path in versions.glob(f"{_UNFINISHED}*{_of_this_host()}*"):
        process = path.name.rpartition("-")[2]
        if process.isdecimal() and not _runs(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _of_this_host() -> str:
    return f"-{socket.gethostname()}-"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    """Waits until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
