"""Disk images as folders: `drive-scsi0.img.d/part1/etc/fstab` beside the file `drive-scsi0.img`.

What is read from an image comes from a process of its own (`diskfs.client`), which is there while it is needed. A
node stands for one entry of a file system in one content of an image, so its inode number, attributes and content
never change.
"""

import logging
import os
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar

from core.errors import FleeceError
from datastore.names import Snapshot
from diskfs.client import LookedInto, Row
from diskfs.entries import Entry, Volume
from fusefs.errors import StaleError
from fusefs.nodes import Folder, Link, Node, Owner, Shared
from fusefs.opened import BlobContent, Content, OpenSnapshot
from fusefs.pool import Lease
from repository.interface import FileInfo

T = TypeVar("T")

_LOG: Final = logging.getLogger(__name__)
#: What is added to the name of an image.
SUFFIX: Final = b".d"
#: The file that says what is on the disk.
VOLUMES: Final = b"VOLUMES"
#: Longest name of an entry that the kernel takes.
_LONGEST_NAME: Final = 1024


class DiskFolder(Folder):
    """What is on the disk image `info` of a snapshot: a folder for each volume with a file system, and `VOLUMES`."""

    def __init__(self, owner: Owner, path: bytes, info: FileInfo) -> None:
        super().__init__(owner.shared, path, owner.mtime_ns)
        self.snapshot: Final[Snapshot] = owner.snapshot
        self.filename: Final = info.filename
        self._csum = b""
        self._told: frozenset[str] = frozenset()  # what the log has of it already

    async def ask(self, question: Callable[[LookedInto], Awaitable[T]]) -> T:
        """The answer to `question`.

        Raises:
            StaleError: the snapshot was removed, or made anew.
            FleeceError: the image, or what is on it, cannot be read.
        """
        lease, image = await self.acquire()
        try:
            return await question(image)
        except FleeceError:
            # A chunk may be missing because its snapshot was removed and garbage collected.
            await lease.look()
            if lease.stale:
                raise StaleError("read", str(self.snapshot), "the snapshot was removed") from None
            raise
        finally:
            lease.release()

    async def acquire(self) -> tuple[Lease[OpenSnapshot], LookedInto]:
        """The image, while the caller has the lease.

        Raises:
            StaleError, FleeceError: as `ask`.
        """
        lease = await self.shared.pool.acquire(self.snapshot)
        try:
            csum = lease.value.manifest.file(self.filename).csum
            if self._csum not in (b"", csum):
                self._csum = b""
                self.expire()
                raise StaleError("read", os.fsdecode(self.path), "the snapshot was removed and made anew")
            self._csum = csum
            return lease, await lease.value.image(self.filename, self.shared.images)
        except BaseException:
            lease.release()
            raise

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        volumes = await self.ask(lambda image: image.volumes())
        children: dict[bytes, Node] = {}
        for volume in volumes:
            if volume.problem:
                continue
            group, slash, name = volume.name.partition(b"/")
            if not slash:
                children[group] = await self._root(volume)
                continue
            folder = children.setdefault(group, GroupFolder(self.shared, self.below(group), self.mtime_ns))
            assert isinstance(folder, GroupFolder)
            folder.entries[name] = await self._root(volume)
        lease, image = await self.acquire()
        try:
            remarks = [one.text for one in image.remarks]
        finally:
            lease.release()
        told, self._told = self._told, frozenset(remarks)
        for text in remarks:
            if text not in told:
                _LOG.warning("%s", text)
        if VOLUMES not in children:
            children[VOLUMES] = TextFile(self, self.below(VOLUMES), _table(volumes, remarks))
        return children

    async def _root(self, volume: Volume) -> Node:
        """The folder of a volume; one whose file system turns out to be damaged says so when it is opened."""
        try:
            entry = await self.ask(lambda image: image.entry(volume.name))
        except StaleError:
            raise
        except FleeceError as error:
            return DamagedVolume(self.shared, self.below(volume.name), self.mtime_ns, error)
        return made(self, volume.name, entry)

    def identity(self, volume: bytes, entry: Entry) -> bytes:
        """What no other entry of any content of any image has."""
        return b"%b\0%b\0%b\0%d\0%d" % (self.path, self._csum, volume, *entry.id)


def _table(volumes: Sequence[Volume], remarks: Sequence[str]) -> bytes:
    """The volumes for people: name, bytes, file system, label, and why one is not shown; then what is to be known."""
    lines = []
    for one in volumes:
        label = one.label if one.label.isprintable() else "?"
        text = f"{one.name.decode('utf-8', 'replace')}\t{one.size}\t{one.kind}\t{label}\t{one.problem}"
        lines.append(f"{text.rstrip()}\n")
    lines += [f"# {text}\n" for text in remarks]
    return "".join(lines).encode()


class GroupFolder(Folder):
    """A volume group: its logical volumes."""

    def __init__(self, shared: Shared, path: bytes, mtime_ns: int) -> None:
        super().__init__(shared, path, mtime_ns)
        self.entries: Final[dict[bytes, Node]] = {}

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        return self.entries


class DamagedVolume(Folder):
    """A volume whose file system cannot be read."""

    def __init__(self, shared: Shared, path: bytes, mtime_ns: int, error: FleeceError) -> None:
        super().__init__(shared, path, mtime_ns)
        self._error = error

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        raise self._error


