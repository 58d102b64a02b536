"""What vanished at the source goes at the target, if nothing speaks against it.

The guards: nothing goes when the source looks empty, when a listing of it failed, or when something of it is hidden;
only what belongs to who syncs and passes the group filter; never the anchor, nothing outside of it or deeper than the
sync reaches; nothing that is protected or being written; nothing of a group or namespace whose sync failed. A snapshot
is compared with all that the source has, whatever the flags say of it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from core.errors import FleeceError
from datastore.errors import ProtectedError, SnapshotNotFoundError
from datastore.filters import passes
from datastore.names import Group, Namespace
from repository.interface import GroupInfo, Repository, SnapshotInfo
from repository.sync.options import Direction
from repository.sync.plan import is_within_target
from repository.sync.report import SyncReport, group_text, snapshot_text
from repository.sync.transfer import SyncContext


@dataclass(slots=True)
class Remover:
    """Removes at the target; `report` gets what went, and failures."""

    target: Repository
    context: SyncContext
    report: SyncReport

    async def snapshots(self, source: Sequence[SnapshotInfo], target: Sequence[SnapshotInfo]) -> None:
        """Remove the snapshots of a group that the source does not have. What cannot be removed is told."""
        progress = self.context.progress
        known = {info.snapshot.ctime for info in source}
        vanished = [info for info in target if info.finished and info.snapshot.ctime not in known]
        if not vanished:
            return
        group = vanished[0].snapshot.group
        if not self.context.options.rights.prunes(group.ns):
            progress.warn(
                f"{group_text(group)}: {len(vanished)} vanished snapshots stay, there is no right to remove them"
            )
            return
        if not source and not self.context.options.remove_anyway:
            why = "the source has no snapshot of the group any more; --remove-anyway removes them"
            progress.warn(f"{group_text(group)}: {len(vanished)} snapshots stay, for {why}")
            return
        for info in vanished:
            if info.protected:
                self._keep(info)
                continue
            try:
                await self.target.forget(info.snapshot)
            except SnapshotNotFoundError:
                continue  # somebody else was quicker
            except ProtectedError:
                self._keep(info)
            except FleeceError as error:
                progress.warn(f"vanished snapshot {snapshot_text(info.snapshot)} stays: {error.why}")
            else:
                progress.log(f"removed vanished snapshot {snapshot_text(info.snapshot)}")
                self.report.removed_snapshots += 1

    def _keep(self, info: SnapshotInfo) -> None:
        self.context.progress.log(f"kept vanished snapshot {snapshot_text(info.snapshot)}: it is protected")
        self.report.protected.append(info.snapshot)

    async def groups(self, target: Sequence[GroupInfo], present: Collection[tuple[str, str]]) -> None:
        """Remove the groups of a namespace that the source does not have; `present` are type and id of those it has."""
        options, progress = self.context.options, self.context.progress
        vanished = [
            info
            for info in target
            if (info.group.type.value, info.group.id) not in present
            and passes(options.filters, info.group)
            and self._owns(info.owner)
        ]
        if vanished and not options.rights.prunes(vanished[0].group.ns):
            ns = vanished[0].group.ns
            progress.warn(f"{len(vanished)} vanished groups of {ns} stay, there is no right to remove them")
            return
        for info in vanished:
            try:
                await self._group(info.group)
            except SnapshotNotFoundError:
                continue  # somebody else was quicker
            except FleeceError as error:
                progress.warn(f"vanished group {group_text(info.group)} stays: {error.why}")
                self.report.failed[group_text(info.group)] = f"it vanished, but cannot be removed: {error.why}"

    async def _group(self, group: Group) -> None:
        progress = self.context.progress
        before = await self.target.snapshots(group.ns, group, unfinished=True)
        # The groups were listed when the sync began: this one may have been removed since, and made by somebody else.
        if foreign := [info.owner for info in before if info.owner is not None and not self._owns(info.owner)]:
            progress.warn(f"vanished group {group_text(group)} stays: it belongs to {foreign[0]} by now")
            return
        kept = await self.target.forget_group(group)
        self.report.removed_snapshots += max(0, len(before) - len(kept))
        if kept:
            progress.warn(f"kept {len(kept)} protected snapshots of the vanished group {group_text(group)}")
            self.report.protected += kept
        else:
            progress.log(f"removed vanished group {group_text(group)}")
            self.report.removed_groups.append(group)

    def _owns(self, owner: str | None) -> bool:
        me = self.context.owner
        if owner == me:
            return True
        # Of a pull, what belongs to a token of the user counts as the user's.
        pull = self.context.options.direction is Direction.PULL
        return pull and owner is not None and "!" not in me and owner.startswith(f"{me}!")

    async def namespaces(self, there: Collection[Namespace], present: Collection[Namespace]) -> None:
        """Remove the namespaces of the target that the source does not have, children first.

        Args:
            there: those of the target, as of the beginning, and what was created.
            present: those that the source has, by their names at the target, whether or not they could be synced.
        """
        options, progress = self.context.options, self.context.progress
        above = {Namespace(ns.components[:length]) for ns in present for length in range(len(ns.components))}
        vanished = [
            ns
            for ns in there
            if ns != options.target_ns
            and ns.components
            and is_within_target(ns, options)
            and ns not in present
            and ns not in above
        ]
        stuck: set[Namespace] = set()
        for ns in sorted(vanished, key=lambda ns: (len(str(ns)), str(ns)), reverse=True):  # a child has the longer name
            if not options.rights.modifies(ns):
                stuck.add(ns)
                progress.warn(f"vanished namespace {ns} stays, there is no right to remove it")
                continue
            try:
                await self._namespace(ns, stuck)
            except SnapshotNotFoundError:
                continue  # somebody else was quicker
            except FleeceError as error:
                stuck.add(ns)
                progress.warn(f"vanished namespace {ns} stays: {error.why}")

    async def _namespace(self, ns: Namespace, stuck: set[Namespace]) -> None:
        progress, options = self.context.progress, self.context.options
        below = await self.target.namespaces(ns)
        held = [info for one in below for info in await self.target.groups(one)]
        reason = ""
        if deep := [one for one in below if not is_within_target(one, options)]:
            reason = f"namespace {deep[0]} in it is deeper than --max-depth reaches"
        elif stuck.intersection(below):
            reason = "a namespace in it stays"
        elif foreign := [i.group for i in held if not self._owns(i.owner) or not passes(options.filters, i.group)]:
            reason = f"it holds {group_text(foreign[0])}, which belongs to somebody else or does not pass the filter"
        if reason:
            stuck.add(ns)
            progress.warn(f"vanished namespace {ns} stays: {reason}")
            return
        count = 0
        for info in held:
            count += len(await self.target.snapshots(info.group.ns, info.group, unfinished=True))
        result = await self.target.delete_namespace(ns, groups=True)
        self.report.removed_snapshots += max(0, count - len(result.protected))
        self.report.protected += result.protected
        kept = {snapshot.group for snapshot in result.protected}
        self.report.removed_groups += [info.group for info in held if info.group not in kept]
        self.report.removed_namespaces += result.removed
        stuck.update(result.kept)
        for one in result.removed:
            progress.log(f"removed vanished namespace {one}")
        if result.protected:
            progress.warn(f"kept {len(result.protected)} protected snapshots of the vanished namespace {ns}")
