"""What the kernel asks for, answered from the tree. The only module beside `mount` that talks to pyfuse3."""

import errno
import itertools
import logging
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

import pyfuse3
import trio

from core.buffers import Buffer
from core.errors import FleeceError
from fusefs.errors import StaleError, errno_of
from fusefs.opened import Content, OpenSnapshot
from fusefs.pool import Lease
from fusefs.tree import File, Folder, Link, Node

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds for which the kernel may believe that a name means what it meant: as long as listings live.
ENTRY_TIMEOUT_S: Final = 5.0
#: Seconds for which attributes of what never changes are believed.
FILE_TIMEOUT_S: Final = 3600.0
#: Errors remembered so that each is logged once, however often the kernel asks again.
MAX_LOGGED: Final = 1024
#: Reads at once that wait for a chunk, each with up to 8 MiB in its hands; others queue up.
COLD_READS: Final = 8
#: st_blksize.
BLOCK_SIZE: Final = 4096
_FILE_MODE: Final = stat.S_IFREG | 0o444
_FOLDER_MODE: Final = stat.S_IFDIR | 0o555
_LINK_MODE: Final = stat.S_IFLNK | 0o777
_LOG = logging.getLogger(__name__)


class InodeTable:
    """The nodes that the kernel knows, each with the number of times it was told about it."""

    def __init__(self, root: Folder) -> None:
        self._nodes: dict[int, Node] = {root.inode: root}
        self._counts: dict[int, int] = {root.inode: 1}

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, inode: int) -> Node:
        """The node that the kernel calls `inode`.

        Raises:
            StaleError: it is not known (any more).
        """
        node = self._nodes.get(inode)
        if node is None:
            raise StaleError("find", f"inode {inode}", "it is not known any more")
        return node

    def known(self, node: Node) -> Node:
        """The node that the kernel has for the path of `node`, or `node` itself.

        Raises:
            StaleError: its number belongs to another path (the chance is one in 2**63 for each pair).
        """
        other = self._nodes.get(node.inode, node)
        if other.path != node.path:
            raise StaleError("show", os.fsdecode(node.path), "its inode number is taken")
        if isinstance(node, Link) and isinstance(other, Link):
            other.target, other.mtime_ns = node.target, node.mtime_ns
        return other

    def remember(self, node: Node) -> None:
        """The kernel was told about `node` once more."""
        self._nodes.setdefault(node.inode, node)
        self._counts[node.inode] = self._counts.get(node.inode, 0) + 1

    def forget(self, inode: int, count: int) -> None:
        """The kernel takes `count` tellings back; at none left the node goes."""
        left = self._counts.get(inode, 0) - count
        if left > 0 or inode == pyfuse3.ROOT_INODE:
            self._counts[inode] = max(left, 1)
        else:
            self._counts.pop(inode, None)
            self._nodes.pop(inode, None)


class Handle:
    """An open file."""

    __slots__ = ("content", "file", "lease", "read_cached")

    def __init__(self, file: File, lease: Lease[OpenSnapshot], content: Content) -> None:
        self.file, self.lease, self.content = file, lease, content
        self.read_cached = content.read_cached


