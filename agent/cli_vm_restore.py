"""`fleece vm restore`: a whole virtual machine out of a snapshot."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agent.invocation import Invocation, command
from core.errors import UsageError

if TYPE_CHECKING:
    from agent.vm_restore import Definer, RestoredVm, RestoreOrder
    from core.progress import Progress

#: Bytes of decoded chunks that are kept: a restore reads each once.
_CACHE = 32 << 20


def add_to(group: typer.Typer) -> None:
    """Register the verb in the group `vm`."""
    command(
        group,
        "restore",
        examples="""
fleece vm restore vm/web/latest /var/lib/vm/web          disks, settings and a script that starts it, in a folder
fleece vm restore vm/web/latest /var/lib/vm/web --format qcow2
fleece vm restore vm/web/latest /srv/web --disk scsi0=/dev/vg/web --disk scsi1=/data/web.qcow2
fleece vm restore vm/web/latest /srv/web --exclude 'scsi[1-9]' --force
""",
        keys="read",
    )(restore)


def restore(
    invocation: Invocation,
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="type/id/time or type/id/latest.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Where the machine's files go; made if it is not there.")
    ] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option(
            "--disk", metavar="NAME=TARGET", help="This disk to a file, block device or NBD URI; may be repeated."
        ),
    ] = None,
    image_format: Annotated[
        Literal["raw", "qcow2"] | None,
        typer.Option("--format", help="Of image files; else .qcow2 files are qcow2, all others raw."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="DISK", help="Only these disks; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="DISK", help="Not these disks; may be repeated.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What the machine is to be called; else its backup id.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files, overwrite devices that have content.")] = False,
) -> None:
    """Restore a whole virtual machine: disks, EFI variables, TPM state, its configuration, and what starts it.

    Every target is looked at before anything is written: one that is too small, mounted, or in use by a QEMU is
    refused. Files take their names when all disks are whole; a restore that fails leaves none, and what --force was to
    replace is still there.
    """
    from agent.vm_restore import RestoreOrder, parse_targets

    if folder is None:
        raise UsageError("restore", snapshot, "the folder for the machine's files is not given", "see --help")
    definers, writes = _definers(folder)
    order = RestoreOrder(
        folder=folder,
        format=image_format,
        targets=parse_targets(disk or ()),
        include=include or (),
        exclude=exclude or (),
        name=name,
        force=force,
        definers=definers,
        writes=writes,
    )
    started = time.monotonic()
    restored = _run(invocation, snapshot, order)
    duration = time.monotonic() - started

    def lines() -> list[str]:
        from core.units import format_duration

        return [*restored.lines(), f"{restored.snapshot}: restored in {format_duration(duration)}"]

    document = {**restored.to_json(), "duration-s": round(duration, 3), "warnings": invocation.warnings}
    invocation.emit(document, lines)


def _definers(folder: Path) -> "tuple[list[Definer], list[Path]]":
    """What makes the machine startable, and the files that this writes."""
    return [], []


def _run(invocation: Invocation, snapshot: str, order: "RestoreOrder") -> "RestoredVm":
    ns = invocation.namespace()
    codec = invocation.reading_key().codec()

    async def work(progress: "Progress") -> "RestoredVm":
        from agent.documents import find_snapshot
        from agent.snapshot_archives import open_snapshot
        from agent.vm_restore import restore_vm
        from repository.archive import open_cache

        async with invocation.repository() as repository, open_cache(_CACHE) as cache:
            found = await find_snapshot(repository, snapshot, ns)
            async with open_snapshot(repository, found, codec, cache, progress) as opened:
                return await restore_vm(opened, order, progress)

    return invocation.run(work, what="restore", where=snapshot)
