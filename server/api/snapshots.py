"""Groups and snapshots: lists, notes, protection, owners, removal (spec 6.4, 6.5)."""

from typing import Any, Final

from core.errors import FleeceError
from core.limits import in_io_thread
from datastore.errors import LockedError, ProtectedError, SnapshotNotFoundError
from datastore.names import BackupType, Group, Snapshot
from datastore.store import Datastore, SnapshotEntry
from repository.interface import SnapshotInfo
from repository.local import LocalRepository
from server.access.auth_ids import AuthId
from server.access.roles import NONE, Privilege
from server.api.stores import delete_stats
from server.errors import ApiError
from server.routing import Call, Endpoint
from server.schema import (
    AUTH,
    BACKUP_ID,
    BACKUP_TYPE,
    BOOL,
    GROUP,
    IN_STORE,
    NOTES,
    SNAPSHOT,
    Parameter,
    optional,
)
from server.state import group, namespace, snapshot

_P = Privilege
#: What a missing namespace or group folder gives; clients look for it (spec 3.3).
MISSING: Final = "ENOENT: No such file or directory"


async def opened(
    call: Call, *, full: Privilege = NONE, own: Privilege, checked: Group | None = None
) -> tuple[LocalRepository, bool]:
    """The store of a call, and whether the caller may act on every group; with `checked` that this one is allowed.

    Raises:
        ApiError: missing rights, before anything tells whether something exists; somebody else's group.
    """
    everything = call.state.full_or_own(call.caller, call["store"], namespace(call["ns"]), full=full, own=own)
    repository = await call.state.stores.get(call["store"])
    if checked is not None and not everything:
        await call.state.check_owner(call.caller, repository, checked)
    return repository, everything


async def groups(call: Call) -> object:
    """`GET /admin/datastore/{store}/groups`."""
    repository, everything = await opened(call, full=_P.DATASTORE_AUDIT, own=_P.DATASTORE_BACKUP)
    ns = namespace(call["ns"])
    owner = None if everything else call.caller

    def collect() -> list[dict[str, Any]]:
        try:
            found = repository.store.groups(ns)
        except SnapshotNotFoundError:
            raise ApiError(MISSING) from None
        entries = (_group(repository.store, one, owner) for one in found)
        return [entry for entry in entries if entry is not None]

    return await in_io_thread(collect)


def _group(store: Datastore, one: Group, caller: AuthId | None) -> dict[str, Any] | None:
    owner = store.listed_owner(one)
    if caller is not None and not caller.owns(owner or ""):
        return None
    everything = store.snapshots(one, unfinished=True)
    finished = [snapshot for snapshot in everything if store.is_finished(snapshot)]
    shown = finished[-1] if finished else everything[0] if len(everything) == 1 else None
    files: list[str] = []
    if shown is not None:
        try:
            files = [file.filename for file in store.entry(shown).files]
        except FleeceError:
            files = []
    entry: dict[str, Any] = {
        "backup-type": one.type.value,
        "backup-id": one.id,
        "last-backup": 0 if shown is None else shown.ctime,
        "backup-count": len(everything),
        "files": files,
    }
    if owner:
        entry["owner"] = owner
    notes = store.listed_notes(one)
    if notes:
        entry["comment"] = notes.partition("\n")[0] + ("\n" if "\n" in notes else "")
    return entry


async def remove_group(call: Call) -> object:
    """`DELETE /admin/datastore/{store}/groups`."""
    wanted = group(call.values)
    repository, _ = await opened(call, full=_P.DATASTORE_MODIFY, own=_P.DATASTORE_PRUNE, checked=wanted)
    store = repository.store
    if not await in_io_thread((store.base / wanted.path).is_dir):
        raise ApiError(f'read dir "{store.base / wanted.path}" - {MISSING}')
    count = await in_io_thread(lambda: len(store.snapshots(wanted, unfinished=True)))
    try:
        kept = await repository.forget_group(wanted)
    except LockedError as error:
        raise ApiError(f"while destroying group '{wanted}': {error}") from error
    if kept and call["error-on-protected"]:
        raise ApiError("group only partially deleted due to protected snapshots")
    return delete_stats(0 if kept else 1, count - len(kept), len(kept))


async def group_notes(call: Call) -> object:
    """`GET /admin/datastore/{store}/group-notes`."""
    wanted = group(call.values)
    everything = call.state.full_or_own(
        call.caller, call["store"], wanted.ns, full=_P.DATASTORE_AUDIT, own=_P.DATASTORE_BACKUP
    )
    repository = await call.state.stores.get(call["store"])
    if not everything:
        await call.state.check_owner(call.caller, repository, wanted)
    return await in_io_thread(repository.store.listed_notes, wanted)


