"""`fleece prune`: removing old snapshots by rules."""

from typing import TYPE_CHECKING, Annotated

import typer

from agent.invocation import Invocation, command
from core.errors import UsageError

if TYPE_CHECKING:
    from core.progress import Progress
    from datastore.prune import PruneResult


def add_to(application: typer.Typer) -> None:
    """Register the verb."""
    command(
        application,
        "prune",
        examples="""
fleece prune vm/100 --keep-last 3 --keep-daily 7 --dry-run     what would go, and why
fleece prune vm/100 --keep-last 3 --keep-daily 7
fleece prune --all --recursive --keep-daily 7 --keep-weekly 4 --keep-monthly 12
fleece prune --all --group-filter type:vm --group-filter exclude:group:vm/100 --keep-last 5
""",
    )(prune)


def _keep(kind: str, what: str) -> object:
    return typer.Option(f"--keep-{kind}", min=1, metavar="N", help=what, show_default=False)


def prune(
    invocation: Invocation,
    group: Annotated[str | None, typer.Argument(metavar="GROUP", help="For example vm/100; or use --all.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every group of the namespace.")] = False,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="With --all: also the namespaces below.")
    ] = False,
    max_depth: Annotated[
        int | None,
        typer.Option("--max-depth", min=0, max=7, help="With --all: so many levels below.", show_default=False),
    ] = None,
    group_filter: Annotated[
        list[str] | None,
        typer.Option("--group-filter", metavar="FILTER", help="With --all: only these groups; may be repeated."),
    ] = None,
    keep_last: Annotated[int | None, _keep("last", "Keep the newest N.")] = None,
    keep_hourly: Annotated[int | None, _keep("hourly", "Keep the newest of each of N hours.")] = None,
    keep_daily: Annotated[int | None, _keep("daily", "... of N days.")] = None,
    keep_weekly: Annotated[int | None, _keep("weekly", "... of N weeks.")] = None,
    keep_monthly: Annotated[int | None, _keep("monthly", "... of N months.")] = None,
    keep_yearly: Annotated[int | None, _keep("yearly", "... of N years.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be removed, and why.")] = False,
) -> None:
    """Remove the snapshots of a group that no --keep option covers. Protected ones stay.

    The rules are exactly those of Proxmox Backup Server; days and weeks are those of this host's time zone. Without any
    --keep option everything stays. The space comes back with the next garbage collection ('fleece gc').
    """
    from agent.pruning import Selection, prune_documents, prune_lines
    from agent.pruning import prune as prune_groups
    from datastore.filters import GroupFilter
    from datastore.names import Group
    from datastore.prune import KeepOptions

    if (group is None) != every:
        raise UsageError("prune", group or "", "either a GROUP or --all is needed", "see 'fleece prune --help'")
    if not every and (recursive or max_depth is not None or group_filter):
        why = "--recursive, --max-depth and --group-filter belong to --all"
        raise UsageError("prune", group or "", why, "see 'fleece prune --help'")
    keep = KeepOptions(keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly)
    ns = invocation.namespace()
    selection = Selection(
        ns,
        group=Group.parse(group, ns) if group is not None else None,
        depth=max_depth if max_depth is not None else None if recursive else 0,
        filters=tuple(GroupFilter.parse(text) for text in group_filter or ()),
    )

    async def work(progress: "Progress") -> "list[PruneResult]":
        async with invocation.repository() as repository:
            return await prune_groups(repository, selection, keep, dry_run=dry_run, progress=progress)

    results = invocation.run(work, what="prune", where=group or invocation.repository_spec())
    invocation.emit(prune_documents(results), lambda: prune_lines(results, dry_run=dry_run))
