"""The backup protocol: one snapshot written over one connection (spec 7 and 8)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from core.errors import FleeceError, UsageError
from core.limits import in_io_thread
from core.nursery import open_nursery
from datastore.errors import LockedError, OwnerError
from datastore.names import BackupType
from datastore.s3.counters import TaskCost, counted_for
from datastore.session import LocalBackupSession, open_session
from repository.local import LocalRepository
from server.access.roles import Privilege
from server.backup_calls import BackupCalls
from server.errors import ApiError
from server.h2_session import H2Session
from server.routing import Call
from server.state import namespace, snapshot
from server.verify_new import verify_new

PROTOCOL: Final = "proxmox-backup-protocol-v1"
#: Seconds that a client waits for a garbage collection that excludes writers.
_WRITER_WAIT_S: Final = 30.0


class _UnfinishedError(ApiError):
    """The connection ended before `finish`."""


@dataclass
class _Holder:
    """Holds the session and its locks in a task of its own, so that `finish` can let go of them."""

    repository: LocalRepository
    call: Call
    benchmark: bool

    def __post_init__(self) -> None:
        self._wanted = trio.Event()
        self._left = trio.Event()
        self._scope = trio.CancelScope()
        self._error: Exception | None = None
        self.finished = False

    async def hold(self, *, task_status: trio.TaskStatus[LocalBackupSession] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            with self._scope:
                async with open_session(
                    self.repository.store,
                    snapshot(self.call.values),
                    owner=str(self.call.caller),
                    lock_wait_s=_WRITER_WAIT_S,
                    for_client=True,
                    cache_chunks=not self.call.values["no-cache"],
                ) as session:
                    task_status.started(session)
                    await self._wanted.wait()
                    try:
                        if not self.benchmark:
                            await session.finish()
                        self.finished = True
                    except FleeceError as error:
                        self._error = error
        finally:
            self._left.set()

    async def finish(self) -> None:
        """Finish the session and let go of its locks."""
        self._wanted.set()
        await self._left.wait()
        if not self.finished:
            # Without an error that was foreseen, the one that was not is on its way out beside this.
            raise self._error or ApiError("the backup could not be finished, the log of the server tells why")

    async def settled(self) -> bool:
        """Wait for the end of a `finish` that is at work; True if the snapshot is there."""
        if self._wanted.is_set():
            await self._left.wait()
        return self.finished

    async def drop(self) -> None:
        """Undo what was not finished and let go of the locks; after `finish` nothing is left to do."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._left.wait()


@asynccontextmanager
async def backup(call: Call) -> AsyncIterator[H2Session]:
    """See `Endpoint.upgrade`: the checks before the 101, in the order of spec 8.1."""
    state, values, caller = call.state, call.values, call.caller
    store, ns = values["store"], namespace(values["ns"])
    if not state.on(caller, store, ns) & Privilege.DATASTORE_BACKUP:
        where = "/".join(("/datastore", store, *ns.components))
        raise ApiError(f"missing permissions 'Datastore.Backup' on '{where}'", 403)
    repository = await state.stores.get(store)
    repository.store.check_writable()
    check_protocol(call, PROTOCOL)
    if not await in_io_thread(repository.store.namespace_exists, ns):
        raise ApiError("namespace not found", 404)
    wanted = snapshot(values)
    is_benchmark = (wanted.group.type, wanted.group.id) == (BackupType.HOST, "benchmark")
    if values["benchmark"] and not is_benchmark:
        raise ApiError("benchmark flags is only allowed on 'host/benchmark'")
    if is_benchmark and not values["benchmark"]:
        raise ApiError("unable to run benchmark without --benchmark flags")
    holder = _Holder(repository, call, values["benchmark"])
    # From here on: whoever holds the session stores the owner before there is a task, and the manifest at its end.
    cost = TaskCost()
    with counted_for(cost):
        async with state.stores.session(store, writes=True), open_nursery() as nursery:
            try:
                session: LocalBackupSession = await nursery.start(holder.hold)
            except FleeceError as error:
                raise await _refusal(error, call, repository) from error
            kind = "benchmark" if values["benchmark"] else "backup"
            worker = f"{store}:{_in_ns(call)}{wanted.group}"
            try:
                async with state.tasks.task(kind, worker, str(caller), cost=cost) as task:
                    task.log(f"starting new {kind} on datastore '{store}' from {call.peer}: \"{_in_ns(call)}{wanted}\"")
                    calls = BackupCalls(repository, session, holder.finish, task, debug=values["debug"])
                    try:
                        yield H2Session(calls, state, caller)
                        # The connection may end while `finish` is at work: what is on the disk decides.
                        finished = await holder.settled()
                    finally:
                        await holder.drop()  # whoever sees that the task has ended may begin the next backup
                    if not finished:
                        raise _UnfinishedError("backup ended but finished state is not set.")
                    task.log("backup finished successfully")
                    if store in state.verify_new and not values["benchmark"]:
                        await verify_new(state, store, repository, wanted, caller)
            except _UnfinishedError:
                pass
            nursery.cancel_scope.cancel()


def _in_ns(call: Call) -> str:
    return "".join(f"ns/{part}/" for part in namespace(call["ns"]).components)


def check_protocol(call: Call, protocol: str) -> None:
    """See to it that the client wants `protocol`.

    Raises:
        ApiError: it does not.
    """
    wanted = call.headers.get("upgrade")
    if wanted is None:
        raise ApiError("missing Upgrade header")
    if wanted != protocol:
        raise ApiError("invalid protocol name")


async def _refusal(error: FleeceError, call: Call, repository: LocalRepository) -> ApiError:
    group = snapshot(call.values).group
    match error:
        case OwnerError():
            owner = await in_io_thread(repository.store.group_owner, group)
            return ApiError(f"backup owner check failed ({call.caller} != {owner or 'nobody'})")
        case LockedError() if "of this second" in error.why:
            return ApiError("backup directory already exists.")
        case UsageError() if "not after" in error.why:
            return ApiError("backup timestamp is older than last backup.")
    return ApiError(str(error))
