"""The application: who a request comes from, which call it means, and its answer."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Final
from urllib.parse import unquote

from core.errors import FleeceError
from server.access.auth_ids import AuthId
from server.answers import Answer, refusal
from server.api import access, browse, contents, remotes, snapshots, stores, sync, sync_jobs, tasks, upkeep
from server.api.access import DROP_COOKIE
from server.backup_protocol import PROTOCOL as BACKUP
from server.backup_protocol import backup
from server.errors import ApiError, UnauthorizedError
from server.http1 import Body, Request, Upgrade
from server.reader_protocol import PROTOCOL as READER
from server.reader_protocol import reader
from server.routing import (
    MAX_URI,
    Call,
    Endpoint,
    Open,
    Routes,
    answer,
    as_api_error,
    check_declared,
    parameters,
    split_path,
)
from server.schema import BOOL, SNAPSHOT, optional
from server.state import ServerState

_LOG = logging.getLogger(__name__)
_READER: Final = {**SNAPSHOT, "debug": optional(BOOL, False)}
_BACKUP: Final = {**_READER, "benchmark": optional(BOOL, False), "no-cache": optional(BOOL, False)}
ENDPOINTS: Final = (
    *access.ENDPOINTS,
    *stores.ENDPOINTS,
    *snapshots.ENDPOINTS,
    *contents.ENDPOINTS,
    *browse.ENDPOINTS,
    *upkeep.ENDPOINTS,
    *tasks.ENDPOINTS,
    *remotes.ENDPOINTS,
    *sync.ENDPOINTS,
    *sync_jobs.ENDPOINTS,
    Endpoint("GET", "/backup", schema=_BACKUP, upgrade=backup, raw=True),
    Endpoint("GET", "/reader", schema=_READER, upgrade=reader, raw=True),
)
_PROTOCOLS: Final = {"/backup": BACKUP, "/reader": READER}
_HOST_COOKIE: Final = "__Host-PBSAuthCookie"
_COOKIE: Final = "PBSAuthCookie"
_TOKEN: Final = "PBSAPIToken"
#: Bytes, and seconds, of a body whose sender is not known.
_MAX_LOGIN: Final = 16 << 10
_LOGIN_S: Final = 20.0
_METHODS: Final = ("GET", "POST", "PUT", "DELETE")


class Application:
    """Answers the requests of all connections."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._routes: Final = Routes(ENDPOINTS)

    async def handle(self, request: Request, body: Body) -> Answer | Upgrade:
        """See `server.http1.Handle`."""
        if len(request.target.encode("latin-1")) > MAX_URI:
            return Answer(414, None)
        try:
            parts = split_path(request.path)
        except ApiError as error:
            return Answer(error.status, None, [error.message.encode()])
        if len(parts) < 2 or parts[0] != "api2" or parts[1] not in ("json", "extjs"):
            return Answer(404, None, [f"Path '{request.path}' not found.".encode()])
        extjs = parts[1] == "extjs"
        what = f"{request.method} {request.path}"
        found = self._routes.find(request.method, parts[2:]) if request.method in _METHODS else None
        caller: AuthId | None = None
        try:
            if found is None or found[0].access is not Open.WORLD:
                caller = await self.caller(request)
        except UnauthorizedError as error:
            refused = error
            return replace(await answer(lambda: _raise(refused), what), headers=[("set-cookie", DROP_COOKIE)])
        except FleeceError as error:
            # Where the files lie is nobody's business who has not shown who it is.
            _LOG.error("%s", error)
            return refusal(ApiError("the server cannot read its users"), extjs=extjs)
        if caller is not None:
            request.known()
        if found is None:
            return refusal(ApiError(f"Path '{request.path}' not found.", 404), extjs=extjs)
        endpoint, in_path = found

        async def work() -> object:
            check_declared(endpoint, self._state, caller, in_path)
            # The body is read when it is clear that its sender may send one.
            if endpoint.access is Open.WORLD:
                data = await body.all(_MAX_LOGIN, _LOGIN_S)
            else:
                data = await body.all(endpoint.max_body if request.method in ("POST", "PUT") else 65_536)
            return await self._call(endpoint, in_path, request, caller, data)

        if endpoint.upgrade is not None:
            return self._upgrade(endpoint, in_path, request, caller)
        return await answer(work, what, extjs=extjs)

    async def _call(
        self, endpoint: Endpoint, in_path: Mapping[str, str], request: Request, caller: AuthId | None, data: bytes
    ) -> object:
        kind = request.headers.get("content-type")
        values = parameters(endpoint, in_path, request.query, kind, b"" if endpoint.raw else data)
        call = Call(
            self._state, caller or AuthId("nobody@pam"), values, data if endpoint.raw else b"", request.peer,
            request.headers, request.path,
        )  # fmt: skip
        assert endpoint.handler is not None
        return await endpoint.handler(call)

    def _upgrade(
        self, endpoint: Endpoint, in_path: Mapping[str, str], request: Request, caller: AuthId | None
    ) -> Answer | Upgrade:
        assert endpoint.upgrade is not None
        assert caller is not None
        try:
            values = parameters(endpoint, in_path, request.query, None, b"")
        except ApiError as error:
            return refusal(error)
        call = Call(self._state, caller, values, b"", request.peer, request.headers, request.path)

        async def refused(error: Exception) -> Answer:
            return await answer(lambda: _raise(as_api_error(error, endpoint.path)), endpoint.path)

        return Upgrade(_PROTOCOLS[endpoint.path], endpoint.upgrade(call), refused)

    async def caller(self, request: Request) -> AuthId:
        """Who the request comes from (spec 2).

        Raises:
            UnauthorizedError: that cannot be told, or must not be here.
        """
        ticket = _cookie(request.headers.get("cookie", ""))
        access = self._state.access
        if ticket is not None:
            user = AuthId(self._state.tickets.verify(ticket))
            if not access.active(user):
                raise UnauthorizedError("user account disabled or expired.")
            if request.method != "GET":
                csrf = request.headers.get("csrfpreventiontoken")
                if csrf is None:
                    raise UnauthorizedError("missing CSRF prevention token")
                self._state.tickets.verify_csrf(csrf, str(user))
            return user
        header = request.headers.get("authorization", "")
        if not header.startswith((f"{_TOKEN}=", f"{_TOKEN} ")):
            raise UnauthorizedError("no authentication credentials provided.")
        text, separator, secret = header[len(_TOKEN) + 1 :].partition(":")
        try:
            token = AuthId.parse(text)
        except Exception:
            raise UnauthorizedError("failed to parse token id") from None
        if not separator or token.token is None:
            raise UnauthorizedError("failed to parse API token")
        if not access.active(token):
            raise UnauthorizedError("user account or token disabled or expired.")
        if not await access.check_secret(token, unquote(secret, errors="replace"), request.peer):
            raise UnauthorizedError("invalid credentials")
        return token


async def _raise(error: Exception) -> object:
    raise error


def _cookie(header: str) -> str | None:
    """The ticket in a `Cookie` header, percent-encoded or not."""
    found: dict[str, str] = {}
    for part in header.split(";"):
        name, separator, value = part.strip().partition("=")
        if separator and name in (_COOKIE, _HOST_COOKIE):
            found.setdefault(name, unquote(value, errors="replace"))
    return found.get(_HOST_COOKIE, found.get(_COOKIE))
