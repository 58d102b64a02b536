"""The one test suite of `DiskSource`, run over every implementation.

A test module derives a class from `DiskSourceSuite` and gives it a fixture `make_source`: called with the disk's
content (a multiple of 512 bytes), it returns an async context manager that yields the open source.
"""

import itertools
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeAlias

import pytest
import trio

from core.disks import DiskSource, ExtentState
from core.units import MIB

CHUNK: Final = 4 * MIB
MakeSource: TypeAlias = Callable[[bytes], AbstractAsyncContextManager[DiskSource]]

#: Data, a chunk of zeros, a chunk with a little data in the middle, and a short last chunk.
CONTENT: Final = (
    random.Random(1).randbytes(CHUNK)
    + bytes(CHUNK)
    + bytes(2 * MIB) + b"in the middle of nothing" + bytes(2 * MIB - 24)
    + random.Random(2).randbytes(7 * 512)
)  # fmt: skip


class DiskSourceSuite:
    """What every source must do."""

    @pytest.fixture
    def make_source(self) -> MakeSource:
        raise AssertionError("the class of the implementation has this fixture")

    async def test_it_has_a_name_a_size_and_a_plan(self, make_source: MakeSource) -> None:
        async with make_source(CONTENT) as source:
            assert isinstance(source, DiskSource)
            assert source.name
            assert "/" not in source.name
            assert source.size == len(CONTENT)
            assert source.plan.reason or source.plan.base is not None

    @pytest.mark.parametrize("incremental", [True, False])
    async def test_extents_cover_the_disk_and_zero_is_true(self, make_source: MakeSource, incremental: bool) -> None:
        async with make_source(CONTENT) as source:
            extents = await source.extents(incremental=incremental)
        position = 0
        for extent in extents:
            assert extent.offset == position
            assert extent.length > 0
            position += extent.length
            if extent.state is ExtentState.ZERO:
                assert not any(CONTENT[extent.offset : position])
            if not incremental or source.plan.base is None:
                assert extent.state is not ExtentState.CLEAN
        assert position == len(CONTENT)
        assert all(before.state is not after.state for before, after in itertools.pairwise(extents))

    async def test_many_reads_at_once_give_the_content(self, make_source: MakeSource) -> None:
        async with make_source(CONTENT) as source:
            await source.extents(incremental=False)
            whole = memoryview(bytearray(source.size))
            async with trio.open_nursery() as nursery:
                for offset in range(0, source.size, CHUNK):
                    nursery.start_soon(source.read_into, offset, whole[offset : offset + CHUNK])
        assert whole == CONTENT

    async def test_any_range_can_be_read(self, make_source: MakeSource) -> None:
        size = len(CONTENT)
        dice = random.Random(3)
        ranges = [(0, 1), (size - 1, 1), (CHUNK - 1, 2), (513, 3 * MIB), (0, 512)]
        ranges += [
            (offset := dice.randrange(size), dice.randrange(1, min(100_000, size - offset) + 1)) for _ in range(20)
        ]
        async with make_source(CONTENT) as source:
            await source.extents(incremental=False)
            for offset, length in ranges:
                buffer = bytearray(length)
                await source.read_into(offset, buffer)
                assert buffer == CONTENT[offset : offset + length], (offset, length)

    async def test_a_buffer_is_filled_exactly(self, make_source: MakeSource) -> None:
        async with make_source(CONTENT) as source:
            await source.extents(incremental=False)
            around = bytearray(b"\xaa" * 3000)
            await source.read_into(1000, memoryview(around)[1000:2000])
        assert around[:1000] == around[2000:] == b"\xaa" * 1000
        assert around[1000:2000] == CONTENT[1000:2000]

    async def test_what_was_not_discarded_stays_readable(self, make_source: MakeSource) -> None:
        async with make_source(CONTENT) as source:
            await source.extents(incremental=False)
            buffer = bytearray(CHUNK)
            await source.read_into(0, buffer)
            await source.discard(0, CHUNK)
            await source.discard(3 * CHUNK, source.size - 3 * CHUNK)
            await source.read_into(2 * CHUNK, buffer)
            assert buffer == CONTENT[2 * CHUNK : 3 * CHUNK]

    async def test_a_cancelled_read_leaves_the_source_usable(self, make_source: MakeSource) -> None:
        async with make_source(CONTENT) as source:
            await source.extents(incremental=False)
            for pause_s in (0, 0.0002, 0.001):
                with trio.move_on_after(pause_s):
                    await source.read_into(0, bytearray(CHUNK))
            buffer = bytearray(CHUNK)
            await source.read_into(0, buffer)
            assert buffer == CONTENT[:CHUNK]
