"""Push and pull, started by hand or as a job (spec 6.11)."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from core.errors import FleeceError, UsageError
from core.limits import in_io_thread
from core.units import parse_size
from datastore.filters import GroupFilter
from repository.interface import Repository
from repository.sync import Direction, SyncOptions, sync
from repository.throttle import Throttle
from server.access.auth_ids import AuthId
from server.errors import ApiError
from server.remotes import RATES, no_remote
from server.routing import Call, Endpoint
from server.schema import (
    BOOL,
    IN_STORE,
    MAX_DEPTH,
    NAMESPACE,
    REMOTE,
    STORE,
    Array,
    Integer,
    Parameter,
    Schema,
    Text,
    optional,
    parameter_error,
)
from server.state import ServerState, namespace
from server.sync_rights import CallersRights, SyncSides, require, to_run
from server.tasks import Task

Values = Mapping[str, Any]


def sides_of(direction: Direction, values: Values) -> SyncSides:
    """The datastores that checked parameters mean.

    Raises:
        ApiError: both are the same one.
    """
    remote, far = values.get("remote"), str(values["remote-store"])
    if remote is None and far == values["store"]:
        raise ApiError("can't sync to same datastore")
    ns, there = namespace(values.get("ns") or ""), namespace(values.get("remote-ns") or "")
    return SyncSides(direction, values["store"], ns, remote, far, there)


def check_values(values: Values) -> None:
    """See to it that filters and rates can be understood.

    Raises:
        ApiError: one cannot; it names the parameter.
    """
    for text in values.get("group-filter") or ():
        _as_parameter("group-filter", lambda text=text: GroupFilter.parse(text))
    for name in RATES:
        if values.get(name) is not None:
            _as_parameter(name, lambda name=name: parse_size(values[name]))


def _as_parameter(name: str, parse: Any) -> None:
    try:
        parse()
    except UsageError as error:
        raise parameter_error([(name, error.why)]) from None


@dataclass(frozen=True, slots=True)
class Sync:
    """A sync that may be started."""

    state: ServerState
    sides: SyncSides
    options: SyncOptions
    rates: Mapping[str, str | None]
    told_at_end: bool = False  #: the closing lines go into the log, as those of jobs do

    async def work(self, task: Task) -> None:
        """Do it; what goes wrong with a group or namespace is told and fails it at the end."""
        sides, push = self.sides, self.sides.direction is Direction.PUSH
        near = await self.state.stores.get(sides.store)
        async with self.state.stores.session(sides.store, writes=not push), self._far() as far:
            source, target = (near, far) if push else (far, near)
            report = await sync(source, target, self.options, task)
        if self.told_at_end:
            for line in report.lines(removal=self.options.remove_vanished):
                task.log(line)
        if report.failed:
            raise ApiError("sync failed with some errors.")

    @asynccontextmanager
    async def _far(self) -> AsyncIterator[Repository]:
        sides = self.sides
        if sides.remote is None:
            repository = await self.state.stores.get(sides.remote_store)
            async with self.state.stores.session(sides.remote_store, writes=False):
                yield repository
            return
        async with self.state.remotes.open(sides.remote, sides.remote_store, self.rates) as remote:
            yield remote


async def prepared(
    state: ServerState, who: AuthId, sides: SyncSides, values: Values, *, told_at_end: bool = False
) -> Sync:
    """A sync with the rights of `who`, after the checks that need no network.

    Raises:
        ApiError: no such remote, store or source namespace; options that make no sense.
        FleeceError: the list of remotes or a store cannot be read.
    """
    push = sides.direction is Direction.PUSH
    if sides.remote is not None and sides.remote not in await in_io_thread(state.remotes.listed):
        raise no_remote(sides.remote)
    near = await state.stores.get(sides.store)
    if push and not await in_io_thread(near.store.namespace_exists, sides.ns):
        raise ApiError(f"Source namespace '{sides.ns}' doesn't exist in datastore '{sides.store}'!")
    if not push:
        near.store.check_writable()
    if sides.remote is None:
        await state.stores.get(sides.remote_store)
    rates = {name: values.get(name) for name in RATES}
    rate = None
    if sides.remote is None and (text := rates["rate-in"]) is not None and (number := parse_size(text)):
        rate = Throttle(number)
    options = SyncOptions(
        sides.direction,
        str(who),
        source_ns=sides.ns if push else sides.remote_ns,
        target_ns=sides.remote_ns if push else sides.ns,
        max_depth=values.get("max-depth"),
        filters=tuple(GroupFilter.parse(text) for text in values.get("group-filter") or ()),
        transfer_last=values.get("transfer-last"),
        encrypted_only=bool(values.get("encrypted-only")),
        verified_only=bool(values.get("verified-only")),
        resync_corrupt=bool(values.get("resync-corrupt")),
        remove_vanished=bool(values.get("remove-vanished")),
        parallel=values.get("worker-threads") or 1,
        rate=rate,
        rights=CallersRights(state, who, sides),
    )
    try:
        options.check()
    except FleeceError as error:
        raise ApiError(str(error)) from error
    return Sync(state, sides, options, rates, told_at_end)


async def _by_hand(call: Call, direction: Direction) -> object:
    state, caller, values = call.state, call.caller, call.values
    check_values(values)
    sides = sides_of(direction, values)
    require(state, caller, to_run(sides, remove_vanished=values["remove-vanished"]))
    ready = await prepared(state, caller, sides, values)
    return await state.tasks.start("sync", sides.store, str(caller), ready.work)


async def push(call: Call) -> object:
    """`POST /push`."""
    return await _by_hand(call, Direction.PUSH)


async def pull(call: Call) -> object:
    """`POST /pull`: what is synced belongs to the caller."""
    return await _by_hand(call, Direction.PULL)


_RATE: Final = Text(shortest=1, longest=64)
#: What push, pull and jobs of both have in common, apart from the remote.
OPTIONS: Final[Schema] = {
    **IN_STORE,
    "remote-store": Parameter(STORE),
    "remote-ns": optional(NAMESPACE),
    "remove-vanished": optional(BOOL, False),
    "max-depth": optional(MAX_DEPTH),
    "group-filter": optional(Array(Text(shortest=1, longest=1024))),
    "transfer-last": optional(Integer(1)),
    "encrypted-only": optional(BOOL, False),
    "verified-only": optional(BOOL, False),
    "worker-threads": optional(Integer(1, 32)),
    **dict.fromkeys(RATES, optional(_RATE)),
}
ENDPOINTS: Final = (
    Endpoint("POST", "/push", push, {**OPTIONS, "remote": Parameter(REMOTE)}),
    Endpoint("POST", "/pull", pull, {**OPTIONS, "remote": optional(REMOTE), "resync-corrupt": optional(BOOL, False)}),
)
