"""The backup of one virtual machine: session, frozen view, disks, small files; and only then the bitmaps.

The order is the whole point. The session comes first, because it tells which snapshot a dirty bitmap must count from;
the frozen view sets the instant; the bitmaps are handed over when, and only when, the snapshot is finished in the
repository. Whatever fails or is killed before that costs a longer read next time, never a wrong backup.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from agent.libvirt_vm import check_idle, check_still_off
from agent.places import private_run_dir, run_dir
from agent.specifications import read_small_file
from agent.vm_settings import VmSettings
from core.errors import FleeceError, NotFoundError, SourceError, UsageError
from core.limits import in_io_thread
from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.errors import SnapshotNotFoundError
from datastore.names import Group, Snapshot, complete_archive_name
from hypervisor import checked
from hypervisor.bitmaps import BaseInfo, BaseOf, BitmapMode, Finished, target_id
from hypervisor.cmdline import COMMAND_LINE_NAME, command_line
from hypervisor.discovery import Disk, LeftOut, capabilities, check_vm
from hypervisor.efi import EFI_VARS_NAME, efi_vars
from hypervisor.efi import MAX_SIZE as MAX_EFI_VARS
from hypervisor.files import open_source
from hypervisor.flavours import Flavour, FlavourName
from hypervisor.leftovers import look_for_left
from hypervisor.libvirt_host import domain_state
from hypervisor.pause import Pause
from hypervisor.qmp import Qmp, connect
from hypervisor.state import clean_dead, half_disks
from hypervisor.stopped import StoppedDisk, held, stopped_disks
from hypervisor.tpm import read_tpm_state
from hypervisor.unix_socket import connect_unix
from hypervisor.view import FrozenView
from hypervisor.vm import DiskPreview, flavour_of, frozen_view, preview
from repository.backup import SnapshotWriter
from repository.interface import BackupSession, Repository
from repository.report import BackupReport

if TYPE_CHECKING:
    from repository.planning import DiskPlan

#: Why the disks of a VM that is off are read in full.
NOT_RUNNING: Final = "the VM does not run"
#: Seconds for what is read while the guest stands still, beside the disks.
_INSTANT_TIMEOUT_S: Final = 5.0
#: Seconds to find out whether somebody listens. A full queue of clients takes longer, and answers that too.
_LOOK_TIMEOUT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class ViewHooks:
    """Called around the instant of a running VM; what they raise fails the backup, and the VM is as before."""

    before: Callable[[Snapshot], Awaitable[None]]  #: nothing is set up yet
    after: Callable[[Snapshot], Awaitable[None]]  #: the guest goes on, nothing is read yet


async def vm_target(repository: Repository, group: Group) -> str:
    """What tells the dirty bitmaps of this repository and group from all others."""
    return target_id(await repository.identity(), str(group.ns), str(group))


async def base_lookup(repository: Repository, group: Group, codec: ChunkCodec, base: Snapshot | None) -> BaseOf:
    """What the snapshot `base` has of each disk, or why an incremental backup may not count on it.

    Args:
        repository: where it lies.
        group: of the backup.
        codec: of the new backup: mode and key must be those of the old one.
        base: the session's; None if it has none.
    """
    if base is None:
        newest = await repository.latest(group)
        why = "first backup of this group" if newest is None else "previous snapshot failed verification"
        return lambda archive: why
    info = await repository.snapshot(base)
    files = {file.filename: file for file in info.files}
    fingerprint = codec.key.fingerprint_text if codec.key is not None else None

    def base_of(archive: str) -> BaseInfo | str:
        file = files.get(complete_archive_name(archive))
        if file is None or file.size is None:
            return "disk is not in the previous snapshot"
        if (info.fingerprint or None) != fingerprint:
            return "key changed"
        if file.crypt_mode is not codec.mode:
            return "crypt mode changed"
        return BaseInfo(base.ctime, file.size)

    return base_of


def finished_lookup(repository: Repository, group: Group) -> Finished:
    """Whether there is a finished snapshot of a backup time."""

    async def finished(ctime: int) -> bool:
        try:
            return (await repository.snapshot(group.at(ctime))).finished
        except SnapshotNotFoundError:
            return False

    return finished


async def usable_base(repository: Repository, group: Group) -> Snapshot | None:
    """The snapshot that a session would take as its base."""
    newest = await repository.latest(group)
    if newest is None:
        return None
    verification = (await repository.snapshot(newest)).verification
    return None if verification is not None and verification.get("state") == "failed" else newest


def wanted_flavour(settings: VmSettings) -> FlavourName | None:
    """The flavour that the user asks for; None: what QEMU offers."""
    return None if settings.flavour == "auto" else FlavourName(settings.flavour)


async def vm_flavour(qmp: Qmp, settings: VmSettings) -> Flavour:
    """The flavour of the VM behind `qmp`; errors as those of `hypervisor.vm.flavour_of`."""
    return await flavour_of(qmp, wanted_flavour(settings), tpm_state=settings.section.tpm_state)


async def is_running(settings: VmSettings) -> bool:
    """Whether somebody listens on the VM's QMP socket, or libvirt says that it runs.

    Raises:
        UsageError: neither a socket nor disks for a stopped VM are known.
        NotFoundError: nobody listens, and nothing says where the disks are; or there is no such domain.
        FleeceError: libvirt cannot be asked.
    """
    if settings.domain is not None:
        return (settings.libvirt or await domain_state(settings.domain)).active
    if settings.qmp is None:
        if not settings.section.disks:
            raise UsageError(
                "back up the virtual machine", settings.label, "its QMP socket is not known",
                "give --qmp SOCKET or --libvirt DOMAIN, or write qmp or libvirt into its section of the configuration",
            )  # fmt: skip
        return False
    try:
        with trio.move_on_after(_LOOK_TIMEOUT_S):
            (await connect_unix(str(settings.qmp))).close()
    except (FileNotFoundError, ConnectionRefusedError) as error:
        if settings.section.disks:
            return False
        raise NotFoundError(
            "reach QEMU at", str(settings.qmp), "there is no such socket" if isinstance(error, FileNotFoundError)
            else "nobody listens there",
            f"start it with -qmp unix:{settings.qmp},server=on,wait=off; a VM that does not run needs [vm.NAME.disks]",
        ) from error  # fmt: skip
    except OSError:
        pass  # its own message comes with the first real connection
    return True


async def back_up_vm(
    settings: VmSettings,
    repository: Repository,
    session: BackupSession,
    codec: ChunkCodec,
    progress: Progress,
    *,
    bwlimit: int | None = None,
    notes: str | None = None,
    wrapped_key: bytes | None = None,
    on_listed: Callable[[Snapshot], None] = lambda _snapshot: None,
    hooks: ViewHooks | None = None,
) -> BackupReport:
    """Back up the VM into `session`, running or not, and hand its bitmaps over when the snapshot is finished.

    `wrapped_key`, the backup key under a master key, is stored with it. `on_listed` is called as soon as the snapshot
    is finished: a cancellation after that finds it listed, and the bitmaps are handed over all the same. `hooks` are
    for a VM that runs.

    Raises:
        FleeceError: it could not be backed up; the VM is as before, and no snapshot is listed.

    Cancelled before, it leaves no snapshot, and in the VM nothing but the bitmaps of the last backup.
    """
    started = time.monotonic()
    settings = await settings.looked_up()
    files = [(one.name, await in_io_thread(read_small_file, Path(one.source))) for one in settings.files]
    writer = SnapshotWriter(session, codec, progress, wrapped_key=wrapped_key)
    frozen_s, flavour = 0.0, None
    if await is_running(settings):
        view = await _back_up_running(settings, repository, writer, progress, files, bwlimit, notes, on_listed, hooks)
        if view is not None:
            frozen_s, flavour = view.frozen_s, view.flavour.value
    else:
        await _back_up_stopped(settings, writer, progress, files, bwlimit, notes)
        on_listed(session.snapshot)
    return BackupReport(session.snapshot, writer.reports, time.monotonic() - started, frozen_s, flavour=flavour)


async def _back_up_running(
    settings: VmSettings,
    repository: Repository,
    writer: SnapshotWriter,
    progress: Progress,
    files: Sequence[tuple[str, bytes]],
    bwlimit: int | None,
    notes: str | None,
    on_listed: Callable[[Snapshot], None],
    hooks: ViewHooks | None,
) -> FrozenView | None:
    session = writer.session
    group = session.snapshot.group
    await check_idle(settings)
    beside = _Beside(progress, settings)
    view = None
    finished = False
    if hooks is not None:
        await hooks.before(session.snapshot)
    try:
        async with frozen_view(
            str(settings.monitor),
            target=await vm_target(repository, group),
            new_id=session.snapshot.ctime,
            base_of=await base_lookup(repository, group, writer.codec, session.base),
            finished=finished_lookup(repository, group),
            scratch=settings.scratch,
            run_dir=private_run_dir(),
            disks=settings.selection,
            bitmap_mode=BitmapMode(settings.bitmap),
            guest_agent=settings.guest_agent,
            mount_points=settings.freeze_mounts,
            pause=Pause(settings.pause),
            flavour=wanted_flavour(settings),
            tpm_state=settings.section.tpm_state,
            on_flavour=beside.made_by,
            at_instant=beside.read,
            on_step=progress.log,
            on_warning=progress.warn,
        ) as view:
            if hooks is not None:
                await hooks.after(session.snapshot)
            for left in [*view.left_out, *beside.left_out]:
                progress.log(f"{left.device} is left out: {left.reason}")
            await writer.add_disks(view.sources, bwlimit=bwlimit)
            for name, data in [*beside.blobs, *files]:
                await writer.add_blob(name, data)
            await writer.finish(notes=notes)
            finished = True
            view.commit()
            on_listed(session.snapshot)
    except FleeceError as error:
        if not finished:
            raise
        # The snapshot is there and whole; what could not be undone is for a person to know.
        progress.warn(str(error))
    return view


class _Beside:
    """What goes along with the disks: EFI variables and state of the TPM of the same instant, QEMU's command line, and
    the description of a domain of libvirt."""

    def __init__(self, progress: Progress, settings: VmSettings) -> None:
        libvirt = settings.libvirt
        self._progress, self._tpm = progress, settings.section.tpm_state
        self._flash, self._flavour, self._settings = True, FlavourName.STOCK, settings
        self.left_out: list[LeftOut] = []  #: what belongs to the VM and is not stored
        self.blobs: list[tuple[str, bytes]] = [] if libvirt is None else libvirt.blobs()

    def made_by(self, flavour: FlavourName) -> None:
        """For Proxmox VE's QEMU the EFI variables are one of the disks."""
        self._flash = flavour is not FlavourName.PROXMOX
        self._flavour, self._tpm = flavour, self._tpm if self._flash else None
        self._progress.log(f"the frozen view is made by the flavour {flavour.value}")

    async def read(self, qmp: Qmp) -> None:
        """Read them while the guest stands still; what cannot be read is a warning, since the disks matter more."""
        with trio.move_on_after(_INSTANT_TIMEOUT_S) as scope:
            try:
                if self._flash and (variables := await efi_vars(qmp)) is not None:
                    self.blobs.append((f"{EFI_VARS_NAME}.blob", variables))
            except FleeceError as error:
                self._progress.warn(f"without the EFI variables: {error}")
            try:
                await self._read_tpm(qmp)
            except FleeceError as error:
                self._progress.warn(f"without the state of the TPM: {error}")
            if (line := await command_line(qmp.peer)) is not None:
                self.blobs.append((COMMAND_LINE_NAME, line))
        if scope.cancelled_caught:
            self._progress.warn("not all small files could be read in time, and are left out")

    async def _read_tpm(self, qmp: Qmp) -> None:
        self.left_out = await tpm_left_out(qmp, self._settings, self._flavour)
        if self._tpm is not None:
            self.blobs += await in_io_thread(read_tpm_state, self._tpm)


