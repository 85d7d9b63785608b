"""Connects the processes of a job."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import jax

from s2s_jax.cluster.ending import first_line, watch_others
from s2s_jax.cluster.place import COORDINATOR, Place, find_place, split_address
from s2s_jax.cluster.rendezvous import listen, meet
from s2s_jax.errors import EXIT_STOPPED, LostHostError, UserError, explain

# A process counts as gone after this many seconds without a heartbeat.
_HEARTBEAT_TIMEOUT = 40
# All processes must connect within this many seconds.
_START_TIMEOUT = 300
# Process 0 must answer within this many seconds.
_REACH_TIMEOUT = 45


def join() -> None:
    """Connects this process with the others of its job, if environment variables describe such a job.

    Call it before JAX uses a device. It reads `S2S_JAX_COORDINATOR` (host:port of process 0),
    `S2S_JAX_NUM_HOSTS` and `S2S_JAX_HOST`, or else the variables that SLURM sets in a step with several
    tasks.

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
    # It would take SIGTERM away from the handler of the command, and nothing here uses it.
    jax.config.update("jax_enable_preemption_service", False)
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
        watch_others()
    except RuntimeError as error:
        raise UserError(
            f"the processes of the job could not connect ({first_line(error)}); check that all "
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
        reason = _try_to_reach(place.coordinator, connected)
        if reason is not None:
            found = f"no answer from host 0 at {place.coordinator} in {_REACH_TIMEOUT} s ({reason})"
        elif connected.wait(_START_TIMEOUT):
            return
        else:
            found = f"not all of the {place.hosts} hosts connected within {_START_TIMEOUT} s"
        if not connected.is_set():
            message = (
                f"host {place.host}: {found}; check that all were started with the same "
                f"{COORDINATOR}"
            )
            explain(LostHostError(message))
            os._exit(EXIT_STOPPED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        connected.set()


def _try_to_reach(coordinator: str, connected: threading.Event) -> str | None:
    """Tries to reach process 0 until this succeeds or `connected` is set.

    Returns:
      The reason of the last failure if time runs out, otherwise None.
    """
    address, reason = split_address(coordinator), ""
    deadline = time.monotonic() + _REACH_TIMEOUT
    while time.monotonic() < deadline:
        try:
            socket.create_connection(address, timeout=5).close()
            return None
        except OSError as error:
            reason = error.strerror or str(error)
        if connected.wait(0.5):
            return None
    return reason
