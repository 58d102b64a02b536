"""`fleece vm restore`: a whole virtual machine out of a snapshot."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agent.cli_vm_libvirt import (
    ConnectOption,
    LibvirtFlag,
    LibvirtOptions,
    NewIdentityFlag,
    StartFlag,
    TrustFlag,
)
from agent.invocation import Invocation, command
from core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from agent.live_restore import LiveOptions
    from agent.live_state import LiveState
    from agent.snapshot_archives import OpenSnapshot
    from agent.vm_restore import Definer, RestoredVm, RestoreOrder
    from agent.vm_rollback import RolledBack
    from agent.vm_script import ScriptOptions
    from core.progress import Progress
    from datastore.names import Namespace

#: Bytes of decoded chunks that are kept: a restore reads each once.
_CACHE = 32 << 20
#: The same where a guest reads them as it likes.
_LIVE_CACHE = 128 << 20


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
fleece vm restore vm/web/latest /var/lib/vm/web --live   the machine runs at once, while its disks come in
fleece vm restore vm/web/latest /var/lib/vm/web --libvirt --start     defined in libvirt again, and started
fleece vm restore vm/web/latest /srv/web2 --libvirt --name web2       beside the one that is there
fleece vm restore vm/web/latest --rollback --vm web      the disks of the running VM as they were; it is reset
fleece vm restore --resume /var/lib/vm/web               goes on after a crash or a restart of the host
""",
        keys="read",
    )(restore)


def restore(
    invocation: Invocation,
    snapshot: Annotated[str | None, typer.Argument(metavar="SNAPSHOT", help="type/id/time or type/id/latest.")] = None,
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
    script: Annotated[
        Path | None, typer.Option("--script", metavar="FILE", help="The script that starts it; else FOLDER/start.sh.")
    ] = None,
    no_script: Annotated[bool, typer.Option("--no-script", help="Without a script.")] = False,
    network: Annotated[
        str | None,
        typer.Option("--network", metavar="user|BRIDGE", help="Network cards of the script's machine; else none."),
    ] = None,
    firmware: Annotated[
        Path | None, typer.Option("--firmware", metavar="FILE", help="EFI firmware; else the one that fits.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files, overwrite devices; roll back to what failed verification.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Start the machine at once; its disks come in while it runs.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FOLDER", help="Go on with the live restore in this folder.")
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="With --live, --resume: return when the disks are whole.")
    ] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Write to the disks of the running VM: what differs; it is reset.")
    ] = False,
    vm: Annotated[
        str | None, typer.Option("--vm", metavar="VM", help="With --rollback: a VM of the configuration.")
    ] = None,
    qmp: Annotated[
        Path | None, typer.Option("--qmp", metavar="SOCKET", help="With --rollback: QMP socket of its QEMU.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --rollback: do not ask.")] = False,
    qemu: Annotated[
        str | None, typer.Option("--qemu", metavar="PROGRAM", help="With --live: the QEMU that runs it.")
    ] = None,
    accel: Annotated[
        list[str] | None,
        typer.Option("--accel", metavar="NAME", help="With --live: kvm or tcg, not whichever works; may be repeated."),
    ] = None,
    qemu_option: Annotated[
        list[str] | None,
        typer.Option("--qemu-option", metavar="WORD", help="With --live: a word more for QEMU; may be repeated."),
    ] = None,
    libvirt: LibvirtFlag = False,
    connect: ConnectOption = None,
    start: StartFlag = False,
    new_identity: NewIdentityFlag = False,
    trust: TrustFlag = False,
) -> None:
    """Restore a whole virtual machine: disks, EFI variables, TPM state, its configuration, and what starts it.

    Every target is looked at before anything is written: one that is too small, mounted, or in use by a QEMU is
    refused. Files take their names when all disks are whole; a restore that fails leaves none, and what --force was to
    replace is still there.
    """
    from agent.vm_restore import RestoreOrder, parse_targets
    from agent.vm_script import ScriptOptions

    if resume is not None:
        if snapshot is not None or live:
            raise UsageError("use", "--resume", "it goes on with what was begun: no snapshot, no --live")
        _resume(invocation, resume.absolute(), foreground=foreground)
        return
    if snapshot is None:
        raise UsageError("restore", "a virtual machine", "no snapshot is given", "see --help")
    if rollback:
        given = {"FOLDER": folder, "--disk": disk, "--format": image_format, "--live": live, "--libvirt": libvirt}
        for option, value in given.items():
            if value:
                raise UsageError("use", option, "--rollback writes to the disks that the VM has")
        _roll_back(invocation, snapshot, vm, qmp, include or (), exclude or (), yes=yes, force=force)
        return
    if vm is not None or qmp is not None or yes:
        raise UsageError("use", "--vm, --qmp and --yes", "they are for --rollback")
    if not live and (foreground or qemu or accel or qemu_option):
        raise UsageError("use", "--foreground, --qemu, --accel and --qemu-option", "they are for --live")
    if folder is None:
        raise UsageError("restore", snapshot, "the folder for the machine's files is not given", "see --help")
    script_options = ScriptOptions(path=script, network=network, firmware=firmware)
    domain = LibvirtOptions(libvirt, connect, start, new_identity, trust).definer(name, force=force)
    if domain is not None and live:
        raise UsageError("use", "--libvirt", "not with --live: libvirt would not know of the disks that come in")
    definers, writes = _definers(folder, script_options, script=not no_script and domain is None)
    if domain is not None:
        definers.append(domain)
    order = RestoreOrder(
        folder=folder,
        format=image_format,
        targets=parse_targets(disk or ()),
        include=include or (),
        exclude=exclude or (),
        name=name,
        force=force,
        checks=[] if domain is None else [domain.check],
        definers=definers,
        writes=writes,
    )
    if live:
        from agent.live_restore import LiveOptions

        options = LiveOptions(
            script=script_options,
            with_script=not no_script,
            program=qemu if qemu is None or "/" not in qemu else str(Path(qemu).absolute()),
            accel=tuple(accel or ("kvm", "tcg")),
            extra=tuple(qemu_option or ()),
        )
        _live(invocation, snapshot, order, options, foreground=foreground)
        return
    started = time.monotonic()
    restored = _run(invocation, snapshot, order)
    duration = time.monotonic() - started

    def lines() -> list[str]:
        from core.units import format_duration

        return [*restored.lines(), f"{restored.snapshot}: restored in {format_duration(duration)}"]

    document = {**restored.to_json(), "duration-s": round(duration, 3), "warnings": invocation.warnings}
    invocation.emit(document, lines)


