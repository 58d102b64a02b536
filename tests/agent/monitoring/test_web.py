"""The page over HTTP: who gets it, and what hostile requests can do."""

import base64
import json
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.monitoring import web
from agent.monitoring.overview import overview
from agent.monitoring.page import POLICY
from agent.monitoring.sections import StatusSection
from agent.monitoring.web import MAX_CONNECTIONS, StatusServer
from tests.support.certificates import make_certificate
from tests.support.waiting import PATIENCE_S, until

from .conftest import config

TOKEN = "0123456789abcdef0123456789abcdef"


class Served:
    """A server in this process and how it is asked."""

    def __init__(self, folder: Path, text: str = "") -> None:
        section = config(f'[status]\nlisten = "127.0.0.1:0"\n{text}').status
        assert section is not None
        self.section: StatusSection = section
        self.folder, self.collected = folder, 0
        self.said: list[str] = []
        self.server = StatusServer(self.collect, self.said.append)
        self.port = 0
        self.context: ssl.SSLContext | None = None

    def collect(self) -> dict[str, Any]:
        self.collected += 1
        return overview(config(""), self.folder)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Served"]:
        async with trio.open_nursery() as nursery:
            ((_, self.port),) = await nursery.start(self.server.run, self.section)
            yield self
            nursery.cancel_scope.cancel()

    async def connect(self) -> trio.abc.Stream:
        stream: trio.abc.Stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        if self.context is not None:
            stream = trio.SSLStream(stream, self.context, server_hostname="127.0.0.1", https_compatible=True)
        return stream

    async def raw(self, data: bytes) -> bytes:
        """What comes back for `data` until the server closes."""
        stream = await self.connect()
        async with stream:
            await stream.send_all(data)
            received = b""
            with trio.fail_after(60):
                while more := await stream.receive_some(65536):
                    received += more
        return received

    async def ask(
        self, path: str = "/", *headers: str, method: str = "GET", host: str = "localhost"
    ) -> tuple[int, dict[str, str], bytes]:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers, "", ""]
        head, _, body = (await self.raw("\r\n".join(lines).encode())).partition(b"\r\n\r\n")
        first, *rest = head.decode().split("\r\n")
        return int(first.split(" ")[1]), dict(line.lower().split(": ", 1) for line in rest), body


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http1.LINGER_S", 0.02)


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


