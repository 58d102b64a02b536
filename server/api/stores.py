"""Datastores and namespaces (spec 6.2, 6.3)."""

from typing import Any, Final

from core.errors import FleeceError
from core.limits import in_io_thread
from datastore.names import BackupType, Namespace
from datastore.store import Datastore
from repository.local import LocalRepository
from server.access.auth_ids import AuthId
from server.access.roles import Privilege
from server.answers import Result
from server.errors import ApiError
from server.routing import Call, Endpoint, Needs
from server.schema import BOOL, IN_STORE, MAX_DEPTH, NAMESPACE, NAMESPACE_COMPONENT, STORE, Parameter, optional
from server.state import ServerState, namespace

_P = Privilege
_ON_STORE: Final = _P.DATASTORE_AUDIT | _P.DATASTORE_BACKUP
#: With any of these, something is seen.
ANY: Final = _P.DATASTORE_MODIFY | _P.DATASTORE_READ | _P.DATASTORE_BACKUP | _P.DATASTORE_AUDIT
_STORE: Final = {"store": Parameter(STORE)}


async def stores(call: Call) -> object:
    """`GET /admin/datastore`: those that the caller has anything to do with."""
    found: list[dict[str, Any]] = []
    tree = call.state.access.tree()
    for name in await call.state.stores.names():
        if tree.any_below(call.caller, ("datastore", name), ANY):
            found.append({"store": name, "comment": None, "mount-status": "nonremovable"})
    return found


async def status(call: Call) -> object:
    """`GET /admin/datastore/{store}/status`."""
    state, name = call.state, call["store"]
    rights = state.on(call.caller, name)
    if not rights & _ON_STORE:
        if not state.access.tree().any_below(call.caller, ("datastore", name), ANY):
            raise ApiError("permission check failed", 403)
        await state.stores.get(name)
        return {"total": 0, "used": 0, "avail": 0}
    repository = await state.stores.get(name)
    usage = await repository.usage()
    document: dict[str, Any] = {"total": usage.total, "used": usage.used, "avail": usage.available}
    if call["verbose"]:
        document["gc-status"] = gc_document(await repository.gc_status())
        owner = None if rights & _P.DATASTORE_AUDIT else call.caller
        document["counts"] = await in_io_thread(_counts, repository.store, owner)
    return document


_GC_KEYS: Final = (
    "index-file-count", "index-data-bytes", "disk-bytes", "disk-chunks", "removed-bytes", "removed-chunks",
    "pending-bytes", "pending-chunks", "removed-bad", "still-bad",
)  # fmt: skip


def gc_document(status: dict[str, Any] | None) -> dict[str, Any]:
    """The result of the last garbage collection with every key."""
    status = status or {}
    document: dict[str, Any] = {"upid": status.get("upid")}
    document.update({key: status.get(key, 0) for key in _GC_KEYS})
    if isinstance(status.get("cache-stats"), dict):
        document["cache-stats"] = status["cache-stats"]
    return document


def _counts(store: Datastore, owner: AuthId | None) -> dict[str, Any]:
    """Groups and snapshots by type, of all namespaces; only those of `owner` if one is given."""
    counts: dict[str, Any] = {"ct": None, "host": None, "vm": None, "other": None}
    for ns in store.namespaces():
        for group in store.groups(ns):
            if owner is not None and not owner.owns(store.listed_owner(group) or ""):
                continue
            entry = counts[group.type.value] = counts[group.type.value] or {"groups": 0, "snapshots": 0}
            entry["groups"] += 1
            entry["snapshots"] += len(store.snapshots(group, unfinished=True))
    assert set(counts) >= {kind.value for kind in BackupType}
    return counts


async def operations(call: Call) -> object:
    """`GET /admin/datastore/{store}/active-operations`."""
    await call.state.stores.get(call["store"])
    return call.state.stores.operations(call["store"])


async def refresh(call: Call) -> object:
    """`PUT /admin/datastore/{store}/s3-refresh`: not from here; refused at once instead of in a task."""
    await call.state.stores.get(call["store"])
    raise ApiError("refresh is only possible with 'fleece datastore refresh' on the server")


async def mount(call: Call) -> object:
    """`POST /admin/datastore/{store}/mount` and `unmount`: there are no removable datastores."""
    await call.state.stores.get(call["store"])
    raise ApiError(f"datastore '{call['store']}' is not removable")


async def config(call: Call) -> object:
    """`GET /config/datastore/{name}`."""
    repository = await call.state.stores.get(call["name"])
    return Result({"name": call["name"], "path": str(repository.store.base)}, {"digest": "0" * 64})


async def namespaces(call: Call) -> object:
    """`GET /admin/datastore/{store}/namespace`."""
    state, name = call.state, call["store"]
    parent = namespace(call["parent"])
    if not state.access.tree().any_below(call.caller, ("datastore", name, *parent.components), ANY):
        raise ApiError("permission check failed", 403)
    repository = await state.stores.get(name)
    depth = 7 if call["max-depth"] is None else call["max-depth"]
    found = [parent]
    if await in_io_thread(repository.store.namespace_exists, parent):
        found = await repository.namespaces(parent, depth=depth)
    return [{"ns": str(ns)} for ns in found if state.on(call.caller, name, ns) & ANY]


