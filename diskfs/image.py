"""A disk image and what is on it, in one process and one thread: partitions, volume groups, file systems.

Used by `worker.py`, within whose bounds it runs; nothing here protects from an image that asks for too much.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from diskfs.blocks import Blocks, Disk, Fetch, Pieces, Slice
from diskfs.entries import Remark, Volume
from diskfs.errors import DiskFsError, ImageLibraryError, NotReadError
from diskfs.filesystem import FileSystem
from diskfs.lvm import PhysicalVolume, VolumeGroup, read_pv
from diskfs.probe import LVM, READABLE, btrfs_devices, probe, stated_size
from diskfs.tables import SECTOR, Table, gpt_without_mbr, read_table

#: Name of the one volume of a disk without partitions.
RAW: Final = b"raw"
#: Bytes of the logical sectors of disks that do not have 512.
_LARGE_SECTOR: Final = 4096
#: What says nothing about whether a partition really begins somewhere.
_NOTHING: Final = frozenset({"empty", "unknown"})
_NOT_READ: Final = {
    "empty": "there is nothing in it",
    "swap": "it is swap space",
    "LUKS": "it is encrypted (LUKS)",
    "BitLocker": "it is encrypted (BitLocker)",
    "boot loader": "it holds a boot loader, no files",
    "reserved": "it is reserved for Windows, and holds no files",
    "unknown": "nothing that is known is in it",
}


class _Part(NamedTuple):
    volume: Volume
    blocks: Blocks


class DiskImage:
    """The disk `number` of a snapshot whose disks have `sizes` bytes.

    Args:
        sizes: of all disks, by number: a volume group may lie on several.
        number: which one is looked into.
        fetch: reads from any of them.
    """

    def __init__(self, sizes: Sequence[int], number: int, fetch: Fetch) -> None:
        self._disks = [Disk(index, size, fetch) for index, size in enumerate(sizes)]
        self._number = number
        self._parts: dict[bytes, _Part] | None = None
        self._remarks: list[Remark] = []
        self._systems: dict[bytes, FileSystem | DiskFsError] = {}

    def volumes(self) -> list[Volume]:
        """Everything on the disk that may hold a file system.

        Raises:
            DiskFsError: its partition table is damaged.
        """
        return [part.volume for part in self._found().values()]

    def remarks(self) -> list[Remark]:
        """What is wrong with what says which volumes there are, and yet can be read.

        Raises:
            DiskFsError: as `volumes`.
        """
        self._found()
        return self._remarks

    def file_system(self, name: bytes) -> FileSystem:
        """The file system in the volume `name`.

        Raises:
            DiskFsError: there is none that can be read, or no such volume.
            ImageLibraryError: a library is missing.
        """
        system = self._systems.get(name)
        if system is None:
            part = self._found().get(name)
            if part is None:
                raise DiskFsError("read", name.decode("utf-8", "replace"), "the disk has no such volume")
            if part.volume.problem:
                system = DiskFsError("read", name.decode("utf-8", "replace"), part.volume.problem)
            else:
                system = _opened(part)
            self._systems[name] = system
        if isinstance(system, DiskFsError):
            raise system
        return system

    def _found(self) -> dict[bytes, _Part]:
        if self._parts is None:
            self._parts = self._look()
        return self._parts

    def _look(self) -> dict[bytes, _Part]:
        found: dict[bytes, _Part] = {}
        members: list[PhysicalVolume] = []
        self._remarks.clear()
        for name, label, use, blocks, problem in _parts_of(self._disks[self._number], self._remarks):
            kind, own_label = ("unknown", "") if problem else (use, "") if use else probe(blocks)
            if kind == LVM:
                try:
                    member = read_pv(blocks)
                    members.append(member)
                    problem = f"it is a part of the volume group {member.group_name}"
                except DiskFsError as error:
                    problem = f"it is a physical volume of LVM, and damaged: {error.why}"
            elif not problem:
                problem = _why_not(kind, blocks)
            if not problem and (stated := stated_size(kind, blocks)) > blocks.size:
                part = f"{name.decode()} has {blocks.size} bytes, its file system {stated}"
                self._remarks.append(Remark(f"{part}: it is cut off, or one of the disks of an array"))
            found[name] = _Part(Volume(name, blocks.size, kind, own_label or label, problem), blocks)
        for group in self._groups(members):
            self._add_group(group, found)
        return found

    def _groups(self, members: list[PhysicalVolume]) -> Iterator[VolumeGroup]:
        """The volume groups of `members`, with what other disks have of them."""
        by_id: dict[object, list[PhysicalVolume]] = {}
        for member in members:
            by_id.setdefault(member.group.get("id"), []).append(member)
        others: list[PhysicalVolume] | None = None
        for id, found in by_id.items():
            try:
                group = VolumeGroup(found)
                if not group.is_complete:
                    if others is None:
                        others = list(self._members_elsewhere())
                    group = VolumeGroup(found + [member for member in others if member.group.get("id") == id])
                yield group
            except DiskFsError:
                continue  # its members are listed, and said to be damaged when they are looked into

    def _members_elsewhere(self) -> Iterator[PhysicalVolume]:
        for disk in self._disks:
            if disk.number == self._number:
                continue
            try:
                for _, _, _, blocks, problem in _parts_of(disk, []):
                    if not problem and probe(blocks)[0] == LVM:
                        yield read_pv(blocks)
            except DiskFsError:
                continue  # another disk is another matter

    def _add_group(self, group: VolumeGroup, found: dict[bytes, _Part]) -> None:
        folder, taken = group.name, {name.partition(b"/")[0] for name in found}
        while folder.encode() in taken:
            folder += "~"  # a group may be called like a partition, or like another group
        for lv, opened in group.volumes():
            name = f"{folder}/{lv}".encode()
            if isinstance(opened, DiskFsError):
                found[name] = _Part(Volume(name, 0, "unknown", "", opened.why), Pieces(()))
                continue
            try:
                kind, label = probe(opened)
            except DiskFsError as error:
                found[name] = _Part(Volume(name, opened.size, "unknown", "", error.why), opened)
                continue
            found[name] = _Part(Volume(name, opened.size, kind, label, _why_not(kind, opened)), opened)


def _parts_of(disk: Blocks, remarks: list[Remark]) -> Iterator[tuple[bytes, str, str, Blocks, str]]:
    """Name, label, use, bytes and problem of each partition, or of the whole disk if it has none.

    What is wrong with the table goes to `remarks`.

    Raises:
        DiskFsError: the table is damaged.
    """
    table = _table_of(disk)
    if table is None:
        yield RAW, "", "", disk, ""
        return
    if table.problem:
        missing = "; partitions may be missing" if table.is_partial else ""
        remarks.append(Remark(f"the partition table is damaged: {table.problem}{missing}", table.is_partial))
    for partition in table.partitions:
        blocks = Slice(disk, partition.offset, partition.size)
        problem = "it lies behind the end of the disk" if blocks.size <= 0 else ""
        if not problem and blocks.size < partition.size:
            remarks.append(Remark(f"part{partition.number} ends behind the end of the disk, and is cut off there"))
        yield b"part%d" % partition.number, partition.name, partition.use, blocks, problem


def _table_of(disk: Blocks) -> Table | None:
    """The partition table of a disk; None if it is one file system, or nothing that is known.

    Raises:
        DiskFsError: the table is damaged.
    """
    whole = probe(disk)[0]
    if whole in ("fat", "ntfs"):
        # Their boot sectors end like a partition table, and stay where one was written later. As Linux does, rows that
        # can be those of a table are believed.
        try:
            table = read_table(disk)
        except DiskFsError:
            return None
        return table if table is not None and (table.kind == "gpt" or _is_plausible(table, disk.size)) else None
    table = read_table(disk)
    if table is None:
        return gpt_without_mbr(disk) if whole in _NOTHING else None
    if table.kind == "dos" and disk.size % _LARGE_SECTOR == 0 and not _known_in(table, disk):
        # It counts in logical sectors, whose size nothing on the disk tells: 512 bytes, unless only with 4096 there is
        # something where it says that partitions begin.
        larger = read_table(disk, _LARGE_SECTOR)
        if larger is not None and _is_plausible(larger, disk.size) and _known_in(larger, disk):
            return larger
    return table


def _is_plausible(table: Table, size: int) -> bool:
    """Whether the partitions of an MBR lie on a disk of `size` bytes, behind its beginning and beside each other."""
    end = SECTOR
    for partition in sorted(table.partitions, key=lambda one: one.offset):
        if partition.offset < end or partition.offset + partition.size > size:
            return False
        end = partition.offset + partition.size
    return bool(table.partitions)


def _known_in(table: Table, disk: Blocks) -> bool:
    """Whether one of the partitions begins like something that is known."""
    return any(probe(Slice(disk, one.offset, one.size))[0] not in _NOTHING for one in table.partitions)


def _why_not(kind: str, blocks: Blocks) -> str:
    """Why a volume with this in it cannot be looked into; empty if it can."""
    if kind == "btrfs" and (devices := btrfs_devices(blocks)) > 1:
        return f"it is one of {devices} devices of a btrfs, and only those on a single one are read"
    return "" if kind in READABLE else _NOT_READ.get(kind, f"{kind} is not read")


def _opened(part: _Part) -> FileSystem | DiskFsError:
    kind, blocks = part.volume.kind, part.blocks
    where = part.volume.name.decode("utf-8", "replace")
    try:
        return _open(kind, blocks)
    except ModuleNotFoundError as error:
        raise ImageLibraryError(where, ".".join((error.name or kind).split(".")[:2])) from error
    except NotReadError as error:
        return DiskFsError("read", where, f"its file system ({kind}) is not read: {error.why}")
    except DiskFsError as error:
        return DiskFsError("read", where, f"its file system ({kind}) is damaged: {error.why}")
    except MemoryError:
        raise
    except EOFError:
        return DiskFsError("read", where, f"its file system ({kind}) is damaged: it is cut off")
    except Exception as error:  # whatever a library makes of damage
        return DiskFsError("read", where, f"its file system ({kind}) is damaged: {reason(error)}")


def _open(kind: str, blocks: Blocks) -> FileSystem:
    """The file system of this kind; the library for it is loaded here, which takes 80 ms."""
    if kind in ("ext2", "ext3", "ext4"):
        from diskfs.ext import ExtFileSystem

        return ExtFileSystem(blocks)
    if kind == "xfs":
        from diskfs.xfs import XfsFileSystem

        return XfsFileSystem(blocks)
    if kind == "btrfs":
        from diskfs.btrfs import BtrfsFileSystem

        return BtrfsFileSystem(blocks)
    if kind == "ntfs":
        from diskfs.ntfs import NtfsFileSystem

        return NtfsFileSystem(blocks)
    from diskfs.fat import FatFileSystem

    return FatFileSystem(blocks)


def reason(error: BaseException) -> str:
    """What an exception of a library says, for people: short, and nothing that a terminal would act on."""
    if isinstance(error, DiskFsError):
        return error.why
    text = "".join(letter if letter.isprintable() else "?" for letter in str(error))[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
