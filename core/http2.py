"""h2 for bodies of megabytes: the same protocol, fewer copies.

h2 copies a body four times on its way out and four times on its way in, and writes every frame that comes out in hex,
for a log that is switched off. Some of its methods are replaced here, most of them private; tests compare the bytes
with those of h2 itself, so that a release that changes them is noticed.
"""

from typing import Any

from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, Event
from h2.exceptions import ProtocolError
from h2.frame_buffer import FrameBuffer
from h2.windows import WindowManager
from hpack import Encoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame

from core.buffers import Buffer

#: Bytes of a frame's head: length, type, flags, stream.
_HEAD = 9
_DATA = 0
_END_STREAM = 1
#: Bytes of a body that is worth memory of its own before it is there.
_LONG = 64 << 10
#: Bytes of a header block that comes in several frames; h2 counts those alone, and each may have a megabyte.
_MAX_HEADER_BLOCK = 256 << 10
#: Bytes of headers that are remembered for the other side: it may allow gigabytes, which are searched for every answer.
_MAX_TABLE = 4096
#: Bytes for which the other side gets new credit together, on the connection as a whole.
_CREDIT_STEP = 1 << 20


class _Body:
    """A piece of a body that h2 takes for bytes, and does not copy."""

    __slots__ = ("view",)

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def __len__(self) -> int:
        return len(self.view)


class _BulkBuffer(FrameBuffer):
    """What came and is not taken apart yet. The rest of a long body comes straight to where it stays."""

    def __init__(self, server: bool = False) -> None:
        super().__init__(server)
        self._open: DataFrame | None = None  #: its body is coming
        self._body = bytearray()
        self._filled = 0
        self._block = 0  #: bytes of the header block that is coming

    def place(self) -> memoryview | None:
        """Memory for what comes next; None if that is not known."""
        return None if self._open is None else memoryview(self._body)[self._filled :]

    def filled(self, count: int) -> None:
        """The first `count` bytes of `place` have come."""
        self._filled += count

    def add_data(self, data: Any) -> None:
        """See h2."""
        place = self.place()
        if place is None:
            super().add_data(data)
            return
        with memoryview(data).cast("B") as view, place:
            count = min(len(view), len(place))
            place[:count] = view[:count]
            self._filled += count
            self._data += view[count:]

    def __next__(self) -> Frame:
        if self._open is not None:
            if self._filled < len(self._body):
                raise StopIteration
            whole: Any = self._open
            whole.data = self._body
            self._open, self._body = None, bytearray()
            return whole  # type: ignore[no-any-return]
        data = self._data
        # Type, and no flag but that of the end: padding, and anything that is wrong, is for h2.
        if len(data) >= _HEAD and data[3] == _DATA and data[4] | _END_STREAM == _END_STREAM:
            length = int.from_bytes(data[:3], "big")
            number = int.from_bytes(data[5:_HEAD], "big") & 0x7FFF_FFFF
            if number and length <= self.max_frame_size and not self._headers_buffer:
                end = _HEAD + length
                there = len(data) >= end
                if not there and length < _LONG:
                    raise StopIteration
                frame = DataFrame(number)
                frame.body_len = length
                if data[4]:
                    frame.flags.add("END_STREAM")
                with memoryview(data) as view, view[_HEAD:end] as body:
                    if there:
                        frame.data = bytes(body)
                    else:
                        self._open, self._body, self._filled = frame, bytearray(length), len(body)
                        self._body[: len(body)] = body
                del data[:end]
                if not there:
                    raise StopIteration
                return frame
        return super().__next__()

    def _update_header_buffer(self, f: Frame | None) -> Frame | None:
        whole = super()._update_header_buffer(f)
        self._block = self._block + (0 if f is None else f.body_len) if self._headers_buffer else 0
        if self._block > _MAX_HEADER_BLOCK:
            raise ProtocolError(f"a header block of more than {_MAX_HEADER_BLOCK} bytes")
        return whole


