"""`fleece vm`: live backup of virtual machines, what the next one would read, and cleaning up."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agent import cli_vm_restore
from agent.cli_backup import (
    BackupTimeOption,
    BandwidthOption,
    DryRunOption,
    LockWaitOption,
    NotesOption,
    OwnerOption,
    parse_rate,
    show_plan,
    show_report,
)
from agent.invocation import Invocation, command
from core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.vm_settings import VmSettings
    from core.progress import Progress
    from hypervisor.discovery import LeftOut
    from hypervisor.vm import DiskPreview
    from repository.planning import DiskPlan
    from repository.report import BackupReport

VmArgument = Annotated[str | None, typer.Argument(metavar="VM", help="A virtual machine of the configuration.")]
QmpOption = Annotated[Path | None, typer.Option("--qmp", metavar="SOCKET", help="QMP socket of its QEMU.")]
LibvirtOption = Annotated[
    str | None, typer.Option("--libvirt", metavar="DOMAIN", help="A domain of libvirt, by name or UUID.")
]
ConnectOption = Annotated[
    str | None,
    typer.Option("--connect", metavar="URI", help="Which libvirt: qemu:///system (for root), qemu:///session."),
]
IdOption = Annotated[
    str | None, typer.Option("--id", "--backup-id", metavar="ID", help="Backup id; the group is vm/ID.")
]
AgentOption = Annotated[
    Path | None, typer.Option("--guest-agent", metavar="SOCKET", help="Socket of the guest agent, for a freeze.")
]
FreezeMountOption = Annotated[
    list[str] | None,
    typer.Option(
        "--freeze-mount", metavar="PATH", help="Freeze only what is mounted there in the guest; may be repeated."
    ),
]
PauseOption = Annotated[
    Literal["never", "without-agent", "always"] | None,
    typer.Option("--pause", help="Pause the guest for the instant: never, if it cannot be frozen, or always."),
]
ScratchOption = Annotated[
    Path | None,
    typer.Option("--scratch", metavar="FOLDER", help="Where QEMU keeps what the guest overwrites meanwhile."),
]
BitmapOption = Annotated[
    Literal["persistent", "transient", "none"] | None,
    typer.Option("--bitmap", help="Keep dirty bitmaps in the images, in memory only, or not at all."),
]
FlavourOption = Annotated[
    Literal["auto", "stock", "proxmox"] | None,
    typer.Option("--flavour", help="Who makes the frozen view: any QEMU's commands, Proxmox VE's, or as QEMU offers."),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="DISK", help="Only these disks; may be repeated, also patterns."),
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="DISK", help="Not these disks; may be repeated, also patterns.")
]


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    group = typer.Typer(no_args_is_help=True, help="Back up virtual machines while they run.", rich_markup_mode=None)
    application.add_typer(group, name="vm")
    command(
        group,
        "backup",
        examples="""
fleece vm backup web                                     a VM of the configuration
fleece vm backup --qmp /run/web.qmp --id web
fleece vm backup --libvirt web                           a domain of libvirt, running or not
fleece vm backup web --dry-run                           what would be read, and why
fleece vm backup web --exclude 'swap*' --bwlimit 200M
fleece vm backup --qmp /run/web.qmp --id web --guest-agent /run/web.qga --scratch /scratch
fleece vm backup web --keyfile /etc/fleece/backup.key    encrypted on this host
""",
        keys="write",
    )(backup)
    command(
        group,
        "show",
        examples="""
fleece vm show web
fleece vm show web --flavour stock                       as if its QEMU had no commands of Proxmox VE
fleece vm show --libvirt web
fleece vm show --qmp /run/web.qmp --id web --output json | jq '.disks[].next'
""",
        keys="write",
    )(show)
    command(
        group,
        "cleanup",
        repository=False,
        examples="""
