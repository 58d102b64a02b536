import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from core.errors import FormatError
from datastore.errors import LockedError, SnapshotNotFoundError
from datastore.names import Group, Snapshot
from fusefs.errors import StaleError
from fusefs.pool import SnapshotPool

GROUP = Group.parse("vm/100")
A, B = GROUP.at(1_000_000_000), GROUP.at(1_000_000_001)


class Store:
    """Snapshots that can be opened, counted and removed."""

    def __init__(self) -> None:
        self.opened: list[Snapshot] = []
        self.open: set[Snapshot] = set()
        self.removed: set[Snapshot] = set()
        self.broken: Exception | None = None
        self.blocked = trio.Event()
        self.blocked.set()

    @asynccontextmanager
    async def reader(self, snapshot: Snapshot) -> AsyncIterator[str]:
        await self.exists(snapshot)
        await self.blocked.wait()
        if self.broken is not None:
            raise self.broken
        assert snapshot not in self.open
        self.opened.append(snapshot)
        self.open.add(snapshot)
        try:
            yield f"contents of {snapshot}"
        finally:
            self.open.discard(snapshot)

    async def exists(self, snapshot: Snapshot) -> None:
        await trio.lowlevel.checkpoint()
        if snapshot in self.removed:
            raise SnapshotNotFoundError("read", str(snapshot), "there is no such snapshot")


@pytest.fixture
def snapshots() -> Store:
    return Store()


@asynccontextmanager
async def pool_of(store: Store, *, max_idle: int = 32) -> AsyncIterator[SnapshotPool[str]]:
    async with trio.open_nursery() as nursery:
        yield SnapshotPool(store.reader, store.exists, nursery, max_idle=max_idle)
        nursery.cancel_scope.cancel()


async def test_a_snapshot_stays_open_for_60_seconds_after_its_last_use(
    snapshots: Store, autojump_clock: MockClock
) -> None:
    async with pool_of(snapshots) as pool:
        async with pool.use(A) as value:
            assert value == f"contents of {A}"
            await trio.sleep(1000)
            assert snapshots.open == {A}
        await trio.sleep(59)
        assert snapshots.open == {A}
        await trio.sleep(2)
        assert snapshots.open == set()
        assert len(pool) == 0


async def test_a_use_in_the_meantime_begins_the_60_seconds_anew(snapshots: Store, autojump_clock: MockClock) -> None:
    async with pool_of(snapshots) as pool:
        for _ in range(4):
            async with pool.use(A):
                pass
            await trio.sleep(50)
        assert snapshots.opened == [A]
        await trio.sleep(11)
        assert snapshots.open == set()


async def test_a_snapshot_that_was_closed_is_opened_again(snapshots: Store, autojump_clock: MockClock) -> None:
    async with pool_of(snapshots) as pool:
        async with pool.use(A):
            pass
        await trio.sleep(61)
        async with pool.use(A):
            assert snapshots.open == {A}
        assert snapshots.opened == [A, A]


async def test_many_users_at_once_cause_one_opening(snapshots: Store, autojump_clock: MockClock) -> None:
    snapshots.blocked = trio.Event()
    async with pool_of(snapshots) as pool:

        async def one() -> None:
            async with pool.use(A):
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(one)
            await trio.sleep(5)
            snapshots.blocked.set()
        assert snapshots.opened == [A]


async def test_a_user_who_is_cancelled_while_waiting_keeps_nothing_open(
    snapshots: Store, autojump_clock: MockClock
) -> None:
    snapshots.blocked = trio.Event()
    async with pool_of(snapshots) as pool:
        with trio.move_on_after(1) as scope:
            await pool.acquire(A)
        assert scope.cancelled_caught
        snapshots.blocked.set()
        await trio.sleep(62)
        assert snapshots.opened == [A]
        assert snapshots.open == set()


async def test_idle_snapshots_beyond_the_limit_are_closed_oldest_first(
    snapshots: Store, autojump_clock: MockClock
) -> None:
    many = [GROUP.at(1_000_000_000 + number) for number in range(6)]
    async with pool_of(snapshots, max_idle=2) as pool:
        held = await pool.acquire(many[0])
        for snapshot in many[1:]:
            async with pool.use(snapshot):
                await trio.sleep(1)
        await trio.sleep(0.1)
        assert snapshots.open == {many[0], many[4], many[5]}
        held.release()


async def test_a_failed_opening_reaches_every_waiter_and_is_tried_again(
    snapshots: Store, autojump_clock: MockClock
) -> None:
    snapshots.blocked = trio.Event()
    snapshots.broken = LockedError("read", str(A), "it is being removed")
    caught = []
    async with pool_of(snapshots) as pool:

        async def one() -> None:
            with pytest.raises(LockedError):
                await pool.acquire(A)
            caught.append(1)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one)
            await trio.sleep(1)
            snapshots.blocked.set()
        assert len(caught) == 3
        snapshots.broken = None
        async with pool.use(A):
            assert snapshots.open == {A}


async def test_a_fault_while_opening_one_snapshot_leaves_the_others_usable(
    snapshots: Store, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with pool_of(snapshots) as pool:
        snapshots.broken = ZeroDivisionError("a fault")
        with caplog.at_level(logging.CRITICAL), pytest.raises(ZeroDivisionError):
            await pool.acquire(A)
        snapshots.broken = None
        async with pool.use(B):
            assert snapshots.open == {B}


async def test_a_lease_of_a_removed_snapshot_becomes_stale_and_the_snapshot_is_let_go(
    snapshots: Store, autojump_clock: MockClock
) -> None:
    async with pool_of(snapshots) as pool:
        lease = await pool.acquire(A)
        assert not lease.stale
        snapshots.removed.add(A)
        await trio.sleep(11)
        assert lease.stale
        assert snapshots.open == {A}
        lease.release()
        await trio.sleep(0.1)
        assert snapshots.open == set()


async def test_a_removed_snapshot_that_is_open_still_is_not_used_anew(
    snapshots: Store, autojump_clock: MockClock
) -> None:
    async with pool_of(snapshots) as pool:
        lease = await pool.acquire(A)
        await trio.sleep(5)
        snapshots.removed.add(A)
        with pytest.raises(StaleError):
            await pool.acquire(A)
        with pytest.raises(SnapshotNotFoundError):
            await pool.acquire(A)
        lease.release()


async def test_a_snapshot_made_anew_under_the_same_name_is_opened_anew(
    snapshots: Store, autojump_clock: MockClock
) -> None:
    async with pool_of(snapshots) as pool:
        old = await pool.acquire(A)
        snapshots.removed.add(A)
        await old.look()
        snapshots.removed.clear()
        old.release()
        await trio.sleep(0.1)
        async with pool.use(A):
            assert snapshots.opened == [A, A]
        assert old.stale


async def test_not_being_able_to_look_makes_nothing_stale(snapshots: Store, autojump_clock: MockClock) -> None:
    async def unreachable(snapshot: Snapshot) -> None:
        raise FormatError("list", str(snapshot), "the network is down")

    async with trio.open_nursery() as nursery:
        pool = SnapshotPool(snapshots.reader, unreachable, nursery)
        lease = await pool.acquire(A)
        await trio.sleep(100)
        assert not lease.stale
        nursery.cancel_scope.cancel()


async def test_releasing_twice_counts_once(snapshots: Store, autojump_clock: MockClock) -> None:
    async with pool_of(snapshots) as pool:
        first, second = await pool.acquire(A), await pool.acquire(A)
        first.release()
        first.release()
        await trio.sleep(100)
        assert snapshots.open == {A}
        second.release()
