"""Explains in one sentence why a checkpoint cannot be restored, with a remedy that loses nothing.

Orbax and TensorStore raise many types, some of them plain `Exception`, with the status of the failed
operation somewhere in the messages of the chain. Only messages about missing or wrong bytes count as
damage.
"""

import errno
import json
import re
from collections.abc import Iterator

import jax

from s2s_jax.errors import UserError
from s2s_serve.storage.address import Place

_MEMORY = re.compile("RESOURCE_EXHAUSTED|[Oo]ut of memory|bad_alloc|Cannot allocate memory")
_PERMISSION = re.compile("PERMISSION_DENIED|Permission denied|Operation not permitted")
_OUT_OF_REACH = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|UNAUTHENTICATED|Too many open files|Stale file handle|"
    "Input/output error|Transport endpoint|[Tt]imed out|[Cc]onnection"
)
_OTHER_ARRAYS = re.compile(
    "not compatible with the stored shape|tree structures do not match|pytree"
)
_DAMAGE = re.compile(
    "DATA_LOSS|OUT_OF_RANGE|FAILED_PRECONDITION|NOT_FOUND|Error decoding|[Tt]runcated|[Cc]orrupt|"
    "was not found in the checkpoint"
)
_DAMAGE_TYPES = (json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError)
# Nothing can be read without these files, although Orbax then complains about something else.
_NEEDED = ("state/_METADATA", "progress/metadata")
_NEEDED_BY_OCDBT = "state/manifest.ocdbt"


def explained(
    error: Exception, directory: Place, earlier: int | None, held_bytes: int, devices: int
) -> UserError:
    """Explains a failure to restore the checkpoint in `directory`.

    Args:
      error: the error raised by Orbax.
      directory: directory of the checkpoint, `checkpoints/<step>` in the run directory.
      earlier: step of the previous checkpoint; None: there is none.
      held_bytes: bytes of the restored arrays, over all devices.
      devices: number of devices.
    """
    chain = list(_chain(error))
    unreadable = _unreadable(directory)
    chain += [] if unreadable is None else [unreadable]
    words = "\n".join(f"{type(each).__name__}: {each}" for each in chain)
    # The name that the user gave the run must not be mistaken for a reason.
    words = words.replace(str(directory.parent.parent), "")
    reason = _first_words(chain[-1])
    codes = {each.errno for each in chain if isinstance(each, OSError)}
    if _MEMORY.search(words) or errno.ENOMEM in codes or _any(chain, MemoryError):
        return UserError(
            f"{directory}: there is too little memory to restore it ({reason}): parameters and "
            f"optimizer state take {held_bytes / 1e9:,.1f} GB, tables shared by {devices} device(s); "
            f"use more or larger devices, or train.dense_sharding fsdp; the checkpoint is complete"
        )
    if _PERMISSION.search(words) or codes & {errno.EACCES, errno.EPERM}:
        return UserError(
            f"{directory}: may not be read by this user ({reason}); make its files readable; the "
            f"checkpoint itself may be intact"
        )
    if unreadable is None and _OTHER_ARRAYS.search(words):
        return UserError(
            f"{directory}: its arrays do not match this configuration ({reason}); use the "
            f"configuration and the version of s2s_jax that it was made with"
        )
    if _DAMAGE.search(words) or _any(chain, *_DAMAGE_TYPES):
        return UserError(f"{directory}: is damaged ({reason}); {_ways_around(directory, earlier)}")
    if _OUT_OF_REACH.search(words) or codes:
        return UserError(
            f"{directory}: cannot be read at present ({reason}); check its file system and start "
            f"again; the checkpoint itself may be intact"
        )
    return UserError(f"{directory}: cannot be restored ({reason}); it was left as it is")


def total_bytes(wanted: object) -> int:
    """Bytes of all arrays in a tree of shapes; 0 for None."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(wanted))


def _ways_around(directory: Place, earlier: int | None) -> str:
    if earlier is None:
        return (
            "restore a copy of it, or give another train.output_dir; there is no earlier checkpoint"
        )
    aside = directory.parent.parent / f"damaged-{directory.name}"
    return (
        f"restore a copy of it, or move it to {aside} (you can move it back later) to use the earlier "
        f"checkpoint of step {earlier}"
    )


def _unreadable(directory: Place) -> OSError | None:
    """The error from reading the first needed file that cannot be read."""
    try:
        first, _ = [(directory / name).read_bytes() for name in _NEEDED]
        if b'"use_ocdbt": false' not in first:
            (directory / _NEEDED_BY_OCDBT).read_bytes()
    except OSError as error:
        return error
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and the errors that caused it."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _any(chain: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(each, kinds) for each in chain)


def _first_words(error: BaseException) -> str:
    text = str(error).split(" [")[0]
    return (" ".join(text.split()) or type(error).__name__)[:200]
