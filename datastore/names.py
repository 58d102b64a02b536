"""Names of everything in a datastore: namespaces, groups, snapshots, archives.

Rules: docs/formats.md, "Names". Every name that comes from outside passes one of the parsers here before it becomes
a path.
"""

import calendar
import re
import time
from dataclasses import dataclass
from enum import Enum
from typing import Final, Self

from core.errors import UsageError

_SAFE_ID: Final = r"[A-Za-z0-9_][A-Za-z0-9._\-]*"
_SAFE: Final = re.compile(_SAFE_ID)
_TIME: Final = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})Z")
_DIGEST: Final = re.compile(r"[a-f0-9]{64}")
#: Components below the root namespace.
MAX_NAMESPACE_DEPTH: Final = 7
#: Characters of a whole namespace.
MAX_NAMESPACE_LENGTH: Final = 256
MANIFEST_NAME: Final = "index.json.blob"
CLIENT_LOG_NAME: Final = "client.log.blob"
CATALOG_NAME: Final = "catalog.pcat1.didx"
MASTER_KEY_NAME: Final = "rsa-encrypted.key.blob"
PROTECTED_NAME: Final = ".protected"
_INNER_EXTENSIONS: Final = {
    "img": ".fidx",
    "pxar": ".didx", "mpxar": ".didx", "ppxar": ".didx", "pcat1": ".didx",
    "conf": ".blob", "json": ".blob", "key": ".blob", "log": ".blob",
}  # fmt: skip


class BackupType(Enum):
    """What a group backs up; the order of definition is PBS's order of listing."""

    CT = "ct"
    HOST = "host"
    VM = "vm"


class ArchiveKind(Enum):
    """How a file of a snapshot is stored, decided by its last extension alone."""

    FIXED = ".fidx"
    DYNAMIC = ".didx"
    BLOB = ".blob"


def is_safe_id(text: str) -> bool:
    """True if `text` may be a backup id, a namespace component or an archive name."""
    return _SAFE.fullmatch(text) is not None


def check_store_name(name: str) -> str:
    """Return `name` if it may name a datastore.

    Raises:
        UsageError: other characters, or not 3 to 32 of them.
    """
    if not is_safe_id(name) or not 3 <= len(name) <= 32:
        raise UsageError("use the datastore name", repr(name), "3 to 32 letters, digits, '.', '_' or '-' are allowed")
    return name


def check_archive_name(name: str) -> str:
    """Return the file name `name` of a snapshot, type extension included, if it is safe and has a known type.

    Raises:
        UsageError: a path, other characters, or none of the three type extensions.
    """
    archive_kind(name)
    return name


def archive_kind(name: str) -> ArchiveKind:
    """The kind of the snapshot file `name`.

    Raises:
        UsageError: an unsafe name, or none of the three type extensions.
    """
    if is_safe_id(name):
        for kind in ArchiveKind:
            if name.endswith(kind.value) and len(name) > len(kind.value):
                return kind
    raise UsageError("use the archive name", repr(name), "it needs a safe name that ends in .fidx, .didx or .blob")


def complete_archive_name(name: str) -> str:
    """The full file name of an archive that a user names with or without type extension.

    `drive-scsi0.img` becomes `drive-scsi0.img.fidx`, `qemu-server.conf` becomes `qemu-server.conf.blob`.

    Raises:
        UsageError: an unsafe name, or an extension that does not tell the type.
    """
    if not is_safe_id(name):
        raise UsageError("use the archive name", repr(name), "only letters, digits, '.', '_' and '-' are allowed")
    if name.endswith(tuple(kind.value for kind in ArchiveKind)):
        return name
    extension = _INNER_EXTENSIONS.get(name.rpartition(".")[2])
    if extension is None:
        raise UsageError("use the archive name", repr(name), f"its ending is none of {', '.join(_INNER_EXTENSIONS)}")
    return name + extension


def strip_archive_type(name: str) -> str:
    """`drive-scsi0.img.fidx` without its type extension; other names unchanged."""
    for kind in ArchiveKind:
        if name.endswith(kind.value):
            return name[: -len(kind.value)]
    return name


def digest_from_hex(text: str) -> bytes:
    """The 32 bytes of a digest written as 64 lower-case hex digits.

    Raises:
        UsageError: anything else.
    """
    if _DIGEST.fullmatch(text) is None:
        raise UsageError("read the digest", repr(text), "64 lower-case hex digits are needed")
    return bytes.fromhex(text)


