"""A whole virtual machine out of a snapshot: its disks to files, block devices or NBD exports, its small files beside.

Nothing is written before everything was looked at: every target is opened, large enough, free and allowed first. A file
is written under another name and takes its own when all disks are there, so that a restore that fails, or is killed,
leaves no image that looks whole, and what was to be replaced is still there. What starts the machine (a script, a
definition) is written last, by a `Definer`. docs/vm-restore.md.
"""

import os
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, TypeAlias

from agent.cli_restore import LIVE_STATE_NAME, partly_written, status_of, write_small_file
from agent.snapshot_archives import OpenSnapshot
from core.disks import DiskTarget
from core.errors import BusyError, FormatError, NotFoundError, TargetError, UsageError, os_reason
from core.limits import in_io_thread
from core.progress import Progress
from core.units import format_size
from datastore.manifest import ManifestFile
from datastore.names import MASTER_KEY_NAME, ArchiveKind, archive_kind, strip_archive_type
from hypervisor.image_files import image_format
from hypervisor.nbd_address import is_nbd_uri
from hypervisor.replacement import Replacement
from hypervisor.targets import open_target
from repository.restore import restore_blob, restore_disk

#: Ends the names of indexes of disk images.
_IMAGE_INDEX: Final = ".img.fidx"
#: Names in that folder which a snapshot must not bring: `--resume` runs the command line that is in the first.
_OWN_NAMES: Final = frozenset({LIVE_STATE_NAME, "start.sh", "run", "tpm"})
_FORCE_HINT: Final = "use another folder, or --force to replace it"


@dataclass(frozen=True, slots=True)
class RestoredDisk:
    """A disk that was restored."""

    archive: str  #: without its type: `drive-scsi0.img`
    target: str  #: path of the file or block device, or an NBD URI
    format: str  #: `raw` or `qcow2`
    size: int  #: bytes of the image in the snapshot
    kind: str  #: of the target: `file`, `device` or `nbd`

    @property
    def device(self) -> str:
        """The device that had it: `scsi0`."""
        return device_of(self.archive)

    def to_json(self) -> dict[str, Any]:
        """Its part of the document."""
        return {"name": self.archive, "target": self.target, "format": self.format, "size": self.size}

    def line(self) -> str:
        """The same for people."""
        return f"{self.archive} -> {self.target}: {format_size(self.size)}, {self.format}"


@dataclass(slots=True)
class RestoredVm:
    """A virtual machine whose disks and files are where they belong."""

    snapshot: str  #: `vm/100/2026-01-02T03:04:05Z`
    name: str  #: what the machine is to be called
    folder: Path  #: absolute; where its files lie
    disks: list[RestoredDisk]
    files: dict[str, Path] = field(default_factory=dict)  #: small files by name: `qemu-command.json`, `efivars.fd`
    left_out: list[str] = field(default_factory=list)  #: disks of the snapshot that were not restored
    definitions: list[dict[str, Any]] = field(default_factory=list)  #: what starts it, see `Definer`

    def to_json(self) -> dict[str, Any]:
        """The document of `fleece vm restore`."""
        return {
            "snapshot": self.snapshot,
            "name": self.name,
            "folder": str(self.folder),
            "disks": [disk.to_json() for disk in self.disks],
            "files": [{"name": name, "path": str(path)} for name, path in self.files.items()],
            "left-out": self.left_out,
            "definitions": self.definitions,
        }

    def lines(self) -> list[str]:
        """The same for people."""
        return [
            *(disk.line() for disk in self.disks),
            *(f"{name} -> {path}" for name, path in self.files.items()),
            *(f"{name} was left out" for name in self.left_out),
            *(str(one["line"]) for one in self.definitions if "line" in one),
        ]


