"""`fleece backup`: folders, disk images and single files into one snapshot."""

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agent.archive_options import (
    ChangeDetectionOption,
    ChunkSizeOption,
    EntriesOption,
    ExcludeFromOption,
    ExcludeOption,
    IncludeDeviceOption,
    archive_options,
)
from agent.invocation import Invocation, command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from agent.file_archives import FileArchiveReport
    from agent.specifications import Specification
    from core.disks import DiskSource
    from core.progress import Progress
    from datastore.names import Group
    from repository.planning import DiskPlan
    from repository.report import BackupReport

OwnerOption = Annotated[
    str | None, typer.Option("--owner", metavar="AUTHID", help="Owner of a new group, for example backup@pbs.")
]
BackupTimeOption = Annotated[
    str | None,
    typer.Option("--backup-time", metavar="TIME", help="Instead of now: Unix seconds or 2026-01-02T03:04:05Z."),
]
BandwidthOption = Annotated[
    str | None,
    typer.Option("--bwlimit", "--rate", metavar="SIZE", help="Read at most this much a second, for example 100M."),
]
LockWaitOption = Annotated[
    float, typer.Option("--lock-wait", metavar="SECONDS", min=0, help="Wait for another backup of the group.")
]
FormatOption = Annotated[
    Literal["raw", "qcow2"] | None,
    typer.Option("--format", help="Format of the image files; else .qcow2 files are qcow2, all others raw."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", "-n", help="Only say what would be read, and why. Writes nothing.")
]
NotesOption = Annotated[str | None, typer.Option("--notes", metavar="TEXT", help="Notes of the snapshot.")]


def add_to(application: typer.Typer) -> None:
    """Register the verb."""
    command(
        application,
        "backup",
        examples="""
fleece backup root.pxar:/ etc.pxar:/etc
fleece backup root.pxar:/ --change-detection-mode metadata --exclude /var/cache --exclude '*.tmp'
fleece backup home.pxar:/home --include-dev /home/shared --exclude-caches
fleece backup root.img:/dev/vg/root --backup-id db1
fleece backup disk.img:/var/lib/vm/web.qcow2 vm.conf:/etc/vm/web.conf --backup-type vm --backup-id web
fleece backup disk.img:nbd://storage/web --backup-id web --bwlimit 100M
fleece backup disk.img:/dev/vg/root --dry-run
fleece backup root.img:/dev/vg/root --keyfile /etc/fleece/backup.key
fleece backup root.img:/dev/vg/root --keyfile /etc/fleece/backup.key --master-pubkey-file master-public.pem
""",
        keys="write",
    )(backup)


def parse_rate(*texts: str | None) -> int | None:
    """The first of `texts` that is given, in bytes a second; 0 means no limit."""
    from core.units import parse_size

    text = next((text for text in texts if text is not None), None)
    return (parse_size(text) or None) if text is not None else None


def backup(
    invocation: Invocation,
    specifications: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME.pxar:FOLDER|NAME.img:SOURCE|NAME.conf:FILE...",
            help="Folders, disk images (raw or qcow2 file, block device, NBD URI) and small files.",
        ),
    ],
    backup_id: Annotated[str | None, typer.Option("--backup-id", metavar="ID", help="Else this host's name.")] = None,
    backup_type: Annotated[
        Literal["host", "vm", "ct"], typer.Option("--backup-type", help="The kind of group.")
    ] = "host",
    backup_time: BackupTimeOption = None,
    owner: OwnerOption = None,
    notes: NotesOption = None,
    bwlimit: BandwidthOption = None,
    lock_wait: LockWaitOption = 0.0,
    image_format: FormatOption = None,
    force: Annotated[bool, typer.Option("--force", help="Also read images that a running VM uses.")] = False,
    change_detection: ChangeDetectionOption = None,
    exclude: ExcludeOption = None,
    exclude_from: ExcludeFromOption = None,
    exclude_caches: Annotated[
        bool, typer.Option("--exclude-caches", help="Leave out what lies beside a valid CACHEDIR.TAG.")
    ] = False,
    include_dev: IncludeDeviceOption = None,
    all_file_systems: Annotated[
        bool, typer.Option("--all-file-systems", help="Enter every mount point but those of the kernel's own.")
    ] = False,
    skip_lost_and_found: Annotated[
        bool, typer.Option("--skip-lost-and-found", help="Leave lost+found folders out.")
    ] = False,
    skip_e2big_xattr: Annotated[
        bool, typer.Option("--skip-e2big-xattr", help="Leave extended attributes out that are too large to be read.")
    ] = False,
    entries_max: EntriesOption = 1 << 20,
    chunk_size: ChunkSizeOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Store folders, disk images and small files in one new snapshot.

    A folder becomes a file archive with owners, permissions, ACLs, extended attributes and hard links. Other file
    systems mounted below it are stored as empty folders, unless --include-dev or --all-file-systems say otherwise.
    Files that vanish, change or cannot be read are warnings (exit code 3). With --change-detection-mode metadata
    unchanged files are not read: they are recognised by size, time, owner and mode, and their old chunks are used.

    A disk that is written to meanwhile gives an inconsistent image: for a running virtual machine there is
    'fleece vm backup'. qcow2 is recognised by the file's name only; everything else is read as it is.
    """
    from agent.sessions import parse_backup_time
    from agent.specifications import SpecificationKind, parse_specifications
    from datastore.names import BackupType, Group

    parsed = parse_specifications(specifications)
    group = Group.parse(f"{BackupType(backup_type).value}/{backup_id or _host_name()}", invocation.namespace())
    rate = parse_rate(bwlimit, invocation.config.bwlimit)
    ctime = parse_backup_time(backup_time) if backup_time is not None else None
    group_owner = invocation.owner(owner)
    keys = invocation.backup_keys()
    folders = [one for one in parsed if one.kind is SpecificationKind.ARCHIVE]
    options = archive_options(
        mode=change_detection or invocation.config.change_detection_mode,
        exclude=exclude,
        exclude_from=exclude_from,
        exclude_caches=exclude_caches,
        include_dev=include_dev,
        all_file_systems=all_file_systems,
        skip_lost_and_found=skip_lost_and_found,
        skip_e2big_xattr=skip_e2big_xattr,
        entries_max=entries_max,
        chunk_size=chunk_size,
    )

    if dry_run:

        async def plan(progress: "Progress") -> "tuple[list[DiskPlan], list[FileArchiveReport]]":
            from agent.file_archives import plan_file_archives
            from repository.planning import plan_disks

            async with (
                invocation.repository() as repository,
                open_images(parsed, progress, image_format=image_format, force=force) as sources,
            ):
                await read_small_files(parsed)
                disks = await plan_disks(repository, group, sources, keys.codec)
                archives = []
                if folders:
                    archives = await plan_file_archives(repository, group, folders, keys.codec, options)
                return disks, archives

        disks, archives = invocation.run(plan, what="plan the backup of", where=str(group))
        show_plan(invocation, group, disks, archives)
        return

    async def work(progress: "Progress") -> "BackupReport":
        from agent.backup_runs import SnapshotOptions, archives_into
        from agent.sessions import until_listed

        snapshot = SnapshotOptions(group, group_owner, keys, ctime, rate, notes, lock_wait)
        with until_listed(progress) as listed:
            async with invocation.repository() as repository:
                return await archives_into(
                    repository,
                    parsed,
                    options,
                    snapshot,
                    progress,
                    on_listed=listed,
                    image_format=image_format,
                    force=force,
                )

    report = invocation.run(work, what="back up", where=str(group))
    show_report(invocation, report)


@asynccontextmanager
async def open_images(
    specifications: "Sequence[Specification]", progress: "Progress", *, image_format: str | None, force: bool
) -> "AsyncIterator[list[DiskSource]]":
    """The disk images among `specifications`, open while the block runs; what is odd about them becomes warnings.

    Raises:
        SourceError, NotFoundError, BusyError: one cannot be read.
    """
    from contextlib import AsyncExitStack

    from agent.specifications import SpecificationKind
    from hypervisor.files import open_source

    opened = []
    try:
        async with AsyncExitStack() as stack:
            for one in specifications:
                if one.kind is SpecificationKind.IMAGE:
                    opening = open_source(one.source, one.name, format=image_format, force=force)
                    opened.append(await stack.enter_async_context(opening))
            yield list(opened)
    finally:
        for source in opened:
            for warning in source.warnings:
                progress.warn(warning)


async def read_small_files(specifications: "Sequence[Specification]") -> "list[tuple[str, bytes]]":
    """Name and content of the small files among `specifications`.

    Raises:
        SourceError: one cannot be read.
    """
    from pathlib import Path

    from agent.specifications import SpecificationKind, read_small_file
    from core.limits import in_io_thread

    return [
        (one.name, await in_io_thread(read_small_file, Path(one.source)))
        for one in specifications
        if one.kind is SpecificationKind.BLOB
    ]


def show_plan(
    invocation: Invocation, group: "Group", plans: "Sequence[DiskPlan]", archives: "Sequence[FileArchiveReport]" = ()
) -> None:
    """The result of `--dry-run`."""
    from core.units import format_size

    document = {"group": str(group), "dry-run": True, "archives": [plan.to_json() for plan in plans]}
    if archives:
        document["file-archives"] = [archive.to_json() for archive in archives]
    for archive in archives:
        for warning in archive.figures.warnings:
            if f"{archive.name}: {warning}" not in invocation.warnings:
                invocation.warnings.append(f"{archive.name}: {warning}")

    def lines() -> list[str]:
        text = []
        for plan in plans:
            why = f" ({plan.reason})" if plan.reason else ""
            text.append(
                f"{plan.name}: {plan.mode.value}{why}, would read {format_size(plan.read)} of {format_size(plan.size)}"
            )
        for archive in archives:
            text += archive.lines(dry_run=True)
        return [*text, "nothing was written"]

    invocation.emit(document, lines)


def show_report(invocation: Invocation, report: "BackupReport") -> None:
    """The closing report; its warnings are those of the invocation and of the report together."""
    for warning in report.warnings:
        if warning not in invocation.warnings:
            invocation.warnings.append(warning)
    report.warnings = tuple(invocation.warnings)
    invocation.emit(report.to_json(), report.lines)
    if invocation.is_json and invocation.warnings:
        # They are in the document.
        from core.errors import ExitCode

        raise typer.Exit(ExitCode.WARNINGS)


def _host_name() -> str:
    import socket

    return socket.gethostname().partition(".")[0]
