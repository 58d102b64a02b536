"""Disks and small files into a session: what is read, what is stored, what the report says."""

import hashlib
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from core.disks import Extent, ExtentState
from core.errors import FleeceError, SourceError, UsageError
from core.progress import Progress, Task
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.names import BackupType, Group
from repository import buffers, disk_backup, pipeline
from repository.backup import SnapshotWriter
from repository.interface import FIXED_CHUNK_SIZE as CHUNK
from repository.report import ArchiveReport
from tests.support.sessions import (
    BlockingMemorySession,
    Faults,
    MemoryDisk,
    MemoryRepository,
    MemorySession,
    StagedError,
    chunks_of,
)

GROUP = Group(BackupType.VM, "100")
IMG = "drive-scsi0.img"
CLEAN, ZERO, DATA = ExtentState.CLEAN, ExtentState.ZERO, ExtentState.DATA
KEY, OTHER_KEY = CryptKey(bytes(range(32))), CryptKey(bytes(range(1, 33)))


async def back_up(
    repository: MemoryRepository, *disks: MemoryDisk, ctime: int = 1_700_000_000, codec: ChunkCodec | None = None
) -> tuple[list[ArchiveReport], MemorySession]:
    async with repository.backup(GROUP.at(ctime)) as session:
        writer = SnapshotWriter(session, codec or ChunkCodec())
        reports = await writer.add_disks(disks)
        await writer.finish()
    return reports, session


def image_digests(repository: MemoryRepository, ctime: int, name: str = IMG) -> list[bytes]:
    data = repository.stored[GROUP.at(ctime)].files[f"{name}.fidx"][4096:]
    return [data[at : at + 32] for at in range(0, len(data), 32)]


def expected_digests(data: bytes) -> list[bytes]:
    return [hashlib.sha256(data[at : at + CHUNK]).digest() for at in range(0, len(data), CHUNK)]


async def test_worked_example_of_the_format_gives_the_same_digests_and_checksum() -> None:
    data = bytes(CHUNK) + b"\x01" * CHUNK + b"\x02" * 4096
    repository = MemoryRepository()
    await back_up(repository, MemoryDisk(IMG, data))
    assert [digest.hex()[:16] for digest in image_digests(repository, 1_700_000_000)] == [
        "bb9f8df61474d25e",
        "5d2bafc266e711ed",
        "30d6bc164ea54188",
    ]
    entry = repository.manifest(GROUP.at(1_700_000_000)).file(f"{IMG}.fidx")
    assert entry.size == 8392704
    assert entry.csum.hex() == "482a7ab5d79a966d2856289cbaad1042aa819bb532a22e53fb4ed716c7b914c1"


async def test_new_disk_is_stored_chunk_by_chunk_and_reported() -> None:
    data = chunks_of("ab?a.", tail=1000)
    repository = MemoryRepository()
    disk = MemoryDisk(IMG, data, reason="no dirty bitmap")
    (report,), session = await back_up(repository, disk)
    assert image_digests(repository, 1_700_000_000) == expected_digests(data)
    assert len(session.puts) == 5  # a, b, ?, zeros, tail
    assert sorted(disk.read) == [(at, min(CHUNK, len(data) - at)) for at in range(0, len(data), CHUNK)]
    assert report.to_json() == {
        "name": IMG,
        "size": len(data),
        "mode": "full",
        "reason": "no dirty bitmap",
        "read": len(data),
        "dirty": None,
        "reused": CHUNK,
        "new": 4 * CHUNK + 1000,
        "stored": sum(map(len, repository.chunks.values())),
        "chunks": 6,
        "chunks-new": 5,
    }


async def test_stored_chunks_are_discarded_in_whole_chunks_up_to_the_end_of_the_disk() -> None:
    data = chunks_of("ab?", tail=5)
    disk = MemoryDisk(IMG, data)
    await back_up(MemoryRepository(), disk)
    covered = sorted(disk.discarded)
    assert covered[0][0] == 0
    assert all(at + length == after for (at, length), (after, _) in pairwise(covered))
    assert sum(length for _, length in covered) == len(data)
    assert all(at % CHUNK == 0 for at, _ in covered)


async def test_zero_extents_are_not_read_and_stored_once() -> None:
    data = chunks_of("a....b..", tail=0)
    extents = [
        Extent(0, CHUNK, DATA),
        Extent(CHUNK, 4 * CHUNK, ZERO),
        Extent(5 * CHUNK, CHUNK, DATA),
        Extent(6 * CHUNK, 2 * CHUNK, ZERO),
    ]
    repository = MemoryRepository()
    disks = [MemoryDisk(IMG, data, extents=extents), MemoryDisk("drive-scsi1.img", data, extents=extents)]
    reports, session = await back_up(repository, *disks)
    assert sorted(disks[0].read) == [(0, CHUNK), (5 * CHUNK, CHUNK)]
    assert len(session.puts) == 3
    for name in (IMG, "drive-scsi1.img"):
        assert image_digests(repository, 1_700_000_000, name) == expected_digests(data)
    assert sum(report.chunks_new for report in reports) == 3
    assert sum(length for _, length in disks[0].discarded) == len(data)


