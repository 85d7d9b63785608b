"""Addresses such as `s3://bucket/log/part-0.orc`, beside the paths of this machine."""

import dataclasses
import posixpath
import re
import urllib.parse
from pathlib import Path

# The stores that can be read.
SCHEMES = ("s3", "gs", "hdfs")
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)


@dataclasses.dataclass(frozen=True, order=True)
class StorePath:
    """A file or a directory of a store.

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

    def parts_below(self, above: "StorePath") -> tuple[str, ...]:
        """The names on the way from a directory to this."""
        return tuple(self.key[len(above.key) :].strip("/").split("/"))


# Where a file is: on this machine, or in a store.
Place = Path | StorePath


def is_address(text: str) -> bool:
    """Whether a text is the address of a store that can be read, or a `file://` address."""
    found = _ADDRESS.fullmatch(text)
    return found is not None and found[1].lower() in (*SCHEMES, "file")


def place_of(text: str) -> Place:
    """The place that a text stands for: the address of a store, a `file://` address, or a path.

    Examples:
      >>> place_of("file:///data/log")
      PosixPath('/data/log')
      >>> place_of("gs://bucket//log/")
      StorePath(scheme='gs', authority='bucket', key='log')
    """
    if not is_address(text):
        return Path(text).expanduser()
    scheme, rest = text.split("://", 1)
    authority, _, key = rest.partition("/")
    if scheme.lower() == "file":
        return Path("/" + urllib.parse.unquote(key))
    return StorePath(scheme.lower(), authority, key.strip("/"))
