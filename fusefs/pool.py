"""Snapshots that are open for reading, shared by everything that uses them at the same time.

A snapshot is opened at its first use and stays open while a lease of it is held and `IDLE_S` longer, so that its
shared lock is neither taken for every read nor kept for ever. While it is open somebody looks now and then whether it
is still there: the lock keeps Fleece and a PBS on this host from removing it, but nothing else.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import trio

from core.errors import FleeceError
from datastore.errors import SnapshotNotFoundError
from datastore.names import Snapshot
from fusefs.errors import StaleError

T = TypeVar("T")

#: Seconds a snapshot stays open, and locked, after its last use.
IDLE_S: Final = 60.0
#: Snapshots kept open without being used; the one not used longest is closed first. Each may cost descriptors.
MAX_IDLE: Final = 32
#: Seconds between two looks whether an open snapshot is still there.
WATCH_S: Final = 10.0
#: Seconds for which such a look counts when a snapshot is used anew.
FRESH_S: Final = 1.0
_LOG = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Entry(Generic[T]):
    snapshot: Snapshot
    ready: trio.Event = field(default_factory=trio.Event)
    value: T | None = None
    error: Exception | None = None
    users: int = 0  #: leases, and callers that wait for one
    last_use: float = 0.0
    last_look: float = 0.0
    stale: bool = False
    #: Set to make the keeper look at the entry at once.
    wake: trio.Event = field(default_factory=trio.Event)


class Lease(Generic[T]):
    """One use of an open snapshot; made by `SnapshotPool.acquire`, ended by `release`."""

    __slots__ = ("_entry", "_pool", "_released", "value")

    def __init__(self, pool: "SnapshotPool[T]", entry: _Entry[T], value: T) -> None:
        self._pool, self._entry, self._released = pool, entry, False
        self.value: Final = value

    @property
    def stale(self) -> bool:
        """True once the snapshot was found to be removed."""
        return self._entry.stale

    async def look(self) -> None:
        """Look now whether the snapshot is still there; `stale` tells."""
        await self._pool.look(self._entry)

    def trace(self) -> "Trace[T]":
        """What leads to the same snapshot for as long as it is open, without keeping it so."""
        return Trace(self._pool, self._entry)

    def release(self) -> None:
        """End this use; once is enough."""
        if not self._released:
            self._released = True
            self._pool.released(self._entry)


class Trace(Generic[T]):
    """Leads to a snapshot that was in use, and may still be open; made by `Lease.trace`."""

    __slots__ = ("_entry", "_pool")

    def __init__(self, pool: "SnapshotPool[T]", entry: _Entry[T]) -> None:
        self._pool, self._entry = pool, entry

    @property
    def value(self) -> T | None:
        """The snapshot, if open and there lately; that counts as a use, which lasts to the next checkpoint."""
        entry = self._entry
        now = trio.current_time()
        if entry.stale or now - entry.last_look > WATCH_S:
            return None
        entry.last_use = now
        return entry.value

    def lease(self) -> Lease[T] | None:
        """A lease of the snapshot, without waiting; None if that cannot be had."""
        value = self.value
        if value is None:
            return None
        self._entry.users += 1
        return Lease(self._pool, self._entry, value)


class SnapshotPool(Generic[T]):
    """Opens snapshots with `open_snapshot` and closes them when nobody used them for `idle_s` seconds.

    Args:
        open_snapshot: opens one, for as long as the block runs.
        exists: raises SnapshotNotFoundError if a snapshot is not there any more.
        nursery: holds the open snapshots; cancelled, all are closed.
        idle_s: see `IDLE_S`.
        max_idle: see `MAX_IDLE`.
    """

    def __init__(
        self,
        open_snapshot: Callable[[Snapshot], AbstractAsyncContextManager[T]],
        exists: Callable[[Snapshot], Awaitable[object]],
        nursery: trio.Nursery,
        *,
        idle_s: float = IDLE_S,
        max_idle: int = MAX_IDLE,
    ) -> None:
        self._open, self._exists, self._nursery = open_snapshot, exists, nursery
        self._idle_s, self._max_idle = idle_s, max_idle
        self._entries: dict[Snapshot, _Entry[T]] = {}

    def __len__(self) -> int:
        """Snapshots open now."""
        return len(self._entries)

    async def acquire(self, snapshot: Snapshot) -> Lease[T]:
        """Use `snapshot`, opening it if need be; several callers cause one opening.

        Raises:
            SnapshotNotFoundError: it is not there any more.
            FleeceError: it cannot be opened; the next call tries again.

        Cancelled, nothing is held.
        """
        entry = self._entries.get(snapshot)
        if entry is None:
            entry = self._entries[snapshot] = _Entry(snapshot)
            self._nursery.start_soon(self._keep, entry)
        # Who waits counts as a user, so that nothing is closed under his hands.
        entry.users += 1
        try:
            await entry.ready.wait()
            if entry.error is not None:
                raise entry.error
            assert entry.value is not None
            if trio.current_time() - entry.last_look > FRESH_S:
                await self.look(entry)
            if entry.stale:
                raise StaleError("read", str(snapshot), "the snapshot was removed")
        except BaseException:
            self.released(entry)
            raise
        return Lease(self, entry, entry.value)

    @asynccontextmanager
    async def use(self, snapshot: Snapshot) -> AsyncIterator[T]:
        """`acquire` for the time of a block."""
        lease = await self.acquire(snapshot)
        try:
            yield lease.value
        finally:
            lease.release()

    def start_soon(self, work: Callable[[], Awaitable[object]]) -> None:
        """Run `work` beside everything else; it ends with the pool. A fault of it is logged."""

        async def run() -> None:
            try:
                await work()
            except Exception as error:
                _LOG.warning("%s", error, exc_info=None if isinstance(error, FleeceError) else error)

        self._nursery.start_soon(run)

    async def look(self, entry: _Entry[T]) -> None:
        """Find out whether the snapshot of `entry` is still there."""
        entry.last_look = trio.current_time()
        try:
            await self._exists(entry.snapshot)
        except SnapshotNotFoundError:
            entry.stale = True
            # Whoever comes now starts anew: a snapshot of that name may have been made since.
            if self._entries.get(entry.snapshot) is entry:
                del self._entries[entry.snapshot]
            entry.wake.set()
        except Exception as error:
            # Not being able to look says nothing about the snapshot, whose users must keep its lock.
            _LOG.debug("%s", error)

    def released(self, entry: _Entry[T]) -> None:
        """A lease of `entry` ended."""
        entry.users -= 1
        entry.last_use = trio.current_time()
        if entry.users:
            return
        if entry.stale:
            entry.wake.set()
        idle = [other for other in self._entries.values() if not other.users and other.ready.is_set()]
        if len(idle) > self._max_idle:
            oldest = min(idle, key=lambda other: other.last_use)
            del self._entries[oldest.snapshot]
            oldest.wake.set()

    async def _keep(self, entry: _Entry[T]) -> None:
        """Hold the snapshot open as long as it is needed."""
        try:
            async with self._open(entry.snapshot) as value:
                entry.value = value
                entry.last_use = entry.last_look = trio.current_time()
                entry.ready.set()
                await self._until_unused(entry)
        except FleeceError as error:
            if entry.ready.is_set():
                _LOG.warning("%s", error)
            entry.error = error
        except Exception as error:
            # A fault of ours must not end the other snapshots' use.
            _LOG.exception("cannot read %s", entry.snapshot)
            entry.error = error
        finally:
            entry.value = None
            if self._entries.get(entry.snapshot) is entry:
                del self._entries[entry.snapshot]
            entry.ready.set()

    async def _until_unused(self, entry: _Entry[T]) -> None:
        """Return when nobody uses the entry and it has been so for long enough, or it was dropped."""
        while True:
            now = trio.current_time()
            dropped = self._entries.get(entry.snapshot) is not entry
            if not entry.users and (dropped or now >= entry.last_use + self._idle_s):
                # No checkpoint from here to the removal, so that nobody gets an entry that is being closed.
                entry.value = None
                if not dropped:
                    del self._entries[entry.snapshot]
                return
            if entry.wake.is_set():
                entry.wake = trio.Event()
            if dropped:
                await entry.wake.wait()
                continue
            wait_until = now + WATCH_S if entry.users else entry.last_use + self._idle_s
            with trio.move_on_at(wait_until):
                await entry.wake.wait()
            if entry.users and trio.current_time() - entry.last_look >= WATCH_S:
                await self.look(entry)
