"""Reading and writing an NBD export with libnbd.

A pool holds a few connections to one export; each is used by one thread at a time. A server that stops answering is
given up after `timeout_s`, and a cancelled call closes its connection at once, so that no late reply can touch the
caller's buffer.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import trio

from core.buffers import Buffer, WritableBuffer
from core.limits import in_io_thread
from hypervisor.nbd_address import NbdAddress, is_nbd_uri
from hypervisor.nbd_connection import (
    COMPAT_PIECE,
    READ_DEPTH,
    READ_PIECE,
    TIMEOUT_S,
    NbdConnection,
    NbdSourceError,
    NbdTargetError,
)

__all__ = [
    "COMPAT_PIECE",
    "TIMEOUT_S",
    "NbdAddress",
    "NbdConnection",
    "NbdPool",
    "NbdSourceError",
    "NbdTargetError",
    "StatusExtent",
    "is_nbd_uri",
    "open_nbd",
]

#: Two connections with one 4 MiB request each read as fast as the memory allows; more only hurt the caches.
CONNECTIONS: Final = 2
COMPAT_DEPTH: Final = 16


class StatusExtent(NamedTuple):
    """A range with the flags a metadata context gives it."""

    offset: int
    length: int
    flags: int


class NbdPool:
    """A few connections to one export; made by `open_nbd`, safe to be used by many tasks.

    Every call raises `NbdSourceError` (a `SourceError`), or `NbdTargetError` (a `TargetError`) for a pool that was
    opened for writing. A lost connection breaks the whole pool. A cancelled call leaves the pool usable.
    """

    def __init__(self, connections: list[NbdConnection]) -> None:
        first = connections[0]
        self.address = first.address
        self.size = first.size  #: bytes
        self.read_only = first.read_only
        self.can_trim, self.can_zero, self.can_flush = first.can_trim, first.can_zero, first.can_flush
        self.block = first.block  #: bytes, the server's smallest unit
        self._contexts = first.offered
        self._free = list(connections)
        self._slots = trio.Semaphore(len(connections))
        self._broken: NbdSourceError | NbdTargetError | None = None
        self._closed = False

    async def read_into(
        self, offset: int, buffer: WritableBuffer, *, piece: int = READ_PIECE, depth: int = READ_DEPTH
    ) -> None:
        """Fill `buffer` from `offset` on; cancelled or failed, its content is undefined but no longer written to.

        No request crosses a multiple of `piece` (a power of two); `depth` requests are in flight.
        """
        view = memoryview(buffer).cast("B")
        await self._use(lambda connection: connection.read_into(offset, view, piece, depth))

    async def pread_pieces(
        self, offset: int, buffer: WritableBuffer, piece: int = COMPAT_PIECE, depth: int = COMPAT_DEPTH
    ) -> None:
        """`read_into` in small aligned requests, for QEMU before 8.2."""
        await self.read_into(offset, buffer, piece=piece, depth=depth)

    async def block_status(self, offset: int, length: int, context: str) -> list[StatusExtent]:
        """The range's extents in a metadata context that was named when the pool was opened, equal neighbours merged.

        The whole list is in memory; `extents` is for whole disks.
        """
        found: list[StatusExtent] = []

        def keep(at: int, size: int, flags: int) -> None:
            last = found[-1] if found else None
            if last is not None and last.flags == flags:
                found[-1] = StatusExtent(last.offset, last.length + size, flags)
            else:
                found.append(StatusExtent(at, size, flags))

        await self.each_status(offset, length, context, keep)
        return found

    async def each_status(self, offset: int, length: int, context: str, sink: Callable[[int, int, int], None]) -> None:
        """Call `sink(offset, length, flags)`, in a thread, for the extents of the range in order and without gaps."""
        await self._use(lambda connection: connection.block_status(offset, length, context, sink))

    async def write(self, offset: int, data: Buffer) -> None:
        """Write `data` at `offset`; cancelled, any part of it may be written."""
        view = memoryview(data).cast("B")
        await self._use(lambda connection: connection.write(offset, view))

    async def trim(self, offset: int, length: int) -> None:
        """Give the range up; requests end at multiples of 1 GiB, else exactly where the range does."""
        await self._use(lambda connection: connection.trim(offset, length))

    async def zero(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        """Make the range read as zeros; with `may_trim` without allocating it where the server can."""
        await self._use(lambda connection: connection.zero(offset, length, may_trim=may_trim))

    async def flush(self) -> None:
        """Make everything written durable; no-op on a server that cannot."""
        # With several connections the server promises (multi-conn) that one flush covers the writes of all.
        await self._use(lambda connection: connection.flush())

    def has_context(self, context: str) -> bool:
        """Whether the server offers a metadata context that was named when the pool was opened."""
        return context in self._contexts

    def close(self) -> None:
        """Close all connections. Nobody may be using them."""
        self._closed = True
        for connection in self._free:
            connection.close()

    async def _use(self, work: Callable[[NbdConnection], None]) -> None:
        async with self._slots:
            if self._broken is not None:
                raise self._broken.again() from self._broken
            connection = self._free.pop()
            try:
                await in_io_thread(self._work, connection, work)
            except (NbdSourceError, NbdTargetError) as error:
                if error.lost:
                    self._broken = error
                raise
            finally:
                self._free.append(connection)
                if self._closed:
                    connection.close()

    def _work(self, connection: NbdConnection, work: Callable[[NbdConnection], None]) -> None:
        if not connection.is_open:  # a cancelled call closed it
            connection.connect()
            if connection.size != self.size:
                connection.close()
                raise connection.changed()
        work(connection)


@asynccontextmanager
async def open_nbd(
    address: NbdAddress,
    *,
    connections: int = CONNECTIONS,
    contexts: tuple[str, ...] = (),
    sparse: bool = True,
    writable: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> AsyncIterator[NbdPool]:
    """Connect to the export at `address`; all connections are closed when the block ends, however it ends.

    More than one connection is made only to a server that offers that (multi-conn): others may let the second wait
    for ever. `contexts` are metadata contexts for `block_status`; QEMU wants at most one per connection. With `sparse`
    False the server sends holes as zeros: QEMU then asks its disk for no map before each read, and answers a fault of
    the disk with an error, where it otherwise drops the connection.
    `timeout_s` is how long the server may let a request wait, and how long connecting may take.

    Raises:
        NbdSourceError: no server, no such export, nonsense from the server, or silence; `NbdTargetError` instead with
            `writable`, also if the export is read-only.
    """
    fault: type[NbdSourceError] | type[NbdTargetError] = NbdTargetError if writable else NbdSourceError

    def make() -> NbdConnection:
        return NbdConnection(address, contexts=contexts, sparse=sparse, timeout_s=timeout_s, fault=fault)

    opened: list[NbdConnection] = []
    try:
        for _ in range(max(1, connections)):
            if opened and not opened[0].multi_conn:
                break
            connection = make()
            opened.append(connection)
            await in_io_thread(connection.connect)
            if connection.size != opened[0].size:
                raise connection.changed()
            if writable and connection.read_only:
                raise NbdTargetError("write to", str(address), "the export is read-only")
        pool = NbdPool(opened)
        try:
            yield pool
        finally:
            pool.close()
    finally:
        for connection in opened:
            connection.close()
