"""Backups of a client whose connection ends at every frame, and of clients that send what does not go together."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded
from trio.testing import memory_stream_pair

from core.nursery import open_nursery
from datastore.blob import Blob, BlobKind
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode
from datastore.manifest import Manifest, ManifestFile
from datastore.names import Group
from datastore.session import LocalBackupSession
from repository.local import LocalRepository
from server import backup_calls
from server.tasks import OK
from tests.support.direct_server import Direct, query_of
from tests.support.snapshots import read_image, write_snapshot

GROUP = Group.parse("host/web")
IMAGE = bytes(range(256)) * 40
NAME = "disk.img.fidx"
LOST = "backup ended but finished state is not set."


def query(ctime: int) -> dict[str, Any]:
    return {"store": "main", "backup-type": "host", "backup-id": "web", "backup-time": ctime}


class CutError(Exception):
    """The connection has ended, as it was to."""


@dataclass
class Wire:
    """A client that sends its bytes frame by frame and stops after some."""

    stream: trio.abc.Stream
    frames: int  #: to send in all
    half: bool  #: of the next one, half comes too
    sent: int = 0
    h2: H2Connection = field(
        default_factory=lambda: H2Connection(H2Configuration(client_side=True, header_encoding=None))
    )

    async def flush(self) -> None:
        data = self.h2.data_to_send()
        while data:
            preface = 24 if data.startswith(b"PRI ") else 0
            end = preface + 9 + int.from_bytes(data[preface : preface + 3], "big")
            frame, data = data[:end], data[end:]
            if self.sent == self.frames:
                if self.half:
                    await self.stream.send_all(frame[: len(frame) // 2])
                raise CutError
            self.sent += 1
            await self.stream.send_all(frame)

    async def ask(self, method: str, path: str, query: dict[str, Any], body: bytes = b"", kind: str = "") -> bytes:
        number = self.h2.get_next_available_stream_id()
        target = f"/{path}?{query_of(query)}" if query else f"/{path}"
        headers = [(":method", method), (":path", target), (":scheme", "https"), (":authority", "x")]
        headers += [("content-type", kind)] if kind else []
        self.h2.send_headers(number, headers, end_stream=not body)
        if body:
            self.h2.send_data(number, body, end_stream=True)
        await self.flush()
        answer, status = b"", 0
        while True:
            data = await self.stream.receive_some()
            assert data, "the server ended the connection"
            for event in self.h2.receive_data(bytes(data)):
                if isinstance(event, ResponseReceived):
                    status = int(dict(event.headers or [])[b":status"])
                elif isinstance(event, DataReceived):
                    answer += event.data or b""
                    self.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
                elif isinstance(event, StreamEnded) and event.stream_id == number:
                    await self.flush()
                    assert status == 200, answer
                    return answer
            await self.flush()

    async def back_up(self, ctime: int) -> None:
        self.h2.initiate_connection()
        await self.flush()
        manifest = Manifest.new(GROUP.at(ctime))
        await self.ask("GET", "previous", {"archive-name": NAME})
        (wid,) = [json.loads(await self.ask("POST", "fixed_index", {"archive-name": NAME, "size": len(IMAGE)}))["data"]]
        digest = hashlib.sha256(IMAGE).hexdigest()
        blob = bytes(Blob.make(BlobKind.PLAIN, IMAGE))
        sizes = {"wid": wid, "digest": digest, "size": len(IMAGE), "encoded-size": len(blob)}
        await self.ask("POST", "fixed_chunk", sizes, blob)
        entries = {"wid": wid, "digest-list": [digest], "offset-list": [0]}
        await self.ask("PUT", "fixed_index", {}, json.dumps(entries).encode(), "application/json")
        csum = hashlib.sha256(bytes.fromhex(digest)).digest()
        await self.ask("POST", "fixed_close", {"wid": wid, "chunk-count": 1, "size": len(IMAGE), "csum": csum.hex()})
        manifest.add(ManifestFile(NAME, CryptMode.NONE, len(IMAGE), csum))
        whole = bytes(manifest.encode(ChunkCodec()))
        await self.ask("POST", "blob", {"file-name": "index.json.blob", "encoded-size": len(whole)}, whole)
        await self.ask("POST", "finish", {})


async def run(direct: Direct, ctime: int, frames: int, *, half: bool = False) -> Wire:
    ours, theirs = memory_stream_pair()
    wire = Wire(theirs, frames, half)
    async with direct.session("backup", "u@pbs", query(ctime)) as session, open_nursery() as nursery:
        nursery.start_soon(session.opened.serve, ours, b"")
        with suppress(CutError):
            await wire.back_up(ctime)
        await theirs.aclose()
    return wire


@pytest.mark.parametrize("half", [False, True])
async def test_a_backup_that_ends_at_any_frame_is_whole_or_gone_and_holds_no_lock(
    half: bool, direct: Direct, local: LocalRepository
) -> None:
    direct.right("/datastore/main", "u@pbs", "DatastoreBackup")
    await write_snapshot(local, GROUP, 1, {NAME: IMAGE}, chunk_size=4 << 20)
    await local.set_owner(GROUP, "u@pbs")
    count = (await run(direct, 1000, 1 << 20)).sent
    assert count >= 12
    finished = {1, 1000}
    for frames in range(count + 1):
        # Each begins as soon as the one before has gone: its locks are free.
        wire = await run(direct, 2000 + frames, frames, half=half)
        assert wire.sent == frames
        info = direct.state.tasks.infos()[0]
        found = {one.snapshot.ctime for one in await local.snapshots(unfinished=True)}
        if info.status == OK:
            finished.add(2000 + frames)
        else:
            assert info.status == LOST
        assert found == finished
        assert direct.state.tasks.busy == 0
    # It may only be there once `finish` was sent whole.
    assert finished <= {1, 1000, *(2000 + frames for frames in range(count - 2, count + 1))}
    assert 2000 + count in finished
    for ctime in finished:
        assert await read_image(local, GROUP.at(ctime), NAME) == IMAGE


async def test_a_connection_that_ends_while_finish_is_at_work_does_not_deny_the_snapshot(
    direct: Direct, local: LocalRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct.right("/datastore/main", "u@pbs", "DatastoreBackup")
    begun, go_on = trio.Event(), trio.Event()
    finish = LocalBackupSession.finish

    async def slowly(self: LocalBackupSession) -> None:
        begun.set()
        await go_on.wait()
        await finish(self)

    monkeypatch.setattr(LocalBackupSession, "finish", slowly)
    await write_snapshot_slowly(direct, begun, go_on)
    assert [one.snapshot.ctime for one in await local.snapshots(unfinished=True)] == [1000]
    assert direct.state.tasks.infos()[0].status == OK


async def write_snapshot_slowly(direct: Direct, begun: trio.Event, go_on: trio.Event) -> None:
    ours, theirs = memory_stream_pair()
    wire = Wire(theirs, 1 << 20, half=False)

    async with direct.session("backup", "u@pbs", query(1000)) as session, open_nursery() as nursery:

        async def serve() -> None:
            await session.opened.serve(ours, b"")
            go_on.set()

        nursery.start_soon(serve)
        nursery.start_soon(_without_base, wire)
        with trio.fail_after(60):
            await begun.wait()
        await theirs.aclose()


async def _without_base(wire: Wire) -> None:
    ask = wire.ask

    async def asked(method: str, path: str, query: dict[str, Any], body: bytes = b"", kind: str = "") -> bytes:
        return b"" if path == "previous" else await ask(method, path, query, body, kind)

    wire.ask = asked  # type: ignore[method-assign]
    with suppress(AssertionError, trio.ClosedResourceError, trio.BrokenResourceError):  # it is taken from it
        await wire.back_up(1000)


async def test_requests_that_are_pipelined_do_not_pass_each_other_s_checks(
    direct: Direct, local: LocalRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_calls, "MAX_FIXED_ENTRIES", 32 * 10)
    direct.right("/datastore/main", "u@pbs", "DatastoreBackup")
    async with direct.session("backup", "u@pbs", query(1000)) as session:
        got: list[tuple[int, str]] = []

        async def ask(path: str, **parameters: Any) -> None:
            answer = await session.call("POST", path, {key.replace("_", "-"): one for key, one in parameters.items()})
            got.append((answer.status, answer.text))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(lambda: ask("dynamic_index", archive_name="a.didx"))
        assert sorted(status for status, _ in got) == [200, 400, 400, 400]
        got.clear()
        async with trio.open_nursery() as nursery:
            for number in range(4):
                image = partial(ask, archive_name=f"{number}.img.fidx", size=6 * (4 << 20))
                nursery.start_soon(image, "fixed_index")
        assert sorted(status for status, _ in got) == [200, 400, 400, 400]
        assert sum("TiB" in text for _, text in got) == 3


async def test_finish_waits_for_nothing_that_would_come_into_a_finished_snapshot(
    direct: Direct, local: LocalRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct.right("/datastore/main", "u@pbs", "DatastoreBackup")
    begun, go_on = trio.Event(), trio.Event()
    put = LocalBackupSession.put_blob

    async def slowly(self: LocalBackupSession, name: str, *rest: Any, **named: Any) -> None:
        if name == "late.blob":
            begun.set()
            await go_on.wait()
        await put(self, name, *rest, **named)

    monkeypatch.setattr(LocalBackupSession, "put_blob", slowly)
    blob = bytes(ChunkCodec().encode_blob(b"x"))
    manifest = Manifest.new(GROUP.at(1000))
    for name in ("early.blob", "late.blob"):
        manifest.add(ManifestFile(name, CryptMode.NONE, len(blob), hashlib.sha256(blob).digest()))
    whole = bytes(manifest.encode(ChunkCodec()))
    async with direct.session("backup", "u@pbs", query(1000)) as session, trio.open_nursery() as nursery:

        async def store(name: str, body: bytes) -> None:
            got = await session.call("POST", "blob", {"file-name": name, "encoded-size": len(body)}, body=body)
            assert got.status == 200, got.text

        await store("early.blob", blob)
        await store("index.json.blob", whole)
        nursery.start_soon(store, "late.blob", blob)
        await begun.wait()
        got = await session.call("POST", "finish")
        assert (got.status, got.text) == (400, "other requests are still being answered - unable to finish backup")
        go_on.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        got = await session.call("POST", "finish")
        assert got.status == 200, got.text
    (info,) = await local.snapshots()
    assert {file.filename for file in info.files} == {"early.blob", "late.blob", "index.json.blob"}
