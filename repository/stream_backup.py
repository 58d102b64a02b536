"""How a stream that a thread writes becomes chunks of a dynamic index.

    writer thread  ->  arena, cut where the chunker says  ->  `pipeline`  ->  index in stream order

What is written is grouped as PBS's client does it, 256 KiB at a time, because where a payload stream is cut depends on
it: docs/formats.md, "Chunker".
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple, Protocol

import trio
from trio.lowlevel import ParkingLot

from core.buffers import Buffer
from core.nursery import open_nursery
from core.progress import Progress, Task
from datastore.chunker import Cutter
from repository.arena import ARENA_SIZE, Arena, Region
from repository.pipeline import Chunk, Pipeline
from repository.report import ArchiveReport, Mode
from repository.throttle import Throttle

#: Writes up to this many bytes in all are looked at together.
GATHERED: Final = 256 << 10
#: Index entries handed over at a time.
ENTRIES_AT_ONCE: Final = 4096
_END: Final = Struct("<Q")


class StoredChunk(Protocol):
    """A chunk that the session knows."""

    @property
    def digest(self) -> bytes:
        """Its digest."""
        ...

    @property
    def size(self) -> int:
        """Plain bytes."""
        ...


class StreamSpec(NamedTuple):
    """A stream that shall be stored."""

    filename: str  #: of its index, `root.mpxar.didx`
    average: int  #: bytes of a chunk on average, a power of two
    mode: Mode = Mode.FULL
    reason: str | None = None  #: why all of it is read
    arena: int = ARENA_SIZE  #: bytes


@dataclass(slots=True, eq=False)
class _Entry:
    """A chunk in stream order."""

    size: int
    digest: bytes | None  #: None until it is stored


class StreamBackup:
    """One stream while it is stored: a `pipeline.Producer`, and the sink that a thread writes into.

    The sink's methods (`write` to `finish`) belong to one worker thread, started by `trio.to_thread`; they wait where
    the pipeline is behind, and raise `trio.Cancelled` in it once the backup has failed elsewhere.
    """

    def __init__(
        self, spec: StreamSpec, writer: int, pipeline: Pipeline, report: ArchiveReport, throttle: Throttle | None
    ) -> None:
        self.filename: Final = spec.filename
        self.writer: Final = writer  #: of the session
        self.report: Final = report
        self.size = 0  #: bytes whose chunks are in the index
        self.count = 0
        self.csum = b""  #: of the index, once it is closed
        self.task: Task | None = None
        self._hasher = hashlib.sha256()
        self._pipeline, self._throttle = pipeline, throttle
        self._token = trio.lowlevel.current_trio_token()
        self._keeper = ParkingLot()
        self._ended = False
        # Of the writer thread:
        self.position = 0  #: bytes of the stream so far
        self._cutter = Cutter(spec.average)
        self._arena = Arena(spec.arena, trio.from_thread.check_cancelled)
        self._scanned = 0  #: bytes of the open part that the chunker has seen
        self._injections: deque[Sequence[StoredChunk]] = deque()
        self._numbers = 0
        # Appended to by the writer thread, taken from by the event loop.
        self._entries: deque[_Entry] = deque()
        self._unsettled: dict[int, _Entry] = {}

    # --- the sink, in the writer thread ------------------------------------------------------------------------------

    def write(self, data: Buffer) -> None:
        """Append `data`, one write."""
        size = len(data)
        if size > GATHERED:
            view = memoryview(data).cast("B")
            for start in range(0, size, 1 << 22):
                piece = view[start : start + (1 << 22)]
                self._arena.room(len(piece))[:] = piece
                self.commit(len(piece))
            return
        # As `reserve` and `commit`, twice per file: a call costs more than what it does.
        arena = self._arena
        head = arena.head
        gathered = head - arena.start - self._scanned
        end = head + size
        if end > arena.free_to or gathered + size > GATHERED:
            arena.room(size)[:] = data
            self.commit(size)
            return
        arena.memory[head:end] = data
        arena.head = end
        self.position += size

    def reserve(self, size: int) -> memoryview:
        """Room for `size` bytes at the end of the stream."""
        return self._arena.room(size)

    def commit(self, size: int) -> None:
        """Append the first `size` bytes of what `reserve` gave, one write."""
        arena = self._arena
        gathered = arena.head - arena.start - self._scanned
        if gathered and gathered + size > GATHERED:
            self._feed(gathered)
        # Even a large write is looked at with the next one: a suggestion may lie at its end.
        arena.grow(size)
        self.position += size

    def suggest(self) -> None:
        """A good place for a chunk to end."""
        self._cutter.suggest(self.position)

    def inject(self, chunks: Sequence[StoredChunk]) -> None:
        """End the open chunk here and go on behind `chunks`, which the session must know."""
        size = sum(chunk.size for chunk in chunks)
        self._cutter.inject(self.position, size)
        self._injections.append(chunks)
        self.position += size

    def finish(self) -> None:
        """The stream ends here; once is enough."""
        if self._ended:
            return
        arena = self._arena
        if gathered := arena.head - arena.start - self._scanned:
            self._feed(gathered)
        self._follow(self._cutter.finish(), self._scanned)
        if left := arena.head - arena.start:
            self._emit(left)
        self._ended = True
        # The memory goes with the last chunk on its way.
        self._arena = Arena(0)
        self._token.run_sync_soon(self._keeper.unpark)

    def _feed(self, size: int) -> None:
        """Show the chunker the next `size` bytes, and cut where it says."""
        if self._throttle is not None:
            trio.from_thread.run(self._throttle.take, size)
        else:
            trio.from_thread.check_cancelled()
        before = self._scanned
        start = self._arena.start + before
        events = self._cutter.feed(self._arena.memory[start : start + size])
        self._scanned += size
        self.report.read += size
        if events:
            self._follow(events, before)

    def _follow(self, events: Sequence[int], before: int) -> None:
        """Do what the chunker says; `before` bytes of the open chunk were fed earlier, and events count from there."""
        for event in events:
            if before or event:
                self._emit(before + event)
                before = 0
            if not event:
                for chunk in self._injections.popleft():
                    self._entries.append(_Entry(chunk.size, chunk.digest))

    def _emit(self, size: int) -> None:
        region = self._arena.cut(size)
        self._scanned -= size
        entry = _Entry(size, None)
        self._entries.append(entry)
        self._numbers += 1
        self._token.run_sync_soon(self._hand_over, self._numbers, region, entry)

    # --- in the event loop -------------------------------------------------------------------------------------------

    def starves(self) -> bool:
        """True while the writer thread waits for room."""
        return self._arena.starving

    def _hand_over(self, number: int, region: Region, entry: _Entry) -> None:
        self._unsettled[number] = entry
        self._pipeline.hand_over(Chunk(self, number, region.data, region.free, trio.current_time()))

    def settled(self, chunk: Chunk) -> None:
        """See `pipeline.Producer`."""
        self._unsettled.pop(chunk.number).digest = chunk.digest
        if self.task is not None:
            self.task.advance(len(chunk.data))
        self._keeper.unpark()

    async def keep(self) -> None:
        """Hand index entries over in stream order until the stream has ended, then close the index."""
        session = self._pipeline.session
        entries = self._entries
        while True:
            ready: list[tuple[int, bytes]] = []
            packed: list[bytes] = []
            while entries and entries[0].digest is not None and len(ready) < ENTRIES_AT_ONCE:
                entry = entries.popleft()
                assert entry.digest is not None
                ready.append((self.size, entry.digest))
                self.size += entry.size
                packed += _END.pack(self.size), entry.digest
            if ready:
                self._hasher.update(b"".join(packed))
                self.count += len(ready)
                await session.append(self.writer, ready)
            elif self._ended and not entries:
                break
            else:
                await self._keeper.park()
        self.csum = self._hasher.digest()
        await session.close_index(self.writer, self.count, self.size, self.csum)
        self.report.size, self.report.chunks = self.size, self.count
        self.report.reused = self.size - self.report.new


async def store_streams(
    pipeline: Pipeline, streams: Sequence[StreamBackup], progress: Progress, name: str, write: Callable[[], None]
) -> None:
    """Call `write` in a thread, which fills all of `streams`, and store what comes; `pipeline` is open.

    Raises:
        FleeceError: what `write` raises, or the session.

    Cancelled, `write` is waited for: it notices at its next use of a stream.
    """

    def work() -> None:
        write()
        for stream in streams:
            stream.finish()

    async def run_writer() -> None:
        with pipeline.producing(lambda: any(stream.starves() for stream in streams)):
            await trio.to_thread.run_sync(work)

    with progress.task(name, None) as task:
        async with open_nursery() as nursery:
            for stream in streams:
                stream.task = task
                nursery.start_soon(stream.keep)
            nursery.start_soon(run_writer)
