"""`fleece verify`: reading snapshots and everything they use, and writing down what was found."""

from typing import TYPE_CHECKING, Annotated

import typer

from agent.invocation import Invocation, command
from core.errors import FleeceError, NotFoundError, UsageError

if TYPE_CHECKING:
    from core.progress import Progress
    from datastore.names import Group, Namespace, Snapshot
    from repository.interface import Repository
    from repository.verify import VerifyOptions, VerifyResult


def add_to(application: typer.Typer) -> None:
    """Register the verb."""
    command(
        application,
        "verify",
        examples="""
fleece verify                                          everything
fleece verify --ignore-verified                        what was not found to be sound before
fleece verify --outdated-after 30                      and what was more than 30 days ago
fleece verify --outdated-after 30 --max-duration 4h    the rest the next night
fleece verify vm/100                                   all snapshots of a group
fleece verify vm/100/latest                            one snapshot
fleece verify --ns customers/a                         a namespace and those below it
fleece verify --max-depth 0 --group-filter type:vm     the virtual machines of the namespace itself
fleece verify --no-record                              only look: nothing in the datastore changes
fleece verify --here                                   of a server: read everything over the network
fleece verify --repo cloud --mode listing              of a bucket: is everything there? A request for 1000 chunks
fleece verify --repo cloud --mode sample=5%            read every twentieth chunk, others each time
fleece verify --repo cloud --mode budget=50GiB         so much at a time, and go on there the next time
fleece verify --output json | jq '.[] | select(.state == "failed")'
fleece verify --keyfile /etc/fleece/backup.key         also the digests of chunks encrypted with this key
""",
        keys="read",
    )(verify)


def verify(
    invocation: Invocation,
    selection: Annotated[
        str | None, typer.Argument(metavar="GROUP|SNAPSHOT", help="Only this group or snapshot.")
    ] = None,
    max_depth: Annotated[
        int | None,
        typer.Option("--max-depth", min=0, max=7, help="Only so many namespace levels below.", show_default=False),
    ] = None,
    group_filter: Annotated[
        list[str] | None,
        typer.Option("--group-filter", metavar="FILTER", help="Only these groups; may be repeated."),
    ] = None,
    ignore_verified: Annotated[
        bool | None,
        typer.Option(
            "--ignore-verified/--all",
            help="Pass over snapshots that were found to be sound before (default with --outdated-after).",
            show_default=False,
        ),
    ] = None,
    outdated_after: Annotated[
        int | None,
        typer.Option(
            "--outdated-after", metavar="DAYS", min=0, show_default=False,
            help="Pass over them unless that is more than DAYS full days ago.",
        ),
    ] = None,
    max_duration: Annotated[
        str | None,
        typer.Option(
            "--max-duration", metavar="TIME", help="Begin no further snapshot after this time: 90m, 8h.",
            show_default=False,
        ),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            "--max-bytes", metavar="SIZE", help="Begin no further snapshot after so much data, as plain data: 2TiB.",
            show_default=False,
        ),
    ] = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record/--no-record", help="Write results into the snapshots and set corrupt chunks aside.",
            show_default=False,
        ),
    ] = True,
    mode: Annotated[
        str,
        typer.Option(
            "--mode", metavar="MODE",
            help="full, listing, sample=PERCENT, or budget=SIZE|CHUNKS; only full records that a snapshot is sound.",
        ),
    ] = "full",
    here: Annotated[
        bool, typer.Option("--here", help="Read everything over the network, instead of having the server verify.")
    ] = False,
) -> None:  # fmt: skip
    """Read snapshots and check manifest, indexes, and the CRC and digest of every chunk.

    A datastore on a server is verified there, without a key, unless --here is given. In a bucket reading costs money:
    --mode reads less.

    A chunk that is wrong at two looks is renamed to .bad, so that the next backup of the same data stores it anew;
    every snapshot that uses it is recorded as failed. Ends with 1 if a snapshot is damaged.
    """
    from agent.documents import in_namespace, parse_selection
    from core.units import parse_size
    from datastore.filters import GroupFilter
    from repository.interface import ServerVerify
    from repository.verify import VerifyOptions, choose
    from repository.verify_modes import Mode, VerifyMode, verify_by

    wanted_mode = VerifyMode.parse(mode)
    parse_selection(selection, invocation.namespace())
    if selection is not None and (max_depth is not None or group_filter):
        why = "--max-depth and --group-filter choose groups themselves"
        raise UsageError("verify", selection, why, "leave them, or the group, out")
    filters = tuple(GroupFilter.parse(text) for text in group_filter or ())
    options = VerifyOptions(
        ignore_verified=outdated_after is not None if ignore_verified is None else ignore_verified,
        outdated_after=outdated_after,
        max_duration_s=None if max_duration is None else parse_duration(max_duration),
        max_bytes=None if max_bytes is None else parse_size(max_bytes),
        record=record,
    )
    if outdated_after is not None and not options.ignore_verified:
        raise UsageError("verify", "with --outdated-after", "everything is verified anyway", "leave it or --all out")
    codec = invocation.codec()

    async def work(progress: "Progress") -> "list[VerifyResult]":
        async with invocation.repository() as repository:
            if isinstance(repository, ServerVerify) and not here:
                chosen_there = await _selection(repository, invocation, selection)
                check_for_server(options, record=record, full=wanted_mode.mode is Mode.FULL)
                return await repository.verify_there(chosen_there, options, progress, depth=max_depth, filters=filters)
            if selection is None:
                chosen = await choose(repository, invocation.namespace(), depth=max_depth, filters=filters)
            else:
                chosen = await _chosen(repository, invocation, selection)
            return await verify_by(wanted_mode, repository, chosen, codec, progress, options)

    results = invocation.run(work, what="verify", where=selection or invocation.repository_spec())
    document = [{**result.to_json(), "ns": str(result.snapshot.group.ns)} for result in results]

    def lines() -> list[str]:
        text = []
        for result in results:
            skipped = f", not looked at: {result.skipped}" if result.skipped else ""
            text.append(f"{in_namespace(result.snapshot)}: {result.state}{skipped}")
            text += [f"  {error}" for error in result.errors]
        return text or ["No snapshots."]

    invocation.emit(document, lines)
    failed = [str(result.snapshot) for result in results if result.state != "ok"]
    if failed:
        raise FleeceError(
            "vouch for", ", ".join(failed[:5]) + (f" and {len(failed) - 5} more" if len(failed) > 5 else ""),
            "damaged; the errors are listed above" if not invocation.is_json else "damaged",
            "the other snapshots are whole; a new backup stores damaged chunks of unchanged data again",
        )  # fmt: skip


