"""Which parts of a disk have changed, one after the other, for a program that reads a block device or a file.

Such a program cannot ask for a dirty bitmap, so it is told where to read next: inside a region and nowhere else, since
where QEMU's filter is restricted to the bitmap everything beside it is an I/O error.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Final, NamedTuple

from core.disks import Extent, ExtentState
from hypervisor.errors import FleecingError
from hypervisor.nbd_client import NbdAddress, NbdPool, StatusExtent, open_nbd

#: Bytes of a region at most: what a program may want to read, store and give up at once.
LONGEST: Final = 1024**3
#: Bytes of the disk that the server is asked about at a time.
_WINDOW: Final = 1024**3
_DIRTY: Final = 1
_CONTEXT: Final = "qemu:dirty-bitmap:"


class Region(NamedTuple):
    """A range to read, in bytes."""

    offset: int
    length: int


def regions_of(extents: Iterable[Extent], longest: int = LONGEST) -> list[Region]:
    """The regions of a map that is known: everything in it that is DATA."""
    found: list[Region] = []
    for offset, length, state in extents:
        if state is ExtentState.DATA:
            found += [Region(at, min(longest, offset + length - at)) for at in range(offset, offset + length, longest)]
    return found


async def read_dirty_regions(
    pool: NbdPool, bitmap: str | None, longest: int = LONGEST, window: int = _WINDOW
) -> AsyncGenerator[Region, None]:
    """The regions of an export in order, by its dirty bitmap, or (None) all of it.

    The server is asked piece by piece while the caller goes on, so that memory does not grow with the disk. Neighbours
    are joined up to `longest` bytes. To be closed (`aclosing`) by who leaves before the end.

    Raises:
        SourceError: the map cannot be read.
    """
    begin = end = 0  # what was found and not given yet
    context = f"{_CONTEXT}{bitmap}"
    for start in range(0, pool.size, window):
        length = min(window, pool.size - start)
        extents = [StatusExtent(start, length, _DIRTY)]
        if bitmap is not None:
            extents = await pool.block_status(start, length, context)
        for offset, size, flags in extents:
            if not flags & _DIRTY:
                continue
            if offset != end:
                if end > begin:
                    yield Region(begin, end - begin)
                begin = offset
            end = offset + size
            while end - begin >= longest:
                yield Region(begin, longest)
                begin += longest
    if end > begin:
        yield Region(begin, end - begin)


class DirtyRegions:
    """Gives one region after the other, for callers that know no iterators; made by `open_regions`."""

    def __init__(self, regions: AsyncIterator[Region]) -> None:
        self._regions = regions

    async def next(self) -> Region | None:
        """The next region; None, for ever, when there is none left.

        Raises:
            SourceError: the map cannot be read.
        """
        return await anext(self._regions, None)


@asynccontextmanager
async def open_regions(
    address: NbdAddress, bitmap: str | None, size: int, *, longest: int = LONGEST
) -> AsyncIterator[DirtyRegions]:
    """The regions of the export at `address`, over a connection of their own, as long as the block runs.

    Args:
        address: of the export.
        bitmap: name of the dirty bitmap that goes along with it; None: everything is to be read.
        size: bytes that the disk has by what was said of it.
        longest: bytes of a region at most.

    Raises:
        FleecingError: it has another size.
        SourceError: it cannot be opened, or has no such bitmap.
    """
    contexts = () if bitmap is None else (f"{_CONTEXT}{bitmap}",)
    async with open_nbd(address, connections=1, contexts=contexts) as pool:
        if pool.size != size:
            raise FleecingError("read the map of", str(address), f"it has {pool.size} bytes, not {size}")
        async with aclosing(read_dirty_regions(pool, bitmap, longest)) as regions:
            yield DirtyRegions(regions)
