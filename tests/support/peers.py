"""Peers of notifications: a web server and a mail server that do as they are told, one connection after the other."""

import base64
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import trio

from tests.support.waiting import PATIENCE_S

#: Instead of an answer: wait until the other side gives up, or close at once.
HANG = b"hang"
DROP = b"drop"


def answer(status: int, body: bytes = b"", *headers: str) -> bytes:
    """An HTTP answer."""
    lines = [f"HTTP/1.1 {status} words", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@dataclass
class WebPeer:
    """Answers each request with the next of `answers`, the last one again and again."""

    answers: list[bytes] = field(default_factory=lambda: [answer(200)])
    requests: list[bytes] = field(default_factory=list)
    port: int = 0

    @property
    def bodies(self) -> list[bytes]:
        """Bodies of the requests."""
        return [request.partition(b"\r\n\r\n")[2] for request in self.requests]

    async def speak(self, stream: trio.abc.Stream) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += await _some(stream)
        head, _, _ = data.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        while len(data) < len(head) + 4 + int(fields[b"content-length"]):
            data += await _some(stream)
        reply = self.answers[min(len(self.requests), len(self.answers) - 1)]
        self.requests.append(data)
        if reply == HANG:
            await trio.sleep_forever()
        elif reply != DROP:
            await stream.send_all(reply)


@dataclass
class MailPeer:
    """Speaks SMTP; `replies` has what is said to a command instead of yes."""

    offers: list[str] = field(default_factory=list)  #: of EHLO
    replies: dict[str, bytes] = field(default_factory=dict)  #: by command, e.g. `RCPT`; `DATA.` is the end of the mail
    context: ssl.SSLContext | None = None  #: for STARTTLS
    commands: list[str] = field(default_factory=list)  #: as they came
    mails: list[bytes] = field(default_factory=list)
    encrypted: list[bool] = field(default_factory=list)  #: of each command
    port: int = 0

    async def speak(self, stream: trio.abc.Stream) -> None:
        secure = isinstance(stream, trio.SSLStream)
        await stream.send_all(self.replies.get("", b"220 here") + b"\r\n")
        rest = b""
        while True:
            line, rest = await _line(stream, rest)
            command = line.split(b" ")[0].split(b":")[0].decode().upper()
            self.commands.append(line.decode())
            self.encrypted.append(secure)
            reply = self.replies.get(command)
            if reply == HANG:
                await trio.sleep_forever()
            if reply == DROP:
                return
            if reply is not None:
                await stream.send_all(reply + b"\r\n")
            elif command == "EHLO":
                words = ["here", *self.offers]
                lines = [f"250{'-' if number < len(words) - 1 else ' '}{word}\r\n" for number, word in enumerate(words)]
                await stream.send_all("".join(lines).encode())
            elif command == "STARTTLS":
                await stream.send_all(b"220 go\r\n")
                assert self.context is not None
                stream = trio.SSLStream(stream, self.context, server_side=True)
                secure = True
            elif command == "AUTH":
                await stream.send_all(b"235 welcome\r\n")
            elif command == "DATA":
                await stream.send_all(b"354 go on\r\n")
                while not rest.endswith(b"\r\n.\r\n"):
                    rest += await _some(stream)
                self.mails.append(rest)
                rest = b""
                await stream.send_all(self.replies.get("DATA.", b"250 taken") + b"\r\n")
            elif command == "QUIT":
                await stream.send_all(b"221 bye\r\n")
                return
            else:
                await stream.send_all(b"250 fine\r\n")

    @property
    def credentials(self) -> list[bytes]:
        """What AUTH PLAIN said."""
        found = [command.split(" ") for command in self.commands if command.startswith("AUTH PLAIN")]
        return [base64.b64decode(words[2]) for words in found]


async def _some(stream: trio.abc.Stream) -> bytes:
    data = await stream.receive_some(65536)
    if not data:
        raise trio.BrokenResourceError
    return bytes(data)


async def _line(stream: trio.abc.Stream, rest: bytes) -> tuple[bytes, bytes]:
    while b"\r\n" not in rest:
        rest += await _some(stream)
    line, _, rest = rest.partition(b"\r\n")
    return line, rest


@contextmanager
def taken_port() -> Iterator[int]:
    """A port at which nobody listens, nor can while the block runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield int(bound.getsockname()[1])


@asynccontextmanager
async def listening(peer: WebPeer | MailPeer, context: ssl.SSLContext | None = None) -> AsyncIterator[None]:
    """`peer` at `peer.port` of 127.0.0.1 while the block runs; over TLS with a context."""

    async def serve(stream: trio.SocketStream) -> None:
        spoken: trio.abc.Stream = stream
        if context is not None:
            spoken = trio.SSLStream(stream, context, server_side=True)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError), trio.move_on_after(PATIENCE_S):
            await peer.speak(spoken)
        await trio.aclose_forcefully(spoken)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        peer.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield
        nursery.cancel_scope.cancel()
