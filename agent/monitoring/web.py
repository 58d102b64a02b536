"""The agent's page over HTTP: `/`, `/status.json`, `/metrics`. Read-only, for this host unless told else.

Requests are read by the server's own parser with its limits; few connections at a time, none for long, and whatever is
asked how often, everything is collected once in two seconds at most.
"""

import base64
import binascii
import hmac
import json
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from agent.monitoring.metrics import CONTENT_TYPE as METRICS_TYPE
from agent.monitoring.metrics import render
from agent.monitoring.page import POLICY, render_page
from agent.monitoring.sections import is_loopback, split_host_port
from core.errors import FleeceError, os_reason
from core.limits import in_io_thread
from core.nursery import open_nursery
from core.tls import TlsStream
from server.answers import Answer
from server.http1 import Body, Http1Connection, Request

if TYPE_CHECKING:
    from agent.monitoring.sections import StatusSection

#: Connections at a time; one more ends the oldest.
MAX_CONNECTIONS: Final = 16
#: Seconds that one connection lives, and for a TLS handshake.
CONNECTION_S: Final = 60.0
_HANDSHAKE_S: Final = 10.0
#: Seconds for which what was collected counts.
_FRESH_S: Final = 2.0
#: Seconds before a wrong token is refused.
_WRONG_TOKEN_S: Final = 1.0
#: Seconds until a port that is taken is tried again.
RETRY_S: Final = 60.0
_MIN_TOKEN: Final = 16
_MAX_TOKEN: Final = 4096
_BACKLOG: Final = 32
_TEXT: Final = "text/plain; charset=utf-8"
_HEADERS: Final = (
    ("content-security-policy", POLICY),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cache-control", "no-store"),
)


@dataclass(slots=True)
class _Served:
    """How it is served, as files and configuration said when it began."""

    hosts: frozenset[str]  #: names by which it may be called; empty: any
    token: bytes | None
    context: ssl.SSLContext | None


