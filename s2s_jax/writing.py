"""Writes files completely or not at all, and explains failures."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from s2s_jax.errors import MachineError, UserError
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import Place, StorePath
from s2s_serve.storage.scratch import Scratch


@contextlib.contextmanager
def explained(path: Place) -> Iterator[None]:
    """Turns a failure to write `path`, such as a full disk, into a `UserError`.

    Raises:
      UserError: `path` cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error


def cannot_write(path: Place, error: BaseException) -> str:
    """The message for a path that cannot be written."""
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
    return (
        f"{path} cannot be written ({reason}); free space or fix the permissions there, or give another "
        f"path, and start again"
    )


@contextlib.contextmanager
def replacing(path: Place) -> Iterator[Path]:
    """A temporary path to write to; the finished file then replaces `path`.

    It is next to `path` or, if that is in a store, in a temporary directory of this machine.

    Raises:
      UserError: the file cannot be written; an existing file at `path` stays unchanged.
    """
    if isinstance(path, StorePath):
        scratch = Scratch()
        try:
            with explained(path):
                yield scratch.path / path.name
                file_systems.upload(scratch.path / path.name, path)
        finally:
            scratch.remove()
        return
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with explained(path):
            yield unfinished
            unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def append_text(path: Place, text: str) -> None:
    """Appends to a small file; in a store, the whole file is written again.

    Raises:
      UserError: the file cannot be written.
    """
    with explained(path):
        if isinstance(path, StorePath):
            path.write_text((path.read_text() if path.exists() else "") + text)
        else:
            with path.open("a") as file:
                file.write(text)


def reason_of_failed_write(error: BaseException) -> str | None:
    """The operating system's reason for a failed write; None if the error is of another kind."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MachineError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.strerror
        # TensorStore gives the reason only as text.
        found = re.search(
            "No space left on device|Disk quota exceeded|Read-only file system|Permission denied|"
            "Input/output error|File too large|Stale file handle",
            str(cause),
        )
        if found is not None:
            return found[0]
        cause = cause.__cause__ or cause.__context__
    return None
