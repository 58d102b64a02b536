"""A file archive as a folder of the mount: its entries, found and listed where the kernel asks for them.

Entries have no nodes: an entry's inode number says where in which archive it lies (`fusefs.inodes`), so a million of
them take no memory. Nothing here knows the kernel: `fusefs.operations` does.
"""

from collections.abc import Callable, Sequence
from typing import Final, TypeVar
from weakref import ref

import trio

from core.errors import FleeceError
from fusefs.archive_bytes import NotAtHand
from fusefs.errors import StaleError
from fusefs.nodes import Owner, Stored
from fusefs.opened import Content, OpenSnapshot, RangeContent
from fusefs.opened_archive import ROOT, Links, OpenArchive, Spot
from fusefs.pool import Lease, Trace
from pxar.listing import Row
from repository.interface import FileInfo

T = TypeVar("T")

#: Entries that are read at once; a reply to the kernel holds 25 to 200.
_RUN: Final = 64
#: Seconds that who asks for a file waits for the number of its names.
COUNT_S: Final = 2.0


class FileArchive(Stored):
    """A file archive, shown as a folder; `parts` is its index, or the two of a split one."""

    def __init__(self, folder: Owner, path: bytes, parts: Sequence[FileInfo]) -> None:
        super().__init__(folder, path)
        self.parts: Final = parts
        self.links: Final = Links()
        self.row: Row | None = None  #: of its root, when it was read
        self._trace: Trace[OpenSnapshot] | None = None
        self._opened: ref[OpenArchive] | None = None
        self._counting = False

    async def measure(self) -> None:
        """See `Stored.measure`."""
        if not self.exact:
            self.row = await self.ask(lambda opened: opened.row(ROOT))
            self.exact = True

    def ask_now(self, question: Callable[[OpenArchive], T]) -> T:
        """As `ask`, without waiting.

        Raises:
            NotAtHand: that cannot be done.
            FleeceError: as `ask`.
        """
        opened = self._opened() if self._opened is not None else None
        if opened is None or self._trace is None or self._trace.value is None:
            raise NotAtHand
        self.shared.recent.use(opened)
        return question(opened)

    async def ask(self, question: Callable[[OpenArchive], T]) -> T:
        """The answer to `question`, which is put again for each chunk that has to be fetched for it.

        Raises:
            StaleError: the snapshot was removed, or made anew.
            FleeceError: a chunk cannot be read, or the archive is not sound there.
        """
        try:
            return self.ask_now(question)
        except NotAtHand:
            pass
        lease, opened = await self._acquire()
        try:
            return await opened.settle(question)
        except FleeceError:
            # A chunk may be missing because its snapshot was removed and garbage collected.
            await lease.look()
            if lease.stale:
                raise StaleError("read", str(self.snapshot), "the snapshot was removed") from None
            raise
        finally:
            lease.release()

    async def open(self, spot: Spot) -> tuple[Lease[OpenSnapshot], Content] | None:
        """Open the file at `spot` for reading, None if it is none; the caller releases the lease.

        Raises:
            FleeceError: as `ask`.
        """
        lease, opened = await self._acquire()
        try:
            place = await opened.settle(lambda opened: opened.content(spot))
        except BaseException:
            lease.release()
            raise
        if place is None:
            lease.release()
            return None
        return lease, RangeContent(*place)

    async def count(self) -> None:
        """Wait until it is known how many names files have, or will not be known soon.

        The first to ask causes the search for hard links. Listing names does not, as it would take longer.
        """
        if not self._counting:
            self._counting = True
            self.shared.pool.start_soon(self._count_links)
        with trio.move_on_after(COUNT_S):
            await self.links.counted.wait()

    async def _count_links(self) -> None:
        try:
            lease, opened = await self._acquire()
            try:
                await opened.count_links(self.links)
            finally:
                lease.release()
        finally:
            self.links.counted.set()

    async def _acquire(self) -> tuple[Lease[OpenSnapshot], OpenArchive]:
        lease = self._trace.lease() if self._trace is not None else None
        opened = self._opened() if lease is not None and self._opened is not None else None
        if lease is None:
            lease = await self.shared.pool.acquire(self.snapshot)
        try:
            if opened is None:
                index, *payload = (part.filename for part in self.parts)
                opened = await lease.value.archive(index, *payload)
                self._is(opened.csums)
                self._trace, self._opened = lease.trace(), ref(opened)
            self.shared.recent.use(opened)
        except BaseException:
            lease.release()
            raise
        return lease, opened


class Cursor:
    """An open listing of the directory at `spot` of `archive`.

    What cannot be read is left out, and its error comes at the end: who lists sees everything else, and that it is not
    all.
    """

    def __init__(self, archive: FileArchive, spot: Spot) -> None:
        self.archive: Final = archive
        self.spot: Final = spot
        self._first = 0  # number of the first entry in `_run`
        self._run: list[tuple[bytes, Row]] = []
        self._next = self._behind = 0  # of what follows it: its number, and where the entry before ends
        self._error: FleeceError | None = None

    async def open(self) -> None:
        """Make sure that it can be listed.

        Raises:
            FleeceError: it cannot.
        """
        await self.archive.ask(lambda opened: opened.listing(self.spot))

    def rows_now(self, first: int) -> tuple[int, Sequence[tuple[bytes, Row]]] | None:
        """As `rows` if it needs no waiting, else None."""
        held = first - self._first
        if 0 <= held < len(self._run):
            return first, self._run[held:]
        try:
            return self._take(first, self.archive.ask_now(lambda opened: self._read(opened, first)))
        except (NotAtHand, FleeceError):
            return None

    async def rows(self, first: int) -> tuple[int, Sequence[tuple[bytes, Row]]]:
        """Entries from number `first` on, as many as come easily, with the number of the first; none at the end.

        Raises:
            FleeceError: at the end, if some could not be read.
        """
        found = self.rows_now(first)
        number = first
        while found is None:
            try:
                found = self._take(number, await self.archive.ask(lambda opened, n=number: self._read(opened, n)))  # type: ignore[misc]
            except StaleError:
                raise
            except FleeceError as error:
                self._error = self._error or error
                number = await self.archive.ask(lambda opened, n=number: _next_readable(opened, self.spot, n))  # type: ignore[misc]
        if not found[1] and self._error is not None:
            raise self._error
        return found

    def _read(self, opened: OpenArchive, first: int) -> tuple[list[tuple[bytes, Row]], int]:
        listing = opened.listing(self.spot)
        if first >= len(listing):
            return [], 0
        behind = self._behind if first >= self._next else 0  # what was left out does not count
        return listing.rows(first, _RUN, behind, self.archive.links.note)

    def _take(self, first: int, answer: tuple[list[tuple[bytes, Row]], int]) -> tuple[int, Sequence[tuple[bytes, Row]]]:
        self._run, self._behind = answer
        self._first, self._next = first, first + len(self._run)
        return first, self._run


def _next_readable(opened: OpenArchive, spot: Spot, number: int) -> int:
    """The number of the entry to go on with where entry `number` cannot be read."""
    listing = opened.listing(spot)
    index = opened.archive.reader.archive.index
    end = 0
    if 0 <= (start := listing.start(number)) < index.size and index.find(start) == opened.archive.unreadable:
        # Nothing else in that chunk can be read either.
        end = sum(index.span(opened.archive.unreadable))
    number += 1
    while number < len(listing) and listing.start(number) < end:
        number += 1
    return number
