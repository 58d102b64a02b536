"""What a plugin of Proxmox VE asks beside backups and restores: each a call of its own, that keeps nothing.

A call gets one document and gives one. docs/proxmox-provider.md, "The protocol".
"""

import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent.invocation import Invocation
from agent.provider.messages import (
    FIREWALL_CONFIG,
    GUEST_CONFIG,
    ListVolumes,
    LogFile,
    OfArchive,
    OfStorage,
    PruneBackups,
    UpdateVolume,
    parsed,
)
from agent.provider.storage import UsedStorage
from core.errors import NotFoundError, SourceError, UsageError, os_reason
from core.limits import in_cpu_thread, in_io_thread
from core.progress import Progress
from datastore.errors import SnapshotNotFoundError
from datastore.names import BackupType, Group, complete_archive_name
from datastore.prune import KeepOptions, Mark
from repository.interface import Repository, SnapshotInfo

if TYPE_CHECKING:
    from agent.snapshot_archives import OpenSnapshot

#: Bytes of a log that are kept: what is too long loses its middle.
MAX_LOG: Final = 8 << 20
_GUEST_TYPES: Final = {BackupType.VM: "qemu", BackupType.CT: "lxc"}
Document = dict[str, Any]


async def answer_call(name: str, document: object, invocation: Invocation, progress: Progress) -> Document:
    """Do the call `name`.

    Raises:
        UsageError: there is no such call, or the document makes no sense.
        FleeceError: it failed.
    """
    work = CALLS.get(name)
    if work is None:
        raise UsageError("answer", repr(name), f"the calls are {', '.join(CALLS)}")
    return await work(document, invocation, progress)


async def _job_init(document: object, invocation: Invocation, progress: Progress) -> Document:
    storage = UsedStorage(parsed(OfStorage, document, "job-init").storage, invocation)
    keys = storage.keys  # a key that cannot be used should not cost the time of all guests
    async with storage.open() as repository:
        await repository.groups(storage.ns)
        shown = repository.name + (f", namespace {storage.ns}" if storage.ns.components else "")
    return {"repository": shown, "crypt-mode": keys.codec.mode.value}


async def _storage_status(document: object, invocation: Invocation, progress: Progress) -> Document:
    storage = UsedStorage(parsed(OfStorage, document, "storage-status").storage, invocation)
    async with storage.open() as repository:
        usage = await repository.usage()
    return {"total": usage.total, "available": usage.available, "used": usage.used}


async def _list_volumes(document: object, invocation: Invocation, progress: Progress) -> Document:
    request = parsed(ListVolumes, document, "list-volumes")
    storage = UsedStorage(request.storage, invocation)
    async with storage.open() as repository:
        if request.vmid is None:
            infos = await repository.snapshots(storage.ns)
        else:
            infos = []
            for kind in _GUEST_TYPES:
                try:
                    group = Group.parse(f"{kind.value}/{request.vmid}", storage.ns)
                    infos += await repository.snapshots(storage.ns, group)
                except SnapshotNotFoundError:
                    pass  # no backup of that kind
    return {"volumes": [_volume(info) for info in infos if info.finished and is_guest(info.snapshot.group)]}


def is_guest(group: Group) -> bool:
    """Whether the hypervisor could have such a guest: other groups of the namespace are not shown to it."""
    number = group.id
    return group.type in _GUEST_TYPES and number.isascii() and number.isdigit() and 3 <= len(number) <= 9 and (
        number[0] != "0"
    )  # fmt: skip


def _volume(info: SnapshotInfo) -> Document:
    document: Document = {
        "archive-name": str(info.snapshot),
        "size": info.size or 0,
        "ctime": info.snapshot.ctime,
        "protected": info.protected,
        "notes": info.comment,
    }
    if any(file.crypt_mode is not None and file.crypt_mode.value == "encrypt" for file in info.files):
        document["encrypted"] = info.fingerprint or "1"
    verification = info.verification or {}
    if verification.get("state") in ("ok", "failed"):
        document["verification"] = {"state": verification["state"], "upid": str(verification.get("upid", ""))}
    return document


async def _show_volume(document: object, invocation: Invocation, progress: Progress) -> Document:
    request = parsed(OfArchive, document, "volume")
    storage = UsedStorage(request.storage, invocation)
    async with storage.open() as repository:
        return _volume(await _finished(repository, storage, request))


async def _finished(repository: Repository, storage: UsedStorage, request: OfArchive) -> SnapshotInfo:
    info = await repository.snapshot(request.snapshot(storage.ns))
    if not info.finished:
        raise SnapshotNotFoundError("use", request.archive_name, "it is not finished")
    return info


async def _update_volume(document: object, invocation: Invocation, progress: Progress) -> Document:
    request = parsed(UpdateVolume, document, "update-volume")
    storage = UsedStorage(request.storage, invocation)
    async with storage.open() as repository:
        snapshot = request.snapshot(storage.ns)
        if request.notes is not None:
            await repository.set_notes(snapshot, request.notes)
        if request.protected is not None:
            await repository.set_protected(snapshot, protected=request.protected)
    return {}


