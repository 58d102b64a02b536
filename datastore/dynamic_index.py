"""Dynamic index (`.didx`): end offset and digest of every chunk of one stream.

Layout: docs/formats.md, "Indexes". This module is its only description in code.
"""

import hashlib
import os
import sys
import time
import uuid
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import Final, Self

from core.buffers import Buffer
from core.errors import FleeceError, FormatError
from datastore.blob import MAX_CHUNK_SIZE
from datastore.index_file import (
    DIGEST_SIZE,
    HEADER_SIZE,
    MAX_ENTRY_BYTES,
    IndexFile,
    IndexReader,
    Outline,
    check_head,
)
from datastore.names import ArchiveKind

MAGIC: Final = bytes.fromhex("1c914ea519bab3cd")
_HEADER: Final = Struct(
    "<8s"    #  0  magic
    "16s"    #  8  uuid, random
    "q"      # 24  ctime, Unix seconds
    "32s"    # 32  SHA-256 over all entries in order
    "4032x"  # 64  zero
)  # fmt: skip
_ENTRY: Final = Struct(
    "<Q"   #  0  end of the chunk in the stream, exclusive
    "32s"  #  8  digest
)  # fmt: skip
_END: Final = Struct("<Q")
#: From this many entries on NumPy (90 ms to import) is quicker than a loop, and if it is there already from these.
_MANY: Final = 50_000
_SOME: Final = 200


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """The first 4096 bytes of a dynamic index."""

    uuid: bytes  #: 16 random bytes
    ctime: int  #: Unix seconds
    csum: bytes  #: SHA-256 over the entry area, informational: readers compute it anew

    @classmethod
    def parse(cls, data: Buffer, *, where: str) -> Self:
        """Read a header from `data`, the first `HEADER_SIZE` bytes or more; `where` is the archive's name.

        Raises:
            FormatError: too short, or another magic.
        """
        check_head(data, MAGIC, where)
        _, *fields = _HEADER.unpack_from(data)
        return cls(*fields)

    def pack(self) -> bytes:
        """Return the `HEADER_SIZE` bytes that `parse` reads back."""
        return _HEADER.pack(MAGIC, self.uuid, self.ctime, self.csum)


