"""`fleece sync`: push to another datastore, pull from one."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.invocation import Invocation, command
from agent.rate_options import BurstInOption, BurstOutOption, RateInOption, RateOutOption
from core.errors import FleeceError

if TYPE_CHECKING:
    from core.progress import Progress
    from repository.sync import Direction, SyncReport

OtherArgument = Annotated[
    str,
    typer.Argument(
        metavar="OTHER", help="A remote of 'fleece remote', or a repository as --repo takes it (folder, name, server)."
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option("--remote-store", metavar="STORE", help="Datastore of a remote (else the remote's own).",
                 show_default=False),
]  # fmt: skip
RemoteNsOption = Annotated[
    str | None, typer.Option("--remote-ns", metavar="NS", help="Namespace there.", show_default=False)
]
DepthOption = Annotated[
    int | None,
    typer.Option("--max-depth", min=0, max=7, help="So many levels of namespaces below (default: all).",
                 show_default=False),
]  # fmt: skip
FilterOption = Annotated[
    list[str] | None,
    typer.Option("--group-filter", metavar="FILTER", help="Only these groups; may be repeated."),
]
LastOption = Annotated[
    int | None,
    typer.Option("--transfer-last", min=1, metavar="N", help="Only the newest N snapshots of each group.",
                 show_default=False),
]  # fmt: skip
EncryptedOption = Annotated[bool, typer.Option("--encrypted-only", help="Only snapshots that are wholly encrypted.")]
VerifiedOption = Annotated[
    bool, typer.Option("--verified-only", help="Only snapshots whose last verification found them sound.")
]
VanishedOption = Annotated[
    bool,
    typer.Option("--remove-vanished", help="Remove snapshots, groups and namespaces that the source does not have."),
]
AnywayOption = Annotated[
    bool,
    typer.Option("--remove-anyway", help="With it: even if the source looks empty or could not be listed in full."),
]
CorruptOption = Annotated[
    bool, typer.Option("--resync-corrupt", help="Fetch snapshots again that a verification here found damaged.")
]
ParallelOption = Annotated[int, typer.Option("--parallel", min=1, max=32, metavar="N", help="Groups at a time.")]
OwnerOption = Annotated[
    str | None,
    typer.Option("--owner", metavar="AUTHID", show_default=False,
                 help="Owner of new groups, and of those that are synced at all (a server has its user for that)."),
]  # fmt: skip


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    group = typer.Typer(
        no_args_is_help=True, help="Bring snapshots to another datastore, or here from one.", rich_markup_mode=None
    )
    application.add_typer(group, name="sync")
    command(
        group,
        "push",
        examples="""
fleece sync push /mnt/usb/backups                                   to a datastore in a folder
fleece sync push offsite --remote-store main --remote-ns site1      to a remote of 'fleece remote add'
fleece sync push sync@pbs!host1@pbs.example.com:main --parallel 4   to a server by its address
fleece sync push offsite --group-filter type:vm --transfer-last 3 --encrypted-only
fleece sync push bucket --remove-vanished --verified-only --output json
""",
    )(push)
    command(
        group,
        "pull",
        examples="""
