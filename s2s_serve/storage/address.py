"""Addresses such as `s3://bucket/log/part-0.orc`, beside the paths of this machine."""

import dataclasses
import fnmatch
import os
import posixpath
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from s2s_serve.errors import UserError

# The stores that can be read and written.
SCHEMES = ("s3", "gs", "hdfs")
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)


@dataclasses.dataclass(frozen=True, order=True)
class StorePath:
    """A file or a directory of a store, with the methods of `pathlib.Path` that make sense there.

    A directory exists as soon as a file in it does. A file is written whole or not at all. Methods raise
    `MachineError` if the store does not answer, or does not allow something.

    Attributes:
      scheme: one of `SCHEMES`.
      authority: the bucket or, with hdfs, host and port of the name node, which may be empty.
      key: the path inside, without slashes at its ends.

    Examples:
      >>> path = place_of("s3://logs/2026/part-0.orc")
      >>> path.name, path.suffix, str(path)
      ('part-0.orc', '.orc', 's3://logs/2026/part-0.orc')
    """

    scheme: str
    authority: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}/{self.key}".rstrip("/")

    @property
    def name(self) -> str:
        """The last part of the key."""
        return posixpath.basename(self.key)

    @property
    def suffix(self) -> str:
        """The end of the name, from its last dot on."""
        return posixpath.splitext(self.name)[1]

    @property
    def stem(self) -> str:
        """The name without the suffix."""
        return posixpath.splitext(self.name)[0]

    @property
    def parent(self) -> "StorePath":
        """The directory above; of a bucket, itself."""
        return dataclasses.replace(self, key=posixpath.dirname(self.key))

    def __truediv__(self, below: str) -> "StorePath":
        return dataclasses.replace(self, key=posixpath.join(self.key, below).strip("/"))

    def with_name(self, name: str) -> "StorePath":
        """The file with another name in the same directory."""
        return self.parent / name

    def parts_below(self, above: "StorePath") -> tuple[str, ...]:
        """The names on the way from a directory to this."""
        return tuple(self.key[len(above.key) :].strip("/").split("/"))

    def expanduser(self) -> "StorePath":
        """This."""
        return self

    def resolve(self) -> "StorePath":
        """This."""
        return self

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing, because directories exist with their files."""

    def exists(self) -> bool:
        """Whether there is such a file, or a file below."""
        return _files().kind_of(self) is not None

    def is_file(self) -> bool:
        """Whether there is such a file."""
        return _files().kind_of(self) == "file"

    def is_dir(self) -> bool:
        """Whether there is a file below."""
        return _files().kind_of(self) == "directory"

    def iterdir(self) -> Iterator["StorePath"]:
        """The files and directories in this directory, sorted by name; none if it does not exist."""
        yield from _files().entries_of(self)

    def glob(self, pattern: str) -> Iterator["StorePath"]:
        """The files and directories in this directory whose names match a pattern without slashes."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def read_bytes(self) -> bytes:
        """The contents.

        Raises:
          FileNotFoundError: there is no such file.
        """
        return _files().read(self)

    def read_text(self) -> str:
        """The contents, as UTF-8; see `read_bytes`."""
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Replaces the contents."""
        _files().write(self, data)

    def write_text(self, text: str) -> None:
        """Replaces the contents, as UTF-8."""
        self.write_bytes(text.encode())

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the file.

        Raises:
          FileNotFoundError: there is no such file, unless `missing_ok`.
        """
        _files().remove(self, missing_ok)


def _files() -> ModuleType:
    # It imports this module.
    from s2s_serve.storage import file_systems

    return file_systems


# Where a file is: on this machine, or in a store.
Place = Path | StorePath


def is_address(text: str) -> bool:
    """Whether a text is the address of a store that can be read, or a `file://` address."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and found[1].lower() in (*SCHEMES, "file")


def refuse_secrets(text: str) -> None:
    """Refuses addresses like `s3://KEY:SECRET@bucket/log`, which messages and files would show.

    Raises:
      UserError: there is more than a bucket; it is not repeated.
    """
    # pathlib shortens // to /.
    found = re.match(r"(s3|gs):/+([^/]*)", text, re.IGNORECASE)
    if found is not None and re.search("[:@]", found[2]):
        scheme = found[1].lower()
        raise UserError(
            f"expected an address like {scheme}://BUCKET/KEY, found : or @ in the place of the bucket "
            f"(not shown, as it may be a secret); give credentials as the store's own tools take them, "
            f"for example in environment variables"
        )


def place_of(path: "str | os.PathLike[str] | StorePath") -> Place:
    """The place that a text stands for: the address of a store, a `file://` address, or a path.

    What is a place already stays as it is.

    Raises:
      UserError: the address may have a secret in it, or is one of another machine.

    Examples:
      >>> place_of("file:///data/log")
      PosixPath('/data/log')
      >>> place_of("gs://bucket//log/")
      StorePath(scheme='gs', authority='bucket', key='log')
    """
    if isinstance(path, StorePath):
        return path
    text = os.fspath(path)
    if not is_address(text):
        return Path(text).expanduser()
    refuse_secrets(text)
    scheme, rest = text.split("://", 1)
    authority, _, key = rest.partition("/")
    if scheme.lower() == "file":
        if authority.lower() not in ("", "localhost"):
            raise UserError(
                f"{text}: expected file:// and a path that begins with /, found {authority} before the "
                f"path; give the path without file://"
            )
        return Path("/" + urllib.parse.unquote(key))
    return StorePath(scheme.lower(), authority, key.strip("/"))
