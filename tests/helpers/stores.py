"""A real S3 server on this machine, and a proxy before it that answers slowly, badly or not at all."""

import contextlib
import http.client
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.fs

# What no file and no message may hold.
KEY, SECRET = "AKIAXTESTKEYOFSTORES", "verysecretsecretoftests"
BUCKET = "logs"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Yields the address of an empty server with one bucket."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        endpoint = f"http://127.0.0.1:{port}"
        file_system(endpoint).create_dir(BUCKET)
        yield endpoint
    finally:
        server.stop()


@contextlib.contextmanager
def gcs_server(directory: Path) -> Iterator[str]:
    """Yields the address of an empty emulator of Google Cloud Storage with one bucket.

    It is a process of its own, because pyarrow lets no other thread run while it waits for its answers.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"]
    program = str(Path(__file__).with_name("gcs_emulator.py"))
    command = [sys.executable, program, *words, "--default-bucket", BUCKET]
    with (directory / "emulator.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
        try:
            deadline = time.monotonic() + 60
            while b"All services started" not in (directory / "emulator.log").read_bytes():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def file_system(endpoint: str) -> pyarrow.fs.S3FileSystem:
    return pyarrow.fs.S3FileSystem(
        access_key=KEY,
        secret_key=SECRET,
        endpoint_override=endpoint,
        region="us-east-1",
        allow_bucket_creation=True,
        allow_bucket_deletion=True,
    )


def upload(endpoint: str, directory: Path, key: str) -> None:
    """Copies all files below a directory."""
    pyarrow.fs.copy_files(
        str(directory),
        f"{BUCKET}/{key}",
        source_filesystem=pyarrow.fs.LocalFileSystem(),
        destination_filesystem=file_system(endpoint),
    )


def contents(endpoint: str, key: str = "") -> dict[str, bytes]:
    """All objects of the bucket below a key, by their own keys."""
    system = file_system(endpoint)
    selector = pyarrow.fs.FileSelector(f"{BUCKET}/{key}".strip("/"), recursive=True)
    found = {}
    for info in system.get_file_info(selector):
        if info.type == pyarrow.fs.FileType.File:
            with system.open_input_stream(info.path) as source:
                found[info.path.removeprefix(f"{BUCKET}/")] = source.read()
    return found


class Proxy:
    """Passes requests on to a server, some of them slowly, some of them not.

    Attributes:
      endpoint: its address.
      requests: number of requests so far.
      faults: number of faults so far.
      failing: chance of a fault.
      delay: seconds before each answer.
      kinds: what a fault is: an answer 503, a cut connection, or half an answer.
    """

    def __init__(self, target: str, failing: float = 0.0, delay: float = 0.0, seed: int = 0):
        self.requests = self.faults = 0
        self.failing, self.delay, self.kinds = failing, delay, ("503", "cut", "half")
        self._random, self._lock = random.Random(seed), threading.Lock()
        proxy, address = self, target.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                body = self._body()
                fault = proxy.choose()
                time.sleep(proxy.delay)
                if fault == "503":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if fault == "cut":
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        self.connection.shutdown(socket.SHUT_RDWR)
                    return
                there = http.client.HTTPConnection(address, timeout=30)
                own = ("connection", "transfer-encoding", "content-length", "expect")
                headers = {k: v for k, v in self.headers.items() if k.lower() not in own}
                there.request(self.command, self.path, body, headers)
                answer = there.getresponse()
                data = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                size = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
                self.send_header("Content-Length", str(size))
                self.end_headers()
                if fault == "half":
                    self.close_connection = True
                    self.wfile.write(data[: len(data) // 2])
                    return
                self.wfile.write(data)
                there.close()

            def _body(self) -> bytes:
                if self.headers["Transfer-Encoding"] != "chunked":
                    return self.rfile.read(int(self.headers["Content-Length"] or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def choose(self) -> str:
        with self._lock:
            self.requests += 1
            if self._random.random() >= self.failing:
                return ""
            self.faults += 1
            return self._random.choice(self.kinds)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def environment(endpoint: str) -> dict[str, str]:
    """What the tools of S3 read."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def use_double_of_hdfs(directory: Path, monkeypatch) -> None:
    """Makes this process find a directory of this machine at `hdfs://…`."""
    from s2s_serve.storage import file_systems

    disk = pyarrow.fs.SubTreeFileSystem(str(directory), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(file_systems, "_connected", lambda scheme, authority: disk)


def use(endpoint: str, monkeypatch) -> None:
    """Makes this process read from a server."""
    from s2s_serve.storage import file_systems

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)
    file_systems._connected.cache_clear()
