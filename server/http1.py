"""HTTP/1.1 on one connection: requests read within limits of size and time, answers written, upgrades handed on."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, Final, Protocol

import h11
import trio

from core.buffers import Buffer
from core.errors import FleeceError, os_reason
from core.nursery import open_nursery
from server.answers import Answer
from server.errors import ApiError, BodyError, TooLargeError

_LOG = logging.getLogger(__name__)
#: Bytes of request line and headers.
MAX_HEAD: Final = 16 << 10
#: Seconds for the next request to begin and its head to be there, for a body, and for a client to take a piece.
HEAD_TIMEOUT_S: Final = 75.0
BODY_TIMEOUT_S: Final = 300.0
SEND_TIMEOUT_S: Final = 120.0
#: Bytes, and seconds, of a request that is refused already, for which the socket stays open: closed at once, it would
#: take the answer with it.
LINGER: Final = 4 << 20
LINGER_S: Final = 2.0
_PIECE: Final = 64 << 10
#: Headers that mean one thing: two of them, and a proxy in front may have looked at the other one.
_SINGLE: Final = ("authorization", "content-type", "csrfpreventiontoken", "upgrade")


@dataclass(slots=True)
class Request:
    """The head of a request."""

    method: str
    target: str  #: path and query as sent; before them may stand scheme and server
    headers: Mapping[str, str]  #: names in lower case; of repeated ones the last, but all of `cookie`
    peer: str = ""
    known: Callable[[], object] = lambda: None  #: called when it is clear that a user sent it

    @property
    def path(self) -> str:
        """Without query, scheme and server."""
        path = self.target.partition("?")[0]
        if path.startswith("/") or "://" not in path:
            return path
        return "/" + path.partition("://")[2].partition("/")[2]  # as to a proxy, which servers must understand, too

    @property
    def host(self) -> str:
        """The server that the client means, perhaps with a port: what stands before the path counts, not the header."""
        path = self.target.partition("?")[0]
        if path.startswith("/") or "://" not in path:
            return self.headers.get("host", "")
        return path.partition("://")[2].partition("/")[0]

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

    async def all(self, limit: int, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
        """The whole body, at most `limit` bytes, within `timeout_s`.

        Raises:
            TooLargeError: it has more.
            BodyError: it did not come, or is none.
        """
        self.read = True
        data = bytearray()  # not a list: it may come in pieces of a byte
        try:
            with trio.fail_after(timeout_s):
                while True:
                    event = await self.connection.next_event()
                    if isinstance(event, h11.EndOfMessage):
                        return bytes(data)
                    if isinstance(event, h11.Data):
                        if len(data) + len(event.data) > limit:
                            raise TooLargeError
                        data += event.data
        except (
            trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, h11.RemoteProtocolError,
        ) as error:  # fmt: skip
            raise BodyError from error


Handle = Callable[[Request, Body], Awaitable[Answer | Upgrade]]


class Http1Connection:
    """One connection of a client."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        peer: str,
        handle: Handle,
        closing: trio.Event | None = None,
        known: Callable[[], object] = lambda: None,
        resting: Callable[[bool], object] = lambda rests: None,
    ) -> None:
        """`closing`: no further request is waited for.

        `known` is called once a user has shown who it is, `resting` when a request is waited for, and when it is there.
        """
        self._known = known
        self._resting = resting
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
            await self._linger()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass
        except BodyError as error:
            if isinstance(error.__cause__, h11.RemoteProtocolError):
                await self._refuse(error.__cause__)
        except h11.RemoteProtocolError as error:
            await self._refuse(error)
        except TooLargeError:
            await self._last_word(400, "Request body too large")
            await self._linger()
        except h11.LocalProtocolError as error:
            _LOG.debug("connection of %s: %s", self._peer, error)

    async def _one(self) -> bool:
        """Answer one request; False if it was the last one."""
        self._resting(True)
        try:
            event = await self._next_request()
        finally:
            self._resting(False)
        if not isinstance(event, h11.Request):
            return False
        headers = _headers(event)
        method, target = event.method.decode("latin-1"), event.target.decode("latin-1")
        request = Request(method, target, headers, self._peer, self._known)
        body = Body(self)
        answer = await self._handle(request, body)
        if isinstance(answer, Upgrade):
            await self._upgrade(answer, body)
            return False
        if not await self._send(answer, request.method):
            return False
        return self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE

    async def _next_request(self) -> Any:
        """The next head; None if the server is going down before it is there."""
        event: Any = None
        with trio.fail_after(HEAD_TIMEOUT_S):
            async with open_nursery() as nursery:

                async def stop() -> None:
                    await self._closing.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(stop)
                event = await self.next_event()
                nursery.cancel_scope.cancel()
        return event

    async def next_event(self) -> Any:
        """The next event of h11 that is there."""
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._h11.they_are_waiting_for_100_continue:
                await self._write(self._h11.send(h11.InformationalResponse(status_code=100, headers=[])))
            self._h11.receive_data(bytes(await self._stream.receive_some(_PIECE)))

    async def _send(self, answer: Answer, method: str) -> bool:
        """Send the answer; False if it had to end early, and the connection with it."""
        headers = [("date", formatdate(usegmt=True)), *answer.headers]
        if answer.content_type is not None:
            headers.append(("content-type", answer.content_type))
        length = answer.length
        if length is not None:
            headers.append(("content-length", str(length)))
        if self._closing.is_set():
            headers.append(("connection", "close"))
        await self._write(self._h11.send(h11.Response(status_code=answer.status, headers=headers)))
        if method != "HEAD":
            for part in answer.parts:
                await self._write_body(part)
            if answer.stream is not None and not await self._send_stream(answer.stream):
                return False
        await self._write(self._h11.send(h11.EndOfMessage()))
        return True

    async def _send_stream(self, parts: AsyncGenerator[Buffer, None]) -> bool:
        async with aclosing(parts):
            while True:
                try:
                    part = await anext(parts)
                except StopAsyncIteration:
                    return True
                except Exception as error:
                    # The client sees that the end is missing; it cannot be told why any more.
                    why = os_reason(error) if isinstance(error, OSError) else str(error)
                    known = isinstance(error, FleeceError | ApiError | OSError)
                    _LOG.error("an answer ended early: %s", why, exc_info=None if known else error)
                    return False
                await self._write_body(part)

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
                await self._send(await upgrade.refused(error), "GET")
                return
            headers = [("connection", "upgrade"), ("upgrade", upgrade.protocol)]
            await self._write(self._h11.send(h11.InformationalResponse(status_code=101, headers=headers)))
            first, _ = self._h11.trailing_data
            await session.serve(self._stream, bytes(first))

    async def _linger(self) -> None:
        """Take what a client still sends of a request that has its answer, which it may read only then."""
        if self._h11.their_state not in (h11.SEND_BODY, h11.ERROR) or self._h11.our_state is h11.SWITCHED_PROTOCOL:
            return
        with trio.move_on_after(LINGER_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            left = LINGER
            while left > 0 and (data := await self._stream.receive_some(_PIECE)):
                left -= len(data)

    async def _refuse(self, error: h11.RemoteProtocolError) -> None:
        await self._last_word(error.error_status_hint or 400, "")
        await self._linger()

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


def _headers(event: h11.Request) -> dict[str, str]:
    """The headers of a request.

    Raises:
        h11.RemoteProtocolError: they are too long, or can be understood in two ways.
    """
    headers: dict[str, str] = {}
    size = len(event.target)
    for name, value in event.headers:
        size += len(name) + len(value) + 4
        key, text = name.decode("latin-1"), value.decode("utf-8", "replace")
        if key in _SINGLE and key in headers:
            raise h11.RemoteProtocolError(f"{key} is repeated")
        headers[key] = f"{headers[key]}; {text}" if key == "cookie" and key in headers else text
    if size > MAX_HEAD:  # h11 looks only while the end is missing
        raise h11.RemoteProtocolError("the head is too long", error_status_hint=431)
    if "transfer-encoding" in headers and "content-length" in headers:
        raise h11.RemoteProtocolError("the length of the body is given twice")
    return headers


def redirect(head: bytes) -> bytes:
    """The answer to a request in plain text (spec 1): the same place over TLS."""
    lines = head.decode("latin-1").split("\r\n")
    method, _, rest = lines[0].partition(" ")
    target = rest.partition(" ")[0]
    host = next((line.partition(":")[2].strip() for line in lines[1:] if line.lower().startswith("host:")), "")
    if not _is_host(host) or not (target.isascii() and target.isprintable()):
        return b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    status = "301 Moved Permanently" if method in ("GET", "HEAD") else "308 Permanent Redirect"
    place = f"https://{host}{target if target.startswith('/') else '/'}"
    return f"HTTP/1.1 {status}\r\nlocation: {place}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode("latin-1")


def _is_host(text: str) -> bool:
    return 0 < len(text) <= 255 and all(char.isalnum() or char in ".-_:[]" for char in text) and text.isascii()