async def set_group_notes(call: Call) -> None:
    """`PUT /admin/datastore/{store}/group-notes`."""
    wanted = group(call.values)
    repository, _ = await opened(call, full=_P.DATASTORE_MODIFY, own=_P.DATASTORE_BACKUP, checked=wanted)
    try:
        await repository.set_notes(wanted, call["notes"])
    except SnapshotNotFoundError:
        raise ApiError(f"failed to set group notes - {MISSING}") from None


async def change_owner(call: Call) -> None:
    """`POST /admin/datastore/{store}/change-owner`."""
    wanted = group(call.values)
    state, caller = call.state, call.caller
    everything = state.full_or_own(caller, call["store"], wanted.ns, full=_P.DATASTORE_MODIFY, own=_P.DATASTORE_BACKUP)
    repository = await state.stores.get(call["store"])
    target = AuthId.parse(call["new-owner"])
    current = await in_io_thread(repository.store.group_owner, wanted)
    if current is None:
        path = repository.store.base / wanted.path / "owner"
        raise ApiError(f'unable to read "{path}" - No such file or directory (os error 2)')
    if not everything and not _may_hand_over(caller, AuthId.parse(current), target):
        what = f"{caller} does not have permission to change owner of backup group '{wanted}' to {target}"
        raise ApiError(what, 401)
    if not state.access.active(target):
        kind = "user" if target.token is None else "token"
        raise ApiError(f"{kind} '{target}' is inactive or non-existent")
    await repository.set_owner(wanted, str(target))


def _may_hand_over(caller: AuthId, owner: AuthId, target: AuthId) -> bool:
    """Among a user and its tokens, done by that user (spec 6.4)."""
    return caller.token is None and owner.user == caller.user == target.user and owner != target


async def snapshots(call: Call) -> object:
    """`GET /admin/datastore/{store}/snapshots`."""
    repository, everything = await opened(call, full=_P.DATASTORE_AUDIT, own=_P.DATASTORE_BACKUP)
    ns = namespace(call["ns"])
    kind, name = call["backup-type"], call["backup-id"]
    if not await in_io_thread(repository.store.namespace_exists, ns):
        raise ApiError(MISSING)

    def chosen() -> list[Group]:
        if kind is not None and name is not None:
            return [Group(BackupType(kind), name, ns)]
        found = repository.store.groups(ns)
        return [one for one in found if kind in (None, one.type.value) and name in (None, one.id)]

    result = []
    for one in await in_io_thread(chosen):
        if not everything:
            owner = await in_io_thread(repository.store.listed_owner, one)
            if not call.caller.owns(owner or ""):
                continue
        result += [_info(info) for info in await repository.snapshots(ns, one, unfinished=True)]
    return result


def _info(info: SnapshotInfo) -> dict[str, Any]:
    readable = info.size is not None
    entry: dict[str, Any] = {
        "backup-type": info.snapshot.group.type.value,
        "backup-id": info.snapshot.group.id,
        "backup-time": info.snapshot.ctime,
        "files": [
            {"filename": file.filename}
            | ({"crypt-mode": file.crypt_mode.value} if readable and file.crypt_mode is not None else {})
            | ({"size": file.size} if readable and file.size is not None else {})
            for file in info.files
        ],
        "protected": info.protected,
    }
    if readable:
        entry["size"] = info.size
        if info.comment:
            entry["comment"] = info.comment.partition("\n")[0]
        if info.verification is not None:
            entry["verification"] = info.verification
        if info.fingerprint is not None:
            entry["fingerprint"] = info.fingerprint
    if info.owner:
        entry["owner"] = info.owner
    return entry


async def remove_snapshot(call: Call) -> None:
    """`DELETE /admin/datastore/{store}/snapshots`."""
    wanted = snapshot(call.values)
    repository, _ = await opened(call, full=_P.DATASTORE_MODIFY, own=_P.DATASTORE_PRUNE, checked=wanted.group)
    try:
        await repository.forget(wanted)
    except ProtectedError:
        raise ApiError('failed to delete snapshot - "cannot remove protected snapshot"') from None
    except SnapshotNotFoundError:
        path = repository.store.base / wanted.path
        why = f'removing backup snapshot \\"{path}\\" failed - No such file or directory (os error 2)'
        raise ApiError(f'failed to delete snapshot - "{why}"') from None
    except FleeceError as error:
        raise ApiError(f"failed to delete snapshot - {error}") from error


