"""`fleece nbd`: disks of running virtual machines and of backups as block devices or files of this host."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.cli_vm import (
    AgentOption,
    ConnectOption,
    ExcludeOption,
    FlavourOption,
    IdOption,
    IncludeOption,
    LibvirtOption,
    PauseOption,
    QmpOption,
    ScratchOption,
)
from agent.invocation import Invocation, command
from core.errors import BusyError, FleeceError, NotFoundError, UsageError

if TYPE_CHECKING:
    from agent.nbd_holder import HoldOrder, Offer
    from agent.nbd_records import Holding, Records
    from agent.vm_settings import VmOptions, VmSettings
    from core.progress import Progress
    from hypervisor.nbd_devices import DeviceUse, NbdHost

#: Of the view of a running VM: no backup of it can be made meanwhile, and its scratch image grows.
_VM_LIMIT = "1h"
#: Bytes of decoded chunks that are kept for all disks of a backup.
_CACHE = 128 << 20


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    group = typer.Typer(
        no_args_is_help=True, help="Disks of VMs and backups as block devices or files.", rich_markup_mode=None
    )
    application.add_typer(group, name="nbd")
    command(
        group,
        "connect",
        examples="""
fleece nbd connect vm/100/latest drive-scsi0.img         a disk of a backup as /dev/nbdX
fleece nbd connect vm/100/latest                         all disks of it
fleece nbd connect web --time-limit 30m                  the disks of a running VM as they are now
fleece nbd connect --libvirt web                         those of a domain of libvirt
fleece nbd connect --qmp /run/web.qmp --id web --include scsi0
fleece nbd connect web --changed                         'fleece nbd regions' then tells what changed since the backup
fleece nbd connect vm/100/latest --files /mnt/disks      as files there, without the kernel module nbd
fleece nbd disconnect --all
""",
        keys="read",
    )(connect)
    command(
        group,
        "list",
        repository=False,
        examples="""
fleece nbd list                                          who uses which /dev/nbdX
fleece nbd list --output json | jq -r '.[].disks[].device'
""",
    )(list_)
    command(
        group,
        "disconnect",
        repository=False,
        examples="""
fleece nbd disconnect /dev/nbd0                          and the other disks that were connected together with it
fleece nbd disconnect /mnt/disks/drive-scsi0.img
fleece nbd disconnect nbd://127.0.0.1:10809              what 'fleece serve-nbd' serves
fleece nbd disconnect --all                              everything that Fleece has connected on this host
""",
    )(disconnect)
    command(
        group,
        "regions",
        repository=False,
        examples="""
