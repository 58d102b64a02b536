"""The local cache in front of a bucket: which chunks are kept, and how many bytes of them (R18, R19).

The files are `cache_files`'s. In memory there is, per process, the order in which chunks were used last. At the first
change the folder is looked through, so that what earlier processes cached counts too.
"""

import errno
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import trio

from core.buffers import Buffer
from core.errors import os_reason
from core.limits import in_io_thread
from datastore.errors import StoreError
from datastore.files import store_errors
from datastore.s3.cache_files import CachedFile, CacheFiles

_LOG = logging.getLogger(__name__)
#: Bytes that stay free on the file system of the cache.
MIN_FREE: Final = 1 << 30
#: Share of the free space (cached chunks count as free) that the cache takes if nothing is configured.
_SHARE: Final = 0.8
#: Folders looked through by one call in a worker thread.
_FOLDERS_AT_ONCE: Final = 1024
_FOLDERS: Final = 1 << 16
#: Chunks made markers by one call in a worker thread.
_EVICT_AT_ONCE: Final = 256
#: Bytes written between two looks at the free space.
_LOOK_EVERY: Final = 256 << 20
#: Bytes that are given back when the file system turns out to be full.
_MAKE_ROOM: Final = 64 << 20
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class ChunkCache:
    """Keeps chunks up to a limit. For tasks of one event loop.

    Args:
        files: the folder.
        limit: bytes; None takes four fifths of the free space.
        min_free: bytes that stay free on the file system.
        keep: says of a digest that it must not be dropped now.
    """

    def __init__(
        self,
        files: CacheFiles,
        *,
        limit: int | None = None,
        min_free: int = MIN_FREE,
        keep: Callable[[bytes], bool] = lambda _: False,
    ) -> None:
        self.files: Final = files
        self._limit = limit
        self._min_free = min_free
        self._keep = keep
        self._used: OrderedDict[bytes, int] = OrderedDict()  # digest -> bytes, the longest unused first
        self._pins: Counter[bytes] = Counter()
        self._since_look = _LOOK_EVERY  # bytes written since the last look at the free space
        self._warned = False
        self._changed = trio.Event()
        self._counted = trio.Event()
        self.total = 0  #: bytes of chunks that are known to be cached
        self.evicted = 0  #: chunks dropped by this process

    async def run(self) -> None:
        """Count what is there once something changes; for a background task, ends when that is done."""
        await self._changed.wait()
        await self.count()

    async def count(self) -> None:
        """Look through the folder, take over the order in which chunks were used, and drop what is too much.

        Raises:
            StoreError: a folder cannot be read.
        """
        found: list[CachedFile] = []
        for start in range(0, _FOLDERS, _FOLDERS_AT_ONCE):
            cached = await in_io_thread(self._scan, start)
            found += cached
        found.sort(key=lambda file: file.atime)
        known = self._used
        self._used = OrderedDict((file.digest, file.size) for file in found if file.digest not in known)
        self._used.update(known)
        self.total = sum(self._used.values())
        if self._limit is None:
            self._limit = int(_SHARE * (await in_io_thread(self._free) + self.total))
        self._counted.set()
        await self.make_room()

    def _scan(self, start: int) -> list[CachedFile]:
        return [file for file in self.files.scan(start, _FOLDERS_AT_ONCE) if file.size]

    def used(self, digest: bytes, size: int) -> None:
        """The chunk is cached, with `size` bytes, and was used now."""
        self.total += size - self._used.get(digest, 0)
        self._used[digest] = size
        self._used.move_to_end(digest)

    def forget(self, digest: bytes) -> None:
        """The chunk is not cached any more."""
        self.total -= self._used.pop(digest, 0)

    @contextmanager
    def pinned(self, digest: bytes) -> Iterator[None]:
        """Do not drop the chunk while the block runs."""
        self._pins[digest] += 1
        try:
            yield
        finally:
            self._pins[digest] -= 1
            if not self._pins[digest]:
                del self._pins[digest]

    async def put(self, digest: bytes, parts: Sequence[Buffer]) -> bool:
        """Cache a chunk whose object is there for certain; the caller holds its lock.

        Returns:
            False if there was no space: then there is only the marker.

        Raises:
            StoreError: not even a marker can be made.
        """
        self._changed.set()
        size = sum(len(part) for part in parts)
        with self.pinned(digest):
            try:
                await in_io_thread(self.files.write, digest, parts)
            except OSError as error:
                if error.errno not in _FULL:
                    raise StoreError("cache the chunk", digest.hex(), os_reason(error)) from error
                return await self._put_marker(digest, error)
            self.used(digest, size)
        self._since_look += size
        await self.make_room()
        return True

    async def _put_marker(self, digest: bytes, full: OSError) -> bool:
        if not self._warned:
            self._warned = True
            _LOG.warning("the cache in %s is full (%s); going on without caching", self.files.base, os_reason(full))
        self.forget(digest)
        await self._evict(_MAKE_ROOM)
        await in_io_thread(self.files.mark, digest)
        return False

    async def drop(self, digest: bytes) -> None:
        """Make a marker of a cached chunk, whose content is not wanted any more."""
        await in_io_thread(self.files.empty, digest)
        self.forget(digest)

    async def make_room(self) -> None:
        """Drop the longest unused chunks until the limits hold."""
        over = 0 if self._limit is None else self.total - self._limit
        if self._since_look >= _LOOK_EVERY:
            self._since_look = 0
            free = await in_io_thread(self._free)
            over = max(over, self._min_free - free)
            if self._limit is None:
                # Until the folder has been looked through, a limit that is too low rather than too high.
                over = max(over, self.total - int(_SHARE * (free + self.total)))
        if over > 0:
            await self._evict(over)

    async def _evict(self, size: int) -> None:
        """Drop chunks of `size` bytes in all, or those that there are."""
        dropped: list[bytes] = []
        for digest, cached in list(self._used.items()):
            if size <= 0:
                break
            if digest not in self._pins and not self._keep(digest):
                dropped.append(digest)
                size -= cached
        for digest in dropped:
            self.forget(digest)
        self.evicted += len(dropped)
        for start in range(0, len(dropped), _EVICT_AT_ONCE):
            await in_io_thread(self._empty, dropped[start : start + _EVICT_AT_ONCE])

    def _empty(self, digests: Sequence[bytes]) -> None:
        for digest in digests:
            self.files.empty(digest)

    def _free(self) -> int:
        with store_errors("ask for the space of", self.files.base):
            found = os.statvfs(self.files.base)
        return found.f_bavail * found.f_frsize

    async def settled(self) -> None:
        """Wait until the folder has been looked through."""
        await self._counted.wait()
