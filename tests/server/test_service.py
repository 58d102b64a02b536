"""The service around connections: floods, handshakes that never end, signals, sockets of systemd, its watchdog."""

import hashlib
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from core.tls import TlsStream
from datastore.errors import StoreError
from repository.local import LocalRepository
from server import service as service_module
from server.access.acl import AclEntry
from server.access.auth_ids import AuthId
from server.access.store import AccessStore
from server.certificate import Certificate, own_certificate
from server.errors import ServerError
from server.service import (
    HANDSHAKE_S,
    Service,
    Settings,
    listen,
    raise_descriptor_limit,
    run_until_signal,
    systemd_listeners,
)
from server.state import ServerState
from tests.support.waiting import until
from tests.support.wire_server import Stores, WireServer, wire_server

TOKEN = "u@pbs!t"


@pytest.fixture
async def server(local: LocalRepository, tmp_path: Path) -> AsyncIterator[WireServer]:
    async with wire_server(tmp_path / "served", {"main": local}) as running:
        running.right("/datastore/main", "u@pbs", "DatastoreAdmin")
        running.right("/datastore/main", TOKEN, "DatastoreAdmin")
        yield running


@pytest.mark.parametrize("sent", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\nhost: a\r\n"])
async def test_a_handshake_that_does_not_go_on_ends(
    sent: bytes, local: LocalRepository, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with wire_server(tmp_path / "served", {"main": local}) as server:
        start = trio.current_time()
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            if sent:
                await stream.send_all(sent)
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass
        assert trio.current_time() - start >= HANDSHAKE_S


async def test_who_shows_nothing_does_not_keep_out_who_has_credentials(
    local: LocalRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MAX_CONNECTIONS", 4)
    async with wire_server(tmp_path / "served", {"main": local}) as server:
        server.right("/datastore/main", TOKEN, "DatastoreAdmin")
        known = await server.connect()
        assert (await server.request("GET", "/api2/json/version", TOKEN, stream=known)).status == 200
        with trio.fail_after(60):
            silent = []
            for _ in range(12):  # a handshake each is enough to take a place
                silent.append(await trio.open_tcp_stream("127.0.0.1", server.port))
                await silent[-1].send_all(b"\x16")
            assert (await server.request("GET", "/api2/json/version", TOKEN)).status == 200
            assert (await server.request("GET", "/api2/json/version", TOKEN, stream=known)).status == 200
            for stream in [known, *silent]:
                await trio.aclose_forcefully(stream)
            await until(lambda: server.service._connections == 0)
        assert not server.service._unknown


async def test_connections_that_are_only_kept_do_not_keep_others_out(
    local: LocalRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MAX_CONNECTIONS", 4)
    headers = [("connection", "upgrade"), ("upgrade", "proxmox-backup-protocol-v1")]
    target = "/api2/json/backup?store=main&backup-type=host&backup-id=a&backup-time=1000"
    async with wire_server(tmp_path / "served", {"main": local}) as server:
        server.right("/datastore/main", "u@pbs", "DatastoreAdmin")
        server.right("/datastore/main", TOKEN, "DatastoreAdmin")
        with trio.fail_after(60):
            at_work = await server.connect()
            assert (await server.request("GET", target, TOKEN, headers=headers, stream=at_work)).status == 101
            kept = []
            for _ in range(9):
                kept.append(await server.connect())
                assert (await server.request("GET", "/api2/json/version", TOKEN, stream=kept[-1])).status == 200
            await until(lambda: len(server.service._resting) == 3)
            assert not await kept[0].receive_some()  # the oldest ones ended
            assert (await server.request("GET", "/api2/json/version", TOKEN, stream=kept[-1])).status == 200
            assert server.state.tasks.busy == 1
            for stream in [at_work, *kept]:
                await trio.aclose_forcefully(stream)
            await until(lambda: server.service._connections == 0)
        assert not server.service._resting


async def test_refused_credentials_make_a_browser_forget_them(server: WireServer, no_delays: None) -> None:
    cookie = [("cookie", "__Host-PBSAuthCookie=PBS:u@pbs:00000000::x")]
    got = await server.request("GET", "/api2/json/version", headers=cookie)
    assert got.status == 401
    assert got.headers["set-cookie"].startswith("__Host-PBSAuthCookie=; Expires=Thu, 01 Jan 1970")


async def test_an_answer_that_comes_before_the_body_arrives(server: WireServer, no_delays: None) -> None:
    server.secrets["u@pbs!x"] = "wrong"
    target = "/api2/json/admin/datastore/main/prune"
    with trio.fail_after(60):
        got = await server.request("POST", target, "u@pbs!x", body=b"x=" + bytes(3 << 20))
    assert got.status == 401
    assert "disabled or expired" in got.text


async def test_the_body_of_somebody_unknown_is_small(server: WireServer) -> None:
    body = b"username=u@pbs&password=" + b"x" * (20 << 10)
    got = await server.request("POST", "/api2/json/access/ticket", body=body)
    assert (got.status, got.text) == (400, "Request body too large")


async def test_users_that_cannot_be_read_are_told_to_the_administrator_alone(
    server: WireServer, caplog: pytest.LogCaptureFixture
) -> None:
    (server.state.folder / "users.toml").write_text("nonsense")
    got = await server.request("GET", "/api2/json/version", TOKEN)
    assert (got.status, got.text) == (400, "the server cannot read its users")
    assert str(server.state.folder) in caplog.text


async def test_a_session_that_cannot_be_cleaned_up_is_one_line_in_the_log(
    server: WireServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object) -> None:
        raise StoreError("remove", "host/web", "No space left on device")

    monkeypatch.setattr("datastore.session.LocalBackupSession.abort", fail)
    headers = [("upgrade", "proxmox-backup-protocol-v1")]
    target = "/api2/json/backup?store=main&backup-type=host&backup-id=web&backup-time=1000"
    stream = await server.connect()
    assert (await server.request("GET", target, TOKEN, headers=headers, stream=stream)).status == 101
    await trio.aclose_forcefully(stream)
    await until(lambda: server.service._connections == 0)
    assert "a session did not end as it should" in caplog.text
    assert "No space left on device" in caplog.text
    assert "Traceback" not in caplog.text


@asynccontextmanager
async def signalled(
    folder: Path, local: LocalRepository, monkeypatch: pytest.MonkeyPatch, said: list[str], drain_s: float = 0
) -> AsyncIterator[tuple[int, Certificate, "list[str]"]]:
    """A server that signals of this process reach: its port, its certificate, what systemd is told."""
    told: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(folder / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
        listener = trio.socket.from_stdlib_socket(systemd)
        certificate = own_certificate(folder / "server")
        settings = Settings(certificate, drain_s, said.append)
        state = ServerState(folder / "server", Stores({"main": local}))
        listeners = await listen("127.0.0.1", 0)
        port = listeners[0].socket.getsockname()[1]

        async def hear() -> None:
            while True:
                told.extend((await listener.recv(4096)).decode().split("\n"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hear)
            nursery.start_soon(run_until_signal, Service(state, settings), listeners, settings)
            with trio.fail_after(60):
                await until(lambda: "READY=1" in told)
                yield port, certificate, told
                os.kill(os.getpid(), signal.SIGTERM)
                await until(lambda: len(nursery.child_tasks) == 1)
            nursery.cancel_scope.cancel()
    assert "STOPPING=1" in told


async def shown(port: int) -> str:
    """The fingerprint that a client sees."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with TlsStream(await trio.open_tcp_stream("127.0.0.1", port), context, "localhost") as stream:
        await stream.do_handshake()
        return hashlib.sha256(stream.certificate()).digest().hex(":")


async def test_hangup_reads_the_certificate_again_and_rights_need_none(
    local: LocalRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    async with signalled(tmp_path, local, monkeypatch, said) as (port, certificate, told):
        before = certificate.fingerprint
        assert await shown(port) == before
        other = own_certificate(tmp_path / "other")
        for name in ("server.key", "server.pem"):
            (tmp_path / "other" / name).replace(tmp_path / "server" / name)
        assert await shown(port) == certificate.fingerprint == before  # until it is told
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: len(said) == 1)
        assert said == [f"the certificate was read again: {other.fingerprint}"]
        assert await shown(port) == certificate.fingerprint == other.fingerprint
        await until(lambda: told.count("READY=1") == 2)
        assert "RELOADING=1" in told
        assert any(line.startswith("MONOTONIC_USEC=") for line in told)
        (tmp_path / "server" / "server.pem").write_text("nonsense")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: len(said) == 2)
        assert said[1].startswith("the old certificate stays in use: cannot use the certificate")
        assert await shown(port) == other.fingerprint
        # What another process writes holds from the next request on.
        access = AccessStore(tmp_path / "server")
        access.add_user(AuthId("new@pbs"))
        secret = access.add_token(AuthId("new@pbs", "t"))
        server = WireServer(None, None, certificate, port, {"new@pbs!t": secret})  # type: ignore[arg-type]
        listing = "/api2/json/admin/datastore"
        assert (await server.request("GET", listing, "new@pbs!t")).text == '{"data":[]}'
        for who in ("new@pbs", "new@pbs!t"):
            access.set_right(AclEntry("/datastore/main", who, "DatastoreAudit"))
        assert '"store":"main"' in (await server.request("GET", listing, "new@pbs!t")).text
        access.remove_token(AuthId("new@pbs", "t"))
        assert (await server.request("GET", listing, "new@pbs!t")).status == 401


async def test_the_watchdog_is_fed_while_the_loop_goes_on(
    local: LocalRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    async with signalled(tmp_path, local, monkeypatch, []) as (_, _, told):
        await until(lambda: told.count("WATCHDOG=1") >= 3)


async def test_the_watchdog_of_another_process_is_not_fed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    sent: list[str] = []
    monkeypatch.setattr(service_module, "notify", sent.append)
    async with service_module.watchdog():
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert sent == []


async def test_sessions_may_end_after_the_first_signal_and_must_at_the_second(
    local: LocalRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    async with signalled(tmp_path, local, monkeypatch, said, drain_s=600) as (port, certificate, told):
        access = AccessStore(tmp_path / "server")
        access.add_user(AuthId("u@pbs"))
        server = WireServer(None, None, certificate, port, {TOKEN: access.add_token(AuthId("u@pbs", "t"))})  # type: ignore[arg-type]
        for who in ("u@pbs", TOKEN):
            access.set_right(AclEntry("/datastore/main", who, "DatastoreAdmin"))
        stream = await server.connect()
        target = "/api2/json/backup?store=main&backup-type=host&backup-id=web&backup-time=1000"
        headers = [("upgrade", "proxmox-backup-protocol-v1")]
        assert (await server.request("GET", target, TOKEN, headers=headers, stream=stream)).status == 101
        idle = await server.connect()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await idle.receive_some() == b""  # nothing is at work there
        await until(lambda: "STOPPING=1" in told)
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", port)
        assert [info.snapshot.ctime for info in await local.snapshots(unfinished=True)] == [1000]
        # The block's end sends the second signal.
    assert await local.snapshots(unfinished=True) == []
    await trio.aclose_forcefully(stream)
    await trio.aclose_forcefully(idle)


async def test_what_systemd_hands_over_is_listened_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(handed: socket.socket, *, pid: int = os.getpid()) -> list[trio.SocketListener]:
        monkeypatch.setattr(service_module, "_SOCKETS_START", os.dup(handed.fileno()) if pid == os.getpid() else -1)
        monkeypatch.setenv("LISTEN_PID", str(pid))
        monkeypatch.setenv("LISTEN_FDS", "1")
        return systemd_listeners()

    with socket.create_server(("127.0.0.1", 0)) as tcp:
        assert given(tcp, pid=1) == []
        (listener,) = given(tcp)
        assert listener.socket.getsockname() == tcp.getsockname()
        assert not any(name.startswith("LISTEN_") for name in os.environ)  # no child takes it for its own
        await listener.aclose()
    with socket.socket() as deaf, pytest.raises(ServerError, match="listen"):
        given(deaf)
    with socket.socket(socket.AF_UNIX) as unix, pytest.raises(ServerError, match="it is no TCP socket"):
        given(unix)


def test_a_pipe_of_systemd_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    monkeypatch.setattr(service_module, "_SOCKETS_START", read)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    try:
        with pytest.raises(ServerError, match="of systemd"):
            systemd_listeners()
    finally:
        os.close(write)
        os.close(read)


def test_as_many_files_are_open_as_the_system_allows() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(65_536, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
