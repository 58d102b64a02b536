"""What goes over the line is what h2 itself would send and take."""

import os
from collections.abc import Callable

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, PingReceived, ResponseReceived, StreamEnded
from h2.exceptions import FrameTooLargeError, ProtocolError
from h2.settings import SettingCodes
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, SettingsFrame

from core import http2
from core.http2 import BulkConnection

BODY = os.urandom(100_000)
Make = Callable[[H2Configuration], H2Connection]


def exchanged(make: Make, *, padded: bool = False) -> tuple[bytes, bytes, list[Event]]:
    """Everything that client and server send, and what the server is told."""
    client = make(H2Configuration(client_side=True, header_encoding="utf-8"))
    server = make(H2Configuration(client_side=False, header_encoding="utf-8"))
    client.initiate_connection()
    server.initiate_connection()
    sent = [bytes(client.data_to_send())]
    events = server.receive_data(sent[0])
    answers = [bytes(server.data_to_send())]
    client.receive_data(answers[0])
    client.send_headers(1, [(":method", "POST"), (":scheme", "https"), (":authority", "x"), (":path", "/")])
    for start in range(0, 60_000, 15_000):
        piece = memoryview(BODY)[start : start + 15_000]
        client.send_data(1, piece, end_stream=start == 45_000, pad_length=7 if padded else None)
        client.ping(b"12345678")
        sent.append(bytes(client.data_to_send()))
        for event in server.receive_data(sent[-1]):
            events.append(event)
            if isinstance(event, DataReceived):
                server.acknowledge_received_data(event.flow_controlled_length, 1)
    answers.append(bytes(server.data_to_send()))
    return b"".join(sent), b"".join(answers), events


@pytest.mark.parametrize("padded", [False, True])
def test_both_sides_send_the_bytes_of_h2_and_understand_the_same(padded: bool) -> None:
    ours, theirs = (exchanged(make, padded=padded) for make in (BulkConnection, H2Connection))
    assert ours[:2] == theirs[:2]
    assert [type(event) for event in ours[2]] == [type(event) for event in theirs[2]]
    body = b"".join(event.data or b"" for event in ours[2] if isinstance(event, DataReceived))
    assert body == BODY[:60_000]
    assert isinstance(ours[2][-2], StreamEnded) or isinstance(ours[2][-1], StreamEnded)


