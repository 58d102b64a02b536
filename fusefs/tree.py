"""The tree of a mount: `[ns/NAME/...]TYPE/ID/TIME/` and the files of each snapshot.

Folders are read when somebody looks into them, and again when what they showed is older than `LISTING_TTL_S`. Nothing
here knows the kernel: `fusefs.operations` does.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from core.errors import NotFoundError, UsageError
from datastore.crypt_mode import CryptMode
from datastore.errors import SnapshotNotFoundError
from datastore.names import (
    CLIENT_LOG_NAME,
    MANIFEST_NAME,
    MASTER_KEY_NAME,
    ArchiveKind,
    BackupType,
    Group,
    Namespace,
    Snapshot,
    archive_kind,
    parse_time,
    strip_archive_type,
)
from fusefs.archive_nodes import FileArchive
from fusefs.image_nodes import SUFFIX, DiskFolder
from fusefs.nodes import File, Folder, Link, Node, Shared, kept
from repository.interface import FileInfo, GroupInfo, SnapshotInfo

#: Name of the link to the newest snapshot of a group.
LATEST: Final = b"latest"
_S: Final = 1_000_000_000
#: Endings of the indexes of a file archive: a whole one, and the two streams of a split one.
_WHOLE: Final = ".pxar.didx"
_METADATA: Final = ".mpxar.didx"
_PAYLOAD: Final = ".ppxar.didx"


class NamespaceFolder(Folder):
    """One namespace: its types of backups, and `ns` if there are namespaces in it."""

    def __init__(self, shared: Shared, path: bytes, ns: Namespace) -> None:
        super().__init__(shared, path, shared.mounted_ns)
        self.ns: Final = ns
        self.groups: Mapping[BackupType, Sequence[GroupInfo]] = {}
        self.namespaces: Sequence[Namespace] = ()

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        groups: dict[BackupType, list[GroupInfo]] = {}
        for info in await self.shared.repo.groups(self.ns):
            if info.latest is not None:
                groups.setdefault(info.group.type, []).append(info)
        found = await self.shared.repo.namespaces(self.ns, depth=1)
        self.groups = groups
        self.namespaces = [ns for ns in found if ns.components[:-1] == self.ns.components and ns != self.ns]
        children: dict[bytes, Node] = {}
        for kind in groups:
            name = kind.value.encode()
            children[name] = kept(old, name, TypeFolder, lambda kind=kind: TypeFolder(self, kind))  # type: ignore[misc]
        if self.namespaces:
            children[b"ns"] = kept(old, b"ns", NamespacesFolder, lambda: NamespacesFolder(self))
        return children


class NamespacesFolder(Folder):
    """The folder `ns` with the namespaces of a namespace."""

    def __init__(self, parent: NamespaceFolder) -> None:
        super().__init__(parent.shared, parent.below("ns"), parent.shared.mounted_ns)
        self._parent = parent

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        await self._parent.children()
        children: dict[bytes, Node] = {}
        for ns in self._parent.namespaces:
            name = ns.components[-1].encode()
            make = lambda ns=ns, name=name: NamespaceFolder(self.shared, self.below(name), ns)  # noqa: E731
            children[name] = kept(old, name, NamespaceFolder, make)
        return children

    def _lifetime_end(self) -> float:
        return self._parent._fresh_until


class TypeFolder(Folder):
    """The groups of one type in a namespace."""

    def __init__(self, parent: NamespaceFolder, kind: BackupType) -> None:
        super().__init__(parent.shared, parent.below(kind.value), parent.shared.mounted_ns)
        self._parent, self._kind = parent, kind

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        await self._parent.children()
        children: dict[bytes, Node] = {}
        for info in self._parent.groups.get(self._kind, ()):
            name = info.group.id.encode()
            path = self.below(name)
            folder = kept(old, name, GroupFolder, lambda path=path, info=info: GroupFolder(self.shared, path, info))  # type: ignore[misc]
            folder.mtime_ns = info.latest.ctime * _S if info.latest else self.shared.mounted_ns
            children[name] = folder
        return children

    def _lifetime_end(self) -> float:
        return self._parent._fresh_until  # read with it


class GroupFolder(Folder):
    """The finished snapshots of a group, and `latest`."""

    def __init__(self, shared: Shared, path: bytes, info: GroupInfo) -> None:
        super().__init__(shared, path, shared.mounted_ns)
        self._group: Final[Group] = info.group

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        found = await self.shared.repo.snapshots(self._group.ns, self._group)
        infos = sorted((info for info in found if info.finished), key=lambda info: info.snapshot.ctime)
        children: dict[bytes, Node] = {}
        for info in infos:
            children[info.snapshot.time.encode()] = self._folder(old, info)
        if infos:
            children[LATEST] = self._link(old, infos[-1].snapshot)
        return children

    async def child(self, name: bytes) -> Node | None:
        """See `Folder.child`; asks for the one snapshot only, as a group may have thousands."""
        if self._is_fresh:
            return self._children.get(name)
        if name == LATEST:
            newest = await self.shared.repo.latest(self._group)
            return None if newest is None else self._link(self._children, newest)
        try:
            time = name.decode()
            info = await self.shared.repo.snapshot(Snapshot(self._group, parse_time(time), time))
        except (UnicodeDecodeError, UsageError, SnapshotNotFoundError):
            return None
        return self._folder(self._children, info) if info.finished else None

    def _folder(self, old: Mapping[bytes, Node], info: SnapshotInfo) -> "SnapshotFolder":
        name = info.snapshot.time.encode()
        folder = kept(old, name, SnapshotFolder, lambda: SnapshotFolder(self.shared, self.below(name), info))
        folder.renew(info)
        return folder

    def _link(self, old: Mapping[bytes, Node], newest: Snapshot) -> Link:
        target = newest.time.encode()
        link = kept(old, LATEST, Link, lambda: Link(self.shared, self.below(LATEST), 0, target))
        link.target, link.mtime_ns = target, newest.ctime * _S
        return link


class SnapshotFolder(Folder):
    """The archives and small files of one snapshot."""

    def __init__(self, shared: Shared, path: bytes, info: SnapshotInfo) -> None:
        super().__init__(shared, path, info.snapshot.ctime * _S)
        self.snapshot: Final[Snapshot] = info.snapshot
        self._info: SnapshotInfo | None = info

    def renew(self, info: SnapshotInfo) -> None:
        """The listing of the group says `info` now."""
        self._info = info
        self.expire()

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        info, self._info = self._info, None
        if info is None:
            info = await self.shared.repo.snapshot(self.snapshot)
        if not info.finished:
            raise SnapshotNotFoundError("read", str(self.snapshot), "it is unfinished")
        if info.size is None:
            # The listing could not read the manifest; reading it says why.
            async with self.shared.pool.use(self.snapshot):
                pass
        return snapshot_entries(self, info, old)

    async def child(self, name: bytes) -> Node | None:
        """See `Folder.child`; also the folder of a disk image, which need not be listed."""
        children = await self.children()
        return children.get(name) or disk_folder(self, children, name)


def disk_folder(
    folder: "SnapshotFolder | ArchiveFolder", children: Mapping[bytes, Node], name: bytes
) -> DiskFolder | None:
    """The folder `name` for what is on a disk image in `folder`; None if no image has it."""
    file = children.get(name.removesuffix(SUFFIX)) if name.endswith(SUFFIX) else None
    if not isinstance(file, File) or archive_kind(file.filename) is not ArchiveKind.FIXED:
        return None
    return DiskFolder(folder, folder.below(name), file.info)


def snapshot_entries(folder: SnapshotFolder, info: SnapshotInfo, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
    """What is shown of the files of a snapshot, by name: images and small files as files, file archives as folders.

    The payload of a split archive is a part of it, and the catalog says nothing that the archives do not say.
    """
    children: dict[bytes, Node] = {}
    for file in info.files:
        parts = archive_parts(info, file)
        if not parts or not all(folder.shared.can_read(info, _mode(info, part)) for part in parts):
            continue
        name = shown_name(file.filename).encode()
        if name in children:
            name = file.filename.encode()  # two archives may differ in their type only
        while name in children:
            name += b"~"  # a whole name may be another's short one
        path = folder.below(name)
        if archive_kind(file.filename) is ArchiveKind.DYNAMIC:
            children[name] = _archive(folder, path, parts, old.get(name))
        else:
            children[name] = _file(folder, path, file, old.get(name))
    if folder.shared.lists_images:
        for name in list(children):
            shown = name + SUFFIX
            disk = disk_folder(folder, children, shown)
            if disk is not None and shown not in children:
                children[shown] = kept(old, shown, DiskFolder, lambda disk=disk: disk)  # type: ignore[misc]
    return children


def archive_parts(info: SnapshotInfo, file: FileInfo) -> tuple[FileInfo, ...]:
    """The files of the snapshot `info` that make what the mount shows for its `file`; none if it shows nothing.

    Those of a split archive are shown for the first of its two.
    """
    name = file.filename
    if name == MANIFEST_NAME:
        return ()
    if archive_kind(name) is not ArchiveKind.DYNAMIC or name.endswith(_WHOLE):
        return (file,)
    if name.endswith(_METADATA):
        payload = name.removesuffix(_METADATA) + _PAYLOAD
        found = [other for other in info.files if other.filename == payload]
        return (file, *found[:1]) if found else ()
    return ()


def shown_name(filename: str) -> str:
    """What the mount calls the snapshot's file `filename`: a split archive is named like a whole one."""
    return strip_archive_type(filename.removesuffix(_METADATA) + _WHOLE if filename.endswith(_METADATA) else filename)


