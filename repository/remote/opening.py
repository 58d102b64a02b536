"""Opening a remote repository: connections, credentials and rates put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from core.dial import Confirm, Dialer, Proxy, TlsPin
from datastore.s3.http import HttpPool
from datastore.s3.pacing import TokenBucket
from repository.remote.address import RemoteAddress
from repository.remote.connection import UPLOADS, RemoteServer
from repository.remote.login import NoSecrets, Secrets, TicketCredentials, TicketStore, TokenCredentials
from repository.remote.repository import RemoteRepository
from repository.remote.rest import Credentials, RestClient

#: Seconds without a byte that end a REST call: removing many snapshots takes its time, and answers nothing meanwhile.
CALL_TIMEOUT_S = 600.0
#: REST calls at a time.
_CALLS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How a server is reached, and who asks."""

    pin: TlsPin = field(default_factory=TlsPin)
    proxy: Proxy | None = None
    confirm: Confirm | None = None  #: asked about an unknown certificate
    secrets: Secrets = field(default_factory=NoSecrets)
    tickets: TicketStore | None = None  #: None: tickets last as long as the connection
    rate_in: float | None = None  #: bytes a second
    burst_in: float | None = None
    rate_out: float | None = None
    burst_out: float | None = None
    uploads: int = UPLOADS  #: chunks of a backup on their way at a time


@asynccontextmanager
async def open_server(address: RemoteAddress, options: RemoteOptions) -> AsyncIterator[RemoteServer]:
    """The server of `address`, usable while the block runs; nothing is sent before it is used."""
    received = None if options.rate_in is None else TokenBucket(options.rate_in, options.burst_in)
    sent = None if options.rate_out is None else TokenBucket(options.rate_out, options.burst_out)
    dialer = Dialer(options.pin, proxy=options.proxy, confirm=options.confirm)
    pool = HttpPool(
        max_connections=_CALLS_AT_ONCE, received=received, sent=sent, dialer=dialer, inactivity_s=CALL_TIMEOUT_S
    )
    try:
        rest = RestClient(pool, address.server, str(address))
        credentials: Credentials
        if address.is_token:
            credentials = TokenCredentials(address, options.secrets)
        else:
            credentials = TicketCredentials(address, options.secrets, rest, store=options.tickets)
        yield RemoteServer(
            address, dialer, rest, credentials, received=received, sent=sent, uploads=options.uploads
        )  # fmt: skip
    finally:
        with trio.CancelScope(shield=True):  # closes sockets, waits for nobody
            await pool.aclose()


@asynccontextmanager
async def open_remote(
    address: RemoteAddress, options: RemoteOptions, *, name: str | None = None
) -> AsyncIterator[RemoteRepository]:
    """The datastore `address` as a repository while the block runs; nothing is sent before it is used.

    Args:
        address: where it is.
        options: how it is reached.
        name: as the command line takes it, default the address.
    """
    async with open_server(address, options) as server:
        yield RemoteRepository(server, name or str(address))
