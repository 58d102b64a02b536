"""Datastores on servers as commands reach them: passwords, fingerprints and tickets of this user, and proxies.

The environment variables are those of `proxmox-backup-client`: PBS_PASSWORD (_FD, _FILE, _CMD), PBS_FINGERPRINT,
ALL_PROXY.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import trio

from agent.fingerprints import FingerprintFile
from agent.remote_spec import RemoteSpec
from agent.tickets import TicketFile
from core.dial import Confirm, Proxy, TlsPin, parse_fingerprint
from core.errors import FleeceError, UsageError
from core.units import parse_size
from repository.interface import Repository
from repository.remote.address import RemoteAddress
from repository.remote.connection import UPLOADS
from repository.remote.login import Ticket
from repository.remote.opening import RemoteOptions, open_remote, open_server

if TYPE_CHECKING:
    from agent.config import RepositorySection
    from repository.remote.connection import RemoteServer

PASSWORD_VARIABLE: Final = "PBS_PASSWORD"
FINGERPRINT_VARIABLE: Final = "PBS_FINGERPRINT"
#: Bytes of a password.
_MAX_PASSWORD: Final = 4096


def fingerprints() -> FingerprintFile:
    """The certificates that this user has confirmed."""
    from agent.places import fingerprints_file

    return FingerprintFile(fingerprints_file())


def tickets() -> TicketFile:
    """The tickets of this user."""
    from agent.places import run_dir

    return TicketFile(run_dir() / "tickets.json")


class CommandSecrets:
    """Passwords for a command: from the environment, the configuration's file, or a terminal."""

    def __init__(self, section: "RepositorySection | None", *, may_ask: bool = True) -> None:
        self._section = section
        self._may_ask = may_ask

    async def password(self, address: RemoteAddress) -> str | None:
        """See `Secrets.password`.

        Raises:
            FleeceError: what names a password leads nowhere.
        """
        return await trio.to_thread.run_sync(self._password, address)

    def _password(self, address: RemoteAddress) -> str | None:
        from agent.keys import ask, can_ask, passphrase_from_environment

        found = passphrase_from_environment(PASSWORD_VARIABLE)
        if found is None and self._section is not None and self._section.password_file is not None:
            from datastore.private_files import read_small

            data = read_small(self._section.password_file, what="read the password from", limit=_MAX_PASSWORD)
            found = data.split(b"\n", 1)[0].removesuffix(b"\r")
        if found is None and self._may_ask and can_ask():
            what = "secret of the API token" if address.is_token else "password of"
            found = ask(f"{what} {address.auth_id} on {address.server}: ".capitalize())
        if found is None:
            return None
        try:
            text = found.decode()
        except UnicodeDecodeError:
            raise FleeceError("use", f"the password of {address.auth_id}", "it is no UTF-8") from None
        if not text or len(text) > _MAX_PASSWORD:
            raise FleeceError("use", f"the password of {address.auth_id}", "it is empty, or too long")
        return text

    async def second_factor(self, address: RemoteAddress) -> str | None:
        """See `Secrets.second_factor`: a code of an app, or what stands before a colon."""
        return await trio.to_thread.run_sync(self._second_factor, address) if self._may_ask else None

    def _second_factor(self, address: RemoteAddress) -> str | None:
        from agent.keys import ask, can_ask

        if not can_ask():
            return None
        text = ask(f"Second factor of {address.auth_id} (code, or recovery:KEY): ").decode("utf-8", "replace").strip()
        return text if ":" in text else f"totp:{text}"


class RenewedTickets:
    """The ticket of `fleece login` for a command that uses it: renewed there, but none is stored where none was."""

    def __init__(self, file: TicketFile) -> None:
        self._file = file
        self._had_one = False

    def load(self, address: RemoteAddress) -> Ticket | None:
        """See `TicketStore.load`."""
        found = self._file.load(address)
        self._had_one = found is not None
        return found

    def save(self, address: RemoteAddress, ticket: Ticket) -> None:
        """See `TicketStore.save`; a file that cannot be written must not end a backup."""
        if self._had_one:
            with suppress(FleeceError):
                self._file.save(address, ticket)

    def forget(self, address: RemoteAddress) -> bool:
        """See `TicketStore.forget`."""
        return self._file.forget(address)


