"""The reader protocol: one snapshot read over one connection (spec 9)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from core.limits import in_io_thread
from datastore.digests import DigestSet
from datastore.errors import ChunkNotFoundError
from datastore.names import Snapshot
from repository.local import LocalRepository
from server.access.roles import Privilege
from server.answers import raw
from server.backup_protocol import check_protocol
from server.errors import ApiError
from server.h2_session import H2Session
from server.routing import Call, Endpoint, Routes
from server.schema import ARCHIVE, DIGEST, Parameter
from server.state import namespace, snapshot
from server.store_files import download
from server.tasks import Task

PROTOCOL: Final = "proxmox-backup-reader-protocol-v1"
_SPEEDTEST: Final = 1 << 20


@asynccontextmanager
async def reader(call: Call) -> AsyncIterator[H2Session]:
    """See `Endpoint.upgrade`: the checks of spec 9.1, then the snapshot's shared lock for as long as the block runs."""
    state, values, caller = call.state, call.values, call.caller
    store, ns = values["store"], namespace(values["ns"])
    rights = state.on(caller, store, ns)
    if not rights & (Privilege.DATASTORE_READ | Privilege.DATASTORE_BACKUP):
        raise ApiError(f"no permissions on {'/'.join(('/datastore', store, *ns.components))}")
    repository = await state.stores.get(store)
    check_protocol(call, PROTOCOL)
    wanted = snapshot(values)
    if not rights & Privilege.DATASTORE_READ:
        owner = await in_io_thread(repository.store.group_owner, wanted.group)
        if owner is None:
            path = repository.store.base / wanted.group.path / "owner"
            raise ApiError(f'unable to read "{path}" - No such file or directory (os error 2)')
        if not caller.owns(owner):
            raise ApiError("backup owner check failed!")
    if not await in_io_thread(repository.store.exists, wanted):
        raise ApiError(f"snapshot {wanted} does not exist.")
    async with (
        repository.store.locks.snapshot(wanted, shared=True),
        state.stores.session(store, writes=False),
    ):
        if not await in_io_thread(repository.store.exists, wanted):
            raise ApiError(f"snapshot {wanted} does not exist.")
        worker = f"{store}:{''.join(f'ns/{part}/' for part in ns.components)}{wanted.group}/{wanted.ctime:08X}"
        async with state.tasks.task("reader", worker, str(caller)) as task:
            task.log(f"starting new backup reader datastore '{store}': {wanted} from {call.peer}")
            yield H2Session(ReaderCalls(repository, wanted, task, debug=values["debug"]), state, caller)


class ReaderCalls:
    """See `server.h2_session.Session`."""

    def __init__(self, repository: LocalRepository, wanted: Snapshot, task: Task, *, debug: bool = False) -> None:
        self._store = repository.store
        self._snapshot = wanted
        self._task = task
        self._debug = debug
        self._allowed: Final = DigestSet()
        self._known: set[str] = set()  #: indexes whose digests are allowed

    def log(self, text: str) -> None:
        """See `Session.log`."""
        if self._debug:
            self._task.log(text)

    def routes(self) -> Routes:
        """See `Session.routes`."""
        return Routes(
            [
                Endpoint("GET", "/download", self._download, {"file-name": Parameter(ARCHIVE)}, raw=True),
                Endpoint("GET", "/chunk", self._chunk, {"digest": Parameter(DIGEST)}, raw=True),
                Endpoint("GET", "/speedtest", self._speedtest, raw=True),
            ]
        )

    async def _download(self, call: Call) -> object:
        name = call["file-name"]
        answer, index = await download(self._store, self._snapshot, name)
        if index is not None and name not in self._known:
            self._known.add(name)
            self._allowed.add_index(index)
            self._task.log(f"register chunks in '{name}' as downloadable.")
        return answer

    async def _chunk(self, call: Call) -> object:
        digest = bytes.fromhex(call["digest"])
        if digest not in self._allowed:
            raise ApiError(f"download chunk {call['digest']} not allowed", 401)
        try:
            blob = await self._store.chunks.read(digest)
        except ChunkNotFoundError as error:
            text = call["digest"]
            path = self._store.base / ".chunks" / text[:4] / text
            raise ApiError(f'reading file "{path}" failed: No such file or directory (os error 2)') from error
        return raw(blob.header, blob.payload)

    async def _speedtest(self, call: Call) -> object:
        return raw(b"A" * _SPEEDTEST)
