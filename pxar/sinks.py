"""What the file archive hands over and asks for, as plain data; the caller joins it with a datastore.

Everything here is called from one worker thread. A call may wait (for room, for a chunk) and may raise what the caller
raises through it: a failed store, a cancelled run.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from core.buffers import Buffer


class ReusedChunk(NamedTuple):
    """A chunk of the previous payload stream that goes into the new one as it is."""

    digest: bytes
    size: int  #: plain bytes


class ArchiveSink(Protocol):
    """A stream that is written front to back."""

    @property
    def position(self) -> int:
        """Bytes of the stream so far."""
        ...

    def write(self, data: Buffer) -> None:
        """Append `data`, one write: how bytes are grouped into writes decides where payload streams are cut."""
        ...

    def reserve(self, size: int) -> memoryview:
        """Room for `size` bytes (at most 4 MiB) at the end of the stream, with anything in it, to be filled in place.

        It becomes part of the stream with `commit`, and must not be used after that.
        """
        ...

    def commit(self, size: int) -> None:
        """Append the first `size` bytes of what `reserve` gave, one write."""
        ...


class PayloadSink(ArchiveSink, Protocol):
    """The payload stream of a split archive."""

    def suggest(self) -> None:
        """A file's payload begins here: a good place for a chunk to end."""
        ...

    def inject(self, chunks: Sequence[ReusedChunk]) -> None:
        """End the open chunk here and go on behind `chunks`: `position` grows by their sizes."""
        ...


class CatalogSink(Protocol):
    """The list of names that goes beside a self-contained archive, in archive order."""

    def start_directory(self, name: bytes) -> None:
        """Go into a directory."""
        ...

    def end_directory(self) -> None:
        """Leave it."""
        ...

    def file(self, name: bytes, size: int, mtime_s: int) -> None:
        """A regular file; `mtime_s` in Unix seconds."""
        ...

    def entry(self, kind: bytes, name: bytes) -> None:
        """Something else: `l` symlink, `h` hard link, `b` and `c` devices, `p` fifo, `s` socket."""
        ...


class ReferenceBytes(Protocol):
    """A stored stream, read at any place."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes from `offset` on: `length` of them, or fewer at the end of the stream; a view where that saves a copy.

        Raises:
            FleeceError: this range cannot be read.
        """
        ...


class ChunkTable(Protocol):
    """Where the chunks of a stored stream begin and end: an index opened for reading."""

    @property
    def size(self) -> int:
        """Bytes of the stream."""
        ...

    @property
    def count(self) -> int:
        """Chunks."""
        ...

    def digest(self, number: int) -> bytes:
        """Digest of chunk `number`."""
        ...

    def span(self, number: int) -> tuple[int, int]:
        """Offset and length in bytes of chunk `number`."""
        ...

    def find(self, offset: int) -> int:
        """Number of the chunk that holds byte `offset`."""
        ...