class TextFile(Node):
    """A file of text that is made here."""

    def __init__(self, disk: DiskFolder, path: bytes, data: bytes) -> None:
        super().__init__(disk.shared, path, disk.mtime_ns)
        self.content: Final = BlobContent(data)
        self._disk = disk

    async def open(self) -> tuple[Lease[OpenSnapshot], Content]:
        """Open it for reading; the caller releases the lease."""
        return await self.shared.pool.acquire(self._disk.snapshot), self.content


class ImageEntry(Node):
    """An entry of a file system that is neither a directory nor a symlink."""

    def __init__(self, disk: DiskFolder, volume: bytes, entry: Entry) -> None:
        super().__init__(disk.shared, disk.identity(volume, entry), entry.mtime_ns)
        self.disk: Final = disk
        self.volume: Final = volume
        self.entry: Final = entry

    async def open(self) -> tuple[Lease[OpenSnapshot], Content] | None:
        """Open it for reading, None if it is no file; the caller releases the lease.

        Raises:
            StaleError, FleeceError: as `DiskFolder.ask`.
        """
        if not self.entry.is_file:
            return None
        lease, image = await self.disk.acquire()
        try:
            return lease, await image.content(self.volume, self.entry)
        except BaseException:
            lease.release()
            raise


class ImageLink(Link):
    """A symlink of a file system."""

    def __init__(self, disk: DiskFolder, volume: bytes, entry: Entry) -> None:
        super().__init__(disk.shared, disk.identity(volume, entry), entry.mtime_ns, entry.target or b"")
        self.disk: Final = disk
        self.volume: Final = volume
        self.entry: Final = entry


class ImageDirectory(Folder):
    """A directory of a file system. It is listed by `ImageCursor`, which does not hold all of it."""

    def __init__(self, disk: DiskFolder, volume: bytes, entry: Entry) -> None:
        super().__init__(disk.shared, disk.identity(volume, entry), entry.mtime_ns)
        self.disk: Final = disk
        self.volume: Final = volume
        self.entry: Final = entry

    async def child(self, name: bytes) -> Node | None:
        """See `Folder.child`."""
        entry = await self.disk.ask(lambda image: image.lookup(self.volume, self.entry.id, name))
        return None if entry is None else made(self.disk, self.volume, entry)

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        children: dict[bytes, Node] = {}
        more, seen = True, 0
        while more:
            page = await self.disk.ask(lambda image, at=seen: image.page(self.volume, self.entry.id, at))  # type: ignore[misc]
            for row in page.rows:
                if row.entry is not None:
                    children[row.name] = made(self.disk, self.volume, row.entry)
            more, seen = page.more, seen + len(page.rows)
        return children


#: What has an entry.
ImageNode = ImageEntry | ImageLink | ImageDirectory


def made(disk: DiskFolder, volume: bytes, entry: Entry) -> ImageNode:
    """The node for `entry` of the file system in `volume`."""
    if entry.is_directory:
        return ImageDirectory(disk, volume, entry)
    if entry.is_symlink:
        return ImageLink(disk, volume, entry)
    return ImageEntry(disk, volume, entry)


async def xattrs(node: ImageNode) -> dict[bytes, bytes]:
    """The extended attributes of an entry.

    Raises:
        StaleError, FleeceError: as `DiskFolder.ask`.
    """
    if not node.entry.has_xattrs:
        return {}
    return dict(await node.disk.ask(lambda image: image.xattrs(node.volume, node.entry.id)))


class ImageCursor:
    """An open listing of a directory, page by page. What cannot be read is left out, and its error comes at the end."""

    def __init__(self, directory: ImageDirectory) -> None:
        self._directory = directory
        self._first = 0
        self._rows: list[Row] = []
        self._more = True
        self._damaged: str | None = None

    async def open(self) -> None:
        """Make sure that it can be listed.

        Raises:
            StaleError, FleeceError: it cannot.
        """
        await self._fetch(0)

    async def rows(self, number: int) -> list[tuple[int, bytes, ImageNode]]:
        """Number behind it, name and node of entries from `number` on; none at the end.

        Raises:
            StaleError, FleeceError: at the end, if some could not be read.
        """
        directory = self._directory
        while True:
            if not self._first <= number < self._first + len(self._rows):
                if number and not self._more and number >= self._first + len(self._rows):
                    break
                await self._fetch(number)
                if not self._rows:
                    break
            found = []
            for at, row in enumerate(self._rows[number - self._first :], number + 1):
                if row.entry is None:
                    self._damaged = self._damaged or f"{os.fsdecode(row.name)!r}: {row.why}"
                elif len(row.name) <= _LONGEST_NAME:
                    found.append((at, row.name, made(directory.disk, directory.volume, row.entry)))
            if found:
                return found
            number = self._first + len(self._rows)
        if self._damaged is not None:
            raise FleeceError("list all of", os.fsdecode(directory.disk.path), self._damaged)
        return []

    async def _fetch(self, start: int) -> None:
        directory = self._directory
        page = await directory.disk.ask(lambda image: image.page(directory.volume, directory.entry.id, start))
        self._first, self._rows, self._more = start, page.rows, page.more


def is_special(entry: Entry) -> bool:
    """Whether it is a device."""
    return stat.S_ISBLK(entry.mode) or stat.S_ISCHR(entry.mode)
