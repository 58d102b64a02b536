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
from fusefs.archive_nodes import Cursor, FileArchive
from fusefs.errors import StaleError, errno_of
from fusefs.image_nodes import (
    ImageCursor,
    ImageDirectory,
    ImageEntry,
    ImageLink,
    ImageNode,
    TextFile,
    is_special,
    xattrs,
)
from fusefs.inodes import ArchiveEntries, EntryTable, InodeTable
from fusefs.nodes import MAX_SIZE, File, Folder, Link, Node, Stored
from fusefs.opened import Content, OpenSnapshot
from fusefs.opened_archive import ROOT, Spot
from fusefs.pool import Lease
from pxar.listing import Row

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds for which the kernel may believe that a name means what it meant: as long as listings live.
ENTRY_TIMEOUT_S: Final = 5.0
#: Seconds for which attributes of what never changes are believed.
FILE_TIMEOUT_S: Final = 3600.0
#: The same for files whose names are still being counted.
COUNTING_TIMEOUT_S: Final = 1.0
#: Errors remembered so that each is logged once, however often the kernel asks again.
MAX_LOGGED: Final = 1024
#: Reads at once that wait for a chunk, each with up to 8 MiB in its hands; others queue up.
COLD_READS: Final = 8
#: st_blksize.
BLOCK_SIZE: Final = 4096
#: The longest name that the kernel takes; it would refuse the whole listing.
_LONGEST_NAME: Final = 1024
#: The largest part of a device number that the kernel can be told: 20 bits of the minor number, 12 of the major.
_MAX_DEVICE: Final = (1 << 20) - 1
#: The largest number of names that the kernel can be told.
_MAX_LINKS: Final = (1 << 32) - 1
#: The furthest time from 1970 that fits into nanoseconds.
_MAX_TIME_NS: Final = (1 << 63) - 1
#: `mode >> 12` of a regular file.
_FILE_TYPE: Final = 8
_FILE_MODE: Final = stat.S_IFREG | 0o444
_FOLDER_MODE: Final = stat.S_IFDIR | 0o555
_LINK_MODE: Final = stat.S_IFLNK | 0o777
_LOG = logging.getLogger(__name__)


class Handle:
    """An open file."""

    __slots__ = ("content", "lease", "read_cached")

    def __init__(self, lease: Lease[OpenSnapshot], content: Content) -> None:
        self.lease, self.content = lease, content
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


