"""HTTP/2 on a connection after its upgrade: many requests at a time, answers read whole.

h2 keeps the protocol's state; here are the two tasks that move bytes, and the bounds on what a server may make us keep:
an answer's body has a limit from its request, headers have one of h2's, and control frames that we would have to
answer while the server does not read end the connection.
"""

import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import trio
from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

from core.buffers import Buffer
from core.dial import innermost_reason
from core.http2 import BulkConnection
from core.nursery import open_nursery
from core.tls import receive_into, send_parts
from datastore.s3.pacing import TokenBucket
from repository.remote.errors import RemoteAnswerError, RemoteError, RemoteUnavailableError

#: Bytes that may be on their way to us: as the reference client, so that no window limits a download.
WINDOW: Final = (1 << 31) - 2
#: Bytes of a frame that we accept.
RECEIVED_FRAME: Final = 1 << 20
#: Bytes of a frame that we send, as long as the server takes that.
SENT_FRAME: Final = 1 << 20
#: Bytes of one read.
_PIECE: Final = 256 << 10
#: The same, and of a frame that we send, where a rate is limited: 4 MiB at 20 KiB/s would hold everything else up
#: for minutes, pings included.
_THROTTLED_PIECE: Final = 64 << 10
#: Bytes of an answer's piece that is kept as it came; an object for each byte would take fifty times as much.
_SMALL_PIECE: Final = 4096
#: Bytes of a frame's head.
_HEAD: Final = 9
#: Bytes of a body that goes before larger ones: index entries must not wait behind chunks.
_SMALL: Final = 512 << 10
#: Bytes of answers to control frames that may wait for a server that does not read.
_MAX_CONTROL: Final = 1 << 20
#: Bytes of a server's header block.
_MAX_HEADERS: Final = 64 << 10
#: Seconds without a byte, while answers are due, until the server is asked for a sign of life, and to wait for it.
QUIET_S: Final = 60.0
PING_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Http2Answer:
    """One answer, read whole."""

    status: int
    body: bytearray


@dataclass(slots=True, eq=False)
class _Exchange:
    """One request and its answer."""

    what: str  #: for messages
    limit: Callable[[int], int]  #: bytes that an answer with this status may have
    parts: deque[memoryview]  #: of the body, not sent yet
    left: int  #: their bytes
    small: bool
    done: trio.Event = field(default_factory=trio.Event)
    status: int = 0
    body: list[Buffer] = field(default_factory=list)  #: what came of the answer
    received: int = 0  #: its bytes
    error: RemoteError | None = None
    ended: bool = False  #: the request is sent whole


async def close_now(stream: trio.abc.AsyncResource) -> None:
    """Close the socket without waiting for anybody; no checkpoint, which might replace an error by a cancellation."""
    with trio.CancelScope(shield=True):
        await trio.aclose_forcefully(stream)


