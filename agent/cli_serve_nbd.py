"""`fleece serve-nbd`: a disk of a backup for NBD clients."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.invocation import Invocation, command
from core.errors import UsageError

if TYPE_CHECKING:
    from agent.nbd_offers import ServedImage, Serving
    from hypervisor.nbd_address import NbdAddress
    from hypervisor.nbd_endpoint import Endpoint

#: Bytes of decoded chunks that are kept by default.
_CACHE = "128M"


def add_to(application: typer.Typer) -> None:
    """Register the verb."""
    command(
        application,
        "serve-nbd",
        examples="""
fleece serve-nbd vm/100/latest drive-scsi0.img           on a unix socket; prints the URI, and the process that serves
qemu-img convert -p -f raw -O qcow2 "$(fleece serve-nbd vm/100/latest drive-scsi0.img -q)" new.qcow2
fleece serve-nbd vm/100/latest drive-scsi0.img --socket /run/web.nbd --foreground
fleece serve-nbd vm/100/latest drive-scsi0.img --listen 127.0.0.1:10809
fleece serve-nbd vm/100/latest drive-scsi0.img --listen 0.0.0.0:10809 --tls-psk /etc/fleece/nbd.psk
fleece serve-nbd vm/100/latest drive-scsi0.img --overlay                 clients may write; it is lost at the end
fleece serve-nbd vm/100/latest drive-scsi0.img --overlay-file try.qcow2  clients may write; it is kept for the next run
fleece nbd list; fleece nbd disconnect URI
""",
        keys="read",
    )(serve_nbd)


def serve_nbd(
    invocation: Invocation,
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="type/id/time or type/id/latest.")],
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="A disk image of it, drive-scsi0.img.")],
    socket: Annotated[
        Path | None,
        typer.Option("--socket", metavar="PATH", help="Serve at this unix socket; else at one of Fleece's."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option("--listen", metavar="ADDR:PORT", help="Serve over TCP; port 0 is one that is free."),
    ] = None,
    tls_psk: Annotated[
        Path | None,
        typer.Option("--tls-psk", metavar="FILE", help="Clients need TLS and a key of this file (USER:HEX lines)."),
    ] = None,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Clients may write; the backup stays as it is, what they write is lost.")
    ] = False,
    overlay_file: Annotated[
        Path | None,
        typer.Option("--overlay-file", metavar="FILE", help="Clients may write; it is kept in this qcow2 file."),
    ] = None,
    cache: Annotated[
        str, typer.Option("--cache", metavar="SIZE", help="Memory for chunks; what is read in order is read ahead.")
    ] = _CACHE,
    time_limit: Annotated[
        str | None, typer.Option("--time-limit", metavar="TIME", help="End by itself after 30m, 8h, 2d.")
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Serve in this process until a signal comes.")
    ] = False,
) -> None:
    """Serve a disk of a backup to NBD clients, read-only, or with --overlay copy-on-write.

    A process in the background serves it until 'fleece nbd disconnect URI', SIGTERM or the time limit. The backup
    cannot be removed meanwhile. Without --listen only this user (and root) can reach it, with --listen 127.0.0.1:PORT
    only this host; whoever can reach it can read the disk, unless --tls-psk is given. Zeros are told as holes.
    """
    from agent.cli_nbd import hold_here_or_beside, place
    from agent.cli_verify import parse_duration
    from agent.nbd_holder import HoldOrder
    from agent.nbd_offers import backup_offer
    from core.units import parse_size

    if overlay and overlay_file is not None:
        raise UsageError("use", "--overlay", "--overlay-file keeps what is written: one of the two is enough")
    limit = parse_duration(time_limit) if time_limit is not None else None
    if limit is not None and limit < 1:
        raise UsageError("use the time limit", repr(time_limit), "it is shorter than a second")
    records, host = place(invocation)
    at = _endpoint(socket, listen, None if tls_psk is None else tls_psk.absolute(), records.folder)
    if not at.is_local and tls_psk is None:
        invocation.warnings.append(f"whoever reaches {listen} can read the disk; --tls-psk asks for a key")
    if overlay_file is not None:
        overlay_file = overlay_file.absolute()
    offer = backup_offer(
        invocation.repository(),
        snapshot,
        [archive],
        ns=invocation.namespace(),
        codec=invocation.reading_key().codec(),
        cache_size=parse_size(cache),
        serve=_serving(at, overlay, overlay_file),
    )
    writable = overlay or overlay_file is not None
    order = HoldOrder(
        records, host, source={"type": "backup", "snapshot": snapshot}, limit_s=limit, served=True, writable=writable
    )

    def tell(document: dict[str, Any]) -> None:
        invocation.warnings += document["warnings"]
        (disk,) = document["disks"]
        told = {
            "uri": disk["uri"],
            "size": disk["size"],
            "snapshot": document["source"]["snapshot"],
            "name": disk["name"],
            "read-only": disk["read-only"],
            "overlay": None if overlay_file is None else str(overlay_file),
            "pid": document["pid"],
            "expires": document["expires"],
            "warnings": invocation.warnings,
        }
        invocation.emit(told, lambda: _lines(told, quiet=invocation.quiet), cost=False)
        if foreground and not invocation.is_json:
            invocation.show_warnings()  # while there is time to do something about it

    hold_here_or_beside(invocation, offer, order, tell, foreground=foreground, label=f"{snapshot} {archive}")


def _lines(told: dict[str, Any], *, quiet: bool) -> list[str]:
    from core.units import format_size

    if quiet:
        return [told["uri"]]
    mode = "read-only" if told["read-only"] else "copy-on-write"
    return [
        told["uri"],
        f"{told['snapshot']} {told['name']}, {format_size(told['size'])}, {mode}, served by process {told['pid']}; "
        f"'fleece nbd disconnect {told['uri']}' ends it",
    ]


def _endpoint(path: Path | None, listen: str | None, tls_psk: Path | None, folder: Path) -> "Endpoint":
    """Where it is served.

    Raises:
        UsageError: no address and port of TCP, or both that and a unix socket.
    """
    import secrets
    from ipaddress import ip_address

    from hypervisor.nbd_endpoint import Endpoint

    if path is not None and listen is not None:
        raise UsageError("use", "--socket", "--listen is given, too: serve at one of them")
    if listen is None:
        if path is None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = folder / f"served-{secrets.token_hex(4)}"
        return Endpoint(path.absolute(), tls_psk=tls_psk)
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        ip_address(host)
        number = int(port)
        if not colon or not 0 <= number < 65536:
            raise ValueError
    except ValueError:
        raise UsageError("listen at", repr(listen), "it is not ADDRESS:PORT", "for example 127.0.0.1:10809") from None
    return Endpoint(host=host, port=number, tls_psk=tls_psk)


def _serving(at: "Endpoint", overlay: bool, overlay_file: Path | None) -> "Serving":
    def serve(image: "ServedImage") -> "AbstractAsyncContextManager[NbdAddress]":
        from hypervisor.nbd_server import serve_disk, serve_overlay

        if overlay_file is None:
            return serve_disk(image.disk, where=image.where, overlay=overlay, at=at)
        identity = f"{image.snapshot}/{image.name} {image.csum[:16]}"
        return serve_overlay(image.disk, overlay_file, identity, where=image.where, at=at)

    return serve
