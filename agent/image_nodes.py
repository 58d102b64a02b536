"""What is on a disk image, in the shape of a file archive: what lists, finds, restores and compares archives does it
alike.

The root has a directory for each volume, `part1`, `raw`, or `VG` and in it `LV`. Everything here runs in one worker
thread and asks the event loop, which asks the process that reads the image (`diskfs.client`).
"""

import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import trio

from core.buffers import Buffer
from core.errors import FormatError, NotFoundError, UsageError
from diskfs.client import FileContent, LookedInto, Page
from diskfs.entries import Entry, Volume
from diskfs.errors import DiskFsError
from pxar.accessor import ArchiveAccessor, Device, Directory, FileNode, Hardlink, Node, Special, Symlink
from pxar.filesystem_python import parse_acls
from pxar.format import KIND_OF_MODE, Kind, escaped, shown
from pxar.metadata import Acl, Metadata, Stat, encode_metadata
from pxar.sinks import ReferenceBytes

_S: Final = 1_000_000_000
#: Files with several names whose first one is remembered; of more than these every name is a file of its own.
_MAX_LINKED: Final = 1_000_000
#: Directories that are remembered, so that none is gone through twice.
_MAX_DIRECTORIES: Final = 2_000_000
#: Complaints that are kept word by word.
_MAX_COMPLAINTS: Final = 100
#: Errors of one entry or directory; all others concern every one.
UNREADABLE: Final = (FormatError, NotFoundError)
_CAPABILITY: Final = b"security.capability"
_ACCESS_ACL, _DEFAULT_ACL = b"system.posix_acl_access", b"system.posix_acl_default"
#: Extended attributes that file archives hold, by the beginnings of their names.
_KEPT_XATTRS: Final = (b"user.", b"trusted.")
_VOLUME_MODE: Final = stat.S_IFDIR | 0o555
#: What is passed over in silence where all volumes are gone through: nobody looks for files there.
_NO_FILES: Final = frozenset({"empty", "swap", "LVM2 member", "boot loader", "reserved"})


