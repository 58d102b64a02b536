"""What both kinds of index have in common as files: read whole, or written under a temporary name."""

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Self

from core.buffers import Buffer
from core.errors import FormatError, NotFoundError, os_reason
from datastore.errors import StoreError

#: Bytes of a digest.
DIGEST_SIZE: Final = 32
#: Bytes of the header of either kind of index.
HEADER_SIZE: Final = 4096
#: Bytes of entries of the largest index that is read or written: 2^26 chunks, 256 TiB of an image in 4 MiB chunks.
#: A sparse file of a terabyte that looks like an index must not be read into memory.
MAX_ENTRY_BYTES: Final = 40 << 26
#: Bytes of the larger kind of entry.
_TAIL_SIZE: Final = 40
#: Where either header keeps the csum of the entries.
_CSUM_OFFSET: Final = 32


class Outline(NamedTuple):
    """What is read of an index file before the rest of it may size a buffer."""

    length: int  #: bytes of the whole file
    head: bytes  #: the header, or less if the file is shorter
    tail: bytes  #: its last 40 bytes, or less; of a dynamic index the last entry


class IndexReader(ABC):
    """An index opened for reading; the base of `FixedIndex` and `DynamicIndex`."""

    def __init__(self, entries: memoryview, count: int, where: str) -> None:
        self.where: Final = where
        self.count: Final = count
        self._entries: Final = entries
        self._csum: bytes | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, where: str | None = None, size: int | None = None) -> Self:
        """Read the index file `path`, 32 or 40 bytes of memory per chunk; `where` (default: the path) is for messages.

        An index of another image or stream than one of `size` bytes, as the manifest lists it, is refused before it
        takes memory; so is a file whose length does not fit what its beginning and end say. The file is read, not
        mapped: were it truncated under a mapping, the process would die of SIGBUS.

        Raises:
            NotFoundError: no such file.
            StoreError: it cannot be read.
            FormatError: as `from_bytes`, or another size than `size`.
        """
        where = str(path) if where is None else where

        def check(outline: Outline) -> None:
            found = cls.outlined(outline, where=where)
            if size is not None and found != size:
                raise FormatError("read index", where, f"wrong size ({found} != {size})")

        return cls.from_bytes(_read_index_file(path, where, check), where=where)

    @classmethod
    @abstractmethod
    def outlined(cls, outline: Outline, *, where: str) -> int:
        """Bytes of the image or stream, by head and tail of the file alone.

        Raises:
            FormatError: they do not fit each other and the file's length.
        """

    @classmethod
    @abstractmethod
    def from_bytes(cls, data: Buffer, *, where: str) -> Self:
        """The index whose whole file is `data`; it is not copied.

        Raises:
            FormatError: it is none.
        """

    @property
    def csum(self) -> bytes:
        """SHA-256 over the entry area, computed at first use."""
        if self._csum is None:
            self._csum = hashlib.sha256(self._entries).digest()
        return self._csum

    def _check(self, number: int) -> None:
        if not 0 <= number < self.count:
            raise IndexError(f"chunk {number} of {self.count}")


def check_head(data: Buffer, magic: bytes, where: str) -> None:
    """See to it that `data` begins with a whole header of the kind of index that `magic` says.

    Raises:
        FormatError: too short, or another magic.
    """
    if len(data) < HEADER_SIZE:
        raise FormatError("read index", where, f"{len(data)} bytes, a header has {HEADER_SIZE}")
    found = bytes(memoryview(data)[: len(magic)])
    if found != magic:
        raise FormatError("read index", where, f"unknown magic {found.hex()}")


def _read_index_file(path: str | os.PathLike[str], where: str, check: Callable[[Outline], None]) -> bytes:
    """The bytes of the index file `path`, a regular file of bounded length whose outline passes `check`."""
    try:
        # Non-blocking: a FIFO under this name must not hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError("read index", where, "it is no regular file")
            if status.st_size > HEADER_SIZE + MAX_ENTRY_BYTES:
                raise FormatError("read index", where, f"{status.st_size} bytes, more than any index has")
            head = os.pread(descriptor, HEADER_SIZE, 0)
            tail = os.pread(descriptor, _TAIL_SIZE, max(0, status.st_size - _TAIL_SIZE))
            check(Outline(status.st_size, head, tail))
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                return file.readall()
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise NotFoundError("read index", where, "there is no such file") from None
    except OSError as error:
        raise StoreError("read index", where, os_reason(error)) from error


class IndexFile:
    """The temporary file of an index writer: made at once, so that a read-only or full store shows early."""

    def __init__(self, path: Path, where: str) -> None:
        self._path: Final = path
        self._where: Final = where
        try:
            # 0644 whatever the umask is: readers of the store are other users.
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            os.fchmod(self._descriptor, 0o644)
        except OSError as error:
            raise StoreError("write index", where, os_reason(error)) from error

    def begin(self, header: bytes, length: int) -> None:
        """Write `header` (with a zero csum) and give the file its final `length`, as far as it is known."""
        try:
            _write_all(self._descriptor, header, 0)
            os.ftruncate(self._descriptor, length)
        except OSError as error:
            self.abort()
            raise StoreError("write index", self._where, os_reason(error)) from error

    def finish(self, entries: Buffer, csum: bytes) -> None:
        """Write all `entries` behind the header and then `csum` into it, and close; a failure deletes the file."""
        try:
            _write_all(self._descriptor, entries, HEADER_SIZE)
            _write_all(self._descriptor, csum, _CSUM_OFFSET)
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
        except OSError as error:
            self.abort(force=True)
            raise StoreError("write index", self._where, os_reason(error)) from error

    def abort(self, *, force: bool = False) -> None:
        """Close and delete the file; nothing if it was finished (unless `force`) or aborted before."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        elif not force:
            return
        self._path.unlink(missing_ok=True)


def _write_all(descriptor: int, data: Buffer, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        offset += written
        view = view[written:]