async def add_namespace(call: Call) -> object:
    """`POST /admin/datastore/{store}/namespace`: one level."""
    parent = namespace(call["parent"])
    _check_parent(call.state, call.caller, call["store"], parent)
    repository = await call.state.stores.get(call["store"])
    if len(parent.components) >= 7:
        raise ApiError(f"namespace too deep, {len(parent.components)} >= max 7")
    ns = namespace(f"{call['parent']}/{call['name']}".lstrip("/"))
    if not await in_io_thread(repository.store.namespace_exists, parent):
        raise ApiError(f"cannot create new namespace, parent {parent} doesn't already exists")
    await repository.create_namespace(ns)
    return str(ns)


def _check_parent(state: ServerState, caller: AuthId, store: str, parent: Namespace) -> None:
    if not state.on(caller, store, parent) & _P.DATASTORE_MODIFY:
        where = "/".join(("/datastore", store, *parent.components))
        raise ApiError(f"permission check failed - missing Datastore.Modify on {where}", 403)


async def remove_namespace(call: Call) -> object:
    """`DELETE /admin/datastore/{store}/namespace`."""
    ns = namespace(call["ns"])
    parent = Namespace(ns.components[:-1])
    _check_parent(call.state, call.caller, call["store"], parent)
    if not ns.components:
        raise ApiError("Cannot create/delete root namespace!")
    repository = await call.state.stores.get(call["store"])
    if not await in_io_thread(repository.store.namespace_exists, ns):
        return delete_stats(0, 0, 0)
    before = await in_io_thread(_content, repository, ns)
    if before[0] and not call["delete-groups"]:
        raise ApiError("only partially deleted due to existing groups but `delete-groups` not true")
    removal = await repository.delete_namespace(ns, groups=call["delete-groups"])
    after = await in_io_thread(_content, repository, ns)
    if removal.protected and call["error-on-protected"]:
        raise ApiError("group only partially deleted due to protected snapshots")
    if removal.kept and call["error-on-protected"]:
        raise ApiError("only partially deleted due to existing groups but `delete-groups` not true")
    return delete_stats(before[0] - after[0], before[1] - after[1], len(removal.protected))


def delete_stats(groups: int, snapshots: int, protected: int) -> dict[str, int]:
    """What a removal says of itself."""
    return {
        "removed-groups": max(0, groups),
        "protected-snapshots": protected,
        "removed-snapshots": max(0, snapshots),
    }


def _content(repository: LocalRepository, ns: Namespace) -> tuple[int, int]:
    """Groups and snapshots in a namespace and below."""
    try:
        groups = [group for one in repository.store.namespaces(ns) for group in repository.store.groups(one)]
    except FleeceError:
        return 0, 0
    return len(groups), sum(len(repository.store.snapshots(group, unfinished=True)) for group in groups)


async def stores_config(call: Call) -> object:
    """`GET /config/datastore`."""
    found = []
    for name in await call.state.stores.names():
        if call.state.on(call.caller, name) & (_P.DATASTORE_AUDIT | _P.DATASTORE_ALLOCATE):
            repository = await call.state.stores.get(name)
            found.append({"name": name, "path": str(repository.store.base)})
    return Result(found, {"digest": "0" * 64})


_ON: Final = "/datastore/{store}"
_BASE: Final = "/admin/datastore/{store}"
_MOUNT: Final = {"store": Parameter(STORE)}
ENDPOINTS: Final = (
    Endpoint("GET", "/admin/datastore", stores),
    Endpoint("GET", f"{_BASE}/status", status, {**_STORE, "verbose": optional(BOOL, False)}),
    Endpoint("GET", f"{_BASE}/active-operations", operations, _STORE, Needs(_P.DATASTORE_AUDIT, _ON)),
    Endpoint("PUT", f"{_BASE}/s3-refresh", refresh, _STORE, Needs(_P.DATASTORE_MODIFY, _ON)),
    Endpoint("POST", f"{_BASE}/mount", mount, _MOUNT, Needs(_P.DATASTORE_MODIFY, _ON)),
    Endpoint("POST", f"{_BASE}/unmount", mount, _MOUNT, Needs(_P.DATASTORE_MODIFY, _ON)),
    Endpoint("GET", "/config/datastore", stores_config),
    Endpoint(
        "GET",
        "/config/datastore/{name}",
        config,
        {"name": Parameter(STORE)},
        Needs(_P.DATASTORE_AUDIT | _P.DATASTORE_ALLOCATE, "/datastore/{name}"),
    ),
    Endpoint(
        "GET",
        f"{_BASE}/namespace",
        namespaces,
        {**_STORE, "parent": optional(NAMESPACE, ""), "max-depth": optional(MAX_DEPTH)},
    ),
    Endpoint(
        "POST",
        f"{_BASE}/namespace",
        add_namespace,
        {**_STORE, "name": Parameter(NAMESPACE_COMPONENT), "parent": optional(NAMESPACE, "")},
    ),
    Endpoint(
        "DELETE",
        f"{_BASE}/namespace",
        remove_namespace,
        {
            **IN_STORE,
            "ns": Parameter(NAMESPACE),
            "delete-groups": optional(BOOL, False),
            "error-on-protected": optional(BOOL, True),
        },
    ),
)
