"""A server on a loopback port: hostile connections, uploads that are wrong, cuts, many streams, Fleece's own client."""

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes

from core.errors import FleeceError
from core.tls import TlsStream
from datastore.blob import Blob, BlobKind
from datastore.errors import LockedError
from datastore.names import Group
from repository.local import LocalRepository
from server.access.auth_ids import AuthId
from server.access.tickets import Tickets
from server.errors import ApiError, UnauthorizedError
from server.routing import answer
from tests.support.direct_server import Direct, query_of
from tests.support.snapshots import write_snapshot
from tests.support.waiting import until
from tests.support.wire_server import WireServer, wire_server

CHUNK = 4 << 20
TOKEN = "u@pbs!t"
QUERY = {"store": "main", "backup-type": "host", "backup-id": "web", "backup-time": 1000}


@pytest.fixture
async def server(local: LocalRepository, tmp_path: Path) -> AsyncIterator[WireServer]:
    async with wire_server(tmp_path / "served", {"main": local}) as running:
        running.right("/datastore/main", "u@pbs", "DatastoreAdmin")
        running.right("/datastore/main", TOKEN, "DatastoreAdmin")
        yield running


@dataclass
class Client:
    """HTTP/2 by h2, a request at a time or many."""

    stream: TlsStream
    h2: H2Connection
    answers: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    status: dict[int, int] = field(default_factory=dict)
    bodies: dict[int, bytes] = field(default_factory=dict)
    over: bool = False

    def start(self, method: str, path: str, *, end: bool = True, headers: list[tuple[str, str]] | None = None) -> int:
        number = self.h2.get_next_available_stream_id()
        pseudo = [(":method", method), (":path", path), (":scheme", "https"), (":authority", "x"), *(headers or [])]
        self.h2.send_headers(number, pseudo, end_stream=end)
        return number

    async def flush(self) -> None:
        if data := self.h2.data_to_send():
            await self.stream.send_all(data)

    async def receive(self) -> None:
        data = bytes(await self.stream.receive_some())
        if not data:
            self.over = True
            return
        for event in self.h2.receive_data(data):
            number = getattr(event, "stream_id", 0) or 0
            if isinstance(event, ResponseReceived):
                self.status[number] = int(dict(event.headers or [])[b":status"])
            elif isinstance(event, DataReceived):
                self.bodies[number] = self.bodies.get(number, b"") + (event.data or b"")
                self.h2.acknowledge_received_data(event.flow_controlled_length or 0, number)
            elif isinstance(event, StreamEnded):
                self.answers[number] = (self.status[number], self.bodies.pop(number, b""))
            elif isinstance(event, StreamReset):
                self.answers[number] = (0, b"")
            elif isinstance(event, ConnectionTerminated):
                self.over = True
        await self.flush()

    async def ask(self, method: str, path: str, body: bytes = b"", headers: Any = None) -> tuple[int, bytes]:
        number = self.start(method, path, end=not body, headers=headers)
        await self.flush()
        view = memoryview(body)
        while view:
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size, len(view))
            if not room:
                await self.receive()
                continue
            self.h2.send_data(number, bytes(view[:room]), end_stream=room == len(view))
            view = view[room:]
            await self.flush()
        while number not in self.answers and not self.over:
            await self.receive()
        return self.answers.pop(number, (0, b""))


@asynccontextmanager
async def upgraded(server: WireServer, kind: str = "backup", *, time: int = 1000) -> AsyncIterator[Client]:
    stream = await server.connect()
    try:
        target = f"//api2/json/{kind}?{query_of({**QUERY, 'backup-time': time})}"
        word = "reader-" if kind == "reader" else ""
        headers = [("upgrade", f"proxmox-backup-{word}protocol-v1"), ("connection", "upgrade")]
        reply = await server.request("GET", target, TOKEN, headers=headers, stream=stream)
        assert reply.status == 101, reply.body
        h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        h2.initiate_connection()
        client = Client(stream, h2)
        await client.flush()
        if reply.rest:
            h2.receive_data(reply.rest)
        yield client
    finally:
        await trio.aclose_forcefully(stream)


def chunk_call(blob: bytes, digest: str, size: int, wid: int = 1, **other: Any) -> str:
    query = {"wid": wid, "digest": digest, "size": size, "encoded-size": len(blob), **other}
    return f"/fixed_chunk?{query_of(query)}"