fleece vm cleanup web                                    what a killed backup left in QEMU and on this host
fleece vm cleanup --libvirt web
fleece vm cleanup --qmp /run/web.qmp --id web --bitmaps  also Fleece's dirty bitmaps: the next backup reads everything
""",
    )(cleanup)
    cli_vm_restore.add_to(group)


def backup(
    invocation: Invocation,
    vm: VmArgument = None,
    qmp: QmpOption = None,
    id: IdOption = None,
    guest_agent: AgentOption = None,
    no_freeze: Annotated[bool, typer.Option("--no-freeze", help="Do not freeze the guest's file systems.")] = False,
    freeze_mount: FreezeMountOption = None,
    pause: PauseOption = None,
    scratch: ScratchOption = None,
    bitmap: BitmapOption = None,
    flavour: FlavourOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    backup_time: BackupTimeOption = None,
    owner: OwnerOption = None,
    notes: NotesOption = None,
    bwlimit: BandwidthOption = None,
    lock_wait: LockWaitOption = 0.0,
    dry_run: DryRunOption = False,
    libvirt: LibvirtOption = None,
    connect: ConnectOption = None,
) -> None:
    """Back up all disks of a virtual machine as of one instant, without stopping it.

    What changed since the last backup is known from dirty bitmaps in QEMU, so that only that is read; the report says
    why if everything was. EFI variables, QEMU's command line (secrets masked) and configured files go along. A VM of
    the configuration, or of libvirt, that does not run is backed up by the paths of its disks. Of a domain of libvirt
    its XML (without passwords) and the state of its TPM go along as well.
    """
    from agent.sessions import parse_backup_time
    from agent.vm_settings import VmOptions, resolve_vm

    settings = resolve_vm(
        invocation.config,
        VmOptions(
            vm,
            qmp,
            id,
            guest_agent,
            scratch,
            bitmap,
            flavour,
            include or (),
            exclude or (),
            no_freeze,
            libvirt,
            connect,
            freeze_mount or (),
            pause,
        ),
    )
    section = settings.section
    group = settings.group(invocation.namespace(section.ns, repository=section.repository))
    group_owner = invocation.owner(owner, section.owner, repository=section.repository)
    rate = parse_rate(bwlimit, section.bwlimit, invocation.config.bwlimit)
    ctime = parse_backup_time(backup_time) if backup_time is not None else None
    keys = invocation.backup_keys(section, repository=section.repository)

    if dry_run:

        async def plan(progress: "Progress") -> "list[DiskPlan]":
            from agent.vm_backup import plan_vm

            async with invocation.repository(section.repository) as repository:
                return await plan_vm(settings, repository, group, keys.codec, progress)

        show_plan(invocation, group, invocation.run(plan, what="plan the backup of", where=str(group)))
        return

    async def work(progress: "Progress") -> "BackupReport":
        from agent.backup_runs import SnapshotOptions, vm_into
        from agent.sessions import until_listed

        snapshot = SnapshotOptions(group, group_owner, keys, ctime, rate, notes, lock_wait)
        with until_listed(progress) as listed:
            async with invocation.repository(section.repository) as repository:
                return await vm_into(repository, settings, snapshot, progress, on_listed=listed)

    show_report(invocation, invocation.run(work, what="back up", where=str(group)))


def show(
    invocation: Invocation,
    vm: VmArgument = None,
    qmp: QmpOption = None,
    id: IdOption = None,
    bitmap: BitmapOption = None,
    flavour: FlavourOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    libvirt: LibvirtOption = None,
    connect: ConnectOption = None,
) -> None:
    """Show the disks of a VM, and what the next backup would read of each, and why. Changes nothing."""
    from agent.vm_settings import VmOptions, resolve_vm

    settings = resolve_vm(
        invocation.config,
        VmOptions(
            vm,
            qmp,
            id,
            bitmap=bitmap,
            flavour=flavour,
            include=include or (),
            exclude=exclude or (),
            libvirt=libvirt,
            connect=connect,
        ),
    )
    section = settings.section
    try:
        invocation.repository_spec(section.repository)
        known = True
    except UsageError:
        known = False
    codec = invocation.backup_keys(section, repository=section.repository).codec

    async def work(progress: "Progress") -> "tuple[list[DiskPreview], list[LeftOut], str | None, str | None]":
        from contextlib import AsyncExitStack

        from agent.vm_backup import is_running, preview_running, preview_stopped, tpm_left_out, vm_flavour
        from datastore.names import ROOT
        from hypervisor.qmp import connect as connect_qmp

        running = await is_running(settings)
        looked_up = await settings.looked_up()
        if not running:
            return await preview_stopped(looked_up), [], None, None
        ns = invocation.namespace(section.ns, repository=section.repository) if known else ROOT
        async with AsyncExitStack() as stack:
            repository = None
            if known:
                repository = await stack.enter_async_context(invocation.repository(section.repository))
            qmp_session = await stack.enter_async_context(connect_qmp(str(looked_up.monitor)))
            kind = await vm_flavour(qmp_session, looked_up)
            found = await kind.survey(qmp_session, looked_up.selection)
            group = looked_up.group(ns)
            disks = await preview_running(qmp_session, looked_up, repository, group, codec, found.disks, flavour=kind)
            left_out = [*found.left_out, *await tpm_left_out(qmp_session, looked_up, kind.name)]
            return disks, left_out, ".".join(map(str, qmp_session.version)), kind.name.value

    disks, left_out, version, kind = invocation.run(work, what="show", where=settings.label)
    document: dict[str, Any] = {
        "disks": [
            {
                "name": disk.name,
                "device": disk.device,
                "node": disk.node or None,
                "size": disk.size,
                "bitmap": disk.bitmap,
                "next": {"mode": disk.mode, "reason": disk.reason or None, "bytes": disk.bytes},
                "bitmaps": [
                    {"name": str(one.name), "since": one.name.id, "dirty": one.count, "recording": one.recording}
                    for one in disk.bitmaps
                ],
            }
            for disk in disks
        ],
        "left-out": [{"device": left.device, "reason": left.reason} for left in left_out],
        "qemu": version,
        "flavour": kind,
    }
    state = "does not run" if version is None else f"QEMU {version}, flavour {kind}"
    invocation.emit(document, lambda: _show_lines(settings, disks, left_out, state))


def _show_lines(
    settings: "VmSettings", disks: "Sequence[DiskPreview]", left_out: "Sequence[LeftOut]", state: str
) -> list[str]:
    from agent.documents import table
    from core.units import format_size

    rows = [
        (
            disk.name,
            disk.device,
            disk.node,
            format_size(disk.size),
            f"{disk.mode}, {format_size(disk.bytes)}" + (f" ({disk.reason})" if disk.reason else ""),
        )
        for disk in disks
    ]
    return [
        f"{settings.label}: {state}",
        *table(("disk", "device", "node", "size", "next backup reads"), rows, right=(3,)),
        *(f"left out: {left.device} ({left.reason})" for left in left_out),
    ]


def cleanup(
    invocation: Invocation,
    vm: VmArgument = None,
    qmp: QmpOption = None,
    id: IdOption = None,
    guest_agent: AgentOption = None,
    scratch: ScratchOption = None,
    bitmaps: Annotated[bool, typer.Option("--bitmaps", help="Also remove Fleece's dirty bitmaps.")] = False,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--bitmaps-older-than",
            metavar="AGE",
            help="Remove dirty bitmaps of backups older than that, 30d.",
        ),
    ] = None,
    libvirt: LibvirtOption = None,
    connect: ConnectOption = None,
) -> None:
    """Remove what a killed backup left in a VM and on this host. The next backup does the same by itself."""
    import time

    from agent.cli_verify import parse_duration
    from agent.vm_settings import VmOptions, resolve_vm

    before = None if older_than is None else int(time.time() - parse_duration(older_than))
    # What the VM is called does not matter here: --qmp alone says which one.
    settings = resolve_vm(
        invocation.config,
        VmOptions(
            vm,
            qmp,
            id or (None if vm is not None or (qmp is None and libvirt is None) else "unnamed"),
            guest_agent,
            scratch,
            libvirt=libvirt,
            connect=connect,
        ),
    )

    async def work(progress: "Progress") -> list[str]:
        from agent.places import private_run_dir
        from agent.vm_backup import is_running
        from hypervisor.state import clean_dead
        from hypervisor.vm import cleanup as clean_up

        if not await is_running(settings):
            return await clean_dead(private_run_dir())
        return await clean_up(
            str(settings.monitor),
            run_dir=private_run_dir(),
            scratch=settings.scratch_folder,
            guest_agent=settings.guest_agent,
            remove_bitmaps=bitmaps or before is not None,
            before=None if bitmaps else before,
        )

    done = invocation.run(work, what="clean up", where=settings.label)
    invocation.emit({"done": done}, lambda: done or ["nothing was left"])