fleece sync pull office --remote-store main                from a remote of 'fleece remote add'
fleece sync pull office --ns office --remove-vanished      into a namespace of its own
fleece sync pull office --resync-corrupt                   mend what a verification here found damaged
fleece sync pull /mnt/usb/backups --max-depth 0
""",
    )(pull)


def push(
    invocation: Invocation,
    other: OtherArgument,
    remote_store: StoreOption = None,
    remote_ns: RemoteNsOption = None,
    max_depth: DepthOption = None,
    group_filter: FilterOption = None,
    transfer_last: LastOption = None,
    encrypted_only: EncryptedOption = False,
    verified_only: VerifiedOption = False,
    remove_vanished: VanishedOption = False,
    remove_anyway: AnywayOption = False,
    parallel: ParallelOption = 1,
    owner: OwnerOption = None,
    rate_in: RateInOption = None,
    burst_in: BurstInOption = None,
    rate_out: RateOutOption = None,
    burst_out: BurstOutOption = None,
) -> None:
    """Bring the snapshots of --repo to another datastore.

    Only what the other side does not have goes over: snapshots newer than its newest one of the group, and of these the
    chunks that this one does not share. Chunks travel as they are stored, so that encrypted backups need no key.
    Groups there that belong to somebody else are left alone. Ends with 3 if there were warnings, 1 if a group failed;
    the others are synced all the same, and running it again goes on where it stopped.
    """
    from repository.sync import Direction

    _sync(
        invocation, Direction.PUSH, other, remote_store, remote_ns, owner, group_filter,
        {"rate_in": rate_in, "burst_in": burst_in, "rate_out": rate_out, "burst_out": burst_out},
        max_depth=max_depth, transfer_last=transfer_last, encrypted_only=encrypted_only, verified_only=verified_only,
        remove_vanished=remove_vanished, remove_anyway=remove_anyway, parallel=parallel,
    )  # fmt: skip


def pull(
    invocation: Invocation,
    other: OtherArgument,
    remote_store: StoreOption = None,
    remote_ns: RemoteNsOption = None,
    max_depth: DepthOption = None,
    group_filter: FilterOption = None,
    transfer_last: LastOption = None,
    encrypted_only: EncryptedOption = False,
    verified_only: VerifiedOption = False,
    resync_corrupt: CorruptOption = False,
    remove_vanished: VanishedOption = False,
    remove_anyway: AnywayOption = False,
    parallel: ParallelOption = 1,
    owner: OwnerOption = None,
    rate_in: RateInOption = None,
    burst_in: BurstInOption = None,
    rate_out: RateOutOption = None,
    burst_out: BurstOutOption = None,
) -> None:
    """Bring the snapshots of another datastore into --repo.

    As push the other way round; besides, the newest snapshot that is here already is looked at again, for notes that
    changed and a log that came late. What this host found out by verifying stays. Everything is checked on arrival, so
    that a source that is damaged, or lies, leaves no snapshot here.
    """
    from repository.sync import Direction

    _sync(
        invocation, Direction.PULL, other, remote_store, remote_ns, owner, group_filter,
        {"rate_in": rate_in, "burst_in": burst_in, "rate_out": rate_out, "burst_out": burst_out},
        max_depth=max_depth, transfer_last=transfer_last, encrypted_only=encrypted_only, verified_only=verified_only,
        resync_corrupt=resync_corrupt, remove_vanished=remove_vanished, remove_anyway=remove_anyway, parallel=parallel,
    )  # fmt: skip


def _sync(
    invocation: Invocation,
    direction: "Direction",
    other: str,
    remote_store: str | None,
    remote_ns: str | None,
    owner: str | None,
    group_filter: list[str] | None,
    rates: dict[str, str | None],
    **flags: Any,
) -> None:
    from agent.syncing import FarSide, Known, failure, run_sync
    from datastore.filters import GroupFilter
    from datastore.names import Namespace
    from repository.sync import Direction, SyncOptions

    push = direction is Direction.PUSH
    known = Known(invocation.config, invocation.registry, invocation.remotes, lambda: invocation.s3)
    far = FarSide(other, remote_store, rates)
    there = Namespace.parse(remote_ns) if remote_ns is not None else far.default_ns(known)
    here = invocation.namespace()
    target = other if push else None  # whose section may name the owner of new groups
    options = SyncOptions(
        direction,
        invocation.owner(owner, _configured_owner(invocation, target)),
        source_ns=here if push else there,
        target_ns=there if push else here,
        filters=tuple(GroupFilter.parse(text) for text in group_filter or ()),
        rate=far.throttle(direction, known),
        **flags,
    )
    options.check()

    async def work(progress: "Progress") -> "SyncReport":
        async with invocation.repository() as near:
            return await run_sync(near, far, options, known, progress, may_ask=True)

    what, where = ("push to" if push else "pull from"), other
    report = invocation.run(work, what=what, where=where)
    lines: Callable[[], list[str]] = lambda: report.lines(removal=options.remove_vanished)  # noqa: E731
    invocation.emit(report.to_json(), lines)
    if report.failed:
        raise FleeceError(
            what, where, f"failed: {failure(report)}", "the rest is synced; the warnings say why, and run it again"
        )


def _configured_owner(invocation: Invocation, target: str | None) -> str | None:
    section = None if target is None else invocation.config.repository.get(target)
    return section.owner if section is not None else None
