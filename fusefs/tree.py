"""The tree of a mount: `[ns/NAME/...]TYPE/ID/TIME/` and the files of each snapshot.

Folders are read when somebody looks into them, and again when what they showed is older than `LISTING_TTL_S`. Nothing
here knows the kernel: `fusefs.operations` does.

A new kind of archive (a file archive shown as a folder) plugs in at `snapshot_entries`.
"""

import hashlib
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import trio

from core.errors import NotFoundError, UsageError
from datastore.codec import CryptKey
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
from fusefs.errors import StaleError
from fusefs.opened import BLOCK, Content, OpenSnapshot
from fusefs.pool import Lease, SnapshotPool
from repository.interface import FileInfo, GroupInfo, Repository, SnapshotInfo

#: Seconds after which a folder of namespaces, groups or snapshots is read anew when somebody looks into it.
LISTING_TTL_S: Final = 5.0
#: Name of the link to the newest snapshot of a group.
LATEST: Final = b"latest"
_S: Final = 1_000_000_000
#: The largest size that the kernel can be told; a manifest may say anything.
_MAX_SIZE: Final = (1 << 63) - 1
_LOG = logging.getLogger(__name__)
N = TypeVar("N", bound="Node")


@dataclass(frozen=True, slots=True)
class Shared:
    """What all nodes of a mount have in common."""

    repo: Repository
    key: CryptKey | None
    pool: SnapshotPool[OpenSnapshot]
    mounted_ns: int  #: time of the mount, for folders that have no better one
    #: Keys (their fingerprints, or "") whose absence was logged.
    missed_keys: set[str] = field(default_factory=set)
    #: Inode numbers come from names, so they stay the same; the secret keeps names made for the purpose from colliding.
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    #: How often a file at a path (of a snapshot that was made anew under its old name) became another one.
    replaced: Counter[bytes] = field(default_factory=Counter)

    def inode(self, path: bytes) -> int:
        """The number of what lies at `path` (from the mount's root on), the same as long as the mount lives."""
        number = int.from_bytes(hashlib.blake2b(path, digest_size=8, key=self.secret).digest(), "little")
        return number % ((1 << 63) - 2) + 2  # 0 is nothing, 1 the root

    def has_key(self, info: SnapshotInfo) -> bool:
        """True if the key is there that encrypted files of the snapshot `info` need."""
        return self.key is not None and info.fingerprint in (None, self.key.fingerprint_text)

    def can_read(self, info: SnapshotInfo, mode: CryptMode | None) -> bool:
        """True if files of `mode` in the snapshot `info` need no key or the one that is there; logs once if not."""
        if mode is not CryptMode.ENCRYPT or self.has_key(info):
            return True
        if (info.fingerprint or "") not in self.missed_keys:
            self.missed_keys.add(info.fingerprint or "")
            _LOG.warning(
                "encrypted archives are not shown, first of %s: %s key %s; give it with --keyfile",
                info.snapshot, "missing is the" if self.key is None else "the given one is not the",
                info.fingerprint or "of the backup",
            )  # fmt: skip
        return False


class Node:
    """One thing in the tree."""

    def __init__(self, shared: Shared, path: bytes, mtime_ns: int) -> None:
        self.shared: Final = shared
        self.path: Final = path  #: from the mount's root on, without a leading slash; empty is the root
        self.inode: Final = shared.inode(path) if path else 1
        self.mtime_ns = mtime_ns  #: Unix time


class Link(Node):
    """A symbolic link."""

    def __init__(self, shared: Shared, path: bytes, mtime_ns: int, target: bytes) -> None:
        super().__init__(shared, path, mtime_ns)
        self.target = target


