"""The flavour PROVIDED: somebody else has made the frozen view, and hands over where it is to be read.

So the backup job of Proxmox VE does with a backup provider (mechanism `nbd`): it sets the view up, exports every device
together with its bitmap at a unix socket, and ends all that itself, by whether the backup failed. Nothing is changed
here. docs/hypervisor.md, "Flavours".
"""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from core.disks import Extent, ReadPlan
from core.errors import UsageError
from hypervisor.bitmaps import BaseInfo, BaseOf
from hypervisor.checked import printable
from hypervisor.discovery import Capabilities
from hypervisor.disk_names import archive_name, given_name
from hypervisor.errors import DiskNameError, FleecingError
from hypervisor.flavours import FlavourName
from hypervisor.live_source import LiveSource, read_dirty_map
from hypervisor.nbd_client import NbdAddress, open_nbd
from hypervisor.view import FrozenView

#: Backup providers came with Proxmox VE 9.
_VERSION: Final = (10, 0, 0)


class ProvidedBitmap(Enum):
    """What the dirty bitmap of a device is good for."""

    NONE = "none"  #: there is none: everything is read
    NEW = "new"  #: it starts with this view: everything is read
    REUSE = "reuse"  #: it says what has changed since the last backup, and nothing else can be read


@dataclass(frozen=True, slots=True)
class ProvidedDisk:
    """One device that is handed over."""

    device: str  #: its name, and that of its export: `drive-scsi0`
    size: int  #: bytes
    bitmap_mode: ProvidedBitmap = ProvidedBitmap.NONE

    @property
    def archive(self) -> str:
        """`drive-scsi0.img`.

        Raises:
            DiskNameError: no name for an archive.
        """
        return archive_name(self.device.removeprefix("drive-"))


@asynccontextmanager
async def provided_view(
    socket: Path,
    disks: Sequence[ProvidedDisk],
    *,
    bitmap: str | None,
    base_of: BaseOf,
    names: Mapping[str, str] | None = None,
    qemu_version: tuple[int, int, int] = _VERSION,
) -> AsyncIterator[FrozenView]:
    """The devices as they are handed over, to be read while the block runs. What `commit` says is the caller's to use.

    Args:
        socket: of the NBD server.
        disks: the devices.
        bitmap: name of the bitmaps that go along with the exports; None if there are none.
        base_of: what the previous snapshot has of an archive, or why there is nothing to count on. Where a bitmap is
            to be used again it must be the backup that the bitmap counts from: who asked for it has to see to that.
        names: archive names by device, where they are to be others; `NAME.img` is taken as it is.
        qemu_version: of the QEMU behind the socket.

    Raises:
        UsageError: a bitmap without a name, a size that no disk has, or no device at all.
        DiskNameError: two devices of one name, or a name that cannot be used.
        FleecingError: a bitmap is to be used again, and there is nothing to count on; or another size than was said.
        SourceError: an export cannot be opened, or its map not be read.
    """
    able = Capabilities(qemu_version, FlavourName.PROVIDED.value, compat=qemu_version < (8, 2, 0))
    archives = _archives(disks, names or {})
    view = FrozenView(FlavourName.PROVIDED, able, instant=time.time())
    async with AsyncExitStack() as stack:
        for archive, disk in archives.items():
            address = NbdAddress.unix(socket, disk.device)
            plan = _plan(archive, disk, base_of)
            changed: list[Extent] | None = None
            if plan.base is not None:
                if not bitmap:
                    raise UsageError("use the bitmap of", disk.device, "its name was not given")
                changed = await read_dirty_map(address, bitmap, disk.size, disk.device)
            pool = await stack.enter_async_context(open_nbd(address, sparse=False))
            view.sources.append(
                LiveSource(archive, disk.size, plan, changed=changed, pool=pool, able=able, only_changed=True)
            )
        yield view


def _archives(disks: Sequence[ProvidedDisk], names: Mapping[str, str]) -> dict[str, ProvidedDisk]:
    if not disks:
        raise UsageError("back up", "the virtual machine", "it has no disk to be backed up")
    archives: dict[str, ProvidedDisk] = {}
    for disk in disks:
        if not 0 < disk.size < 1 << 63:
            raise UsageError("back up disk", printable(disk.device), f"a disk of {disk.size} bytes")
        archive = _named(names[disk.device]) if disk.device in names else disk.archive
        other = archives.setdefault(archive, disk)
        if other is not disk:
            raise DiskNameError(
                "name the disks", printable(disk.device), f"it and {printable(other.device)} would both be {archive}"
            )
    return archives


def _named(name: str) -> str:
    if name.endswith(".img") and not name.startswith("drive-"):
        return archive_name(name.removesuffix(".img")).removeprefix("drive-")
    return given_name(name)


def _plan(archive: str, disk: ProvidedDisk, base_of: BaseOf) -> ReadPlan:
    """What is read of a device.

    Raises:
        FleecingError: only what changed can be read, and nobody knows since when.
    """
    base = base_of(archive)
    if disk.bitmap_mode is not ProvidedBitmap.REUSE:
        none = disk.bitmap_mode is ProvidedBitmap.NONE
        why = base if isinstance(base, str) else "no dirty bitmap" if none else "no dirty bitmap yet"
        return ReadPlan(None, why)
    why = base if isinstance(base, str) else _other_size(disk, base)
    if why or isinstance(base, str):
        raise FleecingError(
            "back up disk",
            disk.device,
            f"only what its bitmap calls changed can be read, and there is nothing to count on: {why}",
            "back it up with a new bitmap",
        )
    return ReadPlan(base.ctime, "")


def _other_size(disk: ProvidedDisk, base: BaseInfo) -> str:
    return "" if base.size == disk.size else f"size changed from {base.size} to {disk.size} B"
