"""Entries of an archive as a tar archive in the POSIX (pax) format.

Extended attributes and capabilities are `SCHILY.xattr.` records, ACLs `SCHILY.acl.` records: what GNU tar restores with
`--xattrs --acls`, and bsdtar with `-p`. Sockets have no place in a tar archive; inode flags and projects are left out.
"""

import stat
from struct import Struct
from typing import Final

from pxar.accessor import ArchiveAccessor, Device, Directory, FileNode, Hardlink, Node, Symlink
from pxar.export import UNREADABLE, CutOffError, Export, Output, Progress, Write
from pxar.extract import pieces
from pxar.extract_report import ExtractOptions, ExtractReport
from pxar.features import Features
from pxar.filesystem import acl_values
from pxar.format import Kind
from pxar.metadata import Metadata, Stat

_BLOCK: Final = 512
#: An archive ends in two blocks of zeros, and its size is a multiple of this.
_RECORD: Final = 20 * _BLOCK
_HEADER: Final = Struct(
    "100s"  #    0  name
    "8s"    #  100  mode, octal
    "8s8s"  #  108  uid, gid
    "12s"   #  124  size
    "12s"   #  136  mtime, Unix seconds
    "8s"    #  148  sum of all bytes, with spaces here
    "c"     #  156  type
    "100s"  #  157  target of a link
    "8s"    #  257  ustar, NUL, 00
    "64x"   #  265  names of user and group
    "8s8s"  #  329  device numbers
    "167x"  #  345  prefix of the name
)  # fmt: skip
_TYPES: Final = {
    Kind.FILE: b"0", Kind.HARDLINK: b"1", Kind.SYMLINK: b"2", Kind.CHARACTER: b"3", Kind.BLOCK: b"4",
    Kind.DIRECTORY: b"5", Kind.FIFO: b"6",
}  # fmt: skip
_MAX_7: Final = 0o7777777
_MAX_11: Final = 0o77777777777
_ACL_ENTRY: Final = Struct("<HHI")
_ACL_TAGS: Final = {1: "user", 2: "user", 4: "group", 8: "group", 16: "mask", 32: "other"}
_NAMED: Final = frozenset({2, 8})
_NANOSECONDS: Final = 10**9
_NO_METADATA: Final = Metadata(Stat(0o100644))


