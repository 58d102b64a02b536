"""What the tree of a mount is made of: files, links, and folders that are read when somebody looks into them."""

import hashlib
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import trio

from datastore.codec import CryptKey
from datastore.crypt_mode import CryptMode
from datastore.names import Snapshot
from fusefs.errors import StaleError
from fusefs.opened import BLOCK, Content, OpenSnapshot
from fusefs.opened_archive import RecentArchives
from fusefs.pool import Lease, SnapshotPool
from fusefs.running_images import RunningImages
from repository.interface import FileInfo, Repository, SnapshotInfo

#: Seconds after which a folder of namespaces, groups or snapshots is read anew when somebody looks into it.
LISTING_TTL_S: Final = 5.0
#: The largest size that the kernel can be told; a manifest or an archive may say anything.
MAX_SIZE: Final = (1 << 63) - 1
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
    recent: RecentArchives = field(default_factory=RecentArchives)
    images: RunningImages = field(default_factory=RunningImages)
    #: Folders of disk images are listed, not only found by their names.
    lists_images: bool = False
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


class Owner(Protocol):
    """What the files of a snapshot belong to."""

    shared: Final[Shared]  # type: ignore[misc]  # a promise only
    snapshot: Final[Snapshot]  # type: ignore[misc]
    mtime_ns: int

    def expire(self) -> None:
        """See `Folder.expire`."""
        ...


class Stored(Node):
    """An archive or small file of a snapshot.

    One node, and so one inode number, stands for one content: the kernel keeps what it read of it.
    """

    def __init__(self, folder: Owner, path: bytes) -> None:
        super().__init__(folder.shared, self.numbered(folder.shared, path), folder.mtime_ns)
        self.snapshot: Final = folder.snapshot
        self.exact = False  #: what is known is not a guess from the listing
        self._folder: Final = folder
        self._plain_path: Final = path
        self._csums: tuple[bytes, ...] = ()

    @staticmethod
    def numbered(shared: Shared, path: bytes) -> bytes:
        """`path`, different for each content that was found there."""
        count = shared.replaced[path]
        return b"%b\0%d" % (path, count) if count else path

    @abstractmethod
    async def measure(self) -> None:
        """Make what `stat` shows exact; opens the snapshot if that was not done yet.

        Raises:
            StaleError: another file has taken its place.
            FleeceError: it cannot be read.
        """

    def _is(self, csums: tuple[bytes, ...]) -> None:
        """Make sure that what was opened, with these checksums, is what was opened before."""
        if self._csums not in ((), csums):
            if self.path == self.numbered(self.shared, self._plain_path):
                self.shared.replaced[self._plain_path] += 1
            self._folder.expire()
            raise StaleError("read", os.fsdecode(self._plain_path), "the snapshot was removed and made anew")
        self._csums = csums


class File(Stored):
    """A disk image or small file, shown as a file."""

    def __init__(self, folder: Owner, path: bytes, info: FileInfo) -> None:
        super().__init__(folder, path)
        self.filename: Final = info.filename
        self.info: Final = info  #: as it was listed
        #: Bytes and 512-byte blocks; a guess from the listing until `exact`.
        self.size = min(info.size or 0, MAX_SIZE)
        self.blocks = -(-self.size // BLOCK)

    async def measure(self) -> None:
        """See `Stored.measure`."""
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
        csums = tuple(file.csum for file in opened.manifest.files if file.filename == self.filename)
        self._is(csums or (b"",))
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

    def below(self, name: str | bytes) -> bytes:
        """The path of what is called `name` in it."""
        encoded = name.encode() if isinstance(name, str) else name
        return self.path + b"/" + encoded if self.path else encoded


def kept(old: Mapping[bytes, Node], name: bytes, kind: type[N], make: Callable[[], N]) -> N:
    """The node of `old` called `name` if it is of this kind, else a new one."""
    node = old.get(name)
    return node if isinstance(node, kind) else make()
