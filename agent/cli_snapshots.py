"""`fleece list`, `show`, `forget`: looking at snapshots and after them."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agent.invocation import Invocation, command
from core.errors import UsageError

if TYPE_CHECKING:
    from core.progress import Progress
    from datastore.names import Group, Snapshot
    from repository.interface import Repository, SnapshotInfo

GroupText = Annotated[str | None, typer.Argument(metavar="GROUP", help="Only this group, for example vm/100.")]
SnapshotText = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="type/id/time or type/id/latest.")]


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    command(
        application,
        "list",
        examples="""
fleece list
fleece list vm/100
fleece list --sort verified                   damaged ones first
fleece list --sort size --reverse
fleece list --recursive --output json | jq '.[].snapshot'
""",
    )(list_snapshots)
    command(
        application,
        "show",
        examples="""
fleece show vm/100/latest
fleece show vm/100/2026-01-02T03:04:05Z --output json
""",
    )(show)
    command(
        application,
        "forget",
        examples="""
fleece forget vm/100/2026-01-02T03:04:05Z
fleece forget --group vm/100
fleece forget --group vm/100 --dry-run
""",
    )(forget)


def list_snapshots(
    invocation: Invocation,
    group: GroupText = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also the namespaces below.")] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also what is being written or was cut off.")
    ] = False,
    sort: Annotated[
        Literal["group", "time", "size", "owner", "verified", "protected"],
        typer.Option("--sort", help="verified: failed, then never verified, then ok."),
    ] = "group",
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round.")] = False,
) -> None:
    """List the snapshots of a repository, by group, oldest first, with their verify state and protection."""
    from agent.documents import snapshot_document, snapshot_lines, sorted_snapshots
    from datastore.names import Group

    ns = invocation.namespace()
    wanted = Group.parse(group, ns) if group is not None else None

    async def work(progress: "Progress") -> "list[SnapshotInfo]":
        found = []
        async with invocation.repository() as repository:
            for namespace in await repository.namespaces(ns) if recursive else [ns]:
                selected = Group(wanted.type, wanted.id, namespace) if wanted is not None else None
                found += await repository.snapshots(namespace, selected, unfinished=unfinished)
        return found

    found = invocation.run(work, what="list", where=group or invocation.repository_spec())
    infos = sorted_snapshots(found, sort, reverse=reverse)
    invocation.emit([snapshot_document(info) for info in infos], lambda: snapshot_lines(infos))


def show(invocation: Invocation, snapshot: SnapshotText) -> None:
    """Show one snapshot with its files, notes and owner."""
    from agent.documents import find_snapshot, show_lines, snapshot_document

    ns = invocation.namespace()

    async def work(progress: "Progress") -> "SnapshotInfo":
        async with invocation.repository() as repository:
            return await repository.snapshot(await find_snapshot(repository, snapshot, ns))

    info = invocation.run(work, what="show", where=snapshot)
    invocation.emit(snapshot_document(info), lambda: show_lines(info), cost=False)


def forget(
    invocation: Invocation,
    snapshot: Annotated[str | None, typer.Argument(metavar="SNAPSHOT", help="type/id/time or type/id/latest.")] = None,
    group: Annotated[
        str | None, typer.Option("--group", metavar="GROUP", help="All snapshots of the group, but protected ones.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be removed.")] = False,
) -> None:
    """Remove a snapshot, or all of a group. Protected ones stay.

    The space comes back with the next garbage collection, as far as no other snapshot uses the same chunks.
    """
    from agent.documents import find_snapshot
    from datastore.names import Group

    if (snapshot is None) == (group is None):
        raise UsageError("forget", snapshot or "", "either a SNAPSHOT or --group GROUP is needed", "see --help")
    ns = invocation.namespace()

    async def remove_one(repository: "Repository", text: str) -> "Snapshot":
        one = await find_snapshot(repository, text, ns)
        await (repository.snapshot(one) if dry_run else repository.forget(one))
        return one

    async def remove_all(repository: "Repository", wanted: "Group") -> "tuple[list[Snapshot], list[Snapshot]]":
        infos = await repository.snapshots(ns, wanted, unfinished=True)
        if dry_run:
            kept = [info.snapshot for info in infos if info.protected]
        else:
            kept = await repository.forget_group(wanted)
        return [info.snapshot for info in infos if info.snapshot not in kept], kept

    async def work(progress: "Progress") -> "tuple[list[Snapshot], list[Snapshot]]":
        async with invocation.repository() as repository:
            if snapshot is not None:
                return [await remove_one(repository, snapshot)], []
            return await remove_all(repository, Group.parse(group or "", ns))

    removed, kept = invocation.run(work, what="forget", where=snapshot or group or "")
    if kept and not dry_run:
        invocation.warnings.append(f"kept, because protected: {', '.join(map(str, kept))}")

    def lines() -> list[str]:
        verb = "would remove" if dry_run else "removed"
        return [f"{verb} {one}" for one in removed] or ["nothing to remove"]

    document = {"removed": [str(one) for one in removed], "kept": [str(one) for one in kept], "dry-run": dry_run}
    invocation.emit(document, lines)
