"""HTTP/2 on a connection after its upgrade: many requests at a time, with bounded memory.

h2 keeps the protocol's state. What a client may make us keep is limited: bodies that are not answered yet by the
credit that is given back for them (less of it when the bodies of all clients together are many), answers by the number
that is made at a time, answers to control frames by their bytes, and unfinished streams by their number.
"""

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing, nullcontext, suppress
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
    RequestReceived,
    SettingsAcknowledged,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import FlowControlError, NoSuchStreamError, ProtocolError, StreamClosedError
from h2.settings import SettingCodes, Settings
from trio.lowlevel import RunVar

from core.buffers import Buffer
from core.errors import FleeceError, os_reason
from core.http2 import BulkConnection
from core.nursery import open_nursery
from core.tls import receive_into, send_parts
from server.answers import Answer

_LOG = logging.getLogger(__name__)
WINDOW: Final = 32 << 20
#: Bytes that a connection may send before it gets credit, beside many others.
SMALL_WINDOW: Final = 8 << 20
MANY_CONNECTIONS: Final = 16
#: PBS announces 4 MiB, which may keep everything else from a slow line for too long.
RECEIVED_FRAME: Final = 1 << 20
#: Bytes of a frame that is sent, as long as the client takes that.
SENT_FRAME: Final = 1 << 20
MAX_STREAMS: Final = 200
#: Bytes of a request's path, query and headers; more gets a 431.
MAX_HEADERS: Final = 16 << 10
_MAX_HEADER_BLOCK: Final = 256 << 10
#: Bytes of bodies for which credit is given back before their requests are answered, as long as one is being answered;
#: and if none is, since all of them are still on their way.
PARKED: Final = 64 << 20
MAX_PARKED: Final = 256 << 20
#: Bytes of bodies of all connections from which on each gets credit for only so many while some of its own are being
#: answered. Those go on in any case, so that no connection waits for another one.
SHARED: Final = 512 << 20
FLOOR: Final = 8 << 20
#: Answers with a body from the store that are held at a time.
ANSWERS_AT_ONCE: Final = 12
#: Streams that may be reset at once, and per second for ever, and requests at work: with more it is an attack. A mount
#: that reads ahead resets some all its life.
_MAX_RESETS: Final = 2000
_RESETS_PER_S: Final = 50
#: Settings likewise: each looks through all streams, and clients send them once.
_MAX_SETTINGS: Final = 200
_SETTINGS_PER_S: Final = 2
_MAX_AT_WORK: Final = 512
_MAX_CONTROL: Final = 1 << 20
_PIECE: Final = 256 << 10
#: Bytes that are understood at a time, as thousands of small frames take long, and seconds after which others have
#: their turn.
_SLICE: Final = 32 << 10
_TURN_S: Final = 0.02
#: Seconds that the sender has for the last frame.
_GOODBYE_S: Final = 0.2
#: Bytes of a frame's data that are put together with those before it: an object for each would weigh more than they do.
_SMALL: Final = 16 << 10
_JOINED: Final = 256 << 10


@dataclass(slots=True)
class _Shared:
    """What all connections of this trio loop have together."""

    connections: int = 0
    credited: int = 0  #: bytes of bodies for which credit was given back


_shared: RunVar[_Shared] = RunVar("bodies of all connections")


def _of_all() -> _Shared:
    try:
        return _shared.get()
    except LookupError:
        _shared.set(_Shared())
        return _shared.get()


@dataclass(slots=True)
class H2Request:
    """One request, read whole."""

    method: str
    target: str  #: path and query
    content_type: str | None
    body: bytes
    too_large: bool = False  #: the body was thrown away


@dataclass(slots=True, eq=False)
class _Stream:
    number: int
    method: str = ""
    target: str = ""
    content_type: str | None = None
    limit: int = 0
    parts: list[bytes | bytearray] = field(default_factory=list)
    size: int = 0
    credited: int = 0  #: bytes of `size` for which the client got credit
    too_large: bool = False
    refused: bool = False
    ended: bool = False  #: the request is there whole
    gone: bool = False  #: the client does not want the answer
    outgoing: deque[memoryview] = field(default_factory=deque)
    complete: bool = False  #: nothing will be added to `outgoing`
    room: trio.Event = field(default_factory=trio.Event)  #: `outgoing` is empty