def _definers(folder: Path, options: "ScriptOptions", *, script: bool) -> "tuple[list[Definer], list[Path]]":
    """What makes the machine startable, and the files that this writes."""
    from agent.vm_script import script_writes, write_script

    definers: list[Definer] = []
    writes: list[Path] = []
    if script:
        definers.append(lambda vm, progress: write_script(vm, options, progress))
        writes += script_writes(folder, options)
    return definers, writes


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


# -- live -------------------------------------------------------------------------------------------------------------


def _live(
    invocation: Invocation, snapshot: str, order: "RestoreOrder", options: "LiveOptions", *, foreground: bool
) -> None:
    async def begin(opened: "OpenSnapshot", progress: "Progress") -> "LiveState":
        from agent.live_restore import prepare

        return await prepare(opened, order, options, progress)

    _stream(invocation, snapshot, invocation.namespace(), begin, order.folder.absolute(), foreground=foreground)


def _resume(invocation: Invocation, folder: Path, *, foreground: bool) -> None:
    from agent.live_state import LiveState
    from datastore.names import Namespace

    state = LiveState.load(folder)

    async def begin(opened: "OpenSnapshot", progress: "Progress") -> "LiveState":
        return LiveState.load(folder)  # who had the folder until now may have come further

    _stream(invocation, state.snapshot, Namespace.parse(state.ns), begin, folder, foreground=foreground)


def _stream(
    invocation: Invocation,
    snapshot: str,
    ns: "Namespace",
    begin: "Callable[[OpenSnapshot, Progress], Awaitable[LiveState]]",
    folder: Path,
    *,
    foreground: bool,
) -> None:
    """Start the machine, and fill its disks here or in a process of its own."""
    codec = invocation.reading_key().codec()
    began = time.monotonic()

    async def work(progress: "Progress", started: "Callable[[dict[str, Any]], None]") -> "RestoredVm":
        from agent.documents import find_snapshot
        from agent.live_restore import held, run
        from agent.snapshot_archives import open_snapshot
        from repository.archive import open_cache

        async with invocation.repository() as repository, open_cache(_LIVE_CACHE) as cache:
            found = await find_snapshot(repository, snapshot, ns)
            async with open_snapshot(repository, found, codec, cache, progress) as opened:
                with held(folder):
                    state = await begin(opened, progress)
                    return await run(opened, state, progress, started)

    def started_lines(told: "dict[str, Any]") -> list[str]:
        verb = "runs on" if told["was-running"] else "runs"
        return [
            f"{told['name']} {verb}; its disks come in from {told['snapshot']}, by process {told['pid']}",
            f"if that is lost: fleece vm restore --resume {told['folder']}",
        ]

    if foreground:

        def say(told: "dict[str, Any]") -> None:
            for line in started_lines(told):
                invocation.say(line)

        restored = invocation.run(lambda progress: work(progress, say), what="restore", where=snapshot)
        duration = round(time.monotonic() - began, 3)
        document = {**restored.to_json(), "duration-s": duration, "warnings": invocation.warnings}
        invocation.emit(document, lambda: [*restored.lines(), f"{restored.snapshot}: all disks are whole"])
        return
    _, told = _beside(work, snapshot, folder)
    invocation.warnings += told.pop("warnings")
    told["warnings"] = invocation.warnings
    invocation.emit(told, lambda: started_lines(told), cost=False)


