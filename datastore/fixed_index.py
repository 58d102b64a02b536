"""Fixed index (`.fidx`): the digest of every equal-sized chunk of one disk image.

Layout: docs/formats.md, "Indexes". This module is its only description in code.
"""

import hashlib
import os
import time
import uuid
from collections.abc import Iterable
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

MAGIC: Final = bytes.fromhex("2f7f41ed91fd0fcd")
_HEADER: Final = Struct(
    "<8s"    #  0  magic
    "16s"    #  8  uuid, random
    "q"      # 24  ctime, Unix seconds
    "32s"    # 32  SHA-256 over all digests in order
    "Q"      # 64  image size, bytes
    "Q"      # 72  chunk size, bytes, a power of two
    "4016x"  # 80  zero
)  # fmt: skip
_UNSET: Final = bytes(DIGEST_SIZE)


@dataclass(frozen=True, slots=True)
class FixedHeader:
    """The first 4096 bytes of a fixed index."""

    uuid: bytes  #: 16 random bytes
    ctime: int  #: Unix seconds
    csum: bytes  #: SHA-256 over the digest area, informational: readers compute it anew
    size: int  #: image size in bytes, at least 1
    chunk_size: int  #: bytes, a power of two; the last chunk may be shorter

    @classmethod
    def parse(cls, data: Buffer, *, where: str) -> Self:
        """Read a header from `data`, the first `HEADER_SIZE` bytes or more; `where` is the archive's name.

        Raises:
            FormatError: too short, another magic, or sizes no writer makes.
        """
        check_head(data, MAGIC, where)
        _, *fields = _HEADER.unpack_from(data)
        header = cls(*fields)
        if not 1 <= header.size < 1 << 63:
            raise FormatError("read index", where, f"the header says an image of {header.size} bytes")
        if not is_chunk_size(header.chunk_size):
            raise FormatError("read index", where, f"the header says chunks of {header.chunk_size} bytes")
        return header

    def pack(self) -> bytes:
        """Return the `HEADER_SIZE` bytes that `parse` reads back."""
        return _HEADER.pack(MAGIC, self.uuid, self.ctime, self.csum, self.size, self.chunk_size)

    @property
    def count(self) -> int:
        """Number of chunks: size / chunk size, rounded up."""
        return -(-self.size // self.chunk_size)


def is_chunk_size(size: int) -> bool:
    """True if the chunks of a fixed index may have `size` bytes: a power of two, at most 16 MiB."""
    return 0 < size <= MAX_CHUNK_SIZE and size & (size - 1) == 0


class FixedIndex(IndexReader):
    """A fixed index opened for reading; implements `datastore.index.ArchiveIndex`."""

    kind: Final = ArchiveKind.FIXED

    def __init__(self, header: FixedHeader, digests: memoryview, where: str) -> None:
        super().__init__(digests, header.count, where)
        self.header: Final = header
        self.size: Final = header.size
        self.chunk_size: Final = header.chunk_size
        self.digests: Final = digests

    @classmethod
    def from_bytes(cls, data: Buffer, *, where: str) -> Self:
        """The index whose whole file is `data`; it is not copied.

        Raises:
            FormatError: not a fixed index, or its length does not fit its sizes.
        """
        header = _checked_header(data, len(data), where)
        return cls(header, memoryview(data).toreadonly()[HEADER_SIZE:], where)

    @classmethod
    def outlined(cls, outline: Outline, *, where: str) -> int:
        """See `IndexReader.outlined`."""
        return _checked_header(outline.head, outline.length, where).size

    def digest(self, number: int) -> bytes:
        """Digest of chunk `number`.

        Raises:
            IndexError: not 0 <= number < count.
        """
        self._check(number)
        return bytes(self.digests[DIGEST_SIZE * number : DIGEST_SIZE * (number + 1)])

    def span(self, number: int) -> tuple[int, int]:
        """Offset and length in bytes of chunk `number` in the image.

        Raises:
            IndexError: not 0 <= number < count.
        """
        self._check(number)
        offset = number * self.chunk_size
        return offset, min(self.chunk_size, self.size - offset)

    def find(self, offset: int) -> int:
        """Number of the chunk that holds byte `offset`.

        Raises:
            IndexError: not 0 <= offset < size.
        """
        if not 0 <= offset < self.size:
            raise IndexError(f"offset {offset} outside an image of {self.size} bytes")
        return offset // self.chunk_size


def _checked_header(head: Buffer, length: int, where: str) -> FixedHeader:
    header = FixedHeader.parse(head, where=where)
    expected = HEADER_SIZE + DIGEST_SIZE * header.count
    if length != expected:
        raise FormatError("read index", where, f"{length} bytes, header and {header.count} digests need {expected}")
    return header


class FixedIndexWriter:
    """A fixed index being written to a temporary file that the caller publishes after `close`.

    Entries may be set in any order and again. They are kept in memory (32 bytes per chunk) and written by `close`, so a
    writer costs no system call per chunk. As a context manager it deletes the file if the block ends without `close`.
    Used by one thread at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        chunk_size: int,
        *,
        where: str | None = None,
        base: Buffer | None = None,
        ctime: int | None = None,
        index_uuid: bytes | None = None,
    ) -> None:
        """Make the file `path` with its final length and a header without csum.

        Args:
            path: the temporary file, replaced if it exists.
            size: image size in bytes, at least 1.
            chunk_size: bytes, a power of two, at most 16 MiB.
            where: the archive's name for messages, default the path.
            base: packed digests of an index of the same count; entries not set keep them.
            ctime: Unix seconds, default now.
            index_uuid: 16 bytes, default random.

        Raises:
            FleeceError: sizes that cannot be represented, a base of another count.
            StoreError: the file cannot be made.
        """
        self.path: Final = Path(path)
        self.where: Final = str(path) if where is None else where
        if not 1 <= size < 1 << 63:
            raise FleeceError("write index", self.where, f"an image of {size} bytes cannot be represented")
        if not is_chunk_size(chunk_size):
            raise FleeceError("write index", self.where, f"chunks of {chunk_size} bytes cannot be represented")
        self._header: Final = FixedHeader(
            uuid.uuid4().bytes if index_uuid is None else index_uuid,
            int(time.time()) if ctime is None else ctime,
            bytes(32),
            size,
            chunk_size,
        )
        self.size: Final = size
        self.chunk_size: Final = chunk_size
        self.count: Final = self._header.count
        if DIGEST_SIZE * self.count > MAX_ENTRY_BYTES:
            raise FleeceError("write index", self.where, f"{self.count} chunks are too many for one index")
        if base is None:
            self._digests = bytearray(DIGEST_SIZE * self.count)
            self._missing = self.count
        else:
            if len(base) != DIGEST_SIZE * self.count:
                why = f"the base has {len(base) // DIGEST_SIZE} chunks, this image {self.count}"
                raise FleeceError("write index", self.where, why)
            self._digests = bytearray(base)
            self._missing = sum(
                1
                for start in range(0, len(self._digests), DIGEST_SIZE)
                if not self._digests[start] and self._digests.startswith(_UNSET, start)
            )
        self._file: Final = IndexFile(self.path, self.where)
        self._file.begin(self._header.pack(), HEADER_SIZE + DIGEST_SIZE * self.count)

    @property
    def missing(self) -> int:
        """Entries that are not set yet."""
        return self._missing

    def number_of(self, offset: int, length: int) -> int:
        """Number of the chunk at `offset` with `length` bytes.

        Raises:
            FleeceError: no chunk of this image lies there.
        """
        number = offset // self.chunk_size
        aligned = offset % self.chunk_size == 0 and 0 <= number < self.count
        if aligned and length == min(self.chunk_size, self.size - offset):
            return number
        why = f"no chunk of it has offset {offset} and length {length} (size {self.size}, chunks of {self.chunk_size})"
        raise FleeceError("write index", self.where, why)

    def set(self, number: int, digest: bytes) -> None:
        """Chunk `number` has `digest`.

        Raises:
            IndexError: not 0 <= number < count.
            FleeceError: not a digest.
        """
        if not 0 <= number < self.count:
            raise IndexError(f"chunk {number} of {self.count}")
        if len(digest) != DIGEST_SIZE or digest == _UNSET:
            raise FleeceError("write index", self.where, f"{digest.hex()!r} is no digest")
        start = DIGEST_SIZE * number
        if self._digests.startswith(_UNSET, start):
            self._missing -= 1
        self._digests[start : start + DIGEST_SIZE] = digest

    def set_many(self, entries: Iterable[tuple[int, bytes]]) -> None:
        """`set` for each (number, digest) of `entries`; a failure leaves those before it set."""
        for number, digest in entries:
            self.set(number, digest)

    def csum(self) -> bytes:
        """SHA-256 over the digest area as it is now."""
        return hashlib.sha256(self._digests).digest()

    def close(self) -> bytes:
        """Write the digests and the csum, close the file, and return the csum. It is not synced.

        Raises:
            FleeceError: an entry was never set; the file is deleted.
            StoreError: it cannot be written; it is deleted.
        """
        if self._missing:
            self.abort()
            raise FleeceError("write index", self.where, f"{self._missing} of {self.count} entries were never set")
        csum = self.csum()
        self._file.finish(self._digests, csum)
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
