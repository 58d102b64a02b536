"""Entries of an archive as a zip archive, for systems that have nothing better.

Files, folders and symlinks, with permissions, owners and times to the second. Hard links become files. Devices, FIFOs
and sockets, attributes and ACLs have no place in it. Written front to back: what a larger file is compressed to stands
behind it. The list of entries at the end lies in a temporary file once it is large.
"""

import stat
import time
from collections.abc import Iterator
from struct import Struct
from tempfile import SpooledTemporaryFile
from typing import IO, Final

from isal import isal_zlib

from core.buffers import Buffer
from core.errors import FormatError
from pxar.accessor import ArchiveAccessor, Directory, FileNode, Hardlink, Node, Symlink
from pxar.export import UNREADABLE, CutOffError, Export, Output, Progress, Write
from pxar.extract import pieces
from pxar.extract_report import ExtractOptions, ExtractReport
from pxar.metadata import Stat

_LOCAL: Final = Struct("<4sHHHHHIIIHH")
_CENTRAL: Final = Struct("<4sHHHHHHIIIHHHHHII")
_DESCRIPTOR: Final = Struct("<4sIII")
_DESCRIPTOR_64: Final = Struct("<4sIQQ")
_END: Final = Struct("<4sHHHHIIH")
_END_64: Final = Struct("<4sQHHIIQQQQ")
_LOCATOR: Final = Struct("<4sIQI")
_TIME_EXTRA: Final = Struct("<HHBi")
_OWNER_EXTRA: Final = Struct("<HHBBIBI")
_EXTRA_64: Final = 1
_U64: Final = Struct("<Q")
_LIMIT: Final = 0xFFFF_FFFF
#: Files from this size on might be larger than `_LIMIT` when they are compressed.
_LARGE: Final = _LIMIT - (64 << 20)
_UNIX: Final = 3 << 8
_VERSION, _VERSION_64 = 20, 45
_SIZE_BEHIND, _UTF_8 = 1 << 3, 1 << 11
_STORED, _DEFLATED = 0, 8
_MAX_NAME: Final = 0xFFFF
#: Bytes of the list of entries that stay in memory.
_IN_MEMORY: Final = 8 << 20


