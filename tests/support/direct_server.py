"""Requests handed to the server's application without a connection."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from server.access.acl import AclEntry
from server.access.auth_ids import ROOT_USER, AuthId
from server.answers import Answer
from server.application import Application
from server.h2_session import H2Session
from server.http1 import Body, Request, Upgrade
from server.http2 import H2Request
from server.state import ServerState

PROTOCOLS = {"backup": "proxmox-backup-protocol-v1", "reader": "proxmox-backup-reader-protocol-v1"}


class Given(Body):
    """A body that is there."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.read = False

    async def all(self, limit: int, timeout_s: float = 0.0) -> bytes:
        assert len(self.data) <= limit
        return self.data


async def body_of(answer: Answer) -> bytes:
    """The whole body of an answer."""
    data = b"".join(bytes(part) for part in answer.parts)
    if answer.stream is not None:
        async for part in answer.stream:
            data += bytes(part)
    return data


@dataclass
class Got:
    """An answer."""

    status: int
    body: bytes
    content_type: str | None = None

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    @property
    def data(self) -> Any:
        return json.loads(self.body)["data"]


def query_of(values: Mapping[str, Any]) -> str:
    """A query string as clients write it."""
    return urlencode({key: str(value).lower() if isinstance(value, bool) else value for key, value in values.items()},
                     doseq=True)  # fmt: skip


@dataclass
class Direct:
    """The application, asked directly."""

    state: ServerState
    application: Application

    def ticket(self, user: str) -> dict[str, str]:
        """The headers of a user that has logged in."""
        tickets = self.state.tickets
        return {"cookie": f"PBSAuthCookie={tickets.ticket(user)}", "csrfpreventiontoken": tickets.csrf_token(user)}

    def user(self, auth_id: str) -> None:
        """Add a user or token, without password or with an unknown secret."""
        wanted = AuthId.parse(auth_id)
        user = AuthId(wanted.user)
        if user != ROOT_USER and self.state.access.account(user) is None:
            self.state.access.add_user(user)
        if wanted.token is not None and self.state.access.account(wanted) is None:
            self.state.access.add_token(wanted)

    def token(self, auth_id: str) -> dict[str, str]:
        """Add a token (and its user), and return the headers that show it."""
        self.user(auth_id.partition("!")[0])
        secret = self.state.access.add_token(AuthId.parse(auth_id))
        return {"authorization": f"PBSAPIToken={auth_id}:{secret}"}

    def right(self, path: str, auth_id: str, role: str, *, propagate: bool = True) -> None:
        """Give a right to a user or token, which is added if it is missing."""
        self.user(auth_id)
        self.state.access.set_right(AclEntry(path, auth_id, role, propagate))

    async def call(
        self,
        method: str,
        path: str,
        user: str | None = "root@pam",
        *,
        query: Mapping[str, Any] | str = "",
        json_body: object = None,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Got:
        """A request of a user with a ticket (None: of nobody)."""
        everything = {} if user is None else self.ticket(user)
        if json_body is not None:
            everything["content-type"] = "application/json"
            body = json.dumps(json_body).encode()
        everything.update(headers or {})
        text = query if isinstance(query, str) else query_of(query)
        target = f"/api2/json{path}" + (f"?{text}" if text else "")
        answer = await self.application.handle(Request(method, target, everything, "192.0.2.1"), Given(body))
        assert isinstance(answer, Answer)
        return Got(answer.status, await body_of(answer), answer.content_type)

    @asynccontextmanager
    async def session(
        self,
        kind: str,
        user: str | Mapping[str, str],
        query: Mapping[str, Any],
        *,
        protocol: str | None = None,
    ) -> AsyncIterator["Session"]:
        """An upgraded connection of a user, or of whom headers tell; raises what refuses it."""
        who = self.ticket(user) if isinstance(user, str) else user
        headers = {**who, "upgrade": protocol or PROTOCOLS[kind]}
        target = f"//api2/json/{kind}?{query_of(query)}"
        upgrade = await self.application.handle(Request("GET", target, headers, "192.0.2.1"), Given(b""))
        assert isinstance(upgrade, Upgrade), await body_of(upgrade)
        async with upgrade.session as opened:
            assert isinstance(opened, H2Session)
            yield Session(opened)

    async def refusal(
        self, kind: str, user: str | None, query: Mapping[str, Any], *, protocol: str | None = None
    ) -> Got:
        """The answer to an upgrade that is refused to a user with a ticket (None: to nobody)."""
        return await self.refused(kind, {} if user is None else self.ticket(user), query, protocol=protocol)

    async def refused(
        self, kind: str, who: Mapping[str, str], query: Mapping[str, Any], *, protocol: str | None = None
    ) -> Got:
        """As `refusal`, of whom headers tell."""
        headers = dict(who)
        if protocol != "-":
            headers["upgrade"] = protocol or PROTOCOLS[kind]
        target = f"/api2/json/{kind}?{query_of(query)}"
        upgrade = await self.application.handle(Request("GET", target, headers, "192.0.2.1"), Given(b""))
        if isinstance(upgrade, Upgrade):
            try:
                async with upgrade.session:
                    return Got(101, b"")
            except Exception as error:
                upgrade = await upgrade.refused(error)
        assert isinstance(upgrade, Answer)
        return Got(upgrade.status, await body_of(upgrade), upgrade.content_type)


@dataclass
class Session:
    """An upgraded connection, asked directly."""

    opened: H2Session

    async def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | str = "",
        *,
        json_body: object = None,
        body: bytes = b"",
        content_type: str | None = None,
    ) -> Got:
        """One request."""
        if json_body is not None:
            body, content_type = json.dumps(json_body).encode(), "application/json"
        text = query if isinstance(query, str) else query_of(query)
        target = f"/{path.lstrip('/')}" + (f"?{text}" if text else "")
        too_large = len(body) > self.opened._limit(method, target)
        request = H2Request(method, target, content_type, b"" if too_large else body, too_large)
        answer = await self.opened._respond(request)
        return Got(answer.status, await body_of(answer), answer.content_type)