class File(Node):
    """An archive or small file of a snapshot, shown as a file.

    One node, and so one inode number, stands for one content: the kernel keeps what it read of it.
    """

    def __init__(self, folder: "SnapshotFolder | ArchiveFolder", path: bytes, info: FileInfo) -> None:
        super().__init__(folder.shared, self.numbered(folder.shared, path), folder.mtime_ns)
        self.snapshot: Final = folder.snapshot
        self.filename: Final = info.filename
        self.info: Final = info  #: as it was listed
        #: Bytes and 512-byte blocks; a guess from the listing until `exact`.
        self.size, self.blocks, self.exact = min(info.size or 0, _MAX_SIZE), 0, False
        self.blocks = -(-self.size // BLOCK)
        self._folder: Final = folder
        self._plain_path: Final = path
        self._csum: bytes | None = None

    @staticmethod
    def numbered(shared: Shared, path: bytes) -> bytes:
        """`path`, different for each content that was found there."""
        count = shared.replaced[path]
        return b"%b\0%d" % (path, count) if count else path

    async def measure(self) -> None:
        """Make size and blocks exact; opens the snapshot if that was not done yet.

        Raises:
            StaleError: another file has taken its place.
            FleeceError: it cannot be read.
        """
        if not self.exact:
            async with self.shared.pool.use(self.snapshot) as opened:
                self._note(opened, await opened.content(self.filename))

    async def open(self) -> tuple[Lease[OpenSnapshot], Content]:
        """Open it for reading; the caller releases the lease.

        Raises:
            StaleError: another file has taken its place; the kernel asks for the name again then.
            FleeceError: it cannot be read.
        """
        lease = await self.shared.pool.acquire(self.snapshot)
        try:
            content = await lease.value.content(self.filename)
            self._note(lease.value, content)
        except BaseException:
            lease.release()
            raise
        return lease, content

    def _note(self, opened: OpenSnapshot, content: Content) -> None:
        csum = next((file.csum for file in opened.manifest.files if file.filename == self.filename), None)
        if self._csum not in (None, csum):
            if self.path == self.numbered(self.shared, self._plain_path):
                self.shared.replaced[self._plain_path] += 1
            self._folder.expire()
            raise StaleError("read", os.fsdecode(self._plain_path), "the snapshot was removed and made anew")
        self._csum = csum
        self.size, self.blocks, self.exact = content.size, content.blocks, True


class Folder(Node, ABC):
    """A folder, read when somebody looks into it."""

    def __init__(self, shared: Shared, path: bytes, mtime_ns: int) -> None:
        super().__init__(shared, path, mtime_ns)
        self._children: dict[bytes, Node] = {}
        self._fresh_until = float("-inf")
        self._lock = trio.Lock()

    async def children(self) -> Mapping[bytes, Node]:
        """What is in it, by name, in the order of listing.

        Raises:
            FleeceError: it cannot be read, or is not there any more.
        """
        if not self._is_fresh:
            async with self._lock:
                if not self._is_fresh:
                    self._children = await self._load(self._children)
                    self._fresh_until = self._lifetime_end()
        return self._children

    async def child(self, name: bytes) -> Node | None:
        """What is in it under `name`, None if nothing is.

        Raises:
            FleeceError: as `children`.
        """
        return (await self.children()).get(name)

    def _lifetime_end(self) -> float:
        """Until when what was just read may be shown, on trio's clock."""
        return trio.current_time() + LISTING_TTL_S

    def expire(self) -> None:
        """Read the folder anew at the next look."""
        self._fresh_until = float("-inf")

    @property
    def _is_fresh(self) -> bool:
        return trio.current_time() < self._fresh_until

    @abstractmethod
    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        """Read the folder; nodes of `old` that are still there are used again."""

    def _below(self, name: str | bytes) -> bytes:
        encoded = name.encode() if isinstance(name, str) else name
        return self.path + b"/" + encoded if self.path else encoded


def _kept(old: Mapping[bytes, Node], name: bytes, kind: type[N], make: Callable[[], N]) -> N:
    node = old.get(name)
    return node if isinstance(node, kind) else make()


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
            children[name] = _kept(old, name, TypeFolder, lambda kind=kind: TypeFolder(self, kind))  # type: ignore[misc]
        if self.namespaces:
            children[b"ns"] = _kept(old, b"ns", NamespacesFolder, lambda: NamespacesFolder(self))
        return children


class NamespacesFolder(Folder):
    """The folder `ns` with the namespaces of a namespace."""

    def __init__(self, parent: NamespaceFolder) -> None:
        super().__init__(parent.shared, parent._below("ns"), parent.shared.mounted_ns)
        self._parent = parent

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        await self._parent.children()
        children: dict[bytes, Node] = {}
        for ns in self._parent.namespaces:
            name = ns.components[-1].encode()
            make = lambda ns=ns, name=name: NamespaceFolder(self.shared, self._below(name), ns)  # noqa: E731
            children[name] = _kept(old, name, NamespaceFolder, make)
        return children

    def _lifetime_end(self) -> float:
        return self._parent._fresh_until


class TypeFolder(Folder):
    """The groups of one type in a namespace."""

    def __init__(self, parent: NamespaceFolder, kind: BackupType) -> None:
        super().__init__(parent.shared, parent._below(kind.value), parent.shared.mounted_ns)
        self._parent, self._kind = parent, kind

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        await self._parent.children()
        children: dict[bytes, Node] = {}
        for info in self._parent.groups.get(self._kind, ()):
            name = info.group.id.encode()
            path = self._below(name)
            folder = _kept(old, name, GroupFolder, lambda path=path, info=info: GroupFolder(self.shared, path, info))  # type: ignore[misc]
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
        folder = _kept(old, name, SnapshotFolder, lambda: SnapshotFolder(self.shared, self._below(name), info))
        folder.renew(info)
        return folder

    def _link(self, old: Mapping[bytes, Node], newest: Snapshot) -> Link:
        target = newest.time.encode()
        link = _kept(old, LATEST, Link, lambda: Link(self.shared, self._below(LATEST), 0, target))
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


def snapshot_entries(folder: SnapshotFolder, info: SnapshotInfo, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
    """What is shown of the files of a snapshot, by name: images and small files.

    File archives and the catalog (dynamic indexes) are not shown yet: a kind of archive that is a folder makes its
    node here, from one file or, for a split archive, from two.
    """
    children: dict[bytes, Node] = {}
    for file in info.files:
        if not is_shown(file.filename) or not folder.shared.can_read(info, _mode(info, file)):
            continue
        name = strip_archive_type(file.filename).encode()
        if name in children:
            name = file.filename.encode()  # two archives may differ in their type only
        while name in children:
            name += b"~"  # a whole name may be another's short one
        children[name] = _file(folder, folder._below(name), file, old.get(name))
    return children


def _file(folder: SnapshotFolder, path: bytes, info: FileInfo, old: Node | None) -> File:
    """`old` if it is the file `info` at `path`, else a new node."""
    if isinstance(old, File) and old.path == File.numbered(folder.shared, path):
        sizes = {old.info.size, info.size} - {None}
        if old.filename == info.filename and len(sizes) < 2:
            return old
        folder.shared.replaced[path] += 1
    return File(folder, path, info)


def is_shown(filename: str) -> bool:
    """True if the mount shows the snapshot's file `filename` as a file."""
    return filename != MANIFEST_NAME and archive_kind(filename) in (ArchiveKind.FIXED, ArchiveKind.BLOB)


def _mode(info: SnapshotInfo, file: FileInfo) -> CryptMode | None:
    if file.filename == MASTER_KEY_NAME:
        return CryptMode.NONE  # listed with the backup's mode, but plain
    if file.filename == CLIENT_LOG_NAME and any(other.crypt_mode is CryptMode.ENCRYPT for other in info.files):
        return CryptMode.ENCRYPT  # not in the manifest; a client that encrypts encrypts it too
    return file.crypt_mode


class ArchiveFolder(Folder):
    """The root of a mount of one archive: a folder with one file in it."""

    def __init__(self, shared: Shared, info: SnapshotInfo, file: FileInfo) -> None:
        super().__init__(shared, b"", info.snapshot.ctime * _S)
        self.snapshot: Final[Snapshot] = info.snapshot
        name = strip_archive_type(file.filename)
        self._only: dict[bytes, Node] = {name.encode(): File(self, name.encode(), file)}

    async def _load(self, old: Mapping[bytes, Node]) -> dict[bytes, Node]:
        return self._only


def find_file(info: SnapshotInfo, filename: str) -> FileInfo:
    """The file `filename` (full file name) of a snapshot.

    Raises:
        NotFoundError: it has none of that name.
    """
    for file in info.files:
        if file.filename == filename:
            return file
    names = ", ".join(strip_archive_type(file.filename) for file in info.files if is_shown(file.filename))
    raise NotFoundError("mount", f"{info.snapshot}/{filename}", "the snapshot has no such archive", f"it has: {names}")
