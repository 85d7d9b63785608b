"""The processes of a job meet before JAX connects them, so that problems give one clear message.

JAX aborts with a stack trace, or waits for minutes, if two processes have the same number, they expect
different numbers of processes, one is missing, or another program answers at the coordinator's address.
So process 0 first listens at this address, all others report to it, and all continue once everyone is
there.
"""

import contextlib
import socket
import time

from s2s_jax.cluster.place import COORDINATOR, HOST, NUM_HOSTS, Place, split_address
from s2s_jax.errors import LostHostError, UserError

# Every line begins with this mark, so that messages of other programs are recognized.
_MARK = "s2s_jax"
_HERE, _GO = "here", "go"
# Timeout in seconds for messages that both sides send immediately.
_HELLO_TIMEOUT = 5


def meet(place: Place, reach_timeout: float, start_timeout: float) -> None:
    """Returns once all processes are there.

    Args:
      place: place of this process.
      reach_timeout: seconds within which process 0 must answer.
      start_timeout: seconds after that within which all processes must report.

    Raises:
      UserError: two processes have the same number, they expect different numbers of processes, or the
        port cannot be used.
      LostHostError: process 0 does not answer, or other processes are missing.
    """
    if place.host == 0:
        _receive(place, reach_timeout, start_timeout)
    else:
        _report(place, reach_timeout, start_timeout)


def listen(port: int) -> socket.socket:
    """A socket at `port` of this machine's addresses.

    Raises:
      UserError: another program uses the port (JAX would share it with another job of this user), or it
        is reserved.
    """
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"port {port} of this machine, where the processes of the job should meet, cannot be used "
            f"({error.strerror}); set {COORDINATOR} to HOST:PORT with another port, for all of them"
        ) from error


def _receive(place: Place, reach_timeout: float, timeout: float) -> None:
    """The part of process 0: waits for all others, then tells them to continue, or why not."""
    address = split_address(place.coordinator)
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as open_until_end:
        server = open_until_end.enter_context(listen(address[1]))
        _check_own_address(address, reach_timeout)
        there: dict[int, socket.socket] = {}
        try:
            while True:
                # A process that has ended since then may have been started again.
                there = {k: each for k, each in there.items() if not _is_closed(each)}
                if len(there) == place.hosts - 1:
                    break
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = [str(k) for k in range(1, place.hosts) if k not in there]
                    raise LostHostError(
                        f"of {place.hosts} hosts ({NUM_HOSTS}), {', '.join(missing)} did not connect to "
                        f"{place.coordinator} within {timeout:.0f} s; check that all were started"
                    ) from None
                open_until_end.enter_context(connection)
                hello = _read_hello(connection)
                if hello is not None:
                    host, hosts = hello
                    _send(connection, _HERE)
                    if host in there and _is_closed(there[host]):
                        del there[host]
                    before, there[host] = there.get(host), connection
                    _check(host, hosts, place, before)
        except (UserError, LostHostError) as error:
            for connection in there.values():
                _send(connection, f"{type(error).__name__} {error}")
            raise
        for connection in there.values():
            _send(connection, _GO)


def _check_own_address(address: tuple[str, int], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(address, timeout=_HELLO_TIMEOUT).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LostHostError(
                    f"host 0 cannot reach itself at {address[0]}:{address[1]} ({COORDINATOR}; "
                    f"{error.strerror or error}); give a name or an address of the machine of host 0"
                ) from error
        time.sleep(0.5)


def _check(host: int, hosts: int, place: Place, before: socket.socket | None) -> None:
    if hosts != place.hosts:
        raise UserError(
            f"{NUM_HOSTS}: host {host} has {hosts}, host 0 has {place.hosts}; give all the same"
        )
    if host == 0 or before is not None:
        error = UserError(f"{HOST}: two processes have {host}; give each its own, 0 to {hosts - 1}")
        if before is not None:
            _send(before, f"UserError {error}")
        raise error


def _report(place: Place, reach_timeout: float, start_timeout: float) -> None:
    """The part of the others: reports to process 0, and waits for its permission to continue."""
    address = split_address(place.coordinator)
    deadline, reason = time.monotonic() + reach_timeout, ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=_HELLO_TIMEOUT) as connection:
                _send(connection, f"{place.host} {place.hosts}")
                message = _read_line(connection)
                if message == _HERE:
                    # Process 0 gives up earlier, with a message.
                    connection.settimeout(start_timeout + 2 * reach_timeout)
                    message = _read_line(connection)
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            if message == _GO:
                return
            kind, _, sentence = (message or "").partition(" ")
            if kind == UserError.__name__:
                raise UserError(sentence)
            if kind == LostHostError.__name__:
                raise LostHostError(sentence)
            # Another program has the port, for example a process left over from an earlier start.
            reason = "another program answers there, or host 0 has ended"
        time.sleep(0.5)
    raise LostHostError(
        f"host {place.host}: no answer from host 0 at {place.coordinator} ({COORDINATOR}) within "
        f"{reach_timeout:.0f} s ({reason}); check the address, and that host 0 was started"
    )


def _read_hello(connection: socket.socket) -> tuple[int, int] | None:
    """The number of the connected process, and how many it expects; None for other programs."""
    connection.settimeout(_HELLO_TIMEOUT)
    try:
        host, hosts = map(int, (_read_line(connection) or "").split())
        return host, hosts
    except (OSError, ValueError):
        return None


def _send(connection: socket.socket, text: str) -> None:
    # If the other process is gone by now, JAX will notice.
    with contextlib.suppress(OSError):
        connection.sendall(f"{_MARK} {' '.join(text.split())}\n".encode())


def _read_line(connection: socket.socket) -> str | None:
    """The text of a line that begins with our mark; None for any other line."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 2**16:
        byte = connection.recv(1)
        if not byte or not f"{_MARK} ".encode().startswith(line[: len(_MARK) + 1]):
            return None
        line += byte
    mark, _, text = line.decode(errors="replace").rstrip("\n").partition(" ")
    return text if mark == _MARK else None


def _is_closed(connection: socket.socket) -> bool:
    """Whether the process at the other end has ended, for example because it was started again."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)