async def _selection(
    repository: "Repository", invocation: Invocation, selection: str | None
) -> "Namespace | Group | Snapshot":
    from agent.documents import find_snapshot, parse_selection

    ns = invocation.namespace()
    wanted = parse_selection(selection, ns)
    if wanted is None:
        return ns
    return await find_snapshot(repository, wanted, ns) if isinstance(wanted, str) else wanted


def check_for_server(options: "VerifyOptions", *, record: bool = True, full: bool = True) -> None:
    """Refuse what a server does not do.

    Raises:
        UsageError: such an option is given.
    """
    for option, given in (
        ("--max-duration", options.max_duration_s is not None),
        ("--max-bytes", options.max_bytes is not None),
        ("--no-record", not record),
        ("--mode", not full),
    ):
        if given:
            hint = "leave it out, or read everything over the network with --here"
            raise UsageError("verify on a server with", option, "a server decides that itself", hint)


async def _chosen(repository: "Repository", invocation: Invocation, selection: str) -> "list[Snapshot]":
    """The snapshot, or those of the group in PBS's order: the newest first."""
    from agent.documents import find_snapshot, parse_selection

    ns = invocation.namespace()
    wanted = parse_selection(selection, ns)
    if isinstance(wanted, str):
        return [await find_snapshot(repository, wanted, ns)]
    found = [info.snapshot for info in await repository.snapshots(ns, wanted)]
    if not found:
        raise NotFoundError("verify", str(wanted), "the group has no finished snapshot", "'fleece list' shows them")
    return found[::-1]


def parse_duration(text: str) -> float:
    """Seconds meant by `text`: a number and `s`, `m`, `min`, `h` or `d`, default seconds.

    Raises:
        UsageError: another form.
    """
    import re

    units = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)\s*([a-z]*)", text.strip(), re.ASCII)
    if match is None or match[2] not in units:
        raise UsageError("understand the time", repr(text), "it is not a number with a unit", "write 90m, 8h or 2d")
    return float(match[1]) * units[match[2]]
