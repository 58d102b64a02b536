"""The pool of chunk buffers."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from datastore.sha256 import available
from repository import buffers
from repository.buffers import BufferPool, batch_size, shared_pool
from repository.interface import FIXED_CHUNK_SIZE


async def test_buffers_have_the_size_of_a_chunk_and_start_on_different_cache_lines() -> None:
    import numpy as np

    pool = BufferPool(5)
    with pool.lease() as lease:
        taken = [await lease.take() for _ in range(5)]
        assert {len(buffer) for buffer in taken} == {FIXED_CHUNK_SIZE}
        addresses = [np.frombuffer(buffer, np.uint8).ctypes.data for buffer in taken]
        assert len({address % 4096 for address in addresses}) == 5
        for number, buffer in enumerate(taken):
            buffer[:] = bytes([number]) * FIXED_CHUNK_SIZE
        assert [buffer[-1] for buffer in taken] == list(range(5))


async def test_taker_waits_until_a_buffer_is_given_back_first_come_first_served() -> None:
    pool = BufferPool(1)
    order = []
    with pool.lease() as lease:
        buffer = await lease.take()
        assert pool.exhausted

        async def take(name: str) -> None:
            taken = await lease.take()
            order.append(name)
            lease.give(taken)

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(take, name)
                await wait_all_tasks_blocked()
            assert order == []
            lease.give(buffer)
    assert order == ["a", "b", "c"]
    assert not pool.exhausted


async def test_cancelled_taker_takes_nothing() -> None:
    pool = BufferPool(1)
    with pool.lease() as lease:
        buffer = await lease.take()
        with trio.move_on_after(0.01):
            await lease.take()
        lease.give(buffer)
        await lease.take()


async def test_what_a_lease_still_holds_goes_back_at_its_end() -> None:
    pool = BufferPool(2)
    with pool.lease() as first:
        with pytest.raises(ValueError, match="on the way"), pool.lease() as second:
            await second.take()
            await second.take()
            raise ValueError("on the way")
        await first.take()
        await first.take()


async def test_one_pool_serves_a_loop_and_is_bounded() -> None:
    assert shared_pool() is shared_pool()
    assert batch_size() <= shared_pool().count <= buffers.MAX_BUFFERS


@pytest.mark.parametrize("name", [one.name for one in available()])
def test_batches_are_as_large_as_the_lanes_are_many(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FLEECE_SHA256", name)
    lanes = next(one.lanes for one in available() if one.name == name)
    assert lanes <= batch_size() <= 16