async def test_chunks_that_are_not_what_they_say(server: WireServer, local: LocalRepository) -> None:
    data = bytes(range(256)) * (CHUNK // 256)
    digest = hashlib.sha256(data).hexdigest()
    blob = bytes(Blob.make(BlobKind.PLAIN, data))
    with trio.fail_after(60):
        async with upgraded(server) as client:
            assert (await client.ask("POST", "/fixed_index?archive-name=a.img.fidx&size=4194304"))[0] == 200
            for wrong, call in [
                (blob, chunk_call(blob, "0" * 64, CHUNK)),
                (blob, chunk_call(blob, digest, CHUNK - 1)),
                (blob[:-1], chunk_call(blob, digest, CHUNK)),
                (b"x" * len(blob), chunk_call(blob, digest, CHUNK)),
                (blob[:8] + b"\0" * 4 + b"\1" + blob[13:], chunk_call(blob, digest, CHUNK)),
            ]:
                status, text = await client.ask("POST", call, wrong)
                assert status == 400, text
            listed = f"digest-list={digest}&offset-list=0&wid=1"
            assert await client.ask("PUT", f"/fixed_index?{listed}") == (400, f"no such chunk {digest}".encode())
            # A wrong CRC is repaired, as PBS has it.
            repaired = blob[:8] + b"\0\0\0\0" + blob[12:]
            assert (await client.ask("POST", chunk_call(repaired, digest, CHUNK), repaired))[0] == 200
            (await local.store.chunks.read(bytes.fromhex(digest))).check(where="stored")
            assert (await client.ask("PUT", f"/fixed_index?{listed}"))[0] == 200
            status, text = await client.ask("PUT", f"/fixed_index?digest-list={digest}&offset-list=7&wid=1")
            assert status == 400


async def test_a_cut_connection_leaves_no_snapshot_and_no_lock(server: WireServer, local: LocalRepository) -> None:
    with trio.fail_after(60):
        for after in range(4):
            async with upgraded(server, time=1000 + after) as client:
                if after > 0:
                    await client.ask("POST", "/fixed_index?archive-name=a.img.fidx&size=5")
                if after > 1:
                    await client.ask("POST", "/dynamic_index?archive-name=b.didx")
                if after > 2:
                    client.start("POST", chunk_call(b"x" * 100, "0" * 64, 5), end=False)
                    await client.flush()
            while server.state.tasks.busy:  # noqa: ASYNC110 - it lasts some milliseconds
                await trio.sleep(0.01)
            assert await local.snapshots(unfinished=True) == []
            assert server.state.tasks.infos()[0].status == "backup ended but finished state is not set."
        async with server.repository(TOKEN) as remote:
            await write_snapshot(remote, "host/web", 2000, {"a.conf.blob": b"x"})
        await until(lambda: not server.state.tasks.busy)
        async with upgraded(server, time=3000), server.repository(TOKEN) as remote:
            with pytest.raises(FleeceError):
                await write_snapshot(remote, "host/web", 4000, {"a.conf.blob": b"x"})


async def test_a_stopped_task_ends_its_session(server: WireServer, local: LocalRepository) -> None:
    with trio.fail_after(60):
        async with upgraded(server) as client:
            (info,) = server.state.tasks.infos()
            server.state.tasks.files.ask_to_stop(str(info.upid))
            while not client.over:
                await client.receive()
        assert server.state.tasks.infos()[0].status == "task aborted"
        assert await local.snapshots(unfinished=True) == []


async def test_ten_thousand_requests_and_headers_over_the_limit(server: WireServer) -> None:
    with trio.fail_after(120):
        async with upgraded(server) as client:
            assert await client.ask("GET", f"/previous_backup_time?_dc={'x' * 20_000}") == (431, b"")
            for _ in range(50):
                numbers = [client.start("GET", "/previous_backup_time") for _ in range(40)]
                await client.flush()
                while not client.over and any(number not in client.answers for number in numbers):
                    await client.receive()
                assert {client.answers.pop(number) for number in numbers} == {(200, b'{"data":null}')}
            body = b"{" + b" " * (513 << 10)
            status, text = await client.ask("PUT", "/fixed_index", body, [("content-type", "application/json")])
            assert (status, text) == (400, b"Request body too large")
            # More streams at a time than were announced: the connection ends, the server goes on.
            client.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 1 << 20
            client.h2.remote_settings.acknowledge()
            for _ in range(1000):
                client.start("POST", "/blob?file-name=a.blob&encoded-size=100", end=False)
            await client.flush()
            while not client.over:
                await client.receive()
        assert (await server.request("GET", "/api2/json/ping")).status == 200


async def test_requests_over_the_limits(server: WireServer) -> None:
    with trio.fail_after(60):
        assert (await server.request("GET", f"/api2/json/ping?_dc={'x' * 3072}")).status == 414
        assert (await server.request("GET", "/api2/json/../ping")).text == "path contains illegal components"
        assert (await server.request("GET", "/api2/json/nope", TOKEN)).status == 404
        stream = await server.connect()
        await stream.send_all(b"GET /api2/json/ping HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 40_000)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 431")
        await trio.aclose_forcefully(stream)
        body = b"x=" + b"y" * (512 << 10)
        target = "/api2/json/admin/datastore/main/prune"
        assert (await server.request("POST", target, TOKEN, body=body)).text == "Request body too large"
        plain = await trio.open_tcp_stream("127.0.0.1", server.port)
        await plain.send_all(b"POST /x HTTP/1.1\r\nHost: backup.example:8007\r\n\r\n")
        head = bytes(await plain.receive_some())
        assert head.startswith(b"HTTP/1.1 308")
        assert b"https://backup.example:8007/x" in head
        await plain.aclose()


async def test_a_reader_gives_only_what_its_indexes_name(
    server: WireServer, local: LocalRepository, no_delays: None
) -> None:
    group = Group.parse("host/web")
    await write_snapshot(local, group, 1000, {"a.img.fidx": b"x" * CHUNK}, chunk_size=CHUNK)
    await local.set_owner(group, TOKEN)
    digest = hashlib.sha256(b"x" * CHUNK).hexdigest()
    with trio.fail_after(60):
        async with upgraded(server, "reader") as client:
            refused = f"download chunk {digest} not allowed".encode()
            assert await client.ask("GET", f"/chunk?digest={digest}") == (401, refused)
            assert (await client.ask("GET", "/download?file-name=none.blob"))[0] == 404
            status, index = await client.ask("GET", "/download?file-name=a.img.fidx")
            assert (status, len(index)) == (200, 4096 + 32)
            status, blob = await client.ask("GET", f"/chunk?digest={digest}")
            assert Blob.parse(blob, where="x").kind is BlobKind.PLAIN_ZSTD
            with pytest.raises(LockedError):
                await local.forget(group.at(1000))
        while server.state.tasks.busy:  # noqa: ASYNC110 - it lasts some milliseconds
            await trio.sleep(0.01)
        await local.forget(group.at(1000))


async def test_refusals_take_their_time(autojump_clock: trio.testing.MockClock) -> None:
    async def refuse(error: Exception) -> None:
        raise error

    for error, seconds in [
        (UnauthorizedError("x"), 3.0),
        (ApiError("x", 401), 3.0),
        (ApiError("x", 403, delay_s=0.5), 0.5),
        (ApiError("x"), 0.0),
    ]:
        start = trio.current_time()
        await answer(lambda error=error: refuse(error), "test")  # type: ignore[misc]
        assert trio.current_time() - start == pytest.approx(seconds)


async def test_login_tickets_and_their_end(direct: Direct, no_delays: None, tmp_path: Path) -> None:
    direct.state.access.add_user(AuthId("u@pbs"), password="long enough")
    login = {"username": "u@pbs", "password": "long enough"}
    got = await direct.call("POST", "/access/ticket", None, json_body=login)
    assert (got.status, got.content_type) == (200, "application/json")
    ticket = got.data["ticket"]
    again = await direct.call("POST", "/access/ticket", None, json_body={"username": "u@pbs", "password": ticket})
    assert again.status == 200
    for wrong in ({**login, "password": "x"}, {**login, "username": "v@pbs"}, {**login, "username": "u@nope"}):
        got = await direct.call("POST", "/access/ticket", None, json_body=wrong)
        assert (got.status, got.text) == (401, "permission check failed.")
    now = time.time()
    old = Tickets(tmp_path / "keys", clock=lambda: now)
    text = old.ticket("u@pbs")
    assert old.verify(text) == "u@pbs"
    later = Tickets(tmp_path / "keys", clock=lambda: now + 7501)
    with pytest.raises(UnauthorizedError, match="too old"):
        later.verify(text)
    with pytest.raises(UnauthorizedError, match="signature"):
        old.verify(text.replace("u@pbs", "root@pam"))
    with pytest.raises(UnauthorizedError, match="ticket without data"):
        old.verify("bad")