@dataclass
class StatusServer:
    """Serves what `collect` gives."""

    collect: Callable[[], Mapping[str, Any]]  #: the document; called in a thread
    say: Callable[[str], None]
    _document: Mapping[str, Any] | None = None
    _collected: float = 0.0
    _collecting: trio.Lock = field(default_factory=trio.Lock)
    _connections: dict[trio.CancelScope, None] = field(default_factory=dict)
    _last_problem: str = ""

    async def run(
        self,
        section: "StatusSection",
        *,
        task_status: "trio.TaskStatus[list[tuple[str, int]]]" = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled. What is in the way (a port that is taken, a file that is missing) is told, once, and
        waited out."""
        while True:
            try:
                served = await in_io_thread(_served, section)
                host, port = split_host_port(section.listen)
                listeners = await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)
                break
            except (OSError, FleeceError) as error:
                why = os_reason(error) if isinstance(error, OSError) else str(error)
                self._complain(f"the status page cannot be served at {section.listen}: {why}")
            await trio.sleep(RETRY_S)
        self._last_problem = ""
        try:
            async with open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._accept, listener, served, nursery)
                self.say(f"the status page is at {_url(section, listeners)}")
                task_status.started([listener.socket.getsockname()[:2] for listener in listeners])
                await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()

    def _complain(self, text: str) -> None:
        if text != self._last_problem:
            self._last_problem = text
            self.say(text)

    async def _accept(self, listener: trio.SocketListener, served: _Served, nursery: trio.Nursery) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                self._complain(f"the status page takes no connections: {os_reason(error)}")
                await trio.sleep(1)
                continue
            if len(self._connections) >= MAX_CONNECTIONS:
                # No longer counted: one that waits for a thread ends with that only, and the next one ends another.
                oldest = next(iter(self._connections))
                del self._connections[oldest]
                oldest.cancel()
            scope = trio.CancelScope(deadline=trio.current_time() + CONNECTION_S)
            self._connections[scope] = None
            nursery.start_soon(self._connection, stream, served, scope)

    async def _connection(self, stream: trio.SocketStream, served: _Served, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await self._speak(stream, served)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
        except Exception as error:  # one connection must not end the others, or the agent
            self._complain(f"a request for the status page failed unexpectedly: {type(error).__name__}: {error}")
        finally:
            self._connections.pop(scope, None)
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async def _speak(self, stream: trio.SocketStream, served: _Served) -> None:
        spoken: trio.abc.Stream = stream
        if served.context is not None:
            tls = TlsStream(stream, served.context, None)
            with trio.move_on_after(_HANDSHAKE_S) as scope:
                await tls.do_handshake()
            if scope.cancelled_caught:
                return
            spoken = tls

        async def handle(request: Request, body: Body) -> Answer:
            answer = await self._answer(request, served)
            if request.method in ("GET", "HEAD"):
                await body.all(0)  # its end: else the connection could not go on
            answer.headers = (*answer.headers, *_HEADERS)
            return answer

        await Http1Connection(spoken, "", handle).serve()

    async def _answer(self, request: Request, served: _Served) -> Answer:
        if served.hosts and _host_of(request.host) not in served.hosts:
            # A page of somebody else whose name was made to mean this address (DNS rebinding) gets nothing.
            return _text(421, "this name is not served\n")
        if served.token is not None and not _shows(request.headers.get("authorization", ""), served.token):
            await trio.sleep(_WRONG_TOKEN_S)
            headers = [("www-authenticate", 'Basic realm="fleece", charset="UTF-8"')]
            return Answer(401, _TEXT, [b"the token is missing or wrong\n"], headers)
        if request.method not in ("GET", "HEAD"):
            return Answer(405, _TEXT, [b"only GET and HEAD\n"], [("allow", "GET, HEAD")])
        makers: dict[str, tuple[str, Callable[[Mapping[str, Any]], bytes]]] = {
            "/": ("text/html; charset=utf-8", lambda document: render_page(document).encode()),
            "/metrics": (METRICS_TYPE, render),
            "/status.json": ("application/json", lambda document: json.dumps(document).encode() + b"\n"),
        }
        if request.path not in makers:
            return _text(404, "there are /, /status.json and /metrics\n")
        kind, make = makers[request.path]
        try:
            document = await self._current()
            return Answer(200, kind, [await in_io_thread(make, document)])
        except Exception as error:
            self._complain(f"the status page cannot be made: {type(error).__name__}: {error}")
            return _text(500, "the agent's journal says what is wrong\n")

    async def _current(self) -> Mapping[str, Any]:
        async with self._collecting:
            if self._document is None or trio.current_time() - self._collected >= _FRESH_S:
                self._document = await in_io_thread(self.collect)
                self._collected = trio.current_time()
            return self._document


def _url(section: "StatusSection", listeners: Sequence[trio.SocketListener]) -> str:
    """Where it is, also if the port was left to the system."""
    host, _ = split_host_port(section.listen)
    port = listeners[0].socket.getsockname()[1]
    scheme = "http" if section.certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/"


def _text(status: int, text: str) -> Answer:
    return Answer(status, _TEXT, [text.encode()])


def _host_of(header: str) -> str:
    """The name in a Host header, without port and brackets; empty if it is none."""
    host, bracket, _ = header.strip().lower().rpartition("]") if header.startswith("[") else ("", "", "")
    return host.removeprefix("[") if bracket else header.strip().lower().partition(":")[0]


def _shows(header: str, token: bytes) -> bool:
    """Whether an Authorization header has the token: `Bearer`, or `Basic` with it as password, for browsers."""
    scheme, _, rest = header.strip().partition(" ")
    given = rest.strip().encode("utf-8", "replace")
    if scheme.lower() == "basic":
        with suppress(binascii.Error, ValueError):
            return hmac.compare_digest(base64.b64decode(given, validate=True).partition(b":")[2], token)
        return False
    return scheme.lower() == "bearer" and hmac.compare_digest(given, token)


def check_files(section: "StatusSection") -> None:
    """See to it that what the section names can be used.

    Raises:
        FleeceError: it cannot.
    """
    _served(section)


def _served(section: "StatusSection") -> _Served:
    """What the section's files say.

    Raises:
        FleeceError: one of them cannot be used.
    """
    host = split_host_port(section.listen)[0].lower()
    token = None if section.token_file is None else _read_token(section.token_file)
    # With a token a page of somebody else gets nothing anyway, and the host may have many names.
    hosts = frozenset() if token is not None else frozenset(("localhost", "127.0.0.1", "::1", host))
    if token is None and not is_loopback(host):
        raise FleeceError("serve", section.listen, "without a token only this host may ask")
    context = None
    if section.certificate is not None and section.key is not None:
        context = _context(section.certificate, section.key)
    return _Served(hosts, token, context)


def _read_token(path: Path) -> bytes:
    from datastore.private_files import read_small

    token = read_small(path, what="read the token from", limit=_MAX_TOKEN).split(b"\n", 1)[0].strip()
    if len(token) < _MIN_TOKEN or not token.isascii():
        why = f"it has fewer than {_MIN_TOKEN} characters of ASCII in its first line"
        raise FleeceError("use the token in", str(path), why, "'openssl rand -hex 32' makes one")
    return token


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION

    def no_password() -> str:
        raise ValueError("its key has a passphrase")

    try:
        context.load_cert_chain(certificate, key, no_password)
    except (OSError, ValueError) as error:
        why = os_reason(error) if isinstance(error, OSError) and error.strerror else str(error)
        raise FleeceError("use the certificate", str(certificate), why) from error
    return context