def _immutable() -> pyfuse3.EntryAttributes:
    """Attributes of something that never changes, to be filled in."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = entry.generation = 0
    entry.st_blksize = BLOCK_SIZE
    entry.entry_timeout = entry.attr_timeout = FILE_TIMEOUT_S
    return entry


class Operations(pyfuse3.Operations):
    """The requests of one mount.

    Args:
        root: the root of the tree.
        uid: owner of everything; None: entries of archives have their own, everything else is owned by this process.
        gid: group, likewise.
    """

    # Lookups of "." and ".." would be for exports by NFS, which need inodes that outlive the kernel's interest.
    supports_dot_lookup = False
    enable_writeback_cache = False
    # The kernel decides by the ACLs that entries of archives have; else by their modes alone, where the bits of the
    # group are the mask.
    enable_acl = True

    def __init__(self, root: Folder | FileArchive, *, uid: int | None, gid: int | None) -> None:
        super().__init__()
        self.inodes: Final = InodeTable(root)
        self.entries: Final = EntryTable()
        self.handles: Final[dict[int, Handle]] = {}
        self._folders: dict[int, list[tuple[bytes, Node]] | Cursor | ImageCursor] = {}
        self._numbers = itertools.count(1)
        self._owner = uid, gid
        self._uid, self._gid = os.getuid() if uid is None else uid, os.getgid() if gid is None else gid
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
            case FileArchive(row=tuple() as row):
                self._fill(entry, node, row)
            case ImageEntry() | ImageLink() | ImageDirectory():
                self._fill_from_image(entry, node)
            case TextFile():
                entry.st_mode = _FILE_MODE
                entry.st_size, entry.st_blocks = node.content.size, node.content.blocks
            case File():
                entry.st_mode = _FILE_MODE
                entry.st_size, entry.st_blocks = node.size, node.blocks
            case Link():
                entry.st_mode = _LINK_MODE
                entry.st_size = len(node.target)
            case _:
                entry.st_mode = _FOLDER_MODE
        if isinstance(node, Stored):
            # A guess is good enough for a listing; who wants to know asks again.
            entry.attr_timeout = FILE_TIMEOUT_S if node.exact else 0
        return entry

    def _fill(self, entry: pyfuse3.EntryAttributes, archive: FileArchive, row: Row) -> None:
        """Set what is not the same for all entries of an archive."""
        position, _, mode, uid, gid, size, mtime_ns, device = row
        entry.st_mode = mode
        entry.st_uid, entry.st_gid = uid, gid
        entry.st_size = size = min(size, MAX_SIZE)
        is_file = mode >> 12 == _FILE_TYPE
        entry.st_blocks = size + 511 >> 9 if is_file else 0
        entry.st_nlink = archive.links.names(position) if is_file else 1
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = mtime_ns
        entry.st_rdev = os.makedev(*device) if device is not None and max(device) <= _MAX_DEVICE else 0
        if self._owner != (None, None):
            entry.st_uid, entry.st_gid = (
                own if given is None else given for own, given in zip((uid, gid), self._owner, strict=True)
            )

    def _fill_from_image(self, entry: pyfuse3.EntryAttributes, node: ImageNode) -> None:
        """Set what an entry of a file system on a disk image has of its own; none of it ever changes."""
        found = node.entry
        entry.st_mode = found.mode
        own = (found.uid, found.gid)
        entry.st_uid, entry.st_gid = (
            mine if given is None else given for mine, given in zip(own, self._owner, strict=True)
        )
        entry.st_size = size = min(found.size, MAX_SIZE)
        entry.st_blocks = size + 511 >> 9
        entry.st_nlink = 1 if found.is_directory else min(found.links, _MAX_LINKS)
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = max(
            -_MAX_TIME_NS, min(found.mtime_ns, _MAX_TIME_NS)
        )
        device = found.rdev if is_special(found) else None
        entry.st_rdev = os.makedev(*device) if device is not None and max(device) <= _MAX_DEVICE else 0
        entry.entry_timeout = entry.attr_timeout = FILE_TIMEOUT_S

    def _entry(self, entries: ArchiveEntries, row: Row) -> pyfuse3.EntryAttributes:
        entry = _immutable()
        entry.st_ino = entries.inode(row)
        self._fill(entry, entries.archive, row)
        if not entries.archive.links.counted.is_set() and row[2] >> 12 == _FILE_TYPE:
            entry.attr_timeout = COUNTING_TIMEOUT_S
        return entry

    def _place(self, inode: int) -> tuple[FileArchive, Spot] | None:
        """The archive and place of an entry, or of an archive's root; None for all else."""
        entries = self.entries.find(inode)
        if entries is not None:
            return entries.archive, entries.spot(inode)
        node = self.inodes[inode]
        return (node, ROOT) if isinstance(node, FileArchive) else None

    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """A name in a folder."""
        place = self._place(parent_inode)
        if place is not None:
            return await self._lookup_entry(*place, name)
        folder = self.inodes[parent_inode]
        if not isinstance(folder, Folder):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        found = await folder.child(name)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        node = self.inodes.known(found)
        if isinstance(node, Stored) and not node.exact:
            try:
                await node.measure()
            except FleeceError as error:
                # A broken file is still there; opening it or asking for its size fails.
                self._failed(error)
        self.inodes.remember(node)
        return self._attributes(node)

    async def _lookup_entry(self, archive: FileArchive, spot: Spot, name: bytes) -> pyfuse3.EntryAttributes:
        if not spot.is_directory:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        row = await archive.ask(lambda opened: opened.child(spot, name, archive.links))
        if row is None:
            # Number 0: there is no such name, and the kernel need not ask again.
            return _immutable()
        if row[2] >> 12 == _FILE_TYPE:
            await archive.count()
        entries = self.entries.of(archive)
        entry = self._entry(entries, row)
        entries.remember(row)
        return entry

    @_answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Attributes of what the kernel knows."""
        entries = self.entries.find(inode)
        if entries is not None:
            spot = entries.spot(inode)
            row = await entries.archive.ask(lambda opened: opened.row(spot))
            if row[2] >> 12 == _FILE_TYPE:
                await entries.archive.count()
            return self._entry(entries, row)
        node = self.inodes[inode]
        if isinstance(node, Stored):
            await node.measure()
        return self._attributes(node)

    @_answered
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """Where a link leads."""
        place = self._place(inode)
        if place is not None:
            archive, spot = place
            target = await archive.ask(lambda opened: opened.target(spot))
        else:
            node = self.inodes[inode]
            target = node.target if isinstance(node, Link) else None
        if target is None:
            raise pyfuse3.FUSEError(errno.EINVAL)
        return target

    @_answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """One extended attribute; only entries of archives have any."""
        value = (await self._xattrs(inode)).get(name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @_answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        """Names of the extended attributes."""
        return list(await self._xattrs(inode))

    async def _xattrs(self, inode: int) -> dict[bytes, bytes]:
        place = self._place(inode)
        if place is None:
            node = self.inodes[inode]
            return await xattrs(node) if isinstance(node, ImageNode) else {}
        archive, spot = place
        return await archive.ask(lambda opened: opened.attributes(spot))

    @_answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Fix the listing of a folder, so that its offsets mean the same until it is closed."""
        place = self._place(inode)
        listing: list[tuple[bytes, Node]] | Cursor | ImageCursor
        if place is not None:
            if not place[1].is_directory:
                raise pyfuse3.FUSEError(errno.ENOTDIR)
            listing = Cursor(*place)
            await listing.open()
        else:
            folder = self.inodes[inode]
            if not isinstance(folder, Folder):
                raise pyfuse3.FUSEError(errno.ENOTDIR)
            if isinstance(folder, ImageDirectory):
                listing = ImageCursor(folder)
                await listing.open()
            else:
                listing = list((await folder.children()).items())
        number = next(self._numbers)
        self._folders[number] = listing
        return number

    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Entries from number `start_id` on, as many as fit."""
        listing = self._folders[fh]
        if isinstance(listing, Cursor):
            await self._readdir_entries(listing, start_id, token)
            return
        if isinstance(listing, ImageCursor):
            await self._readdir_image(listing, start_id, token)
            return
        for number in range(start_id, len(listing)):
            name, found = listing[number]
            node = self.inodes.known(found)
            if not pyfuse3.readdir_reply(token, name, self._attributes(node), number + 1):
                break
            self.inodes.remember(node)

    async def _readdir_image(self, cursor: ImageCursor, number: int, token: pyfuse3.ReaddirToken) -> None:
        for behind, name, found in await cursor.rows(number):
            node = self.inodes.known(found)
            if not pyfuse3.readdir_reply(token, name, self._attributes(node), behind):
                break
            self.inodes.remember(node)

    async def _readdir_entries(self, cursor: Cursor, number: int, token: pyfuse3.ReaddirToken) -> None:
        archive = cursor.archive
        entry = _immutable()
        reply = pyfuse3.readdir_reply
        number, rows = await cursor.rows(number)
        while rows:
            # Nothing waits from here on, so that the kernel's view of the archive stays as it is.
            entries = self.entries.of(archive)
            if counted := archive.links.counted.is_set():
                entry.attr_timeout = FILE_TIMEOUT_S
            for name, row in rows:
                number += 1
                if len(name) > _LONGEST_NAME:
                    continue
                entry.st_ino = entries.inode(row)
                self._fill(entry, archive, row)
                if not counted:
                    # Who wants to know how many names a file has asks again, and waits.
                    entry.attr_timeout = 0 if row[2] >> 12 == _FILE_TYPE else FILE_TIMEOUT_S
                if not reply(token, name, entry, number):
                    return
                entries.remember(row)
            more = cursor.rows_now(number)
            if more is None:
                return
            number, rows = more

    async def releasedir(self, fh: int) -> None:
        """The listing is not needed any more."""
        self._folders.pop(fh, None)

    @_answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file for reading; from here on its snapshot is locked."""
        place = self._place(inode)
        node = self.inodes[inode] if place is None else None
        if isinstance(node, Folder) or (place is not None and place[1].is_directory):
            raise pyfuse3.FUSEError(errno.EISDIR)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        if place is not None:
            archive, spot = place
            opened = await archive.open(spot)
        else:
            opened = await node.open() if isinstance(node, File | ImageEntry | TextFile) else None
        if opened is None:
            raise pyfuse3.FUSEError(errno.ELOOP)
        number = next(self._numbers)
        self.handles[number] = Handle(*opened)
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
            try:
                entries = self.entries.find(inode)
            except StaleError:
                continue
            (self.inodes if entries is None else entries).forget(inode, count)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Nothing free: the mount is read-only, and how full the datastore is, 'fleece datastore status' tells."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_SIZE
        data.f_namemax = 255
        return data
