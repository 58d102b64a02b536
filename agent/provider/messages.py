"""What a backup provider of Proxmox VE is told by its plugin: the documents, checked before anything is used.

docs/proxmox-provider.md, "The protocol". Numbers are numbers and texts are texts (nothing is converted), unknown keys
are refused. Texts of the hypervisor that may be no UTF-8 (configurations, paths, patterns) come as base64 of bytes.
"""

import base64
import binascii
import json
import re
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from agent.config_types import NamespaceText
from core.errors import FormatError, UsageError
from datastore.names import BackupType, Namespace, Snapshot

#: Bytes of one document. The map of a disk of 16 TiB in single chunks takes 40 MiB.
MAX_DOCUMENT: Final = 64 << 20
#: Names of the blobs, as Proxmox's own backups have them.
GUEST_CONFIG: Final = {"qemu": "qemu-server.conf", "lxc": "pct.conf"}
FIREWALL_CONFIG: Final = "fw.conf"
#: Largest size of a disk, as elsewhere (1 PiB).
_MAX_SIZE: Final = 1 << 50
_MAX_REGIONS: Final = 1 << 22
_ARCHIVE: Final = re.compile(r"(vm|ct)/[1-9][0-9]{2,8}/[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_TYPES: Final = {"qemu": BackupType.VM, "lxc": BackupType.CT}


def _bytes(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("base64 in a text is needed")
    try:
        return base64.b64decode(value.encode(), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError("it is no base64") from error


def _one_line(text: str) -> str:
    if not text or any(not character.isprintable() for character in text):
        raise ValueError("characters are needed, and on one line")
    return text


def _absolute(text: str) -> str:
    if not text.startswith("/") or "\0" in text:
        raise ValueError("a path begins with a /")
    return text


def _archive(text: str) -> str:
    if _ARCHIVE.fullmatch(text) is None:
        raise ValueError("it is not of the form vm/100/2026-01-02T03:04:05Z")
    return text


Base64 = Annotated[bytes, BeforeValidator(_bytes)]
Line = Annotated[str, AfterValidator(_one_line), Field(max_length=4096)]
AbsoluteText = Annotated[str, AfterValidator(_absolute), Field(max_length=4096)]
ArchiveName = Annotated[str, AfterValidator(_archive)]
Vmid = Annotated[int, Field(ge=100, le=999_999_999)]
GuestType = Literal["qemu", "lxc"]
DiskSize = Annotated[int, Field(gt=0, le=_MAX_SIZE)]
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]
#: A device's name becomes that of an archive.
Device = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}$")]


class Message(BaseModel):
    """One document, or a part of it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=False,
    )


class Storage(Message):
    """A storage of the hypervisor that is a repository."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9\-_.]{0,98}[A-Za-z0-9]$")]
    repository: Line
    ns: NamespaceText | None = None


class OfStorage(Message):
    """What every call of its own says."""

    storage: Storage


class OfArchive(OfStorage):
    """About one archive."""

    archive_name: ArchiveName

    def snapshot(self, ns: Namespace) -> Snapshot:
        """The snapshot it is."""
        return Snapshot.parse(self.archive_name, ns)


# --- calls of their own ----------------------------------------------------------------------------------------------


class LogFile(OfArchive):
    """`handle-log-file`."""

    filename: AbsoluteText


class ListVolumes(OfStorage):
    """`list-volumes`."""

    vmid: Vmid | None = None


class UpdateVolume(OfArchive):
    """`update-volume`."""

    notes: Annotated[str, Field(max_length=65536)] | None = None
    protected: bool | None = None


class Keep(Message):
    """How many snapshots stay; 0 counts as not given."""

    last: Annotated[int, Field(ge=0)] = 0
    hourly: Annotated[int, Field(ge=0)] = 0
    daily: Annotated[int, Field(ge=0)] = 0
    weekly: Annotated[int, Field(ge=0)] = 0
    monthly: Annotated[int, Field(ge=0)] = 0
    yearly: Annotated[int, Field(ge=0)] = 0


class PruneBackups(OfStorage):
    """`prune-backups`."""

    keep: Keep
    vmid: Vmid | None = None
    vmtype: GuestType | None = None
    dry_run: bool


# --- calls of a session ----------------------------------------------------------------------------------------------


