"""Reads and writes files of stores, through pyarrow.

Credentials, regions and endpoints come from where the stores' own tools look for them: environment
variables, profiles and roles. They never appear in settings or messages.
"""

import contextlib
import ctypes
import errno
import functools
import os
import secrets
import urllib.parse
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
from pyarrow import fs

from s2s_serve.errors import MachineError, UserError
from s2s_serve.storage.address import Place, StorePath
from s2s_serve.storage.checked_file import CheckedFile

# Seconds until a store that does not answer is asked again, and how often it is asked.
_CONNECT_SECONDS, _ANSWER_SECONDS, _ATTEMPTS = 10, 60, 8
# Seconds of trying again, with gs.
_GIVE_UP_SECONDS = 120
# Bytes that are copied at a time, and files that are copied at the same time.
_BLOCK, _COPIES = 2**23, 8
# Variables whose values no message may show.
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


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
        # Small files then take one request.
        allow_delayed_open=True,
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


def kind_of(path: StorePath) -> Literal["file", "directory"] | None:
    """What is at a path; None: nothing."""
    with _asked(path, "give"):
        found = connect(path).get_file_info(inner_path(path)).type
    if found == fs.FileType.NotFound:
        return None
    return "file" if found == fs.FileType.File else "directory"


def changed_ns(path: StorePath) -> int:
    """When a file was changed, in nanoseconds since 1970; 0 if the store does not say."""
    with _asked(path, "give"):
        return connect(path).get_file_info(inner_path(path)).mtime_ns or 0


def entries_of(path: StorePath) -> list[StorePath]:
    """The files and directories in a directory, sorted by name."""
    # Without recursion, pyarrow gives only files of Google Cloud Storage.
    everything = path.scheme == "gs"
    inner = inner_path(path)
    selector = fs.FileSelector(inner, allow_not_found=True, recursive=everything)
    with _asked(path, "give"):
        infos = connect(path).get_file_info(selector)
    below = (info.path[len(inner) :].strip("/") for info in infos)
    return sorted({path / name.partition("/")[0] for name in below})


def read(path: StorePath) -> bytes:
    """The contents of a file.

    Raises:
      FileNotFoundError: there is no such file.
      MachineError: the store does not give it.
    """
    with _asked(path, "give"), connect(path).open_input_file(inner_path(path)) as source:
        expected = source.size()
        data = source.read()
        if len(data) != expected:
            raise OSError(f"expected {expected:,} bytes, found {len(data):,}")
        return data


@contextlib.contextmanager
def opened(path: Place) -> Iterator[pa.NativeFile]:
    """Opens a file of this machine or of a store, for Arrow to read at any place.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read from this machine.
      MachineError: the store does not give it; also raised by reading.
    """
    if not isinstance(path, StorePath):
        # Not memory-mapped: if a mapped file shrinks, the process is killed.
        with pa.OSFile(str(path)) as file:
            yield file
        return
    with _asked(path, "give"):
        source = open_file(path)
    with source:
        checked = CheckedFile(source, functools.partial(_asked, path, "give"))
        yield pa.PythonFile(checked, mode="r")


def write(path: StorePath, data: bytes) -> None:
    """Writes a file, whole or not at all; an old one is replaced.

    Raises:
      MachineError: the store does not take it.
    """
    _write(path, [data])


def upload(file: Path, path: StorePath) -> None:
    """Copies a file of this machine to a store.

    Raises:
      MachineError: the store does not take it.
    """
    with file.open("rb") as source:
        _write(path, iter(lambda: source.read(_BLOCK), b""))


def download(path: StorePath, file: Path) -> None:
    """Copies a file of a store to this machine.

    Raises:
      FileNotFoundError: there is no such file.
      MachineError: the store does not give it.
    """
    with _asked(path, "give"), connect(path).open_input_file(inner_path(path)) as source:
        size = source.size()
        with file.open("wb") as copy:
            while data := source.read(_BLOCK):
                copy.write(data)
        if file.stat().st_size != size:
            raise OSError(f"expected {size:,} bytes, found {file.stat().st_size:,}")


def copy_all(copies: Iterable[tuple[Path, StorePath]], to_store: bool) -> None:
    """Copies files between this machine and a store, some of them at the same time.

    Raises:
      MachineError: the store does not take or give one.
    """

    def copy(each: tuple[Path, StorePath]) -> None:
        file, path = each
        if to_store:
            upload(file, path)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            download(path, file)

    with ThreadPoolExecutor(_COPIES, "s2s-copy") as pool:
        for _ in pool.map(copy, copies):
            pass


