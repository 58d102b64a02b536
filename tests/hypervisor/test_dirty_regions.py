"""Where a program that reads a block device is to read: every dirty byte, none beside, one region after the other."""

from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import pytest

from core.disks import Extent, ExtentState
from core.errors import SourceError
from hypervisor.dirty_regions import Region, open_regions, read_dirty_regions, regions_of
from hypervisor.errors import FleecingError
from hypervisor.nbd_client import open_nbd
from tests.support.nbd_servers import Request, ScriptedServer, status

KIB, MIB = 1024, 1024**2
SIZE = 16 * MIB
CONTEXT = "qemu:dirty-bitmap:b"


class Bitmap:
    """A server whose export has the dirty ranges `dirty` (begin, end) in the bitmap `b`."""

    def __init__(self, dirty: Sequence[tuple[int, int]], size: int = SIZE, piece: int = SIZE) -> None:
        self.dirty, self.piece = dirty, piece
        self.server = ScriptedServer(size=size, answer=self.answer)

    def answer(self, request: Request) -> bytes:
        extents: list[tuple[int, int]] = []
        offset, end = request.offset, request.offset + request.length
        while offset < end:
            inside = [stop for start, stop in self.dirty if start <= offset < stop]
            stop = min([end, offset + self.piece, *inside, *(start for start, _ in self.dirty if start > offset)])
            extents.append((stop - offset, 1 if inside else 0))
            offset = stop
        return status(request, extents)


async def collect(bitmap: Bitmap, longest: int = 1024 * MIB, window: int = 4 * MIB) -> list[Region]:
    async with (
        bitmap.server.serving() as address,
        open_nbd(address, connections=1, contexts=(CONTEXT,)) as pool,
        aclosing(read_dirty_regions(pool, "b", longest, window)) as regions,
    ):
        return [region async for region in regions]


@pytest.mark.parametrize(
    "dirty",
    [
        [],
        [(0, SIZE)],
        [(0, 1)],
        [(SIZE - 1, SIZE)],
        [(3 * MIB, 5 * MIB)],  # over the edge of a window
        [(4 * MIB, 8 * MIB)],  # exactly a window
        [(MIB, 2 * MIB), (3 * MIB, 4 * MIB), (4 * MIB + 1, 13 * MIB), (15 * MIB, SIZE)],
    ],
)
@pytest.mark.parametrize("piece", [SIZE, 65536 * 3])
async def test_the_regions_are_the_dirty_ranges(dirty: list[tuple[int, int]], piece: int) -> None:
    found = await collect(Bitmap(dirty, piece=piece))
    assert found == [Region(start, stop - start) for start, stop in dirty]


async def test_no_region_is_longer_than_wanted() -> None:
    found = await collect(Bitmap([(MIB, 8 * MIB + 5), (9 * MIB, 10 * MIB)]), longest=3 * MIB)
    assert found == [(MIB, 3 * MIB), (4 * MIB, 3 * MIB), (7 * MIB, MIB + 5), (9 * MIB, MIB)]


async def test_the_server_is_asked_while_the_caller_goes_on() -> None:
    bitmap = Bitmap([(0, MIB), (5 * MIB, 6 * MIB)])
    async with (
        bitmap.server.serving() as address,
        open_nbd(address, connections=1, contexts=(CONTEXT,)) as pool,
        aclosing(read_dirty_regions(pool, "b", window=4 * MIB)) as regions,
    ):
        assert await anext(regions) == (0, MIB)
        assert len(bitmap.server.requests) == 2  # not the whole disk


async def test_next_gives_none_for_ever_at_the_end() -> None:
    async with Bitmap([(0, MIB)]).server.serving() as address, open_regions(address, "b", SIZE) as regions:
        assert [await regions.next() for _ in range(3)] == [(0, MIB), None, None]


async def test_without_a_bitmap_all_is_to_be_read() -> None:
    async with (
        ScriptedServer(size=SIZE + 7).serving() as address,
        open_regions(address, None, SIZE + 7, longest=10 * MIB) as regions,
    ):
        assert [await regions.next() for _ in range(3)] == [(0, 10 * MIB), (10 * MIB, 6 * MIB + 7), None]


async def test_another_size_and_a_missing_bitmap_are_errors(tmp_path: Path) -> None:
    async with Bitmap([]).server.serving() as address:
        with pytest.raises(FleecingError, match=f"it has {SIZE} bytes, not {SIZE - 512}"):
            async with open_regions(address, "b", SIZE - 512):
                raise AssertionError
    server = ScriptedServer(size=SIZE, answer=lambda request: status(request, []))
    async with server.serving() as address, open_regions(address, "b", SIZE) as regions:
        with pytest.raises(SourceError):
            await regions.next()


def test_a_map_that_is_known_gives_its_data() -> None:
    extents = [
        Extent(0, 4 * MIB, ExtentState.CLEAN),
        Extent(4 * MIB, 8 * MIB, ExtentState.DATA),
        Extent(12 * MIB, MIB, ExtentState.ZERO),
        Extent(13 * MIB, 100, ExtentState.DATA),
    ]
    assert regions_of(extents) == [(4 * MIB, 8 * MIB), (13 * MIB, 100)]
    assert regions_of(extents, 5 * MIB) == [(4 * MIB, 5 * MIB), (9 * MIB, 3 * MIB), (13 * MIB, 100)]
