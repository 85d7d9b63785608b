"""The processes of a job: how they connect, agree, and notice that one of them is gone.

Every process runs the same program on its own devices; `jax.distributed` connects them. Only process 0
("host 0") writes metrics, configuration and messages; all processes write checkpoints.
"""

import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from s2s_jax.cluster.place import COORDINATOR as COORDINATOR
from s2s_jax.cluster.place import HOST as HOST
from s2s_jax.cluster.place import NUM_HOSTS as NUM_HOSTS
from s2s_jax.cluster.place import Place, find_place, split_address
from s2s_jax.cluster.rendezvous import listen, meet
from s2s_jax.errors import EXIT_STOPPED, LostHostError, NotFiniteError, Stopped, UserError, explain
from s2s_jax.signals import Stop

# A process counts as gone after this many seconds without a heartbeat.
_HEARTBEAT_TIMEOUT = 40
# Seconds within which all processes must connect, and within which process 0 must answer.
_START_TIMEOUT, _REACH_TIMEOUT = 300, 45

T = TypeVar("T")


def join() -> None:
    """Connects this process with the others of its job, if the environment says that there are any.

    Must run before JAX uses a device. Reads `S2S_JAX_COORDINATOR` (host:port of process 0),
    `S2S_JAX_NUM_HOSTS` and `S2S_JAX_HOST`, or else SLURM's variables of a step with several tasks.

    Raises:
      UserError: the variables are incomplete or wrong.
      LostHostError: the other processes do not connect.
    """
    place = find_place(os.environ)
    if place is None:
        return
    name, port = split_address(place.coordinator)
    if place.by_hand:
        meet(place, _REACH_TIMEOUT, _START_TIMEOUT)
    elif place.host == 0:
        listen(port).close()
    _bypass_proxies(name)
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        with _bounded(place):
            jax.distributed.initialize(
                place.coordinator,
                place.hosts,
                place.host,
                local_device_ids=place.devices,
                # Turns off JAX's own interpretation of launchers' variables.
                cluster_detection_method="deactivate",
                # JAX aborts the process after this time; `_bounded` ends it earlier.
                initialization_timeout=2 * _START_TIMEOUT,
                heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            )
        _watch_others()
    except RuntimeError as error:
        raise UserError(
            f"the processes of the job did not find each other ({_first_line(error)}); check that all "
            f"are started and see the same {COORDINATOR}"
        ) from error


def _bypass_proxies(name: str) -> None:
    """Lets connections to the host `name` bypass a proxy."""
    # gRPC only reads these in lower case, and the second one only if the first one is not set.
    ours, others = "no_grpc_proxy", "no_proxy"
    before = os.environ.get(ours) or os.environ.get(others)
    os.environ[ours] = name if not before else f"{before},{name}"
    # Otherwise JAX warns on every host that proxies may be a problem.
    jax.config.update("jax_check_proxy_envs", False)