def _beside(
    work: "Callable[[Progress, Callable[[dict[str, Any]], None]], Awaitable[RestoredVm]]", snapshot: str, folder: Path
) -> "tuple[int, dict[str, Any]]":
    """Do `work` in a process of its own; returns its id and what `started` was told."""
    import logging
    from contextlib import suppress

    import trio

    from agent.live_restore import RESTORE_LOG_NAME
    from core import background
    from core.background import Background
    from core.errors import FleeceError
    from core.nursery import one_error
    from core.progress import Progress

    class Logged(Progress):
        """There is nobody else to tell when the command has returned."""

        def log(self, text: str) -> None:
            logging.getLogger(__name__).warning("%s", text)

        def warn(self, text: str) -> None:
            super().warn(text)
            self.log(text)

    def main(ready: background.Ready) -> None:
        progress = Logged()

        def started(told: "dict[str, Any]") -> None:
            with suppress(OSError):  # a full disk is no reason to stop
                handler = logging.FileHandler(folder / RESTORE_LOG_NAME)
                handler.setFormatter(logging.Formatter("%(asctime)s [%(process)d] %(message)s"))
                logging.getLogger().addHandler(handler)
            ready({**told, "warnings": list(progress.warnings)})

        with one_error():
            trio.run(_until_a_signal, lambda: work(progress, started))

    return background.start(main, Background("restore", snapshot, "fleece vm restore", FleeceError))


async def _until_a_signal(work: "Callable[[], Awaitable[Any]]") -> None:
    """Do `work`; a signal ends it cleanly."""
    from agent.nbd_holder import heard
    from core.nursery import open_nursery

    with heard() as signals:
        async with open_nursery() as nursery:

            async def listen() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            await work()
            nursery.cancel_scope.cancel()


# -- rollback ---------------------------------------------------------------------------------------------------------


def _roll_back(
    invocation: Invocation,
    snapshot: str,
    vm: str | None,
    qmp: Path | None,
    include: "Sequence[str]",
    exclude: "Sequence[str]",
    *,
    yes: bool,
    force: bool,
) -> None:
    import sys

    from agent.documents import parse_selection
    from agent.vm_settings import VmOptions, resolve_vm

    if vm is None and qmp is None:
        raise UsageError("roll back", snapshot, "it is not said of which VM", "give --vm VM or --qmp SOCKET")
    # Of a VM without a section nobody knows more than its socket.
    settings = resolve_vm(invocation.config, VmOptions(vm, qmp, None if vm is not None else "rollback"))
    label = settings.label if vm is not None else f"the VM at {qmp}"
    ns = invocation.namespace(settings.section.ns, repository=settings.section.repository)
    parse_selection(snapshot, ns)
    codec = invocation.reading_key().codec()
    if not yes:
        text = f"{label} is stopped and reset, and all that its disks got since {snapshot} is lost."
        if not sys.stdin.isatty():
            raise UsageError("roll back", label, text, "give --yes")
        typer.confirm(f"{text} Go on?", abort=True, err=True)
    began = time.monotonic()

    async def work(progress: "Progress") -> "tuple[str, list[RolledBack], bool]":
        from agent.documents import find_snapshot
        from agent.snapshot_archives import open_snapshot
        from agent.vm_rollback import roll_back
        from repository.archive import open_cache

        async with invocation.repository(settings.section.repository) as repository, open_cache(_CACHE) as cache:
            found = await find_snapshot(repository, snapshot, ns)
            async with open_snapshot(repository, found, codec, cache, progress) as opened:
                disks, runs = await roll_back(
                    settings, repository, opened, include, exclude, progress, unverified=force
                )
                return str(found), disks, runs

    named, disks, runs = invocation.run(work, what="roll back", where=label)
    document = {
        "snapshot": named,
        "vm": label,
        "disks": [one.to_json() for one in disks],
        "running": runs,
        "duration-s": round(time.monotonic() - began, 3),
        "warnings": invocation.warnings,
    }
    end = "runs again, from its start" if runs else "does not run"
    invocation.emit(document, lambda: [*(one.line() for one in disks), f"{label} {end}"])
