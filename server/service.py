"""The running server: sockets, TLS, connections, signals, and what systemd wants to know."""

import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import trio

from core.errors import FleeceError, os_reason
from core.nursery import open_nursery
from core.systemd import notify, watchdog_s
from core.tls import TlsStream
from server.application import Application
from server.certificate import Certificate
from server.compression import compressing
from server.errors import ServerError
from server.http1 import LINGER, LINGER_S, Http1Connection, redirect
from server.state import ServerState

_LOG = logging.getLogger(__name__)
DEFAULT_PORT: Final = 8007
#: Seconds for a TLS handshake, and for the head of a request in plain text.
HANDSHAKE_S: Final = 10.0
#: Connections at a time; further ones wait in the queue of the system.
MAX_CONNECTIONS: Final = 512
_BACKLOG: Final = 128
_KEEPALIVE_S: Final = 120
#: Seconds that sessions may go on after SIGTERM.
DRAIN_S: Final = 900.0
#: First byte of a TLS handshake.
_TLS: Final = 0x16
_SOCKETS_START: Final = 3
_DESCRIPTORS: Final = 65_536


@dataclass(slots=True)
class Settings:
    """How the server runs."""

    certificate: Certificate
    drain_s: float = DRAIN_S
    say: Callable[[str], None] = field(default=_LOG.info)  #: told what a person should know


