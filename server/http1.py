"""HTTP/1.1 on one connection: requests read within limits of size and time, answers written, upgrades handed on."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, Final, Protocol

import h11
import trio

from core.buffers import Buffer
from server.answers import Answer
from server.errors import TooLargeError

_LOG = logging.getLogger(__name__)
#: Bytes of request line and headers.
MAX_HEAD: Final = 16 << 10
#: Seconds for the next request to begin and its head to be there, for a body, and for a client to take a piece.
HEAD_TIMEOUT_S: Final = 75.0
BODY_TIMEOUT_S: Final = 300.0
SEND_TIMEOUT_S: Final = 120.0
_PIECE: Final = 64 << 10


@dataclass(slots=True)
class Request:
    """The head of a request."""

    method: str
    target: str  #: path and query as sent
    headers: Mapping[str, str]  #: names in lower case; of repeated ones the last, but all of `cookie`
    peer: str = ""

    @property
    def path(self) -> str:
        """Without query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """Behind the question mark."""
        return self.target.partition("?")[2]


class Upgraded(Protocol):
    """What is spoken after a 101."""

    async def serve(self, stream: trio.abc.Stream, first: bytes) -> None:
        """Speak until the connection ends; `first` came with the request."""
        ...


@dataclass(slots=True)
class Upgrade:
    """Instead of an answer: the connection goes on with another protocol."""

    protocol: str
    session: AbstractAsyncContextManager[Upgraded]
    refused: Callable[[Exception], Awaitable[Answer]]  #: if the session cannot be opened


@dataclass(slots=True)
class Body:
    """Reads the body of one request."""

    connection: "Http1Connection"
    read: bool = field(default=False)

    async def all(self, limit: int) -> bytes:
        """The whole body, at most `limit` bytes.

        Raises:
            TooLargeError: it has more.
        """
        self.read = True
        parts: list[bytes] = []
        size = 0
        with trio.fail_after(BODY_TIMEOUT_S):
            while True:
                event = await self.connection.next_event()
                if isinstance(event, h11.EndOfMessage):
                    return b"".join(parts)
                if isinstance(event, h11.Data):
                    size += len(event.data)
                    if size > limit:
                        raise TooLargeError
                    parts.append(bytes(event.data))


Handle = Callable[[Request, Body], Awaitable[Answer | Upgrade]]


class Http1Connection:
    """One connection of a client."""

    def __init__(self, stream: trio.abc.Stream, peer: str, handle: Handle, closing: trio.Event | None = None) -> None:
        self._stream = stream
        self._peer = peer
        self._handle = handle
        self._closing = trio.Event() if closing is None else closing
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)

    async def serve(self) -> None:
        """Answer requests until the client has no more, or misbehaves; then the caller closes the stream."""
        try:
            while not self._closing.is_set() and await self._one():
                self._h11.start_next_cycle()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass
        except h11.RemoteProtocolError as error:
            await self._last_word(error.error_status_hint or 400, "")
        except TooLargeError:
            await self._last_word(400, "Request body too large")
        except h11.LocalProtocolError as error:
            _LOG.debug("connection of %s: %s", self._peer, error)

    async def _one(self) -> bool:
        """Answer one request; False if it was the last one."""
        with trio.fail_after(HEAD_TIMEOUT_S):
            event = await self.next_event()
        if not isinstance(event, h11.Request):
            return False
        headers: dict[str, str] = {}
        for name, value in event.headers:
            key, text = name.decode("latin-1"), value.decode("utf-8", "replace")
            headers[key] = f"{headers[key]}; {text}" if key == "cookie" and key in headers else text
        request = Request(event.method.decode("latin-1"), event.target.decode("latin-1"), headers, self._peer)
        body = Body(self)
        answer = await self._handle(request, body)
        if isinstance(answer, Upgrade):
            await self._upgrade(answer, body)
            return False
        await self._send(answer, request.method)
        return self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE

    async def next_event(self) -> Any:
        """The next event of h11 that is there."""
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._h11.they_are_waiting_for_100_continue:
                await self._write(self._h11.send(h11.InformationalResponse(status_code=100, headers=[])))
            self._h11.receive_data(bytes(await self._stream.receive_some(_PIECE)))

    async def _send(self, answer: Answer, method: str) -> None:
        headers = [("date", formatdate(usegmt=True)), *answer.headers]
        if answer.content_type is not None:
            headers.append(("content-type", answer.content_type))
        length = answer.length
        if length is not None:
            headers.append(("content-length", str(length)))
        if self._closing.is_set():
            headers.append(("connection", "close"))
        await self._write(self._h11.send(h11.Response(status_code=answer.status, headers=headers)))
        for part in answer.parts:
            await self._write_body(part)
        if answer.stream is not None:
            async with aclosing(answer.stream) as stream:
                async for part in stream:
                    await self._write_body(part)
        await self._write(self._h11.send(h11.EndOfMessage()))

    async def _write_body(self, part: Buffer) -> None:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), 1 << 20):
            await self._write(self._h11.send(h11.Data(data=bytes(view[start : start + (1 << 20)]))))

    async def _write(self, data: bytes | None) -> None:
        if data:
            with trio.fail_after(SEND_TIMEOUT_S):
                await self._stream.send_all(data)

    async def _upgrade(self, upgrade: Upgrade, body: Body) -> None:
        if not body.read:
            await body.all(0)
        async with AsyncExitStack() as stack:
            try:
                session = await stack.enter_async_context(upgrade.session)
            except Exception as error:
                # The client may ask again on the same connection, but nobody does.
                return await self._send(await upgrade.refused(error), "GET")
            headers = [("connection", "upgrade"), ("upgrade", upgrade.protocol)]
            await self._write(self._h11.send(h11.InformationalResponse(status_code=101, headers=headers)))
            first, _ = self._h11.trailing_data
            await session.serve(self._stream, bytes(first))
        return None

    async def _last_word(self, status: int, text: str) -> None:
        """Tell a client that broke the protocol so, if that is still possible."""
        if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            try:
                data = text.encode()
                headers = [("content-length", str(len(data))), ("connection", "close")]
                await self._write(self._h11.send(h11.Response(status_code=status, headers=headers)))
                await self._write(self._h11.send(h11.Data(data=data)))
                await self._write(self._h11.send(h11.EndOfMessage()))
            except (h11.LocalProtocolError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                pass


def redirect(head: bytes) -> bytes:
    """The answer to a request in plain text (spec 1): the same place over TLS."""
    lines = head.decode("latin-1").split("\r\n")
    method, _, rest = lines[0].partition(" ")
    target = rest.partition(" ")[0]
    host = next((line.partition(":")[2].strip() for line in lines[1:] if line.lower().startswith("host:")), "")
    if not host or not _is_host(host):
        return b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    status = "301 Moved Permanently" if method in ("GET", "HEAD") else "308 Permanent Redirect"
    place = f"https://{host}{target if target.startswith('/') else '/'}"
    return f"HTTP/1.1 {status}\r\nlocation: {place}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode("latin-1")


def _is_host(text: str) -> bool:
    return len(text) <= 255 and all(char.isalnum() or char in ".-_:[]" for char in text) and text.isascii()
