"""Coordinates the processes of a job: one of them writes for all, and all must see the same data.

Every process runs the same program on its own devices; `jax.distributed` connects them (`joining`,
`ending`). Only process 0 ("host 0") writes metrics, configuration and messages; all processes write
checkpoints.
"""

import itertools
import pickle
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from s2s_jax.cluster.place import COORDINATOR as COORDINATOR
from s2s_jax.cluster.place import HOST as HOST
from s2s_jax.cluster.place import NUM_HOSTS as NUM_HOSTS
from s2s_jax.errors import Stopped, UserError
from s2s_jax.signals import Stop

T = TypeVar("T")
# Bytes that are sent together; each device of a host holds them twice.
_SENT_BYTES = 2**26
# Milliseconds that processes wait for each other in the background.
_MEETING_MS = 3_600_000
# The numbers of the meetings of `wait_for_all`, the same in all processes.
_meetings = itertools.count()


def is_first() -> bool:
    """Whether this process is host 0, which writes for all."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a message for the user, on host 0 only."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def wait_for_all(what: str) -> None:
    """Waits until every process has called this function.

    Args:
      what: the name of the point in the program, for error messages.
    """
    if jax.process_count() > 1:
        # The first time that devices meet, Gloo gives up after 30 s. So processes meet before, because
        # one of them may wait for the lock of a run, or for a slow store.
        meet_in_background(f"{what} {next(_meetings)}")
        multihost_utils.sync_global_devices(what)


def meet_in_background(what: str) -> None:
    """Waits until every process has called this function, without devices: for threads beside training.

    Args:
      what: the name of the point in the program, which no other call has.
    """
    if jax.process_count() > 1:
        client = distributed.global_state.client
        assert client is not None, "it connects the processes"
        client.wait_at_barrier(f"s2s_jax/{what}", _MEETING_MS)


def check_same(facts: Mapping[str, str]) -> None:
    """Refuses to continue if processes see different things, such as different files.

    Args:
      facts: texts that must be the same on all processes, by the name of what they describe.

    Raises:
      UserError: names the first fact that differs.
    """
    if jax.process_count() == 1:
        return
    all_PF = _of_all(*(zlib.crc32(text.encode()) for text in facts.values()))
    for name, all_P in zip(facts, all_PF.T, strict=True):
        other = _first_other(all_P)
        if other is not None:
            raise UserError(
                f"{name}: host {other} does not see the same as host 0; start all hosts with the "
                f"same configuration and the same files"
            )


def first_other(fact: str) -> int | None:
    """Return, on all processes, the first that has another fact than host 0; None if there is none.

    All processes must call it at the same point.

    Args:
      fact: the fact of this process.
    """
    return _first_other(_of_all(zlib.crc32(fact.encode()))[:, 0])


def from_first(make: Callable[[], T]) -> T:
    """Return what host 0 makes, on all processes, which all must call it at the same point.

    So that something that takes long, such as counting a log, is done once, and cannot differ between
    processes.

    Args:
      make: a function whose result can be pickled. Only host 0 calls it.
    """
    if jax.process_count() == 1:
        return make()
    made = [make()] if is_first() else []
    packed = np.frombuffer(pickle.dumps(made), np.uint8)
    # JAX has no numbers above 2^32 here.
    whole, rest = _sent(np.array(divmod(len(packed), _SENT_BYTES), np.uint32)).tolist()
    parts = []
    for size in [_SENT_BYTES] * whole + [rest] * (rest > 0):
        mine = packed[_SENT_BYTES * len(parts) :][:size]
        parts.append(_sent(mine if is_first() else np.zeros(size, np.uint8)))
    return (made or pickle.loads(np.concatenate(parts).tobytes()))[0]


def any_stop_requested(requested: bool) -> bool:
    """Whether any process received a request to stop; all processes must call it at the same point.

    Args:
      requested: whether this process received one.
    """
    return bool(_of_all(requested).any())


class InLockstep(Protocol):
    """See `in_lockstep`."""

    def __call__(self, items: Iterable[T], fact_of: Callable[[T], int]) -> Iterator[T]:
        """See `in_lockstep`."""
        ...


def in_lockstep(
    items: Iterable[T], fact_of: Callable[[T], int], stop: Stop | None = None
) -> Iterator[T]:
    """Yields the items of this process, and keeps all processes at the same item.

    Args:
      items: the items of this process.
      fact_of: a function from an item to a number that must be the same on all processes.
      stop: the request to stop, which is checked before each item; None: there is none.

    Raises:
      Stopped: a process received a request to stop; all processes stop before the same item.
      UserError: the processes have different items.
    """
    for item in itertools.chain(items, [None]):
        fact = 0 if item is None else zlib.crc32(str(fact_of(item)).encode())
        requested = stop is not None and stop.requested is not None
        all_PF = _of_all(requested, fact)
        if all_PF[:, 0].any():
            raise Stopped((stop and stop.requested) or "a signal to another host")
        other = _first_other(all_PF[:, 1])
        if other is not None:
            raise UserError(
                f"io.data_paths: host {other} reads other rows than host 0, so one of them could "
                f"not read a stripe; check that all hosts can read the files, and start again"
            )
        if item is None:
            return
        yield item


def _first_other(all_P: np.ndarray) -> int | None:
    differs = np.nonzero(all_P != all_P[0])[0]
    return int(differs[0]) if len(differs) else None


def _sent(x: np.ndarray) -> np.ndarray:
    """The array of host 0, on all processes; arrays of the others have its shape and type."""
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.broadcast_one_to_all(x))


def _of_all(*facts: int) -> np.ndarray:
    """The facts of all processes, uint32 `[processes, facts]`."""
    mine = np.array(facts, np.uint32)
    if jax.process_count() == 1:
        return mine[None]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(mine))
