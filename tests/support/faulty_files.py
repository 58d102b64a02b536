"""A file system that answers as told, also with errors: `python -m tests.support.faulty_files MOUNTPOINT`."""

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pyfuse3
import pytest
import trio

#: Extended attributes by file, in the order of the listing; an int is the errno of reading the value.
XATTRS: Final[dict[bytes, dict[bytes, bytes | int] | int]] = {
    b"plain": {},
    b"order": {b"user.z": b"1", b"trusted.b": b"", b"user.a": b"\0\1"},
    b"large": {b"user.1": b"x" * 1024, b"user.2": b"y" * 1025, b"security.NTACL": b"z" * 65536, b"user.3": b"3"},
    b"gone": {b"user.gone": errno.ENODATA, b"user.unsupported": errno.EOPNOTSUPP, b"user.kept": b"kept"},
    b"ignored": {b"security.selinux": b"s", b"system.other": b"o", b"security.ima": b"i", b"user.kept": b"kept"},
    b"too-big": {b"user.first": b"1", b"user.big": errno.E2BIG, b"user.last": b"3"},
    b"broken": {b"user.first": b"1", b"user.broken": errno.EIO},
    b"broken-list": errno.EIO,
    b"no-list": errno.EOPNOTSUPP,
    b"big-list": errno.E2BIG,
    # Longer than archives hold.
    b"too-long": {b"user.first": b"1", b"user." + b"n" * 250: b"x" * 65536},
    b"many": {b"user." + b"%03d" % number * 80: b"v" for number in range(200)},
}
#: Names that are listed and cannot be found, with the errno.
LOST: Final = {b"stale": errno.ESTALE, b"lost": errno.ENOENT, b"hidden": errno.EACCES, b"damaged": errno.EIO}
_NAMES: Final = [*XATTRS, *LOST]
#: The first name once more, as if it had been removed and made again meanwhile.
_LISTED: Final = [*enumerate(_NAMES), (0, _NAMES[0])]


class _Operations(pyfuse3.Operations):
    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        entry.st_nlink = 1
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def lookup(self, parent: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        if name not in XATTRS:
            raise pyfuse3.FUSEError(LOST.get(name, errno.ENOENT))
        return self._attributes(_NAMES.index(name) + 2)

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        return pyfuse3.StatvfsData()

    async def opendir(self, inode: int, ctx: object) -> int:
        return inode

    async def readdir(self, handle: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        for place, (number, name) in list(enumerate(_LISTED))[start:]:
            if not pyfuse3.readdir_reply(token, name, self._attributes(number + 2), place + 1):
                return

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode)

    async def listxattr(self, inode: int, ctx: object) -> list[bytes]:
        if inode == pyfuse3.ROOT_INODE:
            return []
        xattrs = XATTRS[_NAMES[inode - 2]]
        if isinstance(xattrs, int):
            raise pyfuse3.FUSEError(xattrs)
        return list(xattrs)

    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:
        xattrs = XATTRS[_NAMES[inode - 2]] if inode != pyfuse3.ROOT_INODE else {}
        value = xattrs.get(name, errno.ENODATA) if isinstance(xattrs, dict) else xattrs
        if isinstance(value, int):
            raise pyfuse3.FUSEError(value)
        return value


@contextmanager
def faulty_files(point: Path) -> Iterator[Path]:
    """Mounts it on the new folder `point` while the block runs; skips where that cannot be."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse and rights to mount it")
    point.mkdir()
    with subprocess.Popen([sys.executable, "-m", "tests.support.faulty_files", point]) as process:
        try:
            deadline = time.monotonic() + 60
            while not point.is_mount():
                assert process.poll() is None, "it ended before it was mounted"
                assert time.monotonic() < deadline, "it was not mounted"
                time.sleep(0.02)
            yield point
        finally:
            if point.is_mount():
                subprocess.run(["umount", point], check=True, timeout=60)
            process.terminate()


def main() -> None:
    """Serve until it is unmounted."""
    pyfuse3.init(_Operations(), sys.argv[1], {"fsname=faulty-files", "default_permissions"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
