"""Connections, which refuse slow and endless heads of requests and ignore wishes for other protocols.

uvicorn has no limits for heads, and loses the body of a request that wishes for HTTP/2, as those of
Java's HttpClient do.
"""

import asyncio
from http import HTTPStatus

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from s2s_serve.server.schema import Mistake

# The line and the headers of a request, in bytes.
MOST_BYTES = 2**16
# From the connection, or the first byte of a further request, to the end of the headers.
MOST_SECONDS = 20.0


# Headers that only say which other protocol the caller would like.
_OF_UPGRADE = (b"upgrade", b"connection", b"http2-settings")


class Connection(HttpToolsProtocol):
    """uvicorn's connection with these changes."""

    # The bytes of a head that has not ended; None: no head is being read.
    _head: int | None = 0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads what came, unless the head of the request becomes too long."""
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > MOST_BYTES:
                self._refuse(431, f"headers: expected at most {MOST_BYTES} bytes, found more")

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._read_again(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "request: expected HTTP/1.1, found something else")

    def _read_again(self, rest: bytes) -> None:
        """Reads a request again without its wish for another protocol.

        Args:
          rest: what follows its head.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(405, "method: expected another than CONNECT")
            return
        kept = [(name, value) for name, value in self.headers if name not in _OF_UPGRADE]
        lines = [b"%b %b HTTP/1.1" % (method, self.url), *(b"%b: %b" % each for each in kept)]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _refuse(self, status: int, sentence: str) -> None:
        self._stop_waiting()
        content = msgspec.json.encode(Mistake(sentence))
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        if self._late is None:
            self._wait()

    def on_headers_complete(self) -> None:
        """The head of a request is there."""
        self._stop_waiting()
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is there."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _wait(self) -> None:
        self._head = 0
        self._late = self.loop.call_later(MOST_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        self._head = None
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        self.transport.close()