async def _back_up_stopped(
    settings: VmSettings,
    writer: SnapshotWriter,
    progress: Progress,
    files: Sequence[tuple[str, bytes]],
    bwlimit: int | None,
    notes: str | None,
) -> None:
    with suppress(FleeceError):  # without that folder nothing was done to a VM that ran
        for line in half_disks(await clean_dead(private_run_dir())):
            progress.warn(line)
    disks = chosen_stopped_disks(settings)
    progress.log(f"{settings.label} does not run: its disks are read by their paths")
    sources = []
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(held(disks))
        if settings.libvirt is not None:
            await check_still_off(settings.libvirt)
            if settings.libvirt.saved:
                progress.warn(
                    f"{settings.libvirt.name} is saved (virsh managedsave): what its guest had in memory is not in the "
                    "backup, nor are disks that were plugged in only while it ran"
                )
            files = [*settings.libvirt.blobs(), *files]
        files = [*await _of_stopped(settings), *files]
        for disk in disks:
            opened = open_source(disk.path, disk.name, format=disk.format, reason=NOT_RUNNING)
            source = await stack.enter_async_context(opened)
            sources.append(source)
        await writer.add_disks(sources, bwlimit=bwlimit)
    for source in sources:
        for warning in source.warnings:
            progress.warn(warning)
    for name, data in files:
        await writer.add_blob(name, data)
    await writer.finish(notes=notes)


