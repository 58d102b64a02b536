"""`sync`: everything of a source that is meant, brought into a target.

A sync needs no memory of its own: what is at the target tells what is left to do. So one that was interrupted is
resumed by running it again, and chunks that arrived are found there as long as no garbage collection took them.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import trio

from core.errors import FleeceError, FormatError, UsageError
from core.nursery import open_nursery
from core.progress import Progress
from datastore.errors import SnapshotNotFoundError
from datastore.filters import passes
from datastore.names import Group, Namespace, Snapshot
from repository.interface import GroupInfo, Repository, SnapshotInfo
from repository.remote.errors import RemoteCertificateError, RemoteLoginError
from repository.sync.again import look_again
from repository.sync.interface import ActsAs, HasVersion
from repository.sync.options import Direction, SyncOptions
from repository.sync.plan import (
    choose,
    ensure_namespace,
    mapped,
    mapped_group,
    passes_by_manifest,
    source_namespaces,
    tell_skipped,
)
from repository.sync.removal import Remover
from repository.sync.report import SnapshotReport, SyncReport, group_text, ns_text, snapshot_text
from repository.sync.transfer import Source, SyncContext, load_source, send_snapshot

#: First version of servers that know namespaces.
_NAMESPACES: Final = (2, 2, 0)
#: First version that tells what it removed.
_STATISTICS: Final = (3, 2, 11)
#: With these no other group could fare better.
_HOPELESS: Final = (RemoteLoginError, RemoteCertificateError)


class _Work(Enum):
    """What is to be done about a snapshot."""

    NEW = "new"
    AGAIN = "again"
    CORRUPT = "corrupt"


@dataclass(frozen=True, slots=True)
class _Listed:
    """What was found of one namespace, for the removal at the end."""

    source: Sequence[GroupInfo]
    target: Sequence[GroupInfo]


@dataclass(slots=True)
class _Run:
    """One sync."""

    source: Repository
    target: Repository
    context: SyncContext
    report: SyncReport
    listed: list[_Listed] = field(default_factory=list)
    told: set[str] = field(default_factory=set)  #: warnings of sessions, which repeat themselves

    async def everything(self) -> None:
        options, progress = self.context.options, self.context.progress
        version: tuple[int, ...] | None = None
        if isinstance(self.target, HasVersion):
            version = await self.target.version()
            if version < _NAMESPACES:
                shown = ".".join(map(str, version))
                raise FleeceError("push to", self.target.name, f"its version {shown} is older than 2.2.0")
        found = await source_namespaces(self.source, options)
        there = set(await self.target.namespaces())
        if found.problem:
            self._fail(ns_text(options.source_ns), found.problem)
        doubt = "not all of the source could be listed" if found.problem else ""
        if found.hidden:
            doubt = "a namespace of the source is hidden"
        for ns in found.found:
            target_ns = mapped(ns, options)
            progress.log(f"syncing {self.source.name}, {ns_text(ns)}, into {self.target.name}, {ns_text(target_ns)}")
            listing = False
            try:
                if not options.rights.writes(target_ns):
                    raise FleeceError("write into", ns_text(target_ns), "there is no right to")
                await ensure_namespace(self.target, target_ns, there, options, self._created)
                listing = True
                groups = await self.source.groups(ns)
                listing = False
                await self._namespace(ns, target_ns, groups)
            except _HOPELESS:
                raise
            except FleeceError as error:
                if listing:
                    doubt = "not all of the source could be listed"
                self._fail(ns_text(target_ns), str(error))
            else:
                self.report.namespaces += 1
        if options.remove_vanished:
            await self._remove(there, [mapped(ns, options) for ns in found.found], doubt)
            if version is not None and version < _STATISTICS:
                progress.log(f"{self.target.name} is too old to tell what it removed: the figures come from its lists")

    def _created(self, ns: Namespace) -> None:
        self.report.created.append(ns)
        self.context.progress.log(f"created namespace {ns} in {self.target.name}")

    def _fail(self, what: str, why: str) -> None:
        self.report.failed[what] = why
        self.context.progress.warn(f"{what}: {why}")

    async def _remove(self, there: set[Namespace], present: list[Namespace], doubt: str) -> None:
        """Remove vanished groups and namespaces, unless the source may not have been seen as it is."""
        options, progress = self.context.options, self.context.progress
        if not doubt and not any(listed.source for listed in self.listed):
            doubt = "the source holds no group"
        if doubt and not options.remove_anyway:
            progress.warn(f"vanished groups and namespaces stay: {doubt}; --remove-anyway removes them all the same")
            return
        remover = Remover(self.target, self.context, self.report)
        for listed in self.listed:
            await remover.groups(listed.target, {(info.group.type.value, info.group.id) for info in listed.source})
        await remover.namespaces(there, present)

    async def _namespace(self, ns: Namespace, target_ns: Namespace, groups: list[GroupInfo]) -> None:
        options, progress = self.context.options, self.context.progress
        visible = [info for info in groups if options.rights.reads_group(ns, info.owner)]
        chosen = [info for info in visible if passes(options.filters, info.group)]
        progress.log(f"found {len(chosen)} groups to sync (out of {len(visible)})")
        there = await self.target.groups(target_ns)
        self.listed.append(_Listed(groups, there))
        owners = {(info.group.type.value, info.group.id): info.owner for info in there}
        waiting = iter(chosen)

        async def work() -> None:
            for info in waiting:
                await self._one_group(info.group, mapped_group(info.group, target_ns), owners)
                task.advance(1)

        with progress.task(f"groups of {ns_text(ns)}", len(chosen), "groups") as task:
            async with open_nursery() as nursery:
                for _ in range(min(options.parallel, len(chosen))):
                    nursery.start_soon(work)

    async def _one_group(self, group: Group, target: Group, owners: dict[tuple[str, str], str | None]) -> None:
        key = (group.type.value, group.id)
        if key in owners and owners[key] != self.context.owner:
            self._left_out(target, owners[key])
            return
        try:
            foreign = await self._group(group, target)
        except _HOPELESS:
            raise
        except FleeceError as error:
            self._fail(group_text(target), str(error))
        else:
            if foreign is None:
                self.report.groups += 1
            else:
                self._left_out(target, foreign)

    def _left_out(self, target: Group, owner: str | None) -> None:
        """Tell of a group that is not ours."""
        what = f"it belongs to {owner or 'nobody'} at the target, not to {self.context.owner}"
        if self.context.options.direction is Direction.PUSH:
            self.context.progress.warn(f"{group_text(target)} is left out: {what}")
        else:
            self._fail(group_text(target), what)

    async def _group(self, group: Group, target: Group) -> str | None:
        """Sync a group, unless somebody else owns it at the target by now, who is returned."""
        options, progress = self.context.options, self.context.progress
        infos = await self.source.snapshots(group.ns, group, unfinished=True)
        if not infos:
            progress.log(f"{group_text(group)} has no snapshot")
        there = await self._there(target)
        # The groups were listed before others were synced, which takes hours, or as long as a hostile source likes.
        if foreign := next((info.owner for info in there if info.owner not in (None, self.context.owner)), None):
            return foreign
        choice = choose(infos, there, options)
        tell_skipped(choice, progress)
        self.report.skipped += len(choice.old) + len(choice.beyond_last)
        by_time = {info.snapshot.ctime: info for info in there}
        work = [(info, _Work.NEW) for info in choice.new]
        work += [(info, _Work.AGAIN) for info in choice.again]
        work += [(info, _Work.CORRUPT) for info in choice.corrupt]
        work.sort(key=lambda one: one[0].snapshot.ctime)
        for number, (info, kind) in enumerate(work, 1):
            ctime = info.snapshot.ctime
            await self._snapshot(info.snapshot, target.at(ctime), by_time.get(ctime), kind)
            percent = f"{100 * number / len(work):.2f}%"
            progress.log(f"{group_text(target)}: {percent} ({number}/{len(work)} snapshots)")
        if options.remove_vanished:
            await Remover(self.target, self.context, self.report).snapshots(infos, there)
        return None

    async def _there(self, group: Group) -> list[SnapshotInfo]:
        try:
            return await self.target.snapshots(group.ns, group, unfinished=True)
        except SnapshotNotFoundError:
            return []  # the group is new

    async def _snapshot(self, snapshot: Snapshot, target: Snapshot, there: SnapshotInfo | None, kind: _Work) -> None:
        """Sync one snapshot; one that vanished at the source meanwhile is passed over.

        Raises:
            FleeceError: it failed, and with it its group.
        """
        progress = self.context.progress
        begun = trio.current_time()
        async with AsyncExitStack() as stack:
            try:
                reader = await stack.enter_async_context(self.source.reader(snapshot))
                source = await load_source(reader, snapshot)
            except SnapshotNotFoundError:
                progress.log(f"{snapshot_text(snapshot)} was removed meanwhile: passed over")
                return
            except FormatError as error:
                if self.context.options.direction is Direction.PULL:
                    raise
                progress.warn(f"{snapshot_text(snapshot)} is left out: {error}")
                return
            if not passes_by_manifest(source.manifest, self.context.options):
                progress.log(f"{snapshot_text(snapshot)} is left out: its manifest does not pass the filter")
                return
            if kind is _Work.NEW or there is None:
                report = await self._new(source, target, there)
            else:
                report = await look_again(source, self.target, there, self.context, corrupt=kind is _Work.CORRUPT)
        if report is None:
            progress.log(f"{snapshot_text(target)}: nothing new")
            return
        report.duration_s = trio.current_time() - begun
        self.report.snapshots.append(report)
        progress.log(f"synced {snapshot_text(target)} ({report.outcome.value})")

    async def _new(self, source: Source, target: Snapshot, there: SnapshotInfo | None) -> SnapshotReport | None:
        """Write a snapshot that the target does not have; None if somebody else did meanwhile, or it cannot be.

        `there` is an unfinished one of that time, which PBS refuses to replace until its prune has removed it.
        """
        opened = False
        try:
            async with self.target.backup(target, owner=self.context.owner) as session:
                opened = True
                if getattr(session, "foreign", False):
                    raise FleeceError("write into", group_text(target.group), "it belongs to somebody else by now")
                report = await send_snapshot(source, session, self.context)
                await session.finish()
                warnings = list(session.warnings)
        except FleeceError as error:
            if opened:
                raise
            if await self._is_there(target):
                return None
            if there is None or self.context.options.direction is Direction.PULL:
                raise
            why = f"an unfinished one of that time is in its way at the target, which refuses it: {error}"
            self.context.progress.warn(f"{snapshot_text(target)} is left out: {why}")
            return None
        for warning in warnings:
            if warning not in self.told:
                self.told.add(warning)
                self.context.progress.warn(f"{snapshot_text(target)}: {warning}")
        return report

    async def _is_there(self, snapshot: Snapshot) -> bool:
        try:
            return (await self.target.snapshot(snapshot)).finished
        except FleeceError:
            return False


async def sync(source: Repository, target: Repository, options: SyncOptions, progress: Progress) -> SyncReport:
    """Bring snapshots from `source` to `target`; chunks and blobs as they are stored.

    What goes wrong with one group or namespace does not keep the others from being synced: it is in the report's
    `failed`. Cancelled, the snapshot under way is not listed, and everything before it is whole.

    Raises:
        UsageError: options that make no sense, or both sides are the same datastore.
        SnapshotNotFoundError: the namespace of the source is not there.
        FleeceError: a side cannot be reached or listed at all; nothing was done.
    """
    options.check()
    if await _same(source, target):
        raise UsageError("sync", source.name, f"{target.name} is the same datastore", "name another one")
    owner = target.auth_id if isinstance(target, ActsAs) else options.owner
    run = _Run(source, target, SyncContext(options, owner, progress), SyncReport(source.name, target.name))
    begun = trio.current_time()
    await run.everything()
    run.report.duration_s = trio.current_time() - begun
    return run.report


async def _same(source: Repository, target: Repository) -> bool:
    if source is target:
        return True
    try:
        return await source.identity() == await target.identity()
    except FleeceError:
        return False  # a source that can only be read, and was never told from others
