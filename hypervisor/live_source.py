"""A disk of a running VM as of one instant: a `DiskSource` over the NBD export of its frozen view.

docs/hypervisor.md, "Reading the frozen view".
"""

import bisect
import contextlib
import errno
from collections.abc import Sequence
from typing import Final

from core.buffers import WritableBuffer
from core.disks import Extent, ExtentState, ReadPlan
from core.errors import SourceError
from hypervisor.discovery import Capabilities
from hypervisor.errors import FleecingError, SnapshotBrokenError
from hypervisor.extents import ExtentBuilder
from hypervisor.nbd_client import NbdAddress, NbdPool, NbdSourceError, open_nbd

#: Bytes of a cluster of the copy-before-write filter. Before QEMU 9.1 a TRIM that cuts one aborts QEMU.
CBW_CLUSTER: Final = 64 * 1024
_ALLOCATION: Final = "base:allocation"
#: Flags of `base:allocation`: a hole that reads as zeros.
_HOLE_AND_ZERO: Final = 3
_DIRTY: Final = 1


async def read_dirty_map(address: NbdAddress, bitmap: str, size: int, where: str) -> list[Extent]:
    """The map export's bitmap as extents, CLEAN or DATA, of whole chunks.

    Raises:
        SourceError: it cannot be read, or the export has not `size` bytes.
    """
    context = f"qemu:dirty-bitmap:{bitmap}"
    builder = ExtentBuilder(size)

    def add(_offset: int, length: int, flags: int) -> None:
        builder.add(length, ExtentState.DATA if flags & _DIRTY else ExtentState.CLEAN)

    async with open_nbd(address, connections=1, contexts=(context,)) as pool:
        _check_size(pool, size, where)
        await pool.each_status(0, size, context, add)
    return builder.finish()


def _check_size(pool: NbdPool, size: int, where: str) -> None:
    if pool.size != size:
        raise FleecingError("back up disk", where, f"its size changed from {size} to {pool.size} B at this moment")


class LiveSource:
    """One disk; made by `vm.frozen_view`, usable as long as its block runs.

    Errors of `read_into` and `extents` are `SnapshotBrokenError` where the frozen view broke.
    """

    def __init__(
        self,
        name: str,
        size: int,
        plan: ReadPlan,
        *,
        changed: Sequence[Extent] | None,
        pool: NbdPool,
        able: Capabilities,
        only_changed: bool = False,
    ) -> None:
        """`only_changed`: of an incremental view nothing but what `changed` calls DATA can be read."""
        _check_size(pool, size, name)
        self.name: Final = name  #: the archive's, without its type extension
        self.size: Final = size  #: bytes; does not change, even if the guest's disk is resized
        self.plan: Final = plan  #: what `extents` is based on
        self._changed = changed
        self._pool = pool
        self._able = able
        self._only_changed = only_changed and changed is not None
        #: All of the disk was wanted, and could not be had.
        self.distrusted = False
        #: ZERO extents, sorted; QEMU was told to forget them, so they are never read from it.
        self._zeros: list[Extent] = []

    @property
    def address(self) -> NbdAddress:
        """The export that is read, for other programs; they see what was not given up by `extents` or `discard`."""
        return self._pool.address

    @property
    def changed(self) -> Sequence[Extent] | None:
        """What the dirty bitmap says: CLEAN, or DATA for what changed since `plan.base`; None without one."""
        return self._changed

    async def extents(self, *, incremental: bool = True) -> Sequence[Extent]:
        """The disk as extents of whole chunks.

        What is CLEAN or ZERO is given up: from then on the guest overwrites it without a copy being made first.

        Raises:
            SourceError: the map cannot be read, or all is wanted of a view that has only what changed.
        """
        if self._only_changed and not incremental:
            self.distrusted = True
            raise FleecingError(
                "read all of disk",
                self.name,
                "QEMU shows only what changed since the previous backup, and that backup is of no use",
                "try again: the next backup reads everything",
            )
        whole = [Extent(0, self.size, ExtentState.DATA)]
        known = list(self._changed) if incremental and self._changed is not None else whole
        if self._able.allocation_map:
            known = await self._with_zeros(known)
        self._zeros = [extent for extent in known if extent.state is ExtentState.ZERO]
        for extent in known:
            if extent.state is not ExtentState.DATA:
                await self.discard(extent.offset, extent.length)
        return known

    async def _with_zeros(self, known: Sequence[Extent]) -> list[Extent]:
        """`known` with those chunks of DATA as ZERO of which QEMU knows that they are."""
        builder = ExtentBuilder(self.size)

        def add(_offset: int, length: int, flags: int) -> None:
            zero = flags & _HOLE_AND_ZERO == _HOLE_AND_ZERO
            builder.add(length, ExtentState.ZERO if zero else ExtentState.DATA)

        try:
            # A connection of its own: with the context a failing request could end the data connections.
            async with open_nbd(self._pool.address, connections=1, contexts=(_ALLOCATION,)) as pool:
                _check_size(pool, self.size, self.name)
                for offset, length, state in known:
                    if state is ExtentState.DATA:
                        await pool.each_status(offset, length, _ALLOCATION, add)
                    else:
                        builder.add(length, state)
        except NbdSourceError as error:
            raise self._translated(error) from error
        return builder.finish()

    async def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill `buffer` from `offset` on; cancelled or failed, its content is undefined.

        Raises:
            SnapshotBrokenError: the frozen view broke.
            SourceError: QEMU is gone, or its storage fails.
        """
        view = memoryview(buffer).cast("B")
        end = offset + len(view)
        position = offset
        while position < end:
            stop, zero = self._next(position, end)
            part = view[position - offset : stop - offset]
            if zero:
                part[:] = bytes(len(part))
            else:
                await self._read(position, part)
            position = stop

    def _next(self, position: int, end: int) -> tuple[int, bool]:
        """Where the part of `position..end` that begins at `position` ends, and whether it is in a ZERO extent."""
        index = bisect.bisect_right(self._zeros, position, key=lambda extent: extent.offset)
        if index > 0:
            zero = self._zeros[index - 1]
            if position < zero.offset + zero.length:
                return min(end, zero.offset + zero.length), True
        return (min(end, self._zeros[index].offset) if index < len(self._zeros) else end), False

    async def _read(self, offset: int, buffer: memoryview) -> None:
        try:
            if self._able.compat:
                await self._pool.pread_pieces(offset, buffer)
            else:
                await self._pool.read_into(offset, buffer)
        except NbdSourceError as error:
            raise self._translated(error) from error

    async def discard(self, offset: int, length: int) -> None:
        """Give the range up; a last part that is no whole cluster is kept, since the disk may have grown behind it."""
        first = -(-offset // CBW_CLUSTER) * CBW_CLUSTER
        last = (offset + length) // CBW_CLUSTER * CBW_CLUSTER
        if last <= first:
            return
        # Only space is at stake: if something is wrong with the view the next read will tell.
        with contextlib.suppress(NbdSourceError):
            await self._pool.trim(first, last - first)

    def _translated(self, error: NbdSourceError) -> SourceError:
        if error.errno == errno.EINVAL:
            return SnapshotBrokenError(
                "read disk",
                self.name,
                "its frozen view broke: the fleecing image is full, too slow or unwritable",
                "the guest is not affected; look at the scratch folder's space and speed",
            )
        if error.lost:
            return FleecingError("read disk", self.name, f"QEMU has ended, or dropped its export ({error.why})")
        return FleecingError("read disk", self.name, error.why, "look at the storage of the VM's disk")