def write_zip(
    accessor: ArchiveAccessor,
    write: Write,
    options: ExtractOptions | None = None,
    *,
    start: Directory | None = None,
    prefix: bytes = b"",
    folder: bytes = b"",
    report: ExtractReport | None = None,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write the archive, or its folder `start` at the path `prefix`, as zip; its entries in a folder called `folder`.

    Of `options` the patterns and `drop_setuid` count. An entry that cannot be read is left out with a warning.

    Raises:
        FleeceError: as `tar_stream.write_tar`.
    """
    report = report or ExtractReport()
    export = Export(accessor, options or ExtractOptions(), start, prefix, report, progress, folder)
    with SpooledTemporaryFile(max_size=_IN_MEMORY) as central:
        archive = _Zip(export, Output(write), central)
        export.each(archive.add)
        archive.finish()
    report.settle()
    return report


class _Zip:
    def __init__(self, export: Export, out: Output, central: IO[bytes]) -> None:
        self._export, self._report, self._out, self._central = export, export.report, out, central
        self._count = 0

    def add(self, path: bytes, node: Node) -> None:
        """Write one entry, if a zip archive can hold it."""
        if not path:
            return
        report = self._report
        if isinstance(node, Hardlink):
            node = node.follow()
        if len(path) >= _MAX_NAME:
            raise FormatError("write", "zip", f"a path of {len(path)} bytes, zip archives have up to {_MAX_NAME}")
        if isinstance(node, Directory):
            self._whole(path + b"/", node.stat, b"")
            report.folders += 1
        elif isinstance(node, Symlink):
            self._whole(path, node.stat, node.target)
            report.others += 1
        elif isinstance(node, FileNode):
            self._file(path, node)
        else:
            report.left_out += 1

    def finish(self) -> None:
        """Write the list of entries."""
        out, central, count = self._out, self._central, self._count
        start, size = out.position, central.tell()
        central.seek(0)
        while block := central.read(1 << 20):
            out.write(block)
        if count >= 0xFFFF or start >= _LIMIT or size >= _LIMIT:
            end = out.position
            made_by = _UNIX | _VERSION_64
            out.write(_END_64.pack(b"PK\6\6", _END_64.size - 12, made_by, _VERSION_64, 0, 0, count, count, size, start))
            out.write(_LOCATOR.pack(b"PK\6\7", 0, end, 1))
        few = min(count, 0xFFFF)
        out.write(_END.pack(b"PK\5\6", 0, 0, few, few, min(size, _LIMIT), min(start, _LIMIT), 0))
        out.flush()

    def _whole(self, path: bytes, found: Stat, content: bytes) -> None:
        """An entry whose content is at hand and stays as it is."""
        position, crc = self._out.position, isal_zlib.crc32(content)
        self._local(path, found, _STORED, crc, len(content), len(content))
        self._out.write(content)
        self._listed(path, found, _STORED, crc, len(content), len(content), position)

    def _file(self, path: bytes, node: FileNode) -> None:
        found, size = node.stat, node.size
        content = pieces(self._export.accessor, node)
        first = next(content, b"")
        if len(first) == size:
            data = bytes(first)
            packed = isal_zlib.compress(data, 1, wbits=-15) if data else b""
            method = _DEFLATED if data and len(packed) < size else _STORED
            packed = packed if method == _DEFLATED else data
            position, crc = self._out.position, isal_zlib.crc32(data)
            self._local(path, found, method, crc, len(packed), size)
            self._out.write(packed)
            self._listed(path, found, method, crc, len(packed), size, position)
            self._report.size += size
        else:
            self._large_file(path, found, size, first, content)
        self._report.files += 1

    def _large_file(self, path: bytes, found: Stat, size: int, first: Buffer, content: Iterator[Buffer]) -> None:
        out, position, crc, packed_size = self._out, self._out.position, 0, 0
        is_large = size >= _LARGE
        self._local(path, found, _DEFLATED, 0, 0, size, behind=True)
        packer = isal_zlib.compressobj(1, wbits=-15)
        piece: Buffer | None = first
        while piece is not None:
            crc = isal_zlib.crc32(piece, crc)
            packed = packer.compress(piece)
            packed_size += len(packed)
            out.write(packed)
            self._report.size += len(piece)
            self._export.tick()
            try:
                piece = next(content, None)
            except UNREADABLE as error:
                raise CutOffError(error) from error
        packed = packer.flush()
        packed_size += len(packed)
        out.write(packed)
        descriptor = _DESCRIPTOR_64 if is_large else _DESCRIPTOR
        out.write(descriptor.pack(b"PK\7\10", crc, packed_size, size))
        self._listed(path, found, _DEFLATED, crc, packed_size, size, position, behind=True)

    def _local(
        self, path: bytes, found: Stat, method: int, crc: int, packed: int, size: int, *, behind: bool = False
    ) -> None:
        extra, version = _extra(found), _VERSION
        if size >= _LARGE:
            extra = _extra_64(0, 0) + extra
            version, packed, size = _VERSION_64, _LIMIT, _LIMIT
        elif behind:
            size = 0
        header = _LOCAL.pack(
            b"PK\3\4", version, _flags(path, behind), method, *_dos_time(found), crc, packed, size,
            len(path), len(extra),
        )  # fmt: skip
        self._out.write(header + path + extra)

    def _listed(
        self, path: bytes, found: Stat, method: int, crc: int, packed: int, size: int, position: int, *,
        behind: bool = False,
    ) -> None:  # fmt: skip
        """Note the entry for the list at the end."""
        long = [number for number in (size, packed, position) if number >= _LIMIT]
        extra = (_extra_64(*long) if long else b"") + _extra(found)
        version = _VERSION_64 if long or size >= _LARGE else _VERSION
        mode = found.mode
        if self._export.options.drop_setuid and not stat.S_ISDIR(mode):
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
        attributes = (mode & 0xFFFF) << 16 | (0x10 if stat.S_ISDIR(mode) else 0)
        header = _CENTRAL.pack(
            b"PK\1\2", _UNIX | version, version, _flags(path, behind), method, *_dos_time(found), crc,
            min(packed, _LIMIT), min(size, _LIMIT), len(path), len(extra), 0, 0, 0, attributes, min(position, _LIMIT),
        )  # fmt: skip
        self._central.write(header + path + extra)
        self._count += 1


def _flags(path: bytes, behind: bool) -> int:
    flags = _SIZE_BEHIND if behind else 0
    try:
        path.decode()
    except UnicodeDecodeError:
        return flags
    return flags | _UTF_8


def _extra_64(*numbers: int) -> bytes:
    return Struct("<HH").pack(_EXTRA_64, 8 * len(numbers)) + b"".join(_U64.pack(number) for number in numbers)


def _extra(found: Stat) -> bytes:
    extra = _OWNER_EXTRA.pack(0x7875, 11, 1, 4, found.uid, 4, found.gid)
    if -(1 << 31) <= found.mtime_s < 1 << 31:
        extra += _TIME_EXTRA.pack(0x5455, 5, 1, found.mtime_s)
    return extra


def _dos_time(found: Stat) -> tuple[int, int]:
    """Time and date, for programs that do not read the other one; from 1980 to 2107."""
    year, month, day, hour, minute, second = time.gmtime(min(max(found.mtime_s, 315_532_800), 4_354_819_199))[:6]
    return hour << 11 | minute << 5 | second // 2, (year - 1980) << 9 | month << 5 | day
