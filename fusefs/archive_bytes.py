"""The streams of a file archive, read from the event loop: what the chunk cache lacks is fetched, then asked for again.

What walks through an archive (`pxar`) is synchronous. Here it runs in the event loop itself, on what the cache has; a
chunk that is missing stops it with `NeedChunk`, the loop goes on with other requests while the chunk is fetched, and
the question is put again. That costs nothing where the chunk is there, which it nearly always is, and no thread.
"""

from collections.abc import Callable
from typing import Final, TypeVar

from core.buffers import Buffer
from core.errors import FormatError
from fusefs.kernel import give_back_memory
from repository.archive import ArchiveReader

T = TypeVar("T")

#: Most bytes that one question may need at a time: the table of a folder with five million entries. Forged archives
#: can ask for more than there is memory.
MAX_AT_ONCE: Final = 128 << 20


#: Bytes of chunks that have passed since memory was given back, and after how many that is done again.
_passed = 0
_GIVE_BACK_AFTER: Final = 64 << 20


class NotAtHand(Exception):  # noqa: N818 - not a fault: the caller asks in another way
    """A question cannot be answered without waiting."""


class NeedChunk(NotAtHand):
    """A chunk is not in the cache: the caller fetches it and asks again."""

    def __init__(self, stream: "ChunkBytes", number: int) -> None:
        super().__init__(number)
        self.stream, self.number = stream, number


class ChunkBytes:
    """A stored stream whose bytes come from the chunk cache; it has the shape of `pxar.sinks.ReferenceBytes`.

    The chunk used last is held beside the cache, until `drop`.
    """

    def __init__(self, reader: ArchiveReader) -> None:
        self.size: Final = reader.size  #: bytes
        self.reader: Final = reader
        #: Chunks that a question has caused to be fetched and that the cache may have dropped since.
        self.fetched: dict[int, Buffer] = {}
        self.unreadable = -1  #: number of the chunk that could not be read last
        self._view = memoryview(b"")
        self._start = self._end = 0

    def window(self, offset: int) -> tuple[Buffer, int, int]:
        """The chunk that holds byte `offset`, where it begins and where it ends.

        Raises:
            NeedChunk: it is not at hand.
            FormatError: it has another length than the index says.
        """
        if not self._start <= offset < self._end:
            index = self.reader.archive.index
            number = index.find(offset)
            start, size = index.span(number)
            chunk = self.fetched.get(number)
            if chunk is None:
                # It also notes where this reader is, and reads on.
                chunk = self.reader.read_cached(start, size)
                if chunk is None:
                    raise NeedChunk(self, number)
            account(size)
            self._start, self._end, self._view = start, start + size, memoryview(chunk).cast("B")
        return self._view, self._start, self._end

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes from `offset` on: `length` of them, or fewer at the end of the stream; a view where that saves a copy.

        Raises:
            NeedChunk: a chunk of this range is not at hand.
            FormatError: more than `MAX_AT_ONCE`, or as `window`.
        """
        if self._start <= offset and offset + length <= self._end:
            return self._view[offset - self._start : offset - self._start + length]
        if length > MAX_AT_ONCE:
            raise _too_much(self.reader)
        pieces: list[Buffer] = []
        end = min(offset + length, self.size)
        while offset < end:
            view, start, _ = self.window(offset)
            piece = memoryview(view)[offset - start : end - start]
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def drop(self) -> None:
        """Hold no chunk."""
        self._start = self._end = 0
        self._view = memoryview(b"")


async def settle(question: Callable[[], T], *streams: ChunkBytes) -> T:
    """The answer to `question`, which reads `streams`; chunks that it needs are fetched.

    Raises:
        FormatError: it needs more than `MAX_AT_ONCE` bytes at a time.
        FleeceError: what `question` raises, or a chunk cannot be read.
    """
    fetched: dict[ChunkBytes, dict[int, Buffer]] = {stream: {} for stream in streams}
    total = 0
    while True:
        for stream, chunks in fetched.items():
            stream.fetched = chunks
        try:
            return question()
        except NeedChunk as need:
            stream, number = need.stream, need.number
        finally:
            for one in fetched:
                one.fetched = {}
        stream.unreadable = number
        chunk = await stream.reader.chunk(number)
        stream.unreadable = -1
        total += len(chunk)
        if total > 2 * MAX_AT_ONCE:
            raise _too_much(stream.reader)
        fetched[stream][number] = chunk


def account(size: int) -> None:
    """Note that a chunk of `size` bytes is used: now and then memory is given back."""
    global _passed
    _passed += size
    if _passed > _GIVE_BACK_AFTER:
        _passed = 0
        give_back_memory()


def _too_much(reader: ArchiveReader) -> FormatError:
    return FormatError("read archive", reader.archive.where, f"more than {MAX_AT_ONCE} bytes would be needed at once")
