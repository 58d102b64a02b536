"""Remote repositories over the double in memory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from repository.remote.address import RemoteAddress
from repository.remote.connection import RemoteServer
from repository.remote.login import TicketCredentials, TicketStore, TokenCredentials
from repository.remote.repository import RemoteRepository
from repository.remote.rest import Credentials, RestClient
from tests.support.pbs_double import PbsDouble

TOKEN = RemoteAddress.parse("root@pam!tok@pbs.example:store")
USER = RemoteAddress.parse("root@pam@pbs.example:store")


class Known:
    """Secrets that are known, and how often they were asked for."""

    def __init__(self, secret: str | None, second: str | None = None) -> None:
        self.secret, self.second = secret, second
        self.asked = 0

    async def password(self, address: RemoteAddress) -> str | None:
        self.asked += 1
        return self.secret

    async def second_factor(self, address: RemoteAddress) -> str | None:
        return self.second


@asynccontextmanager
async def remote(
    double: PbsDouble,
    address: RemoteAddress = TOKEN,
    *,
    secrets: Known | None = None,
    tickets: TicketStore | None = None,
) -> AsyncIterator[RemoteRepository]:
    """A repository on `double` while the block runs."""
    rest = RestClient(double, address.server, str(address))
    secrets = secrets or Known(double.secrets[address.auth_id])
    credentials: Credentials = (
        TokenCredentials(address, secrets)
        if address.is_token
        else TicketCredentials(address, secrets, rest, store=tickets)
    )
    async with trio.open_nursery() as nursery:
        double.nursery = nursery
        yield RemoteRepository(RemoteServer(address, double, rest, credentials), "remote")
        nursery.cancel_scope.cancel()
