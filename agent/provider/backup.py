"""A backup of Proxmox VE through its backup provider: one session for one guest, from `backup-init` on.

The session is a process, so that what a backup needs from one call of the plugin to the next has one place: the group's
lock, the repository and its keys. It is opened before the hypervisor asks what the dirty bitmaps are good for, since
only then is it settled which snapshot they would have to count from. docs/proxmox-provider.md, "What holds what".
"""

import os
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent.places import private_run_dir
from agent.provider.bitmaps import BitmapNote, BitmapNotes
from agent.provider.channel import Channel, ChannelProgress
from agent.provider.messages import (
    FIREWALL_CONFIG,
    GUEST_CONFIG,
    BackupContainer,
    BackupInit,
    BackupVm,
    GivenVolume,
    Nothing,
    QueryIncremental,
    parsed,
)
from agent.provider.storage import UsedStorage
from agent.sessions import new_session, until_listed
from agent.vm_backup import base_lookup
from core.disks import ReadPlan
from core.errors import FleeceError, SourceError, UsageError
from core.limits import in_io_thread
from datastore.names import Group
from hypervisor.bitmaps import BaseInfo, BaseOf
from hypervisor.errors import FleecingError
from hypervisor.handed_file import HandedFile, handed_file, regions_to_read
from hypervisor.live_source import LiveSource
from hypervisor.provided import ProvidedBitmap, ProvidedDisk, provided_view
from hypervisor.unix_socket import Peer, connect_unix, peer_of, process_start_time
from repository.backup import SnapshotWriter
from repository.report import BackupReport

if TYPE_CHECKING:
    from repository.interface import BackupSession, Repository

#: Seconds to wait for another backup of the same guest to end.
LOCK_WAIT_S: Final = 90.0


def archive_of(device: str) -> str:
    """The archive of a disk: `drive-scsi0.img`."""
    return f"{device}.img"


