"""Servers for tests: in a thread of this process, or as a process of its own."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fake_model
import httpx
import uvicorn
import uvloop
from places import HELPERS, REPO

from s2s_serve.server.app import make_app
from s2s_serve.server.batching import Batcher
from s2s_serve.server.connections import Connection
from s2s_serve.server.metrics import Metrics
from s2s_serve.server.reloading import Versions
from s2s_serve.server.settings import Settings

# The program of a process: a server with fake models, of which a call takes SECONDS.
PROGRAM = """
import sys, time
from pathlib import Path
import fake_model
from s2s_serve.server import run, settings
seconds = float(sys.argv[2])
def load(directory):
    served = fake_model.load_fake(directory)
    served.model.seconds = seconds
    return served
values = dict(word.split("=") for word in sys.argv[3:])
values = {name: type(getattr(settings.Settings, name))(value) for name, value in values.items()}
run.run(Path(sys.argv[1]), settings.Settings(**{"port": 0, **values}), load)
"""


class App:
    """An application with fake models and what it consists of, without a network."""

    def __init__(self, directory, token=None, load=fake_model.load_fake, **values):
        self.settings = Settings(**{"poll": 0.02, **values})
        self.metrics = Metrics()
        self.versions = Versions(directory, self.metrics, self.settings.poll, load)
        self.batcher = Batcher(
            self.versions.current,
            self.metrics,
            self.settings.max_batch,
            self.settings.max_queue,
            self.settings.threads,
        )
        self.lookups = ThreadPoolExecutor(1, "s2s-lookup")
        self.asgi = make_app(
            self.versions, self.batcher, self.lookups, self.metrics, self.settings, token
        )

    @property
    def model(self):
        return self.versions.current().model

    def client(self):
        """An asynchronous client that calls the application directly."""
        transport = httpx.ASGITransport(self.asgi, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    def ask(self, method, path, **request):
        """One request, in an event loop of its own."""

        async def once():
            async with self.client() as client:
                return await client.request(method, path, **request)

        return asyncio.run(once())

    def end(self):
        self.versions.end()
        self.batcher.end()
        self.lookups.shutdown(cancel_futures=True)


@contextlib.contextmanager
def app(directory, **values):
    made = App(directory, **values)
    made.versions.start()
    made.versions.first.result(20)
    try:
        yield made
    finally:
        made.end()


@contextlib.contextmanager
def in_thread(asgi):
    """Serves an application at a free port of 127.0.0.1; gives its address."""
    config = uvicorn.Config(asgi, port=0, log_level="critical", lifespan="off", http=Connection)
    server = uvicorn.Server(config)

    def serve():
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def until(condition, seconds=20.0):
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


@contextlib.contextmanager
def process(directory, *words, seconds=0.0, env=None):
    """A server with fake models as a process; gives the process and its address."""
    command = [sys.executable, "-c", PROGRAM, str(directory), str(seconds), *words]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": f"{REPO}:{HELPERS}", "PATH": "/usr/bin:/bin", **(env or {})},
    )
    try:
        line = started.stdout.readline()
        assert "answers at " in line, line + started.stderr.read()
        yield started, line.split("answers at ")[1].strip()
    finally:
        if started.poll() is None:
            started.kill()
        started.communicate()
