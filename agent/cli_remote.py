"""`fleece remote`: servers that syncs use."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.invocation import Invocation, command
from agent.rate_options import BurstInOption, BurstOutOption, RateInOption, RateOutOption
from agent.section_options import FingerprintOnlyOption, FingerprintOption, check_credential, given, unset_too
from core.errors import UsageError

if TYPE_CHECKING:
    from agent.remote_hosts import ListedRemote
    from core.progress import Progress

RemoteId = Annotated[str, typer.Argument(metavar="NAME", help="A name of 3 to 32 characters, for example offsite.")]
PortOption = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Else 8007.", show_default=False)]
PasswordFileOption = Annotated[
    Path | None,
    typer.Option("--password-file", metavar="FILE", help="Read the password, or the token's secret, from FILE."),
]
PasswordFdOption = Annotated[
    int | None, typer.Option("--password-fd", metavar="N", min=0, help="Read it from this file descriptor.")
]
StoreOption = Annotated[
    str | None, typer.Option("--store", metavar="STORE", help="Datastore there, when a sync names none.")
]
NsOption = Annotated[str | None, typer.Option("--ns", metavar="NS", help="Namespace there, likewise.")]
CommentOption = Annotated[str | None, typer.Option("--comment", metavar="TEXT", help="For people.")]


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    group = typer.Typer(no_args_is_help=True, help="Servers that 'fleece sync' uses.", rich_markup_mode=None)
    application.add_typer(group, name="remote")
    command(
        group,
        "add",
        repository=False,
        examples="""
fleece remote add offsite --host pbs.example.com --auth-id 'sync@pbs!host1' --store main
fleece remote add office --host 2001:db8::7 --auth-id sync@pbs --fingerprint 64:d3:... --password-file /root/secret
fleece remote add unit --host pbs --auth-id 'sync@pbs!u' --systemd-credential
""",
    )(add)
    command(
        group,
        "update",
        repository=False,
        examples="""
fleece remote update offsite --password-file /root/new-secret
fleece remote update offsite --rate-out 20MiB --unset store
""",
    )(update)
    command(group, "list", repository=False, examples="fleece remote list --output json")(list_remotes)
    command(
        group,
        "check",
        repository=False,
        examples="""
