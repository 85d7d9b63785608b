"""Refuses addresses such as `s3://bucket/log` where a path of this machine is expected.

Most files may be in some stores. If an address of another store were used as a path, it would become a
directory named `az:`, and a run would train into it.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from s2s_jax.config.plain import Dataclass
from s2s_jax.errors import UserError
from s2s_serve.storage.address import SCHEMES, is_address, refuse_secrets

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):(/.*)", re.IGNORECASE)
# pathlib shortens an address to `gs:/bucket`. With these names, it cannot be meant as a directory `gs:`.
_WELL_KNOWN = re.compile(
    r"gs|gcs|s3[an]?|oss|cosn?|obsa?|r2|b2|az|abfss?|wasbs?|adl|hdfs|viewfs|s?webhdfs|dbfs|alluxio|"
    r"file|https?|ftps?|sftp|scp|ssh|smb|nfs|hf|memory|jdbc|odps",
    re.IGNORECASE,
)
# Keys, and options of text, whose files may be in stores. (Other options say so by their type, `Place`.)
IN_STORES = (
    "io.data_paths",
    "loss.catalogue",
    "train.output_dir",
    "--input",
    "--catalogue",
    "FILE_OR_DIR …",
)


def refuse_addresses(name: str, value: object, of_stores: bool = True) -> None:
    """Refuses addresses in the value of an option or a key; accepts anything else.

    Args:
      name: name of the option or key.
      value: a text, which may list several paths separated by commas; a path; or several of these.
      of_stores: whether addresses of stores that can be read and written are refused, too.

    Raises:
      UserError: names the option or key, and says what to do.
    """
    if isinstance(value, str | PurePath):
        for piece in str(value).split(","):
            try:
                refuse_secrets(piece.strip())
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            found = _ADDRESS.fullmatch(piece.strip())
            if not of_stores and is_address(piece.strip()):
                continue
            if found and not _is_local(found[1], found[2]):
                raise UserError(f"{name}: {_remedy(found[1], found[2], of_stores)}")
    elif isinstance(value, Iterable):
        for each in value:
            refuse_addresses(name, each, of_stores)


def refuse_addresses_in(settings: Dataclass, prefix: str) -> None:
    """Refuses addresses in the fields of a dataclass.

    Args:
      settings: the dataclass.
      prefix: prefix of the names of fields in commands.

    Raises:
      UserError: see `refuse_addresses`.
    """
    for field in dataclasses.fields(settings):
        name = prefix + field.name
        refuse_addresses(name, getattr(settings, field.name), name not in IN_STORES)


def _is_local(scheme: str, rest: str) -> bool:
    """Whether this is a path into an existing directory with that name."""
    if rest.startswith("//") or _WELL_KNOWN.fullmatch(scheme):
        return False
    return Path(f"{scheme}:").is_dir()


def _remedy(scheme: str, rest: str, of_stores: bool) -> str:
    path = rest.lstrip("/")
    address = f"{scheme}:{rest}" if rest.startswith("//") else f"{scheme}:/{rest}"
    if scheme.lower() == "file":
        local = path.removeprefix("localhost/")
        return f"expected a path, found the address {address}; give /{local}"
    or_address = "" if of_stores else f" or an address of {', '.join(SCHEMES)}"
    return (
        f"expected a path of this machine{or_address}, found the address {address}; mount the store and "
        f"give the path, or copy files to and from a local disk"
    )
