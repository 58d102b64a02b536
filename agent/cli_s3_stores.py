"""`fleece s3` for one datastore in a bucket: what it has needed, and what is here compared with what is there."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.invocation import Invocation, command
from core.errors import FleeceError

if TYPE_CHECKING:
    from core.progress import Progress
    from datastore.s3.reconcile import MetadataReport, ReconcileReport
    from datastore.s3.versions import PurgeReport


def add_to(group: typer.Typer) -> None:
    """Register the verbs."""
    command(
        group,
        "counters",
        repository=False,
        examples="""
fleece s3 counters cloud                                          what all commands on this host have needed so far
fleece s3 counters cloud --threshold get=100000,download=500GiB   warn once they pass that; none: no more
fleece s3 counters cloud --reset-schedule monthly                 begin anew on the first of each month
fleece s3 counters cloud --reset                                  begin anew now
""",
    )(counters)
    command(
        group,
        "reconcile",
        repository=False,
        examples="""
fleece s3 reconcile offsite --dry-run        what differs; a request for each 1000 objects
fleece s3 reconcile offsite                  chunks: forget what is gone, store it again where the cache has it
fleece s3 reconcile offsite --metadata       also snapshots and the like that are here only: stored in the bucket
""",
    )(reconcile)
    command(
        group,
        "purge-versions",
        repository=False,
        examples="""
