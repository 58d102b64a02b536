"""Who we are for a server: API tokens, and tickets that are got with a password, kept, renewed and given up."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any, Final, Protocol, TypeGuard
from urllib.parse import quote, unquote

import trio

from repository.remote.address import RemoteAddress
from repository.remote.errors import RemoteAnswerError, RemoteError, RemoteLoginError, RemoteRefusedError
from repository.remote.rest import RestClient, unwrap

#: Seconds after which a ticket is renewed, as the reference client does; it is valid for 7200.
RENEW_AFTER_S: Final = 900
#: Seconds after which a ticket is taken for expired.
VALID_S: Final = 7200 - 300
#: Characters of a ticket and of a CSRF token.
_MAX_TICKET: Final = 4096
_COOKIE: Final = "PBSAuthCookie"
_HOST_COOKIE: Final = "__Host-PBSAuthCookie"
#: What the reference client encodes in a token's secret, beside control characters and what is not ASCII.
_SAFE_IN_SECRET: Final = "".join(chr(code) for code in range(33, 127) if chr(code) not in '"#<>`?{}')


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a server gave for a password."""

    ticket: str
    csrf: str
    issued: float  #: Unix seconds, by our clock
    cookie: str = _COOKIE  #: name of the cookie


class TicketStore(Protocol):
    """Where tickets are kept between commands."""

    def load(self, address: RemoteAddress) -> Ticket | None:
        """The ticket for a server and user, if there is one."""
        ...

    def save(self, address: RemoteAddress, ticket: Ticket) -> None:
        """Keep `ticket` in place of an older one."""
        ...

    def forget(self, address: RemoteAddress) -> bool:
        """Remove the ticket; False if there was none."""
        ...


class Secrets(Protocol):
    """Where passwords come from."""

    async def password(self, address: RemoteAddress) -> str | None:
        """The user's password or the token's secret; None if there is none and nobody to ask."""
        ...

    async def second_factor(self, address: RemoteAddress) -> str | None:
        """A response such as `totp:123456`; None if nobody can be asked."""
        ...


class NoSecrets:
    """Nothing is known and nobody can be asked."""

    async def password(self, address: RemoteAddress) -> str | None:
        """None."""

    async def second_factor(self, address: RemoteAddress) -> str | None:
        """None."""


class TokenCredentials:
    """An API token: the same header for every request, no login."""

    def __init__(self, address: RemoteAddress, secrets: Secrets) -> None:
        self._address, self._secrets = address, secrets
        self._header: tuple[str, str] | None = None
        self._asking = trio.Lock()

    async def headers(self, method: str) -> list[tuple[str, str]]:
        """See `Credentials.headers`.

        Raises:
            RemoteLoginError: there is no secret.
        """
        async with self._asking:
            if self._header is None:
                secret = await self._secrets.password(self._address)
                if not secret:
                    raise _no_secret(self._address, "secret of the API token")
                text = f"{self._address.auth_id}:{quote(secret, safe=_SAFE_IN_SECRET)}"
                self._header = ("Authorization", f"PBSAPIToken={text}")
            return [self._header]

    async def refused(self, headers: Sequence[tuple[str, str]]) -> bool:
        """See `Credentials.refused`: a token does not change."""
        return False


