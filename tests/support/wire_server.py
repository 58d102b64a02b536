"""Fleece's own server on a loopback port, with its users, for one test."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h11
import trio

from core.dial import TlsPin
from core.tls import TlsStream
from repository.local import LocalRepository
from repository.remote.address import RemoteAddress
from repository.remote.opening import RemoteOptions, open_remote
from repository.remote.repository import RemoteRepository
from server.access.acl import AclEntry
from server.access.auth_ids import AuthId
from server.certificate import Certificate, own_certificate
from server.remotes import Remotes
from server.service import Service, Settings, listen
from server.state import ServerState
from tests.support.remote import Known

PASSWORD = "correct horse"


class Stores:
    """Open repositories by name; see `server.state.StoreProvider`."""

    def __init__(self, repositories: Mapping[str, LocalRepository]) -> None:
        self.repositories = dict(repositories)

    def names(self) -> Sequence[str]:
        return list(self.repositories)

    def place(self, name: str) -> object:
        return self.repositories.get(name)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[LocalRepository]:
        yield self.repositories[name]


@dataclass
class WireServer:
    """A running server."""

    state: ServerState
    service: Service
    certificate: Certificate
    port: int
    secrets: dict[str, str] = field(default_factory=dict)  #: by auth-id

    def user(self, auth_id: str) -> str:
        """Add a user (with `PASSWORD`) or a token, and what it belongs to, and return its secret."""
        wanted = AuthId.parse(auth_id)
        user = AuthId(wanted.user)
        access = self.state.access
        if not user.is_root and access.account(user) is None:
            access.add_user(user, password=PASSWORD)
            self.secrets[str(user)] = PASSWORD
        if wanted.token is not None and access.account(wanted) is None:
            self.secrets[auth_id] = access.add_token(wanted)
        return self.secrets[auth_id]

    def right(self, path: str, auth_id: str, role: str, *, propagate: bool = True) -> None:
        """Give a right to a user or token, which is added if it is missing."""
        self.user(auth_id)
        self.state.access.set_right(AclEntry(path, auth_id, role, propagate))

    @asynccontextmanager
    async def repository(self, auth_id: str, store: str = "main") -> AsyncIterator[RemoteRepository]:
        """The store as Fleece's own client sees it."""
        address = RemoteAddress.parse(f"{auth_id}@127.0.0.1:{self.port}:{store}")
        options = RemoteOptions(TlsPin.parse(self.certificate.fingerprint), secrets=Known(self.secrets[auth_id]))
        async with open_remote(address, options, name="remote") as repository:
            yield repository

    async def connect(self) -> TlsStream:
        """A connection, TLS included."""
        import ssl

        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        stream = TlsStream(await trio.open_tcp_stream("127.0.0.1", self.port), context, "localhost")
        await stream.do_handshake()
        return stream

    async def request(
        self,
        method: str,
        target: str,
        auth_id: str | None = None,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        stream: TlsStream | None = None,
    ) -> "Reply":
        """One request and its answer."""
        own = stream is None
        stream = await self.connect() if stream is None else stream
        try:
            everything = [("host", "test"), ("content-length", str(len(body))), *headers]
            if auth_id is not None:
                everything.append(("authorization", f"PBSAPIToken={auth_id}:{self.secrets[auth_id]}"))
            return await exchange(stream, method, target, everything, body)
        finally:
            if own:
                await trio.aclose_forcefully(stream)


@dataclass
class Reply:
    """An answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes
    rest: bytes = b""  #: came behind a 101

    @property
    def text(self) -> str:
        return self.body.decode()


async def exchange(
    stream: TlsStream, method: str, target: str, headers: Sequence[tuple[str, str]], body: bytes
) -> Reply:
    """Send a request by h11 and read the answer whole."""
    client = h11.Connection(h11.CLIENT)
    data = client.send(h11.Request(method=method, target=target, headers=list(headers))) or b""
    if body:
        data += client.send(h11.Data(data=body)) or b""
    data += client.send(h11.EndOfMessage()) or b""
    await stream.send_all(data)
    reply = Reply(0, {}, b"")
    while True:
        event = client.next_event()
        if event is h11.NEED_DATA:
            client.receive_data(await stream.receive_some())
        elif isinstance(event, h11.Response | h11.InformationalResponse):
            reply.status = event.status_code
            reply.headers = {name.decode(): value.decode() for name, value in event.headers}
            if event.status_code == 101:
                reply.rest = bytes(client.trailing_data[0])
                return reply
        elif isinstance(event, h11.Data):
            reply.body += bytes(event.data)
        else:
            return reply


@asynccontextmanager
async def wire_server(
    folder: Path, stores: Mapping[str, LocalRepository], remotes: Remotes | None = None
) -> AsyncIterator[WireServer]:
    """A server of `stores` with its state in `folder` while the block runs."""
    state = ServerState(folder, Stores(stores), remotes)
    certificate = own_certificate(folder)
    settings = Settings(certificate, drain_s=0)
    service = Service(state, settings)
    listeners = await listen("127.0.0.1", 0)
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run, listeners)
        yield WireServer(state, service, certificate, port)
        nursery.cancel_scope.cancel()
    for listener in listeners:
        await listener.aclose()