async def manifest_entry(repository: LocalRepository, wanted: Snapshot) -> SnapshotEntry:
    """What is known of a finished snapshot.

    Raises:
        ApiError: it is not there, or has no readable manifest.
    """
    store = repository.store
    if not await in_io_thread((store.base / wanted.path).is_dir):
        raise ApiError(MISSING)
    entry = await in_io_thread(store.entry, wanted)
    if entry.manifest is None:
        raise _no_manifest(repository, wanted)
    return entry


def _no_manifest(repository: LocalRepository, wanted: Snapshot) -> ApiError:
    path = repository.store.base / wanted.path / "index.json.blob"
    return ApiError(f"unable to load blob '\"{path}\"' - No such file or directory (os error 2)")


async def files(call: Call) -> object:
    """`GET /admin/datastore/{store}/files`."""
    wanted = snapshot(call.values)
    full = _P.DATASTORE_AUDIT | _P.DATASTORE_READ
    repository, _ = await opened(call, full=full, own=_P.DATASTORE_BACKUP, checked=wanted.group)
    entry = await manifest_entry(repository, wanted)
    return [
        {"filename": file.filename}
        | ({"crypt-mode": file.crypt_mode.value} if file.crypt_mode is not None else {})
        | ({"size": file.size} if file.size is not None else {})
        for file in entry.files
    ]


async def notes(call: Call) -> object:
    """`GET /admin/datastore/{store}/notes`."""
    wanted = snapshot(call.values)
    repository, _ = await opened(call, full=_P.DATASTORE_AUDIT, own=_P.DATASTORE_BACKUP, checked=wanted.group)
    if not await in_io_thread(repository.store.is_finished, wanted):
        raise _no_manifest(repository, wanted)
    entry = await manifest_entry(repository, wanted)
    assert entry.manifest is not None
    return entry.manifest.notes or ""


async def set_notes(call: Call) -> None:
    """`PUT /admin/datastore/{store}/notes`."""
    wanted = snapshot(call.values)
    repository, _ = await opened(call, full=_P.DATASTORE_MODIFY, own=_P.DATASTORE_BACKUP, checked=wanted.group)
    await repository.set_notes(wanted, call["notes"])


async def protected(call: Call) -> object:
    """`GET /admin/datastore/{store}/protected`."""
    wanted = snapshot(call.values)
    repository, _ = await opened(call, full=_P.DATASTORE_AUDIT, own=_P.DATASTORE_BACKUP, checked=wanted.group)
    if not await in_io_thread(repository.store.exists, wanted):
        raise ApiError(f"snapshot {wanted} does not exist!")
    return await in_io_thread(repository.store.is_protected, wanted)


async def set_protected(call: Call) -> None:
    """`PUT /admin/datastore/{store}/protected`."""
    wanted = snapshot(call.values)
    repository, _ = await opened(call, full=_P.DATASTORE_MODIFY, own=_P.DATASTORE_BACKUP, checked=wanted.group)
    try:
        await repository.set_protected(wanted, protected=call["protected"])
    except SnapshotNotFoundError:
        raise ApiError(f"snapshot {wanted} does not exist!") from None


_BASE: Final = "/admin/datastore/{store}"
_UNPROTECTED: Final = {"error-on-protected": optional(BOOL, True)}
ENDPOINTS: Final = (
    Endpoint("GET", f"{_BASE}/groups", groups, IN_STORE),
    Endpoint("DELETE", f"{_BASE}/groups", remove_group, {**GROUP, **_UNPROTECTED}),
    Endpoint("GET", f"{_BASE}/group-notes", group_notes, GROUP),
    Endpoint("PUT", f"{_BASE}/group-notes", set_group_notes, {**GROUP, "notes": Parameter(NOTES)}),
    Endpoint("POST", f"{_BASE}/change-owner", change_owner, {**GROUP, "new-owner": Parameter(AUTH)}),
    Endpoint(
        "GET",
        f"{_BASE}/snapshots",
        snapshots,
        {**IN_STORE, "backup-type": optional(BACKUP_TYPE), "backup-id": optional(BACKUP_ID)},
    ),
    Endpoint("DELETE", f"{_BASE}/snapshots", remove_snapshot, SNAPSHOT),
    Endpoint("GET", f"{_BASE}/files", files, SNAPSHOT),
    Endpoint("GET", f"{_BASE}/notes", notes, SNAPSHOT),
    Endpoint("PUT", f"{_BASE}/notes", set_notes, {**SNAPSHOT, "notes": Parameter(NOTES)}),
    Endpoint("GET", f"{_BASE}/protected", protected, SNAPSHOT),
    Endpoint("PUT", f"{_BASE}/protected", set_protected, {**SNAPSHOT, "protected": Parameter(BOOL)}),
)
