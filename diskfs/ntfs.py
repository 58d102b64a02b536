"""NTFS, by the records, attributes and indexes of dissect.ntfs.

An index is read here: the library (3.16) also shows what stands in blocks of it that are not used any more. It also
overlooks an attribute that begins in the last 64 bytes of a record, so that a small file of many names would be empty:
records get zeros behind their end. Files
belong to root, as owners of Windows have no numbers; names are UTF-8. Named streams are not shown, nor are files of
the file system itself.
"""

import io
import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from struct import Struct
from typing import Any, Final

from dissect.ntfs.c_ntfs import ATTRIBUTE_TYPE_CODE, FILE_NAME_DOS, IO_REPARSE_TAG
from dissect.ntfs.ntfs import NTFS

from diskfs.blocks import Blocks
from diskfs.entries import Entry, Id, Run
from diskfs.errors import DiskFsError
from diskfs.filesystem import MAX_DIRECTORY, UNWRITTEN, RunList

_ROOT: Final = 5
#: Records up to here are the file system's own.
_LAST_OWN: Final = 23
_DATA: Final = ATTRIBUTE_TYPE_CODE.DATA
_PACKED: Final = 0x00FF
_ENCRYPTED: Final = 0x4000
_READ_ONLY, _SYSTEM = 0x1, 0x4
#: A symlink of the Windows Subsystem for Linux: four bytes, then where it leads.
_LX_SYMLINK: Final = 0xA000001D
#: One of Interix, and of ntfs-3g: the content of a system file, then where it leads in UTF-16.
_INTERIX: Final = b"IntxLNK\x01"
_MAX_TARGET: Final = 4096
_IN_USE: Final = 0x1
_EPOCH_NS: Final = 11_644_473_600_000_000_000
#: Content that lies elsewhere than a program that opens the file sees.
_FOREIGN: Final = {
    0x80000017: "it is packed by Windows (compact files)",
    0x80000013: "its content is shared by deduplication",
    0x9000001A: "it lies in a cloud",
}
#: Zeros behind a record: the library reads as many bytes of an attribute as the largest header has.
_BEHIND: Final = 128
_MAX_RUNS: Final = 1_000_000
_MAX_PACKED: Final = 1 << 40
_LOG_FILE: Final = 2
_RESTART_PAGE: Final = Struct("<4s12xI4xH")  # magic, bytes of a page, place of the restart area
_RESTART_AREA: Final = Struct("<q4xHH")  # LSN, list of clients in use, flags
_NO_CLIENT: Final = 0xFFFF
_IS_CLEAN: Final = 0x2
_MAX_PAGE: Final = 64 << 10


def _is_open(log: bytes) -> bool:
    """Whether the file system was neither unmounted nor its log emptied; `log`: its first two pages of any size."""
    newest = -1
    found = False
    if len(log) < _RESTART_PAGE.size or log[:4] != b"RSTR":
        return False  # emptied: `ntfs-3g` does so when it mounts
    size = _RESTART_PAGE.unpack_from(log)[1]
    for at in (0, size):
        if size > _MAX_PAGE or at + 512 > len(log) or log[at : at + 4] != b"RSTR":
            continue
        _, _, area = _RESTART_PAGE.unpack_from(log, at)
        if area + _RESTART_AREA.size > 510:  # the last two bytes of 512 are kept elsewhere
            continue
        sequence, clients, flags = _RESTART_AREA.unpack_from(log, at + area)
        if sequence > newest:
            newest = sequence
            found = clients != _NO_CLIENT and not flags & _IS_CLEAN
    return found


