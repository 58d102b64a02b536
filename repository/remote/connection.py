"""A server: its REST interface, and connections that are upgraded to the backup and the reader protocol."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import h11
import trio

from core.buffers import Buffer
from core.dial import CertificateError, DialError, innermost_reason
from datastore.s3.pacing import TokenBucket
from repository.remote.address import RemoteAddress
from repository.remote.errors import RemoteAnswerError, RemoteUnavailableError, clean_text, is_login_failure, refusal
from repository.remote.http2 import Http2Client, close_now
from repository.remote.rest import (
    MAX_ERROR,
    USER_AGENT,
    Credentials,
    Parameters,
    RestClient,
    encode_query,
    unwrap,
    wrong_certificate,
)

#: Seconds for the answer to an upgrade: servers lock the group meanwhile, and wait 3 s before they refuse.
UPGRADE_TIMEOUT_S: Final = 120.0
#: Chunks of a backup on their way at a time, as the reference client has at most.
UPLOADS: Final = 16
#: Bytes of the answer to a small call.
MAX_SMALL: Final = 1 << 20
_MAX_HEAD: Final = 64 << 10
_FORM: Final = "application/x-www-form-urlencoded"


class Connector(Protocol):
    """Makes connections."""

    async def connect(self, scheme: str, host: str, port: int) -> trio.abc.Stream:
        """See `core.dial.Dialer.connect`."""
        ...


class RemoteServer:
    """One datastore of one server, and who asks for it."""

    def __init__(
        self,
        address: RemoteAddress,
        dialer: Connector,
        rest: RestClient,
        credentials: Credentials,
        *,
        received: TokenBucket | None = None,
        sent: TokenBucket | None = None,
        scheme: str = "https",
        uploads: int = UPLOADS,
    ) -> None:
        self.address: Final = address
        self.rest: Final = rest
        self.credentials: Final = credentials
        self.uploads: Final = uploads  #: chunks of a backup on their way at a time
        self._dialer = dialer
        self._received, self._sent = received, sent
        self._scheme = scheme

    async def call(
        self,
        method: str,
        path: str,
        parameters: Parameters | None = None,
        *,
        what: str,
        where: str = "",
        body: Buffer | None = None,
    ) -> Any:
        """See `RestClient.call`. `path` is below the datastore; with two slashes at its beginning, anywhere."""
        path = path[1:] if path.startswith("//") else f"/admin/datastore/{self.address.store}{path}"
        return await self.rest.call(
            method, path, parameters, what=what, credentials=self.credentials, where=where, body=body
        )

    @asynccontextmanager
    async def upgraded(
        self, protocol: str, parameters: Parameters, *, what: str, where: str
    ) -> AsyncIterator[Http2Client]:
        """A connection that speaks `protocol` (`backup` or `reader`) while the block runs; closed at its end.

        Raises:
            RemoteRefusedError: the server says no.
            RemoteUnavailableError, RemoteCertificateError: no connection.
        """
        stream, first = await self._upgrade(protocol, {"store": self.address.store, **parameters}, what, where)
        try:
            async with Http2Client.open(stream, first, where=where, received=self._received, sent=self._sent) as client:
                yield client
        finally:
            await close_now(stream)

    async def _upgrade(
        self, protocol: str, parameters: Parameters, what: str, where: str
    ) -> tuple[trio.abc.Stream, bytes]:
        renewed = False
        while True:
            credentials = await self.credentials.headers("GET")
            try:
                stream: trio.abc.Stream = await self._dialer.connect(self._scheme, self.address.host, self.address.port)
            except CertificateError as error:
                raise wrong_certificate(what, where, error.why) from error
            except DialError as error:
                raise RemoteUnavailableError(what, where, error.why) from error
            try:
                with trio.fail_after(UPGRADE_TIMEOUT_S):
                    target = f"/api2/json/{protocol}?{encode_query(parameters)}"
                    headers = [
                        ("Host", self.address.server),
                        ("User-Agent", USER_AGENT),
                        ("Connection", "upgrade"),
                        ("Upgrade", f"proxmox-backup-{'reader-' if protocol == 'reader' else ''}protocol-v1"),
                        *credentials,
                    ]
                    status, rest = await _ask_upgrade(stream, target, headers)
            except BaseException as error:
                await close_now(stream)
                if isinstance(error, trio.TooSlowError):
                    why = f"no answer within {UPGRADE_TIMEOUT_S:.0f} s"
                    raise RemoteUnavailableError(what, where, why) from error
                if isinstance(error, OSError | trio.BrokenResourceError | trio.ClosedResourceError):
                    raise RemoteUnavailableError(what, where, innermost_reason(error) or "it was lost") from error
                if isinstance(error, EOFError):
                    raise RemoteUnavailableError(what, where, "the server closed the connection") from error
                if isinstance(error, h11.RemoteProtocolError):
                    raise RemoteAnswerError(what, where, f"the answer is no HTTP: {error}") from error
                raise
            if status == 101:
                return stream, rest
            await close_now(stream)
            expired = is_login_failure(status, clean_text(rest))
            if expired and not renewed and await self.credentials.refused(credentials):
                renewed = True
                continue
            if 200 <= status < 400:
                raise RemoteAnswerError(what, where, f"the server answers with status {status} instead of 101")
            raise refusal(what, where, status, rest)


async def _ask_upgrade(stream: trio.abc.Stream, target: str, headers: Sequence[tuple[str, str]]) -> tuple[int, bytes]:
    """Status, and what came behind a 101 or the text of another answer."""
    engine = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
    sent = engine.send(h11.Request(method="GET", target=target, headers=list(headers)))
    assert sent is not None
    await stream.send_all(sent + (engine.send(h11.EndOfMessage()) or b""))
    status, body = 0, bytearray()
    while True:
        event = engine.next_event()
        if event is h11.NEED_DATA:
            data = await stream.receive_some(_MAX_HEAD)
            if not data and not status:
                raise EOFError
            engine.receive_data(bytes(data))
        elif isinstance(event, h11.InformationalResponse):
            if event.status_code == 101:
                return 101, engine.trailing_data[0]
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_ERROR:
                return status, bytes(body)
        else:
            return status, bytes(body)


async def ask(
    client: Http2Client,
    method: str,
    endpoint: str,
    parameters: Parameters | None = None,
    *,
    what: str,
    where: str,
    body: Sequence[Buffer] | None = None,
    document: dict[str, Any] | None = None,
) -> Any:
    """A call of the backup protocol with a JSON answer.

    Args:
        client: the connection.
        method: of HTTP.
        endpoint: without slash.
        parameters: go into the query.
        what: for messages.
        where: for messages.
        body: raw content.
        document: JSON content, in place of `body`.

    Raises:
        RemoteRefusedError: the server says no.
        RemoteUnavailableError, RemoteAnswerError: no answer.
    """
    content = _FORM
    if document is not None:
        content, body = "application/json", (json.dumps(document, separators=(",", ":")).encode(),)
    elif body is not None:
        content = "application/octet-stream"
    answer = await client.request(
        method,
        _path(endpoint, parameters),
        what=what,
        headers=[("user-agent", USER_AGENT), ("content-type", content)],
        body=body or (),
        limit=lambda status: MAX_SMALL if status == 200 else MAX_ERROR,
    )
    if answer.status != 200:
        raise refusal(what, where, answer.status, answer.body)
    return unwrap(answer.body, what, where)


async def download(
    client: Http2Client, endpoint: str, parameters: Parameters, *, what: str, where: str, limit: int
) -> bytearray:
    """A call whose answer is raw: a file or a chunk of at most `limit` bytes. Errors as `ask`."""
    answer = await client.request(
        "GET",
        _path(endpoint, parameters),
        what=what,
        headers=[("user-agent", USER_AGENT), ("content-type", _FORM)],
        limit=lambda status: limit if status == 200 else MAX_ERROR,
    )
    if answer.status != 200:
        raise refusal(what, where, answer.status, answer.body)
    return answer.body


def _path(endpoint: str, parameters: Parameters | None) -> str:
    query = encode_query(parameters or {})
    return f"/{endpoint}?{query}" if query else f"/{endpoint}"