def remote_options(spec: RemoteSpec, *, may_ask: bool = True, login: bool = False) -> RemoteOptions:
    """How the server is reached, and who asks.

    Args:
        spec: the server.
        may_ask: a person may be asked, if there is a terminal.
        login: a new ticket is stored.

    Raises:
        UsageError: a fingerprint, proxy or rate of another form.
        FleeceError: the file of fingerprints cannot be read.
    """
    section = spec.section
    text = os.environ.get(FINGERPRINT_VARIABLE) or (None if section is None else section.fingerprint)
    only = section is not None and section.fingerprint_only
    confirm: Confirm | None = None
    if text:
        pin = TlsPin(parse_fingerprint(text), only)
    else:
        pin = TlsPin(fingerprints().find(spec.address))
        confirm = _confirm(spec.address) if may_ask else None
    rates = [None if section is None else getattr(section, name) for name in _RATES]
    rate_in, burst_in, rate_out, burst_out = (None if rate is None else float(parse_size(rate)) for rate in rates)
    return RemoteOptions(
        pin=pin,
        proxy=proxy_from_environment(),
        confirm=confirm,
        secrets=CommandSecrets(section, may_ask=may_ask),
        tickets=tickets() if login else RenewedTickets(tickets()),
        rate_in=rate_in or None,
        burst_in=burst_in,
        rate_out=rate_out or None,
        burst_out=burst_out,
        uploads=UPLOADS if section is None or section.uploads is None else section.uploads,
    )


_RATES: Final = ("rate_in", "burst_in", "rate_out", "burst_out")


def proxy_from_environment() -> Proxy | None:
    """The proxy that ALL_PROXY names.

    Raises:
        UsageError: it is none that can be used.
    """
    text = os.environ.get("ALL_PROXY") or os.environ.get("all_proxy")  # noqa: SIM112 - as other programs
    return Proxy.parse(text) if text else None


def _confirm(address: RemoteAddress) -> Confirm | None:
    from agent.keys import can_ask

    if not can_ask():
        return None

    async def confirm(fingerprint: bytes, why: str) -> bool:
        return await trio.to_thread.run_sync(_ask_certificate, address, fingerprint, why)

    return confirm


def _ask_certificate(address: RemoteAddress, fingerprint: bytes, why: str) -> bool:
    """Ask at the terminal, and remember a yes."""
    with open("/dev/tty", "r+b", buffering=0) as tty:  # noqa: PTH123 - unbuffered
        text = (
            f"The certificate of {address.server} is not known to this host ({why}).\n"
            f"Fingerprint: {fingerprint.hex(':')}\n"
            "Is that the server's own? It says so with 'proxmox-backup-manager cert info'. (y/N) "
        )
        tty.write(text.encode())
        answer = tty.readline(100).decode("utf-8", "replace").strip().lower()
    if answer not in ("y", "yes"):
        return False
    fingerprints().remember(address, fingerprint)
    return True


@asynccontextmanager
async def open_repository(spec: RemoteSpec, name: str, *, may_ask: bool = True) -> AsyncIterator[Repository]:
    """The datastore as a repository while the block runs; nothing is sent before it is used.

    Raises:
        UsageError, FleeceError: as `remote_options`.
    """
    async with open_remote(spec.address, remote_options(spec, may_ask=may_ask), name=name) as repository:
        yield repository


@asynccontextmanager
async def open_for_login(spec: RemoteSpec) -> "AsyncIterator[RemoteServer]":
    """The server while the block runs, for `fleece login` and `fleece logout`.

    Raises:
        UsageError: it is an API token, which needs no login.
    """
    if spec.address.is_token:
        hint = "set PBS_PASSWORD to its secret"
        raise UsageError("log in to", str(spec.address), "an API token needs no login", hint)
    async with open_server(spec.address, remote_options(spec, login=True)) as server:
        yield server