def move(path: StorePath, target: StorePath) -> None:
    """Gives a file another name in its store, without sending its contents.

    Raises:
      MachineError: the store does not allow it. S3 does not for files of more than 5 GiB.
    """
    system, inner = connect(path), inner_path(path)
    with _asked(target, "take"):
        if path.scheme == "hdfs":
            _move(system, inner, inner_path(target))
        else:
            system.move(inner, inner_path(target))


def remove(path: StorePath, missing_ok: bool = False) -> None:
    """Removes a file.

    Raises:
      FileNotFoundError: there is no such file, unless `missing_ok`.
      MachineError: the store does not allow it.
    """
    ignored = contextlib.suppress(FileNotFoundError) if missing_ok else contextlib.nullcontext()
    with ignored, _asked(path, "remove"):
        connect(path).delete_file(inner_path(path))


def remove_below(path: StorePath) -> None:
    """Removes a directory with all files below it, if it exists.

    Raises:
      MachineError: the store does not allow it.
    """
    # Each store has another error for a directory that does not exist.
    if kind_of(path) == "directory":
        with contextlib.suppress(FileNotFoundError), _asked(path, "remove"):
            connect(path).delete_dir(inner_path(path))


def _write(path: StorePath, blocks: Iterable[bytes]) -> None:
    system, inner = connect(path), inner_path(path)
    with _asked(path, "take"):
        if path.scheme in ("s3", "gs"):
            size = _send(system, inner, blocks)
            # Smaller ones take one request, which carries their size.
            if size > _BLOCK:
                _compare(system, inner, size)
            return
        directory = inner.rpartition("/")[0]
        if directory:
            system.create_dir(directory, recursive=True)
        # Names that start with . or _ are no files of a log.
        unfinished = f"{directory}/.{path.name}.{secrets.token_hex(4)}.tmp"
        try:
            _compare(system, unfinished, _send(system, unfinished, blocks))
        except BaseException:
            with contextlib.suppress(OSError):
                system.delete_file(unfinished)
            raise
        _move(system, unfinished, inner)


def _send(system: fs.FileSystem, inner: str, blocks: Iterable[bytes]) -> int:
    """Writes a file, which is there as soon as all blocks are written; returns its size."""
    # Whether pyarrow closes a stream or forgets it, what was written so far becomes the file. So what is
    # not complete is never forgotten: this list has a reference that nobody gives back, and in it the
    # stream is before a signal can end this function.
    immortal: list[pa.NativeFile] = []
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(immortal))
    # By itself, pyarrow compresses what has a name like x.gz.
    opened = functools.partial(system.open_output_stream, compression=None)
    immortal.extend(map(opened, [inner]))
    (stream,) = immortal
    size = 0
    for block in blocks:
        stream.write(block)
        size += len(block)
    immortal.clear()
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(immortal))
    stream.close()
    return size


def _compare(system: fs.FileSystem, inner: str, size: int) -> None:
    """Raises OSError if a file that was just written has another size."""
    found = system.get_file_info(inner).size
    if found != size:
        raise OSError(f"{size:,} bytes were sent, but it has {found or 0:,}")


def _move(system: fs.FileSystem, unfinished: str, inner: str) -> None:
    """Moves a file of HDFS, which moves nothing onto an existing one."""
    try:
        if system.get_file_info(inner).type == fs.FileType.File:
            system.delete_file(inner)
        system.move(unfinished, inner)
    except BaseException:
        # An error or a signal. If the old one is removed already, the new one is all there is.
        with contextlib.suppress(OSError):
            if system.get_file_info(inner).type == fs.FileType.File:
                system.delete_file(unfinished)
            else:
                system.move(unfinished, inner)
        raise


@contextlib.contextmanager
def _asked(path: StorePath, verb: str) -> Iterator[None]:
    """Turns a failure of a store into a `MachineError`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        # A stream that failed says that it is closed, with a `ValueError`.
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            # The disk for copies is full.
            raise
        raise unreachable(str(path), error, verb) from error


def unreachable(what: str, error: BaseException, verb: str = "give") -> MachineError:
    """The error for a store that does not answer, or does not allow something.

    Args:
      what: the address.
      error: what pyarrow raised.
      verb: what the store was asked to do.
    """
    reason = " ".join(str(error).split())[:400]
    for name in _SECRETS:
        if os.environ.get(name):
            reason = reason.replace(os.environ[name], name)
    return MachineError(
        f"{what}: the store does not {verb} it ({reason}); check the address, the network, and the "
        f"credentials that the store's own tools use"
    )