class TicketCredentials:
    """A user with a password."""

    def __init__(
        self,
        address: RemoteAddress,
        secrets: Secrets,
        client: RestClient,
        *,
        store: TicketStore | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._address, self._secrets, self._client = address, secrets, client
        self._store, self._now = store, now
        self._ticket = None if store is None else store.load(address)
        self._password: str | None = None
        self._asking = trio.Lock()

    async def headers(self, method: str) -> list[tuple[str, str]]:
        """See `Credentials.headers`.

        Raises:
            RemoteLoginError: no valid ticket, no password, or a wrong one.
            RemoteError: the server cannot be asked.
        """
        async with self._asking:
            ticket = await self._current()
        headers = [_cookie_header(ticket)]
        if method != "GET":
            headers.append(("CSRFPreventionToken", ticket.csrf))
        return headers

    async def refused(self, headers: Sequence[tuple[str, str]]) -> bool:
        """See `Credentials.refused`: the ticket is given up; a new one needs a password."""
        async with self._asking:
            if self._ticket is not None and _cookie_header(self._ticket) not in headers:
                return True  # another task has got a new one meanwhile
            self._ticket = None
            return await self._find_password() is not None

    async def login(self) -> Ticket:
        """Get a new ticket for a password, and keep it.

        Raises:
            RemoteLoginError: as `headers`.
        """
        async with self._asking:
            self._ticket = None
            return await self._current()

    async def _current(self) -> Ticket:
        ticket = self._ticket
        age_s = self._now() - ticket.issued if ticket is not None else 0.0
        if ticket is not None and 0 <= age_s < RENEW_AFTER_S:
            return ticket
        if ticket is not None and 0 <= age_s < VALID_S:
            try:
                self._keep(await self._ask_ticket(ticket.ticket))
            except RemoteRefusedError:
                self._ticket = None  # the server has forgotten it: log in anew
            except RemoteError:
                return ticket  # still valid; the call itself will tell what is wrong
        else:
            self._ticket = None
        if self._ticket is None:
            password = await self._find_password()
            if password is None:
                raise _no_secret(self._address, "password of")
            self._keep(await self._ask_ticket(password))
        assert self._ticket is not None
        return self._ticket

    def _keep(self, ticket: Ticket) -> None:
        self._ticket = ticket
        if self._store is not None:
            self._store.save(self._address, ticket)

    async def _find_password(self) -> str | None:
        if self._password is None:
            self._password = await self._secrets.password(self._address) or None
        return self._password

    async def _ask_ticket(self, password: str) -> Ticket:
        parameters = {"username": self._address.auth_id, "password": password}
        ticket = await self._post(parameters)
        if ticket.csrf == "invalid" or ticket.ticket.startswith("PBS:!tfa!"):
            response = await self._secrets.second_factor(self._address)
            if response is None:
                raise RemoteLoginError(
                    "log in to", str(self._address), "the server asks for a second factor",
                    "'fleece login' at a terminal asks for it; machines use an API token", status=401,
                )  # fmt: skip
            ticket = await self._post(
                {"username": self._address.auth_id, "password": response, "tfa-challenge": ticket.ticket}
            )
        return ticket

    async def _post(self, parameters: dict[str, str]) -> Ticket:
        what, where = "log in to", str(self._address)
        issued = self._now()
        answer = await self._client.answer("POST", "/access/ticket", parameters, what=what, credentials=None)
        data = unwrap(answer.body, what, where)
        ticket, cookie = data.get("ticket") if isinstance(data, dict) else None, _COOKIE
        csrf = data.get("CSRFPreventionToken") if isinstance(data, dict) else None
        if ticket is None:
            ticket, cookie = _from_cookie(answer.headers.get("set-cookie", "")), _HOST_COOKIE
        if not _is_ticket(ticket) or not _is_ticket(csrf):
            raise RemoteAnswerError(what, where, "the server gives no ticket")
        return Ticket(ticket, csrf, issued, cookie)


def _cookie_header(ticket: Ticket) -> tuple[str, str]:
    return "Cookie", f"{ticket.cookie}={quote(ticket.ticket, safe='')}"


def _from_cookie(header: str) -> str | None:
    try:
        morsel = SimpleCookie(header[: 2 * _MAX_TICKET]).get(_HOST_COOKIE)
    except CookieError:
        return None
    return None if morsel is None else unquote(morsel.value)


def _is_ticket(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= _MAX_TICKET and value.isascii() and value.isprintable()


def _no_secret(address: RemoteAddress, what: str) -> RemoteLoginError:
    why = f"there is no {what}" + ("" if address.is_token else f" {address.auth_id}, and no valid ticket")
    return RemoteLoginError(
        "log in to", str(address), why,
        "set PBS_PASSWORD, PBS_PASSWORD_FILE, PBS_PASSWORD_CMD or PBS_PASSWORD_FD"
        + ("" if address.is_token else ", or run 'fleece login'"), status=401,
    )  # fmt: skip
