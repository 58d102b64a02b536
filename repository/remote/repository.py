"""A datastore on a server as a repository."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, Final

import trio

from core.buffers import Buffer
from core.errors import FleeceError, UsageError
from core.nursery import open_nursery
from core.progress import Progress
from datastore.blob import MAX_ENCODED_CHUNK, Blob
from datastore.changes import MAX_NOTES, NamespaceMove, NamespaceRemoval
from datastore.errors import LockedError, ProtectedError, SnapshotNotFoundError
from datastore.filters import GroupFilter
from datastore.gc import DEFAULT_CUTOFF_S, LOCK_WAIT_S, GcReport
from datastore.names import CLIENT_LOG_NAME, ROOT, Group, Namespace, Snapshot
from datastore.prune import KeepOptions, PruneResult
from datastore.usage_history import UsageSample
from repository.interface import GroupInfo, SnapshotInfo, StoreUsage
from repository.remote import upkeep
from repository.remote.connection import RemoteServer
from repository.remote.errors import RemoteAnswerError, RemoteRefusedError, precise
from repository.remote.listing import (
    group_parameters,
    parse_groups,
    parse_namespaces,
    parse_snapshots,
    snapshot_parameters,
)
from repository.remote.looking import listed
from repository.remote.reader import RemoteReader, open_reader
from repository.remote.rest import Parameters
from repository.remote.session import RemoteBackupSession, open_backup
from repository.verify import VerifyOptions, VerifyResult

#: First version that tells what it removed, and that can leave protected snapshots out without an error.
_DELETE_STATISTICS: Final = (3, 2, 11)
#: First version of servers that know namespaces.
_NAMESPACES: Final = (2, 2, 0)
#: Notes that are asked for at a time.
_AT_ONCE: Final = 8
_VERSION_PART: Final = re.compile(r"[0-9]{1,5}")


class RemoteRepository:
    """See `repository.interface.Repository`."""

    def __init__(self, server: RemoteServer, name: str) -> None:
        self.server: Final = server
        self._name = name
        self._version: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """See `Repository.name`."""
        return self._name

    @property
    def auth_id(self) -> str:
        """Who is logged in: new groups belong to them."""
        return self.server.address.auth_id

    async def identity(self) -> str:
        """See `Repository.identity`: host, port and datastore, since servers tell no UUID."""
        address = self.server.address
        return f"{address.server.lower()}:{address.store}"

    async def version(self) -> tuple[int, ...]:
        """The server's version, `(4, 1, 1)`; asked for once.

        Raises:
            RemoteError: as `RemoteServer.call`.
        """
        if self._version is None:
            data = await self.server.call("GET", "//version", what="ask for the version of")
            parts = [data.get("version"), data.get("release")] if isinstance(data, dict) else []
            numbers = ".".join(part for part in parts if isinstance(part, str)).split(".")
            if not 2 <= len(numbers) <= 5 or not all(
                one.isascii() and one.isdigit() and len(one) < 6 for one in numbers
            ):
                raise RemoteAnswerError("ask for the version of", self._name, "the answer is no version")
            self._version = tuple(map(int, numbers))
        return self._version

    # --- lists -------------------------------------------------------------------------------------------------------

    async def namespaces(self, parent: Namespace = ROOT, *, depth: int | None = None) -> list[Namespace]:
        """See `Repository.namespaces`: those that the user may see."""
        parameters = {"parent": str(parent) if parent.components else None, "max-depth": depth}
        data = await self._call("GET", "/namespace", parameters, "list the namespaces of", str(parent))
        found = [
            ns
            for ns in parse_namespaces(data, self._name)
            if ns.components[: len(parent.components)] == parent.components
        ]
        if parent.components and found == [parent]:
            # Servers list a missing parent too.
            await self._call("GET", "/groups", {"ns": str(parent)}, "list the namespaces of", str(parent))
        return found

    async def groups(self, ns: Namespace = ROOT) -> list[GroupInfo]:
        """See `Repository.groups`."""
        data = await self._call("GET", "/groups", self._of_groups(ns), "list the groups of", self._where(ns))
        infos = parse_groups(data, ns, self._name)
        slots = trio.Semaphore(_AT_ONCE)

        async def complete(number: int) -> None:
            async with slots:
                infos[number] = replace(infos[number], comment=await self._group_notes(infos[number].group))

        async with open_nursery() as nursery:
            for number, info in enumerate(infos):
                # A line end behind the comment means that there may be more of it; nothing but the notes tell.
                if info.comment.endswith("\n"):
                    nursery.start_soon(complete, number)
        return infos

    async def _group_notes(self, group: Group) -> str:
        data = await self._call("GET", "/group-notes", group_parameters(group), "read the notes of", str(group))
        return data if isinstance(data, str) else ""

    async def snapshots(
        self, ns: Namespace = ROOT, group: Group | None = None, *, unfinished: bool = False
    ) -> list[SnapshotInfo]:
        """See `Repository.snapshots`; of notes, servers list the first line."""
        parameters: Parameters = {"ns": str(ns) if ns.components else None}
        if group is not None:
            parameters = group_parameters(group)
        where = self._where(ns) if group is None else str(group)
        data = await self._call("GET", "/snapshots", parameters, "list the snapshots of", where)
        infos = parse_snapshots(data, ns, self._name)
        if group is not None:
            infos = [info for info in infos if info.snapshot.group == group]
        return [info for info in infos if unfinished or info.finished]

    async def snapshot(self, snapshot: Snapshot) -> SnapshotInfo:
        """See `Repository.snapshot`."""
        info = await self._look("find", snapshot)
        if info.comment:
            notes = await self._call("GET", "/notes", snapshot_parameters(snapshot), "read the notes of", str(snapshot))
            info = replace(info, comment=notes if isinstance(notes, str) else "")
        return info

    async def latest(self, group: Group) -> Snapshot | None:
        """See `Repository.latest`."""
        infos = await self.snapshots(group.ns, group)
        return infos[-1].snapshot if infos else None

    # --- changes -----------------------------------------------------------------------------------------------------

    async def forget(self, snapshot: Snapshot) -> None:
        """See `Repository.forget`."""
        try:
            await self._call("DELETE", "/snapshots", snapshot_parameters(snapshot), "remove", str(snapshot))
        except (RemoteRefusedError, LockedError, ProtectedError):
            info = await self._look("remove", snapshot)
            if info.protected:
                raise ProtectedError(
                    "remove", str(snapshot), "it is protected", f"'fleece unprotect {snapshot}' allows it"
                ) from None
            raise

    async def forget_group(self, group: Group) -> list[Snapshot]:
        """See `Repository.forget_group`."""
        parameters: Parameters = group_parameters(group)
        if await self.version() >= _DELETE_STATISTICS:
            parameters = {**parameters, **self._of_groups(group.ns), "error-on-protected": False}
            if _nothing_kept(await self._call("DELETE", "/groups", parameters, "remove the group", str(group))):
                return []
        else:
            with suppress(ProtectedError):  # those are what is returned
                await self._call("DELETE", "/groups", parameters, "remove the group", str(group))
        return [info.snapshot for info in await self.snapshots(group.ns, group, unfinished=True)]

    async def prune(
        self, group: Group, keep: KeepOptions, *, dry_run: bool = False, progress: Progress | None = None
    ) -> PruneResult:
        """See `Repository.prune`: the server decides, by its clock and time zone."""
        return await upkeep.prune(self, group, keep, dry_run=dry_run, progress=progress or Progress())

    async def set_notes(self, target: Snapshot | Group, text: str) -> None:
        """See `Repository.set_notes`."""
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise UsageError("set the notes of", str(target), "they are no Unicode") from None
        if size > MAX_NOTES:
            raise UsageError(
                "set the notes of", str(target), f"they have {size} bytes, at most {MAX_NOTES} are possible"
            )
        is_group = isinstance(target, Group)
        named = group_parameters(target) if isinstance(target, Group) else snapshot_parameters(target)
        path = "/group-notes" if is_group else "/notes"
        await self._changing(
            target, lambda: self._call("PUT", path, {**named, "notes": text}, "set the notes of", str(target))
        )

    async def set_protected(self, snapshot: Snapshot, *, protected: bool) -> bool:
        """See `Repository.set_protected`."""
        info = await self._look("protect" if protected else "unprotect", snapshot)
        if info.protected == protected:
            return False
        parameters = {**snapshot_parameters(snapshot), "protected": protected}
        await self._changing(
            snapshot,
            lambda: self._call("PUT", "/protected", parameters, "change the protection of", str(snapshot)),
        )
        return True

    async def set_owner(self, group: Group, owner: str) -> None:
        """See `Repository.set_owner`."""
        parameters = {**group_parameters(group), "new-owner": owner}
        await self._changing(
            group, lambda: self._call("POST", "/change-owner", parameters, "change the owner of", str(group))
        )

    async def create_namespace(self, ns: Namespace, *, known: Collection[Namespace] | None = None) -> bool:
        """See `Repository.create_namespace`: level by level, since servers make one at a time."""
        if not ns.components:
            raise UsageError("create", "the root namespace", "it is always there")
        there = await self.namespaces() if known is None else known
        if ns in there:
            return False
        for depth in range(1, len(ns.components) + 1):
            one, parent = Namespace(ns.components[:depth]), Namespace(ns.components[: depth - 1])
            if one not in there:
                parameters = {"name": one.components[-1], "parent": str(parent) if parent.components else None}
                await self._call("POST", "/namespace", parameters, "create the namespace", str(one))
        return True

    async def delete_namespace(self, ns: Namespace, *, groups: bool = False) -> NamespaceRemoval:
        """See `Repository.delete_namespace`."""
        if not ns.components:
            raise UsageError("delete", "the root namespace", "it cannot be removed")
        before = await self.namespaces(ns)
        held = [] if groups else [info.group for one in before for info in await self.groups(one)]
        if held:
            shown = ", ".join(f"{group.ns}: {group}" for group in held[:3]) + (", ..." if len(held) > 3 else "")
            raise FleeceError(
                "delete the namespace", str(ns), f"it holds {len(held)} groups ({shown})",
                "--delete-groups removes them and all their snapshots",
            )  # fmt: skip
        parameters: Parameters = {"ns": str(ns), "delete-groups": groups}
        if await self.version() >= _DELETE_STATISTICS:
            parameters = {**parameters, "error-on-protected": False}
        answer = await self._call("DELETE", "/namespace", parameters, "delete the namespace", str(ns))
        after = set() if groups and _nothing_kept(answer) else set(await self.namespaces()).intersection(before)
        result = NamespaceRemoval()
        for one in sorted(before, key=lambda one: len(one.components), reverse=True):
            (result.kept if one in after else result.removed).append(one)
            if one in after:
                result.protected += [info.snapshot for info in await self.snapshots(one) if info.protected]
        return result

    async def move_namespace(self, source: Namespace, target: Namespace) -> NamespaceMove:
        """See `Repository.move_namespace`: servers cannot."""
        await self.namespaces(source)
        raise UsageError("move the namespace", str(source), "a server cannot do this, only a datastore of this host")

    # --- the whole ---------------------------------------------------------------------------------------------------

    async def usage(self) -> StoreUsage:
        """See `Repository.usage`."""
        data = await self._call("GET", "/status", {}, "ask for the space of", self._name)
        numbers = [data.get(name) if isinstance(data, dict) else None for name in ("total", "used", "avail")]
        total, used, available = (upkeep.number(value, self._name) for value in numbers)
        return StoreUsage(total, used, available)

    async def collect_garbage(
        self,
        *,
        cutoff_s: int = DEFAULT_CUTOFF_S,
        lock_wait_s: float = LOCK_WAIT_S,
        dry_run: bool = False,
        allow_empty: bool = False,
        progress: Progress | None = None,
    ) -> GcReport:
        """See `Repository.collect_garbage`: a task of the server, followed to its end.

        Raises:
            UsageError: an option that a server does not take.
        """
        for option, given in (("--dry-run", dry_run), ("--cutoff", cutoff_s != DEFAULT_CUTOFF_S)):
            if given:
                raise UsageError("collect garbage with", option, "a server decides that itself", "leave the option out")
        return await upkeep.collect_garbage(self, progress or Progress())

    async def gc_status(self) -> dict[str, Any] | None:
        """See `Repository.gc_status`."""
        data = await self._call("GET", "/gc", {}, "ask for the last garbage collection of", self._name)
        return data if isinstance(data, dict) and data.get("upid") else None

    async def usage_history(self) -> list[UsageSample]:
        """See `Repository.usage_history`: servers do not tell."""
        return []

    async def verify_there(
        self,
        selection: Namespace | Group | Snapshot,
        options: VerifyOptions,
        progress: Progress,
        *,
        depth: int | None = None,
        filters: tuple[GroupFilter, ...] = (),
    ) -> list[VerifyResult]:
        """See `ServerVerify.verify_there`."""
        return await upkeep.verify(self, selection, options, progress, depth=depth, filters=filters)

    async def upload_log(self, snapshot: Snapshot, blob: Blob | Buffer) -> None:
        """See `Repository.upload_log`."""
        where = f"{snapshot}/{CLIENT_LOG_NAME}"
        parsed = blob if isinstance(blob, Blob) else Blob.parse(blob, where=where)
        if len(parsed) > MAX_ENCODED_CHUNK:
            raise UsageError("store the log", where, f"{len(parsed)} bytes; at most {MAX_ENCODED_CHUNK} are possible")
        parameters = snapshot_parameters(snapshot)
        what = "store the log"
        try:
            await self.server.call("POST", "/upload-backup-log", parameters, what=what, where=where, body=bytes(parsed))
        except RemoteRefusedError as error:
            raise precise(error) from error

    # --- snapshots ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def backup(self, snapshot: Snapshot, *, owner: str | None = None) -> AsyncIterator[RemoteBackupSession]:
        """See `Repository.backup`. A new group belongs to who is logged in, whatever `owner` says."""
        opened = False
        try:
            async with open_backup(self.server, snapshot) as session:
                opened = True
                yield session
        except RemoteRefusedError as error:
            if opened:
                raise
            raise await self._why_no_backup(snapshot, error) from error

    async def _why_no_backup(self, snapshot: Snapshot, error: RemoteRefusedError) -> FleeceError:
        """A refused backup in the words of a local datastore."""
        found = precise(error)
        if type(found) is not type(error) or error.status in (401, 403):
            return found
        try:
            newest = await self.latest(snapshot.group)
        except FleeceError:
            return error
        if newest is not None and newest.ctime >= snapshot.ctime:
            why = f"its time is not after that of the newest snapshot, {newest.time}"
            return UsageError("write", str(snapshot), why, "check the clock")
        return error

    @asynccontextmanager
    async def reader(self, snapshot: Snapshot) -> AsyncIterator[RemoteReader]:
        """See `Repository.reader`."""
        async with open_reader(self.server, snapshot) as reader:
            yield reader

    # --- helpers -----------------------------------------------------------------------------------------------------

    async def _call(self, method: str, path: str, parameters: Parameters, what: str, where: str) -> Any:
        try:
            return await self.server.call(method, path, parameters, what=what, where=where)
        except RemoteRefusedError as error:
            raise precise(error) from error

    async def _look(self, what: str, snapshot: Snapshot) -> SnapshotInfo:
        """The snapshot as listed, finished or not.

        Raises:
            SnapshotNotFoundError: not there.
        """
        try:
            info = await listed(self.server, snapshot)
        except RemoteRefusedError as error:
            raise precise(error) from error
        if info is None:
            hint = f"'fleece list {snapshot.group}' shows what there is"
            raise SnapshotNotFoundError(what, str(snapshot), "there is no such snapshot", hint)
        return info

    async def _changing(self, target: Snapshot | Group, change: Callable[[], Awaitable[Any]]) -> None:
        """Do `change`; if the server refuses, find out whether `target` is there at all."""
        try:
            await change()
        except (RemoteRefusedError, LockedError):
            if isinstance(target, Snapshot):
                await self._look("change", target)
            elif all(info.group != target for info in await self.groups(target.ns)):
                raise SnapshotNotFoundError("change", str(target), "there is no such group") from None
            raise

    def _of_groups(self, ns: Namespace) -> dict[str, str]:
        """How calls about groups name a namespace: as PBS does, the root too, but not to servers that may know none."""
        named = ns.components or (self._version is not None and self._version >= _NAMESPACES)
        return {"ns": str(ns)} if named else {}

    def _where(self, ns: Namespace) -> str:
        return f"{self._name}, namespace {ns}" if ns.components else self._name


def _nothing_kept(statistics: object) -> bool:
    """True if what a server says of a removal names no protected snapshot; older ones say nothing."""
    return isinstance(statistics, dict) and statistics.get("protected-snapshots") == 0