async def test_short_zero_tail_is_read_and_hashed_as_data() -> None:
    data = bytes(CHUNK + 512)
    disk = MemoryDisk(IMG, data, extents=[Extent(0, len(data), ZERO)])
    repository = MemoryRepository()
    await back_up(repository, disk)
    assert disk.read == [(CHUNK, 512)]
    assert image_digests(repository, 1_700_000_000) == expected_digests(data)


async def test_chunk_that_is_only_partly_zero_is_read() -> None:
    data = chunks_of(".")[: CHUNK // 2] + b"x" * (CHUNK // 2)
    disk = MemoryDisk(IMG, data, extents=[Extent(0, CHUNK // 2, ZERO), Extent(CHUNK // 2, CHUNK // 2, DATA)])
    repository = MemoryRepository()
    await back_up(repository, disk)
    assert image_digests(repository, 1_700_000_000) == expected_digests(data)


async def test_equal_chunks_in_flight_are_put_once() -> None:
    repository = MemoryRepository()
    repository.put_delay_s = 0.02
    data = chunks_of("aaaaaaaaaaaa")
    (report,), session = await back_up(repository, MemoryDisk(IMG, data))
    assert len(session.puts) == 1
    assert (report.new, report.reused) == (CHUNK, 11 * CHUNK)


async def test_chunk_of_another_group_counts_as_reused() -> None:
    repository = MemoryRepository()
    async with repository.backup(Group(BackupType.VM, "7").at(1000)) as session:
        writer = SnapshotWriter(session, ChunkCodec())
        await writer.add_disk(MemoryDisk(IMG, chunks_of("ab")))
        await writer.finish()
    (report,), _ = await back_up(repository, MemoryDisk(IMG, chunks_of("ac")))
    assert (report.new, report.reused, report.chunks_new) == (CHUNK, CHUNK, 1)
    stats = repository.manifest(GROUP.at(1_700_000_000)).chunk_upload_stats
    assert stats is not None
    assert (stats["count"], stats["size"], stats["duplicates"]) == (2, 2 * CHUNK, 1)


async def test_several_disks_share_one_bounded_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "MAX_BUFFERS", 5)
    repository = MemoryRepository()
    repository.put_delay_s = 0.001
    disks = [MemoryDisk(f"drive-scsi{number}.img", chunks_of("??????", "ab"), delay_s=0.001) for number in range(3)]
    reports, session = await back_up(repository, *disks)
    assert buffers.shared_pool().count == 5
    assert buffers.shared_pool()._memory is None  # given back with the last lease
    assert len(session.puts) == 8
    assert [report.name for report in reports] == ["drive-scsi0.img", "drive-scsi1.img", "drive-scsi2.img"]
    assert [file.filename for file in repository.manifest(GROUP.at(1_700_000_000)).files] == [
        f"drive-scsi{number}.img.fidx" for number in range(3)
    ]


@pytest.mark.parametrize("wanted", [None, 3])
async def test_two_reads_per_disk_and_sixteen_puts_are_in_flight_or_as_many_as_the_session_wants(
    wanted: int | None,
) -> None:
    repository = MemoryRepository()
    repository.put_gate = trio.Event()
    disk = MemoryDisk(IMG, chunks_of("abcdefghijklmnopqrstuvwxyz0123"), delay_s=0.001)
    async with repository.backup(GROUP.at(1000)) as session, trio.open_nursery() as nursery:
        if wanted is not None:
            session.puts_at_once = wanted  # type: ignore[attr-defined]
        nursery.start_soon(SnapshotWriter(session, ChunkCodec()).add_disk, disk)
        with trio.fail_after(60):
            while session.in_flight < (wanted or pipeline.PUTS_IN_FLIGHT):  # noqa: ASYNC110 - a count is no event
                await trio.sleep(0.005)
        await trio.sleep(0.05)
        assert session.in_flight == (wanted or pipeline.PUTS_IN_FLIGHT)
        repository.put_gate.set()
    assert len(session.puts) == 30
    assert disk.most_in_flight == disk_backup.READS_IN_FLIGHT


async def test_slow_source_is_not_kept_waiting_for_full_batches(autojump_clock: MockClock) -> None:
    repository = MemoryRepository()
    start = trio.current_time()
    await back_up(repository, MemoryDisk(IMG, chunks_of("abcdefgh"), delay_s=1.0))
    # Eight reads, two at a time, and the last chunks wait for no more company. While a thread works the clock may jump.
    assert trio.current_time() - start < 6.1


async def test_bandwidth_limit_covers_all_disks_together(autojump_clock: MockClock) -> None:
    async with MemoryRepository().backup(GROUP.at(1000)) as session:
        writer = SnapshotWriter(session, ChunkCodec())
        disks = [MemoryDisk(f"drive-scsi{number}.img", chunks_of("abcd")) for number in range(2)]
        start = trio.current_time()
        await writer.add_disks(disks, bwlimit=CHUNK)
        assert 6.0 <= trio.current_time() - start <= 8.1


async def test_progress_counts_what_is_read() -> None:
    class Recorder(Progress):
        def __init__(self) -> None:
            super().__init__()
            self.tasks: list[Task] = []

        def started(self, task: Task) -> None:
            self.tasks.append(task)

    recorder = Recorder()
    async with MemoryRepository().backup(GROUP.at(1000)) as session:
        writer = SnapshotWriter(session, ChunkCodec(), recorder)
        extents = [Extent(0, CHUNK, DATA), Extent(CHUNK, CHUNK, ZERO), Extent(2 * CHUNK, 10, DATA)]
        await writer.add_disk(MemoryDisk(IMG, chunks_of("a.", tail=10), extents=extents))
    (task,) = recorder.tasks
    assert (task.name, task.total, task.done) == (IMG, CHUNK + 10, CHUNK + 10)


class TestStoreThatTakesChunksInTheWorkersThread:
    async def test_everything_is_stored_there(self) -> None:
        data = chunks_of("ab?a.", "cc", tail=1000)
        repository = MemoryRepository(blocking=True)
        extents = [
            Extent(0, 4 * CHUNK, DATA),
            Extent(4 * CHUNK, CHUNK, ZERO),
            Extent(5 * CHUNK, 2 * CHUNK + 1000, DATA),
        ]
        (report,), session = await back_up(repository, MemoryDisk(IMG, data, extents=extents))
        assert isinstance(session, BlockingMemorySession)
        assert session.blocking_puts == len(session.puts) == 6
        assert image_digests(repository, 1_700_000_000) == expected_digests(data)
        assert (report.chunks_new, report.new) == (6, 5 * CHUNK + 1000)

    async def test_slow_puts_go_on_with_many_in_flight(self) -> None:
        repository = MemoryRepository(blocking=True)
        repository.put_delay_s = 5 * pipeline.SLOW_PUT_S
        data = chunks_of("abcdefghijklmnopqrstuvwxyz")
        _, session = await back_up(repository, MemoryDisk(IMG, data))
        assert isinstance(session, BlockingMemorySession)
        assert 0 < session.blocking_puts < 10
        assert len(session.puts) == 26
        assert image_digests(repository, 1_700_000_000) == expected_digests(data)

    async def test_failure_reaches_the_caller(self) -> None:
        faults = Faults("put_chunk", 3, StagedError("store", "chunk", "the store is full"))
        with pytest.raises(StagedError, match="the store is full"):
            await back_up(MemoryRepository(hook=faults, blocking=True), MemoryDisk(IMG, chunks_of("??????????")))
        assert buffers.shared_pool()._available.value == buffers.shared_pool().count


class TestFailures:
    @pytest.mark.parametrize("call", ["read_into", "extents", "discard"])
    async def test_failing_source_fails_the_backup_with_its_own_error(self, call: str) -> None:
        faults = Faults(call, 1, SourceError("read", IMG, "the frozen view is broken"))
        repository = MemoryRepository()
        with pytest.raises(SourceError, match="the frozen view is broken"):
            await back_up(repository, MemoryDisk(IMG, chunks_of("abcdefgh"), hook=faults))
        assert faults.met
        assert not repository.stored

    @pytest.mark.parametrize("call", ["open_index", "put_chunk", "append", "close_index", "put_blob", "finish"])
    async def test_failing_session_fails_the_backup_with_its_own_error(self, call: str) -> None:
        faults = Faults(call, 1, StagedError("store", "chunk", "the store is full"))
        repository = MemoryRepository(hook=faults)
        with pytest.raises(StagedError, match="the store is full"):
            await back_up(repository, MemoryDisk(IMG, chunks_of("abcdefgh??")))
        assert faults.met
        assert not repository.stored

    async def test_failed_backup_gives_its_buffers_back(self) -> None:
        faults = Faults("put_chunk", 3, StagedError("store", "chunk", "the store is full"))
        with pytest.raises(StagedError):
            await back_up(MemoryRepository(hook=faults), MemoryDisk(IMG, chunks_of("??????????")))
        pool = buffers.shared_pool()
        assert not pool.exhausted
        assert pool._available.value == pool.count

    async def test_cancelled_backup_ends_soon_and_gives_its_buffers_back(self, autojump_clock: MockClock) -> None:
        repository = MemoryRepository()
        repository.put_delay_s = 1000.0
        with trio.move_on_after(5) as scope:
            await back_up(repository, MemoryDisk(IMG, chunks_of("??abcdef")))
        assert scope.cancelled_caught
        assert trio.current_time() < 10
        assert not repository.stored
        assert buffers.shared_pool()._available.value == buffers.shared_pool().count

    async def test_error_while_hashing_reaches_the_caller(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(self: ChunkCodec, chunks: object) -> list[bytes]:
            raise StagedError("hash", "chunk", "no lanes")

        monkeypatch.setattr(ChunkCodec, "digest_many", broken)
        with pytest.raises(StagedError, match="no lanes"):
            await back_up(MemoryRepository(), MemoryDisk(IMG, chunks_of("abcd")))

    async def test_disk_of_zero_bytes_is_refused(self) -> None:
        with pytest.raises(SourceError, match=r"drive-scsi0\.img: it has 0 bytes"):
            await back_up(MemoryRepository(), MemoryDisk(IMG, b""))

    @pytest.mark.parametrize(
        "extents",
        [
            [],
            [Extent(0, CHUNK, DATA)],
            [Extent(0, CHUNK, DATA), Extent(CHUNK + 512, CHUNK - 512, DATA)],
            [Extent(0, 2 * CHUNK, DATA), Extent(CHUNK, CHUNK, CLEAN)],
            [Extent(0, 3 * CHUNK, DATA)],
        ],
    )
    async def test_map_with_holes_or_overlaps_is_refused(self, extents: list[Extent]) -> None:
        with pytest.raises(SourceError, match="extents"):
            await back_up(MemoryRepository(), MemoryDisk(IMG, chunks_of("ab"), extents=extents))

    async def test_nothing_to_finish_is_refused(self) -> None:
        async with MemoryRepository().backup(GROUP.at(1000)) as session:
            with pytest.raises(UsageError, match="nothing was added"):
                await SnapshotWriter(session, ChunkCodec()).finish()


class TestBlobs:
    async def test_small_file_is_listed_with_the_size_and_checksum_of_its_blob(self) -> None:
        repository = MemoryRepository()
        async with repository.backup(GROUP.at(1000)) as session:
            writer = SnapshotWriter(session, ChunkCodec())
            report = await writer.add_blob("qemu-server.conf", b"fleece")
            await writer.finish(notes="a note")
        raw = repository.stored[GROUP.at(1000)].files["qemu-server.conf.blob"]
        manifest = repository.manifest(GROUP.at(1000))
        entry = manifest.file("qemu-server.conf.blob")
        assert (entry.size, entry.csum) == (18, hashlib.sha256(raw).digest())
        assert entry.csum.hex() == "cf497da22589cb45d51894374a6ec7bd7dfd5462c0c1724503ce9a90fe60b795"
        assert manifest.notes == "a note"
        assert manifest.chunk_upload_stats == {"count": 0, "size": 18, "compressed_size": 0, "duplicates": 0}
        assert (report.name, report.size, report.new, report.stored) == ("qemu-server.conf", 6, 6, 18)

    async def test_manifest_of_an_encrypted_backup_is_signed(self) -> None:
        repository = MemoryRepository()
        codec = ChunkCodec(KEY, CryptMode.ENCRYPT)
        await back_up(repository, MemoryDisk(IMG, chunks_of("a")), ctime=1000, codec=codec)
        manifest = repository.manifest(GROUP.at(1000))
        assert manifest.signature is not None
        assert manifest.fingerprint == KEY.fingerprint

    async def test_file_that_stays_too_large_is_refused(self) -> None:
        data = hashlib.shake_256(b"x").digest(17 << 20)
        async with MemoryRepository().backup(GROUP.at(1000)) as session:
            with pytest.raises(FleeceError, match=r"at most 16777260 are possible; back it up as a disk image"):
                await SnapshotWriter(session, ChunkCodec()).add_blob("big.conf", data)

    @pytest.mark.parametrize("name", ["drive.img", "index.json", "what", "../x.conf"])
    async def test_other_names_are_refused(self, name: str) -> None:
        async with MemoryRepository().backup(GROUP.at(1000)) as session:
            with pytest.raises(UsageError):
                await SnapshotWriter(session, ChunkCodec()).add_blob(name, b"x")
