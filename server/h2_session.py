"""Requests of an upgraded connection: the same checks as of plain REST, without paths of the API and rights."""

from collections.abc import Mapping
from typing import Any, Final, Protocol

import trio

from server.access.auth_ids import AuthId
from server.answers import Answer
from server.errors import ApiError
from server.http2 import H2Request, Http2Server
from server.routing import Call, Routes, answer, parameters, split_path
from server.state import ServerState


class Session(Protocol):
    """One upgraded connection's business."""

    def routes(self) -> Routes:
        """Its calls."""
        ...

    def log(self, text: str) -> None:
        """A line about a call, if the client wants such lines."""
        ...


class H2Session:
    """See `server.http1.Upgraded`."""

    def __init__(self, session: Session, state: ServerState, caller: AuthId) -> None:
        self._session = session
        self._routes: Final = session.routes()
        self._state = state
        self._caller = caller

    async def serve(self, stream: trio.abc.Stream, first: bytes) -> None:
        """See `Upgraded.serve`."""
        await Http2Server(stream, self._respond, self._limit).serve(first)

    def _limit(self, method: str, target: str) -> int:
        try:
            found = self._routes.find(method, split_path(target.partition("?")[0]))
        except ApiError:
            return 0
        return 0 if found is None else found[0].max_body

    async def _respond(self, request: H2Request) -> Answer:
        path, _, query = request.target.partition("?")
        return await answer(lambda: self._run(request, path, query), f"{request.method} {path}")

    async def _run(self, request: H2Request, path: str, query: str) -> object:
        found = self._routes.find(request.method, split_path(path))
        if found is None or found[0].handler is None:
            raise ApiError(f"Path '{path}' not found.", 404)
        endpoint, in_path = found
        if request.too_large:
            raise ApiError("Request body too large")
        body = b"" if endpoint.raw else request.body
        values: Mapping[str, Any] = parameters(endpoint, in_path, query, request.content_type, body)
        self._session.log(f"{request.method} {path}")
        call = Call(self._state, self._caller, dict(values), request.body if endpoint.raw else b"")
        assert endpoint.handler is not None
        return await endpoint.handler(call)