fleece s3 purge-versions cloud --dry-run              how much old versions take up
fleece s3 purge-versions cloud --older-than 30d       keep what was deleted or replaced in the last 30 days
""",
    )(purge_versions)


def purge_versions(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A datastore in a bucket with versioning.")],
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="TIME", help="Only what was replaced or deleted so long ago (7d)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would go.")] = False,
) -> None:
    """Delete for good what garbage collection, prune and new uploads have left behind in a bucket with versioning.

    There every deleted or replaced object stays as an old version, and space never shrinks. Current objects are not
    touched. What is purged cannot be brought back from the bucket's versions any more. A lifecycle rule for noncurrent
    versions does the same without this command. Ends with 3 if something could not be deleted, as under object lock.
    """
    from agent.bucket_stores import named_bucket
    from agent.cli_verify import parse_duration
    from core.units import format_size

    datastore = named_bucket(invocation, name, "purge old versions of")
    older_than_s = 0.0 if older_than is None else parse_duration(older_than)

    async def work(progress: "Progress") -> "PurgeReport":
        from datastore.s3.versions import purge_versions as purge

        async with invocation.s3.open(datastore) as store:
            return await purge(store, progress, older_than_s=older_than_s, dry_run=dry_run)

    report = invocation.run(work, what="purge old versions of", where=name)
    if report.locked:
        invocation.warnings.append(f"{report.locked} versions stay: object lock or missing rights keep them")
    if report.failed:
        told = ", ".join(sorted({one.code for one in report.failures}))
        invocation.warnings.append(f"{report.failed} versions were not deleted: {told}")
    document = {
        "name": datastore.name,
        "dry-run": dry_run,
        "versioning": report.state or None,
        "versions": report.versions,
        "bytes": report.size,
        "markers": report.markers,
        "kept": report.kept,
        "locked": report.locked,
        "failed": report.failed,
        "strange": report.strange,
    }

    def lines() -> list[str]:
        if not report.state:
            return ["The bucket has no versioning, so there are no old versions."]
        verb = "would be deleted" if dry_run else "deleted"
        text = [
            f"{report.versions} old versions ({format_size(report.size)}) and {report.markers} delete markers {verb}"
        ]
        text += [f"{report.kept} old versions stay"] if report.kept else []
        text += [f"{report.strange} entries are not this datastore's, and stay"] if report.strange else []
        return text

    invocation.emit(document, lines)


def counters(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A datastore in a bucket.")],
    threshold: Annotated[
        str | None,
        typer.Option("--threshold", metavar="LIMITS", help="get=N,put=N,post=N,head=N,delete=N,upload=SIZE,"
                     "download=SIZE: whatever passes one of them warns; none takes all away."),
    ] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Begin to count anew; thresholds and schedule stay.")
    ] = False,
    reset_schedule: Annotated[
        str | None,
        typer.Option("--reset-schedule", metavar="WHEN", help="Begin anew whenever this is due, as systemd writes it "
                     "(monthly, 'Mon 02:00'); none: never."),
    ] = None,
) -> None:  # fmt: skip
    """Show what a datastore in a bucket has needed: requests and bytes of all commands and jobs of this host.

    The command or job that passes a threshold has a warning. The bucket is asked nothing.
    """
    from agent.bucket_stores import named_bucket
    from agent.s3_budget import parse_thresholds
    from agent.s3_use import next_time
    from agent.schedules import check_schedule
    from core.units import format_size
    from datastore.files import Owner
    from datastore.s3.counter_file import NAMES, CounterFile

    wanted = None if threshold is None else parse_thresholds(threshold)
    schedule = None if reset_schedule in (None, "none") else check_schedule(str(reset_schedule))
    datastore = named_bucket(invocation, name, "show the counters of")
    if not datastore.path.is_dir():
        raise FleeceError("show the counters of", datastore.name, f"its cache {datastore.path} is not there")
    file = CounterFile(datastore.path, Owner.of(datastore.path), next_time=next_time)
    if wanted is not None:
        file.set_thresholds(wanted)
    if reset_schedule is not None:
        file.set_schedule(schedule)
    if reset:
        file.reset()
    values, period = file.read(), file.period()
    counts = {name.removeprefix("s3-"): values.counts[name] for name in NAMES}
    thresholds = {name.removeprefix("s3-"): values.thresholds[name] or None for name in NAMES}

    def lines() -> list[str]:
        from agent.documents import table
        from agent.listing_output import time_text

        def shown(name: str, value: int | None) -> str:
            if value is None:
                return "-"
            return format_size(value) if name in ("upload", "download") else str(value)

        rows = [(name, shown(name, count), shown(name, thresholds[name])) for name, count in counts.items()]
        text = list(table(("counter", "so far", "threshold"), rows))
        if period.since is not None:
            text.append(f"counted since {time_text(period.since)}")
        if period.schedule is not None:
            due = "never" if period.until is None else time_text(period.until)
            text.append(f"set back {period.schedule!r}, next: {due}")
        return text

    document = {
        "name": datastore.name,
        "counters": counts,
        "thresholds": thresholds,
        "since": period.since,
        "reset-schedule": period.schedule,
        "next-reset": period.until,
    }
    invocation.emit(document, lines)


def reconcile(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A datastore in a bucket.")],
    metadata: Annotated[
        bool, typer.Option("--metadata", help="Also compare snapshots; what is here only is stored in the bucket.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what differs.")] = False,
) -> None:
    """Compare what this host knows of a bucket with what is in it, and put it right.

    To be used after objects were removed behind the datastore's back, by a lifecycle rule or at a console: backups
    store only chunks that they do not believe to be there. A chunk that is gone and that the cache has is stored again;
    others are forgotten, so that the next backup with the same data stores them. Ends with 3 if something was lost.
    """
    from agent.bucket_stores import named_bucket

    datastore = named_bucket(invocation, name, "reconcile")

    async def work(progress: "Progress") -> "tuple[ReconcileReport, MetadataReport | None]":
        from datastore.s3.reconcile import compare_metadata
        from datastore.s3.reconcile import reconcile as reconcile_chunks

        async with invocation.s3.open(datastore) as store:
            compared = await compare_metadata(store, progress, upload=not dry_run) if metadata else None
            return await reconcile_chunks(store, progress, dry_run=dry_run), compared

    chunks, compared = invocation.run(work, what="reconcile", where=name)
    document: dict[str, Any] = {
        "name": name,
        "dry-run": dry_run,
        "objects": chunks.objects,
        "marked": chunks.marked,
        "repaired": [digest.hex() for digest in chunks.repaired],
        "lost": [digest.hex() for digest in chunks.lost],
        "metadata": None,
    }
    if compared is not None:
        document["metadata"] = {
            "only-here": compared.only_here,
            "only-in-bucket": compared.only_in_bucket,
            "uploaded": compared.uploaded,
        }

    def lines() -> list[str]:
        would = "would be " if dry_run else ""
        text = [f"{chunks.objects} chunks in the bucket, {chunks.marked} of them {would}newly known here"]
        text.append(f"{len(chunks.repaired)} {would}stored again, {len(chunks.lost)} gone")
        if compared is not None:
            here, there = len(compared.only_here), len(compared.only_in_bucket)
            stored = f", {compared.uploaded} stored there" if compared.uploaded else ""
            text.append(f"metadata: {here} files here only{stored}, {there} in the bucket only")
        return text

    invocation.emit(document, lines)
