"""The options of the server, which are the same for `s2s serve` and `python -m s2s_serve`."""

import dataclasses
import ipaddress
import os
import socket
from typing import Literal

from s2s_serve.errors import UserError

TOKEN_VARIABLE = "S2S_SERVE_TOKEN"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the server listens, and what it allows."""

    host: str = "127.0.0.1"
    """Address to listen at. Where others can reach it, such as 0.0.0.0, the environment variable
    S2S_SERVE_TOKEN must hold a token, which callers send as Authorization: Bearer TOKEN"""
    port: int = 8000
    """Port to listen at. 0: a free one, which is printed"""
    max_batch: int = 64
    """Most histories that are joined into one call of the model. 1: requests are not joined"""
    threads: int = 1
    """Number of calls of the model at the same time, which share the cores"""
    max_queue: int = 1000
    """Most requests that wait for the model; more are told to try again (503)"""
    timeout: float = 10.0
    """Seconds after which a request is given up: with 503 while it waits for its answer, with 408 while
    its body arrives"""
    max_body: int = 16
    """Largest body of a request, in MiB"""
    max_histories: int = 1000
    """Most histories of a request"""
    max_events: int = 10_000
    """Most events of a history. The model reads the newest ones"""
    max_rule_values: int = 100_000
    """Most ids and values of the rules of a request: of exclude, allow and where together"""
    max_k: int = 1000
    """Most items that a request can ask for"""
    search: Literal["auto", "exact", "index"] = "auto"
    """How items are searched. exact: all are compared; index: approximately, which is faster; auto: with
    the index if there are many items"""
    check: Literal["all", "sizes"] = "all"
    """What is compared with the manifest before a version is used: the contents of all files, or only
    their sizes, which is faster"""
    poll: float = 1.0
    """Seconds between two looks for a newer version in DIR"""


def check(settings: Settings) -> None:
    """Refuses impossible values.

    Raises:
      UserError: a value is outside its range.
    """
    if not 0 <= settings.port < 2**16:
        raise UserError(f"--port: expected 0 to 65535, found {settings.port}")
    for name in ("max_batch", "threads", "max_queue", "max_body", "max_histories", "max_events"):
        _check_positive(name, getattr(settings, name))
    for name in ("max_rule_values", "max_k", "timeout", "poll"):
        _check_positive(name, getattr(settings, name))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UserError(f"--{name}: expected a number above 0, found {value}")


def token_for(settings: Settings) -> str | None:
    """The token that callers must send; None: none is needed, because only this machine can call.

    Raises:
      UserError: other machines can call, and there is no token.
    """
    token = os.environ[TOKEN_VARIABLE] if TOKEN_VARIABLE in os.environ else ""
    if not token and not _is_loopback(settings.host):
        raise UserError(
            f"--host: {settings.host} can be reached from other machines, so a token is needed; set the "
            f"environment variable {TOKEN_VARIABLE}"
        )
    return token or None


def _is_loopback(host: str) -> bool:
    """Whether all addresses of a host are those of this machine to itself."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        # Listening will fail with a sentence about the address.
        return False
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)
