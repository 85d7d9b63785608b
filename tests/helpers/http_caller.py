"""A quick HTTP/1.1 client over one connection, so that a test measures the server and not its client."""

import asyncio
import json


class Caller:
    """Sends POST requests in JSON one after the other over a connection that stays open."""

    def __init__(self, port):
        self.port = port
        self.streams = None

    async def post(self, path, body):
        """The status and the decoded body of an answer.

        Raises:
          OSError, asyncio.IncompleteReadError: the server is away.
        """
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        try:
            content = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            return int(head.split()[1]), json.loads(await reader.readexactly(length))
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            raise

    def close(self):
        """Closes the connection; the next request opens another one."""
        if self.streams is not None:
            self.streams[1].close()
        self.streams = None
