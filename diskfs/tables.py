"""Partition tables: MBR with logical partitions, and GPT. Numbers are those that Linux gives.

Written here because the numbers are what users type: of dissect.volume 3.18 logical partitions have others, and every
GPT partition lacks its last sector. Sources: UEFI 2.10 section 5, Linux block/partitions/msdos.c and efi.c (behaviour).
"""

import zlib
from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple
from uuid import UUID

from diskfs.blocks import Blocks
from diskfs.errors import DiskFsError

SECTOR: Final = 512
#: Sector sizes that a GPT may have been written with.
_GPT_SECTORS: Final = (512, 4096)
_SIGNATURE: Final = b"\x55\xaa"
_FIRST_ROW: Final = 446
_ROW: Final = Struct(
    "<B"  #   0  0x80 active, 0
    "3x"  #   1  first sector as cylinder, head, sector
    "B"   #   4  type
    "3x"  #   5  last sector
    "I"   #   8  first sector
    "I"   #  12  sectors
)  # fmt: skip
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_PROTECTIVE: Final = 0xEE
#: Number of the first logical partition.
_FIRST_LOGICAL: Final = 5
#: Logical partitions at most; Linux has 256 in all.
_MAX_LOGICAL: Final = 256
_GPT_HEADER: Final = Struct(
    "<8s"  #   0  EFI PART
    "I"    #   8  revision
    "I"    #  12  bytes of the header
    "I"    #  16  CRC-32 of the header, with zeros here
    "4x"
    "Q"    #  24  sector of this header
    "Q"    #  32  sector of the other
    "Q"    #  40  first sector for partitions
    "Q"    #  48  last one
    "16s"  #  56  GUID of the disk
    "Q"    #  72  first sector of the rows
    "I"    #  80  rows
    "I"    #  84  bytes of a row
    "I"    #  88  CRC-32 of the rows
)  # fmt: skip
_GPT_ROW: Final = Struct("<16s16sQQQ72s")  # type, GUID, first and last sector, attributes, name in UTF-16
_USES: Final = {
    UUID("21686148-6449-6e6f-744e-656564454649").bytes_le: "boot loader",
    UUID("e3c9e316-0b5c-4db8-817d-f92df00215ae").bytes_le: "reserved",
}
#: Bytes of rows, at most: 128 rows of 128 bytes are usual.
_MAX_ROWS: Final = 1 << 20


class Partition(NamedTuple):
    """One row of a table that is in use."""

    number: int
    offset: int  #: bytes; may lie behind the end of the disk
    size: int  #: bytes
    name: str  #: of a GPT; else empty
    use: str = ""  #: `boot loader` or `reserved`, if the table says that there is no file system


class Table(NamedTuple):
    """What a table says."""

    kind: str  #: `gpt` or `dos`
    partitions: list[Partition]
    problem: str  #: what is wrong with it; empty if nothing is
    is_partial: bool = False  #: partitions may be missing


def read_table(disk: Blocks, sector: int = SECTOR) -> Table | None:
    """The partition table of `disk`; None if it has none.

    Args:
        disk: the whole of it.
        sector: bytes in which an MBR counts: those of the disk's logical sectors, which it does not say itself.

    Raises:
        DiskFsError: it has one that cannot be used.
    """
    first = disk.read_at(0, SECTOR)
    if len(first) < SECTOR or first[510:512] != _SIGNATURE:
        return None
    rows = list(_rows(first))
    if any(kind == _PROTECTIVE for _, kind, _, _ in rows):
        return _gpt(disk)
    if any(active not in (0, 0x80) for active, _, _, _ in rows) or not any(kind and size for _, kind, _, size in rows):
        return None  # boot sectors of file systems have this signature, too
    return _mbr(disk, rows, sector)


def gpt_without_mbr(disk: Blocks) -> Table | None:
    """The GPT of a disk whose MBR was lost; None if there is none whose first copy is sound."""
    try:
        table = _gpt(disk)
    except DiskFsError:
        return None
    # A second copy alone is what is left of a disk that was emptied.
    return None if table.problem else table._replace(problem="the MBR that announces its GPT is missing")


