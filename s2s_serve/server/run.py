"""Runs the server in this process until a signal ends it."""

import asyncio
import contextlib
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import uvicorn
import uvloop
from threadpoolctl import threadpool_limits

from s2s_serve.errors import UserError
from s2s_serve.server.app import make_app
from s2s_serve.server.batching import Batcher
from s2s_serve.server.connections import Connection
from s2s_serve.server.loading import Served, load
from s2s_serve.server.metrics import Metrics
from s2s_serve.server.reloading import Versions
from s2s_serve.server.settings import Settings, token_for
from s2s_serve.storage.address import Place
from s2s_serve.tower import available_cores

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Idle connections are kept longer than load balancers keep theirs, so that none uses a closed one.
_KEEP_IDLE = 75
_BACKLOG = 2048


def run(
    directory: Place, settings: Settings, load_version: Callable[[Place], Served] | None = None
) -> None:
    """Serves an export until SIGTERM or SIGINT, and then finishes the requests in flight.

    Args:
      directory: the export.
      settings: the options, which are possible values.
      load_version: loads the newest version; None: as the options say.

    Raises:
      UserError: the address cannot be used, a token is missing, or there is no version to serve.
    """
    token = token_for(settings)
    # Threads of NumPy's products wait for each other in a loop: where another process has a core, or a
    # container has fewer cores than its machine, a product of 0.2 ms takes 5.
    one_thread = threadpool_limits(1, "blas")
    with one_thread, contextlib.closing(_listen(settings.host, settings.port)) as listening:
        metrics = Metrics()
        if load_version is None:
            # Calls at the same time share the cores.
            cores = available_cores()
            load_version = functools.partial(
                load,
                search=settings.search,
                check=settings.check,
                threads=max(cores // settings.threads, 1),
            )
        versions = Versions(directory, metrics, settings.poll, load_version)
        batcher = Batcher(
            versions.current, metrics, settings.max_batch, settings.max_queue, settings.threads
        )
        lookups = ThreadPoolExecutor(1, "s2s-lookup")
        app = make_app(versions, batcher, lookups, metrics, settings, token)
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_IDLE,
            # Each request ends before: with its answer, or because it was late.
            timeout_graceful_shutdown=int(2 * settings.timeout) + 1,
        )
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(_Server(config), versions, listening, directory))
        finally:
            versions.end()
            batcher.end()
            lookups.shutdown(wait=False, cancel_futures=True)


class _Server(uvicorn.Server):
    """uvicorn's server, for which this module handles signals.

    uvicorn would raise them again at its end, so that the exit code would not be 0.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    server: _Server, versions: Versions, listening: socket.socket, directory: Place
) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        # The second signal does not wait for requests.
        server.force_exit = server.should_exit
        server.should_exit = True

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            loop.add_signal_handler(number, stop)
    versions.start()
    first = asyncio.ensure_future(_announce(versions, listening, directory, server))
    await server.serve(sockets=[listening])
    if not first.done():
        first.cancel()
        # A version is still being loaded, in a thread that nothing can interrupt.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    await first


async def _announce(
    versions: Versions, listening: socket.socket, directory: Place, server: _Server
) -> None:
    """Prints the address when the first version can answer; ends the server if it cannot."""
    try:
        version = await asyncio.wrap_future(versions.first)
    except BaseException:
        server.should_exit = True
        raise
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    print(f"version {version} of {directory} answers at http://{name}:{port}", flush=True)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      UserError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host: expected an address of this machine, found {host}") from None
    listening = socket.socket(family, kind, protocol)
    try:
        # So that a server can be started again at once.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise UserError(
            f"--port: {host}:{port} cannot be used ({os.strerror(error.errno or 0)}); give another "
            f"--port or --host, or --port 0 for a free port"
        ) from None
    return listening