class GuestBackup:
    """One guest's backup; answers the calls of its session after `backup-init`."""

    def __init__(
        self,
        channel: Channel,
        storage: UsedStorage,
        init: BackupInit,
        repository: "Repository",
        session: "BackupSession",
        stream_fd: int | None,
    ) -> None:
        self._channel, self._storage, self._init = channel, storage, init
        self._repository, self._session, self._stream_fd = repository, session, stream_fd
        self._progress = ChannelProgress(channel)
        self._notes = BitmapNotes(private_run_dir(), storage.id, init.vmid)
        self._began = time.monotonic()
        self._report: BackupReport | None = None
        self._tried = False

    async def answer(self, call: str, parameters: object) -> dict[str, object]:
        """Do one call.

        Raises:
            UsageError: it is unknown, makes no sense, or its turn has not come.
            FleeceError: it failed.
        """
        match call:
            case "backup-vm-query-incremental":
                self._expect("qemu")
                return await self._query(parsed(QueryIncremental, parameters, call))
            case "backup-container-prepare":
                self._expect("lxc")
                parsed(Nothing, parameters, call)
                return {}
            case "backup-vm":
                self._expect("qemu")
                request = parsed(BackupVm, parameters, call)
                self._tried = True
                await self._back_up_vm(request)
                return {}
            case "backup-container":
                self._expect("lxc")
                container = parsed(BackupContainer, parameters, call)
                self._tried = True
                await self._back_up_container(container)
                return {}
            case "backup-cleanup":
                parsed(Nothing, parameters, call)
                if self._report is None:
                    raise UsageError("finish", str(self._session.snapshot), "nothing was backed up")
                return {"archive-size": sum(archive.size for archive in self._report.archives)}
        raise UsageError("answer", call, "it is no call of a backup")

    @property
    def finished(self) -> bool:
        """Whether the snapshot is listed: the session is needed no longer."""
        return self._report is not None

    def _expect(self, guest_type: str) -> None:
        if self._init.vmtype != guest_type:
            raise UsageError("back up", str(self._session.snapshot), f"the guest is of the type {self._init.vmtype}")
        if self._tried:
            raise UsageError("back up", str(self._session.snapshot), "that was done, or has failed, already")

    # --- what bitmaps are good for -----------------------------------------------------------------------------------

    async def _query(self, asked: QueryIncremental) -> dict[str, object]:
        note = await in_io_thread(self._notes.read)
        base_of = await self._bases()
        modes = {}
        for device, volume in asked.volumes.items():
            why = await self._why_all(note, device, volume.size, base_of)
            modes[device] = "new" if why else "use"
            if why:
                self._progress.log(f"{device} will be read as a whole: {why}")
        return {"volumes": modes}

    async def _why_all(self, note: BitmapNote | None, device: str, size: int, base_of: BaseOf) -> str:
        """Why a disk's bitmap, if it has one, says nothing about the base; empty if it does."""
        base = base_of(archive_of(device))
        if not isinstance(base, BaseInfo):
            return base
        if base.size != size:
            return f"size changed from {base.size} to {size} B"
        if note is None:
            return "nothing is known of its dirty bitmap"
        if note.target != await self._target():
            return "its dirty bitmap is that of another repository"
        if note.base != base.ctime:
            return "its dirty bitmap counts from another backup"
        return "" if device in note.devices else "no dirty bitmap yet"

    async def _bases(self) -> BaseOf:
        return await base_lookup(self._repository, self._group, self._storage.keys.codec, self._session.base)

    @property
    def _group(self) -> Group:
        return self._session.snapshot.group

    async def _target(self) -> str:
        return f"{await self._repository.identity()} {self._group.ns} {self._group}"

    # --- virtual machines --------------------------------------------------------------------------------------------

    async def _back_up_vm(self, request: BackupVm) -> None:
        peer = await self._qemu(request.volumes)
        base_of = await self._trusted_bases(request.volumes, peer)
        writer = self._writer()
        with until_listed(self._progress) as listed:
            async with AsyncExitStack() as stack:
                sources = await self._sources(stack, request.volumes, base_of)
                await self._add_configuration(writer, request.guest_config, request.firewall_config)
                try:
                    await writer.add_disks(sources, bwlimit=request.rate)
                except FleeceError:
                    if any(source.distrusted for source in sources):
                        await self._forget()  # so that the next backup gets new bitmaps
                    raise
                counted = [device for device, volume in request.volumes.items() if volume.bitmap_mode != "none"]
                ctime = self._session.snapshot.ctime
                await in_io_thread(self._notes.write, peer, await self._target(), ctime, counted)
                await writer.finish()
                listed(self._session.snapshot)
        self._done(writer)

    async def _trusted_bases(self, volumes: Mapping[str, GivenVolume], peer: Peer | None) -> BaseOf:
        """What the disks' bitmaps count from: the base, if that is what is noted."""
        note = await in_io_thread(self._notes.read)
        if note is not None and (peer is None or not note.is_of(peer)):
            note = None
        base_of = await self._bases()
        reasons = {}
        for device, volume in volumes.items():
            if volume.bitmap_mode == "reuse":
                reasons[archive_of(device)] = await self._why_all(note, device, volume.size, base_of)
        if any(reasons.values()):
            await self._forget()
        return lambda archive: reasons.get(archive) or base_of(archive)

    async def _forget(self) -> None:
        await in_io_thread(self._notes.write, None, "", 0, ())

    async def _sources(
        self, stack: AsyncExitStack, volumes: Mapping[str, GivenVolume], base_of: BaseOf
    ) -> list[LiveSource | HandedFile]:
        sources: list[LiveSource | HandedFile] = []
        exported: dict[tuple[str, str | None], list[ProvidedDisk]] = {}
        for device, volume in volumes.items():
            if volume.file_handle is not None:
                sources.append(await self._handed(stack, device, volume, base_of))
            elif volume.nbd_path is not None:
                disk = ProvidedDisk(device, volume.size, ProvidedBitmap(volume.bitmap_mode))
                exported.setdefault((volume.nbd_path, volume.bitmap_name), []).append(disk)
        for (path, bitmap), disks in exported.items():
            names = {disk.device: archive_of(disk.device) for disk in disks}
            opening = provided_view(Path(path), disks, bitmap=bitmap, base_of=base_of, names=names)
            sources += (await stack.enter_async_context(opening)).sources
        return sorted(sources, key=lambda source: source.name)

    async def _handed(self, stack: AsyncExitStack, device: str, volume: GivenVolume, base_of: BaseOf) -> HandedFile:
        handle, parent = volume.file_handle, self._channel.parent
        assert handle is not None
        assert parent is not None
        name, only = archive_of(device), volume.bitmap_mode == "reuse"
        base = base_of(name)
        if only and not isinstance(base, BaseInfo):
            raise FleecingError(
                "back up disk",
                device,
                f"only what its bitmap calls changed can be read, and there is nothing to count on: {base}",
                "back it up with a new bitmap",
            )
        why = base if isinstance(base, str) else f"bitmap mode {volume.bitmap_mode}"
        plan = ReadPlan(base.ctime, "") if only and isinstance(base, BaseInfo) else ReadPlan(None, why)
        pairs = [(offset, length) for offset, length in volume.dirty_regions or ()]
        regions = regions_to_read(name, volume.size, pairs, only=only)
        return await stack.enter_async_context(
            handed_file(
                parent,
                handle.fd,
                (int(handle.device), int(handle.inode)),
                name=name,
                size=volume.size,
                plan=plan,
                regions=regions,
            )
        )

    async def _qemu(self, volumes: Mapping[str, GivenVolume]) -> Peer | None:
        """The process that has the bitmaps: who listens where the exports are, else by the hypervisor's own note.

        Raises:
            SourceError: nobody listens.
        """
        paths = {volume.nbd_path for volume in volumes.values() if volume.nbd_path is not None}
        if len(paths) > 1:
            return None
        for path in paths:
            try:
                with await connect_unix(path) as connected:
                    peer = peer_of(connected)
            except OSError as error:
                raise SourceError("connect to", path, error.strerror or str(error)) from error
            return peer if peer.pid > 0 and peer.start_time is not None else None
        return await in_io_thread(_qemu_of, self._init.vmid)

    # --- containers --------------------------------------------------------------------------------------------------

    async def _back_up_container(self, request: BackupContainer) -> None:
        from agent.provider.container import add_container

        if self._stream_fd is None:
            raise UsageError("back up", str(self._session.snapshot), "the session has no stream for files")
        writer = self._writer()
        with until_listed(self._progress) as listed:
            await self._add_configuration(writer, request.guest_config, request.firewall_config)
            await add_container(writer, self._stream_fd, bwlimit=request.rate)
            await writer.finish()
            listed(self._session.snapshot)
        self._done(writer)

    # --- both --------------------------------------------------------------------------------------------------------

    def _writer(self) -> SnapshotWriter:
        keys = self._storage.keys
        return SnapshotWriter(self._session, keys.codec, self._progress, wrapped_key=keys.wrapped_key)

    async def _add_configuration(self, writer: SnapshotWriter, guest: bytes, firewall: bytes | None) -> None:
        await writer.add_blob(GUEST_CONFIG[self._init.vmtype], guest)
        if firewall is not None:
            await writer.add_blob(FIREWALL_CONFIG, firewall)

    def _done(self, writer: SnapshotWriter) -> None:
        self._report = BackupReport(self._session.snapshot, writer.reports, time.monotonic() - self._began)
        for line in self._report.lines():
            self._progress.log(line)


