"""A running VM's disks as they were in a snapshot: only what differs is written, as far as that is known.

The dirty bitmap of a disk says what the guest has written since the backup that it counts from, and the indexes of that
backup and of the wanted snapshot say which chunks they do not share. What is in neither is on the disk already.
docs/vm-restore.md, "Rollback".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent.places import private_run_dir
from agent.snapshot_archives import OpenSnapshot
from agent.vm_backup import finished_lookup, vm_target, wanted_flavour
from agent.vm_restore import chosen_disks, device_of
from agent.vm_settings import VmSettings
from core.disks import ExtentState
from core.errors import FleeceError, FormatError, NotFoundError, UsageError
from core.progress import Progress
from core.units import format_size
from datastore.index import ArchiveIndex
from datastore.manifest import ManifestFile
from datastore.names import strip_archive_type
from hypervisor.discovery import Disk
from hypervisor.errors import DiskNameError
from hypervisor.machine_model import special_archives
from hypervisor.rollback import RolledDisk, put_aside
from hypervisor.vm import check_identity
from repository.interface import Repository
from repository.locate import check_index, load_manifest
from repository.restore import restore_disk

#: QEMU has whole sectors.
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class RolledBack:
    """What became of one disk."""

    name: str
    size: int  #: bytes
    written: int  #: bytes
    reason: str  #: why all of it was written, in words; empty if not

    def to_json(self) -> dict[str, Any]:
        """Its part of the document."""
        mode = "full" if self.reason else "changed"
        return {
            "name": self.name, "size": self.size, "mode": mode, "reason": self.reason or None, "written": self.written,
        }  # fmt: skip

    def line(self) -> str:
        """The same for people."""
        why = f" (all of it: {self.reason})" if self.reason else ""
        return f"{self.name}: {format_size(self.written)} of {format_size(self.size)} written{why}"


async def roll_back(
    settings: VmSettings,
    repository: Repository,
    opened: OpenSnapshot,
    include: Sequence[str],
    exclude: Sequence[str],
    progress: Progress,
    *,
    unverified: bool = False,
) -> tuple[list[RolledBack], bool]:
    """Write the snapshot's disks to those of the running VM, which stands still meanwhile and is reset.

    Returns what became of each disk, and whether the guest runs now.

    Raises:
        FleecingError: another VM than the one that is meant answers at the socket.
        FormatError: the snapshot has failed its last verification; `unverified` believes it all the same.
        UsageError, DiskNameError: the VM's socket is not known, or a disk is not one of the VM or has another size.
        NotFoundError, KeyNeededError: as `vm_restore.chosen_disks`.
        FleeceError: as `hypervisor.rollback.put_aside`.

    Failed or cancelled before anything is written, the VM goes on as if nothing had been; later, it stays stopped.
    """
    if settings.qmp is None:
        raise UsageError("roll back", settings.label, "its QMP socket is not known", "give --qmp SOCKET")
    if settings.section.uuid is not None:
        await check_identity(str(settings.qmp), settings.section.uuid)
    # What the disks have now is lost with the first write, and at the bad chunk it would end.
    if not unverified and (opened.manifest.verify_state or {}).get("state") == "failed":
        raise FormatError(
            "roll back to", str(opened.snapshot), "its last verification has failed, so that not all of it can be read",
            f"'fleece verify {opened.snapshot}' tells what; --force tries it all the same, and may leave the VM "
            "without its disks",
        )  # fmt: skip
    entries = {strip_archive_type(file.filename): file for file in chosen_disks(opened, include, exclude)}
    for name in special_archives(entries):
        if name is not None and not include:
            del entries[name]
            progress.warn(f"{name} stays as it is: a running VM's EFI variables and TPM cannot be rolled back")
    group = opened.snapshot.group
    results = []
    async with put_aside(
        str(settings.qmp),
        target=await vm_target(repository, group),
        finished=finished_lookup(repository, group),
        run_dir=private_run_dir(),
        selection=settings.selection,
        check=lambda found: _check(found, entries, opened, progress),
        flavour=wanted_flavour(settings),
        on_step=progress.log,
        on_warning=progress.warn,
    ) as back:
        planned = []
        for one in back.disks:
            entry = entries[one.disk.name]
            index = await opened.index(entry)
            chunks, reason = await _differing(repository, opened, entry, index, one)
            planned.append((one, entry, chunks))
            written = index.size if chunks is None else sum(index.span(number)[1] for number in chunks)
            results.append(RolledBack(one.disk.name, one.disk.size, written, reason))
        for one, entry, chunks in planned:
            async with back.target(one) as target:
                await restore_disk(
                    opened.reader, opened.codec, opened.manifest, entry.filename, target, progress, chunks=chunks
                )
    for warning in back.warnings:
        progress.warn(warning)
    return results, back.runs


def _check(
    found: Sequence[Disk], entries: dict[str, ManifestFile], opened: OpenSnapshot, progress: Progress
) -> list[Disk]:
    """The disks of the VM that the snapshot has.

    Raises:
        NotFoundError: the VM has not one of them.
        DiskNameError: one has another size.
    """
    by_name = {disk.name: disk for disk in found}
    for name, entry in entries.items():
        disk = by_name.get(name)
        if disk is None:
            have = ", ".join(device_of(one) for one in by_name) or "none"
            raise NotFoundError(
                "roll back", f"{opened.snapshot} {name}", f"the VM has no such disk (it has {have})",
                f"--exclude {device_of(name)} leaves it out",
            )  # fmt: skip
        if disk.size != -(-entry.size // _SECTOR) * _SECTOR and disk.size != entry.size:
            raise DiskNameError(
                "roll back", disk.device, f"it has {disk.size} bytes, in {opened.snapshot} it had {entry.size}",
                "restore it while the VM does not run, or resize it before",
            )  # fmt: skip
    for name in by_name:
        if name not in entries:
            progress.warn(f"{name} stays as it is: it is not in {opened.snapshot}, or was not chosen")
    return [disk for disk in found if disk.name in entries]


async def _differing(
    repository: Repository, opened: OpenSnapshot, entry: ManifestFile, index: ArchiveIndex, one: RolledDisk
) -> tuple[set[int] | None, str]:
    """The chunks that the disk may not have, or None for all of them, and why."""
    if one.base is None:
        return None, one.reason
    base = opened.snapshot.group.at(one.base)
    numbers: set[int] = set()
    for extent in one.changed:
        if extent.state is not ExtentState.CLEAN and extent.offset < index.size:
            last = min(index.size, extent.offset + extent.length) - 1
            numbers.update(range(index.find(extent.offset), index.find(last) + 1))
    if base == opened.snapshot:
        return numbers, ""
    try:
        async with repository.reader(base) as reader:
            manifest = await load_manifest(reader, opened.codec)
            there = manifest.file(entry.filename)
            other = await reader.open_index(entry.filename, size=there.size)
            await check_index(other, there)
            if other.size != index.size or other.count != index.count:
                return None, "the disk had another size at the backup that its dirty bitmap counts from"
            numbers.update(number for number in range(index.count) if index.digest(number) != other.digest(number))
    except FleeceError as error:
        return None, f"the backup that its dirty bitmap counts from cannot be compared: {error}"
    return numbers, ""