class Request(Message):
    """One line to a session."""

    id: Annotated[str, Field(min_length=1, max_length=64)]
    call: Annotated[str, Field(min_length=1, max_length=64)]
    parent: Annotated[int, Field(gt=1, lt=1 << 31)]  #: process that asks; the session ends with that of the first one
    parameters: dict[str, Any]


class Nothing(Message):
    """A call without parameters."""


class BackupInit(OfStorage):
    """`backup-init`."""

    vmid: Vmid
    vmtype: GuestType
    start_time: Annotated[int, Field(gt=0, lt=1 << 36)]  #: Unix seconds

    @property
    def type(self) -> BackupType:
        """The type of the group."""
        return _TYPES[self.vmtype]


class AskedVolume(Message):
    """A disk that may be backed up incrementally."""

    size: DiskSize


class QueryIncremental(Message):
    """`backup-vm-query-incremental`."""

    volumes: dict[Device, AskedVolume]


class FileHandle(Message):
    """An open file of the process that asks."""

    fd: Annotated[int, Field(ge=0, lt=1 << 20)]
    device: Annotated[str, Field(pattern=r"^[0-9]{1,20}$")]  #: `st_dev` and `st_ino`, which must be found again
    inode: Annotated[str, Field(pattern=r"^[0-9]{1,20}$")]


class GivenVolume(Message):
    """A disk that is handed over: by an NBD socket or by an open file."""

    size: DiskSize
    bitmap_mode: Literal["none", "new", "reuse"]
    nbd_path: AbsoluteText | None = None
    bitmap_name: Annotated[str, Field(min_length=1, max_length=1023)] | None = None
    file_handle: FileHandle | None = None
    #: Offset and length of each, in order; None: all is to be read.
    dirty_regions: Annotated[list[Pair], Field(max_length=_MAX_REGIONS)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.nbd_path is None) == (self.file_handle is None):
            raise ValueError("either nbd-path or file-handle is needed")
        if self.nbd_path is None and self.bitmap_mode == "reuse" and self.dirty_regions is None:
            raise ValueError("the dirty regions are missing")
        if self.nbd_path is not None and self.dirty_regions is not None:
            raise ValueError("dirty regions belong to a file handle")
        return self


class _Guest(Message):
    guest_config: Base64
    firewall_config: Base64 | None = None
    bandwidth_limit: Annotated[int, Field(ge=0, le=1 << 50)] = 0  #: bytes a second, 0: none

    @property
    def rate(self) -> int | None:
        """The limit as elsewhere: None if there is none."""
        return self.bandwidth_limit or None


class BackupVm(_Guest):
    """`backup-vm`."""

    volumes: Annotated[dict[Device, GivenVolume], Field(min_length=1, max_length=256)]


class BackupContainer(_Guest):
    """`backup-container`; its files come over the stream."""


class RestoreVm(OfArchive):
    """`restore-vm-init`."""


class RestoreVolume(Message):
    """`restore-vm-volume-cleanup`."""

    device: Device


class RestoreVolumeInit(RestoreVolume):
    """`restore-vm-volume-init`."""

    as_file: bool = False  #: a file shows the disk; else there is an NBD server only


class RestoreContainer(OfArchive):
    """`restore-container-init`."""

    mechanism: Literal["tar", "directory"]


# --- the walk over a container's files -------------------------------------------------------------------------------


class Walk(Message):
    """What `fleece provider archive` reads."""

    directory: Base64
    sources: list[Base64]  #: mount points in it that belong to the container
    exclude: Annotated[list[Base64], Field(max_length=4096)]
    skip_lost_and_found: bool = False  #: of each file system: the container's root may not read it


M = TypeVar("M", bound=Message)


def parsed(model: type[M], value: object, where: str) -> M:
    """`value` as a `model`.

    Raises:
        UsageError: it is none.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
        why = str(first["ctx"]["error"]) if first["type"] == "value_error" else str(first["msg"])
        raise UsageError("understand", where, f"{place or 'the whole'}: {why[:1].lower()}{why[1:]}") from None


def decoded(data: bytes, where: str) -> Any:
    """The JSON document `data`.

    Raises:
        FormatError: it is none.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError("understand", where, "it is no JSON") from error
