"""What goes over the line is what h2 itself would send and take."""

import os
from collections.abc import Callable

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, StreamEnded
from h2.exceptions import FrameTooLargeError, ProtocolError
from hyperframe.frame import DataFrame

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
