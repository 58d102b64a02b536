"""Disks to be held ready or served: those of a running virtual machine as of one instant, those of a snapshot."""

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio

from agent.documents import find_snapshot
from agent.libvirt_vm import check_idle
from agent.nbd_holder import Offer, OfferedDisk
from agent.places import private_run_dir
from agent.snapshot_archives import OpenSnapshot, open_snapshot
from agent.vm_backup import finished_lookup, usable_base, vm_target, wanted_flavour
from agent.vm_settings import VmSettings
from core.buffers import Buffer
from core.errors import NotFoundError, UsageError
from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.names import Group, Namespace, complete_archive_name, strip_archive_type
from hypervisor.bitmaps import BaseInfo, BaseOf, BitmapMode, Finished, target_id
from hypervisor.dirty_regions import Region, regions_of
from hypervisor.discovery import capabilities
from hypervisor.errors import VmUnsupportedError
from hypervisor.live_source import LiveSource
from hypervisor.nbd_address import NbdAddress
from hypervisor.nbd_server import serve_disk
from hypervisor.pause import Pause
from hypervisor.qmp import connect
from hypervisor.unix_socket import Peer
from hypervisor.vm import frozen_view
from repository.archive import ArchiveReader, open_archive_reader, open_cache
from repository.interface import Repository

#: Ends the names of indexes of disk images.
_IMAGE_INDEX: Final = ".img.fidx"
#: QEMU from which on discards of any kind may be sent to an export.
_ANY_DISCARD: Final = (9, 1, 0)