async def test_page_document_and_metrics_are_served_with_a_strict_policy(served: Served) -> None:
    async with served.running():
        for path, kind, content in (
            ("/", "text/html; charset=utf-8", b"</html>"),
            ("/?x=1", "text/html; charset=utf-8", b"</html>"),
            ("/metrics", "text/plain; version=0.0.4; charset=utf-8", b"fleece_build_info"),
            ("/status.json", "application/json", b'"guests"'),
        ):
            status, headers, body = await served.ask(path)
            assert (status, headers["content-type"]) == (200, kind)
            assert headers["content-security-policy"] == POLICY.lower()
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
            assert content in body
        assert json.loads((await served.ask("/status.json"))[2])["schema"] == 1
        status, headers, body = await served.ask("/", method="HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["content-length"]) > 1000


async def test_nothing_else_is_served_and_nothing_can_be_changed(served: Served) -> None:
    async with served.running():
        for path in (
            "/x",
            "//",
            "/metrics/",
            "/../etc/passwd",
            "/%2e%2e/etc/passwd",
            "*",
            "/status.json%00",
        ):
            assert (await served.ask(path))[0] in (400, 404), path
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE"):
            assert (await served.ask("/", "Content-Length: 0", method=method))[0] in (400, 405), method


async def test_a_page_of_somebody_else_cannot_read_it_by_a_name_of_its_own(served: Served) -> None:
    async with served.running():
        for host in ("localhost", "localhost:8017", "127.0.0.1:1", "[::1]:8017", "LOCALHOST"):
            assert (await served.ask(host=host))[0] == 200, host
        for host in ("evil.example", "localhost.evil.example", "evil.example:8017", "[::1", "", "127.0.0.1.evil"):
            assert (await served.ask(host=host))[0] in (400, 421), host
        # What stands before the path counts, not the header.
        assert (await served.ask("http://localhost:8017/", host="evil.example"))[0] == 200
        for path in ("http://evil.example/", "http://evil.example:8017/status.json", "http://", "http:///metrics"):
            assert (await served.ask(path))[0] in (400, 421), path


async def test_with_a_token_only_who_shows_it_gets_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_WRONG_TOKEN_S", 0.0)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    served = Served(tmp_path, f'token-file = "{tmp_path}/token"\n')

    def basic(text: str) -> str:
        return f"Authorization: Basic {base64.b64encode(text.encode()).decode()}"

    async with served.running():
        for good in (f"Authorization: Bearer {TOKEN}", f"authorization: bearer  {TOKEN}", basic(f"me:{TOKEN}")):
            assert (await served.ask("/metrics", good, host="any.example"))[0] == 200
        for wrong in (
            "X: y", "Authorization: Bearer x", "Authorization: Bearer ", f"Authorization: {TOKEN}",
            basic(TOKEN), basic(f"{TOKEN}:"), "Authorization: Basic !!!", "Authorization: Basic \xff",
            f"Authorization: Digest {TOKEN}",
        ):  # fmt: skip
            for path in ("/", "/metrics", "/nothing"):
                status, headers, body = await served.ask(path, wrong)
                assert (status, headers["www-authenticate"][:5]) == (401, "basic")
                assert b"fleece_" not in body
        assert (await served.ask("/", f"Authorization: Bearer {TOKEN}", f"Authorization: Bearer {TOKEN}"))[0] == 400
        assert served.collected == 1, "who has no token makes no work"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 40_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        b"\0" * 100_000,
        b"GET / HTTP/9.9\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_refused_and_the_next_one_is_served(served: Served, data: bytes) -> None:
    async with served.running():
        reply = b""
        with suppress(trio.BrokenResourceError):  # refused before all was taken
            reply = await served.raw(data)
        assert reply == b"" or reply.split(b" ")[1] in (b"400", b"421", b"431")
        assert (await served.ask())[0] == 200
    assert served.said == [f"the status page is at http://127.0.0.1:{served.port}/"]


async def test_those_who_say_nothing_keep_nobody_out(served: Served) -> None:
    async with served.running():
        silent = [await served.connect() for _ in range(3 * MAX_CONNECTIONS)]
        assert (await served.ask())[0] == 200
        assert len(served.server._connections) <= MAX_CONNECTIONS + 1
        for stream in silent:
            await stream.aclose()


async def test_nor_do_they_while_a_request_waits_for_what_is_collected(served: Served) -> None:
    asked, goes_on = threading.Event(), threading.Event()

    def slow() -> dict[str, Any]:
        asked.set()
        goes_on.wait(PATIENCE_S)
        return served.collect()

    served.server.collect = slow
    async with served.running():
        try:
            streams = [await served.connect()]
            await streams[0].send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await until(asked.is_set)
            streams += [await served.connect() for _ in range(3 * MAX_CONNECTIONS)]
            with trio.fail_after(PATIENCE_S / 2), suppress(trio.BrokenResourceError):
                assert await streams[1].receive_some(1) == b""  # ended for others, and not because its time was up
            for stream in streams:
                await stream.aclose()
        finally:
            goes_on.set()


async def test_a_connection_ends_after_a_while_however_busy_it_is(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "CONNECTION_S", 0.2)
    async with served.running():
        assert await served.raw(b"GET / HTTP/1.1\r\nHost: local") == b""


async def test_many_requests_collect_once(served: Served, autojump_clock: trio.abc.Clock) -> None:
    async with served.running():
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(served.server._current)
        assert served.collected == 1
        await trio.sleep(3)
        await served.server._current()
        assert served.collected == 2


async def test_a_mistake_is_an_answer_and_told_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(document: object) -> bytes:
        raise ZeroDivisionError("secret words")

    monkeypatch.setattr(web, "render", broken)
    async with served.running():
        for _ in range(3):
            status, _, body = await served.ask("/metrics")
            assert (status, b"secret" in body) == (500, False)
        assert (await served.ask("/"))[0] == 200
    assert len(served.said) == 2


async def test_over_tls_nothing_is_said_in_plain_text(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path / "server.pem")
    (tmp_path / "token").write_text(TOKEN)
    served = Served(
        tmp_path,
        f'certificate = "{certificate.path}"\nkey = "{certificate.path}"\ntoken-file = "{tmp_path}/token"\n',
    )
    async with served.running():
        with pytest.raises((trio.BrokenResourceError, ValueError)):
            assert b"HTTP" not in await served.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            raise ValueError
        served.context = ssl.create_default_context(cafile=str(certificate.path))
        assert (await served.ask("/metrics", f"Authorization: Bearer {TOKEN}"))[0] == 200


async def test_a_port_that_is_taken_and_files_that_are_missing_are_told_and_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "RETRY_S", 0.01)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    served = Served(tmp_path)
    served.section = served.section.model_copy(update={"listen": f"127.0.0.1:{port}", "token_file": tmp_path / "token"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.server.run, served.section)
        await until(lambda: len(served.said) == 1)
        assert "there is no such file" in served.said[0]
        (tmp_path / "token").write_text("short")
        await until(lambda: len(served.said) == 2)
        assert "fewer than 16" in served.said[1]
        (tmp_path / "token").write_text(TOKEN)
        await until(lambda: len(served.said) == 3)
        assert "ddress already in use" in served.said[2]
        await listener.aclose()
        served.port = port

        async def answers() -> bool:
            try:
                return (await served.ask("/", f"Authorization: Bearer {TOKEN}"))[0] == 200
            except OSError:
                return False

        with trio.fail_after(60):
            while not await answers():  # noqa: ASYNC110 - another task
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
