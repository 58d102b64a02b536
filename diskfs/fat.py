"""FAT12, FAT16 and FAT32, by the structures of dissect.fat.

Chains of clusters and directories are read here: the library (3.13) follows a chain that leads to itself without end,
and puts a cluster before another in its place where a file goes backwards. Files belong to root; times, which are of
an unknown time zone, are taken for UTC; names are UTF-8, short ones from code page 437.
"""

import calendar
import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from struct import Struct
from typing import Final

from dissect.fat.c_fat import Fattype
from dissect.fat.fat import FATFS

from diskfs.blocks import Blocks
from diskfs.entries import Entry, Id, Run
from diskfs.errors import DiskFsError
from diskfs.filesystem import UNWRITTEN, RunList

_S: Final = 1_000_000_000
_DIRENT: Final = Struct(
    "<11s"  #  0  name
    "B"     # 11  attributes
    "B"     # 12  8: the name is in small letters, 16: what follows the dot is
    "x2x2x2x"
    "H"     # 20  first cluster, high
    "H"     # 22  time
    "H"     # 24  date
    "H"     # 26  first cluster, low
    "I"     # 28  size
)  # fmt: skip
_LONG: Final = Struct("<B10sxxB12sxx4s")
_READ_ONLY, _LABEL, _DIRECTORY, _LONG_NAME = 0x01, 0x08, 0x10, 0x0F
_DELETED, _LAST = 0xE5, 0x00
#: In the boot sector: flags of FAT32, and where Linux notes that it is mounted.
_EXTENDED_FLAGS: Final = 40
_ONE_TABLE: Final = 0x80
_STATE: Final = {12: 37, 16: 37, 32: 65}
#: Bytes of one directory: Windows has 2 MiB.
_MAX_DIRECTORY: Final = 64 << 20


