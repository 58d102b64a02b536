"""Memory for the bodies of answers, used again once nobody has a view of it any more.

Fresh memory costs a page fault per 4 KiB: for a chunk of 4 MiB three to ten times as much as copying it from the
socket, and most of the CPU time of a download.
"""

import mmap
import sys
from typing import Final

from core.buffers import WritableBuffer

#: Bytes of the bodies for which it is worth while; others come and go.
SMALLEST: Final = 256 << 10
#: An encoded chunk of a disk image; the page above 4 MiB has the header of what cannot be compressed.
LARGEST: Final = (4 << 20) + mmap.PAGESIZE
#: References to an area while it is looked at and has no views: the list's, the loop's, and the argument's.
_UNUSED: Final = 3


class BodyMemory:
    """Memory for up to `count` bodies at once; more are served, but are not used again.

    For one event loop. Views may be dropped anywhere; memory that somebody keeps a view of is left to him.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._areas: list[mmap.mmap] = []

    def take(self, size: int) -> WritableBuffer:
        """`size` writable bytes with anything in them; they are given back by dropping all views."""
        if not SMALLEST <= size <= LARGEST:
            return bytearray(size)
        return memoryview(self._unused())[:size]

    def _unused(self) -> mmap.mmap:
        for area in self._areas:
            if sys.getrefcount(area) <= _UNUSED:
                return area
        area = mmap.mmap(-1, LARGEST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            area.madvise(mmap.MADV_HUGEPAGE)
        if len(self._areas) >= self._count:
            del self._areas[0]  # somebody keeps it
        self._areas.append(area)
        return area