async def _remove_volume(document: object, invocation: Invocation, progress: Progress) -> Document:
    request = parsed(OfArchive, document, "remove-volume")
    storage = UsedStorage(request.storage, invocation)
    async with storage.open() as repository:
        await repository.forget(request.snapshot(storage.ns))
    return {}


async def _prune_backups(document: object, invocation: Invocation, progress: Progress) -> Document:
    request = parsed(PruneBackups, document, "prune-backups")
    storage = UsedStorage(request.storage, invocation)
    keep = KeepOptions(**{kind: count or None for kind, count in request.keep.model_dump().items()})
    decisions = []
    async with storage.open() as repository:
        for one in await repository.groups(storage.ns):
            group = one.group
            if not is_guest(group) or request.vmid not in (None, int(group.id)):
                continue
            if request.vmtype not in (None, _GUEST_TYPES[group.type]):
                continue
            result = await repository.prune(group, keep, dry_run=request.dry_run, progress=progress)
            for decision in result.decisions:
                mark = "keep" if decision.mark is Mark.KEEP_PARTIAL else decision.mark.value
                entry = {"archive-name": str(decision.snapshot), "ctime": decision.snapshot.ctime, "mark": mark}
                if (failure := result.failed.get(decision.snapshot)) is not None:
                    entry["error"] = failure
                decisions.append(entry)
    return {"decisions": decisions}


async def _guest_config(document: object, invocation: Invocation, progress: Progress) -> Document:
    request = parsed(OfArchive, document, "guest-config")
    async with opened(request, UsedStorage(request.storage, invocation), progress) as snapshot:
        kind = _GUEST_TYPES[snapshot.snapshot.group.type]
        return {"config": await _small_file(snapshot, GUEST_CONFIG[kind])}


async def _firewall_config(document: object, invocation: Invocation, progress: Progress) -> Document:
    request = parsed(OfArchive, document, "firewall-config")
    async with opened(request, UsedStorage(request.storage, invocation), progress) as snapshot:
        there = FIREWALL_CONFIG in snapshot.archives
        return {"config": await _small_file(snapshot, FIREWALL_CONFIG) if there else None}


@asynccontextmanager
async def opened(request: OfArchive, storage: UsedStorage, progress: Progress) -> "AsyncIterator[OpenSnapshot]":
    """The archive that `request` names, with its key if it is there, while the block runs.

    Raises:
        SnapshotNotFoundError, LockedError, FormatError: it cannot be read.
    """
    # What archives need is not imported for calls that ask every few minutes.
    from agent.snapshot_archives import open_snapshot
    from repository.archive import open_cache

    async with (
        storage.open() as repository,
        open_cache() as cache,
        open_snapshot(
            repository, request.snapshot(storage.ns), storage.reading_key.codec(), cache, progress
        ) as snapshot,
    ):
        yield snapshot


async def _small_file(snapshot: "OpenSnapshot", name: str) -> str:
    import base64

    from repository.restore import restore_blob

    entry = snapshot.archives.get(name)
    if entry is None:
        raise NotFoundError(
            "restore", snapshot.where(name), "the backup has none",
            "was it made by the backup of Proxmox VE? 'fleece show' lists what it has",
        )  # fmt: skip
    snapshot.needs_key(entry)
    data = await restore_blob(snapshot.reader, snapshot.codec, snapshot.manifest, complete_archive_name(name))
    return base64.b64encode(data).decode()


async def _handle_log_file(document: object, invocation: Invocation, progress: Progress) -> Document:
    request = parsed(LogFile, document, "handle-log-file")
    storage = UsedStorage(request.storage, invocation)
    data = await in_io_thread(read_log, Path(request.filename))
    blob = await in_cpu_thread(storage.keys.codec.encode_blob, data)
    async with storage.open() as repository:
        await repository.upload_log(request.snapshot(storage.ns), blob)
    return {}


def read_log(path: Path) -> bytes:
    """The log at `path`; of one that is too long its beginning and its end.

    Raises:
        SourceError: it cannot be read, or is no regular file.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise SourceError("store the log", str(path), "it is no regular file")
            if found.st_size <= MAX_LOG:
                return file.read(MAX_LOG)
            begin = file.read(MAX_LOG // 2)
            file.seek(-MAX_LOG // 2, os.SEEK_END)
            return begin + b"\n... what was here is not kept ...\n" + file.read(MAX_LOG // 2)
    except OSError as error:
        raise SourceError("store the log", str(path), os_reason(error)) from error


#: By name; the document, then what the command line gives.
CALLS: Final[dict[str, Callable[[object, Invocation, Progress], Awaitable[Document]]]] = {
    "job-init": _job_init,
    "handle-log-file": _handle_log_file,
    "guest-config": _guest_config,
    "firewall-config": _firewall_config,
    "storage-status": _storage_status,
    "list-volumes": _list_volumes,
    "volume": _show_volume,
    "update-volume": _update_volume,
    "remove-volume": _remove_volume,
    "prune-backups": _prune_backups,
}
