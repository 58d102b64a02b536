"""A pool of HTTP/1.1 connections to S3 endpoints.

The one module that imports httpx (and httpcore, the engine below it). Both give requests, transports and the pool; the
connections are our own (`wire.py`).
"""

import time
from collections.abc import Callable
from typing import Final

import httpcore
import httpx
import trio

from core.dial import Dialer, TlsPin
from datastore.s3.bodies import BodyMemory
from datastore.s3.pacing import TokenBucket
from datastore.s3.wire import HttpAnswer, HttpRequest, Wire, WireSettings

#: Seconds that an unused connection is kept. Some servers close after 60.
_KEEPALIVE_S: Final = 30.0
_PORTS: Final = {"http": 80, "https": 443}


class HttpPool:
    """Connections to one or a few hosts.

    Made and closed inside a running trio loop; nothing runs in the background.
    """

    def __init__(
        self,
        pin: TlsPin | None = None,
        *,
        max_connections: int = 16,
        received: TokenBucket | None = None,
        sent: TokenBucket | None = None,
        dialer: Dialer | None = None,
        inactivity_s: float | None = None,
    ) -> None:
        """Make a pool without connections.

        Args:
            pin: which certificate is accepted, if no `dialer` is given.
            max_connections: of each kind, kept and fresh ones.
            received: limits the rate of what comes.
            sent: limits the rate of what goes.
            dialer: makes the connections.
            inactivity_s: seconds without a byte that end a request.
        """
        memory = BodyMemory(max_connections)
        settings = WireSettings(dialer or Dialer(pin), memory, received, sent, inactivity_s=inactivity_s)
        self._kept = _Transport(settings, max_connections, keep=True)
        self._fresh = _Transport(settings, max_connections, keep=False)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._kept.aclose()
        await self._fresh.aclose()

    async def exchange(
        self,
        request: HttpRequest,
        *,
        limit: Callable[[int], int],
        on_sent: Callable[[], None],
        fresh: bool = False,
    ) -> HttpAnswer:
        """Send `request` and read the whole answer.

        Cancelled, the connection is closed at once; what was sent may still be carried out.

        Args:
            request: what to send.
            limit: bytes that an answer with this status may have.
            on_sent: called when the first byte of the request is about to be written.
            fresh: use a new connection, and close it afterwards.

        Raises:
            HttpError: no whole answer.
        """

        async def send(wire: Wire) -> HttpAnswer:
            return await wire.exchange(request, limit, on_sent)

        outgoing = httpx.Request(
            request.method, f"{request.scheme}://{request.authority}/", extensions={"fleece_send": send}
        )
        response = await (self._fresh if fresh else self._kept).handle_async_request(outgoing)
        with trio.CancelScope(shield=True):  # gives the connection back, waits for nobody
            await response.aclose()
        answer = response.extensions["fleece_answer"]
        assert isinstance(answer, HttpAnswer)
        return answer


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's transport with a pool of our own connections."""

    def __init__(self, settings: WireSettings, max_connections: int, *, keep: bool) -> None:
        # httpx lets nobody choose what lies below its pool, so the pool is made here. Its own constructor does nothing
        # else.
        self._pool = _Pool(settings, max_connections, keep=keep)


class _Pool(httpcore.AsyncConnectionPool):
    """httpcore's pool, which decides when to connect, which connection to use and when to close it."""

    def __init__(self, settings: WireSettings, max_connections: int, *, keep: bool) -> None:
        super().__init__(max_connections=max_connections, max_keepalive_connections=max_connections if keep else 0)
        self._settings = settings

    def create_connection(self, origin: httpcore.Origin) -> httpcore.AsyncConnectionInterface:
        """A connection that is made with its first request."""
        return _Connection(origin, self._settings)


class _Connection(httpcore.AsyncConnectionInterface):
    """The place of a connection in the pool."""

    def __init__(self, origin: httpcore.Origin, settings: WireSettings) -> None:
        self._origin = origin
        self._settings = settings
        self._wire: Wire | None = None
        self._busy = True  # made for a request that is about to come
        self._closed = False
        self._idle_since = 0.0

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        """Run the request's own function on the connection; the answer is among the extensions, read whole."""
        if self._wire is not None and self._busy:
            raise httpcore.ConnectionNotAvailable
        self._busy = True
        try:
            if self._wire is None:
                scheme = self._origin.scheme.decode("ascii")
                port = self._origin.port or _PORTS[scheme]
                self._wire = await Wire.connect(scheme, self._origin.host.decode("ascii"), port, self._settings)
            answer = await request.extensions["fleece_send"](self._wire)
            if not answer.reusable:
                await self.aclose()
        except BaseException:
            await self.aclose()
            raise
        self._busy = False
        self._idle_since = time.monotonic()
        return httpcore.Response(answer.status, extensions={"fleece_answer": answer})

    async def aclose(self) -> None:
        """Close the socket; waits for nobody."""
        self._closed = True
        if self._wire is not None:
            with trio.CancelScope(shield=True):
                await self._wire.aclose()

    def can_handle_request(self, origin: httpcore.Origin) -> bool:
        """True for its own host."""
        return origin == self._origin

    def is_available(self) -> bool:
        """True if it takes a request now."""
        return self.is_idle()

    def has_expired(self) -> bool:
        """True if it was unused for too long, or the other side has ended it."""
        if not self.is_idle() or self._wire is None:
            return False
        return time.monotonic() - self._idle_since > _KEEPALIVE_S or self._wire.has_input()

    def is_idle(self) -> bool:
        """True between two requests."""
        return not self._busy and not self._closed

    def is_closed(self) -> bool:
        """True if it is of no use any more."""
        return self._closed

    def info(self) -> str:
        """Its state in words."""
        return "closed" if self._closed else "busy" if self._busy else "idle"