class NtfsFileSystem:
    """See `filesystem.FileSystem`."""

    kind: Final = "ntfs"
    root: Final[Id] = (_ROOT, 0)

    def __init__(self, blocks: Blocks) -> None:
        self.notes: Sequence[str] = ()
        head = blocks.exactly(0, 512)
        sector = int.from_bytes(head[11:13], "little")
        if sector not in (256, 512, 1024, 2048, 4096) or not head[13]:
            raise DiskFsError("read", "ntfs", f"sectors of {sector} bytes")
        self._blocks = blocks
        # Descriptors and journal are not needed, and may be damaged.
        self._fs = NTFS(blocks, sds=io.BytesIO(), usnjrnl=io.BytesIO())
        self._segment = self._fs.mft.get
        self._segment.cache_clear()
        self._fs.mft.get = self._padded  # which the library's own attribute lists ask, too
        self._cluster = int(self._fs.cluster_size)
        if not 256 <= self._cluster <= 2 << 20 or not 512 <= self._fs._record_size <= 1 << 16:
            raise DiskFsError("read", "ntfs", f"clusters of {self._cluster}, records of {self._fs._record_size} bytes")
        self.label: Final = str(self._fs.volume_name or "")
        self.notes = tuple(self._notes())
        self._record = lru_cache(4096)(self._read_record)
        self._stream = lru_cache(8)(self._open)

    def entry(self, id: Id) -> Entry:
        """See `FileSystem.entry`."""
        record = self._record(id[0])
        attributes = record.attributes
        standard = attributes[ATTRIBUTE_TYPE_CODE.STANDARD_INFORMATION]
        mtime, flags = 0, 0
        if standard:
            found = standard[0].attribute.attr
            mtime, flags = int(found.LastModificationTime) * 100 - _EPOCH_NS, int(found.FileAttributes)
        links = sum(int(name.attribute.flags) != FILE_NAME_DOS for name in attributes[ATTRIBUTE_TYPE_CODE.FILE_NAME])
        target = self._target(record)
        if target is None and flags & _SYSTEM and not record.is_dir():
            target = self._interix_target(record)
        if target is not None:
            return Entry(id, stat.S_IFLNK | 0o777, 0, 0, len(target), mtime, links, None, target)
        if record.is_dir():
            return Entry(id, stat.S_IFDIR | 0o755, 0, 0, 0, mtime, 1)
        size = int(record.size()) if record.has_stream() else 0
        if size < 0:
            raise DiskFsError("read", f"record {id[0]}", f"a size of {size}")
        return Entry(id, stat.S_IFREG | (0o444 if flags & _READ_ONLY else 0o644), 0, 0, size, mtime, max(1, links))

    def names(self, id: Id) -> Iterator[tuple[bytes, Id]]:
        """See `FileSystem.names`."""
        record = self._record(id[0])
        if not record.is_dir():
            raise DiskFsError("list", f"record {id[0]}", "it is no directory")
        for entry in self._index_entries(record):
            if not entry.key_length:
                continue
            name = entry.attribute
            number = int(entry.header.FileReference.SegmentNumberLowPart)
            number |= int(entry.header.FileReference.SegmentNumberHighPart) << 32
            if name.flags == FILE_NAME_DOS or (id[0] == _ROOT and number <= _LAST_OWN):
                continue
            yield str(name.file_name).encode("utf-8", "surrogatepass"), (number, 0)

    def runs(self, id: Id) -> list[Run] | None:
        """See `FileSystem.runs`."""
        record = self._record(id[0])
        self._refuse_foreign(record)
        if not record.has_stream():
            return []
        data = record._get_stream_attributes("")
        header = data[0].header
        if header.resident:
            return None
        parts = data._get_stream_attrs()
        header = parts[0].header
        if header.flags & _ENCRYPTED:
            raise DiskFsError("read", f"record {id[0]}", "it is encrypted by Windows")
        if header.flags & _PACKED:
            return None
        # What lies behind was allocated and never written.
        valid = min(int(header.header.Form.Nonresident.ValidDataLength), int(header.size))
        runs = RunList(self._blocks, max(0, valid))
        offset = 0
        for part in parts:
            if int(part.header.lowest_vcn) * self._cluster != offset:
                raise DiskFsError("read", f"record {id[0]}", "a part of its content is missing")
            for place, count in part.header.dataruns():
                if count <= 0 or count > 1 << 52:
                    raise DiskFsError("read", f"record {id[0]}", f"a run of {count} clusters")
                if place is not None:
                    runs.add(offset, count * self._cluster, place * self._cluster)
                offset += count * self._cluster
        return runs.runs

    def read(self, id: Id, offset: int, length: int) -> bytes:
        """See `FileSystem.read`."""
        stream = self._stream(id[0])
        stream.seek(offset)
        data: bytes = stream.read(length)
        return data

    def xattrs(self, id: Id) -> Iterator[tuple[bytes, bytes]]:
        """See `FileSystem.xattrs`."""
        return iter(())

    def _padded(self, reference: Any, root: Any = None) -> Any:
        """A record of the table, before anything is read from it."""
        record = self._segment(reference, root)
        if len(record.data) == self._fs._record_size:
            record.data += bytes(_BEHIND)
        return record

    def _notes(self) -> Iterator[str]:
        """Whether it was in use: the log is never replayed here. What is wrong with the log harms nothing."""
        try:
            log = self._fs.mft.get(_LOG_FILE).open().read(2 * _MAX_PAGE)
        except Exception:  # whatever a library makes of damage
            yield f"its log cannot be read: {UNWRITTEN}"
            return
        if _is_open(log):
            yield f"it was in use, and its log is not read: {UNWRITTEN}"

    def _read_record(self, number: int) -> Any:
        record = self._fs.mft.get(number)
        if not record.header.Flags & _IN_USE:
            raise DiskFsError("read", f"record {number}", "it is not in use")
        return record

    def _open(self, number: int) -> Any:
        record = self._record(number)
        self._refuse_foreign(record)
        size = int(record.size())
        if size > _MAX_PACKED:
            raise DiskFsError("read", f"record {number}", f"{size} packed bytes")
        data = record._get_stream_attributes("")
        if not data[0].header.resident:
            clusters = sum(count for part in data for place, count in part.header.dataruns())
            # As many are unpacked at a time as the header says.
            unit = data._get_stream_attrs()[0].header.compression_unit
            if unit > 8 or clusters > (size // self._cluster + (1 << unit)) * 2:
                raise DiskFsError("read", f"record {number}", f"{clusters} clusters for {size} bytes")
        return record.open()

    def _refuse_foreign(self, record: Any) -> None:
        reparse = record.attributes[ATTRIBUTE_TYPE_CODE.REPARSE_POINT]
        why = _FOREIGN.get(int(reparse[0].attribute.tag) & 0xFFFF0FFF) if reparse else None
        if why is not None:
            raise DiskFsError("read", f"record {record.segment}", why)

    def _target(self, record: Any) -> bytes | None:
        """Where a symlink or junction leads, with slashes; None for all else."""
        reparse = record.attributes[ATTRIBUTE_TYPE_CODE.REPARSE_POINT]
        if not reparse:
            return None
        point = reparse[0].attribute
        if point.tag == _LX_SYMLINK:
            return bytes(point.buffer)[4 : 4 + _MAX_TARGET]
        if point.tag not in (IO_REPARSE_TAG.SYMLINK, IO_REPARSE_TAG.MOUNT_POINT):
            return None
        name = str(point.print_name or point.substitute_name or "").replace("\\", "/")
        return name.encode("utf-8", "surrogatepass")[:_MAX_TARGET]

    def _interix_target(self, record: Any) -> bytes | None:
        size = int(record.size()) if record.has_stream() else 0
        if not len(_INTERIX) < size <= len(_INTERIX) + 2 * _MAX_TARGET:
            return None
        data: bytes = record.open().read(size)
        if not data.startswith(_INTERIX):
            return None
        return data[len(_INTERIX) :].decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")[:_MAX_TARGET]

    def _index_entries(self, record: Any) -> Iterator[Any]:
        index = record.index("$I30")
        for entry in index.root.entries():
            if entry.is_end:
                break
            yield entry
        if index._index_stream is None:
            return
        size = index.root.bytes_per_index_buffer
        total = int(index._index_stream.size)
        if not 512 <= size <= 1 << 16 or total > MAX_DIRECTORY:
            raise DiskFsError("list", f"record {record.segment}", f"an index of {total} bytes in blocks of {size}")
        used = record.open("$I30", ATTRIBUTE_TYPE_CODE.BITMAP).read(-(-total // size // 8) + 8)
        step = size >> index._vcn_size_shift or 1
        for number in range(total // size):
            if number // 8 < len(used) and used[number // 8] >> (number % 8) & 1:
                for entry in index.index_buffer(number * step).entries():
                    if entry.is_end:
                        break
                    yield entry
