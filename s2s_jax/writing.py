"""Files that are written whole or not at all, and what is said where they cannot be."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from s2s_jax.errors import UserError


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a failure to write `path`, a full disk say, into a sentence.

    Raises:
      UserError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error


def cannot_write(path: Path, error: BaseException) -> str:
    """The sentence about a path that cannot be written."""
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
    return (
        f"{path} cannot be written ({reason}); free space or mend the permission there, or give another "
        f"place, and start again"
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end; nobody sees half a file.

    Raises:
      UserError: it cannot be written; what stood in its place is as it was.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with explained(path):
            yield unfinished
            unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def trouble_in(error: BaseException) -> str | None:
    """What the operating system said about writing, None if the error is of another kind."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.strerror
        # TensorStore puts it into words.
        found = re.search(
            "No space left on device|Disk quota exceeded|Read-only file system|Permission denied|"
            "Input/output error|File too large|Stale file handle",
            str(cause),
        )
        if found is not None:
            return found[0]
        cause = cause.__cause__ or cause.__context__
    return None