def _file(folder: SnapshotFolder, path: bytes, info: FileInfo, old: Node | None) -> File:
    """`old` if it is the file `info` at `path`, else a new node."""
    if isinstance(old, File) and old.path == File.numbered(folder.shared, path):
        if old.filename == info.filename and _same_sizes([old.info], [info]):
            return old
        folder.shared.replaced[path] += 1
    return File(folder, path, info)


def _archive(folder: SnapshotFolder, path: bytes, parts: Sequence[FileInfo], old: Node | None) -> FileArchive:
    """`old` if it is the file archive at `path`, else a new node."""
    if isinstance(old, FileArchive) and old.path == FileArchive.numbered(folder.shared, path):
        if [part.filename for part in old.parts] == [part.filename for part in parts] and _same_sizes(old.parts, parts):
            return old
        folder.shared.replaced[path] += 1
    return FileArchive(folder, path, parts)


def _same_sizes(old: Sequence[FileInfo], new: Sequence[FileInfo]) -> bool:
    return all(len({one.size, other.size} - {None}) < 2 for one, other in zip(old, new, strict=True))


def _mode(info: SnapshotInfo, file: FileInfo) -> CryptMode | None:
    if file.filename == MASTER_KEY_NAME:
        return CryptMode.NONE  # listed with the backup's mode, but plain
    if file.filename == CLIENT_LOG_NAME and any(other.crypt_mode is CryptMode.ENCRYPT for other in info.files):
        return CryptMode.ENCRYPT  # not in the manifest; a client that encrypts encrypts it too
    return file.crypt_mode


