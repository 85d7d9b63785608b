"""The versions of an export: `DIR/versions/<number>/`, and `DIR/current.json` with the newest number."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Literal

from s2s_serve import manifest as manifests
from s2s_serve.errors import UserError
from s2s_serve.manifest import Manifest
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath
from s2s_serve.storage.scratch import Scratch

CURRENT = "current.json"
_PART = 2**22


def current_version(directory: Place) -> int:
    """Return the number in `current.json`.

    Raises:
      UserError: the directory has no export.
    """
    path = directory / CURRENT
    try:
        version = json.loads(path.read_bytes())["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        raise UserError(
            f"{path}: expected the number of a version, found none ({reason}); make an export with "
            f"s2s export --output {directory}"
        ) from error
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(
            f"{path}: expected a version of at least 1, found {version!r}; write the number of a "
            f"directory in {directory / 'versions'}"
        )
    return version


def current_contents(directory: Place) -> tuple[int, str | None]:
    """Return the number in `current.json`, and the checksum of the manifest of that version.

    An export that was removed and made again begins with version 1, like the one before, but has
    another manifest. The checksum is None if there is no manifest.

    Raises:
      UserError: the directory has no export, or the store does not give it.
    """
    number = current_version(directory)
    try:
        data = (directory / "versions" / str(number) / manifests.NAME).read_bytes()
    except OSError:
        return number, None
    return number, hashlib.sha256(data).hexdigest()


def copied(directory: StorePath, version: int) -> Scratch:
    """Copies a version from a store to a temporary directory: an export with this version alone.

    Raises:
      UserError: there is no such version, or the disk is full.
    """
    scratch = Scratch()
    there, here = directory / "versions" / str(version), scratch.path / "versions" / str(version)
    here.mkdir(parents=True)
    try:
        file_systems.download(there / manifests.NAME, here / manifests.NAME)
        names = manifests.load(here).files
        for name in names:
            _check_name(here, name)
        file_systems.copy_all([(here / name, there / name) for name in names], to_store=False)
    except OSError as error:
        reason = "there is none" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(
            f"{there}: expected a version of an export that can be copied to {scratch.path}, found none "
            f"({reason}); export the run again, or set TMPDIR to a directory with more space"
        ) from error
    return scratch


def open_version(
    directory: Path, version: int | None, check: Literal["all", "sizes"]
) -> tuple[Path, Manifest]:
    """Return the directory and the manifest of a version, whose files were checked.

    Args:
      directory: the directory of the export.
      version: the number of the version; None: the one in `current.json`.
      check: whether the contents of all files are compared with their checksums, or only their sizes.

    Raises:
      UserError: there is no such version, or a file is missing or differs.
    """
    number = current_version(directory) if version is None else version
    path = directory / "versions" / str(number)
    manifest = manifests.load(path)
    if manifest.version != number:
        raise UserError(
            f"{path / manifests.NAME}: expected version {number}, found {manifest.version}; give the "
            f"directory the name of its version"
        )
    named = [shard for table in manifest.tables.values() for shard in table.shards]
    named += [] if manifest.index is None else [manifest.index.file]
    for name in named:
        if name not in manifest.files:
            raise UserError(
                f"{path / manifests.NAME}: {name} is used but not among files; export the run again"
            )
    for name in manifest.files:
        _check_file(path, name, manifest, check)
    return path, manifest


def _check_name(path: Path, name: str) -> None:
    parts = PurePosixPath(name).parts
    inside = parts and parts[0] != "/" and ".." not in parts and "\\" not in name
    if not inside or not (path / name).resolve().is_relative_to(path.resolve()):
        raise UserError(
            f"{path / manifests.NAME}: expected files of the export, found {name!r}, which leaves its "
            f"directory; do not use this export"
        )


def _check_file(path: Path, name: str, manifest: Manifest, check: Literal["all", "sizes"]) -> None:
    _check_name(path, name)
    expected, file = manifest.files[name], path / name
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UserError(
            f"{file}: the manifest names this file, but it cannot be read ({error.strerror}); copy it "
            f"again, or export the run again"
        ) from error
    if size != expected.bytes:
        raise UserError(
            f"{file}: expected {expected.bytes:,} bytes as in the manifest, found {size:,}; copy it "
            f"again, or export the run again"
        )
    if check == "all" and sha256_of(file) != expected.sha256:
        raise UserError(
            f"{file}: its contents are not those of the export (the checksum in the manifest differs); "
            f"copy it again, or export the run again"
        )


def sha256_of(file: Path) -> str:
    """Return the checksum of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(_PART):
            digest.update(part)
    return digest.hexdigest()
