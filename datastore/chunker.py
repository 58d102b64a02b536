"""Where a stream is cut into chunks: docs/formats.md, "Chunker".

`Chunker` cuts by content, so that data which moved inside a stream still makes the same chunks. `Cutter` adds what the
file archive knows: good places for a chunk to end, and chunks of an older stream that are put in between as they are.
"""

from collections import deque
from typing import Final

from core.buffers import Buffer
from core.errors import FleeceError
from datastore.buzhash import WINDOW, Finder, finder

#: Bytes of an average chunk of archives and payloads, and of catalogs.
ARCHIVE_AVERAGE: Final = 4 << 20
CATALOG_AVERAGE: Final = 512 << 10
#: The smallest chunk of a smaller average would fit into the hash's window.
_MIN_AVERAGE: Final = 1 << 10


class Chunker:
    """Finds cuts by the rolling hash; how the stream is split into calls makes no difference.

    A chunk has at least a quarter of the average and at most four times as much.
    """

    def __init__(self, average: int = ARCHIVE_AVERAGE, *, find: Finder | None = None) -> None:
        """A chunker for chunks of `average` bytes, a power of two from 1 KiB to 4 MiB; `find` is for tests.

        Raises:
            ValueError: another average.
            UsageError: `FLEECE_BUZHASH` names something that this machine does not have.
        """
        if not _MIN_AVERAGE <= average <= ARCHIVE_AVERAGE or average & (average - 1):
            raise ValueError(f"chunks of {average} bytes: the average is a power of two from 1 KiB to 4 MiB")
        self.average: Final = average
        self.minimum: Final = average // 4
        self.maximum: Final = average * 4
        self._bits: Final = average.bit_length()
        self._find: Final = finder() if find is None else find
        self._length = 0
        self._tail = b""

    @property
    def length(self) -> int:
        """Bytes of the open chunk so far."""
        return self._length

    def reset(self) -> None:
        """The open chunk ends here, whatever it holds."""
        self._length = 0
        self._tail = b""

    def scan(self, data: Buffer) -> int:
        """How many bytes of `data` belong to the open chunk, if it ends in `data`; 0 if all of them do and it goes on.

        After a cut the next call starts with the byte behind it.
        """
        size = len(data)
        first = max(1, self.minimum - self._length)
        last = min(size, self.maximum - self._length)
        cut = self._find(data, self._tail, first, last, self._bits) if first <= last else 0
        if not cut and last == self.maximum - self._length:
            cut = last
        if cut:
            self.reset()
            return cut
        self._length += size
        if size >= WINDOW:
            self._tail = bytes(memoryview(data)[size - WINDOW :])
        else:
            self._tail = (self._tail + bytes(data))[-WINDOW:]
        return 0


class Cutter:
    """Cuts a stream that is fed block by block, by content, at suggestions and for injections.

    Offsets count the stream from its beginning, what was injected included. A suggestion that lies in what is at hand
    wins over an earlier cut by content, so the cuts depend on the blocks: feeding the same blocks makes the same cuts,
    and docs/formats.md says which blocks make those of `proxmox-backup-client`. Without suggestions and injections
    the blocks make no difference.
    """

    def __init__(self, average: int = ARCHIVE_AVERAGE, *, find: Finder | None = None) -> None:
        """As `Chunker`."""
        self._chunker: Final = Chunker(average, find=find)
        #: Where in the stream the open chunk begins.
        self._base = 0
        self._suggested: Final[deque[int]] = deque()
        self._injections: Final[deque[tuple[int, int]]] = deque()
        #: Where the last queued injection ends.
        self._injected_end = 0

    @property
    def position(self) -> int:
        """Bytes of the stream so far: what was fed, and what was injected at places that were reached."""
        return self._base + self._chunker.length

    @property
    def open_length(self) -> int:
        """Bytes of the open chunk."""
        return self._chunker.length

    def suggest(self, offset: int) -> None:
        """A chunk should end at `offset`, the larger ones later; told before the block that holds it or ends at it.

        One that is told after that block is lost, as in PBS.
        """
        self._suggested.append(offset)

    def inject(self, boundary: int, size: int) -> None:
        """Chunks of `size` bytes together go into the stream at `boundary`: a chunk ends there, and they follow.

        Told before any byte that comes behind them, in rising order; several may have one boundary if all but the last
        of them are of size 0.

        Raises:
            FleeceError: `boundary` was passed already or lies inside an earlier injection.
        """
        earliest = max(self.position, self._injected_end)
        if boundary < earliest or size < 0:
            raise FleeceError("inject chunks at", f"{boundary}", f"{size} bytes, the stream is at {earliest} already")
        self._injections.append((boundary, size))
        self._injected_end = boundary + size

    def feed(self, block: Buffer) -> list[int]:
        """Take the next bytes of the stream and say what happens in them, in order.

        - n > 0: the open chunk ends after n more bytes, counted from the event before, or from the beginning of `block`
          if this is the first (what was fed earlier and has not ended belongs to the chunk as well).
        - 0: the next injection in the order of `inject` goes here. The open chunk is empty by then, except if this is
          the first event: then the chunk that earlier blocks began, unless it is empty, ends where they do.

        What follows the last event is the beginning of the next open chunk.
        """
        events: list[int] = []
        view = memoryview(block)
        size = len(view)
        start = 0  # of what is not yet counted in an event
        while start < size or self._injections:
            before = self._chunker.length
            cut = self._regular_cut(view[start:]) if start < size else 0
            # `before` bytes of the open chunk lie in earlier blocks.
            end = self._base + before + (cut or size - start)
            if self._injections and self._injections[0][0] <= end:
                boundary, length = self._injections.popleft()
                taken = boundary - self._base - before
                if taken:
                    events.append(taken)
                events.append(0)
                self._chunker.reset()
                self._base = boundary + length
                start += taken
            elif cut:
                events.append(cut)
                self._base = end
                start += cut
            else:
                break
        return events

    def finish(self) -> list[int]:
        """The stream has ended: the injections at its very end, as a list of 0.

        The first of them ends the open chunk; without any, the open chunk, unless empty, is the last one.

        Raises:
            FleeceError: chunks were to be injected behind the end of the stream.
        """
        events = self.feed(b"")
        if self._injections:
            boundary = self._injections[0][0]
            raise FleeceError("inject chunks at", f"{boundary}", f"the stream ends at {self.position}")
        return events

    def _regular_cut(self, data: memoryview) -> int:
        """The cut by content or at a suggestion in `data`, which follows the open chunk's bytes so far; 0 if none."""
        chunker = self._chunker
        seen = self._base + chunker.length
        end = seen + len(data)
        while self._suggested:
            offset = self._suggested[0]
            if offset > end:
                break
            length = offset - self._base
            if length > chunker.maximum:
                break
            if offset <= seen or length < chunker.minimum:
                # At the scan position it came too late, and the hash decides as if there were none.
                self._suggested.popleft()
                if offset == seen and length >= chunker.minimum:
                    break
                continue
            # It stays in the queue, for an injection before it may win; else it is behind us at the next look.
            chunker.reset()
            return offset - seen
        return chunker.scan(data)
