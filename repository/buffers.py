"""Chunk buffers: made once, used again, shared by everything in this process that writes backups.

Fresh memory costs a page fault per 4 KiB, as long as compressing it; so buffers are taken from a pool and given back.
The pool's size bounds the memory of a backup, however many disks it has.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import trio
from trio.lowlevel import RunVar

from core.limits import cpu_count
from datastore.sha256 import implementation
from repository.interface import FIXED_CHUNK_SIZE

#: Bytes between the starts of neighbouring buffers beyond a chunk. Equal offsets modulo 4 KiB compete for the same
#: cache sets when a batch is hashed in lanes, so each buffer starts one cache line further into its page.
SKEW: Final = 4096 + 64
#: Chunks hashed together, by implementation of SHA-256. One after the other each chunk is hashed while it is still in
#: the cache; lanes need company.
_BATCH: Final = {"lanes16": 16, "lanes8": 8, "sha-ni-x2": 4}
_BATCH_DEFAULT: Final = 2
#: Buffers at most: 192 MiB, half of what a command may take.
MAX_BUFFERS: Final = 48
#: Buffers that are being read, written or waited for while every core has its batch.
_SPARE: Final = 16


def batch_size() -> int:
    """How many chunks are best hashed together on this machine."""
    return _BATCH.get(implementation(), _BATCH_DEFAULT)


class BufferPool:
    """Up to `count` buffers of one chunk each; they exist while somebody leases."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._made = 0
        self._free: list[memoryview] = []
        self._leases = 0
        self._available = trio.Semaphore(count)
        self._memory: memoryview | None = None

    @contextmanager
    def lease(self) -> Iterator["Lease"]:
        """The right to take buffers while the block runs; what is still held at its end is given back.

        No thread may use a buffer any more when the block ends. The memory goes with the last lease.
        """
        self._leases += 1
        lease = Lease(self)
        try:
            yield lease
        finally:
            for buffer in list(lease.held.values()):
                lease.give(buffer)
            self._leases -= 1
            if not self._leases:
                self._free.clear()
                self._memory, self._made = None, 0

    @property
    def exhausted(self) -> bool:
        """True if nobody gets a buffer before one is given back."""
        return self._available.value == 0

    async def _take(self) -> memoryview:
        await self._available.acquire()
        # The one used last is the one most likely still in the cache.
        return self._free.pop() if self._free else self._make()

    def _make(self) -> memoryview:
        if self._memory is None:
            area = mmap.mmap(-1, self.count * (FIXED_CHUNK_SIZE + SKEW), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # 2 MiB pages: a hundredth of the page faults, and hashing runs over fewer TLB entries.
            if hasattr(mmap, "MADV_HUGEPAGE"):
                area.madvise(mmap.MADV_HUGEPAGE)
            self._memory = memoryview(area)
        start = self._made * (FIXED_CHUNK_SIZE + SKEW)
        self._made += 1
        return self._memory[start : start + FIXED_CHUNK_SIZE]

    def _give(self, buffer: memoryview) -> None:
        self._free.append(buffer)
        self._available.release()


@dataclass(slots=True)
class Lease:
    """Buffers taken by one user of a pool."""

    pool: BufferPool
    held: dict[int, memoryview] = field(default_factory=dict)

    async def take(self) -> memoryview:
        """A buffer of `FIXED_CHUNK_SIZE` bytes with anything in it; waits until there is one, first come first served.

        Whoever holds one must be able to finish with it without taking another: two such takers could wait for each
        other. Cancelled, nothing is taken.
        """
        buffer = await self.pool._take()
        self.held[id(buffer)] = buffer
        return buffer

    def give(self, buffer: memoryview) -> None:
        """Give a buffer of `take` back."""
        self.pool._give(self.held.pop(id(buffer)))


_pool: RunVar[BufferPool] = RunVar("chunk buffers")


def shared_pool() -> BufferPool:
    """The pool of the running trio loop."""
    try:
        return _pool.get()
    except LookupError:
        _pool.set(BufferPool(min(MAX_BUFFERS, (cpu_count() + 1) * batch_size() + _SPARE)))
        return _pool.get()