@contextlib.contextmanager
def _bounded(place: Place) -> Iterator[None]:
    """Ends the process with a message if connecting takes too long.

    JAX itself would abort with a stack trace, and wait just as long for a name that does not exist.
    """
    connected = threading.Event()

    def watch() -> None:
        trouble = _try_to_reach(place.coordinator, connected)
        if trouble is not None:
            found = (
                f"no answer from host 0 at {place.coordinator} in {_REACH_TIMEOUT} s ({trouble})"
            )
        elif connected.wait(_START_TIMEOUT):
            return
        else:
            found = f"not all of the {place.hosts} hosts connected within {_START_TIMEOUT} s"
        if not connected.is_set():
            told = f"host {place.host}: {found}; check that all were started with the same {COORDINATOR}"
            explain(LostHostError(told))
            os._exit(EXIT_STOPPED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        connected.set()


def _try_to_reach(coordinator: str, connected: threading.Event) -> str | None:
    """Tries to connect until it succeeds or `connected` is set; returns the reason for failures."""
    address, trouble = split_address(coordinator), ""
    deadline = time.monotonic() + _REACH_TIMEOUT
    while time.monotonic() < deadline:
        try:
            socket.create_connection(address, timeout=5).close()
            return None
        except OSError as error:
            trouble = error.strerror or str(error)
        if connected.wait(0.5):
            return None
    return trouble


def is_first() -> bool:
    """Whether this process is host 0, which writes for all."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a message for the user, on host 0 only."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def wait_for_all(what: str) -> None:
    """Returns once every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def check_same(facts: Mapping[str, str]) -> None:
    """Refuses to continue if processes see different facts, such as different files.

    Raises:
      UserError: names the first of `facts` that is not the same text on all processes.
    """
    if jax.process_count() == 1:
        return
    all_PF = _of_all(*(zlib.crc32(text.encode()) for text in facts.values()))
    for number, name in enumerate(facts):
        differs = np.nonzero(all_PF[:, number] != all_PF[0, number])[0]
        if len(differs):
            raise UserError(
                f"{name}: host {differs[0]} sees something else than host 0; start all hosts with the "
                f"same configuration and the same files"
            )


def any_told(told: bool) -> bool:
    """Whether any process was told to stop; all processes must call it at the same point."""
    return bool(_of_all(told).any())


class InStep(Protocol):
    """See `in_step`."""

    def __call__(self, items: Iterable[Any], fact_of: Callable[[Any], int]) -> Iterator[Any]:
        """See `in_step`."""
        ...


def in_step(
    items: Iterable[T], fact_of: Callable[[T], int], stop: Stop | None = None
) -> Iterator[T]:
    """Yields items that all processes work on together, one after the other.

    Args:
      items: the items of this process.
      fact_of: gives a number that must be the same on all processes.
      stop: checked before each item.

    Raises:
      Stopped: a process was told to stop; all processes stop before the same item.
      UserError: processes have different items.
    """
    for item in itertools.chain(items, [None]):
        fact = 0 if item is None else zlib.crc32(str(fact_of(item)).encode())
        told = stop is not None and stop.requested is not None
        all_PF = _of_all(told, fact)
        if all_PF[:, 0].any():
            raise Stopped((stop and stop.requested) or "a signal to another host")
        differs = np.nonzero(all_PF[:, 1] != all_PF[0, 1])[0]
        if len(differs):
            raise UserError(
                f"io.data_paths: host {differs[0]} reads other rows than host 0, so one of them could "
                f"not read a stripe; check that all hosts can read the files, and start again"
            )
        if item is None:
            return
        yield item


def _of_all(*facts: int) -> np.ndarray:
    """The facts of all processes, uint32 `[processes, facts]`."""
    mine = np.array(facts, np.uint32)
    if jax.process_count() == 1:
        return mine[None]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(mine))


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """If this process fails or is stopped, ends it at once, and the other processes too.

    The others would wait for it in the next step or save, and it would wait for them in an orderly
    exit. So it notifies them, see `_watch_others`. If a process died without notifying the others, the
    resulting errors are explained.
    """
    try:
        yield
    except (Exception, Stopped) as error:
        if _count() == 1:
            raise
        _ending.set()
        code = 1
        try:
            code = explain(_explained(error))
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            _tell_others()
            os._exit(code)


# The key under which a process that ends early says so, in the store shared by all processes.
_ENDED = "s2s_jax/ended"
# Seconds between checks of this key, and the time that an ending process gives the others to check it,
# which matters if it is the one that holds the store.
_LOOK_EVERY, _TIME_TO_LOOK = 1, 4
# Set when this process itself ends early.
_ending = threading.Event()


def _count() -> int:
    """Number of processes; `jax.process_count` needs a device, and may wait for the others."""
    return distributed.global_state.num_processes


def _number() -> int:
    return distributed.global_state.process_id


def _tell_others() -> None:
    client = distributed.global_state.client
    if client is None:
        return
    # Another process may have done so before, or all others may be gone.
    with contextlib.suppress(Exception):
        client.key_value_set(_ENDED, str(_number()))
    _give_time_to_look()


def _give_time_to_look() -> None:
    # When the store is gone, JAX aborts the remaining processes, which would lose their exit codes.
    if _number() == 0:
        time.sleep(_TIME_TO_LOOK)


def _watch_others() -> None:
    """Starts a thread that ends this process when another one says that it ended early."""

    def watch() -> None:
        client = distributed.global_state.client
        while client is not None and not _ending.wait(_LOOK_EVERY):
            try:
                host = client.key_value_try_get(_ENDED)
            except Exception:  # The key is not set.
                continue
            if not _ending.is_set():
                explain(
                    LostHostError(
                        f"host {host} of the job has ended, and so does host {_number()}; see the "
                        f"messages of host {host}, and start the job again to continue from its "
                        f"newest checkpoint"
                    )
                )
                _give_time_to_look()
                os._exit(EXIT_STOPPED)

    threading.Thread(target=watch, name="s2s-watch", daemon=True).start()


def _explained(error: BaseException) -> BaseException:
    words = "Gloo|NCCL|[Cc]onnection|UNAVAILABLE|ABORTED|DEADLINE|heartbeat|[Pp]eer|[Bb]arrier"
    if isinstance(error, UserError | NotFiniteError | Stopped) or not re.search(words, str(error)):
        return error
    return LostHostError(
        f"another host of the job is gone (host {_number()} got {_first_line(error)!r}); start the "
        f"job again to continue from its newest checkpoint"
    )


def leave() -> None:
    """Disconnects after a complete run; waits for the others."""
    _ending.set()
    if _count() > 1:
        jax.distributed.shutdown()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