class ArchiveFolder(Folder):
    """The root of a mount of one file: a folder with that in it."""

    def __init__(self, shared: Shared, info: SnapshotInfo, file: FileInfo) -> None:
        super().__init__(shared, b"", info.snapshot.ctime * _S)
        self.snapshot: Final[Snapshot] = info.snapshot
        name = strip_archive_type(file.filename)
        self.file: Final = File(self, name.encode(), file)
        self._only: dict[bytes, Node] = {name.encode(): self.file}

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        name = self.file.path + SUFFIX
        disk = disk_folder(self, self._only, name) if self.shared.lists_images else None
        return self._only if disk is None else {**self._only, name: kept(old, name, DiskFolder, lambda: disk)}

    async def child(self, name: bytes) -> Node | None:
        """See `SnapshotFolder.child`."""
        children = await self.children()
        return children.get(name) or disk_folder(self, children, name)


def one_archive(shared: Shared, info: SnapshotInfo, parts: Sequence[FileInfo]) -> FileArchive | ArchiveFolder:
    """The root of a mount of what `parts` (of `find_parts`) make: a file archive itself, or a folder with a file."""
    folder = ArchiveFolder(shared, info, parts[0])
    return FileArchive(folder, b"", parts) if archive_kind(parts[0].filename) is ArchiveKind.DYNAMIC else folder


def find_parts(info: SnapshotInfo, filename: str) -> tuple[FileInfo, ...]:
    """The files of a snapshot that make what a user calls `filename` (full name, of a split archive any): see
    `archive_parts`.

    Raises:
        NotFoundError: it has none of that name.
        UsageError: it has, but that cannot be mounted.
    """
    shown = {file.filename: parts for file in info.files if (parts := archive_parts(info, file))}
    names = [filename, filename.removesuffix(_WHOLE) + _METADATA if filename.endswith(_WHOLE) else filename]
    for name in names:
        if name in shown:
            return shown[name]
    where = f"{info.snapshot}/{filename}"
    if any(file.filename == filename for file in info.files):
        why = "only disk images, file archives and small files can be mounted"
        raise UsageError("mount", where, why, "'fleece restore' writes other archives to a file")
    raise NotFoundError(
        "mount", where, "the snapshot has no such archive", f"it has: {', '.join(map(shown_name, shown))}"
    )
