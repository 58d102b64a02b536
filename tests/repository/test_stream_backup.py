"""Streams that a thread writes, over a real datastore."""

import hashlib
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
import trio.testing

from core.errors import FleeceError, NotFoundError
from core.progress import Progress, Task
from datastore.chunker import Cutter
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.index import ArchiveIndex
from datastore.names import BackupType, Group, Snapshot
from repository.archive import open_archive_reader, open_cache
from repository.backup import SnapshotWriter
from repository.interface import BackupSession, BlockingPuts
from repository.local import LocalRepository, open_local
from repository.restore import load_manifest
from repository.stored_bytes import open_streams
from repository.stream_backup import GATHERED, StreamBackup, StreamSpec
from repository.stream_reference import StreamReference, open_reference
from repository.verify import verify
from tests.support.waiting import cancelled_when

GROUP = Group(BackupType.HOST, "web")
AVERAGE = 64 << 10
META, PAYLOAD = "root.mpxar.didx", "root.ppxar.didx"
KEY = CryptKey(bytes(range(32)))
CODECS = {
    "plain": ChunkCodec(),
    "encrypted": ChunkCodec(KEY, CryptMode.ENCRYPT),
    "signed": ChunkCodec(KEY, CryptMode.SIGN_ONLY),
}


class Known(NamedTuple):
    digest: bytes
    size: int


@pytest.fixture
async def repo(store_folder: Path) -> AsyncIterator[LocalRepository]:
    repository = await open_local(store_folder)
    yield repository
    repository.close()


async def back_up(
    repo: LocalRepository,
    ctime: int,
    write: Callable[[Sequence[StreamBackup]], None],
    codec: ChunkCodec | None = None,
    specs: Sequence[StreamSpec] = (StreamSpec(PAYLOAD, AVERAGE), StreamSpec(META, AVERAGE)),
) -> Snapshot:
    async with repo.backup(GROUP.at(ctime)) as session:
        writer = SnapshotWriter(session, codec or ChunkCodec())
        await writer.add_streams("root", specs, write)
        await writer.finish()
    return GROUP.at(ctime)


async def read_back(
    repo: LocalRepository, snapshot: Snapshot, name: str, codec: ChunkCodec | None = None
) -> tuple[bytes, list[int]]:
    """The stream, and where its chunks end."""
    codec = codec or ChunkCodec()
    async with repo.reader(snapshot) as reader, open_cache() as cache:
        manifest = await load_manifest(reader, codec)
        archive = await open_archive_reader(reader, codec, manifest, name, cache)
        index = archive.archive.index
        ends = [sum(index.span(number)) for number in range(index.count)]
        return await archive.read(0, archive.size), ends


def pieces(choose: random.Random, total: int) -> list[bytes]:
    """Writes of all sizes; some of it repeats and some is constant."""
    made: list[bytes] = []
    left = total
    while left > 0:
        size = min(left, choose.choice([1, 16, 150, 4000, 70_000, GATHERED - 1, GATHERED, GATHERED + 1, 600_000]))
        made.append(choose.choice([choose.randbytes(size), bytes(size), (b"abc" * size)[:size]]))
        left -= size
    return made


@pytest.mark.parametrize("name", CODECS)
async def test_what_a_thread_writes_is_read_back(repo: LocalRepository, name: str) -> None:
    choose = random.Random(5)
    meta, payload = pieces(choose, 3 << 20), pieces(choose, 20 << 20)

    def write(streams: Sequence[StreamBackup]) -> None:
        into, beside = streams
        beside_left = list(meta)
        for number, piece in enumerate(payload):
            if number % 3 == 0:
                into.suggest()
            if number % 2 or len(piece) > 4 << 20:
                into.write(piece)
            else:
                into.reserve(len(piece) + 10)[: len(piece)] = piece
                into.commit(len(piece))
            if beside_left:
                beside.write(beside_left.pop())
        while beside_left:
            beside.write(beside_left.pop())
        assert into.position == sum(map(len, payload))

    snapshot = await back_up(repo, 1_700_000_000, write, CODECS[name])
    data, ends = await read_back(repo, snapshot, PAYLOAD, CODECS[name])
    assert hashlib.sha256(data).digest() == hashlib.sha256(b"".join(payload)).digest()
    assert max(b - a for a, b in zip([0, *ends], ends, strict=False)) <= 4 * AVERAGE
    data, ends = await read_back(repo, snapshot, META, CODECS[name])
    assert data == b"".join(reversed(meta))
    cutter = Cutter(AVERAGE)
    assert ends[:-1] == ends_of(cutter.feed(data))
    (result,) = await verify(repo, [snapshot], CODECS[name])
    assert not result.errors