async def tpm_left_out(qmp: Qmp, settings: VmSettings, flavour: FlavourName) -> list[LeftOut]:
    """The TPM of the VM behind `qmp`, if nothing says where its state is; the flavour proxmox looks by itself.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    known = settings.section.tpm_state is not None or settings.libvirt is not None
    if known or flavour is not FlavourName.STOCK or "query-tpm" not in qmp.commands:
        return []
    where = f"{qmp.where}, query-tpm"
    found = checked.objects(await qmp.execute("query-tpm"), where)
    reason = "the state of a TPM, which another program keeps: name its folder as tpm-state"
    return [LeftOut(checked.printable(checked.field(tpm, "id", str, where)), reason) for tpm in found]


async def preview_stopped(settings: VmSettings) -> list[DiskPreview]:
    """What the next backup would read of a VM that does not run: everything.

    Raises:
        UsageError: it has no disks that are known, or chosen.
        FleeceError: one cannot be opened.
    """
    found = []
    async with AsyncExitStack() as stack:
        disks = chosen_stopped_disks(settings)
        await stack.enter_async_context(held(disks))
        for disk in disks:
            source = await stack.enter_async_context(open_source(disk.path, disk.name, format=disk.format))
            device = disk.name.removeprefix("drive-").removesuffix(".img")
            found.append(DiskPreview(disk.name, device, "", source.size, None, "full", NOT_RUNNING, source.size))
    return found


async def _of_stopped(settings: VmSettings) -> list[tuple[str, bytes]]:
    """EFI variables and state of the TPM of a VM that does not run, where the configuration says where they are."""
    files = []
    if (path := settings.section.efi_vars) is not None:
        known = {} if settings.efi_format is None else {"efivars": settings.efi_format}
        (image,) = stopped_disks({"efivars": str(path)}, known)
        async with held([image]), open_source(image.path, image.name, format=image.format) as source:
            if source.size > MAX_EFI_VARS:
                raise SourceError("read the EFI variables in", str(path), f"a flash memory of {source.size} bytes")
            await source.extents()
            variables = bytearray(source.size)
            await source.read_into(0, variables)
        files.append((f"{EFI_VARS_NAME}.blob", bytes(variables)))
    if (path := settings.section.tpm_state) is not None:
        files += await in_io_thread(read_tpm_state, path)
    return files


def chosen_stopped_disks(settings: VmSettings) -> list[StoppedDisk]:
    """The disks of a VM that does not run, without those that include and exclude leave out.

    Raises:
        UsageError: nothing is left.
    """
    from fnmatch import fnmatchcase

    def matches(name: str, path: Path, patterns: Sequence[str]) -> bool:
        return any(
            fnmatchcase(alias, pattern) for pattern in patterns for alias in (name, f"drive-{name}.img", str(path))
        )

    kept = {
        name: str(path)
        for name, path in settings.section.disks.items()
        if (not settings.include or matches(name, path, settings.include)) and not matches(name, path, settings.exclude)
    }
    if not kept:
        raise UsageError("back up", settings.label, "no disk is left after include and exclude")
    return stopped_disks(kept, settings.formats)


async def preview_running(
    qmp: Qmp,
    settings: VmSettings,
    repository: Repository | None,
    group: Group,
    codec: ChunkCodec,
    disks: Sequence[Disk],
    *,
    flavour: Flavour,
    bitmaps_free: bool = False,
) -> list[DiskPreview]:
    """What the next backup would read of the disks of the VM behind `qmp`; changes nothing.

    `bitmaps_free`: as `hypervisor.leftovers.Left` says.

    Raises:
        FleeceError: QEMU or the repository cannot be asked.
    """
    mode = BitmapMode(settings.bitmap)
    if repository is None:

        async def never(ctime: int) -> bool:
            return False

        return await preview(
            qmp, disks, "", lambda archive: "no repository is named", never, bitmap_mode=mode, flavour=flavour
        )
    return await preview(
        qmp,
        disks,
        await vm_target(repository, group),
        await base_lookup(repository, group, codec, await usable_base(repository, group)),
        finished_lookup(repository, group),
        bitmap_mode=mode,
        bitmaps_free=bitmaps_free,
        flavour=flavour,
    )


async def plan_vm(
    settings: VmSettings, repository: Repository, group: Group, codec: ChunkCodec, progress: Progress
) -> "list[DiskPlan]":
    """`--dry-run`: what a backup would read, and why; refuses what a backup would refuse, changes nothing.

    What a killed run has left, and a backup would remove first, is a warning; the plan is that of the VM without it.

    Raises:
        FleeceError: as the backup.
    """
    from repository.planning import DiskPlan, plan_disks
    from repository.report import Mode

    settings = await settings.looked_up()
    for one in settings.files:
        await in_io_thread(read_small_file, Path(one.source))
    if await is_running(settings):
        await check_idle(settings)
        async with connect(str(settings.monitor)) as qmp:
            await capabilities(qmp)
            left = await look_for_left(qmp, run_dir())
            if left.things:
                progress.warn(f"another run was killed; a backup first removes what it left: {', '.join(left.things)}")
            kind = await vm_flavour(qmp, settings)
            there = (await kind.survey(qmp, settings.selection, instead=left.roots)).disks
            await check_vm(qmp, there)
            found = await preview_running(
                qmp, settings, repository, group, codec, there, flavour=kind, bitmaps_free=left.bitmaps_free
            )
        return [
            DiskPlan(
                disk.name,
                disk.size,
                Mode(disk.mode),
                disk.reason or None,
                disk.bytes,
                disk.bytes if disk.bitmap is not None else None,
            )
            for disk in found
        ]
    async with AsyncExitStack() as stack:
        disks = chosen_stopped_disks(settings)
        await stack.enter_async_context(held(disks))
        sources = [
            await stack.enter_async_context(open_source(disk.path, disk.name, format=disk.format, reason=NOT_RUNNING))
            for disk in disks
        ]
        return await plan_disks(repository, group, sources, codec)