def test_bodies_are_not_written_out_in_hex(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(frame: DataFrame) -> str:
        raise AssertionError("a payload was written out")

    monkeypatch.setattr(DataFrame, "_body_repr", refuse)
    exchanged(BulkConnection)
    with pytest.raises(AssertionError):
        exchanged(H2Connection)  # when this passes, h2 does not do it any more


def test_the_windows_and_frame_sizes_of_the_other_side_are_kept_to() -> None:
    client = BulkConnection(H2Configuration(client_side=True))
    client.initiate_connection()
    client.send_headers(1, [(":method", "POST"), (":scheme", "https"), (":authority", "x"), (":path", "/")])
    with pytest.raises(FrameTooLargeError):
        client.send_data(1, BODY[:20_000])
    for _ in range(4):
        client.send_data(1, BODY[:16_000])
    with pytest.raises(ProtocolError):
        client.send_data(1, BODY[:16_000])
    assert len(client.data_to_send(24)) == 24
    assert client.data_to_send()
    assert client.data_to_send() == b""


def frames(*, end: bool = True) -> bytes:
    """A client's beginning, a request with a body in three frames, one of them padded, and a ping between."""
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    client.send_headers(1, [(":method", "POST"), (":scheme", "https"), (":authority", "x"), (":path", "/")])
    client.send_data(1, BODY[:9_000])
    client.send_data(1, BODY[9_000:9_500], pad_length=31)
    client.ping(b"12345678")
    client.send_data(1, b"")
    client.send_data(1, BODY[9_500:12_000], end_stream=end)
    return bytes(client.data_to_send())


def told(make: Make, data: bytes, step: int) -> tuple[list[str], bytes, bytes]:
    """What a server makes of `data` that come in pieces: its events, the body, what it sends."""
    server = make(H2Configuration(client_side=False))
    server.initiate_connection()
    events: list[Event] = []
    try:
        for start in range(0, len(data), step):
            events += server.receive_data(data[start : start + step])
    except ProtocolError as error:
        return [*map(str, events), repr(error)], b"", bytes(server.data_to_send())
    body = b"".join(event.data or b"" for event in events if isinstance(event, DataReceived))
    return [*map(str, events)], body, bytes(server.data_to_send())


@pytest.mark.parametrize("step", [1, 8, 9, 10, 9_008, 9_009, 9_010, 1 << 20])
def test_what_comes_in_pieces_is_understood_as_h2_does(step: int) -> None:
    ours, theirs = (told(make, frames(), step) for make in (BulkConnection, H2Connection))
    assert ours == theirs
    assert ours[1] == BODY[:12_000]


@pytest.mark.parametrize(
    "wrong",
    [
        (16_385).to_bytes(3, "big") + b"\0\0" + (1).to_bytes(4, "big"),  # larger than allowed
        (3).to_bytes(3, "big") + b"\0\0" + bytes(4),  # of no stream
        (3).to_bytes(3, "big") + b"\0\0" + (5).to_bytes(4, "big"),  # of a stream that is not there
        (3).to_bytes(3, "big") + b"\0\x08" + (1).to_bytes(4, "big") + b"\7ab",  # more padding than frame
        (3).to_bytes(3, "big") + b"\0\xf6" + (1).to_bytes(4, "big") + b"abc",  # flags that mean nothing
        (3).to_bytes(3, "big") + b"\0\x01" + (1 << 31 | 1).to_bytes(4, "big") + b"abc",  # a reserved bit
        (2).to_bytes(3, "big") + b"\1\0" + (3).to_bytes(4, "big") + b"\x82\x84"  # in the middle of headers
        + (3).to_bytes(3, "big") + b"\0\0" + (1).to_bytes(4, "big") + b"abc",
    ],
)  # fmt: skip
@pytest.mark.parametrize("step", [7, 1 << 20])
def test_what_is_odd_about_a_frame_is_odd_for_both(wrong: bytes, step: int) -> None:
    data = frames(end=False) + wrong + bytes(20_000)
    assert told(BulkConnection, data, step) == told(H2Connection, data, step)


def test_bodies_go_out_in_order_and_are_not_copied() -> None:
    ours, theirs = (make(H2Configuration(client_side=True)) for make in (BulkConnection, H2Connection))
    body = bytearray(BODY[:5_000])
    parts: list[bytes] = []
    for client in (ours, theirs):
        client.initiate_connection()
        client.send_headers(1, [(":method", "POST"), (":scheme", "https"), (":authority", "x"), (":path", "/")])
        client.ping(b"12345678")
    assert isinstance(ours, BulkConnection)
    for number in range(3):
        ours.send_body(1, memoryview(body), end_stream=number == 2)
        theirs.send_data(1, bytes(body), end_stream=number == 2)
        for client in (ours, theirs):
            client.ping(b"abcdefgh")
        if number == 1:
            parts += map(bytes, ours.parts_to_send())
    views = ours.parts_to_send()
    body[0] ^= 1
    changed = b"".join([*parts, *views])
    body[0] ^= 1
    assert b"".join([*parts, *views]) == theirs.data_to_send()
    assert changed != b"".join([*parts, *views])
    assert ours.parts_to_send() == []


def test_bodies_are_in_what_h2_itself_gives_out() -> None:
    ours, theirs = (make(H2Configuration(client_side=True)) for make in (BulkConnection, H2Connection))
    for client in (ours, theirs):
        client.initiate_connection()
        client.send_headers(1, [(":method", "POST"), (":scheme", "https"), (":authority", "x"), (":path", "/")])
    assert isinstance(ours, BulkConnection)
    ours.send_body(1, BODY[:9_000])
    theirs.send_data(1, BODY[:9_000])
    expected = bytes(theirs.data_to_send())
    assert ours.data_to_send(100) == expected[:100]
    ours.send_body(1, BODY[:9_000])
    theirs.send_data(1, BODY[:9_000])
    assert ours.data_to_send() == expected[100:] + theirs.data_to_send()


@pytest.mark.parametrize("step", [1 << 10, 50_000, 1 << 20])
@pytest.mark.parametrize("in_place", [False, True])
def test_long_bodies_come_to_where_they_stay(step: int, in_place: bool) -> None:
    body = os.urandom(1_000_000)
    client, server = (BulkConnection(H2Configuration(client_side=side)) for side in (True, False))
    for one in (client, server):
        one.initiate_connection()
        one.update_settings({SettingCodes.MAX_FRAME_SIZE: 1 << 18, SettingCodes.INITIAL_WINDOW_SIZE: 1 << 24})
        one.increment_flow_control_window(1 << 24)
    events = server.receive_data(client.data_to_send())
    client.receive_data(server.data_to_send())
    server.receive_data(client.data_to_send())
    client.send_headers(1, [(":method", "POST"), (":scheme", "https"), (":authority", "x"), (":path", "/")])
    for start in range(0, len(body), 1 << 18):
        client.send_data(1, body[start : start + (1 << 18)], end_stream=start + (1 << 18) > len(body))
        client.ping(b"12345678")
    sent = client.data_to_send()
    placed = 0
    while sent:
        if in_place and (place := server.place()) is not None:
            with place:
                count = min(step, len(place), len(sent))
                place[:count] = sent[:count]
            server.filled(count)
            events += server.receive_data(b"")
            placed += count
        else:
            count = step
            events += server.receive_data(sent[:count])
        sent = sent[count:]
    assert server.place() is None
    assert b"".join(event.data or b"" for event in events if isinstance(event, DataReceived)) == body
    assert [type(event) for event in events if isinstance(event, DataReceived | PingReceived | StreamEnded)] == [
        *[DataReceived, PingReceived] * 3, DataReceived, StreamEnded, PingReceived,
    ]  # fmt: skip
    assert (placed > 0) is (in_place and step < len(body))


def test_credit_comes_back_long_before_half_a_window_is_used() -> None:
    """A sender at the other end of a long line stands still otherwise, with half of the window unused."""
    client, server = (BulkConnection(H2Configuration(client_side=side)) for side in (True, False))
    client.initiate_connection()
    server.initiate_connection()
    window = 32 << 20
    server.increment_flow_control_window(window - 65535)
    client.receive_data(server.data_to_send())
    server.receive_data(client.data_to_send())
    assert client.outbound_flow_control_window == window
    sent = 0
    for number in range(1, 2 * 70, 2):
        client.send_headers(number, [(":method", "POST"), (":scheme", "https"), (":authority", "x"), (":path", "/")])
        for _ in range(3):
            client.send_data(number, BODY[:16_000])
            sent += 16_000
        for event in server.receive_data(client.data_to_send()):
            if isinstance(event, DataReceived):
                server.acknowledge_received_data(event.flow_controlled_length, number)
        client.receive_data(server.data_to_send())
        assert window - client.outbound_flow_control_window <= 1 << 20
    assert sent > 2 << 20


def test_a_header_block_in_many_frames_is_bounded() -> None:
    server = BulkConnection(H2Configuration(client_side=False))
    server.initiate_connection()
    server.max_inbound_frame_size = 1 << 20
    piece = bytes(64 << 10)
    start = HeadersFrame(1, data=piece)
    start.flags.clear()
    server.receive_data(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize() + start.serialize())
    for _ in range(3):
        server.receive_data(ContinuationFrame(1, data=piece).serialize())
    with pytest.raises(ProtocolError, match="header block of more than 262144 bytes"):
        server.receive_data(ContinuationFrame(1, data=b"0").serialize())


def test_blocks_in_several_frames_one_after_the_other_are_no_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "_MAX_HEADER_BLOCK", 40_000)
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    server = BulkConnection(H2Configuration(client_side=False))
    server.initiate_connection()
    server.receive_data(client.data_to_send())
    headers = [(":method", "GET"), (":scheme", "https"), (":authority", "x"), (":path", "/")]
    for number in range(1, 7, 2):
        client.send_headers(number, [*headers, ("x", os.urandom(10_000).hex())], end_stream=True)
        server.decoder.max_header_list_size = 1 << 20
        assert any(isinstance(event, StreamEnded) for event in server.receive_data(client.data_to_send()))


def test_few_headers_are_remembered_whatever_the_other_side_allows() -> None:
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    server = BulkConnection(H2Configuration(client_side=False))
    server.initiate_connection()
    server.receive_data(client.data_to_send())
    client.receive_data(server.data_to_send())
    for size in (0xFFFF_FFFF, 100, 4096, 2000, 0xFFFF_FFFF) * 100:
        client.update_settings({SettingCodes.HEADER_TABLE_SIZE: size})
        server.receive_data(client.data_to_send())
        client.receive_data(server.data_to_send())
    assert server.encoder.table_size_changes == [100, 4096]
    for number in range(1, 1001, 2):
        pseudo = [(":method", "GET"), (":scheme", "https"), (":authority", "x"), (":path", "/")]
        client.send_headers(number, pseudo, end_stream=True)
        server.receive_data(client.data_to_send())
        server.send_headers(number, [(":status", "200"), ("content-length", str(number))], end_stream=True)
        events = client.receive_data(server.data_to_send())
        headers = next(event.headers for event in events if isinstance(event, ResponseReceived))
        assert dict(headers or [])[b"content-length"] == str(number).encode()
    assert len(server.encoder.header_table.dynamic_entries) < 100