class _Flood:
    """Counts what a client may do for ever at some rate, and more of it now and then."""

    def __init__(self, most: int, per_s: float) -> None:
        self._most, self._per_s = most, per_s
        self._count = self._last = 0.0

    def one_more(self) -> bool:
        """False if it is too many."""
        now = trio.current_time()
        self._count = max(0.0, self._count - self._per_s * (now - self._last)) + 1
        self._last = now
        return self._count <= self._most


Respond = Callable[[H2Request], Awaitable[Answer]]
#: Method and target -> bytes that the body may have.
Limit = Callable[[str, str], int]


class Http2Server:
    """One upgraded connection."""

    def __init__(self, stream: trio.abc.Stream, respond: Respond, limit: Limit) -> None:
        self._stream = stream
        self._respond = respond
        self._limit = limit
        self._h2 = BulkConnection(H2Configuration(client_side=False, header_encoding=None))
        # Not by `update`: that would only be sent later, and hold from then on.
        self._h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
                SettingCodes.MAX_FRAME_SIZE: RECEIVED_FRAME,
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADERS,
            },
        )
        self._h2.max_inbound_frame_size = RECEIVED_FRAME
        self._h2.decoder.max_header_list_size = _MAX_HEADER_BLOCK
        self._streams: dict[int, _Stream] = {}
        self._owed: dict[_Stream, int] = {}  #: bytes for which the client got no credit yet, the oldest first
        self._credited = 0  #: bytes of all streams
        self._all: Final = _of_all()
        self._at_work = 0
        self._resets: Final = _Flood(_MAX_RESETS, _RESETS_PER_S)
        self._settings: Final = _Flood(_MAX_SETTINGS, _SETTINGS_PER_S)
        self._wake = trio.Event()
        self._queue: deque[_Stream] = deque()  #: have something to send
        self._slots = trio.Semaphore(ANSWERS_AT_ONCE)
        self._leaving = False  #: the client makes no further requests

    async def serve(self, first: bytes) -> None:
        """Speak until the client ends the connection or breaks the protocol; requests at work are cancelled then.

        Args:
            first: bytes that came with the request for the upgrade.
        """
        self._h2.initiate_connection()
        window = WINDOW if self._all.connections < MANY_CONNECTIONS else SMALL_WINDOW
        self._h2.increment_flow_control_window(window - 65535)
        self._all.connections += 1
        try:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async with open_nursery() as nursery:
                    nursery.start_soon(self._send, nursery.cancel_scope)
                    await self._receive(nursery, first)
                    nursery.cancel_scope.cancel()
        finally:
            self._all.connections -= 1
            self._all.credited -= self._credited
            self._credited = 0

    async def _receive(self, nursery: trio.Nursery, data: bytes) -> None:
        while True:
            try:
                if not await self._understand(nursery, data):
                    return None
                self._settle()
            except ProtocolError as error:
                _LOG.debug("the client broke HTTP/2: %s", error)
                return await self._say_goodbye()
            if self._queue or self._h2._data_to_send:
                self._wake.set()
            if len(self._h2._data_to_send) > _MAX_CONTROL + SENT_FRAME + WINDOW // 8:
                return None  # it asks for answers to control frames without reading them
            if (place := self._h2.place()) is None:
                data = bytes(await self._stream.receive_some(_PIECE))
                if not data:
                    return None
                continue
            with place:
                count = await receive_into(self._stream, place[:_PIECE])
            if not count:
                return None
            self._h2.filled(count)
            data = b""

    async def _understand(self, nursery: trio.Nursery, data: bytes) -> bool:
        """Take what came; False if the connection is over."""
        began = time.perf_counter()
        for start in range(0, max(1, len(data)), _SLICE):
            for event in self._h2.receive_data(data[start : start + _SLICE]):
                if not self._on(nursery, event):
                    return False
            if time.perf_counter() - began > _TURN_S:
                await trio.lowlevel.checkpoint()
                began = time.perf_counter()
        return True

    def _on(self, nursery: trio.Nursery, event: Event) -> bool:
        """Take note of an event; False if the connection is over."""
        match event:
            case RequestReceived():
                return self._on_request(event)
            case DataReceived():
                self._on_data(event)
            case StreamEnded():
                stream = self._streams.get(event.stream_id or 0)
                if stream is not None and not stream.ended:
                    stream.ended = True
                    self._at_work += 1
                    if self._at_work > _MAX_AT_WORK:
                        return False
                    nursery.start_soon(self._answer, stream)
            case StreamReset():
                stream = self._streams.get(event.stream_id or 0)
                if stream is not None:
                    stream.gone = True
                    stream.outgoing.clear()
                    stream.room.set()
                    if not stream.ended:
                        self._forget(stream)
                return self._resets.one_more()
            case RemoteSettingsChanged():
                return self._settings.one_more()
            case SettingsAcknowledged():
                # What is above the announced limit gets a 431 from us instead of the end of the connection from h2.
                self._h2.decoder.max_header_list_size = _MAX_HEADER_BLOCK
            case ConnectionTerminated():
                # Requests that it has made are answered all the same; the sender ends the connection after that.
                self._leaving = event.error_code == ErrorCodes.NO_ERROR
                return self._leaving and bool(self._streams)
        return True

    def _on_request(self, event: RequestReceived) -> bool:
        stream = _Stream(event.stream_id or 0)
        self._streams[stream.number] = stream
        if len(self._streams) > _MAX_AT_WORK:
            return False
        total = 0
        for name, value in event.headers or ():
            key, text = _text(name), _text(value)
            total += len(key) + len(text) + 32
            if key == ":method":
                stream.method = text
            elif key == ":path":
                stream.target = text
            elif key == "content-type":
                stream.content_type = text
        stream.refused = total > MAX_HEADERS
        stream.limit = 0 if stream.refused else self._limit(stream.method, stream.target)
        return True

    def _on_data(self, event: DataReceived) -> None:
        stream = self._streams.get(event.stream_id or 0)
        length = event.flow_controlled_length or 0
        if stream is None:
            self._h2.acknowledge_received_data(length, event.stream_id or 0)
            return
        data = event.data or b""
        if stream.size + len(data) > stream.limit or stream.too_large or stream.gone:
            stream.too_large = True
            stream.parts.clear()
            self._h2.acknowledge_received_data(length, stream.number)
            return
        if len(data) > _SMALL:
            stream.parts.append(data)
        elif data:
            if stream.parts and isinstance(stream.parts[-1], bytearray) and len(stream.parts[-1]) < _JOINED:
                stream.parts[-1] += data
            else:
                stream.parts.append(bytearray(data))
        stream.size += len(data)
        if length:
            self._owed[stream] = self._owed.get(stream, 0) + length

    def _settle(self) -> None:
        """Give credit back for what came, as far as memory may be used."""
        while self._owed:
            limit = MAX_PARKED
            if self._at_work:
                limit = PARKED if self._all.credited < SHARED else FLOOR
            if self._credited >= limit:
                if not self._at_work and not any(one.outgoing for one in self._streams.values()):
                    raise ProtocolError("more bodies at a time than can be kept")
                break
            stream = next(iter(self._owed))
            length = self._owed.pop(stream)
            if stream.number in self._streams:
                stream.credited += length
                self._credited += length
                self._all.credited += length
            with suppress(StreamClosedError, NoSuchStreamError):
                self._h2.acknowledge_received_data(length, stream.number)
        if self._h2._data_to_send:
            self._wake.set()

    def _forget(self, stream: _Stream) -> None:
        if self._streams.pop(stream.number, None) is not None:
            self._credited -= stream.credited
            self._all.credited -= stream.credited
            stream.credited = 0
            stream.parts.clear()
        if self._leaving:
            self._wake.set()

    async def _answer(self, stream: _Stream) -> None:
        try:
            if stream.refused:
                answer = Answer(431, None)
            else:
                # A read of the store for each of 200 streams at once would be gigabytes.
                async with self._slots if stream.method == "GET" else nullcontext():
                    body = b"".join(stream.parts)
                    stream.parts.clear()
                    request = H2Request(stream.method, stream.target, stream.content_type, body, stream.too_large)
                    del body
                    answer = await self._respond(request)
                    del request
                    await self._send_answer(stream, answer)
                    return
            await self._send_answer(stream, answer)
        except Exception as error:
            # A chunk that cannot be read in the middle of an answer must not end the requests beside it.
            why = os_reason(error) if isinstance(error, OSError) else str(error)
            known = isinstance(error, FleeceError | OSError)
            what = f"the answer to {stream.method} {stream.target.partition('?')[0]!r} ended early"
            _LOG.error("%s: %s", what, why, exc_info=None if known else error)
            self._reset(stream)
        finally:
            self._at_work -= 1
            self._forget(stream)
            self._settle_quietly()

    def _reset(self, stream: _Stream) -> None:
        stream.gone = True
        stream.outgoing.clear()
        with suppress(ProtocolError):  # it has ended, or the connection has
            self._h2.reset_stream(stream.number, ErrorCodes.INTERNAL_ERROR)
        self._wake.set()

    def _settle_quietly(self) -> None:
        with suppress(ProtocolError):  # the receiver finds out at the next frame
            self._settle()

    async def _send_answer(self, stream: _Stream, answer: Answer) -> None:
        if stream.gone:
            return
        headers = [(":status", str(answer.status)), *answer.headers]
        if answer.content_type is not None:
            headers.append(("content-type", answer.content_type))
        length = answer.length
        if length is not None:
            headers.append(("content-length", str(length)))
        try:
            without_body = length == 0 or stream.method == "HEAD"
            self._h2.send_headers(stream.number, headers, end_stream=without_body)
        except (StreamClosedError, NoSuchStreamError, ProtocolError):
            return
        self._wake.set()
        if without_body:
            if answer.stream is not None:
                await answer.stream.aclose()
            return
        for part in answer.parts:
            await self._put(stream, part)
        if answer.stream is not None:
            async with aclosing(answer.stream) as pieces:
                async for part in pieces:
                    await self._put(stream, part)
                    if stream.gone:
                        return
        stream.complete = True
        self._queue.append(stream)
        self._wake.set()
        while not stream.gone and (stream.outgoing or stream.complete):
            stream.room = trio.Event()
            await stream.room.wait()

    async def _put(self, stream: _Stream, part: Buffer) -> None:
        view = memoryview(part).cast("B")
        if stream.gone or not len(view):
            return
        stream.outgoing.append(view)
        self._queue.append(stream)
        self._wake.set()
        while len(stream.outgoing) > 4 and not stream.gone:
            stream.room = trio.Event()
            await stream.room.wait()

    async def _send(self, connection: trio.CancelScope) -> None:
        while True:
            self._wake = trio.Event()
            while True:
                self._fill()
                parts = self._h2.parts_to_send()
                if not parts:
                    break
                await send_parts(self._stream, parts)
            if self._leaving and not self._streams:
                connection.cancel()
            await self._wake.wait()

    def _fill(self) -> None:
        """Hand h2 one frame of the streams that have something to send.

        A body goes whole before the next one. In turn, bodies asked for together would all end together, and with the
        next requests a client far away would wait for nothing for a round trip.
        """
        for _ in range(len(self._queue)):
            stream = self._queue.popleft()
            if stream.gone:
                continue
            try:
                if not stream.outgoing:
                    if stream.complete:
                        stream.complete = False
                        self._h2.end_stream(stream.number)
                        stream.room.set()
                        return
                    continue
                room = min(self._h2.local_flow_control_window(stream.number), self._h2.max_outbound_frame_size)
                if room <= 0:
                    self._queue.append(stream)
                    continue
                head = stream.outgoing[0]
                piece = head[: min(room, SENT_FRAME)]
                last = len(piece) == len(head)
                final = last and len(stream.outgoing) == 1 and stream.complete
                self._h2.send_body(stream.number, piece, end_stream=final)
            except (StreamClosedError, NoSuchStreamError, FlowControlError, ProtocolError):
                stream.gone = True
                stream.outgoing.clear()
                stream.room.set()
                continue
            if last:
                stream.outgoing.popleft()
            else:
                stream.outgoing[0] = head[len(piece) :]
            if final:
                stream.complete = False
            if not final and (stream.outgoing or stream.complete) and stream not in self._queue:
                self._queue.appendleft(stream)
            stream.room.set()
            return

    async def _say_goodbye(self) -> None:
        """Tell the client that it broke the protocol; the sender sends that."""
        with suppress(ProtocolError):
            self._h2.close_connection(ErrorCodes.PROTOCOL_ERROR)
        self._wake.set()
        await trio.sleep(_GOODBYE_S)


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