def ends_of(events: Sequence[int]) -> list[int]:
    ends: list[int] = []
    for event in events:
        ends.append((ends[-1] if ends else 0) + event)
    return ends


async def test_cuts_follow_the_gathered_writes(repo: LocalRepository) -> None:
    choose = random.Random(11)
    writes = [choose.randbytes(choose.choice([16, 16, 5_000, 40_000, 300_000])) for _ in range(300)]
    suggested = {number for number in range(300) if choose.random() < 0.5}

    def write(streams: Sequence[StreamBackup]) -> None:
        for number, piece in enumerate(writes):
            if number in suggested:
                streams[0].suggest()
            streams[0].write(piece)

    snapshot = await back_up(repo, 1_700_000_000, write, specs=[StreamSpec(PAYLOAD, AVERAGE)])
    _, ends = await read_back(repo, snapshot, PAYLOAD)

    cutter, gathered, position, events, counted = Cutter(AVERAGE), b"", 0, [], 0

    def feed(block: bytes) -> None:
        nonlocal counted
        before = counted
        for event in cutter.feed(block):
            before += event
            events.append(before)
        counted += len(block)

    for number, piece in enumerate(writes):
        if number in suggested:
            cutter.suggest(position)
        if gathered and len(gathered) + len(piece) > GATHERED:
            feed(gathered)
            gathered = b""
        gathered += piece
        position += len(piece)
    feed(gathered)
    assert ends == [*events, position]


async def test_chunks_of_the_previous_snapshot_are_taken_over(repo: LocalRepository) -> None:
    data = random.Random(2).randbytes(3 << 20)
    first = await back_up(
        repo, 1_700_000_000, lambda streams: streams[0].write(data), specs=[StreamSpec(PAYLOAD, AVERAGE)]
    )
    _, ends = await read_back(repo, first, PAYLOAD)
    async with repo.reader(first) as reader:
        index = await reader.open_index(PAYLOAD)
    chunks = [Known(index.digest(number), index.span(number)[1]) for number in range(index.count)]
    positions: list[int] = []

    def write(streams: Sequence[StreamBackup]) -> None:
        (stream,) = streams
        stream.write(b"head" * 4)
        stream.inject(chunks[2:5])
        positions.append(stream.position)
        stream.write(b"middle" * 100_000)
        stream.inject(chunks[5:6])
        stream.inject(chunks[6:7])
        stream.write(b"tail" * 4)

    second = await back_up(repo, 1_700_000_001, write, specs=[StreamSpec(PAYLOAD, AVERAGE)])
    read, _ = await read_back(repo, second, PAYLOAD)
    reused, more = data[ends[1] : ends[4]], data[ends[4] : ends[6]]
    assert read == b"head" * 4 + reused + b"middle" * 100_000 + more + b"tail" * 4
    assert positions == [16 + len(reused)]


async def test_injection_as_the_last_thing(repo: LocalRepository) -> None:
    data = random.Random(2).randbytes(1 << 20)
    first = await back_up(
        repo, 1_700_000_000, lambda streams: streams[0].write(data), specs=[StreamSpec(PAYLOAD, AVERAGE)]
    )
    async with repo.reader(first) as reader:
        index = await reader.open_index(PAYLOAD)
    chunks = [Known(index.digest(number), index.span(number)[1]) for number in range(index.count)]

    def write(streams: Sequence[StreamBackup]) -> None:
        streams[0].write(b"x")
        streams[0].inject(chunks)

    second = await back_up(repo, 1_700_000_001, write, specs=[StreamSpec(PAYLOAD, AVERAGE)])
    assert (await read_back(repo, second, PAYLOAD))[0] == b"x" + data