class FatFileSystem:
    """See `filesystem.FileSystem`."""

    root: Final[Id] = (0, 0)

    def __init__(self, blocks: Blocks) -> None:
        self.notes: Sequence[str] = ()
        self._fs = fs = FATFS(blocks)
        self._blocks = blocks
        self.kind: Final = {Fattype.FAT12: "fat12", Fattype.FAT16: "fat16", Fattype.FAT32: "fat32"}[fs.type]
        self._bits = {"fat12": 12, "fat16": 16, "fat32": 32}[self.kind]
        label = bytes(fs.bpb_ext.BS_VolLab).rstrip(b" ").decode("cp437")
        self.label: Final = "" if label == "NO NAME" else label
        self._cluster = int(fs.cluster_size)
        self._table = int(fs.bpb.BPB_RsvdSecCnt) * int(fs.sector_size)
        self._data = int(fs.first_data_sector) * int(fs.sector_size)
        self._count = min(
            (int(fs.total_sectors) - int(fs.first_data_sector)) // int(fs.bpb.BPB_SecPerClus),
            int(fs.fat_size) * int(fs.sector_size) * 8 // self._bits - 2,
        )
        if self._count <= 0:
            raise DiskFsError("read", self.kind, "it has no clusters")
        self._table += self._active_table() * int(fs.fat_size) * int(fs.sector_size)
        self._chain = lru_cache(64)(self._read_chain)
        if self._is_open():
            self.notes = (f"it was in use: {UNWRITTEN}",)

    def entry(self, id: Id) -> Entry:
        """See `FileSystem.entry`."""
        if not id[0]:
            return Entry(id, stat.S_IFDIR | 0o755, 0, 0, 0, 0, 1)
        _, attributes, _, _, time, date, _, size = self._dirent(id)
        write = 0o555 if attributes & _READ_ONLY else 0o755
        if attributes & _DIRECTORY:
            return Entry(id, stat.S_IFDIR | write, 0, 0, 0, _time(date, time), 1)
        return Entry(id, stat.S_IFREG | write & 0o666, 0, 0, size, _time(date, time), 1)

    def names(self, id: Id) -> Iterator[tuple[bytes, Id]]:
        """See `FileSystem.names`."""
        if id[0] and not self._dirent(id)[1] & _DIRECTORY:
            raise DiskFsError("list", f"entry {id[0]}", "it is no directory")
        long: dict[int, bytes] = {}
        checksum = -1
        for position, data in self._dirents(id):
            if data[0] == _LAST:
                return
            if data[0] == _DELETED:
                long.clear()
            elif data[11] & 0x3F == _LONG_NAME:
                order, one, check, two, three = _LONG.unpack(data)
                if order & 0x40:
                    long.clear()
                    checksum = check
                if check == checksum:
                    long[order & 0x3F] = one + two + three
            else:
                if not data[11] & _LABEL:
                    yield _name(data, long, checksum), (position, 0)
                long.clear()

    def runs(self, id: Id) -> list[Run]:
        """See `FileSystem.runs`."""
        _, _, _, high, _, _, low, size = self._dirent(id)
        runs = RunList(self._blocks, size)
        first = low | (high << 16 if self._bits == 32 else 0)
        offset = 0
        for cluster, count in self._chain(first) if size and first else ():
            runs.add(offset, count * self._cluster, self._data + (cluster - 2) * self._cluster)
            offset += count * self._cluster
        if offset < size:
            raise DiskFsError("read", f"entry {id[0]}", f"{size} bytes, its clusters have {offset}")
        return runs.runs

    def read(self, id: Id, offset: int, length: int) -> bytes:
        """See `FileSystem.read`; never needed here."""
        raise DiskFsError("read", f"entry {id[0]}", "its content lies on the volume as it is")

    def xattrs(self, id: Id) -> Iterator[tuple[bytes, bytes]]:
        """See `FileSystem.xattrs`."""
        return iter(())

    def _active_table(self) -> int:
        """Number of the table that counts: of FAT32 it may be another than the first, which is stale then."""
        if self._bits != 32:
            return 0
        flags = int.from_bytes(self._blocks.exactly(_EXTENDED_FLAGS, 2), "little")
        number = flags & 0xF if flags & _ONE_TABLE else 0
        if number >= int(self._fs.bpb.BPB_NumFATs):
            raise DiskFsError("read", self.kind, f"table {number} counts, and there are {self._fs.bpb.BPB_NumFATs}")
        return number

    def _is_open(self) -> bool:
        """Whether it was not unmounted: Windows notes it in the second row of the table, Linux in the boot sector."""
        width = 4 if self._bits == 32 else 2
        row = int.from_bytes(self._blocks.exactly(self._table + width, width), "little")
        by_windows = self._bits != 12 and not row & (0x08000000 if self._bits == 32 else 0x8000)
        return by_windows or bool(self._blocks.exactly(_STATE[self._bits], 1)[0] & 1)

    def _dirent(self, id: Id) -> tuple[bytes, int, int, int, int, int, int, int]:
        data = self._blocks.exactly(id[0], _DIRENT.size)
        name, attributes, letters, high, time, date, low, size = _DIRENT.unpack(data)
        return name, attributes, letters, high, time, date, low, size

    def _dirents(self, id: Id) -> Iterator[tuple[int, bytes]]:
        """Position and bytes of each row of a directory."""
        fs = self._fs
        if not id[0] and self._bits != 32:
            length = int(fs.bpb.BPB_RootEntCnt) * _DIRENT.size
            parts = [(self._data - -(-length // int(fs.sector_size)) * int(fs.sector_size), length)]
        else:
            if not id[0]:
                first = int(fs.bpb_ext.BPB_RootClus)
            else:
                _, _, _, high, _, _, first, _ = self._dirent(id)
                first |= high << 16 if self._bits == 32 else 0
            size = self._cluster
            parts = [(self._data + (cluster - 2) * size, count * size) for cluster, count in self._chain(first)]
        if sum(length for _, length in parts) > _MAX_DIRECTORY:
            raise DiskFsError("list", f"entry {id[0]}", f"a directory of more than {_MAX_DIRECTORY} bytes")
        for start, length in parts:
            data = self._blocks.exactly(start, length)
            for at in range(0, length, _DIRENT.size):
                yield start + at, data[at : at + _DIRENT.size]

    def _read_chain(self, first: int) -> list[tuple[int, int]]:
        """First cluster and number of clusters of each piece of the chain that begins at `first`."""
        pieces: list[tuple[int, int]] = []
        bits, left, cluster = self._bits, self._count, first
        end = {12: 0xFF8, 16: 0xFFF8, 32: 0x0FFFFFF8}[bits]
        start = length = 0
        while True:
            if not 2 <= cluster < self._count + 2 or left <= 0:
                why = "does not end" if left <= 0 else f"leads to cluster {cluster}"
                raise DiskFsError("read", "fat", f"the chain from cluster {first} on {why}")
            left -= 1
            if length and cluster == start + length:
                length += 1
            else:
                if length:
                    pieces.append((start, length))
                start, length = cluster, 1
            cluster = self._next(cluster)
            if cluster >= end:
                return [*pieces, (start, length)]

    def _next(self, cluster: int) -> int:
        if self._bits == 12:
            value = int.from_bytes(self._blocks.exactly(self._table + cluster * 3 // 2, 2), "little")
            return value >> 4 if cluster & 1 else value & 0xFFF
        width = self._bits // 8
        value = int.from_bytes(self._blocks.exactly(self._table + cluster * width, width), "little")
        return value & 0x0FFFFFFF


def _name(data: bytes, long: dict[int, bytes], checksum: int) -> bytes:
    """The long name if its rows are complete and belong to this entry, else the short one."""
    total = 0
    for value in data[:11]:
        total = ((total >> 1) + (total << 7 & 0x80) + value) & 0xFF
    if long and total == checksum and sorted(long) == list(range(1, len(long) + 1)):
        text = b"".join(long[number] for number in sorted(long)).decode("utf-16-le", "surrogatepass")
        return text.partition("\0")[0].encode("utf-8", "surrogatepass")
    raw = (b"\xe5" if data[0] == 0x05 else data[:1]) + data[1:11]
    base, extension = raw[:8].decode("cp437").rstrip(" "), raw[8:].decode("cp437").rstrip(" ")
    base = base.lower() if data[12] & 0x08 else base
    extension = extension.lower() if data[12] & 0x10 else extension
    return (f"{base}.{extension}" if extension else base).encode()


def _time(date: int, time: int) -> int:
    """Days since 1980 and pieces of two seconds; 0 for what no calendar has."""
    year, month, day = 1980 + (date >> 9), date >> 5 & 15, date & 31
    if not 1 <= month <= 12 or not 1 <= day <= 31:
        return 0
    return calendar.timegm((year, month, day, time >> 11, time >> 5 & 63, (time & 31) * 2, 0, 0, 0)) * _S