def format_time(ctime: int) -> str:
    """`ctime` (Unix seconds) as the name of a snapshot folder."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ctime)).zfill(20)


def parse_time(text: str) -> int:
    """Unix seconds of a snapshot folder's name; impossible days and second 60 roll over, as in PBS.

    Raises:
        UsageError: another form, a field out of range, or before 1970-01-01T00:00:01Z.
    """
    match = _TIME.fullmatch(text)
    if match is not None:
        year, month, day, hour, minute, second = map(int, match.groups())
        if 1 <= month <= 12 and 1 <= day <= 31 and hour <= 23 and minute <= 59 and second <= 60 and year >= 1:
            ctime = calendar.timegm((year, month, 1, hour, minute, second)) + (day - 1) * 86400
            if ctime >= 1:
                return ctime
    raise UsageError("read the backup time", repr(text), "it is not of the form 2026-01-02T03:04:05Z")


def is_time(text: str) -> bool:
    """True if `text` has the form of a snapshot folder's name (it may still be no date)."""
    return _TIME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, order=True)
class Namespace:
    """A folder of groups inside a datastore; no components mean the root."""

    components: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `a/b/c`; the empty text is the root.

        Raises:
            UsageError: an unsafe component, more than 7 of them, or more than 256 characters.
        """
        components = tuple(text.split("/")) if text else ()
        length = 0
        for component in components:
            if not is_safe_id(component):
                raise UsageError("use the namespace", repr(text), f"{component!r} is no valid component")
            if length + len(component) + 1 > MAX_NAMESPACE_LENGTH:
                raise UsageError("use the namespace", repr(text), f"longer than {MAX_NAMESPACE_LENGTH} characters")
            length += len(component) + bool(length)
        if len(components) > MAX_NAMESPACE_DEPTH:
            raise UsageError("use the namespace", repr(text), f"more than {MAX_NAMESPACE_DEPTH} levels")
        return cls(components)

    @property
    def path(self) -> str:
        """Relative path in the datastore: `ns/a/ns/b`, empty for the root."""
        return "/".join(f"ns/{component}" for component in self.components)

    def __str__(self) -> str:
        return "/".join(self.components)


#: The root namespace.
ROOT: Final = Namespace()


def _id_key(backup_id: str) -> tuple[int, int, str]:
    # Numeric ids first, by value; the text breaks the tie between "7" and "007".
    numeric = backup_id.isascii() and backup_id.isdigit() and int(backup_id) < 1 << 64
    return (0, int(backup_id), backup_id) if numeric else (1, 0, backup_id)


@dataclass(frozen=True, slots=True)
class Group:
    """All snapshots of one type and id, `vm/100`."""

    type: BackupType
    id: str
    ns: Namespace = ROOT

    @classmethod
    def parse(cls, text: str, ns: Namespace = ROOT) -> Self:
        """Read `type/id`.

        Raises:
            UsageError: another form, an unknown type, or an unsafe id.
        """
        parts = text.split("/")
        if len(parts) != 2 or parts[0] not in {kind.value for kind in BackupType} or not is_safe_id(parts[1]):
            raise UsageError("use the group", repr(text), "it is not of the form vm/ID, ct/ID or host/ID")
        return cls(BackupType(parts[0]), parts[1], ns)

    @property
    def path(self) -> str:
        """Relative path in the datastore: `ns/a/vm/100`."""
        return f"{self.ns.path}/{self}" if self.ns.components else str(self)

    @property
    def sort_key(self) -> tuple[Namespace, str, tuple[int, int, str]]:
        """PBS's order: type, then numeric ids by value, then the others."""
        return self.ns, self.type.value, _id_key(self.id)

    def at(self, ctime: int) -> "Snapshot":
        """The snapshot of this group taken at `ctime`."""
        return Snapshot(self, ctime, format_time(ctime))

    def __str__(self) -> str:
        return f"{self.type.value}/{self.id}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One backup of a group at one time, `vm/100/2026-01-02T03:04:05Z`."""

    group: Group
    ctime: int  #: Unix seconds
    time: str  #: the folder's name as it is; only impossible dates differ from `format_time(ctime)`

    @classmethod
    def parse(cls, text: str, ns: Namespace = ROOT) -> Self:
        """Read `type/id/time`.

        Raises:
            UsageError: another form.
        """
        group, slash, stamp = text.rpartition("/")
        if not slash:
            raise UsageError("use the snapshot", repr(text), "it is not of the form vm/ID/2026-01-02T03:04:05Z")
        return cls(Group.parse(group, ns), parse_time(stamp), stamp)

    @property
    def path(self) -> str:
        """Relative path in the datastore: `ns/a/vm/100/2026-01-02T03:04:05Z`."""
        return f"{self.group.path}/{self.time}"

    def __str__(self) -> str:
        return f"{self.group}/{self.time}"