class ImageAccessor(ArchiveAccessor):
    """A disk image as an archive; `where` names it in errors."""

    def __init__(self, image: LookedInto, *, where: str) -> None:
        self.where = where
        self.prelude = None
        self.asked: Final = image
        #: What could not be read on the way, and was left out.
        self.complaints: Final[list[str]] = []
        self.more_complaints = 0  #: that many more
        self._numbers = 0
        self._links: dict[tuple[bytes, int, int], tuple[int, bytes]] = {}
        self._entered: dict[tuple[bytes, int, int], int] = {}
        self.root: Directory = Top(self)

    def open_content(self, node: Node) -> tuple[ReferenceBytes, int, int]:
        """See `ArchiveAccessor.open_content`."""
        if isinstance(node, Hardlink):
            node = node.follow()
        if not isinstance(node, ImageFile):
            raise UsageError("read", shown(node.name), "it is no file")
        content = trio.from_thread.run(self.asked.content, node.volume, node.entry)
        return _Content(content), 0, node.size

    def complain(self, path: bytes, why: str) -> None:
        """Note that what is at `path`, or something in it, is left out."""
        if len(self.complaints) < _MAX_COMPLAINTS:
            self.complaints.append(f"{self.where}/{escaped(path)}: left out: {why}")
        else:
            self.more_complaints += 1

    def warn(self, warn: Callable[[str], None], *, names_only: bool = False) -> None:
        """Pass all complaints to `warn`, and forget them.

        Args:
            warn: called with each.
            names_only: leave out what is known of whole file systems that can be read: it does not concern a search.
        """
        for remark in self.asked.remarks:
            if remark.is_loss or not names_only:
                warn(remark.text)
        self.asked.remarks.clear()
        for text in self.complaints:
            warn(text)
        if self.more_complaints:
            warn(f"{self.where}: {self.more_complaints} more entries were left out")
        self.complaints.clear()
        self.more_complaints = 0

    def number(self) -> int:
        """A number for a node: they grow in the order in which nodes are met."""
        self._numbers += 1
        return self._numbers

    def made(self, volume: bytes, path: bytes, name: bytes, entry: Entry, *, walked: bool = False) -> Node:
        """The node for `entry`, which lies at `path` from the image's root; `walked`: see `ImageDirectory`."""
        kind = KIND_OF_MODE.get(stat.S_IFMT(entry.mode))
        if kind is None:
            raise FormatError("read", f"{self.where}/{escaped(path)}", f"nothing has the mode {entry.mode:o}")
        if kind is Kind.DIRECTORY:
            return ImageDirectory(self, volume, path, name, entry, walked)
        if kind is Kind.SYMLINK:
            return ImageSymlink(self, volume, name, entry, kind)
        if kind in (Kind.BLOCK, Kind.CHARACTER):
            return ImageDevice(self, volume, name, entry, kind)
        if kind is not Kind.FILE:
            return ImageSpecial(self, volume, name, entry, kind)
        if entry.links < 2:
            return ImageFile(self, volume, name, entry, kind)
        first = self._links.get((volume, *entry.id))
        if first is None:
            node = ImageFile(self, volume, name, entry, kind)
            if len(self._links) < _MAX_LINKED:
                self._links[volume, *entry.id] = node.position, path
            return node
        number, target = first
        if target == path:
            return ImageFile(self, volume, name, entry, kind, number)
        return ImageHardlink(self, volume, name, entry, number, target)

    def enter(self, volume: bytes, path: bytes, entry: Entry) -> None:
        """A directory with something in it is gone through.

        Raises:
            DiskFsError: it was met at another place: no file system that is sound has that.
        """
        key, value = (volume, *entry.id), hash(path)
        if self._entered.setdefault(key, value) != value:
            raise DiskFsError("list", f"{self.where}/{escaped(path)}", "the directory lies in two places")
        if len(self._entered) > _MAX_DIRECTORIES:
            raise DiskFsError("list", self.where, f"more than {_MAX_DIRECTORIES} directories")

    def metadata(self, volume: bytes, entry: Entry) -> Metadata:
        """What a file archive would hold of `entry`."""
        xattrs: list[tuple[bytes, bytes]] = []
        acl, fcaps = Acl(), None
        if entry.has_xattrs:
            try:
                found = dict(trio.from_thread.run(self.asked.xattrs, volume, entry.id))
                acl = parse_acls(found.get(_ACCESS_ACL), found.get(_DEFAULT_ACL) if entry.is_directory else None)
                fcaps = found.get(_CAPABILITY)
                xattrs = [(name, value) for name, value in found.items() if name.startswith(_KEPT_XATTRS)]
            except UNREADABLE as error:
                self.complain(volume, f"extended attributes of an entry: {error.why}")
            except OSError:
                self.complain(volume, "an access control list, which is damaged")
        return Metadata(_stat(entry), tuple(xattrs), acl, fcaps)


def _stat(entry: Entry) -> Stat:
    seconds, nanoseconds = divmod(entry.mtime_ns, _S)
    seconds = max(-(1 << 63), min(seconds, (1 << 63) - 1))
    return Stat(entry.mode, 0, entry.uid, entry.gid, seconds, nanoseconds)


class _Content:
    """A file's content, for a worker thread; it has the shape of `pxar.sinks.ReferenceBytes`."""

    def __init__(self, content: FileContent) -> None:
        self.size: Final = content.size
        self._content = content

    def read(self, offset: int, length: int) -> Buffer:
        """See `ReferenceBytes.read`."""
        return trio.from_thread.run(self._content.read, offset, length)


class _Known:
    """What all nodes of an image have in common, in place of what those of archives read from their items."""

    _accessor: ArchiveAccessor
    image: ImageAccessor
    volume: bytes
    entry: Entry
    position: int

    @property
    def id(self) -> int:
        """See `pxar.accessor`."""
        return self.position

    @property
    def behind(self) -> int:
        """See `pxar.accessor`."""
        return self.position + 1

    @property
    def meta(self) -> bytes:
        """See `pxar.accessor`."""
        return encode_metadata(self.metadata)

    @property
    def metadata(self) -> Metadata:
        """See `pxar.accessor`."""
        return self.image.metadata(self.volume, self.entry)

    @property
    def stat(self) -> Stat:
        """See `pxar.accessor`."""
        return _stat(self.entry)


