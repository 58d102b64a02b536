"""Trees to restore, and what a file system knows of restored ones."""

import fcntl
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.buffers import Buffer
from core.errors import FormatError
from pxar.accessor import ArchiveAccessor
from pxar.encoder import ArchiveEncoder
from pxar.extract_report import ExtractOptions
from pxar.features import DEFAULT, Features
from pxar.filesystem import set_flags
from pxar.metadata import Metadata, Stat, encode_metadata
from pxar.patterns import MatchPattern
from tests.pxar.archives import Item, MemoryBytes, MemorySink, archived, item

MIB = 1 << 20
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
EVERYTHING = DEFAULT | Features.NODUMP
REPLACE = ExtractOptions(
    allow_existing=True, overwrite_files=True, overwrite_symlinks=True, overwrite_hardlinks=True, overwrite_others=True
)


def opened(root: Item, *, split: bool = True) -> ArchiveAccessor:
    archive, payload = archived(root, split=split)
    return ArchiveAccessor(MemoryBytes(archive), MemoryBytes(payload) if split else None)


def folder(children: dict[bytes, Item] | None = None, mode: int = 0o755, **more: Any) -> Item:
    return item(0o040000 | mode, children=children or {}, **more)


def file(content: bytes = b"", mode: int = 0o644, **more: Any) -> Item:
    return item(0o100000 | mode, content=content, **more)


def symlink(target: bytes) -> Item:
    return item(0o120777, target=target)


def hardlink(target: bytes) -> Item:
    one = item(0o100644, target=target)
    one.kind = one.kind.HARDLINK
    return one


def patterns(*texts: bytes) -> tuple[MatchPattern, ...]:
    return tuple(MatchPattern.parse(text) for text in texts)


def names_in(root: Path) -> list[str]:
    return [path.name for path in root.iterdir()]


def names_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def described(root: Path, *, features: Features = EVERYTHING) -> dict[bytes, tuple[Any, ...]]:
    """All that a file system knows of every entry below `root`, and of itself; of equal trees it is equal."""
    top = os.fsencode(root)
    rows: dict[bytes, tuple[Any, ...]] = {}
    links: dict[int, bytes] = {}

    def add(path: bytes, shown: bytes) -> None:
        found = os.lstat(path)
        more: tuple[Any, ...] = ()
        if stat.S_ISREG(found.st_mode):
            more = Path(os.fsdecode(path)).read_bytes(), links.setdefault(found.st_ino, shown)
        elif stat.S_ISLNK(found.st_mode):
            more = (os.readlink(path),)  # noqa: PTH115 - names are bytes
        elif stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode):
            more = (found.st_rdev,)
        if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
            more += tuple((name, os.getxattr(path, name)) for name in sorted(os.listxattr(path)))
            more += attributes(path)
        rows[shown] = (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, *more)
        if stat.S_ISDIR(found.st_mode):
            for name in sorted(os.listdir(path)):  # noqa: PTH208 - names are bytes
                add(path + b"/" + name, shown + b"/" + name)

    add(top, b"")
    return rows