class DynamicIndex(IndexReader):
    """A dynamic index opened for reading; implements `datastore.index.ArchiveIndex`."""

    kind: Final = ArchiveKind.DYNAMIC

    def __init__(self, header: DynamicHeader, entries: memoryview, where: str) -> None:
        super().__init__(entries, len(entries) // _ENTRY.size, where)
        self.header: Final = header
        self.size: Final = self._end(self.count - 1)
        self._digests: memoryview | None = None

    @classmethod
    def from_bytes(cls, data: Buffer, *, where: str) -> Self:
        """The index whose whole file is `data`; it is not copied.

        Raises:
            FormatError: not a dynamic index, no or half entries, ends that do not rise or leave chunks over 16 MiB.
        """
        header = DynamicHeader.parse(data, where=where)
        entries = memoryview(data).toreadonly()[HEADER_SIZE:]
        _checked_count(len(entries), where)
        bad = _first_bad_end(entries)
        if bad is not None:
            number, start, end = bad
            why = f"chunk {number} goes from {start} to {end}, chunks have 1 to {MAX_CHUNK_SIZE} bytes"
            raise FormatError("read index", where, why)
        return cls(header, entries, where)

    @classmethod
    def outlined(cls, outline: Outline, *, where: str) -> int:
        """See `IndexReader.outlined`."""
        DynamicHeader.parse(outline.head, where=where)
        count = _checked_count(outline.length - HEADER_SIZE, where)
        end, _ = _ENTRY.unpack(outline.tail)
        if not count <= end <= count * MAX_CHUNK_SIZE:
            why = f"{count} chunks end at {end}, each of them has 1 to {MAX_CHUNK_SIZE} bytes"
            raise FormatError("read index", where, why)
        return int(end)

    @property
    def digests(self) -> memoryview:
        """All digests in order, packed: a copy made at first use."""
        if self._digests is None:
            self._digests = memoryview(_packed_digests(self._entries))
        return self._digests

    def digest(self, number: int) -> bytes:
        """Digest of chunk `number`.

        Raises:
            IndexError: not 0 <= number < count.
        """
        self._check(number)
        start = _ENTRY.size * number + _END.size
        return bytes(self._entries[start : start + DIGEST_SIZE])

    def span(self, number: int) -> tuple[int, int]:
        """Offset and length in bytes of chunk `number` in the stream.

        Raises:
            IndexError: not 0 <= number < count.
        """
        self._check(number)
        offset = self._end(number - 1) if number else 0
        return offset, self._end(number) - offset

    def find(self, offset: int) -> int:
        """Number of the chunk that holds byte `offset`, by binary search.

        Raises:
            IndexError: not 0 <= offset < size.
        """
        if not 0 <= offset < self.size:
            raise IndexError(f"offset {offset} outside a stream of {self.size} bytes")
        return bisect_right(range(self.count), offset, key=self._end)

    def lengths(self) -> Sequence[int]:
        """Bytes of every chunk, in order."""
        ends = [end for end, _ in _ENTRY.iter_unpack(self._entries)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def _end(self, number: int) -> int:
        end: int = _END.unpack_from(self._entries, _ENTRY.size * number)[0]
        return end


class DynamicIndexWriter:
    """A dynamic index being written to a temporary file that the caller publishes after `close`.

    Entries are kept in memory (40 bytes per chunk) and written by `close`, so a writer costs no system call per chunk.
    As a context manager it deletes the file if the block ends without `close`. Used by one thread at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        where: str | None = None,
        ctime: int | None = None,
        index_uuid: bytes | None = None,
    ) -> None:
        """Make the file `path` with a header without csum.

        Args:
            path: the temporary file, replaced if it exists.
            where: the archive's name for messages, default the path.
            ctime: Unix seconds, default now.
            index_uuid: 16 bytes, default random.

        Raises:
            StoreError: the file cannot be made.
        """
        self.path: Final = Path(path)
        self.where: Final = str(path) if where is None else where
        self._entries = bytearray()
        self._size = 0
        header = DynamicHeader(
            uuid.uuid4().bytes if index_uuid is None else index_uuid,
            int(time.time()) if ctime is None else ctime,
            bytes(32),
        )
        self._file: Final = IndexFile(self.path, self.where)
        self._file.begin(header.pack(), HEADER_SIZE)

    @property
    def size(self) -> int:
        """Bytes of the stream so far: the offset of the next chunk."""
        return self._size

    @property
    def count(self) -> int:
        """Entries so far."""
        return len(self._entries) // _ENTRY.size

    def append(self, offset: int, length: int, digest: bytes) -> None:
        """The next chunk lies at `offset`, has `length` bytes and `digest`.

        Raises:
            FleeceError: `offset` is not the end of the chunk before, a chunk cannot have this length, not a digest.
        """
        if offset != self._size:
            why = f"the next chunk starts at {offset}, the one before ends at {self._size}"
            raise FleeceError("write index", self.where, why)
        if not 0 < length <= MAX_CHUNK_SIZE:
            raise FleeceError("write index", self.where, f"a chunk of {length} bytes at {offset}")
        if len(digest) != DIGEST_SIZE or not any(digest):
            raise FleeceError("write index", self.where, f"{digest.hex()!r} is no digest")
        if len(self._entries) + _ENTRY.size > MAX_ENTRY_BYTES:
            raise FleeceError("write index", self.where, f"more than {self.count} chunks are too many for one index")
        self._size += length
        self._entries += _ENTRY.pack(self._size, digest)

    def csum(self) -> bytes:
        """SHA-256 over the entry area as it is now."""
        return hashlib.sha256(self._entries).digest()

    def close(self) -> bytes:
        """Write the entries and the csum, close the file, and return the csum. It is not synced.

        Raises:
            FleeceError: an empty stream cannot be represented; the file is deleted.
            StoreError: it cannot be written; it is deleted.
        """
        if not self._entries:
            self.abort()
            raise FleeceError("write index", self.where, "an empty stream cannot be represented")
        csum = self.csum()
        self._file.finish(self._entries, csum)
        return csum

    def abort(self) -> None:
        """Close and delete the file; nothing after `close` or a second time."""
        self._file.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _checked_count(length: int, where: str) -> int:
    """Number of entries in `length` bytes of them."""
    if not length:
        raise FormatError("read index", where, "it has no entries")
    if length % _ENTRY.size:
        raise FormatError("read index", where, f"{length} bytes of entries, each of them has {_ENTRY.size} bytes")
    return length // _ENTRY.size


def _is_many(count: int) -> bool:
    return count >= _MANY or (count >= _SOME and "numpy" in sys.modules)


def _first_bad_end(entries: memoryview) -> tuple[int, int, int] | None:
    """Number, start and end of the first chunk whose length no writer makes."""
    count = len(entries) // _ENTRY.size
    first = 0
    if _is_many(count):
        import numpy as np

        ends = np.frombuffer(entries, dtype="<u8").reshape(count, _ENTRY.size // 8)[:, 0]
        # Unsigned differences wrap, so an end that falls gives a huge length.
        bad = np.flatnonzero(np.diff(ends, prepend=np.uint64(0)) - np.uint64(1) >= MAX_CHUNK_SIZE)
        if not len(bad):
            return None
        first = int(bad[0])
    start = _END.unpack_from(entries, _ENTRY.size * (first - 1))[0] if first else 0
    for number in range(first, count):
        end = _END.unpack_from(entries, _ENTRY.size * number)[0]
        if not 0 < end - start <= MAX_CHUNK_SIZE:
            return number, start, end
        start = end
    return None


def _packed_digests(entries: memoryview) -> bytes:
    count = len(entries) // _ENTRY.size
    if _is_many(count):
        import numpy as np

        return np.frombuffer(entries, dtype=np.uint8).reshape(count, _ENTRY.size)[:, _END.size :].tobytes()
    return b"".join(digest for _, digest in _ENTRY.iter_unpack(entries))