class _Leaf(_Known):
    """A node that is no directory."""

    _kind: Kind

    def __init__(
        self, accessor: ImageAccessor, volume: bytes, name: bytes, entry: Entry, kind: Kind, number: int = 0
    ) -> None:
        self._accessor = self.image = accessor
        self.volume, self.name, self.entry, self._kind = volume, name, entry, kind
        self.position = self.filename_position = number or accessor.number()

    @property
    def kind(self) -> Kind:
        """See `pxar.accessor`."""
        return self._kind


class ImageFile(_Leaf, FileNode):
    """A regular file."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.entry.size

    @property
    def payload_position(self) -> None:
        """See `FileNode`; there is no payload stream."""
        return


class ImageSymlink(_Leaf, Symlink):
    """A symbolic link."""

    @property
    def target(self) -> bytes:
        """Where it leads."""
        return self.entry.target or b""


class ImageDevice(_Leaf, Device):
    """A block or character device."""

    @property
    def major(self) -> int:
        """The device's major number."""
        return (self.entry.rdev or (0, 0))[0]

    @property
    def minor(self) -> int:
        """The device's minor number."""
        return (self.entry.rdev or (0, 0))[1]


class ImageSpecial(_Leaf, Special):
    """A FIFO or a socket."""


class ImageHardlink(_Leaf, Hardlink):
    """A further name of a file that was met at `target_path`, from the image's root, and has `number`."""

    def __init__(
        self, accessor: ImageAccessor, volume: bytes, name: bytes, entry: Entry, number: int, target: bytes
    ) -> None:
        super().__init__(accessor, volume, name, entry, Kind.HARDLINK)
        self._number, self._target = number, target

    @property
    def target_path(self) -> bytes:
        """See `Hardlink`."""
        return self._target

    def follow(self) -> FileNode:
        """See `Hardlink`."""
        name = self._target.rpartition(b"/")[2]
        return ImageFile(self.image, self.volume, name, self.entry, Kind.FILE, self._number)


class ImageFolder(_Known, Directory):
    """A directory of any kind: of a file system, a volume, a volume group, the disk."""

    def __init__(self, accessor: ImageAccessor, volume: bytes, path: bytes, name: bytes, entry: Entry) -> None:
        self._accessor = self.image = accessor
        self.volume, self.path, self.name, self.entry = volume, path, name, entry
        self.position = self.filename_position = accessor.number()

    @property
    def kind(self) -> Kind:
        """See `pxar.accessor`."""
        return Kind.DIRECTORY

    def __len__(self) -> int:
        return 0  # not known without reading all of it

    def readable(self, lost: Callable[[FormatError | NotFoundError], object]) -> Iterator[Node]:
        """See `Directory`; what cannot be read is complained about anyway."""
        return self.stream()

    def children(self) -> list[Node]:
        """See `Directory`; they come sorted."""
        return list(self.stream())

    def below(self, name: bytes) -> bytes:
        """The path of what is called `name` in it."""
        return self.path + b"/" + name if self.path else name


class ImageDirectory(ImageFolder):
    """A directory of a file system. One that was come upon by going through another is `walked`.

    What cannot be read of that is complained about, so that whoever goes through a tree gets all else.
    """

    def __init__(
        self, accessor: ImageAccessor, volume: bytes, path: bytes, name: bytes, entry: Entry, walked: bool
    ) -> None:
        super().__init__(accessor, volume, path, name, entry)
        self._walked = walked

    def lookup(self, name: bytes) -> "Node | None":
        """See `Directory`.

        Raises:
            FormatError: it is damaged.
        """
        entry = trio.from_thread.run(self.image.asked.lookup, self.volume, self.entry.id, name)
        return None if entry is None else self.image.made(self.volume, self.below(name), name, entry)

    def stream(self) -> Iterator[Node]:
        """See `Directory`; sorted by the bytes of the names.

        Raises:
            FormatError: it is damaged, and not `walked`. An entry that is damaged is complained about, and left out.
        """
        try:
            yield from self._nodes()
        except UNREADABLE as error:
            if not self._walked:
                raise
            self.image.complain(self.path, error.why)

    def _nodes(self) -> Iterator[Node]:
        accessor = self.image
        start, more = 0, True
        while more:
            page: Page = trio.from_thread.run(accessor.asked.page, self.volume, self.entry.id, start)
            if not start:
                if page.rows:
                    accessor.enter(self.volume, self.path, self.entry)
                if page.dropped:
                    accessor.complain(self.path, f"{page.dropped} names that cannot be, or are there twice")
            for row in page.rows:
                path = self.below(row.name)
                if row.entry is None:
                    accessor.complain(path, row.why)
                    continue
                try:
                    node = accessor.made(self.volume, path, row.name, row.entry, walked=True)
                except FormatError as error:
                    accessor.complain(path, error.why)
                    continue
                yield node
            start, more = start + len(page.rows), page.more