def attributes(path: bytes) -> tuple[int, int]:
    """Inode flags without the one that says how a file lies on the disk, and project."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        (flags,) = struct.unpack("=I", fcntl.ioctl(fd, 0x8008_6601, bytes(4)))
        return flags & ~0x80000, struct.unpack("=IIIII8x", fcntl.ioctl(fd, 0x801C_581F, bytes(28)))[3]
    except OSError:
        return 0, 0
    finally:
        os.close(fd)


# --- what comes back ---


def varied_tree(root: Path) -> None:
    """A tree with all that ext4 can hold."""
    root.mkdir()
    (root / "below/deeper").mkdir(parents=True)
    (root / "plain").write_bytes(b"plain\n")
    (root / "holes").write_bytes(b"a" * 5000)
    with (root / "holes").open("r+b") as holed:
        holed.seek(3 * MIB)
        holed.write(b"z" * 10)
        holed.truncate(5 * MIB)
    (root / "large").write_bytes(os.urandom(3 * MIB) + bytes(MIB) + os.urandom(100))
    os.link(root / "large", root / "below/large too")
    os.link(root / "plain", root / "below/deeper/plain too")
    (root / "caps").write_bytes(b"\x7fELF")
    os.setxattr(root / "caps", "security.capability", struct.pack("<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0))
    (root / "setuid").write_bytes(b"#!")
    os.chown(root / "setuid", 1000, 100)
    (root / "setuid").chmod(0o6755)
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in [(1, 6, 2**32 - 1), (2, 4, 1001), (4, 4, 2**32 - 1), (8, 2, 2001), (16, 6, 2**32 - 1),
                      (32, 0, 2**32 - 1)]
    )  # fmt: skip
    (root / "acl").write_bytes(b"acl")
    os.setxattr(root / "acl", "system.posix_acl_access", acl)
    os.setxattr(root / "below", "system.posix_acl_access", acl)
    os.setxattr(root / "below", "system.posix_acl_default", acl)
    os.setxattr(root / "below/deeper", "user.on a folder", bytes(range(256)))
    os.setxattr(root / "plain", "user.empty", b"")
    os.setxattr(root / "plain", "trusted.kept", b"x" * 300)
    (root / "symlink").symlink_to("/etc/passwd")
    os.chown(root / "symlink", 1234, 5678, follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", 0o020666, os.makedev(1, 3))
    os.mknod(root / "block", 0o060600, os.makedev(259, 70_000))
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(root / "socket"))
    (root / "secret").write_bytes(b"s")
    (root / "secret").chmod(0)
    os.chown(root / "secret", 4_000_000_000, 65534)
    (root / os.fsdecode(b"\xff\n" + b"n" * 250)).touch()
    (root / "long symlink").symlink_to(("a" * 200 + "/") * 5)
    for number, path in enumerate([root, *sorted(root.rglob("*"))]):
        os.utime(path, ns=(10**9, number * 1_000_000_007 - 5 * 10**9), follow_symlinks=False)


def set_attributes(root: Path) -> None:
    """Inode flags, which come last."""
    for path, flags in (
        (root / "plain", Features.APPEND | Features.NODUMP),
        (root / "large", Features.IMMUTABLE),
        (root / "holes", Features.NOATIME | Features.SYNC),
        (root / "below", Features.DIRSYNC | Features.IMMUTABLE),
    ):
        fd = os.open(path, os.O_RDONLY)
        try:
            set_flags(fd, flags, flags)
        finally:
            os.close(fd)


ROOT = b"etc/passwd"


def sample() -> Item:
    return folder(
        {
            b"etc": folder({b"passwd": file(b"root"), b"ssh": folder({b"key": file(b"k"), b"key.pub": file(b"p")})}),
            b"home": folder({b"me": folder({b"a.tmp": file(b"t"), b"a.txt": file(b"x"), b"same": hardlink(ROOT)})}),
            b"var": folder({b"log": folder({b"messages": file(b"m")})}),
        }
    )  # fmt: skip


def forged(write: Callable[[ArchiveEncoder], None]) -> ArchiveAccessor:
    """An archive with what an honest tree cannot have, such as two entries of one name."""
    sink, payload = MemorySink(), MemorySink()
    encoder = ArchiveEncoder(sink, payload)
    encoder.begin(encode_metadata(Metadata(Stat(0o040755))))
    write(encoder)
    encoder.finish()
    return ArchiveAccessor(MemoryBytes(bytes(sink.data)), MemoryBytes(bytes(payload.data)))


FILE = encode_metadata(Metadata(Stat(0o100644)))
LINK = encode_metadata(Metadata(Stat(0o120777)))
FOLDER = encode_metadata(Metadata(Stat(0o040755)))


def add_file(encoder: ArchiveEncoder, name: bytes, content: bytes) -> int:
    position = encoder.begin_file(name, FILE, len(content))
    encoder.content.write(content)
    encoder.end_file()
    return position


class Damaged(MemoryBytes):
    """A stream of which a range cannot be read."""

    def __init__(self, data: Buffer, start: int, end: int, error: Exception | None = None) -> None:
        super().__init__(data)
        self.start, self.end = start, end
        self.error = error or FormatError("read", "chunk 7", "the digest does not match")

    def read(self, offset: int, length: int) -> Buffer:
        if offset < self.end and offset + length > self.start:
            raise self.error
        return super().read(offset, length)


def chain(depth: int, name: bytes) -> ArchiveAccessor:
    """`depth` folders, each in the one before, and a file at the bottom."""

    def write(encoder: ArchiveEncoder) -> None:
        for _ in range(depth):
            encoder.directory(name, FOLDER)
        add_file(encoder, b"bottom", b"end")
        for _ in range(depth):
            encoder.end_directory()

    return forged(write)
