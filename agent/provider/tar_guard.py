"""Stands between a session and the reader of its tar stream, and outlives the session: a program of its own.

    python tar_guard.py PIPE DESCRIPTOR      the stream on standard input

From DESCRIPTOR comes `1` when the stream was whole, or `0` if no reader is to be waited for any more.

Many readers take a tar stream that just ends for a whole archive, if it ends between two entries. So a stream that is
not called whole is not left at such a place: whoever reads it fails, also if the session was killed. Standard output
gets one byte when somebody reads. Needs nothing but the standard library; the streams are those of `pxar.tar_stream`.
"""

import fcntl
import os
import select
import sys
import time
from contextlib import suppress
from typing import Final

#: Seconds for which a reader is waited for, and for what it must still take, when the session is gone.
PATIENCE_S: Final = 60
_LOOK_S: Final = 0.05
_BLOCK: Final = 512
_PIECE: Final = 1 << 20
#: Bytes of the end of an archive: two blocks, and what fills up a record.
_MAX_END: Final = 22 * _BLOCK
#: No header of an entry, and no end of an archive.
NONSENSE: Final = b"\xff" * (20 * _BLOCK)


class TarStream:
    """Where in a tar stream one is."""

    def __init__(self) -> None:
        self._header = bytearray()  #: of the entry that has begun
        self._left = 0  #: bytes of the entry's content that are to come, with what fills up its last block
        self._records: bytearray | None = None  #: the content, if that is about the next entry
        self._size: int | None = None  #: of the next entry, if its records say so
        self._end: bytearray | None = None  #: what has come of the archive's end

    def take(self, data: bytes) -> bytes:
        """Go on by `data`; returns what of it may be handed on: the end of the archive not yet.

        Raises:
            ValueError: it is no such stream.
        """
        position = 0
        while position < len(data):
            if self._end is not None:
                self._hold(data[position:])
                break
            if self._left:
                count = min(self._left, len(data) - position)
                if self._records is not None:
                    self._records += data[position : position + count]
                self._left -= count
                position += count
                if not self._left and self._records is not None:
                    self._size, self._records = _size_in(bytes(self._records)), None
                continue
            begun = len(self._header)
            self._header += data[position : position + _BLOCK - begun]
            position += len(self._header) - begun
            if len(self._header) == _BLOCK:
                if not any(self._header):
                    # Its first part may have been handed on: zeros, from which nothing can be told.
                    self._end = bytearray(_BLOCK - begun)
                    end = position - (_BLOCK - begun)
                    self._header.clear()
                    self._hold(data[position:])
                    return data[:end]
                self._begin(bytes(self._header))
                self._header.clear()
        return data[:position]

    def _hold(self, data: bytes) -> None:
        assert self._end is not None
        if len(self._end) + len(data) > _MAX_END or any(data):
            raise ValueError("what comes behind the end is not its rest")
        self._end += data

    def _begin(self, block: bytes) -> None:
        digits = block[124:136].rstrip(b"\0 ")
        if not digits.isdigit():
            raise ValueError("an entry has no size")
        size, kind = int(digits, 8), block[156:157]
        if kind == b"x":
            self._records = bytearray()
        else:
            size = (size if self._size is None else self._size) if kind == b"0" else 0
            self._size = None
        self._left = -(-size // _BLOCK) * _BLOCK

    @property
    def end(self) -> bytes:
        """The end of the archive that was held back."""
        return bytes(self._end or b"")

    def nonsense(self) -> bytes:
        """What makes the reader fail if it comes now, and then the end."""
        if self._end is not None:
            return NONSENSE
        if self._left > _BLOCK:
            return b""  # the end alone, within content
        return b"\xff" * ((_BLOCK - len(self._header)) % _BLOCK if self._header else self._left) + NONSENSE


def _size_in(records: bytes) -> int | None:
    """What pax records say of the size of the entry that follows."""
    found = None
    while records:
        length, _, _ = records.partition(b" ")
        record, records = records[: int(length)], records[int(length) :].lstrip(b"\0")
        keyword, _, value = record.partition(b" ")[2].partition(b"=")
        if keyword == b"size":
            found = int(value)
    return found


def main(pipe: str, control: int) -> int:
    """Hand on what comes; 0 if it was whole, and was taken."""
    reader = _opened(pipe, control)
    stream, whole = TarStream(), False
    try:
        if reader is not None:
            for end in (0, reader):
                with suppress(OSError):
                    fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIECE)
            with suppress(OSError):  # the session may be gone
                os.write(1, b"r")
            rest = b""
            while data := os.read(0, _PIECE):
                # Whole blocks only: GNU tar gives up a pipe from which it reads a part of one.
                ready = rest + stream.take(data)
                count = len(ready) // _BLOCK * _BLOCK
                _write(reader, ready[:count])
                rest = ready[count:]
            whole = os.read(control, 1) == b"1"
            _write(reader, rest + (stream.end if whole else stream.nonsense()), None if whole else PATIENCE_S)
    except ValueError:
        assert reader is not None
        _write(reader, NONSENSE, PATIENCE_S)
    except BrokenPipeError:
        whole = False
    finally:
        if not whole:
            with suppress(OSError):
                os.unlink(pipe)  # noqa: PTH108 - what imports little starts soon
                os.rmdir(os.path.dirname(pipe))  # noqa: PTH106, PTH120
    return 0 if whole else 1


def _opened(pipe: str, control: int) -> int | None:
    """The pipe, as soon as somebody reads; None if nobody comes and the session is gone, or wants to wait no longer."""
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        with suppress(OSError):
            reader = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(reader, True)
            return reader
        if deadline is None and select.select([control], [], [], _LOOK_S)[0]:
            if os.read(control, 1):
                return None
            deadline = time.monotonic() + PATIENCE_S
        elif deadline is not None:
            time.sleep(_LOOK_S)
    return None


def _write(reader: int, data: bytes, limit_s: float | None = None) -> None:
    """Write all of it, for at most `limit_s`."""
    deadline = None if limit_s is None else time.monotonic() + limit_s
    if deadline is not None:
        os.set_blocking(reader, False)
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(reader, view) :]
        except BlockingIOError:
            if deadline is None or time.monotonic() > deadline:
                return
            select.select([], [reader], [], 1.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
