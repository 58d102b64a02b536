"""Memory for the chunks of a stream: written front to back, given back in any order.

Chunks of a stream have any length up to 16 MiB and begin where the one before ends, so they are cut out of one area
instead of being copied into buffers. One thread writes; whoever gets a chunk gives it back from any thread.
"""

import mmap
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from repository.interface import FIXED_CHUNK_SIZE

#: Bytes of the area of a stream: the open chunk (at most 16 MiB), a piece being read, and two batches on their way.
ARENA_SIZE: Final = 32 * FIXED_CHUNK_SIZE
#: Seconds between two looks at whether the writing thread is cancelled.
_LOOK_S: Final = 0.25


class Region:
    """A part of an arena that was cut off; made by `Arena.cut`."""

    __slots__ = ("_arena", "data", "end", "freed", "start")

    def __init__(self, arena: "Arena", start: int, end: int) -> None:
        self._arena, self.start, self.end, self.freed = arena, start, end, False
        self.data: Final = arena.memory[start:end]

    def free(self) -> None:
        """Give it back; `data` must not be used any more."""
        self._arena._freed(self)


class Arena:
    """A ring of `size` bytes. Its open part, `start` to `head`, grows at the end and is cut at the front."""

    def __init__(self, size: int, check: Callable[[], None] = lambda: None) -> None:
        """`check` is called while waiting for room; it raises if that is in vain."""
        self.size: Final = size
        self.memory: Final = memoryview(_area(size) if size else b"")
        self.start = 0
        self.head = 0
        #: `head` may grow up to here, as far as is known without looking.
        self.free_to = 0
        self.starving = False  #: the writing thread waits for room
        self._check = check
        self._regions: deque[Region] = deque()  # cut off and not given back, the oldest first
        self._changed = threading.Condition()

    def room(self, size: int) -> memoryview:
        """`size` writable bytes at `head`, to be filled and added with `grow`; waits until they are free.

        The open part may move, so views of it from before are stale.
        """
        if self.head + size <= self.free_to or self._has_room(size):
            return self.memory[self.head : self.head + size]
        with self._changed:
            self.starving = True
            try:
                while not self._has_room(size) and not self._wrapped(size):
                    self._check()
                    self._changed.wait(_LOOK_S)
            finally:
                self.starving = False
        return self.memory[self.head : self.head + size]

    def grow(self, size: int) -> None:
        """The first `size` bytes of the last `room` belong to the open part now."""
        self.head += size

    def cut(self, size: int) -> Region:
        """Cut the first `size` bytes of the open part off."""
        region = Region(self, self.start, self.start + size)
        self.start += size
        with self._changed:
            self._regions.append(region)
        return region

    def _has_room(self, size: int) -> bool:
        # The oldest region begins behind the open part if the ring has wrapped. Only the writer makes regions, and
        # others only take them away, so an old answer is a careful one.
        try:
            first = self._regions[0].start
        except IndexError:
            first = 0
        self.free_to = self.size if self.start >= first else first - 1
        return self.head + size <= self.free_to

    def _wrapped(self, size: int) -> bool:
        """Go on at the beginning of the area, if there is room for the open part and `size` bytes more."""
        length = self.head - self.start
        if self._regions:
            first = self._regions[0].start
            if self.start < first or length + size >= first:
                return False
        elif length + size > self.size:
            raise ValueError(f"{length} + {size} bytes in an arena of {self.size}")
        self.memory[:length] = self.memory[self.start : self.head]
        self.start, self.head, self.free_to = 0, length, 0
        return True

    def _freed(self, region: Region) -> None:
        with self._changed:
            region.freed = True
            while self._regions and self._regions[0].freed:
                self._regions.popleft()
            self._changed.notify()


def _area(size: int) -> mmap.mmap:
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # 2 MiB pages: a hundredth of the page faults, and hashing runs over fewer TLB entries.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    return area