class Service:
    """Answers on the listening sockets until it is told to end."""

    def __init__(self, state: ServerState, settings: Settings) -> None:
        self._state = state
        self._settings = settings
        self._application: Final = Application(state)
        self._closing: Final = trio.Event()
        self._slots: Final = trio.Semaphore(MAX_CONNECTIONS)
        self._unknown: dict[trio.CancelScope, None] = {}  #: connections of nobody yet, the oldest first
        self._resting: dict[trio.CancelScope, None] = {}  #: that wait for a further request, the longest ones first
        self._connections = 0
        self._idle = trio.Event()
        self.ended: Final = trio.Event()  #: `run` is over

    async def run(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `close` was called and the connections have ended, or the time for that is over."""
        try:
            await self._run(listeners, task_status)
        finally:
            self.ended.set()

    async def _run(self, listeners: Sequence[trio.SocketListener], task_status: "trio.TaskStatus[None]") -> None:
        async with self._state.running(), open_nursery() as nursery:
            async with open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(self._accept, listener, nursery)
                task_status.started()
                await self._closing.wait()
                accepting.cancel_scope.cancel()
            for listener in listeners:
                await listener.aclose()
            with trio.move_on_after(self._settings.drain_s):
                await self._drained()
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Take no further connections and let those at work end."""
        self._closing.set()

    async def _drained(self) -> None:
        while self._connections or self._state.tasks.busy:
            with trio.move_on_after(0.2):
                await self._idle.wait()

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        failing: int | None = None
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno != failing:
                    _LOG.warning("connections cannot be accepted: %s", os_reason(error))
                failing = error.errno
                await trio.sleep(0.1)
                continue
            failing = None
            try:
                self._make_room()
                await self._slots.acquire()
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            nursery.start_soon(self._guarded, stream)

    def _make_room(self) -> None:
        """If all places are taken, end a connection of nobody, or else one that is only kept for further requests.

        Who has shown no credentials must not keep those out who have some, nor those who have nothing to do now.
        """
        for ones in (self._unknown, self._resting):
            if self._slots.value == 0 and ones:
                scope = next(iter(ones))
                del ones[scope]
                scope.cancel()
                return

    async def _guarded(self, stream: trio.SocketStream) -> None:
        self._connections += 1
        scope = trio.CancelScope()
        self._unknown[scope] = None

        def resting(rests: bool) -> None:
            if not rests:
                self._resting.pop(scope, None)
            elif scope not in self._unknown:
                self._resting[scope] = None

        try:
            with scope:
                await self._connection(stream, lambda: self._unknown.pop(scope, None), resting)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, ssl.SSLError) as error:
            _LOG.debug("connection lost: %s", error)
        except FleeceError as error:
            _LOG.error("a session did not end as it should: %s", error)
        except Exception:
            # One connection must not end the others.
            _LOG.exception("a connection failed unexpectedly")
        finally:
            self._unknown.pop(scope, None)
            self._resting.pop(scope, None)
            self._connections -= 1
            self._idle.set()
            self._idle = trio.Event()
            self._slots.release()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async def _connection(
        self, stream: trio.SocketStream, known: Callable[[], object], resting: Callable[[bool], object]
    ) -> None:
        with suppress(OSError):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
        with trio.move_on_after(HANDSHAKE_S) as scope:
            first = await stream.socket.recv(1, socket.MSG_PEEK)
            if first and first[0] != _TLS:
                return await self._redirect(stream)
            tls = TlsStream(stream, self._settings.certificate.context, None)
            await tls.do_handshake()
        if scope.cancelled_caught or not first:
            return None
        handle = compressing(self._application.handle)
        connection = Http1Connection(tls, _peer(stream), handle, self._closing, known, resting)
        await connection.serve()
        return None

    async def _redirect(self, stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head and len(head) < 8192:
            more = await stream.receive_some(8192)
            if not more:
                return
            head += more
        await stream.send_all(redirect(head))
        with suppress(trio.BrokenResourceError), trio.move_on_after(LINGER_S):
            await stream.send_eof()
            left = LINGER
            while left > 0 and (more := await stream.receive_some(8192)):  # or the answer would go with the socket
                left -= len(more)


def _peer(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except (OSError, IndexError, TypeError):
        return "unknown"


async def listen(address: str, port: int) -> list[trio.SocketListener]:
    """Listening sockets at an address (empty: all, IPv6 and IPv4 in one).

    Raises:
        ServerError: it cannot be listened at.
    """
    try:
        if address in ("", "::"):
            try:
                return [trio.SocketListener(await _bound(socket.AF_INET6, "::", port, dual=True))]
            except OSError:
                if address:
                    raise
                address = "0.0.0.0"
        found = await trio.socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        return [trio.SocketListener(await _bound(family, str(where[0]), port, dual=False))]
    except OSError as error:
        hint = "another server may use the port" if isinstance(error, OSError) and error.errno == 98 else ""
        raise ServerError("listen at", f"{address or '*'}:{port}", os_reason(error), hint) from error


async def _bound(family: int, address: str, port: int, *, dual: bool) -> trio.socket.SocketType:
    listening = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        await listening.bind((address, port))
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def systemd_listeners() -> list[trio.SocketListener]:
    """The sockets that systemd hands over; none if there are none.

    Raises:
        ServerError: one of them cannot be listened at.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    text = os.environ.get("LISTEN_FDS", "0")
    count = int(text) if text.isdigit() else 0
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    listeners = []
    for descriptor in range(_SOCKETS_START, _SOCKETS_START + count):
        try:
            listeners.append(_given(descriptor))
        except (OSError, ValueError) as error:
            reason = os_reason(error) if isinstance(error, OSError) and error.strerror else str(error)
            hint = "the socket unit needs ListenStream=PORT and Accept=no"
            raise ServerError("listen at", f"descriptor {descriptor} of systemd", reason, hint) from error
    return listeners


def _given(descriptor: int) -> trio.SocketListener:
    os.set_inheritable(descriptor, False)
    given = socket.socket(fileno=descriptor)
    try:
        if given.family not in (socket.AF_INET, socket.AF_INET6):
            raise ValueError("it is no TCP socket")
        given.setblocking(False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(given))
    except BaseException:
        given.close()
        raise


def raise_descriptor_limit() -> None:
    """Allow more open files: every session has some, and the connections alone are half of what is usual."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, _DESCRIPTORS) if hard != resource.RLIM_INFINITY else _DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@asynccontextmanager
async def watchdog() -> AsyncIterator[None]:
    """Tell systemd while the block runs that the event loop goes on."""
    patience_s = watchdog_s()
    async with open_nursery() as nursery:
        if patience_s is not None:
            pause_s = patience_s / 2

            async def beat() -> None:
                while True:
                    notify("WATCHDOG=1")
                    await trio.sleep(pause_s)

            nursery.start_soon(beat)
        yield
        nursery.cancel_scope.cancel()


async def run_until_signal(
    service: Service,
    listeners: Sequence[trio.SocketListener],
    settings: Settings,
    ready: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, which let sessions end (a second one does not); SIGHUP reads certificates anew."""
    raise_descriptor_limit()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with open_nursery() as nursery, watchdog():
            await nursery.start(service.run, listeners)
            if ready is not None:
                await ready()
            notify("READY=1")

            async def watch() -> None:
                asked = False
                async for number in signals:
                    if number == signal.SIGHUP:
                        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
                        try:
                            settings.certificate.reload()
                            settings.say(f"the certificate was read again: {settings.certificate.fingerprint}")
                        except FleeceError as error:
                            settings.say(f"the old certificate stays in use: {error}")
                        notify("READY=1")
                    elif asked:
                        nursery.cancel_scope.cancel()
                    else:
                        asked = True
                        notify("STOPPING=1")
                        settings.say("ending: no new connections; sessions may go on")
                        service.close()

            watching = trio.CancelScope()

            async def watched() -> None:
                with watching:
                    await watch()

            nursery.start_soon(watched)
            await service.ended.wait()
            watching.cancel()
