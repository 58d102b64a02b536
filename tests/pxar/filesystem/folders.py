"""Folders whose entries are read, and what they are compared with."""

import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from pxar import filesystem
from pxar.filesystem import (
    DEFAULT,
    Scanned,
    scan,
    supported_features,
)
from pxar.metadata import NO_PERMISSIONS, Acl, DefaultAcl, Metadata, Stat

EXT4 = DEFAULT & supported_features(0xEF53)
READER = vars(filesystem)["_reader"]  # the C part where it is built
NOBODY = 65534
FCAPS = struct.pack("<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0)


class Folder:
    """A folder and the calls on it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def __getitem__(self, name: bytes | str) -> Scanned:
        """What scan says of `name`."""
        result = self.result(name)
        assert not isinstance(result, int), os.strerror(abs(result))
        return result

    def result(self, name: bytes | str, features: int = EXT4, *, skip_e2big: bool = False) -> Scanned | int:
        return scan(self.fd, [os.fsencode(name)], features, skip_e2big=skip_e2big)[0]

    def metadata(self, name: bytes | str, features: int = EXT4) -> Metadata:
        result = self.result(name, features)
        assert not isinstance(result, int), os.strerror(abs(result))
        return Metadata.parse(result[1])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def acl(*entries: tuple[int, int, int]) -> bytes:
    return b"\2\0\0\0" + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NO_ID = 0xFFFF_FFFF


def stat_of(path: Path, flags: int = 0) -> Stat:
    found = path.lstat()
    return Stat(found.st_mode, flags, found.st_uid, found.st_gid, *divmod(found.st_mtime_ns, 10**9))


def zoo(base: Path) -> dict[bytes, Metadata]:
    """One of everything in `base`, and what an archive shall say of it."""
    expected: dict[bytes, Metadata] = {}

    def add(path: Path, flags: int = 0, **attributes: object) -> None:
        expected[os.fsencode(path.name)] = Metadata(stat_of(path, flags), **attributes)  # type: ignore[arg-type]

    for name in (b"plain", b"\xff\xfe\n", b"n" * 255, b"with:xattrs"):
        (base / os.fsdecode(name)).write_bytes(b"content")
    plain = base / "plain"
    os.chown(plain, 12, 4_000_000_000)
    plain.chmod(0o6751)
    os.utime(plain, ns=(0, -1_500_000_000))
    add(plain)
    add(base / os.fsdecode(b"\xff\xfe\n"))
    add(base / ("n" * 255))

    path = base / "with:xattrs"
    for name, value in ((b"user.b", b"\0b\xff"), (b"user.a", b""), (b"trusted.t", b"t"), (b"security.NTACL", b"n")):
        os.setxattr(path, name, value)
    os.setxattr(path, b"security.other", b"not stored")
    os.setxattr(path, b"security.capability", FCAPS)
    order = [os.fsencode(name) for name in os.listxattr(path)]
    kept = [name for name in order if not name.startswith(b"security.") or name == b"security.NTACL"]
    add(path, xattrs=tuple((name, os.getxattr(path, name)) for name in kept), fcaps=FCAPS)

    path = base / "acl"
    path.touch(0o640)
    entries = [(1, 6, NO_ID), (2, 7, 500), (2, 4, 20), (4, 5, NO_ID), (8, 1, 9), (8, 2, 3), (0x10, 4, NO_ID)]
    os.setxattr(path, b"system.posix_acl_access", acl(*entries, (0x20, 0, NO_ID)))
    add(path, acl=Acl(users=((20, 4), (500, 7)), groups=((3, 2), (9, 1)), group_obj=5))

    path = base / "folder"
    path.mkdir(0o750)
    entries = [(1, 7, NO_ID), (2, 3, 77), (4, 5, NO_ID), (0x10, 1, NO_ID), (0x20, 2, NO_ID)]
    os.setxattr(path, b"system.posix_acl_default", acl(*entries))
    add(path, acl=Acl(default=DefaultAcl(7, 5, 2, 1), default_users=((77, 3),)))
    path = base / "simple default"
    path.mkdir()
    os.setxattr(path, b"system.posix_acl_default", acl((1, 7, NO_ID), (4, 0, NO_ID), (0x20, 1, NO_ID)))
    add(path, acl=Acl(default=DefaultAcl(7, 0, 1, NO_PERMISSIONS)))

    (base / "symlink").symlink_to(b"to \xff nowhere")
    os.mkfifo(base / "fifo", 0o600)
    with socket.socket(socket.AF_UNIX) as unix, Folder(base) as folder:
        unix.bind(f"/proc/self/fd/{folder.fd}/socket")
    os.mknod(base / "block", stat.S_IFBLK | 0o640, os.makedev(259, 1_000_000))
    os.mknod(base / "character", stat.S_IFCHR | 0o600, os.makedev(240, 77))
    for special in ("symlink", "fifo", "socket", "block", "character"):
        os.utime(base / special, ns=(0, 5_000_000_000_123_456_789), follow_symlinks=False)
        add(base / special)
    return expected


def as_nobody(work: Callable[[], object]) -> str:
    """What `work` returns (its text) in a child process without any rights."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(writing, repr(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(child, 0)
    return text
