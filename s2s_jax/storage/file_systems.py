"""Connections to stores, through pyarrow.

Credentials, regions and endpoints come from where the stores' own tools look for them: environment
variables, profiles and roles. They never appear in settings or messages.
"""

import functools
import os
import urllib.parse
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs

from s2s_jax.errors import MachineError, UserError
from s2s_jax.storage.address import StorePath

# Seconds until a store that does not answer is asked again, and how often it is asked.
_CONNECT_SECONDS, _ANSWER_SECONDS, _ATTEMPTS = 10, 60, 8
# Seconds of trying again, with gs.
_GIVE_UP_SECONDS = 120


class Listed(NamedTuple):
    """A file of a listing.

    Attributes:
      path: the file.
      size: its size in bytes.
    """

    path: StorePath
    size: int


def connect(path: StorePath) -> fs.FileSystem:
    """The file system of a store; there is one for each bucket or name node.

    Raises:
      UserError: this pyarrow cannot read such a store.
      MachineError: it cannot be reached.
    """
    return _connected(path.scheme, path.authority)


@functools.cache
def _connected(scheme: str, authority: str) -> fs.FileSystem:
    try:
        if scheme == "s3":
            return _s3(authority)
        if scheme == "gs":
            return _gcs()
        return fs.HadoopFileSystem.from_uri(f"hdfs://{authority or 'default'}")
    except (ImportError, AttributeError) as error:
        raise UserError(f"{scheme}://{authority}: pyarrow was built without {scheme}") from error
    except (pa.ArrowException, OSError) as error:
        raise unreachable(f"{scheme}://{authority}", error) from error


def _s3(bucket: str) -> fs.FileSystem:
    endpoint = _from_environment("AWS_ENDPOINT_URL_S3") or _from_environment("AWS_ENDPOINT_URL")
    region = _from_environment("AWS_REGION") or _from_environment("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_ANSWER_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        # Whoever only reads needs no right to list or create buckets.
        check_directory_existence_before_creation=False,
    )


def _gcs() -> fs.FileSystem:
    import datetime

    limit = datetime.timedelta(seconds=_GIVE_UP_SECONDS)
    emulator = _from_environment("STORAGE_EMULATOR_HOST")
    if emulator is None:
        return fs.GcsFileSystem(retry_time_limit=limit)
    address = urllib.parse.urlsplit(emulator if "://" in emulator else f"http://{emulator}")
    return fs.GcsFileSystem(
        anonymous=True,
        scheme=address.scheme,
        endpoint_override=address.netloc,
        retry_time_limit=limit,
    )


def _from_environment(name: str) -> str | None:
    return os.environ[name] if os.environ.get(name) else None


def inner_path(path: StorePath) -> str:
    """The path of a file inside its file system."""
    return f"/{path.key}" if path.scheme == "hdfs" else f"{path.authority}/{path.key}".rstrip("/")


def files_below(path: StorePath) -> list[Listed] | None:
    """The file at a path, or all files below it, sorted by path; None if there is nothing.

    Raises:
      MachineError: the store cannot be reached, or does not allow it.
    """
    system, inner = connect(path), inner_path(path)
    try:
        found = system.get_file_info(inner)
        if found.type == fs.FileType.File:
            return [Listed(path, found.size)]
        if found.type == fs.FileType.NotFound:
            return None
        infos = system.get_file_info(fs.FileSelector(inner, recursive=True))
    except (pa.ArrowException, OSError) as error:
        raise unreachable(str(path), error) from error
    listed = []
    for info in infos:
        if info.type == fs.FileType.File:
            below = info.path[len(inner) :].strip("/")
            listed.append(
                Listed(
                    StorePath(path.scheme, path.authority, f"{path.key}/{below}".strip("/")),
                    info.size,
                )
            )
    return sorted(listed)


def open_file(path: StorePath) -> pa.NativeFile:
    """Opens a file for reading at any place.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read.
    """
    return connect(path).open_input_file(inner_path(path))


def version_of(source: pa.NativeFile) -> str:
    """What the store says that changes with every change of a file (the ETag of S3); "" if nothing."""
    known = source.metadata() or {}
    for name, value in known.items():
        text = name.decode() if isinstance(name, bytes) else name
        if text.lower() in ("etag", "generation"):
            return value.decode() if isinstance(value, bytes) else str(value)
    return ""


def unreachable(what: str, error: BaseException) -> MachineError:
    """The error for a store that does not answer, or does not allow something."""
    reason = " ".join(str(error).split())
    return MachineError(
        f"{what}: the store does not give it ({reason}); check the address, the network, and the "
        f"credentials that the store's own tools use"
    )