def write_tar(
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
    """Write the archive, or its folder `start` at the path `prefix`, as tar; its entries in a folder called `folder`.

    A hard link whose file is not among the entries becomes that file. Of `options` the patterns count, the kinds that
    are wanted, XATTRS, ACL and FCAPS, and `drop_setuid`. An entry that cannot be read is left out with a warning.

    Raises:
        FleeceError: what `write` raises; the archive cannot be read any more, or not to the end of a file that has
            begun. The output is of no use then, and does not end as a tar archive does.
    """
    report = report or ExtractReport()
    export = Export(accessor, options or ExtractOptions(), start, prefix, report, progress, folder)
    out = Output(write)
    export.each(lambda path, node: _entry(export, out, path, node))
    out.write(bytes(2 * _BLOCK))
    out.write(bytes(-out.position % _RECORD))
    out.flush()
    report.settle()
    return report


def _entry(export: Export, out: Output, path: bytes, node: Node) -> None:
    report, kind = export.report, node.kind
    features = export.options.features
    is_device = kind in (Kind.BLOCK, Kind.CHARACTER)
    if kind is Kind.SOCKET or (is_device and not features & Features.DEVICE_NODES) or (
        kind is Kind.FIFO and not features & Features.FIFOS
    ):  # fmt: skip
        report.left_out += 1
    elif isinstance(node, FileNode):
        _file(export, out, path, node, copy=False)
    elif isinstance(node, Hardlink):
        file = node.follow()
        target = export.path_of(node, file)
        if target is None:
            _file(export, out, path, file, copy=True)
        else:
            out.write(_header(path, file.metadata, Kind.HARDLINK, target=target, drop_setuid=_drops(export)))
            report.hardlinks += 1
    else:
        metadata = node.metadata
        records = _records(metadata, features)
        if isinstance(node, Directory):
            report.folders += bool(path)
            path = path + b"/" if path else b"./"
        else:
            report.others += 1
        target = node.target if isinstance(node, Symlink) else b""
        device = (node.major, node.minor) if isinstance(node, Device) else (0, 0)
        out.write(
            _header(path, metadata, kind, target=target, device=device, records=records, drop_setuid=_drops(export))
        )


def _drops(export: Export) -> bool:
    return export.options.drop_setuid


def _file(export: Export, out: Output, path: bytes, node: FileNode, *, copy: bool) -> None:
    metadata = node.metadata
    features = export.options.features
    if _drops(export):
        features &= ~Features.FCAPS
    records = _records(metadata, features)
    content = pieces(export.accessor, node)
    first = next(content, b"")
    out.write(_header(path, metadata, Kind.FILE, size=node.size, records=records, drop_setuid=_drops(export)))
    out.write(first)
    export.report.size += len(first)
    try:
        for piece in content:
            out.write(piece)
            export.report.size += len(piece)
            export.tick()
    except UNREADABLE as error:
        raise CutOffError(error) from error
    out.write(bytes(-node.size % _BLOCK))
    export.report.files += 1
    export.exported(node, path, copy=copy)


def _records(metadata: Metadata, features: Features) -> list[tuple[bytes, bytes]]:
    """The attributes as pax records."""
    records = []
    if features & Features.XATTRS:
        for name, value in metadata.xattrs:
            # As GNU tar writes names that would end the keyword; a newline does not, as records begin with their size.
            keyword = name.replace(b"%", b"%25").replace(b"=", b"%3D")
            records.append((b"SCHILY.xattr." + keyword, value))
    if metadata.fcaps is not None and features & Features.FCAPS:
        records.append((b"SCHILY.xattr.security.capability", metadata.fcaps))
    if metadata.acl and features & Features.ACL and not stat.S_ISLNK(metadata.stat.mode):
        values = acl_values(metadata.stat.mode, metadata.acl)
        records.append((b"SCHILY.acl.access", _acl_text(values.access)))
        if values.default is not None:
            records.append((b"SCHILY.acl.default", _acl_text(values.default)))
    return records


def _acl_text(value: bytes) -> bytes:
    """`user::rw-,user:1001:r--,...` of the binary form."""
    entries = []
    for tag, permissions, identity in _ACL_ENTRY.iter_unpack(value[4:]):
        who = str(identity) if tag in _NAMED else ""
        letters = "".join(letter if permissions & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        entries.append(f"{_ACL_TAGS[tag]}:{who}:{letters}")
    return ",".join(entries).encode()


def _header(
    path: bytes,
    metadata: Metadata,
    kind: Kind,
    *,
    size: int = 0,
    target: bytes = b"",
    device: tuple[int, int] = (0, 0),
    records: list[tuple[bytes, bytes]] | None = None,
    drop_setuid: bool = False,
) -> bytes:
    """The blocks before an entry's content."""
    found = metadata.stat
    records = list(records or ())
    if len(path) > 100 or not path.isascii():
        records.append((b"path", path))
    if len(target) > 100 or not target.isascii():
        records.append((b"linkpath", target))
    time = found.mtime_s * _NANOSECONDS + found.mtime_ns
    if found.mtime_ns or not 0 <= found.mtime_s <= _MAX_11:
        seconds, nanoseconds = divmod(abs(time), _NANOSECONDS)
        records.append((b"mtime", b"%s%d.%09d" % (b"-" if time < 0 else b"", seconds, nanoseconds)))
    for keyword, number, limit in (
        (b"uid", found.uid, _MAX_7),
        (b"gid", found.gid, _MAX_7),
        (b"size", size, _MAX_11),
        (b"SCHILY.devmajor", device[0], _MAX_7),
        (b"SCHILY.devminor", device[1], _MAX_7),
    ):
        if number > limit:
            records.append((keyword, b"%d" % number))
    mode = found.mode & 0o7777
    if drop_setuid and kind is not Kind.DIRECTORY:
        mode &= 0o1777
    blocks = b""
    if not (_is_text(path) and _is_text(target)):
        # Records hold UTF-8 unless they say so. bsdtar insists on that, GNU tar says that it does not know the word.
        records.insert(0, (b"hdrcharset", b"BINARY"))
    if records:
        data = b"".join(_record(keyword, value) for keyword, value in records)
        name = b"PaxHeaders/" + path.rstrip(b"/").rpartition(b"/")[2][:80]
        blocks = _block(name, 0o644, 0, 0, len(data), max(0, min(found.mtime_s, _MAX_11)), b"x", b"", (0, 0))
        blocks += data + bytes(-len(data) % _BLOCK)
    mtime = found.mtime_s if 0 <= found.mtime_s <= _MAX_11 else 0
    return blocks + _block(path, mode, found.uid, found.gid, size, mtime, _TYPES[kind], target, device)


def _is_text(path: bytes) -> bool:
    try:
        path.decode()
    except UnicodeDecodeError:
        return False
    return True


def _block(
    name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, kind: bytes, target: bytes,
    device: tuple[int, int],
) -> bytes:  # fmt: skip
    major, minor = (_octal(number, _MAX_7) for number in device)
    if len(name) > 100:
        name = name[:100].rstrip(b"/")
    fields = [
        name, _octal(mode, _MAX_7), _octal(uid, _MAX_7), _octal(gid, _MAX_7), _octal(size, _MAX_11),
        _octal(mtime, _MAX_11), b" " * 8, kind, target[:100], b"ustar\x0000", major, minor,
    ]  # fmt: skip
    fields[6] = b"%06o\0 " % sum(_HEADER.pack(*fields))
    return _HEADER.pack(*fields)


def _octal(number: int, limit: int) -> bytes:
    """The digits; zeros if a record says it instead."""
    digits = 7 if limit == _MAX_7 else 11
    return b"%0*o" % (digits, number if number <= limit else 0)


def _record(keyword: bytes, value: bytes) -> bytes:
    """`LENGTH KEYWORD=VALUE`, with its own length counted."""
    rest = len(keyword) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, keyword, value)