async def test_error_of_the_thread_ends_the_backup_and_lists_nothing(repo: LocalRepository) -> None:
    def write(streams: Sequence[StreamBackup]) -> None:
        streams[0].write(bytes(5 << 20))
        raise FleeceError("read", "/etc", "it is broken")

    with pytest.raises(FleeceError, match="it is broken"):
        await back_up(repo, 1_700_000_000, write)
    assert await repo.snapshots() == []


async def test_error_of_the_store_ends_the_thread(repo: LocalRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = random.Random(1)

    def write(streams: Sequence[StreamBackup]) -> None:
        while True:
            streams[0].write(choose.randbytes(100_000))

    def refuse(self: BackupSession, *arguments: object) -> None:
        raise FleeceError("store chunk", "here", "no space left")

    async with repo.backup(GROUP.at(1_700_000_000)) as session:
        monkeypatch.setattr(type(session), "put_chunk", refuse)
        monkeypatch.setattr(type(session), "put_chunk_blocking", refuse)
        writer = SnapshotWriter(session, ChunkCodec())
        with trio.fail_after(60), pytest.raises(FleeceError, match="no space left"):
            await writer.add_streams("root", [StreamSpec(PAYLOAD, AVERAGE)], write)


async def test_cancelled_backup_ends_the_thread(repo: LocalRepository) -> None:
    choose = random.Random(1)

    written = 0

    def write(streams: Sequence[StreamBackup]) -> None:
        nonlocal written
        while True:
            streams[0].write(choose.randbytes(100_000))
            written += 1

    async with cancelled_when(lambda: written > 3) as scope:
        await back_up(repo, 1_700_000_000, write)
    assert scope.cancelled_caught
    assert await repo.snapshots() == []


async def test_chunk_that_is_stored_after_the_cancellation_shows_no_progress(
    repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, over, scope = threading.Event(), threading.Event(), trio.CancelScope()
    token = trio.lowlevel.current_trio_token()
    events: list[str] = []

    class Watched(Progress):
        def changed(self, task: Task) -> None:
            events.append("changed")

        def ended(self, task: Task, *, ok: bool) -> None:
            events.append("ended")
            over.set()

    def put(*arguments: Any) -> Any:
        token.run_sync_soon(scope.cancel)
        assert over.wait(60)  # the thread is waited for, so what it tells comes later
        stored.set()
        return put_chunk(*arguments)

    def write(streams: Sequence[StreamBackup]) -> None:
        while True:
            streams[0].write(os.urandom(100_000))

    with scope:
        async with repo.backup(GROUP.at(1_700_000_000)) as session:
            assert isinstance(session, BlockingPuts)
            put_chunk = session.put_chunk_blocking
            monkeypatch.setattr(type(session), "put_chunk_blocking", lambda _, *arguments: put(*arguments))
            writer = SnapshotWriter(session, ChunkCodec(), progress=Watched())
            await writer.add_streams("root", [StreamSpec(PAYLOAD, AVERAGE)], write)
    await trio.testing.wait_all_tasks_blocked()
    assert scope.cancelled_caught
    assert stored.is_set()
    assert events[-1] == "ended"


@pytest.mark.parametrize("name", CODECS)
async def test_reference_gives_the_metadata_stream_and_the_payload_index(repo: LocalRepository, name: str) -> None:
    choose, codec = random.Random(4), CODECS[name]
    meta = choose.randbytes(2 << 20)

    def write(streams: Sequence[StreamBackup]) -> None:
        streams[0].write(b"payload")
        streams[1].write(meta)

    await back_up(repo, 1_700_000_000, write, codec)
    async with repo.backup(GROUP.at(1_700_000_001)) as session:
        manifest = await session.previous_manifest()
        async with open_reference(repo, session.base, manifest, session.previous_index, codec, "root") as reference:
            assert isinstance(reference, StreamReference)
            assert reference.payload.size == 7
            assert session.knows(reference.payload.digest(0))
            archive = reference.archive

            def look() -> None:
                for _ in range(2000):
                    offset, length = choose.randrange(len(meta)), choose.choice([1, 200, 200_000])
                    assert archive.read(offset, length) == meta[offset : offset + length]

            await trio.to_thread.run_sync(look)


async def test_reason_for_no_reference(repo: LocalRepository) -> None:
    async def reason(codec: ChunkCodec, name: str = "root") -> StreamReference | str:
        async with repo.backup(GROUP.at(1_700_000_100)) as session:
            manifest = await session.previous_manifest()
            async with open_reference(repo, session.base, manifest, session.previous_index, codec, name) as found:
                return found

    def write(streams: Sequence[StreamBackup]) -> None:
        for stream in streams:
            stream.write(b"x")

    assert await reason(ChunkCodec()) == "no previous snapshot that is good"
    legacy = [StreamSpec("root.pxar.didx", AVERAGE), StreamSpec("catalog.pcat1.didx", AVERAGE)]
    await back_up(repo, 1_700_000_000, write, specs=legacy)
    assert await reason(ChunkCodec()) == "the previous snapshot has it in mode legacy"
    assert await reason(ChunkCodec(), "etc") == "it is not in the previous snapshot"
    await back_up(repo, 1_700_000_001, write)
    assert isinstance(await reason(ChunkCodec()), StreamReference)
    assert await reason(CODECS["encrypted"]) == "key changed"
    await back_up(repo, 1_700_000_002, write, CODECS["encrypted"])
    assert await reason(ChunkCodec()) == "key changed"
    assert await reason(CODECS["signed"]) == "crypt mode changed from encrypt to sign-only"
    path = next(Path(repo.name).glob(f"host/web/*/{PAYLOAD}"))
    await back_up(repo, 1_700_000_003, write)
    newest = sorted(Path(repo.name).glob(f"host/web/*/{PAYLOAD}"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    assert path != newest
    assert await reason(ChunkCodec()) == f"index {PAYLOAD} of the previous snapshot is missing or damaged"


async def test_payload_index_that_is_not_the_manifests_is_no_reference(repo: LocalRepository) -> None:
    def write(streams: Sequence[StreamBackup]) -> None:
        for stream in streams:
            stream.write(stream.filename.encode())

    await back_up(repo, 1_700_000_000, write)
    base = GROUP.at(1_700_000_000)
    async with repo.reader(base) as reader:
        manifest = await reader.manifest()

        async def index(name: str) -> ArchiveIndex | None:
            return await reader.open_index({PAYLOAD: given}.get(name, name))

        found = {}
        for given in (PAYLOAD, META):  # whole, but another one
            async with open_reference(repo, base, manifest, index, ChunkCodec(), "root") as reference:
                found[given] = reference
    assert isinstance(found[PAYLOAD], StreamReference)
    assert found[META] == f"index {PAYLOAD} of the previous snapshot is missing or damaged"


async def test_streams_of_an_archive_are_read_by_a_thread(repo: LocalRepository) -> None:
    choose = random.Random(9)
    meta, payload = choose.randbytes(300_000), choose.randbytes(5 << 20)

    def write(streams: Sequence[StreamBackup]) -> None:
        streams[0].write(payload)
        streams[1].write(meta)

    snapshot = await back_up(repo, 1_700_000_000, write)
    codec = ChunkCodec()
    async with repo.reader(snapshot) as reader:
        manifest = await load_manifest(reader, codec)
        for name in ("root", "root.pxar", "root.mpxar", "root.ppxar.didx", "root.pxar.didx"):
            async with open_streams(reader, codec, manifest, name) as streams:
                assert streams.name == "root"
                assert streams.payload is not None
                assert (streams.archive.size, streams.payload.size) == (len(meta), len(payload))
                whole = streams.payload.read
                assert await trio.to_thread.run_sync(lambda: whole(0, len(payload) + 5)) == payload  # noqa: B023
        with pytest.raises(NotFoundError, match="no such file archive"):
            async with open_streams(reader, codec, manifest, "etc.pxar"):
                pass
