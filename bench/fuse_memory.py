"""The limit of `fleece mount`: a FUSE file system of the same kind that serves one file from memory.

    python bench/fuse_memory.py FILE MOUNTPOINT

FILE is read into memory (or mapped, with `--map`) and shown as MOUNTPOINT/FILE's name until SIGTERM, SIGINT or an
unmount. It answers requests in the fewest steps that pyfuse3 allows, with the mount options and the read-ahead that
Fleece's own mount uses, so what it reaches is what FUSE, trio and Python allow on this machine. Once it is usable it
prints `ready`.
"""

import argparse
import errno
import mmap
import signal
import stat
from collections.abc import Sequence
from pathlib import Path

import pyfuse3
import trio

from fusefs.kernel import is_served, mount_options, raise_read_ahead

FILE_INODE = 2
#: Nothing changes, so the kernel may keep names and attributes for long.
TIMEOUT_S = 3600.0


class MemoryFile(pyfuse3.Operations):
    """One folder with one file in it."""

    supports_dot_lookup = False

    def __init__(self, name: str, data: memoryview) -> None:
        super().__init__()
        self.name = name.encode()
        self.data = data

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o555 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o444
        entry.st_size = 0 if inode == pyfuse3.ROOT_INODE else len(self.data)
        entry.st_blocks = (entry.st_size + 511) // 512
        entry.st_nlink = 1
        entry.entry_timeout = entry.attr_timeout = TIMEOUT_S
        return entry

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self.attributes(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if parent_inode != pyfuse3.ROOT_INODE or name != self.name:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.attributes(FILE_INODE)

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        if start_id == 0:
            pyfuse3.readdir_reply(token, self.name, self.attributes(FILE_INODE), 1)

    async def releasedir(self, fh: int) -> None:
        pass

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> memoryview:  # type: ignore[override]  # a buffer will do
        return self.data[off : off + size]

    async def release(self, fh: int) -> None:
        pass

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass


async def serve(mountpoint: str) -> None:
    """Answer requests until a signal or an unmount."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal)
        nursery.start_soon(_announce, mountpoint)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def _announce(mountpoint: str) -> None:
    await trio.to_thread.run_sync(is_served, mountpoint, abandon_on_cancel=True)
    raise_read_ahead(mountpoint)
    print("ready", flush=True)


async def _stop_on_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            pyfuse3.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("mountpoint")
    parser.add_argument("--map", action="store_true", help="map the file instead of reading it (it is on tmpfs)")
    arguments = parser.parse_args()
    with arguments.file.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if arguments.map else file.read()
    operations = MemoryFile(arguments.file.name, memoryview(data))
    pyfuse3.init(operations, arguments.mountpoint, mount_options("memory"))
    try:
        trio.run(serve, arguments.mountpoint)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