def _qemu_of(vmid: int) -> Peer | None:
    """The QEMU of a VM by the hypervisor's own file; None if there is none that tells."""
    folder = os.environ.get("FLEECE_QEMU_SERVER_DIR", "/run/qemu-server")
    try:
        with Path(folder, f"{vmid}.pid").open("rb") as file:
            text = file.read(32).strip()
    except OSError:
        return None
    if not text.isdigit() or not 1 < (pid := int(text)) < 1 << 31:
        return None
    start_time = process_start_time(pid)
    return None if start_time is None else Peer(pid, 0, 0, start_time)


async def serve_backup(channel: Channel, storage: UsedStorage, init: BackupInit, stream_fd: int | None) -> None:
    """Open the session that `init` wants, and answer until everything is cancelled.

    Raises:
        FleeceError: the session cannot be opened, or is lost.

    Cancelled before the snapshot was finished, it leaves none.
    """
    group = Group.parse(f"{init.type.value}/{init.vmid}", storage.ns)
    progress = ChannelProgress(channel)
    async with storage.open() as repository, AsyncExitStack() as stack:

        async def begun(ctime: int | None) -> "BackupSession":
            return await stack.enter_async_context(
                new_session(
                    repository, group, owner=storage.owner, progress=progress, ctime=ctime, lock_wait_s=LOCK_WAIT_S
                )
            )

        newest = await repository.latest(group)
        try:
            session = await begun(init.start_time if newest is None or newest.ctime < init.start_time else None)
        except UsageError:
            # Another backup was waited for, and its time is the later one.
            session = await begun(None)
        guest = GuestBackup(channel, storage, init, repository, session, stream_fd)
        channel.answer({"archive-name": str(session.snapshot)})
        while True:
            request = await channel.question()
            try:
                result = await guest.answer(request.call, request.parameters)
                if guest.finished:
                    # The hypervisor sets notes and protection, and prunes, before it says that this backup is over.
                    await stack.aclose()
            except FleeceError as error:
                channel.refuse(error)
            else:
                channel.answer(result)