def _rows(sector: bytes) -> Iterator[tuple[int, int, int, int]]:
    return (_ROW.unpack_from(sector, _FIRST_ROW + number * _ROW.size) for number in range(4))


def _mbr(disk: Blocks, rows: list[tuple[int, int, int, int]], unit: int) -> Table:
    found: list[Partition] = []
    problem = ""
    for number, (_, kind, start, size) in enumerate(rows, 1):
        if kind in _EXTENDED and size:
            problem = _logical(disk, start, found, unit) or problem
        elif kind and size:
            found.append(Partition(number, start * unit, size * unit, ""))
    found.sort()
    return Table("dos", found, problem, bool(problem))


def _logical(disk: Blocks, first: int, found: list[Partition], unit: int) -> str:
    """Add the logical partitions of the extended one that begins at sector `first`; says what is wrong with them."""
    seen: set[int] = set()
    here = first
    number = max([_FIRST_LOGICAL - 1, *(one.number for one in found)]) + 1
    while True:
        if here in seen or len(seen) >= _MAX_LOGICAL:
            return "the chain of logical partitions does not end"
        seen.add(here)
        sector = disk.read_at(here * unit, SECTOR)
        if len(sector) < SECTOR or sector[510:512] != _SIGNATURE:
            return "the chain of logical partitions is broken"
        behind = None
        for place, (_, kind, start, size) in enumerate(_rows(sector)):
            if not size:
                continue
            if kind in _EXTENDED:
                behind = first + start if behind is None else behind
            elif kind and place < 2:
                found.append(Partition(number, (here + start) * unit, size * unit, ""))
                number += 1
        if behind is None:
            return ""
        here = behind


def _gpt(disk: Blocks) -> Table:
    wrong = "its header is missing"
    for sector in _GPT_SECTORS:
        # Where the disk has grown, the second copy is where the first one says, and not at the end.
        places = dict.fromkeys((1, disk.size // sector - 1, _other_copy(disk, sector)))
        for place in places:
            problem = "" if place == 1 else "the first copy of its GPT is damaged, the second one is used"
            try:
                found = _gpt_at(disk, sector, place)
            except DiskFsError as error:
                wrong = error.why
                continue
            if found is not None:
                return Table("gpt", found, problem)
    raise DiskFsError("read", "partition table", f"the GPT is damaged: {wrong}")


def _other_copy(disk: Blocks, sector: int) -> int:
    """Where the first header says that the second one is: not checked."""
    data = disk.read_at(sector, _GPT_HEADER.size)
    return int(_GPT_HEADER.unpack(data)[5]) if data[:8] == b"EFI PART" and len(data) == _GPT_HEADER.size else 1


def _gpt_at(disk: Blocks, sector: int, place: int) -> list[Partition] | None:
    """The rows that the header at sector `place` leads to; None if there is no header."""
    data = disk.read_at(place * sector, sector)
    if len(data) < sector or data[:8] != b"EFI PART":
        return None
    _, _, length, crc, here, _, _, _, _, start, count, size, rows_crc = _GPT_HEADER.unpack_from(data)
    if not _GPT_HEADER.size <= length <= sector:
        raise DiskFsError("read", "GPT", f"a header of {length} bytes")
    if zlib.crc32(data[:16] + bytes(4) + data[20:length]) != crc or here != place:
        raise DiskFsError("read", "GPT", "the checksum of its header is wrong")
    if size < _GPT_ROW.size or size % 8 or count * size > _MAX_ROWS:
        raise DiskFsError("read", "GPT", f"{count} rows of {size} bytes")
    rows = disk.read_at(start * sector, count * size)
    if len(rows) != count * size or zlib.crc32(rows) != rows_crc:
        raise DiskFsError("read", "GPT", "the checksum of its rows is wrong")
    found = []
    for number in range(count):
        kind, _, first, last, _, name = _GPT_ROW.unpack_from(rows, number * size)
        if any(kind) and last >= first:
            text = name.decode("utf-16-le", "replace").partition("\0")[0]
            use = _USES.get(kind, "")
            found.append(Partition(number + 1, first * sector, (last - first + 1) * sector, text, use))
    return found
