"""`fleece login` and `fleece logout`: a ticket of a server, kept until it expires."""

from typing import TYPE_CHECKING, Any

import typer

from agent.invocation import Invocation, command
from core.errors import UsageError

if TYPE_CHECKING:
    from agent.remote_spec import RemoteSpec
    from core.progress import Progress


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    command(
        application,
        "login",
        examples="""
fleece login --repo backup@pbs@pbs.example.com:store1
PBS_PASSWORD_FILE=/root/pbs-password fleece login --repo root@pam@[2001:db8::7]:store1
""",
    )(login)
    command(application, "logout", examples="fleece logout --repo backup@pbs@pbs.example.com:store1")(logout)


def _spec(invocation: Invocation) -> "RemoteSpec":
    from agent.repositories import remote_spec

    text = invocation.repository_spec()
    spec = remote_spec(text, invocation.config, invocation.registry)
    if spec is None:
        raise UsageError(
            "log in to", text, "it is a datastore of this host",
            "name one on a server: --repo user@realm@host:store",
        )  # fmt: skip
    return spec


def login(invocation: Invocation) -> None:
    """Log in to a server with a password, and keep the ticket for the commands that follow.

    It is valid for two hours and renewed by every command that uses it. API tokens need no login.
    """
    from agent.remotes import open_for_login
    from repository.remote.login import TicketCredentials

    spec = _spec(invocation)

    async def work(progress: "Progress") -> None:
        async with open_for_login(spec) as server:
            assert isinstance(server.credentials, TicketCredentials)
            await server.credentials.login()

    invocation.run(work, what="log in to", where=str(spec.address))
    document: dict[str, Any] = {"server": spec.address.server, "user": spec.address.auth_id}
    invocation.emit(document, lambda: f"Logged in to {spec.address.server} as {spec.address.auth_id}.")


def logout(invocation: Invocation) -> None:
    """Forget the ticket that 'fleece login' got."""
    from agent.remotes import tickets

    spec = _spec(invocation)
    forgotten = tickets().forget(spec.address)
    words = "Logged out of" if forgotten else "There was no ticket of"
    document: dict[str, Any] = {"server": spec.address.server, "user": spec.address.auth_id, "forgotten": forgotten}
    invocation.emit(document, lambda: f"{words} {spec.address.server}.")
