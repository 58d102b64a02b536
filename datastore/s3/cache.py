"""The local cache in front of a bucket: which chunks are kept, and how many bytes of them (R18, R19).

The files are `cache_files`'s. In memory there is, per process, the order in which chunks were used last. At the first
change the folder is looked through, so that what earlier processes cached counts too; and again when other processes of
this host have cached much meanwhile (`cache_growth`). So several of them together keep one limit, but for that much.
"""

import errno
import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import trio

from core.buffers import Buffer
from core.errors import os_reason
from core.limits import in_io_thread
from datastore.errors import StoreError
from datastore.files import Owner, store_errors
from datastore.locks import ChunkLocks
from datastore.s3.cache_files import CachedFile, CacheFiles
from datastore.s3.cache_growth import CacheGrowth

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
#: Bytes that others may cache before the folder is looked through again, and the share of the limit, if that is more.
_FOREIGN: Final = 64 << 20
_FOREIGN_SHARE: Final = 20
#: Seconds of rest for each second of looking through the folder, while who has just begun to use it has cached little:
#: the 65536 folders take half a second of a core, which a mount's first reads would wait for.
_REST: Final = 4
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class ChunkCache:
    """Keeps chunks up to a limit. For tasks of one event loop.

    Args:
        files: the folder.
        locks: of its chunks.
        limit: bytes; None takes four fifths of the free space.
        min_free: bytes that stay free on the file system.
        keep: says of a digest that it must not be dropped now.
    """

    def __init__(
        self,
        files: CacheFiles,
        locks: ChunkLocks,
        *,
        limit: int | None = None,
        min_free: int = MIN_FREE,
        keep: Callable[[bytes], bool] = lambda _: False,
    ) -> None:
        self.files: Final = files
        self._locks = locks
        self._growth = CacheGrowth(files.base, Owner.of(files.base))
        self._limit = limit
        self._min_free = min_free
        self._keep = keep
        self._used: OrderedDict[bytes, int] = OrderedDict()  # digest -> bytes, the longest unused first
        self._recent: set[bytes] | None = None  # used while the folder is being looked through
        self._pins: Counter[bytes] = Counter()
        self._since_look = _LOOK_EVERY  # bytes written since the last look at the free space
        self._warned = False
        self._changed = trio.Event()
        self._foreign = trio.Event()  # others have cached so much that we must look again
        self._counted = trio.Event()
        self._hurry = trio.Event()  # somebody waits for the folder to be looked through, or much was cached meanwhile
        self._written = 0  # bytes cached by this process
        self.total = 0  #: bytes of chunks that are known to be cached
        self.evicted = 0  #: chunks dropped by this process

    async def run(self) -> None:
        """Look through the folder at the first change, and whenever others have cached much; for a background task."""
        await self._changed.wait()
        while True:
            await self.count(gently=True)
            await self._foreign.wait()

    async def count(self, *, gently: bool = False) -> None:
        """Look through the folder, take over the order in which chunks were used, and drop what is too much.

        Args:
            gently: rest in between, the first time, until this process has cached as much as it may be behind.

        Raises:
            StoreError: a folder cannot be read.
        """
        self._foreign = trio.Event()
        self._growth.forget()
        recent = self._recent = set()
        found: list[CachedFile] = []
        for start in range(0, _FOLDERS, _FOLDERS_AT_ONCE):
            cached, used_s = await in_io_thread(self._scan, start)
            found += cached
            if gently and not self._hurry.is_set():
                with trio.move_on_after(_REST * used_s):
                    await self._hurry.wait()
        found.sort(key=lambda file: file.atime)
        there = {file.digest for file in found}
        # Ours, but for those that another process has dropped; what we cached during the look stays in any case.
        known = {digest: size for digest, size in self._used.items() if digest in there or digest in recent}
        self._used = OrderedDict((file.digest, file.size) for file in found if file.digest not in known)
        self._used.update(known)
        self._recent = None
        self.total = sum(self._used.values())
        if self._limit is None:
            self._limit = int(_SHARE * (await in_io_thread(self._free) + self.total))
        self._counted.set()
        await self.make_room()

    def _scan(self, start: int) -> tuple[list[CachedFile], float]:
        """In a worker thread: the cached chunks of some folders, and the CPU seconds that it took."""
        began = time.thread_time()
        return [file for file in self.files.scan(start, _FOLDERS_AT_ONCE) if file.size], time.thread_time() - began

    def used(self, digest: bytes, size: int) -> None:
        """The chunk is cached, with `size` bytes, and was used now."""
        self.total += size - self._used.get(digest, 0)
        self._used[digest] = size
        self._used.move_to_end(digest)
        if self._recent is not None:
            self._recent.add(digest)

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
                await in_io_thread(self._write, digest, parts, size)
            except OSError as error:
                if error.errno not in _FULL:
                    raise StoreError("cache the chunk", digest.hex(), os_reason(error)) from error
                return await self._put_marker(digest, error)
            self.used(digest, size)
        self._since_look += size
        self._written += size
        behind = max(_FOREIGN, (self._limit or 0) // _FOREIGN_SHARE)
        if self._growth.foreign > behind:
            self._foreign.set()
        if self._written > behind:
            self._hurry.set()
        await self.make_room()
        return True

    def _write(self, digest: bytes, parts: Sequence[Buffer], size: int) -> None:
        self.files.write(digest, parts)
        self._growth.add(size)

    async def _put_marker(self, digest: bytes, full: OSError) -> bool:
        if not self._warned:
            self._warned = True
            _LOG.warning("the cache in %s is full (%s); going on without caching", self.files.base, os_reason(full))
        self.forget(digest)
        await self._evict(_MAKE_ROOM, set())
        await in_io_thread(self.files.mark, digest)
        return False

    async def drop(self, digest: bytes) -> None:
        """Make a marker of a cached chunk, whose content is not wanted any more."""
        await in_io_thread(self.files.empty, digest)
        self.forget(digest)

    async def make_room(self) -> None:
        """Drop the longest unused chunks until the limits hold."""
        wanted = 0  # bytes that the file system lacks
        if self._since_look >= _LOOK_EVERY:
            self._since_look = 0
            free = await in_io_thread(self._free)
            wanted = self._min_free - free
            if self._limit is None:
                # Until the folder has been looked through, a limit that is too low rather than too high.
                wanted = max(wanted, self.total - int(_SHARE * (free + self.total)))
        held: set[bytes] = set()  # by somebody; not tried twice
        while (over := max(wanted, 0 if self._limit is None else self.total - self._limit)) > 0:
            freed = await self._evict(over, held)
            if freed is None:
                return
            wanted -= freed

    async def _evict(self, size: int, held: set[bytes]) -> int | None:
        """Drop chunks that have `size` bytes in all, or those that there are.

        Returns:
            bytes that were freed, less if others had dropped some of them; None if there is nothing to drop.
        """
        dropped: dict[bytes, int] = {}
        for digest, cached in self._used.items():
            if size <= 0:
                break
            if digest not in self._pins and digest not in held and not self._keep(digest):
                dropped[digest] = cached
                size -= cached
        if not dropped:
            return None
        for digest in dropped:
            self.forget(digest)
        freed = 0
        names = list(dropped)
        for start in range(0, len(names), _EVICT_AT_ONCE):
            busy, emptied = await in_io_thread(self._empty, names[start : start + _EVICT_AT_ONCE])
            freed += emptied
            held.update(busy)
            for digest in busy:
                if digest not in self._used:
                    self.used(digest, dropped[digest])
        self.evicted += len(dropped)
        return freed

    def _empty(self, digests: Sequence[bytes]) -> tuple[list[bytes], int]:
        """In a worker thread: make markers of chunks; returns those that somebody holds, and the bytes freed.

        Under the chunk's lock: one that is being stored once more, since an old delete may hit it, must stay (R31).
        """
        busy, freed = [], 0
        for digest in digests:
            with store_errors("drop the cached chunk", self.files.path(digest)):
                if not self._locks.try_acquire(digest):
                    busy.append(digest)
                    continue
            try:
                if digest in self._pins or self._keep(digest):
                    busy.append(digest)
                else:
                    freed += self.files.empty(digest)
            finally:
                self._locks.release(digest)
        return busy, freed

    def _free(self) -> int:
        with store_errors("ask for the space of", self.files.base):
            found = os.statvfs(self.files.base)
        return found.f_bavail * found.f_frsize

    async def settled(self) -> None:
        """Wait until the folder has been looked through."""
        self._hurry.set()
        await self._counted.wait()
