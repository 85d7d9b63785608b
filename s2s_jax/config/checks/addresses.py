"""Refuses addresses such as `s3://bucket/log` wherever a path is expected.

Only files of this machine are read and written. If an address were used as a path, it would become a
directory named `s3:`, and a run would train into it.
"""

import dataclasses
import re
from collections.abc import Container, Iterable
from pathlib import Path, PurePath

from s2s_jax.config.plain import Dataclass
from s2s_jax.errors import UserError

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):(/.*)", re.IGNORECASE)
# pathlib shortens an address to `gs:/bucket`. With these names, it cannot be meant as a directory `gs:`.
_WELL_KNOWN = re.compile(
    r"gs|gcs|s3[an]?|oss|cosn?|obsa?|r2|b2|az|abfss?|wasbs?|adl|hdfs|viewfs|s?webhdfs|dbfs|alluxio|"
    r"file|https?|ftps?|sftp|scp|ssh|smb|nfs|hf|memory|jdbc|odps",
    re.IGNORECASE,
)


def refuse_addresses(name: str, value: object) -> None:
    """Refuses addresses in the value of an option or a key; accepts anything else.

    Args:
      name: name of the option or key.
      value: a text, which may list several paths separated by commas; a path; or several of these.

    Raises:
      UserError: names the option or key, and says what to do.
    """
    if isinstance(value, str | PurePath):
        for piece in str(value).split(","):
            found = _ADDRESS.fullmatch(piece.strip())
            if found and not _is_local(found[1], found[2]):
                raise UserError(f"{name}: {_remedy(found[1], found[2])}")
    elif isinstance(value, Iterable):
        for each in value:
            refuse_addresses(name, each)


def refuse_addresses_in(settings: Dataclass, prefix: str, positional: Container[str] = ()) -> None:
    """Refuses addresses in the fields of a dataclass.

    Args:
      settings: the dataclass.
      prefix: prefix of the names of fields in commands.
      positional: fields without the prefix.

    Raises:
      UserError: see `refuse_addresses`.
    """
    for field in dataclasses.fields(settings):
        name = field.name if field.name in positional else prefix + field.name
        refuse_addresses(name, getattr(settings, field.name))


def _is_local(scheme: str, rest: str) -> bool:
    """Whether this is a path into an existing directory with that name."""
    if rest.startswith("//") or _WELL_KNOWN.fullmatch(scheme):
        return False
    return Path(f"{scheme}:").is_dir()


def _remedy(scheme: str, rest: str) -> str:
    path = rest.lstrip("/")
    address = f"{scheme}:{rest}" if rest.startswith("//") else f"{scheme}:/{rest}"
    if scheme.lower() == "file":
        local = path.removeprefix("localhost/")
        return f"expected a path, found the address {address}; give /{local}"
    return (
        f"expected a path of this machine, found the address {address}; mount the store and give the "
        f"path, or copy files to and from a local disk"
    )
