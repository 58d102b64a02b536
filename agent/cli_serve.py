"""`fleece serve`: the datastores of this host for PBS's clients and other hosts."""

from pathlib import Path
from typing import Annotated

import typer

from agent.invocation import Invocation, command, to_stderr
from core.errors import UsageError

ListenOption = Annotated[
    str,
    typer.Option("--listen", metavar="ADDR:PORT", help="Where to listen; ':8007' is every address, IPv6 in brackets."),
]
CertOption = Annotated[
    Path | None,
    typer.Option("--cert", metavar="FILE", help="A PEM certificate (chain) in place of the server's own."),
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", help="Its private key, PEM, without passphrase.")
]
DrainOption = Annotated[
    float, typer.Option("--drain", metavar="SECONDS", min=0, help="How long sessions may go on after SIGTERM.")
]

VerifyNewOption = Annotated[
    list[str] | None,
    typer.Option(
        "--verify-new", metavar="STORE", help="Verify what clients back up to STORE at once; may be repeated."
    ),
]


def add_to(application: typer.Typer) -> None:
    """Register the verb."""
    command(
        application,
        "serve",
        repository=False,
        examples="""
fleece serve --listen :8007                             every datastore of this host, own certificate
fleece serve --listen 192.0.2.1:8007 --cert /etc/ssl/backup.pem --key /etc/ssl/backup.key
fleece user add backup@pbs && fleece acl update /datastore/main backup@pbs DatastoreBackup
kill -HUP $(pidof fleece)                               after the certificate was renewed
""",
    )(serve)


def parse_listen(text: str) -> tuple[str, int]:
    """Address (empty: all) and port of `ADDR:PORT`.

    Raises:
        UsageError: another form.
    """
    address, colon, port = text.rpartition(":")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    elif ":" in address:
        colon = ""  # an IPv6 address without brackets
    if not colon or not port.isdigit() or not 0 <= int(port) <= 65535:
        hint = "for example 192.0.2.1:8007, [::1]:8007, or :8007 for every address"
        raise UsageError("listen at", repr(text), "it is not of the form ADDR:PORT", hint)
    return address, int(port)


def serve(
    invocation: Invocation,
    listen: ListenOption = ":8007",
    cert: CertOption = None,
    key: KeyOption = None,
    drain: DrainOption = 900.0,
    verify_new: VerifyNewOption = None,
) -> None:
    """Serve the datastores of this host to Proxmox Backup Server's clients and to other Fleece hosts.

    Those are the ones that 'fleece datastore list' shows. At the first start the server makes a certificate; clients
    need its fingerprint, which is printed. Users and rights: 'fleece user', 'fleece token', 'fleece acl'. SIGTERM lets
    running sessions end, SIGHUP reads the certificate again.
    """
    import trio

    from agent.serving import RegisteredRemotes, RegisteredStores, server_folder
    from server.certificate import Certificate, own_certificate
    from server.service import Service, Settings, run_until_signal, systemd_listeners
    from server.service import listen as listen_at
    from server.state import ServerState

    if (cert is None) != (key is None):
        raise UsageError("serve", "", "--cert and --key belong together")
    address, port = parse_listen(listen)
    folder = server_folder()
    certificate = own_certificate(folder) if cert is None or key is None else Certificate(cert, key)
    settings = Settings(certificate, drain, to_stderr)
    state = ServerState(folder, RegisteredStores(invocation), RegisteredRemotes(invocation.remotes))
    unknown = sorted(set(verify_new or ()) - set(invocation.registry.datastores()))
    if unknown:
        raise UsageError("use", "--verify-new", f"there is no datastore {unknown[0]}", "see 'fleece datastore list'")
    state.verify_new = frozenset(verify_new or ())

    async def run() -> None:
        listeners = systemd_listeners() or await listen_at(address, port)

        async def ready() -> None:
            where = [f"{name[0]}:{name[1]}" for name in (one.socket.getsockname() for one in listeners)]
            document = {"listening": where, "fingerprint": certificate.fingerprint}
            text = f"Listening at {', '.join(where)}\nFingerprint {certificate.fingerprint}"
            invocation.emit(document, lambda: text)

        await run_until_signal(Service(state, settings), listeners, settings, ready)

    trio.run(run)
