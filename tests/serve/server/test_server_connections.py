"""What arrives before a request is understood: slow, endless and broken heads, and wishes for HTTP/2."""

import contextlib
import json
import socket
import time

import pytest
import server_process
from fake_model import publish

from s2s_serve.server import connections

CONTENT = json.dumps({"histories": [{"item_id": [120]}], "k": 1}).encode()
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    publish(directory, 1)
    with (
        server_process.app(directory) as app,
        server_process.in_thread(app.asgi) as address,
    ):
        yield int(address.split(":")[2])


@contextlib.contextmanager
def connected(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as caller:
        yield caller


LENGTH = len(CONTENT)


def head_of(extra=b"", length=LENGTH):
    return (
        b"POST /v1/recommend HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"%bContent-Length: %d\r\n\r\n" % (extra, length)
    )


def answer(caller):
    """The status and the body of the next answer."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = caller.recv(4096)
        assert part, received
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += caller.recv(4096)
    return int(head.split()[1]), json.loads(body)


def assert_recommends(caller):
    status, found = answer(caller)
    assert status == 200, found
    assert found["results"][0]["items"] == [121]


@pytest.mark.parametrize("together", [True, False])
def test_a_wish_for_another_protocol_is_ignored(port, together):
    with connected(port) as caller:
        # The connection goes on after it.
        for extra in (H2C, b"", H2C, b"Connection: Upgrade\r\nUpgrade: websocket\r\n"):
            if together:
                caller.sendall(head_of(extra) + CONTENT)
            else:
                caller.sendall(head_of(extra))
                time.sleep(0.02)
                caller.sendall(CONTENT[:9])
                time.sleep(0.02)
                caller.sendall(CONTENT[9:])
            assert_recommends(caller)


def test_a_wish_with_a_body_in_chunks_is_ignored(port):
    head = head_of(H2C).replace(b"Content-Length: %d" % len(CONTENT), b"Transfer-Encoding: chunked")
    with connected(port) as caller:
        caller.sendall(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(CONTENT), CONTENT))
        assert_recommends(caller)


@pytest.mark.parametrize("endless", [b"GET /", b"GET / HTTP/1.1\r\nHost: a\r\nX: "])
def test_an_endless_head_is_refused(port, endless):
    with connected(port) as caller:
        caller.sendall(endless)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10 * connections.MOST_BYTES:
                sent += caller.send(b"a" * 1000)
                time.sleep(0.0005)
        assert connections.MOST_BYTES - 1000 < sent < 10 * connections.MOST_BYTES
        with contextlib.suppress(ConnectionError):
            assert answer(caller)[0] == 431


def test_a_large_body_is_no_large_head(port):
    content = CONTENT + b" " * (3 * connections.MOST_BYTES)
    with connected(port) as caller:
        for _ in range(2):
            caller.sendall(head_of(length=len(content)) + content)
            assert_recommends(caller)


def test_a_head_that_does_not_end_is_given_up(port, monkeypatch):
    monkeypatch.setattr(connections, "MOST_SECONDS", 0.2)
    for begin in (b"", b"GET / HTTP/1.1\r\nHost"):
        with connected(port) as caller:
            caller.sendall(begin)
            assert caller.recv(100) == b""
    # Nor a second one; but the pause between requests may be longer.
    with connected(port) as caller:
        for _ in range(2):
            caller.sendall(head_of() + CONTENT)
            assert_recommends(caller)
            time.sleep(0.3)
        caller.sendall(b"GET")
        assert caller.recv(100) == b""


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (head_of(length=-5), 400),
        (head_of(length=10**30), 400),
        (
            head_of().replace(b"Content-Length: ", b"Transfer-Encoding: chunked\r\nX: ")
            + b"zz\r\n",
            400,
        ),
    ],
)
def test_what_is_no_request_is_refused(port, sent, status):
    with connected(port) as caller:
        caller.sendall(sent)
        found, said = answer(caller)
        assert found == status
        assert list(said) == ["error"]