class _Credit(WindowManager):
    """h2 waits until half a window is used, and a sender far away then stands still until the news has come."""

    def process_bytes(self, size: int) -> int | None:
        """See h2."""
        increment = super().process_bytes(size)
        if not increment and self._bytes_processed >= _CREDIT_STEP:
            increment = min(self._bytes_processed, self.max_window_size - self.current_window_size)
            self._bytes_processed = 0
            self.current_window_size += increment
        return increment


class _SmallEncoder(Encoder):
    """Remembers little, whatever the other side allows."""

    @property
    def header_table_size(self) -> int:
        """See hpack."""
        return self.header_table.maxsize

    @header_table_size.setter
    def header_table_size(self, value: int) -> None:
        value = min(value, _MAX_TABLE)
        if value != self.header_table.maxsize:
            self.header_table.maxsize = value
            # Of changes between two header blocks the smallest and the last one count (RFC 7541, 4.2).
            smallest = min([*self.table_size_changes, value])
            self.table_size_changes = [value] if smallest == value else [smallest, value]


class BulkConnection(H2Connection):
    """As `h2.connection.H2Connection`, but a GOAWAY without an error ends nothing by itself.

    Whoever sends one makes no further requests, and still gets the answers to those that it has made.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.encoder = _SmallEncoder()
        self.incoming_buffer = self._bulk = _BulkBuffer(server=not self.config.client_side)
        self._parts: list[Buffer] = []  #: to be sent before what h2 keeps
        window = self._inbound_flow_control_window_manager.max_window_size
        self._inbound_flow_control_window_manager = _Credit(window)

    def place(self) -> memoryview | None:
        """Where the bytes that come next shall go, all of which belong to one long body; None: to `receive_data`."""
        return self._bulk.place()

    def filled(self, count: int) -> None:
        """The first `count` bytes of `place` have come; `receive_data`, of nothing more if need be, looks at them."""
        self._bulk.filled(count)

    def send_body(self, stream_id: int, data: Buffer, end_stream: bool = False) -> None:
        """As `send_data`, but `data` are not copied: they must not change until what `parts_to_send` gave is sent.

        Raises:
            h2.exceptions.ProtocolError: as `send_data`.
        """
        body: Any = _Body(memoryview(data).cast("B"))
        self.send_data(stream_id, body, end_stream)

    def parts_to_send(self) -> list[Buffer]:
        """Everything that is to be sent, in order, without a copy."""
        parts, self._parts = self._parts, []
        if self._data_to_send:
            parts.append(self._data_to_send)
            self._data_to_send = bytearray()
        return parts

    def data_to_send(self, amount: int | None = None) -> bytes:
        """See h2."""
        if self._parts:
            self._data_to_send = bytearray().join(self.parts_to_send())
        return super().data_to_send(amount)

    def _prepare_for_sending(self, frames: list[Frame]) -> None:
        if len(frames) == 1 and isinstance(frames[0], DataFrame) and isinstance(frames[0].data, _Body):
            frame, body = frames[0], frames[0].data.view
            frame.data = b""
            self._data_to_send += len(body).to_bytes(3, "big") + frame.serialize()[3:]
            self._parts += self._data_to_send, body
            self._data_to_send = bytearray()
        else:
            super()._prepare_for_sending(frames)

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        if frame.error_code != ErrorCodes.NO_ERROR or self.config.client_side:
            return super()._receive_goaway_frame(frame)
        event = ConnectionTerminated()
        event.error_code = ErrorCodes.NO_ERROR
        event.last_stream_id = frame.last_stream_id
        return [], [event]

    def _receive_frame(self, frame: Frame) -> list[Event]:
        if isinstance(frame, DataFrame):
            shown: Any = frame
            shown._body_repr = str  # instead of the whole payload in hex
        return super()._receive_frame(frame)
