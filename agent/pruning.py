"""Pruning several groups: what `fleece prune` and jobs of type prune do."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agent.documents import in_namespace, table
from core.errors import FleeceError
from core.progress import Progress
from datastore.errors import SnapshotNotFoundError
from datastore.filters import GroupFilter, passes
from datastore.names import ROOT, Group, Namespace
from datastore.prune import Decision, KeepOptions, PruneResult
from repository.interface import Repository


@dataclass(frozen=True, slots=True)
class Selection:
    """Which groups are meant."""

    ns: Namespace = ROOT
    group: Group | None = None  #: only this one
    depth: int | None = 0  #: how far below `ns`; None: everything below
    filters: tuple[GroupFilter, ...] = ()


async def selected_groups(repository: Repository, selection: Selection) -> list[Group]:
    """The groups of `selection`, namespace by namespace.

    Raises:
        SnapshotNotFoundError: the namespace or the group is not there.
    """
    found = []
    for ns in await repository.namespaces(selection.ns, depth=selection.depth):
        try:
            found += [info.group for info in await repository.groups(ns)]
        except SnapshotNotFoundError:
            if ns == selection.ns:
                raise  # and others were removed meanwhile
    if selection.group is not None:
        if selection.group not in found:
            hint = "'fleece list' shows what there is"
            raise SnapshotNotFoundError("find", in_namespace(selection.group), "there is no such group", hint)
        found = [selection.group]
    return [group for group in found if passes(selection.filters, group)]


async def prune(
    repository: Repository, selection: Selection, keep: KeepOptions, *, dry_run: bool, progress: Progress
) -> list[PruneResult]:
    """Prune the groups of `selection` one after the other; what fails in one is a warning and stops no other.

    Raises:
        FleeceError: none of the groups could be looked at.
    """
    groups = await selected_groups(repository, selection)
    results = []
    failure: FleeceError | None = None
    with progress.task("pruning", len(groups), "groups") as task:
        for group in groups:
            try:
                results.append(await repository.prune(group, keep, dry_run=dry_run, progress=progress))
            except FleeceError as error:
                failure = error
                if len(groups) > 1:
                    progress.warn(f"{in_namespace(group)}: {error}")
            task.advance(1)
    if failure is not None and not results:
        raise failure
    return results


def prune_documents(results: Sequence[PruneResult]) -> list[dict[str, Any]]:
    """Every snapshot with what became of it: the document of `fleece prune`."""
    return [_document(result, decision) for result in results for decision in result.decisions]


def _document(result: PruneResult, decision: Decision) -> dict[str, Any]:
    snapshot = decision.snapshot
    document = {
        "backup-type": snapshot.group.type.value,
        "backup-id": snapshot.group.id,
        "backup-time": snapshot.ctime,
        "ns": str(snapshot.group.ns),
        "snapshot": str(snapshot),
        "keep": decision.keep,
        "protected": decision.protected,
        "mark": decision.mark.value,
        "reason": decision.reason,
        "removed": snapshot in result.removed,
    }
    if snapshot in result.failed:
        document["error"] = result.failed[snapshot]
    return document


def prune_lines(results: Sequence[PruneResult], *, dry_run: bool) -> Iterator[str]:
    """The same for people."""
    rows = []
    for result in results:
        for decision in result.decisions:
            if decision.keep:
                state = "keep"
            elif decision.snapshot in result.failed:
                state = "stays"
            else:
                state = "would remove" if dry_run else "removed"
            reason = result.failed.get(decision.snapshot, decision.reason)
            rows.append((in_namespace(decision.snapshot), state, reason))
    if not rows:
        yield "No snapshots."
        return
    yield from table(("snapshot", "", "why"), rows)
    kept = sum(decision.keep for result in results for decision in result.decisions)
    gone = sum(not decision.keep for result in results for decision in result.decisions)
    gone -= sum(len(result.failed) for result in results)
    yield f"{kept} kept, {gone} {'would be removed' if dry_run else 'removed'}"