# -- of a snapshot ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageDisk:
    """A disk image of a snapshot, as something to be served."""

    reader: ArchiveReader
    block: int = 1  #: bytes; behind an image that ends within a block come zeros up to the block's end

    @property
    def size(self) -> int:
        """Bytes."""
        return -(-self.reader.size // self.block) * self.block

    async def read(self, offset: int, length: int) -> Buffer:
        """As `ServedDisk.read`."""
        if (behind := offset + length - self.reader.size) > 0:
            there = max(0, length - behind)
            return bytes(await self.read(offset, there)) + bytes(length - there) if there else bytes(length)
        answer = self.reader.read_cached(offset, length)
        return await self.reader.read(offset, length) if answer is None else answer

    def zeros(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """As `ServedDisk.zeros`: chunks of zeros are never read, so they are known to be that."""
        index = self.reader.archive.index
        parts: list[tuple[int, bool]] = []
        end = min(offset + length, self.reader.size)
        if offset >= end:
            return [(length, True)]
        while offset < end:
            number = index.find(offset)
            start, size = index.span(number)
            stop = min(end, start + size)
            zero = self.reader.is_zero(number)
            if parts and parts[-1][1] is zero:
                parts[-1] = (parts[-1][0] + stop - offset, zero)
            else:
                parts.append((stop - offset, zero))
            offset = stop
        return parts


@dataclass(frozen=True, slots=True)
class ServedImage:
    """A disk of a snapshot that is about to be served."""

    disk: ImageDisk
    snapshot: str
    name: str  #: of the archive: `drive-scsi0.img`
    csum: str  #: of its index: another content has another one

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.snapshot} {self.name}"


#: Serves a disk while the block runs, and tells where.
Serving: TypeAlias = Callable[[ServedImage], AbstractAsyncContextManager[NbdAddress]]


def _privately(image: ServedImage) -> AbstractAsyncContextManager[NbdAddress]:
    return serve_disk(image.disk, where=image.where)


@asynccontextmanager
async def backup_offer(
    opening: AbstractAsyncContextManager[Repository],
    text: str,
    archives: Sequence[str],
    *,
    ns: Namespace,
    codec: ChunkCodec,
    cache_size: int,
    serve: "Serving | None" = None,
) -> AsyncIterator[Offer]:
    """The disk images of the snapshot `text`, served read-only while the block runs; it cannot be removed meanwhile.

    Args:
        opening: the repository.
        text: `type/id/time` or `type/id/latest`.
        archives: their names, with or without type extensions; none: all of the snapshot.
        ns: the namespace.
        codec: with the key, if there is one.
        cache_size: bytes of decoded chunks that are kept.
        serve: serves one disk; None: on a private unix socket.

    Raises:
        NotFoundError, UsageError: no such snapshot or archive, or one that is no disk image.
        FleeceError: it cannot be read or served.
    """
    async with AsyncExitStack() as stack:
        repository = await stack.enter_async_context(opening)
        snapshot = await find_snapshot(repository, text, ns)
        cache = await stack.enter_async_context(open_cache(cache_size))
        progress = Progress()
        opened = await stack.enter_async_context(open_snapshot(repository, snapshot, codec, cache, progress))
        disks = []
        for filename in images(opened, archives):
            opened.needs_key(opened.manifest.file(filename))
            reader = await open_archive_reader(opened.reader, opened.codec, opened.manifest, filename, cache)
            name = strip_archive_type(filename)
            served = ServedImage(ImageDisk(reader), str(snapshot), name, reader.archive.entry.csum.hex())
            address = await stack.enter_async_context((serve or _privately)(served))
            disks.append(OfferedDisk(name, address, reader.size, [Region(0, reader.size)]))
        source = {
            "type": "backup",
            "repository": repository.name,
            "ns": str(snapshot.group.ns),
            "snapshot": str(snapshot),
        }
        yield Offer(source, disks, progress.warnings)


def images(opened: OpenSnapshot, names: Sequence[str]) -> list[str]:
    """Full names of the disk images `names`, or of all that the snapshot has.

    Raises:
        NotFoundError: it has none of that name, or none at all.
        UsageError: an archive that is no disk image, or one that is named twice.
    """
    there = [file.filename for file in opened.manifest.files]
    have = [name for name in there if name.endswith(_IMAGE_INDEX)]
    if not have:
        raise NotFoundError("connect the disks of", str(opened.snapshot), "it has no disk image")
    found: list[str] = []
    for name in names:
        full = complete_archive_name(name)
        hint = f"its disk images are {', '.join(map(strip_archive_type, have))}"
        if full not in have:
            if full in there or name in opened.archives:
                raise UsageError("connect", opened.where(name), "it is no disk image", hint)
            raise NotFoundError("connect", opened.where(name), "the snapshot has no archive of that name", hint)
        if full in found:
            raise UsageError("connect", opened.where(name), "it is named twice")
        found.append(full)
    return found or have


# -- of a running virtual machine -------------------------------------------------------------------------------------


@asynccontextmanager
async def vm_offer(
    settings: VmSettings,
    *,
    changed: "tuple[AbstractAsyncContextManager[Repository], Group] | None" = None,
    discard: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> AsyncIterator[Offer]:
    """The disks of a running VM as of this instant, while the block runs; the guest goes on.

    The VM's dirty bitmaps are afterwards as if nothing had been read.

    Args:
        settings: the VM.
        changed: repository and group: tell what changed since the newest backup there. None: without.
        discard: the disks are given up in parts by discards of any kind.
        say: called with a few words at each step.

    Raises:
        VmUnsupportedError: its QEMU is too old for it.
        VmStateError: libvirt is at work on it.
        FleeceError: as `hypervisor.vm.frozen_view`.
    """
    settings = await settings.looked_up()
    await check_idle(settings)
    peer = await _check(settings, discard=discard)
    target = target_id("nbd", os.urandom(8).hex())
    base_of: BaseOf = _nothing
    finished: Finished = _never
    mode, number = BitmapMode.NONE, int(time.time())
    warnings: list[str] = []
    async with AsyncExitStack() as stack:
        if changed is not None:
            repository = await stack.enter_async_context(changed[0])
            group = changed[1]
            target = await vm_target(repository, group)
            base_of, newest = await _base_lookup(repository, group)
            finished = finished_lookup(repository, group)
            mode, number = BitmapMode(settings.bitmap), max(number, newest + 1)
        view = await stack.enter_async_context(
            frozen_view(
                str(settings.monitor),
                target=target,
                new_id=number,
                base_of=base_of,
                finished=finished,
                scratch=settings.scratch,
                run_dir=private_run_dir(),
                disks=settings.selection,
                bitmap_mode=mode,
                guest_agent=settings.guest_agent,
                mount_points=settings.freeze_mounts,
                pause=Pause(settings.pause),
                flavour=wanted_flavour(settings),
                tpm_state=settings.section.tpm_state,
                on_step=say,
            )
        )
        warnings += view.warnings
        source = {
            "type": "vm",
            "vm": settings.label,
            "qmp": settings.monitor,
            "instant": round(view.instant, 3),
            "flavour": view.flavour.value,
        }
        yield Offer(source, [_offered(one) for one in view.sources], warnings, lambda: _until_ended(peer))


def _offered(source: LiveSource) -> OfferedDisk:
    if source.changed is None:
        return OfferedDisk(source.name, source.address, source.size, [Region(0, source.size)])
    regions = regions_of(source.changed)
    return OfferedDisk(source.name, source.address, source.size, regions, sum(length for _, length in regions))


async def _check(settings: VmSettings, *, discard: bool) -> Peer:
    """Who QEMU is; refuses what would read garbage, or end it."""
    async with connect(str(settings.monitor)) as qmp:
        able = await capabilities(qmp)
        version = ".".join(map(str, able.version))
        if able.compat:
            raise VmUnsupportedError(
                "connect the disks of", settings.label,
                f"its QEMU is {version}, whose frozen views give wrong data to readers of any kind",
                "8.2 is the oldest for this; 'fleece vm backup' works, and a backup can be connected",
            )  # fmt: skip
        if discard and able.version < _ANY_DISCARD:
            raise VmUnsupportedError(
                "connect the disks for discards of", settings.label,
                f"its QEMU is {version}, which an unaligned discard would end", "leave --discard out",
            )  # fmt: skip
        return qmp.peer


async def _until_ended(peer: Peer) -> str:
    """Return when QEMU has ended; everything else about it shows where its disks are read."""
    try:
        descriptor = os.pidfd_open(peer.pid)
    except OSError:
        if not peer.alive():
            return "the VM's QEMU has ended"
        await trio.sleep_forever()  # it is hidden from us
    try:
        if peer.alive():
            await trio.lowlevel.wait_readable(descriptor)
        return "the VM's QEMU has ended"
    finally:
        os.close(descriptor)


def _nothing(archive: str) -> str:
    return "only what is there now was asked for"


async def _never(ctime: int) -> bool:
    return False


async def _base_lookup(repository: Repository, group: Group) -> tuple[BaseOf, int]:
    """What the newest usable snapshot has of each disk, and its backup time (0 without one)."""
    base = await usable_base(repository, group)
    if base is None:
        return lambda archive: "there is no backup to count from", 0
    sizes = {file.filename: file.size for file in (await repository.snapshot(base)).files}

    def base_of(archive: str) -> BaseInfo | str:
        size = sizes.get(complete_archive_name(archive))
        return "disk is not in the newest backup" if size is None else BaseInfo(base.ctime, size)

    return base_of, base.ctime
