"""The one test suite of `DiskTarget`, run over every implementation.

A test module derives a class from `DiskTargetSuite` and gives it a fixture `make_target`: called with a size (a
multiple of 512 bytes), it returns an async context manager that yields the open target and a function that reads the
target's content by other means; the function is called after the block.
"""

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeAlias

import pytest
import trio

from core.disks import DiskTarget
from core.errors import TargetError
from core.units import MIB

CHUNK: Final = 4 * MIB
SIZE: Final = 3 * CHUNK + 7 * 512
MakeTarget: TypeAlias = Callable[[int], AbstractAsyncContextManager[tuple[DiskTarget, Callable[[], bytes]]]]


class DiskTargetSuite:
    """What every target that is no stream must do."""

    @pytest.fixture
    def make_target(self) -> MakeTarget:
        raise AssertionError("the class of the implementation has this fixture")

    async def test_parallel_writes_in_any_order_arrive(self, make_target: MakeTarget) -> None:
        content = random.Random(5).randbytes(SIZE)
        async with make_target(SIZE) as (target, content_of):
            assert isinstance(target, DiskTarget)
            assert target.size >= SIZE
            async with trio.open_nursery() as nursery:
                for offset in reversed(range(0, SIZE, CHUNK)):
                    nursery.start_soon(target.write, offset, memoryview(content)[offset : offset + CHUNK])
            await target.flush()
        assert content_of()[:SIZE] == content

    async def test_zeroed_ranges_read_as_zeros(self, make_target: MakeTarget) -> None:
        data = random.Random(6).randbytes(CHUNK)
        async with make_target(SIZE) as (target, content_of):
            await target.zero(0, CHUNK)
            await target.write(CHUNK, data)
            await target.zero(2 * CHUNK, SIZE - 2 * CHUNK)
            await target.flush()
        assert content_of()[:SIZE] == bytes(CHUNK) + data + bytes(SIZE - 2 * CHUNK)

    async def test_reads_zero_means_that_untouched_parts_are_zero(self, make_target: MakeTarget) -> None:
        async with make_target(SIZE) as (target, content_of):
            promised = target.reads_zero
            await target.write(CHUNK, b"\x55" * 512)
            if not promised:
                await target.zero(0, CHUNK)
                await target.zero(CHUNK + 512, SIZE - CHUNK - 512)
        assert content_of()[:SIZE] == bytes(CHUNK) + b"\x55" * 512 + bytes(SIZE - CHUNK - 512)

    async def test_a_write_beyond_the_end_is_refused(self, make_target: MakeTarget) -> None:
        async with make_target(SIZE) as (target, _):
            with pytest.raises(TargetError, match="outside"):
                await target.write(target.size - 512, bytes(1024))

    async def test_a_read_only_view_of_bytes_can_be_written(self, make_target: MakeTarget) -> None:
        async with make_target(SIZE) as (target, content_of):
            await target.write(0, b"a" * 512)
            await target.write(512, bytearray(b"b" * 512))
            await target.write(1024, memoryview(b"c" * 512))
        assert content_of()[:1536] == b"a" * 512 + b"b" * 512 + b"c" * 512