fleece nbd regions /dev/nbd0                             offset and length of what to read, in bytes, a line each
fleece nbd regions /dev/nbd0 | while read -r offset length; do ...
""",
    )(regions)


def connect(
    invocation: Invocation,
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="VM | SNAPSHOT [ARCHIVE]...", help="A VM of the configuration, or disks of a backup."),
    ] = None,
    qmp: QmpOption = None,
    id: IdOption = None,
    guest_agent: AgentOption = None,
    no_freeze: Annotated[bool, typer.Option("--no-freeze", help="Do not freeze the guest's file systems.")] = False,
    scratch: ScratchOption = None,
    flavour: FlavourOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    libvirt: LibvirtOption = None,
    connect: ConnectOption = None,
    pause: PauseOption = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Of a VM: also find out what changed since its newest backup.")
    ] = False,
    discard: Annotated[
        bool, typer.Option("--discard", help="Of a VM: what was read may be given up by discards (blkdiscard).")
    ] = False,
    files: Annotated[
        Path | None, typer.Option("--files", metavar="FOLDER", help="Files in this folder instead of block devices.")
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option("--time-limit", metavar="TIME", help=f"End by itself after 30m, 8h, 2d (a VM: {_VM_LIMIT})."),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Hold them in this process until a signal comes.")
    ] = False,
) -> None:
    """Show disks of a running VM, as of this instant, or of a backup as read-only block devices of this host.

    A process in the background holds them until 'fleece nbd disconnect', the time limit, or the end of the VM. While a
    VM's disks are held no backup of it can be made; a backup whose disks are held cannot be removed. For block devices
    the kernel module nbd must be loaded, and only root can have them; --files needs neither.
    """
    from agent.cli_verify import parse_duration
    from agent.nbd_holder import HoldOrder
    from agent.vm_settings import VmOptions

    words = what or []
    of_backup = bool(words) and "/" in words[0]
    if of_backup:
        _refuse(
            "of a backup",
            {
                "--qmp": qmp, "--id": id, "--guest-agent": guest_agent, "--no-freeze": no_freeze, "--scratch": scratch,
                "--flavour": flavour, "--include": include, "--exclude": exclude, "--changed": changed,
                "--discard": discard, "--libvirt": libvirt, "--connect": connect, "--pause": pause,
            },
        )  # fmt: skip
    elif len(words) > 1:
        raise UsageError("connect", " ".join(words), "one VM, or a snapshot and its archives, are needed")
    limit = parse_duration(time_limit or _VM_LIMIT) if time_limit or not of_backup else None
    if limit is not None and limit < 1:
        raise UsageError("use the time limit", repr(time_limit), "it is shorter than a second")
    if files is not None:
        files = files.absolute()
        if not files.is_dir():
            raise UsageError("make files in", str(files), "it is no folder")
    records, host = place(invocation)
    settings = (
        None
        if of_backup
        else _settings(
            invocation,
            VmOptions(
                words[0] if words else None,
                qmp,
                id or ("unnamed" if not words and qmp is not None else None),
                guest_agent,
                scratch,
                None,
                flavour,
                include or (),
                exclude or (),
                no_freeze,
                libvirt,
                connect,
                pause=pause,
            ),
        )
    )
    order = HoldOrder(
        records,
        host,
        source={"type": "backup", "snapshot": words[0]} if settings is None else {
            "type": "vm", "vm": settings.label, "qmp": settings.monitor
        },
        files=files,
        discard=discard,
        limit_s=limit,
        scratch=None if settings is None else settings.scratch_folder,
    )  # fmt: skip
    if settings is None:
        offer = _backup(invocation, words[0], words[1:])
    else:
        offer = _vm(invocation, settings, changed=changed, discard=discard)
    _start(invocation, offer, order, foreground=foreground)


def _refuse(whose: str, given: dict[str, object]) -> None:
    for option, value in given.items():
        if value:
            raise UsageError("use", option, f"it means nothing for the disks {whose}")


def place(invocation: Invocation) -> "tuple[Records, NbdHost]":
    """Where it is written down who holds what, and the devices of this host."""
    from agent.nbd_records import Records
    from agent.places import private_run_dir
    from hypervisor.nbd_devices import NbdHost

    folder = private_run_dir() / "nbd"
    section = invocation.config.nbd
    reservations = section.reservations or folder / "reserved"
    return Records(folder), NbdHost(reservations, section.lock or Path(f"{reservations}.lock"))


def _settings(invocation: Invocation, options: "VmOptions") -> "VmSettings":
    from agent.vm_settings import resolve_vm

    settings = resolve_vm(invocation.config, options)
    if settings.monitor is None:
        raise UsageError(
            "connect the disks of", settings.label, "no QMP socket is named", "give --qmp SOCKET or --libvirt DOMAIN"
        )
    return settings


def _vm(
    invocation: Invocation, settings: "VmSettings", *, changed: bool, discard: bool
) -> "AbstractAsyncContextManager[Offer]":
    from agent.nbd_offers import vm_offer

    if not changed:
        return vm_offer(settings, discard=discard)
    if settings.id == "unnamed":
        raise UsageError("find out what changed of", settings.label, "its backups are not known", "give --id ID")
    section = settings.section
    group = settings.group(invocation.namespace(section.ns, repository=section.repository))
    return vm_offer(settings, changed=(invocation.repository(section.repository), group), discard=discard)


def _backup(invocation: Invocation, snapshot: str, archives: list[str]) -> "AbstractAsyncContextManager[Offer]":
    from agent.nbd_offers import backup_offer

    return backup_offer(
        invocation.repository(),
        snapshot,
        archives,
        ns=invocation.namespace(),
        codec=invocation.reading_key().codec(),
        cache_size=_CACHE,
    )


def _start(
    invocation: Invocation, offer: "AbstractAsyncContextManager[Offer]", order: "HoldOrder", *, foreground: bool
) -> None:
    def tell(document: dict[str, Any]) -> None:
        invocation.warnings += document["warnings"]
        invocation.emit(document, lambda: _connected_lines(document), cost=False)

    label = str(order.source.get("vm") or order.source["snapshot"])
    hold_here_or_beside(invocation, offer, order, tell, foreground=foreground, label=label)


def hold_here_or_beside(
    invocation: Invocation,
    offer: "AbstractAsyncContextManager[Offer]",
    order: "HoldOrder",
    tell: Callable[[dict[str, Any]], None],
    *,
    foreground: bool,
    label: str,
) -> None:
    """Hold the disks, here or in a process of its own; `tell` is called here with the document of `hold`.

    Raises:
        FleeceError: they could not be set up.
    """
    import trio

    from agent.nbd_holder import hold
    from core import background
    from core.background import Background
    from core.nursery import one_error

    def work(ready: background.Ready) -> None:
        with one_error():
            trio.run(hold, offer, order, ready)

    if foreground:
        work(tell)
        return
    child, document = background.start(work, Background("connect", label, "fleece nbd", FleeceError))
    try:
        tell(document)
    except BaseException:
        background.end(child)  # who is told of a failure is not to find a device
        raise


def _connected_lines(document: dict[str, Any]) -> list[str]:
    from core.units import format_size

    lines = []
    for disk in document["disks"]:
        changed = "" if disk["changed"] is None else f", {format_size(disk['changed'])} changed"
        lines.append(f"{disk['device'] or disk['file']}: {disk['name']}, {format_size(disk['size'])}{changed}")
    end = "" if document["expires"] is None else f" until {_local(document['expires'])}"
    return [*lines, f"held by process {document['pid']}{end}; 'fleece nbd disconnect' ends it"]


def _local(seconds: float) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def list_(invocation: Invocation) -> None:
    """Show which block devices /dev/nbdX are in use, and what Fleece holds as devices or files."""
    from agent.nbd_records import others

    records, host = place(invocation)
    holdings = records.load()
    strangers = others(host, holdings)
    document = [holding.to_json() for holding in holdings] + [_stranger(use) for use in strangers]
    invocation.emit(document, lambda: _list_lines(document))


def _stranger(use: "DeviceUse") -> dict[str, Any]:
    disk = {
        "name": None,
        "device": str(use.path),
        "file": None,
        "uri": None,
        "size": use.size,
        "read-only": use.read_only,
    }
    return {
        "state": "other",
        "source": {"type": "other"},
        "pid": use.task,
        "since": None,
        "expires": None,
        "disks": [{**disk, "changed": None}],
    }


_NOT_READY = {"device": None, "file": None, "uri": None, "name": "not ready", "size": 0}


def _list_lines(document: list[dict[str, Any]]) -> list[str]:
    from agent.documents import table
    from core.units import format_size

    rows = []
    for one in document:
        source = one["source"]
        label = {"vm": f"VM {source.get('vm')}", "backup": str(source.get("snapshot"))}.get(
            source["type"], "not Fleece's"
        )
        state = "" if one["state"] != "left" else "its process was killed"
        if one["expires"] is not None and one["state"] == "held":
            state = f"until {_local(one['expires'])}"
        for disk in one["disks"] or [_NOT_READY]:
            rows.append(
                (disk["device"] or disk["file"] or disk["uri"] or "-", label, disk["name"] or "",
                 format_size(disk["size"]), str(one["pid"]), state)
            )  # fmt: skip
    if not rows:
        return ["Nothing is connected."]
    return list(table(("device", "of", "disk", "size", "process", ""), rows, right=(3, 4)))


def disconnect(
    invocation: Invocation,
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="DEVICE|FILE|URI...", help="As 'list' shows them.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything that Fleece has connected.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also what is mounted or used otherwise.")] = False,
) -> None:
    """End what 'nbd connect' and 'serve-nbd' began: devices or files, view or server, and the process that holds them.

    Disks that were connected together are disconnected together. What killed processes have left is removed. Devices
    that others than Fleece have connected are never touched.
    """
    from agent.nbd_records import end_holder, in_use

    if bool(paths) is everything:
        raise UsageError("disconnect", " ".join(paths or []), "either devices or --all are needed")
    records, host = place(invocation)
    holdings = records.load()
    chosen = holdings if everything else _chosen(holdings, paths or [], host)
    for holding in chosen:
        if (users := in_use(host, holding)) and not force:
            raise BusyError("disconnect", holding.label, "; ".join(users), "unmount it first, or give --force")

    async def work(progress: "Progress") -> list[str]:
        done = []
        for holding in chosen:
            for words in await end_holder(records, holding, host):
                progress.log(words)
            done += [disk.path for disk in holding.disks if disk.path]
        return done

    done = invocation.run(work, what="disconnect", where=", ".join(paths or ["everything"]))
    left = [holding for holding in records.load() if (holding.pid, holding.start_time) in _names(chosen)]
    if left:
        raise FleeceError(
            "disconnect", ", ".join(holding.label for holding in left), "it could not be taken away completely",
            "'fleece nbd list' shows what is left; try again",
        )  # fmt: skip
    invocation.emit(
        {"disconnected": done}, lambda: [f"disconnected {path}" for path in done] or ["Nothing was connected."]
    )


def _names(holdings: "list[Holding]") -> set[tuple[int, int]]:
    return {(holding.pid, holding.start_time) for holding in holdings}


def _chosen(holdings: "list[Holding]", paths: list[str], host: "NbdHost") -> "list[Holding]":
    """The holdings that have the devices or files `paths`, each once.

    Raises:
        NotFoundError, BusyError: one of them is nobody's, or not Fleece's.
    """
    from hypervisor.nbd_devices import device_number

    found: list[Holding] = []
    for path in paths:
        number = device_number(path)
        wanted = f"/dev/nbd{number}" if number is not None else path if "://" in path else str(Path(path).absolute())
        having = [holding for holding in holdings if any(disk.path == wanted for disk in holding.disks)]
        if not having:
            if number is not None and host.use_of(number) is not None:
                raise BusyError("disconnect", path, "Fleece has not connected it", "its user has to do that")
            raise NotFoundError("disconnect", path, "it is not connected", "'fleece nbd list' shows what is")
        found += [holding for holding in having if holding not in found]
    return found


def regions(
    invocation: Invocation,
    path: Annotated[str, typer.Argument(metavar="DEVICE|FILE", help="As 'list' shows it.")],
) -> None:
    """Tell which parts of a disk are to be read: what changed since the newest backup, if --changed was given.

    Of a disk of Proxmox VE's flavour nothing else can be read then.
    """
    records, host = place(invocation)
    (holding, *_) = _chosen(records.load(), [path], host)
    wanted = next(
        disk.path for disk in holding.disks if disk.path in (path, str(Path(path).absolute()), f"/dev/{path}")
    )
    found = records.regions(holding, wanted)
    document = [{"offset": offset, "length": length} for offset, length in found]
    invocation.emit(document, lambda: [f"{offset} {length}" for offset, length in found])
