"""The disk of another process as an export of nbdkit: a plugin for its Python, with nothing but the standard library.

Every request goes over a unix socket to Fleece, which has the disk, its keys and its cache; nbdkit has the protocol,
the clients and its filters. This file runs in the Python that nbdkit brings along, never in Fleece's own.

    request   kind (1 byte: r read, e extents), offset (8), length (8), big-endian
    answer    error number (4, 0 for none), length of what follows (4): data, or extents of offset (8), length (8),
              type (1: nbdkit's), or words about the error
"""

import os
import socket
import struct
from typing import Any, NoReturn

import nbdkit

API_VERSION = 2

_REQUEST = struct.Struct(">cQQ")
_ANSWER = struct.Struct(">II")
_EXTENT = struct.Struct(">QQI")
#: Bytes of an answer that is no data.
_MAX_ANSWER = 1 << 20

_settings: dict[str, str] = {}
#: Connections to Fleece that nobody uses at the moment.
_idle: list[socket.socket] = []


def config(key: str, value: str) -> None:
    """Take `socket=PATH` and `size=BYTES` from the command line."""
    _settings[key] = value


def thread_model() -> int:
    """Many requests at a time: each waits for a connection of its own."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def open(readonly: bool) -> int:
    """One handle serves all: there is no state."""
    return 1


def get_size(handle: Any) -> int:
    """Bytes of the disk."""
    return int(_settings["size"])


def can_multi_conn(handle: Any) -> bool:
    """Nothing is written, so all connections see the same."""
    return True


def can_write(handle: Any) -> bool:
    """Never."""
    return False


def can_extents(handle: Any) -> bool:
    """What is known to be zeros is told."""
    return True


def pread(handle: Any, buffer: Any, offset: int, flags: int) -> None:
    """Fill `buffer` from `offset` on."""
    _ask(b"r", offset, len(buffer), memoryview(buffer))


def extents(handle: Any, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """The range from `offset` on, at least its beginning, as offsets, lengths and types."""
    return list(_EXTENT.iter_unpack(_ask(b"e", offset, count, None)))


def _ask(kind: bytes, offset: int, length: int, into: "memoryview | None") -> bytes:
    connection = _take()
    try:
        connection.sendall(_REQUEST.pack(kind, offset, length))
        number, size = _ANSWER.unpack(_receive(connection, bytearray(_ANSWER.size)))
        if number:
            words = bytes(_receive(connection, bytearray(min(size, _MAX_ANSWER))))
            if size > _MAX_ANSWER:
                raise ConnectionError("an answer that makes no sense")
            error = OSError(number, words.decode("utf-8", "replace"))
            answer = b""
        elif into is not None and size == len(into):
            error, answer = None, b""
            _receive(connection, into)
        elif into is None and size <= _MAX_ANSWER:
            error, answer = None, bytes(_receive(connection, bytearray(size)))
        else:
            raise ConnectionError("an answer of another length than was asked for")
    except OSError:
        _hang_up()
    _idle.append(connection)
    if error is not None:
        nbdkit.set_error(number)
        raise error
    return answer


def _take() -> socket.socket:
    try:
        return _idle.pop()
    except IndexError:
        pass
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.fsencode(_settings["socket"]))
    except OSError:
        _hang_up()
    return connection


def _hang_up() -> NoReturn:
    """The process that has the disk has ended: so does this one, at once.

    An error in answer would be the client's last word on the matter; of a lost connection many know that it may come
    back.
    """
    os._exit(1)


def _receive(connection: socket.socket, into: Any) -> Any:
    view = memoryview(into)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the process that has the disk has ended")
        view = view[count:]
    return into
