"""Object keys of a datastore in a bucket, and what a key from a listing means.

A key from a listing comes from outside: nothing becomes a local path before `StoreKeys.parse` took it (R8). Prefixes
end in `/`, so that `vm/1` never means `vm/10` as well (R7).
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from core.errors import UsageError
from datastore.names import (
    PROTECTED_NAME,
    ArchiveKind,
    Group,
    Namespace,
    Snapshot,
    check_store_name,
    is_safe_id,
    is_time,
)

#: Bytes of UTF-8 that a key may have.
MAX_KEY_SIZE: Final = 1024
NAMESPACE_MARKER: Final = ".namespace"
#: Numbers of corrupt copies of one chunk: 0 to 9.
BAD_NUMBERS: Final = 10
#: Relative keys beside chunks and metadata.
IN_USE: Final = ".in-use"
CHECK_OBJECT: Final = ".s3-client-test"
_CHUNK: Final = re.compile(r"([0-9a-f]{4})/((?:\1)[0-9a-f]{60})(?:\.([0-9])\.bad)?")
_GROUP_FILES: Final = ("owner", "notes")


class MetaKind(Enum):
    """What a metadata object belongs to."""

    NAMESPACE = "namespace"  #: the marker of a namespace
    GROUP = "group"  #: owner or notes
    SNAPSHOT = "snapshot"  #: an archive, manifest, log or the protected marker


@dataclass(frozen=True, slots=True)
class ChunkKey:
    """The object of a chunk, or of a corrupt copy."""

    digest: bytes
    bad: int | None = None  #: number of the corrupt copy; None: the chunk


@dataclass(frozen=True, slots=True)
class MetaKey:
    """An object of the metadata tree."""

    kind: MetaKind
    path: str  #: relative to the datastore's folder, safe as a local path: `ns/a/vm/100/owner`


@dataclass(frozen=True, slots=True)
class StoreKeys:
    """The keys of one datastore; all are full keys, prefixed with its name.

    Raises:
        UsageError: no name of a datastore.
    """

    store: str

    def __post_init__(self) -> None:
        check_store_name(self.store)

    @property
    def everything(self) -> str:
        """The prefix of all objects."""
        return f"{self.store}/"

    @property
    def chunks(self) -> str:
        """The prefix of chunks; a hex digit behind it gives a sixteenth of them (R38)."""
        return f"{self.store}/.chunks/"

    @property
    def metadata(self) -> str:
        """The prefix of all that is no chunk and no marker of the store."""
        return f"{self.store}/.cnt/"

    @property
    def in_use(self) -> str:
        """The marker that says which host uses the store."""
        return f"{self.store}/{IN_USE}"

    @property
    def check_object(self) -> str:
        """The object that `endpoint check` writes and removes."""
        return f"{self.store}/{CHECK_OBJECT}"

    def chunk(self, digest: bytes) -> str:
        """The key of a chunk."""
        name = digest.hex()
        return f"{self.store}/.chunks/{name[:4]}/{name}"

    def bad_chunk(self, digest: bytes, number: int) -> str:
        """The key of the corrupt copy `number`, 0 to 9."""
        return f"{self.chunk(digest)}.{number}.bad"

    def meta(self, path: str) -> str:
        """The key of the file `path`, relative to the datastore's folder.

        Raises:
            UsageError: absolute, with an empty, `.` or `..` component, or too long.
        """
        return check_key(f"{self.store}/.cnt/{_checked(path)}")

    def meta_prefix(self, path: str) -> str:
        """The prefix of everything in the folder `path`, relative to the datastore's folder; ends in `/`."""
        return f"{self.meta(path)}/"

    def namespace_marker(self, ns: Namespace) -> str:
        """The key of a namespace's marker."""
        return self.meta(f"{ns.path}/{NAMESPACE_MARKER}")

    def parse(self, key: str) -> ChunkKey | MetaKey | None:
        """What the listed `key` is; None for everything else, which must be left alone (R8)."""
        if key.startswith(self.chunks):
            match = _CHUNK.fullmatch(key, len(self.chunks))
            if match is None:
                return None
            return ChunkKey(bytes.fromhex(match[2]), None if match[3] is None else int(match[3]))
        if key.startswith(self.metadata):
            return _parse_meta(key[len(self.metadata) :])
        return None


def check_key(key: str) -> str:
    """Return `key` if S3 takes it (R6).

    Raises:
        UsageError: empty or longer than 1024 bytes.
    """
    size = len(key.encode())
    if not 0 < size <= MAX_KEY_SIZE:
        raise UsageError("use the object key", key[:80], f"it has {size} bytes, 1 to {MAX_KEY_SIZE} are allowed")
    return key


def _checked(path: str) -> str:
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise UsageError("use the path", repr(path), "it is absolute or has an empty, '.' or '..' component")
    return path


def _parse_meta(path: str) -> MetaKey | None:
    components: list[str] = []
    rest = path.split("/")
    while len(rest) > 2 and rest[0] == "ns":
        components.append(rest[1])
        rest = rest[2:]
    try:
        ns = Namespace.parse("/".join(components))
        if rest == [NAMESPACE_MARKER] and components:
            return MetaKey(MetaKind.NAMESPACE, path)
        if len(rest) == 3 and rest[2] in _GROUP_FILES:
            Group.parse("/".join(rest[:2]), ns)
            return MetaKey(MetaKind.GROUP, path)
        if len(rest) == 4 and is_time(rest[2]) and _is_snapshot_file(rest[3]):
            Snapshot.parse("/".join(rest[:3]), ns)
            return MetaKey(MetaKind.SNAPSHOT, path)
    except UsageError:
        return None
    return None


def _is_snapshot_file(name: str) -> bool:
    if name == PROTECTED_NAME:
        return True
    return is_safe_id(name) and any(name.endswith(kind.value) and name != kind.value for kind in ArchiveKind)