class Http2Client:
    """One connection. Use `Http2Client.open`; any number of tasks."""

    def __init__(
        self, stream: trio.abc.Stream, where: str, received: TokenBucket | None, sent: TokenBucket | None
    ) -> None:
        self._stream = stream
        self._where = where
        self._received, self._sent = received, sent
        self._sent_frame = SENT_FRAME if sent is None else _THROTTLED_PIECE
        # Headers are made here: to have h2 look through them takes a fifth of a small request's time.
        config = H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self._h2 = BulkConnection(config)
        # As first values, not as changes: h2 would announce those only later, and download with 64 KiB until then.
        self._h2.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
                SettingCodes.MAX_FRAME_SIZE: RECEIVED_FRAME,
                SettingCodes.MAX_HEADER_LIST_SIZE: _MAX_HEADERS,
            },
        )
        self._h2.max_inbound_frame_size = RECEIVED_FRAME
        self._exchanges: dict[int, _Exchange] = {}
        self._queue: list[int] = []  #: streams with a body to be sent, in order of arrival
        self._wake = trio.Event()  #: something may be sent
        self._slots = trio.lowlevel.ParkingLot()  #: wait for a stream to end
        self._alive = 0.0  #: when the last byte came, or one of a body went, on trio's clock
        self._broken: RemoteError | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        stream: trio.abc.Stream,
        first: Buffer,
        *,
        where: str,
        received: TokenBucket | None = None,
        sent: TokenBucket | None = None,
    ) -> AsyncIterator["Http2Client"]:
        """Speak HTTP/2 on `stream` while the block runs; it is closed at the end, whatever is on its way.

        An error of the connection does not end the block: every request that is waiting, or made later, raises it.

        Args:
            stream: after the upgrade.
            first: bytes that came with the answer to the upgrade.
            where: the server and what is done there, for messages.
            received: limits the rate of what comes.
            sent: limits the rate of what goes.
        """
        client = cls(stream, where, received, sent)
        client._h2.initiate_connection()
        client._h2.increment_flow_control_window(WINDOW - 65535)
        client._alive = trio.current_time()
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(client._receive, bytes(first))
                nursery.start_soon(client._send)
                nursery.start_soon(client._watch)
                try:
                    yield client
                finally:
                    client._fail(RemoteUnavailableError("use", where, "the connection was closed"))
                    nursery.cancel_scope.cancel()
        finally:
            await close_now(stream)

    async def aclose(self) -> None:
        """Close the connection at once; requests that are waiting fail."""
        self._fail(RemoteUnavailableError("use", self._where, "the connection was closed"))
        await close_now(self._stream)

    @property
    def broken(self) -> RemoteError | None:
        """Why the connection is of no use any more; None while it is."""
        return self._broken

    async def request(
        self,
        method: str,
        path: str,
        *,
        what: str,
        headers: Sequence[tuple[str, str]] = (),
        body: Sequence[Buffer] = (),
        limit: Callable[[int], int],
    ) -> Http2Answer:
        """Send a request and read its answer whole.

        Cancelled, the server is told that nobody wants the answer any more; it may still carry the request out.

        Args:
            method: of HTTP.
            path: with query, encoded.
            what: for messages: `store chunk`.
            headers: beside the pseudo headers.
            body: must not change until this returns.
            limit: bytes that an answer with this status may have.

        Raises:
            RemoteUnavailableError: the connection was lost, or the server gave the request up.
            RemoteAnswerError: the server broke the protocol, or sent more than `limit`.
        """
        await self._free_slot(what)
        if self._broken is not None:
            raise self._again(self._broken)
        parts = deque(memoryview(part).cast("B") for part in body if len(part))
        size = sum(len(part) for part in parts)
        exchange = _Exchange(what, limit, parts, size, size <= _SMALL)
        number = self._h2.get_next_available_stream_id()
        pseudo = [(":method", method), (":scheme", "https"), (":authority", "localhost:8007"), (":path", path)]
        self._h2.send_headers(number, [*pseudo, *headers], end_stream=not parts)
        exchange.ended = not parts
        self._exchanges[number] = exchange
        if parts:
            self._queue.append(number)
        self._wake.set()
        try:
            await exchange.done.wait()
        finally:
            self._drop(number, ErrorCodes.CANCEL)
        if exchange.error is not None:
            raise self._again(exchange.error)
        whole = exchange.body[0] if len(exchange.body) == 1 else None
        return Http2Answer(exchange.status, whole if isinstance(whole, bytearray) else bytearray().join(exchange.body))

    async def _free_slot(self, what: str) -> None:
        """Wait until the server lets one more request be made, or the connection is broken."""
        while (
            self._broken is None
            and self._h2.open_outbound_streams >= self._h2.remote_settings.max_concurrent_streams
        ):  # fmt: skip
            # With requests under way their answers are what is waited for, and watched.
            with trio.move_on_after(math.inf if self._exchanges else PING_S) as patience:
                await self._slots.park()
            if patience.cancelled_caught and not self._exchanges:
                raise RemoteUnavailableError(what, self._where, "the server allows no request on the connection")

    def _again(self, error: RemoteError) -> RemoteError:
        """A fresh copy: one object must not be raised by several tasks."""
        return type(error)(error.what, error.where, error.why, error.hint)

    def _drop(self, number: int, code: ErrorCodes) -> None:
        """Forget a stream; the server is told unless both sides are done with it."""
        exchange = self._exchanges.pop(number, None)
        if exchange is None:
            return
        if number in self._queue:
            self._queue.remove(number)
        if self._broken is None and not (exchange.done.is_set() and exchange.ended and exchange.error is None):
            with suppress(ProtocolError):  # it has ended by itself
                self._h2.reset_stream(number, code)
        self._wake.set()
        self._slots.unpark_all()

    def _fail(self, error: RemoteError) -> None:
        """Nothing can be asked any more."""
        if self._broken is None:
            self._broken = error
        for exchange in self._exchanges.values():
            if not exchange.done.is_set():  # what was answered whole is answered
                exchange.error = error
                exchange.done.set()
        self._slots.unpark_all()
        self._wake.set()

    def _lost(self, why: str) -> RemoteUnavailableError:
        return RemoteUnavailableError("talk to", self._where, why or "the connection was lost")

    # --- sending -----------------------------------------------------------------------------------------------------

    async def _send(self) -> None:
        try:
            while self._broken is None:
                control = self._h2.parts_to_send()
                parts = control or self._next_frame()
                if not parts:
                    self._wake = trio.Event()
                    await self._wake.wait()
                    continue
                # Of a body the system takes more only as the server does: a slow upload is no silence.
                taken = None if control else self._note_life
                if self._sent is None:
                    await send_parts(self._stream, parts, taken)
                else:
                    await self._send_slowly(self._sent, b"".join(parts), taken)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._fail(self._lost(innermost_reason(error)))

    def _note_life(self) -> None:
        self._alive = trio.current_time()

    async def _send_slowly(self, bucket: TokenBucket, data: bytes, taken: Callable[[], None] | None) -> None:
        view = memoryview(data)
        while view:
            # A frame of one piece goes with its head: 9 bytes are not worth a record and a system call.
            end = _THROTTLED_PIECE if len(view) > _THROTTLED_PIECE + _HEAD else len(view)
            piece, view = view[:end], view[end:]
            await bucket.take(len(piece))
            await self._stream.send_all(piece)
            if taken is not None:
                taken()

    def _next_frame(self) -> list[Buffer]:
        """The next frame of a body that the server's windows let through; empty if there is none."""
        chosen = None
        for number in self._queue:
            if self._exchanges[number].done.is_set():
                continue  # refused or reset before it was sent whole: nobody reads the rest
            if self._h2.local_flow_control_window(number) > 0:
                if self._exchanges[number].small:
                    chosen = number
                    break
                if chosen is None:
                    chosen = number
        if chosen is None:
            return []
        exchange = self._exchanges[chosen]
        part = exchange.parts[0]
        size = min(len(part), self._h2.local_flow_control_window(chosen), self._h2.max_outbound_frame_size)
        size = min(size, self._sent_frame)
        if size < len(part):
            exchange.parts[0] = part[size:]
        else:
            exchange.parts.popleft()
        exchange.left -= size
        exchange.ended = not exchange.left
        if exchange.ended:
            self._queue.remove(chosen)
        self._h2.send_body(chosen, part[:size], end_stream=exchange.ended)
        return self._h2.parts_to_send()

    # --- receiving ---------------------------------------------------------------------------------------------------

    async def _receive(self, first: bytes) -> None:
        data: bytes | bytearray = first
        try:
            while self._broken is None:
                self._alive = trio.current_time()
                for event in self._h2.receive_data(data):
                    self._handle(event)
                if len(self._h2._data_to_send) > _MAX_CONTROL:
                    raise ProtocolError("it asks for more answers than it reads")
                self._wake.set()
                piece = _PIECE if self._received is None else _THROTTLED_PIECE
                if (place := self._h2.place()) is None:
                    data = await self._stream.receive_some(piece)
                    count = len(data)
                else:
                    with place:
                        count = await receive_into(self._stream, place[:piece])
                    self._h2.filled(count)
                    data = b""
                if not count:
                    self._fail(self._lost("the server closed the connection"))
                elif self._received is not None:
                    await self._received.take(count)
        except ProtocolError as error:
            why = f"it breaks the rules of HTTP/2: {error}"
            self._fail(RemoteAnswerError("understand", self._where, why))
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._fail(self._lost(innermost_reason(error)))

    def _handle(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            exchange = self._exchanges.get(event.stream_id)
            if exchange is not None and not exchange.done.is_set():
                self._take_body(event.stream_id, exchange, event.data)
        elif isinstance(event, ResponseReceived):
            exchange = self._exchanges.get(event.stream_id)
            if exchange is not None:
                self._take_head(event.stream_id, exchange, event)
        elif isinstance(event, StreamEnded):
            exchange = self._exchanges.get(event.stream_id)
            if exchange is not None:
                exchange.done.set()
        elif isinstance(event, StreamReset):
            exchange = self._exchanges.get(event.stream_id)
            if exchange is not None and not exchange.done.is_set():
                exchange.error = RemoteUnavailableError(
                    exchange.what, self._where, f"the server gave the request up (code {event.error_code!r})"
                )
                exchange.done.set()
        elif isinstance(event, RemoteSettingsChanged):
            self._slots.unpark_all()  # it may allow more requests now
        elif isinstance(event, ConnectionTerminated):
            self._fail(self._lost(f"the server ends the connection (code {event.error_code!r})"))

    def _take_head(self, number: int, exchange: _Exchange, event: ResponseReceived) -> None:
        status, length = "", ""
        for name, value in event.headers:
            if name in (b":status", ":status"):
                status = value if isinstance(value, str) else value.decode("latin-1")
            elif name in (b"content-length", "content-length"):
                length = value if isinstance(value, str) else value.decode("latin-1")
        if len(status) != 3 or not status.isascii() or not status.isdigit():
            self._refuse(number, exchange, f"an answer with the status {status[:20]!r}")
            return
        exchange.status = int(status)
        # h2 has compared the length with the body; here it is known before anything of it comes.
        if length.isascii() and length.isdigit() and int(length[:20]) > exchange.limit(exchange.status):
            self._refuse(number, exchange, self._too_long(exchange))

    def _take_body(self, number: int, exchange: _Exchange, data: Buffer) -> None:
        if not exchange.status or exchange.received + len(data) > exchange.limit(exchange.status):
            self._refuse(number, exchange, self._too_long(exchange))
        else:
            exchange.received += len(data)
            last = exchange.body[-1] if exchange.body else None
            if len(data) >= _SMALL_PIECE:
                exchange.body.append(data)
            elif isinstance(last, bytearray):
                last += data
            else:
                exchange.body.append(bytearray(data))

    def _too_long(self, exchange: _Exchange) -> str:
        return f"the answer has more than {exchange.limit(exchange.status)} bytes"

    def _refuse(self, number: int, exchange: _Exchange, why: str) -> None:
        exchange.error = RemoteAnswerError(exchange.what, self._where, why)
        exchange.body.clear()
        exchange.done.set()

    async def _watch(self) -> None:
        """Find out that a server is gone although the network says nothing."""
        while self._broken is None:
            await trio.sleep(QUIET_S / 4)
            if not self._exchanges or trio.current_time() - self._alive < QUIET_S:
                continue
            asked = self._alive
            self._h2.ping(b"fleece??")
            self._wake.set()
            deadline = trio.current_time() + PING_S
            while self._alive == asked and trio.current_time() < deadline:  # noqa: ASYNC110 - a byte sets no event
                await trio.sleep(QUIET_S / 60)
            if self._alive == asked:
                self._fail(self._lost(f"no sign of life for {QUIET_S + PING_S:.0f} s"))
