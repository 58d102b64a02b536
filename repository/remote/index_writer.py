"""What a client knows of an index that it has a server write: checked here before anything is sent.

The server checks the same; but its message comes later, and what it is told wrongly may cost the session.
"""

import hashlib
from typing import Final

import trio

from core.errors import UsageError
from datastore.blob import MAX_CHUNK_SIZE, MAX_ENCODED_CHUNK, Blob
from datastore.index import ArchiveIndex
from datastore.index_file import DIGEST_SIZE
from datastore.written import check_csum, check_extent
from repository.interface import FIXED_CHUNK_SIZE

_UNSET: Final = bytes(DIGEST_SIZE)


class IndexWriter:
    """One index being written on the server: fixed if `size` is given. 32 bytes of memory per chunk of a fixed one."""

    def __init__(self, name: str, where: str, size: int | None, base: ArchiveIndex | None) -> None:
        self.name: Final = name
        self.reused: Final = base is not None
        self.appending = trio.Lock()  #: entries go to the server in order
        self.pending: list[tuple[int, bytes]] = []  #: entries that the server does not have yet
        self.appended = 0  #: entries that were given, as the server counts them
        self._where = where
        self._size = size
        self._short_chunk = False
        self._digests = bytearray()
        self._end = 0
        self._sum = hashlib.sha256()
        if size is not None:
            length = DIGEST_SIZE * -(-size // FIXED_CHUNK_SIZE)
            self._digests = bytearray(length) if base is None else bytearray(base.digests)

    @property
    def prefix(self) -> str:
        """`fixed` or `dynamic`, as the server's calls begin."""
        return "dynamic" if self._size is None else "fixed"

    def check_chunk(self, size: int, blob: Blob) -> None:
        """See to it that a chunk of `size` plain bytes may be put for this index.

        Raises:
            UsageError: it may not.
        """
        if not 1 <= size <= MAX_CHUNK_SIZE or not blob.kind.header_size < len(blob) <= MAX_ENCODED_CHUNK:
            why = f"{size} bytes, encoded {len(blob)}: a chunk has 1 byte to 16 MiB"
            raise UsageError("store chunk", self._where, why)
        if self._size is not None and size != FIXED_CHUNK_SIZE:
            if size > FIXED_CHUNK_SIZE or self._short_chunk:
                why = f"{size} bytes; only the last chunk may be short, none longer"
                raise UsageError("store chunk", self._where, why)
            self._short_chunk = True

    def add(self, offset: int, size: int, digest: bytes) -> None:
        """Take an entry: the chunk `digest` of `size` bytes lies at `offset`.

        Raises:
            UsageError: it does not fit there.
        """
        if self._size is None:
            if offset != self._end:
                why = f"a chunk at {offset}, but the entries before end at {self._end}"
                raise UsageError("write index", self._where, why)
            self._end += size
            self._sum.update(self._end.to_bytes(8, "little") + digest)
        else:
            number, rest = divmod(offset, FIXED_CHUNK_SIZE)
            if offset < 0 or rest or size != min(FIXED_CHUNK_SIZE, self._size - offset):
                why = f"a chunk of {size} bytes at {offset} of {self._size} in chunks of {FIXED_CHUNK_SIZE}"
                raise UsageError("write index", self._where, why)
            self._digests[DIGEST_SIZE * number : DIGEST_SIZE * (number + 1)] = digest
        self.pending.append((offset, digest))
        self.appended += 1

    def check_whole(self, count: int, size: int, csum: bytes) -> None:
        """Compare what the caller thinks with what it gave. Hashes all digests: for a worker thread.

        Raises:
            UsageError: they differ, or entries are missing.
        """
        found = (self.appended, self._end)
        if self._size is not None:
            found = (len(self._digests) // DIGEST_SIZE, self._size)
        check_extent(found, (count, size), self._where)
        if self._size is not None and not self.reused:
            steps = range(0, len(self._digests), DIGEST_SIZE)
            unset = sum(self._digests[step : step + DIGEST_SIZE] == _UNSET for step in steps)
            if unset:
                raise UsageError("close index", self._where, f"{unset} of {count} entries were never set")
        actual = self._sum.digest() if self._size is None else hashlib.sha256(self._digests).digest()
        check_csum(actual, csum, self._where)