class VolumeDirectory(ImageFolder):
    """The root of the file system in a volume; of one that cannot be looked into an empty place that says why."""

    def __init__(self, accessor: ImageAccessor, volume: Volume, name: bytes, walked: bool) -> None:
        super().__init__(accessor, volume.name, volume.name, name, Entry((0, 0), _VOLUME_MODE, 0, 0, 0, 0, 1))
        self._kind_of_volume, self._walked = volume.kind, walked
        self._root: ImageDirectory | None = None

    @property
    def metadata(self) -> Metadata:
        """See `pxar.accessor`; of one that cannot be looked into something that does no harm."""
        try:
            return self._file_system().metadata
        except UNREADABLE:
            return Metadata(_stat(self.entry))

    @property
    def stat(self) -> Stat:
        """See `pxar.accessor`."""
        return self.metadata.stat

    def lookup(self, name: bytes) -> "Node | None":
        """See `ImageDirectory.lookup`."""
        return self._file_system().lookup(name)

    def stream(self) -> Iterator[Node]:
        """See `ImageDirectory.stream`."""
        try:
            root = self._file_system()
        except UNREADABLE as error:
            if not self._walked:
                raise
            if self._kind_of_volume not in _NO_FILES:
                self.image.complain(self.path, error.why)
            return iter(())
        return root.stream()

    def _file_system(self) -> ImageDirectory:
        if self._root is None:
            entry = trio.from_thread.run(self.image.asked.entry, self.volume)
            self._root = ImageDirectory(self.image, self.volume, self.volume, self.name, entry, self._walked)
        return self._root


class Group(ImageFolder):
    """A volume group: a directory with its logical volumes."""

    def __init__(self, accessor: ImageAccessor, name: bytes, volumes: Sequence[Volume]) -> None:
        super().__init__(accessor, b"", name, name, Entry((0, 0), _VOLUME_MODE, 0, 0, 0, 0, 1))
        self._volumes = volumes

    def lookup(self, name: bytes) -> "Node | None":
        """See `Directory`."""
        for volume in self._volumes:
            if volume.name.partition(b"/")[2] == name:
                return VolumeDirectory(self.image, volume, name, False)
        return None

    def stream(self) -> Iterator[Node]:
        """See `Directory`."""
        for volume in self._volumes:
            yield VolumeDirectory(self.image, volume, volume.name.partition(b"/")[2], True)


class Top(ImageFolder):
    """The root: what is on the disk."""

    def __init__(self, accessor: ImageAccessor) -> None:
        super().__init__(accessor, b"", b"", b"", Entry((0, 0), _VOLUME_MODE, 0, 0, 0, 0, 1))

    def volumes(self) -> Sequence[Volume]:
        """All volumes.

        Raises:
            DiskFsError: the partition table is damaged.
        """
        return trio.from_thread.run(self.image.asked.volumes)

    def lookup(self, name: bytes) -> "Node | None":
        """See `Directory`."""
        volumes = self._by_name().get(name)
        return None if volumes is None else self._made(name, volumes, False)

    def stream(self) -> Iterator[Node]:
        """See `Directory`; sorted by the bytes of the names."""
        for name, volumes in sorted(self._by_name().items()):
            yield self._made(name, volumes, True)

    def _by_name(self) -> dict[bytes, list[Volume]]:
        found: dict[bytes, list[Volume]] = {}
        for volume in self.volumes():
            found.setdefault(volume.name.partition(b"/")[0], []).append(volume)
        return found

    def _made(self, name: bytes, volumes: list[Volume], walked: bool) -> Node:
        if volumes[0].name == name:
            return VolumeDirectory(self.image, volumes[0], name, walked)
        return Group(self.image, name, sorted(volumes))
