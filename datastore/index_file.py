"""The files of both kinds of index: read whole, or written under a temporary name."""

import os
import stat
from pathlib import Path
from typing import Final

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
#: Where either header keeps the csum of the entries.
_CSUM_OFFSET: Final = 32


def read_index_file(path: str | os.PathLike[str], where: str) -> bytes:
    """The bytes of the index file `path`, a regular file of bounded length.

    Raises:
        NotFoundError: no such file.
        FormatError: no regular file, or longer than any index.
        StoreError: it cannot be read.
    """
    try:
        # Non-blocking: a FIFO under this name must not hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError("read index", where, "it is no regular file")
            if status.st_size > HEADER_SIZE + MAX_ENTRY_BYTES:
                raise FormatError("read index", where, f"{status.st_size} bytes, more than any index has")
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
