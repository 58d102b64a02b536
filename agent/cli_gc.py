"""`fleece gc`: garbage collection."""

from typing import TYPE_CHECKING, Annotated

import typer

from agent.invocation import Invocation, command

if TYPE_CHECKING:
    from core.progress import Progress
    from datastore.gc import GcReport

_EXAMPLES = """
fleece gc
fleece gc --dry-run                       what would go now
fleece gc --lock-wait 10m                 give up if PBS holds the store for longer
fleece gc --repo cloud --allow-empty      of a bucket: the last snapshot was removed on purpose
fleece gc --output json | jq '."removed-bytes"'
"""


def add_to(application: typer.Typer) -> None:
    """Register the verb under both of its names."""
    command(application, "gc", examples=_EXAMPLES)(collect_garbage)
    command(application, "garbage-collect", examples=_EXAMPLES, hidden=True)(collect_garbage)


def collect_garbage(
    invocation: Invocation,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Remove nothing (what is in use is marked all the same).")
    ] = False,
    cutoff: Annotated[
        str | None,
        typer.Option(
            "--cutoff", metavar="TIME", show_default=False,
            help="Keep what was used in this time: 1m to 48h (default 24 hours and 5 minutes).",
        ),
    ] = None,
    lock_wait: Annotated[
        str | None,
        typer.Option(
            "--lock-wait", metavar="TIME", show_default=False,
            help="Wait so long for another garbage collection or for backups of PBS (default 1h).",
        ),
    ] = None,
    allow_empty: Annotated[
        bool,
        typer.Option("--allow-empty", help="Of a bucket: remove its chunks although there is not a single snapshot."),
    ] = False,
) -> None:  # fmt: skip
    """Remove the chunks that no snapshot uses any more.

    The space of removed snapshots comes back only here, a day after the last use of their chunks. Backups of Fleece go
    on meanwhile; those of a Proxmox Backup Server with the same datastore wait, or fail, until it has ended. If an
    index cannot be read, nothing is removed.
    """
    from agent.cli_verify import parse_duration
    from datastore.gc import DEFAULT_CUTOFF_S, LOCK_WAIT_S, summary

    cutoff_s = DEFAULT_CUTOFF_S if cutoff is None else int(parse_duration(cutoff))
    lock_wait_s = LOCK_WAIT_S if lock_wait is None else parse_duration(lock_wait)

    async def work(progress: "Progress") -> "GcReport":
        async with invocation.repository() as repository:
            return await repository.collect_garbage(
                cutoff_s=cutoff_s,
                lock_wait_s=lock_wait_s,
                dry_run=dry_run,
                allow_empty=allow_empty,
                progress=progress,
            )

    report = invocation.run(work, what="collect garbage", where=invocation.repository_spec())
    invocation.emit(report.to_json(), lambda: summary(report))
