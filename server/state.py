"""What the whole server shares: users and rights, tickets, tasks, datastores."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import trio

from core.errors import FleeceError
from core.limits import in_io_thread
from core.nursery import open_nursery
from datastore.names import Group, Namespace, Snapshot
from repository.local import LocalRepository
from server.access.auth_ids import AuthId
from server.access.roles import NAMES, NONE, Privilege
from server.access.store import AccessStore
from server.access.tickets import Tickets
from server.errors import ApiError
from server.remotes import NoRemotes, Remotes
from server.tasks import Tasks

_LOG = logging.getLogger(__name__)
#: The PBS whose behaviour this server has; clients derive from it what they may ask for (spec 6.1).
VERSION: Final = "4.1"
RELEASE: Final = "1"
#: Requests at a time that walk through archives, each with a cache of chunks and a thread; further ones wait.
MAX_WALKS: Final = 8


class StoreProvider(Protocol):
    """The datastores that are served."""

    def names(self) -> Sequence[str]:
        """Their names, now; called in a worker thread."""
        ...

    def place(self, name: str) -> object:
        """What `name` means now: something else once it means another datastore; None if nothing has that name.

        Called in a worker thread.
        """
        ...

    def open(self, name: str) -> AbstractAsyncContextManager[LocalRepository]:
        """One of them, open while the block runs."""
        ...


@dataclass(slots=True)
class _Opened:
    place: object = None  #: what it was opened for
    repository: LocalRepository | None = None
    error: Exception | None = None
    ready: trio.Event = field(default_factory=trio.Event)
    reads: int = 0
    writes: int = 0


class StorePool:
    """Datastores, each opened at its first use and closed when the server ends.

    A name that means another one by now is opened anew; the old one stays open for those who use it.
    """

    def __init__(self, provider: StoreProvider) -> None:
        self._provider = provider
        self._opened: dict[str, _Opened] = {}
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Stores can be used while the block runs."""
        async with open_nursery() as nursery:
            self._nursery = nursery
            try:
                yield
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()

    async def names(self) -> list[str]:
        """The names of all stores."""
        return sorted(await in_io_thread(self._provider.names))

    async def get(self, name: str) -> LocalRepository:
        """The store `name`.

        Raises:
            ApiError: there is none.
            FleeceError: it cannot be opened; the next call tries again.
        """
        place = await in_io_thread(self._provider.place, name)
        if place is None:
            raise ApiError(f"no such datastore '{name}'")
        opened = self._opened.get(name)
        if opened is None or opened.place != place:
            if self._nursery is None:
                raise ApiError("the server is going down")
            opened = self._opened[name] = _Opened(place)
            self._nursery.start_soon(self._hold, name, opened)
        await opened.ready.wait()
        if opened.repository is None:
            assert opened.error is not None
            raise opened.error
        return opened.repository

    async def _hold(self, name: str, opened: _Opened) -> None:
        try:
            async with self._provider.open(name) as repository:
                opened.repository = repository
                opened.ready.set()
                await trio.sleep_forever()
        except FleeceError as error:
            opened.error = error
        except Exception as error:  # one store must not end the others
            _LOG.exception("datastore '%s' failed unexpectedly", name)
            opened.error = ApiError(f"internal error ({type(error).__name__})")
        finally:
            if self._opened.get(name) is opened:
                del self._opened[name]
            if opened.error is None and opened.repository is None:
                opened.error = ApiError("the server is going down")
            opened.ready.set()

    @asynccontextmanager
    async def session(self, name: str, *, writes: bool) -> AsyncIterator[None]:
        """Counts a session on the store while the block runs."""
        opened = self._opened.get(name) or _Opened()
        if writes:
            opened.writes += 1
        else:
            opened.reads += 1
        try:
            yield
        finally:
            if writes:
                opened.writes -= 1
            else:
                opened.reads -= 1

    def operations(self, name: str) -> dict[str, int]:
        """Sessions that are open on the store."""
        opened = self._opened.get(name) or _Opened()
        return {"read": opened.reads, "write": opened.writes}


class ServerState:
    """Everything that requests have in common."""

    def __init__(self, folder: Path, stores: StoreProvider, remotes: Remotes | None = None) -> None:
        """`folder`: of the server's own files, made if it is missing; `remotes`: None: there are none."""
        self.folder: Final = folder
        self.remotes: Final = NoRemotes() if remotes is None else remotes
        self.access: Final = AccessStore(folder)
        self.tickets: Final = Tickets(folder)
        self.tasks: Final = Tasks(folder / "tasks")
        self.stores: Final = StorePool(stores)
        self.walks: Final = trio.CapacityLimiter(MAX_WALKS)
        self.verify_new: frozenset[str] = frozenset()  #: datastores in which new snapshots are verified at once
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Requests can be answered while the block runs."""
        async with self.stores.running(), self.tasks.running(), open_nursery() as nursery:
            self._nursery = nursery
            try:
                yield
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()

    async def background(self, work: Callable[..., Awaitable[None]]) -> None:
        """Start `work`, which outlives the request that starts it, and wait for its `task_status.started()`.

        Raises:
            ApiError: the server is going down.
            Exception: what `work` raises before it has started; what it raises later ends the server.
        """
        if self._nursery is None:
            raise ApiError("the server is going down")
        await self._nursery.start(work)

    # Rights.

    def privileges(self, caller: AuthId, path: Iterable[str]) -> Privilege:
        """What the caller may do at a path."""
        return self.access.tree().privileges(caller, path)

    def on(self, caller: AuthId, store: str, ns: Namespace = Namespace()) -> Privilege:  # noqa: B008 - immutable
        """What the caller may do in a namespace."""
        return self.privileges(caller, ("datastore", store, *ns.components))

    def full_or_own(self, caller: AuthId, store: str, ns: Namespace, *, full: Privilege = NONE, own: Privilege) -> bool:
        """True if the caller may act on every group, False: on its own ones (spec 5.4).

        Raises:
            ApiError: on none.
        """
        has = self.on(caller, store, ns)
        if has & full:
            return True
        if has & own:
            return False
        where = "/".join(("/datastore", store, *ns.components))
        missing = "|".join(name for one, name in NAMES.items() if one & (full | own))
        raise ApiError(f"permission check failed - missing {missing} on {where}", 403)

    async def check_owner(self, caller: AuthId, repository: LocalRepository, group: Group) -> str:
        """The owner of the group, who the caller is or whose user it is.

        Raises:
            ApiError: it is somebody else's, or has no owner.
        """
        owner = await in_io_thread(repository.store.group_owner, group)
        if owner is None:
            path = repository.store.base / group.path / "owner"
            raise ApiError(f'unable to read "{path}" - No such file or directory (os error 2)')
        if not caller.owns(owner):
            raise ApiError(f"backup owner check failed ({caller} != {owner})")
        return owner


def namespace(text: str) -> Namespace:
    """The namespace of a checked parameter.

    Raises:
        ApiError: too many levels.
    """
    try:
        return Namespace.parse(text)
    except FleeceError as error:
        raise ApiError(f"parameter verification failed - 'ns': {getattr(error, 'why', error)}") from None


def group(values: dict[str, object]) -> Group:
    """The group that checked parameters mean."""
    return Group.parse(f"{values['backup-type']}/{values['backup-id']}", namespace(str(values["ns"])))


def snapshot(values: dict[str, object]) -> Snapshot:
    """The snapshot that checked parameters mean."""
    ctime = values["backup-time"]
    assert isinstance(ctime, int)
    return group(values).at(ctime)