class LogOnce:
    """Writes an error into the log, unless the same was written lately."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, None] = OrderedDict()

    def __call__(self, error: Exception) -> None:
        """Log `error`: a FleeceError as one line, a fault of ours with its traceback."""
        text = str(error)
        if text in self._seen:
            self._seen.move_to_end(text)
            return
        self._seen[text] = None
        if len(self._seen) > MAX_LOGGED:
            self._seen.popitem(last=False)
        if isinstance(error, FleeceError | OSError):
            _LOG.error("%s", text)
        else:
            _LOG.error("%s", text or type(error).__name__, exc_info=error)


def _answered(
    operation: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Make every error of a request a number for the kernel; what is not just a name that is not there is logged."""

    @wraps(operation)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await operation(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise args[0]._failed(error) from error  # type: ignore[attr-defined]

    return answer


class Operations(pyfuse3.Operations):
    """The requests of one mount."""

    # Lookups of "." and ".." would be for exports by NFS, which need inodes that outlive the kernel's interest.
    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, root: Folder, *, uid: int, gid: int) -> None:
        super().__init__()
        self.inodes: Final = InodeTable(root)
        self.handles: Final[dict[int, Handle]] = {}
        self._folders: dict[int, list[tuple[bytes, Node]]] = {}
        self._numbers = itertools.count(1)
        self._uid, self._gid = uid, gid
        self._log = LogOnce()
        self._cold = trio.Semaphore(COLD_READS)

    def release_all(self) -> None:
        """After the last request: give back what the kernel did not close."""
        for handle in self.handles.values():
            handle.lease.release()
        self.handles.clear()

    def _failed(self, error: Exception) -> pyfuse3.FUSEError:
        number = errno_of(error)
        if number not in (errno.ENOENT, errno.ESTALE):
            self._log(error)
        return pyfuse3.FUSEError(number)

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.inode
        entry.generation = 0
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = node.mtime_ns
        entry.st_nlink = 1
        entry.st_blksize = BLOCK_SIZE
        entry.entry_timeout = entry.attr_timeout = ENTRY_TIMEOUT_S
        match node:
            case File():
                entry.st_mode = _FILE_MODE
                entry.st_size, entry.st_blocks = node.size, node.blocks
                # A guess is good enough for a listing; who wants to know asks again.
                entry.attr_timeout = FILE_TIMEOUT_S if node.exact else 0
            case Link():
                entry.st_mode = _LINK_MODE
                entry.st_size = len(node.target)
            case _:
                entry.st_mode = _FOLDER_MODE
        return entry

    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """A name in a folder."""
        folder = self.inodes[parent_inode]
        if not isinstance(folder, Folder):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        found = await folder.child(name)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        node = self.inodes.known(found)
        if isinstance(node, File) and not node.exact:
            try:
                await node.measure()
            except FleeceError as error:
                # A broken file is still there; opening it or asking for its size fails.
                self._failed(error)
        self.inodes.remember(node)
        return self._attributes(node)

    @_answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes of what the kernel knows."""
        node = self.inodes[inode]
        if isinstance(node, File):
            await node.measure()
        return self._attributes(node)

    @_answered
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """Where `latest` leads."""
        node = self.inodes[inode]
        if not isinstance(node, Link):
            raise pyfuse3.FUSEError(errno.EINVAL)
        return node.target

    @_answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Fix the listing of a folder, so that its offsets mean the same until it is closed."""
        folder = self.inodes[inode]
        if not isinstance(folder, Folder):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        number = next(self._numbers)
        self._folders[number] = list((await folder.children()).items())
        return number

    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Entries from number `start_id` on, as many as fit."""
        entries = self._folders[fh]
        for number in range(start_id, len(entries)):
            name, found = entries[number]
            node = self.inodes.known(found)
            if not pyfuse3.readdir_reply(token, name, self._attributes(node), number + 1):
                break
            self.inodes.remember(node)

    async def releasedir(self, fh: int) -> None:
        """The listing is not needed any more."""
        self._folders.pop(fh, None)

    @_answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file for reading; from here on its snapshot is locked."""
        node = self.inodes[inode]
        if not isinstance(node, File):
            raise pyfuse3.FUSEError(errno.EISDIR if isinstance(node, Folder) else errno.ELOOP)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        lease, content = await node.open()
        number = next(self._numbers)
        self.handles[number] = Handle(node, lease, content)
        # A backup never changes, so the kernel's own cache stays good from one handle to the next.
        return pyfuse3.FileInfo(fh=number, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]  # any buffer will do
        """Bytes of an open file; what is in the chunk cache is answered without a copy, a thread or a checkpoint."""
        handle = self.handles[fh]
        if handle.lease.stale:
            raise pyfuse3.FUSEError(errno.ESTALE)
        try:
            data = handle.read_cached(off, size)
            if data is not None:
                return data
            async with self._cold:
                return await handle.content.read(off, size)
        except Exception as error:
            raise await self._unreadable(handle, error) from error

    async def _unreadable(self, handle: Handle, error: Exception) -> pyfuse3.FUSEError:
        # A chunk may be missing because its snapshot was removed and garbage collected.
        await handle.lease.look()
        return pyfuse3.FUSEError(errno.ESTALE) if handle.lease.stale else self._failed(error)

    async def release(self, fh: int) -> None:
        """The last descriptor of an open file was closed."""
        handle = self.handles.pop(fh, None)
        if handle is not None:
            handle.lease.release()

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel needs some nodes no more."""
        for inode, count in inode_list:
            self.inodes.forget(inode, count)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Nothing free: the mount is read-only, and how full the datastore is, 'fleece datastore status' tells."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_SIZE
        data.f_namemax = 255
        return data
