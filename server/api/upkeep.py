"""Prune, verify and garbage collection (spec 6.7 to 6.9)."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import trio

from core.errors import FleeceError
from core.limits import in_io_thread
from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.names import Group, Namespace, Snapshot
from datastore.prune import KeepOptions, PruneResult
from datastore.upid import Upid
from repository.local import LocalRepository
from repository.verify import VerifyOptions, choose, verify
from server.access.roles import Privilege
from server.api.snapshots import MISSING, opened
from server.api.stores import gc_document
from server.errors import ApiError
from server.routing import Call, Endpoint, Needs
from server.schema import (
    BACKUP_ID,
    BACKUP_TIME,
    BACKUP_TYPE,
    BOOL,
    GROUP,
    IN_STORE,
    KEEP,
    MAX_DEPTH,
    STORE,
    Integer,
    Parameter,
    optional,
)
from server.state import group, namespace, snapshot
from server.tasks import Task

_P = Privilege
#: Seconds that a request for a garbage collection waits for one that runs.
_GC_WAIT_S: Final = 10.0


def _keep(values: Mapping[str, Any]) -> KeepOptions:
    return KeepOptions(**{name.removeprefix("keep-"): values[name] for name in KEEP})


async def prune(call: Call) -> object:
    """`POST /admin/datastore/{store}/prune`: one group."""
    wanted = group(call.values)
    repository, _ = await opened(call, full=_P.DATASTORE_MODIFY, own=_P.DATASTORE_PRUNE, checked=wanted)
    keep, dry = _keep(call.values), call["dry-run"]
    repository.store.check_writable()
    if not await in_io_thread((repository.store.base / wanted.path).is_dir):
        raise ApiError(MISSING)
    worker = f"{call['store']}:{wanted.ns}:{wanted}"
    if call["use-task"] and not dry:

        async def work(task: Task) -> None:
            _tell(await repository.prune(wanted, keep, progress=task), task)

        return await call.state.tasks.start("prune", worker, str(call.caller), work)
    if dry:
        result = await repository.prune(wanted, keep, dry_run=True, progress=Progress())
    else:
        async with call.state.tasks.task("prune", worker, str(call.caller)) as task:
            result = await repository.prune(wanted, keep, progress=task)
            _tell(result, task)
    return [
        {
            "backup-type": wanted.type.value,
            "backup-id": wanted.id,
            "backup-time": one.snapshot.ctime,
            "keep": one.keep,
            "protected": one.protected,
        }
        | ({"ns": str(wanted.ns)} if dry and wanted.ns.components else {})
        for one in result.decisions
    ]


def _tell(result: PruneResult, task: Progress) -> None:
    for one in result.decisions:
        task.log(f"{one.mark.value} {one.snapshot}" + (f" ({one.reason})" if one.reason else ""))


async def prune_store(call: Call) -> object:
    """`POST /admin/datastore/{store}/prune-datastore`: every group of a namespace and below that the caller may."""
    ns = namespace(call["ns"])
    call.state.full_or_own(call.caller, call["store"], ns, full=_P.DATASTORE_MODIFY, own=_P.DATASTORE_PRUNE)
    repository = await call.state.stores.get(call["store"])
    repository.store.check_writable()
    keep, dry, depth = _keep(call.values), call["dry-run"], call["max-depth"]
    state, caller, store = call.state, call.caller, call["store"]

    async def work(task: Task) -> None:
        for one in await repository.namespaces(ns, depth=depth):
            rights = state.on(caller, store, one)
            if not rights & (_P.DATASTORE_MODIFY | _P.DATASTORE_PRUNE):
                continue
            for info in await repository.groups(one):
                if not rights & _P.DATASTORE_MODIFY and not caller.owns(info.owner or ""):
                    continue
                task.log(f'Pruning group {one}:"{info.group}"')
                try:
                    _tell(await repository.prune(info.group, keep, dry_run=dry, progress=task), task)
                except FleeceError as error:
                    task.warn(str(error))

    return await state.tasks.start("prune", f"{store}:{ns}", str(caller), work)


async def verify_call(call: Call) -> object:
    """`POST /admin/datastore/{store}/verify`: a namespace, a group or a snapshot."""
    values = call.values
    ns = namespace(values["ns"])
    given = tuple(values[name] is not None for name in ("backup-type", "backup-id", "backup-time"))
    target: Group | Snapshot | None
    if given == (True, True, True):
        target = snapshot(values)
    elif given == (True, True, False):
        target = group(values)
    elif not any(given):
        target = None
    else:
        raise ApiError("parameters do not specify a backup group or snapshot")
    everything = call.state.full_or_own(
        call.caller, values["store"], ns, full=_P.DATASTORE_VERIFY, own=_P.DATASTORE_BACKUP
    )
    repository = await call.state.stores.get(values["store"])
    if target is not None and not everything:
        of = target.group if isinstance(target, Snapshot) else target
        await call.state.check_owner(call.caller, repository, of)
    options = VerifyOptions(ignore_verified=values["ignore-verified"], outdated_after=values["outdated-after"])
    kind, worker = _verify_id(values["store"], ns, target)
    state, caller = call.state, call.caller

    def may(group: Group) -> bool:
        rights = state.on(caller, values["store"], group.ns)
        if rights & _P.DATASTORE_VERIFY:
            return True
        own = bool(rights & _P.DATASTORE_BACKUP)
        return own and caller.owns(repository.store.listed_owner(group) or "")

    async def work(task: Task) -> None:
        chosen = await _chosen(repository, ns, target, values["max-depth"], may)
        results = await verify(repository, chosen, ChunkCodec(), task, options, upid=task.upid)
        failed = [result for result in results if result.errors]
        for result in failed:
            for line in result.errors:
                task.log(f"{result.snapshot}: {line}")
        if failed:
            task.log("Failed to verify the following snapshots/groups:")
            for result in failed:
                task.log(f"\t{result.snapshot}")
            raise ApiError("verification failed - please check the log for details")

    return await call.state.tasks.start(kind, worker, str(call.caller), work)


def _verify_id(store: str, ns: Namespace, target: Group | Snapshot | None) -> tuple[str, str]:
    if target is None:
        return "verify", f"{store}:{ns.path}" if ns.components else store
    if isinstance(target, Snapshot):
        return "verify_snapshot", f"{store}:{ns.path}/{target.group}/{target.ctime:08X}"
    return "verify_group", f"{store}:{ns.path}/{target}"


async def _chosen(
    repository: LocalRepository,
    ns: Namespace,
    target: Group | Snapshot | None,
    depth: int | None,
    may: Callable[[Group], bool],
) -> list[Snapshot]:
    if isinstance(target, Snapshot):
        await repository.snapshot(target)  # raises if it is not there
        return [target]
    if isinstance(target, Group):
        found = await repository.snapshots(ns, target)
        return [info.snapshot for info in reversed(found)]
    chosen = await choose(repository, ns, depth=depth)
    # Rights on a namespace say nothing of those below it, which may be hidden.
    allowed = await in_io_thread(lambda: {group for group in {one.group for one in chosen} if may(group)})
    return [one for one in chosen if one.group in allowed]


async def collect(call: Call) -> object:
    """`POST /admin/datastore/{store}/gc`."""
    repository = await call.state.stores.get(call["store"])
    repository.store.check_writable()
    running = [
        info
        for info in call.state.tasks.infos()
        if info.end is None and info.upid.kind == "garbage_collection" and info.upid.id == call["store"]
    ]
    with trio.move_on_after(_GC_WAIT_S) as waited:
        for info in running:
            if (task := call.state.tasks.get(str(info.upid))) is not None:
                await task.over.wait()
    if waited.cancelled_caught:
        raise ApiError(f"unable to start garbage collection job on datastore {call['store']} - timeout")

    async def work(task: Task) -> None:
        task.log(f"starting garbage collection on store {call['store']}")
        report = await repository.collect_garbage(progress=task)
        for key, value in gc_document(report.status.to_json()).items():
            if key != "upid":
                task.log(f"{key}: {value}")

    return await call.state.tasks.start("garbage_collection", call["store"], str(call.caller), work)


async def gc_status(call: Call) -> object:
    """`GET /admin/datastore/{store}/gc`."""
    repository = await call.state.stores.get(call["store"])
    document = {"store": call["store"], **gc_document(await repository.gc_status())}
    upid = document["upid"]
    if isinstance(upid, str) and (info := call.state.tasks.info(upid)) is not None and info.end is not None:
        document |= {
            "last-run-endtime": info.end,
            "last-run-state": info.status,
            "duration": info.end - Upid.parse(upid).start,
        }
    return document


_BASE: Final = "/admin/datastore/{store}"
_ON: Final = "/datastore/{store}"
_STORE: Final = {"store": Parameter(STORE)}
_THREADS: Final = optional(Integer(1, 32))
ENDPOINTS: Final = (
    Endpoint(
        "POST",
        f"{_BASE}/prune",
        prune,
        {**GROUP, **KEEP, "dry-run": optional(BOOL, False), "use-task": optional(BOOL, False)},
    ),
    Endpoint(
        "POST",
        f"{_BASE}/prune-datastore",
        prune_store,
        {**IN_STORE, **KEEP, "dry-run": optional(BOOL, False), "max-depth": optional(MAX_DEPTH)},
    ),
    Endpoint(
        "POST",
        f"{_BASE}/verify",
        verify_call,
        {
            **IN_STORE,
            "max-depth": optional(MAX_DEPTH),
            "ignore-verified": optional(BOOL, True),
            "outdated-after": optional(Integer(0)),
            "read-threads": _THREADS,
            "verify-threads": _THREADS,
            "backup-type": optional(BACKUP_TYPE),
            "backup-id": optional(BACKUP_ID),
            "backup-time": optional(BACKUP_TIME),
        },
    ),
    Endpoint("POST", f"{_BASE}/gc", collect, _STORE, Needs(_P.DATASTORE_MODIFY, _ON)),
    Endpoint("GET", f"{_BASE}/gc", gc_status, _STORE, Needs(_P.DATASTORE_AUDIT, _ON)),
)