#: Makes what starts the restored machine, and adds to `definitions` a document with `type` and what belongs to it, and
#: `line`, the same for people. Called last, when all disks and files are in place; what it raises fails the restore.
Definer: TypeAlias = Callable[[RestoredVm, Progress], Awaitable[None]]
#: Refuses a restore, before anything is written, of which a `Definer` knows that it could not be finished.
Check: TypeAlias = Callable[[OpenSnapshot, "Sequence[PlannedDisk]"], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOrder:
    """Where a machine goes."""

    folder: Path
    format: str | None = None  #: of image files: `raw` or `qcow2`; None: by their names, else raw
    targets: Mapping[str, str] = field(default_factory=dict)  #: by disk: path, block device or NBD URI
    include: Sequence[str] = ()  #: only these disks, names or patterns
    exclude: Sequence[str] = ()
    name: str | None = None  #: of the machine; None: as its backups are called
    force: bool = False  #: replace what is there
    checks: Sequence[Check] = ()
    definers: Sequence[Definer] = ()
    #: Files that `definers` will write: looked at beforehand, and out of the way before the first disk is replaced.
    writes: Sequence[Path] = ()


def device_of(archive: str) -> str:
    """`scsi0` of `drive-scsi0.img`; other names without `.img`."""
    return archive.removesuffix(".img").removeprefix("drive-")


# -- which disks, and where to ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlannedDisk:
    """A disk of the snapshot and its target."""

    entry: ManifestFile
    target: str  #: absolute path, or an NBD URI
    format: str  #: `raw` or `qcow2`
    kind: str  #: of the target: `file`, `device` or `nbd`

    @property
    def archive(self) -> str:
        """Without its type."""
        return strip_archive_type(self.entry.filename)

    def restored(self) -> RestoredDisk:
        """What it is when it was restored."""
        return RestoredDisk(self.archive, self.target, self.format, self.entry.size, self.kind)


def chosen_disks(opened: OpenSnapshot, include: Sequence[str], exclude: Sequence[str]) -> list[ManifestFile]:
    """The disk images of the snapshot that are meant, in the manifest's order.

    Raises:
        NotFoundError: it has none, or none that is called so.
    """
    images = [file for file in opened.manifest.files if file.filename.endswith(_IMAGE_INDEX)]
    if not images:
        raise NotFoundError("restore a virtual machine from", str(opened.snapshot), "it has no disk image")
    for wanted in include:
        if not any(_called(file, wanted) for file in images):
            raise _unknown(opened, wanted, images)
    chosen = [
        file
        for file in images
        if (not include or any(_called(file, one) for one in include))
        and not any(_called(file, one) for one in exclude)
    ]
    if not chosen:
        raise NotFoundError("restore a virtual machine from", str(opened.snapshot), "no disk of it is chosen")
    for file in chosen:
        opened.needs_key(file)
    return chosen


def _called(file: ManifestFile, pattern: str) -> bool:
    return any(fnmatchcase(alias, pattern) for alias in _aliases(file))


def _unknown(opened: OpenSnapshot, wanted: str, images: Sequence[ManifestFile]) -> NotFoundError:
    have = ", ".join(device_of(strip_archive_type(file.filename)) for file in images)
    return NotFoundError("restore the disk", repr(wanted), f"{opened.snapshot} has none of that name", f"it has {have}")


def named_target(targets: Mapping[str, str], file: ManifestFile) -> str | None:
    """The target that a person gave for `file`."""
    return next((targets[alias] for alias in _aliases(file) if alias in targets), None)


def parse_targets(words: Sequence[str]) -> dict[str, str]:
    """`NAME=TARGET` as a person writes it.

    Raises:
        UsageError: another form, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, target = word.partition("=")
        if not equals or not name or not target:
            raise UsageError("use the disk", repr(word), "it is not NAME=TARGET", "for example scsi0=/dev/vg/web")
        if name in found:
            raise UsageError("use the disk", repr(word), f"{name} is given twice")
        found[name] = target
    return found


def plan_disks(opened: OpenSnapshot, order: RestoreOrder) -> list[PlannedDisk]:
    """The disks that are restored, each with its target; nothing is looked at yet.

    Raises:
        NotFoundError, UsageError: no such disk, two with one target, or a format that is none.
        KeyNeededError: one is encrypted, and the key is not there.
    """
    chosen = chosen_disks(opened, order.include, order.exclude)
    known = {alias for file in chosen for alias in _aliases(file)}
    for name in order.targets:
        if name not in known:
            raise _unknown(opened, name, chosen)
    planned: list[PlannedDisk] = []
    for file in chosen:
        target = named_target(order.targets, file)
        if target is None:
            image = order.format or "raw"
            target = str(order.folder.absolute() / f"{strip_archive_type(file.filename).removesuffix('.img')}.{image}")
        kind = "file"
        if is_nbd_uri(target):
            image, kind = "raw", "nbd"
        else:
            target = str(Path(target).absolute())
            status = status_of(Path(target))
            if status is not None and stat.S_ISBLK(status.st_mode):
                image, kind = "raw", "device"
            else:
                image = image_format(Path(target), order.format)
        if any(_same(target, other.target) for other in planned):
            raise UsageError("restore to", target, "two disks have this target")
        planned.append(PlannedDisk(file, target, image, kind))
    return planned


def _aliases(file: ManifestFile) -> tuple[str, ...]:
    name = strip_archive_type(file.filename)
    return (device_of(name), name.removesuffix(".img"), name, file.filename)


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    if is_nbd_uri(one) or is_nbd_uri(other):
        return False
    with suppress(OSError):
        return os.path.realpath(one) == os.path.realpath(other) or Path(one).samefile(other)
    return False


def small_files(opened: OpenSnapshot) -> list[ManifestFile]:
    """The small files of the snapshot, without a wrapped key.

    Raises:
        KeyNeededError: one is encrypted, and the key is not there.
        FormatError: one is called like what Fleece itself makes in a machine's folder.
    """
    found = []
    for file in opened.manifest.files:
        if archive_kind(file.filename) is ArchiveKind.BLOB and file.filename != MASTER_KEY_NAME:
            if (name := strip_archive_type(file.filename)) in _OWN_NAMES:
                raise FormatError(
                    "restore a virtual machine from", str(opened.snapshot),
                    f"it holds a file '{name}', which is a name of Fleece's own",
                    "'fleece restore' gives single archives",
                )  # fmt: skip
            opened.needs_key(file)
            found.append(file)
    return found


# -- the work ---------------------------------------------------------------------------------------------------------


async def restore_vm(opened: OpenSnapshot, order: RestoreOrder, progress: Progress) -> RestoredVm:
    """Restore the machine of the snapshot.

    Raises:
        TargetError, DiskInUseError: a target is too small, in use, there already, or cannot be written.
        BusyError: as `refuse_live`.
        NotFoundError, UsageError, KeyNeededError: as `plan_disks`.
        FleeceError: the snapshot cannot be read, what starts the machine cannot be made, or one of `order.checks`.

    Failed or cancelled before all disks are there, it leaves what was there, but for block devices and NBD exports,
    which hold a part of the image then.
    """
    planned = plan_disks(opened, order)
    files = small_files(opened)
    for check in order.checks:
        await check(opened, planned)
    folder = order.folder.absolute()
    await in_io_thread(refuse_live, folder)
    made = await in_io_thread(make_folder, folder)
    try:
        return await _restore(opened, order, planned, files, folder, progress)
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()  # only if nothing is in it
        raise


async def _restore(
    opened: OpenSnapshot,
    order: RestoreOrder,
    planned: Sequence[PlannedDisk],
    files: Sequence[ManifestFile],
    folder: Path,
    progress: Progress,
) -> RestoredVm:
    places = {strip_archive_type(file.filename): folder / strip_archive_type(file.filename) for file in files}
    await in_io_thread(check_free, [*places.values(), *order.writes], order.force)
    vm = RestoredVm(
        str(opened.snapshot), order.name or opened.snapshot.group.id, folder, [], left_out=left_out(opened, planned)
    )
    replaced: list[Replacement] = []
    overwritten: list[str] = []
    try:
        with partly_written(overwritten, progress):
            async with AsyncExitStack() as stack:
                targets: list[DiskTarget] = []
                for disk in planned:
                    targets.append(await stack.enter_async_context(await _opened(disk, replaced, force=order.force)))
                # Small and checked as a whole: what is broken is told before a device is overwritten.
                contents = await read_small_files(opened, files)
                for disk, target in zip(planned, targets, strict=True):
                    if disk.kind != "file":
                        overwritten.append(disk.target)
                    name = disk.entry.filename
                    await restore_disk(opened.reader, opened.codec, opened.manifest, name, target, progress)
                    vm.disks.append(disk.restored())
            await in_io_thread(_put_in_place, replaced, order.writes)
    finally:
        for one in replaced:
            one.close()
    for name, path in places.items():
        await in_io_thread(write_small_file, path, contents[name], order.force)
        vm.files[name] = path
    for definer in order.definers:
        await definer(vm, progress)
    return vm


async def _opened(
    disk: PlannedDisk, replaced: list[Replacement], *, force: bool
) -> AbstractAsyncContextManager[DiskTarget]:
    """The target of `disk`, to be entered; a file's under its other name, which is added to `replaced`."""
    if disk.kind != "file":
        return open_target(disk.target, disk.entry.size, force=force, format=disk.format)
    one = await in_io_thread(lambda: Replacement.begin(disk.target, force=force))
    replaced.append(one)
    return open_target(str(one.partial), disk.entry.size, format=disk.format)


async def read_small_files(opened: OpenSnapshot, files: Sequence[ManifestFile]) -> dict[str, bytes]:
    """Contents of the small files by name.

    Raises:
        NotFoundError, FormatError, KeyNeededError: one cannot be read.
    """
    return {
        strip_archive_type(file.filename): await restore_blob(
            opened.reader, opened.codec, opened.manifest, file.filename
        )
        for file in files
    }  # fmt: skip


def left_out(opened: OpenSnapshot, planned: Sequence[PlannedDisk]) -> list[str]:
    """Disks of the snapshot that are not in `planned`."""
    taken = {disk.entry.filename for disk in planned}
    names = [file.filename for file in opened.manifest.files]
    return [strip_archive_type(name) for name in names if name.endswith(_IMAGE_INDEX) and name not in taken]


def refuse_live(folder: Path) -> None:
    """Refuse a folder of which `--resume` would take the disks for those that it had begun to fill. Blocks.

    Raises:
        BusyError: a live restore is under way there.
    """
    if status_of(folder / LIVE_STATE_NAME) is not None:
        hint = f"'fleece vm restore --resume {folder}' goes on; to give it up end its QEMU and remove {LIVE_STATE_NAME}"
        raise BusyError("restore to", str(folder), "a live restore is under way there", hint)


def make_folder(folder: Path) -> list[Path]:
    """Make the folder, and those above it; returns those that this call made, the innermost first.

    Raises:
        TargetError: it cannot be made.
    """
    missing = []
    at = folder
    while status_of(at) is None and at != at.parent:
        missing.append(at)
        at = at.parent
    try:
        for path in reversed(missing):
            path.mkdir(mode=0o755, exist_ok=True)
        if not folder.is_dir():
            raise TargetError("restore to", str(folder), "it is no folder")
    except OSError as error:
        raise TargetError("restore to", str(folder), os_reason(error)) from error
    return missing


def check_free(paths: Sequence[Path], force: bool) -> None:
    """Refuse where a file with content, or what is no file, has one of the names.

    Raises:
        TargetError: there is one, and `force` is not given or of no use.
    """
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise TargetError("restore to", str(path), os_reason(error)) from error
        if not stat.S_ISREG(status.st_mode):
            raise TargetError("restore to", str(path), "it is no regular file")
        if status.st_size and not force:
            raise TargetError("restore to", str(path), "the file has content", _FORCE_HINT)


def _put_in_place(replaced: Sequence[Replacement], writes: Sequence[Path]) -> None:
    """All disks are whole: give them their names, when what would start the machine with some of them is gone."""
    try:
        for path in writes:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise TargetError("replace", str(path), os_reason(error)) from error
    for one in replaced:
        one.put_in_place()