fleece remote check offsite                    certificate, credentials, version, datastores
fleece remote check offsite --store main
""",
    )(check)
    command(group, "remove", repository=False, examples="fleece remote remove offsite")(remove)


def add(
    invocation: Invocation,
    name: RemoteId,
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Name or address.")],
    auth_id: Annotated[
        str, typer.Option("--auth-id", metavar="AUTHID", help="user@realm, or user@realm!token; owns what is pushed.")
    ],
    password_file: PasswordFileOption = None,
    password_fd: PasswordFdOption = None,
    systemd_credential: Annotated[
        bool,
        typer.Option("--systemd-credential", help="Store no secret: each unit has LoadCredential=remote-NAME:FILE."),
    ] = False,
    port: PortOption = None,
    fingerprint: FingerprintOption = None,
    fingerprint_only: FingerprintOnlyOption = None,
    store: StoreOption = None,
    ns: NsOption = None,
    rate_in: RateInOption = None,
    burst_in: BurstInOption = None,
    rate_out: RateOutOption = None,
    burst_out: BurstOutOption = None,
    comment: CommentOption = None,
) -> None:
    """Make a server known to syncs: where it is, who asks there, and the secret for that.

    The password or secret is asked for at the terminal, or comes from --password-file, --password-fd, or the variable
    PBS_PASSWORD (or what PBS_PASSWORD_FILE, _FD or _CMD lead to); never from the command line. It is stored in a file
    of mode 0600. Nothing is sent to the server: 'fleece remote check' does that. Use a user of its own for each job
    that removes what vanished, or jobs remove each other's groups.
    """
    from agent.remote_hosts import check_remote_id, section_of

    check_remote_id(name)
    section = section_of(
        given(
            host=host.removeprefix("[").removesuffix("]"), auth_id=auth_id, port=port, fingerprint=fingerprint,
            fingerprint_only=fingerprint_only, store=store, ns=ns, rate_in=rate_in, burst_in=burst_in,
            rate_out=rate_out, burst_out=burst_out, comment=comment,
        )
    )  # fmt: skip
    check_credential(systemd_credential, password_file, password_fd)
    secret = None if systemd_credential else _secret(name, password_file, password_fd, needed=True)
    invocation.remotes.add(name, section, secret)
    invocation.emit(
        {"name": name, **section.to_json()},
        lambda: f"added remote {name!r}\ntry it with: fleece remote check {name}",
    )


def update(
    invocation: Invocation,
    name: RemoteId,
    host: Annotated[str | None, typer.Option("--host", metavar="HOST", help="Name or address.")] = None,
    auth_id: Annotated[str | None, typer.Option("--auth-id", metavar="AUTHID", help="Who asks there.")] = None,
    password_file: PasswordFileOption = None,
    password_fd: PasswordFdOption = None,
    ask_password: Annotated[
        bool, typer.Option("--password", help="Ask for a new password or secret, or take it from PBS_PASSWORD.")
    ] = False,
    port: PortOption = None,
    fingerprint: FingerprintOption = None,
    fingerprint_only: FingerprintOnlyOption = None,
    store: StoreOption = None,
    ns: NsOption = None,
    rate_in: RateInOption = None,
    burst_in: BurstInOption = None,
    rate_out: RateOutOption = None,
    burst_out: BurstOutOption = None,
    comment: CommentOption = None,
    unset: Annotated[
        list[str] | None, typer.Option("--unset", metavar="NAME", help="Back to the default: port, store, ...")
    ] = None,
) -> None:
    """Change a remote; what is not named stays. It counts from the next command or run of a job on."""
    from agent.remote_hosts import RemoteSection

    changes = given(
        host=None if host is None else host.removeprefix("[").removesuffix("]"), auth_id=auth_id, port=port,
        fingerprint=fingerprint, fingerprint_only=fingerprint_only, store=store, ns=ns, rate_in=rate_in,
        burst_in=burst_in, rate_out=rate_out, burst_out=burst_out, comment=comment,
    )  # fmt: skip
    unset_too(changes, unset or (), RemoteSection, "a remote")
    invocation.remotes.section(name)
    secret = _secret(name, password_file, password_fd, needed=ask_password)
    if not changes and secret is None:
        raise UsageError("update the remote", repr(name), "nothing is to be changed", "see --help")
    section = invocation.remotes.update(name, changes, secret)
    invocation.emit({"name": name, **section.to_json()}, lambda: f"changed remote {name!r}")


def list_remotes(invocation: Invocation) -> None:
    """List the remotes, without their secrets."""
    from agent.documents import table

    found = invocation.remotes.listed()
    document = [{"name": one.id, **one.section.to_json(), "secret": one.secret.value} for one in found]

    def lines() -> list[str]:
        header = ("name", "host", "auth id", "store", "secret", "comment")
        return list(table(header, [_row(one) for one in found])) if found else ["No remotes."]

    invocation.emit(document, lines)


def _row(one: "ListedRemote") -> tuple[str, ...]:
    section = one.section
    server = section.address(section.store or "any").server
    return one.id, server, section.auth_id, section.store or "", one.secret.value, section.comment or ""


def check(
    invocation: Invocation,
    name: RemoteId,
    store: StoreOption = None,
) -> None:
    """Find out whether a remote can be used: certificate, credentials, version, and a datastore if one is known."""
    remotes = invocation.remotes
    section = remotes.section(name)
    chosen = store or section.store

    async def work(progress: "Progress") -> dict[str, Any]:
        from datastore.names import Namespace
        from repository.remote.opening import open_remote

        async with open_remote(section.address(chosen or "any"), remotes.options(name), name=name) as remote:
            version = await remote.version()
            listed = await remote.server.call("GET", "//admin/datastore", what="list the datastores of", where=name)
            stores = sorted(
                one["store"]
                for one in (listed if isinstance(listed, list) else [])
                if isinstance(one, dict) and isinstance(one.get("store"), str) and one["store"].isprintable()
            )
            groups = None
            if chosen is not None:
                groups = len(await remote.groups(Namespace.parse(section.ns)))
            return {
                "name": name,
                "server": section.address(chosen or "any").server,
                "auth-id": section.auth_id,
                "version": ".".join(map(str, version)),
                "datastores": stores,
                "store": chosen,
                "groups": groups,
            }

    document = invocation.run(work, what="check the remote", where=name)

    def lines() -> list[str]:
        text = [f"{name}: version {document['version']} at {document['server']}, as {document['auth-id']}"]
        text.append(f"datastores: {', '.join(document['datastores']) or 'none to be seen'}")
        if chosen is not None:
            text.append(f"{chosen}: {document['groups']} groups to be seen")
        return text

    invocation.emit(document, lines)


def remove(invocation: Invocation, name: RemoteId) -> None:
    """Forget a remote and its secret. Jobs that name it fail from then on."""
    invocation.remotes.remove(name)
    users = [job for job, section in invocation.config.job.items() if getattr(section, "remote", None) == name]
    if users:
        invocation.warnings.append(f"jobs that name it: {', '.join(users)}")
    invocation.emit({"name": name, "removed": True}, lambda: f"removed remote {name!r}")


def _secret(name: str, file: Path | None, descriptor: int | None, *, needed: bool) -> str | None:
    from agent.given_secrets import given_secret

    what, prompt = "the password or secret", f"Password, or secret of the token, of remote {name}: "
    return given_secret(what, prompt, "PBS_PASSWORD", file, descriptor, option="--password", needed=needed)
