"""A datastore of one table: streams are cut into chunks as in a real backup, kept in memory, and read back."""

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from struct import Struct
from typing import Final

from core.buffers import Buffer
from datastore.chunker import ARCHIVE_AVERAGE, Cutter
from pxar.sinks import ReusedChunk

#: Writes up to this many bytes in all are looked at together: docs/formats.md, "Chunker".
GATHERED: Final = 256 << 10
_END: Final = Struct("<Q")


class StoredStream:
    """The index of a stream; implements `pxar.sinks.ChunkTable` and, over its chunks, `ReferenceBytes`."""

    def __init__(self, chunks: dict[bytes, bytes], entries: Sequence[tuple[bytes, int]]) -> None:
        self._chunks = chunks
        self.entries: Final = list(entries)  #: digest, size
        self.ends: Final[list[int]] = []
        end = 0
        for _, size in entries:
            end += size
            self.ends.append(end)

    @property
    def size(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def count(self) -> int:
        return len(self.entries)

    @property
    def csum(self) -> str:
        hasher = hashlib.sha256()
        for (digest, _), end in zip(self.entries, self.ends, strict=True):
            hasher.update(_END.pack(end) + digest)
        return hasher.hexdigest()

    def digest(self, number: int) -> bytes:
        return self.entries[number][0]

    def span(self, number: int) -> tuple[int, int]:
        size = self.entries[number][1]
        return self.ends[number] - size, size

    def find(self, offset: int) -> int:
        if not 0 <= offset < self.size:
            raise ValueError(f"{offset} in a stream of {self.size} bytes")
        return bisect_right(self.ends, offset)

    def read(self, offset: int, length: int) -> Buffer:
        parts = []
        while length > 0 and offset < self.size:
            number = self.find(offset)
            start, _ = self.span(number)
            part = memoryview(self._chunks[self.digest(number)])[offset - start : offset - start + length]
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def content(self) -> bytes:
        """All of it."""
        return b"".join(self._chunks[digest] for digest, _ in self.entries)


class RecordedStream:
    """A sink that cuts what comes and puts the chunks into `chunks`; `known` is the index of the previous backup."""

    def __init__(
        self, chunks: dict[bytes, bytes], average: int = ARCHIVE_AVERAGE, known: StoredStream | None = None
    ) -> None:
        self._chunks = chunks
        self._known = {digest for digest, _ in known.entries} if known is not None else set()
        self._cutter = Cutter(average)
        self._open = bytearray()
        self._gathered = bytearray()
        self._large: Buffer = b""  # waits for the next write: a suggestion may come that lies at its end
        self._room = bytearray()
        self._injections: deque[Sequence[ReusedChunk]] = deque()
        self._entries: list[tuple[bytes, int]] = []
        self._position = 0
        self.suggested: list[int] = []
        self.injected: list[tuple[int, ReusedChunk]] = []  #: position, chunk
        self.uploaded = 0  #: bytes of chunks that the previous index does not have

    @property
    def position(self) -> int:
        return self._position

    def write(self, data: Buffer) -> None:
        self._append(data)

    def reserve(self, size: int) -> memoryview:
        assert 0 < size <= 4 << 20
        self._room = bytearray(b"\xa5" * size)
        return memoryview(self._room)

    def commit(self, size: int) -> None:
        self._append(memoryview(self._room)[:size])

    def suggest(self) -> None:
        self.suggested.append(self._position)
        self._cutter.suggest(self._position)

    def inject(self, chunks: Sequence[ReusedChunk]) -> None:
        assert 0 < len(chunks) <= 128
        self._cutter.inject(self._position, sum(chunk.size for chunk in chunks))
        self._injections.append(list(chunks))
        for chunk in chunks:
            assert len(self._chunks[chunk.digest]) == chunk.size
            self.injected.append((self._position, chunk))
            self._position += chunk.size

    def finish(self) -> StoredStream:
        """The stream ends here."""
        self._flush()
        self._follow(self._cutter.finish(), b"")
        self._emit()
        stored = StoredStream(self._chunks, self._entries)
        assert stored.size == self._position
        return stored

    def _append(self, data: Buffer) -> None:
        size = len(data)
        if len(self._large) or len(self._gathered) + size > GATHERED:
            self._flush()
        self._position += size
        if size >= GATHERED:
            self._large = bytes(data)
        else:
            self._gathered += data

    def _flush(self) -> None:
        gathered, large = self._gathered, self._large
        self._gathered, self._large = bytearray(), b""
        for block in (gathered, large):
            if len(block):
                self._feed(block)

    def _feed(self, block: Buffer) -> None:
        self._follow(self._cutter.feed(block), block)

    def _follow(self, events: Sequence[int], block: Buffer) -> None:
        view, start = memoryview(block), 0
        for event in events:
            self._open += view[start : start + event]
            start += event
            self._emit()
            if not event:
                self._entries += self._injections.popleft()
        self._open += view[start:]

    def _emit(self) -> None:
        if not self._open:
            return
        chunk, self._open = bytes(self._open), bytearray()
        digest = hashlib.sha256(chunk).digest()
        self._chunks[digest] = chunk
        self._entries.append((digest, len(chunk)))
        if digest not in self._known:
            self.uploaded += len(chunk)
