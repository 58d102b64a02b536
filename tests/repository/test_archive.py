"""Random access to an archive through the chunk cache."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from core.errors import FormatError
from datastore.blob import Blob
from datastore.codec import ChunkCodec
from datastore.errors import ChunkNotFoundError, CorruptChunkError
from datastore.names import BackupType, Group
from repository.archive import ArchiveReader, open_archive_reader, open_cache
from repository.backup import SnapshotWriter
from repository.interface import FIXED_CHUNK_SIZE as CHUNK
from repository.restore import load_manifest
from tests.support.sessions import MemoryDisk, MemoryRepository, chunks_of
from tests.support.waiting import until

SNAPSHOT = Group(BackupType.VM, "100").at(1_700_000_000)
IMG, FIDX = "drive-scsi0.img", "drive-scsi0.img.fidx"


@asynccontextmanager
async def opened(data: bytes, capacity: int = 8 * CHUNK) -> AsyncIterator[tuple[ArchiveReader, MemoryRepository]]:
    repository = MemoryRepository()
    codec = ChunkCodec()
    async with repository.backup(SNAPSHOT) as session:
        writer = SnapshotWriter(session, codec)
        await writer.add_disk(MemoryDisk(IMG, data))
        await writer.finish()
    async with repository.reader(SNAPSHOT) as reader, open_cache(capacity) as cache:
        manifest = await load_manifest(reader, codec)
        yield await open_archive_reader(reader, codec, manifest, FIDX, cache), repository


DATA = chunks_of("a.?b..cd", tail=5000)


async def test_any_range_reads_as_in_the_image() -> None:
    choose = random.Random(7)
    async with opened(DATA, capacity=3 * CHUNK) as (archive, _):
        assert archive.size == len(DATA)
        for _ in range(100):
            offset = choose.randrange(len(DATA))
            length = choose.choice([1, 4096, 131072, CHUNK + 5])
            assert await archive.read(offset, length) == DATA[offset : offset + length]
        assert archive.cache.size <= 3 * CHUNK


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (len(DATA), 10), (len(DATA) + 5, 10), (len(DATA) - 1, 10), (CHUNK - 1, 2)]
)
async def test_ranges_at_the_borders_are_cut(offset: int, length: int) -> None:
    async with opened(DATA) as (archive, _):
        assert await archive.read(offset, length) == DATA[offset : offset + length]


async def test_chunk_in_the_cache_is_answered_at_once_and_not_read_again() -> None:
    async with opened(DATA) as (archive, repository):
        assert archive.read_cached(100, 4096) is None
        await archive.read(100, 4096)
        reads = len(repository.chunk_reads)
        assert archive.read_cached(5000, 4096) == DATA[5000 : 5000 + 4096]
        assert len(repository.chunk_reads) == reads


async def test_zero_chunks_are_answered_without_reading() -> None:
    async with opened(chunks_of("a..")) as (archive, repository):
        assert archive.read_cached(CHUNK + 1, 4096) == bytes(4096)
        assert await archive.read(CHUNK, 2 * CHUNK) == bytes(2 * CHUNK)
        assert repository.chunk_reads == []


async def test_many_readers_of_one_chunk_cause_one_read() -> None:
    async with opened(chunks_of("a")) as (archive, repository):
        repository.read_delay_s = 0.01
        async with trio.open_nursery() as nursery:
            for position in range(20):
                nursery.start_soon(archive.read, position * 4096, 4096)
        assert len(repository.chunk_reads) == 1


async def test_cancelled_reader_does_not_fail_the_others() -> None:
    async with opened(chunks_of("a")) as (archive, repository):
        repository.read_delay_s = 0.05
        got = []

        async def read() -> None:
            got.append(await archive.read(0, 10))

        async with trio.open_nursery() as nursery, trio.open_nursery() as first:
            first.start_soon(read)
            await wait_all_tasks_blocked()
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        assert got == [b"a" * 10]


async def test_sequential_reader_finds_most_chunks_read_ahead() -> None:
    data = chunks_of("abcdefghijklmnopqrstuvwxyz0123456789")
    async with opened(data, capacity=32 * CHUNK) as (archive, repository):
        for offset in range(0, len(data), 1 << 20):
            assert await archive.read(offset, 1 << 20) == data[offset : offset + (1 << 20)]
            await until(lambda: archive.cache._ahead == 0)  # it is slower than the store
        assert len(repository.chunk_reads) == 36
        assert archive.cache.misses <= 4


async def test_a_chunk_that_is_long_on_its_way_does_not_hold_up_those_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = chunks_of("abcdefgh")
    async with opened(data, capacity=16 * CHUNK) as (archive, _):
        slow, arrives = archive.archive.index.digest(5), trio.Event()
        read_chunks = archive.reader.read_chunks

        async def read(digests: Sequence[bytes]) -> Sequence[Blob]:
            if slow in digests:
                await arrives.wait()
            return await read_chunks(digests)

        monkeypatch.setattr(archive.reader, "read_chunks", read)
        for number in range(4):
            await archive.read(number * CHUNK, 100)
        await wait_all_tasks_blocked(0.05)
        assert archive.read_cached(5 * CHUNK, 100) is None
        assert archive.read_cached(4 * CHUNK, 100) == data[4 * CHUNK : 4 * CHUNK + 100]
        assert archive.read_cached(6 * CHUNK, 100) == data[6 * CHUNK : 6 * CHUNK + 100]
        arrives.set()
        assert await archive.read(5 * CHUNK, 100) == data[5 * CHUNK : 5 * CHUNK + 100]


async def test_from_afar_each_chunk_that_was_used_asks_for_another() -> None:
    """So many requests are always under way, instead of batches with pauses between them."""
    data = chunks_of("abcdefghijklmnopqrstuvwxyz0123456789")
    async with opened(data, capacity=64 * CHUNK) as (archive, repository):
        assert archive.is_far
        asked = []
        for chunk in range(16):
            await archive.read(chunk * CHUNK, 100)
            await wait_all_tasks_blocked(0.01)
            asked.append(len(repository.chunk_reads))
        assert asked[:5] == [1, 4, 7, 12, 21]  # it begins with few: most reads end soon
        assert asked[4:] == [chunk + 17 for chunk in range(4, 16)]


LONG = 512 << 10
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.mark.parametrize(
    ("offset", "length", "within", "chunks"),
    [
        (0, LONG, None, 4),
        (0, LONG - 4096, None, 1),  # a signature is looked for
        (4096, LONG, None, 1),
        (20 * CHUNK + 5, LONG, None, 1),
        (20 * CHUNK + 5, LONG, (20 * CHUNK + 5, 30 * CHUNK), 4),  # a file in an archive
        (20 * CHUNK + 5, LONG, (20 * CHUNK + 5, 21 * CHUNK + 10), 2),  # one that ends soon
        (20 * CHUNK + 5, LONG, (20 * CHUNK + 5, 21 * CHUNK), 1),
        (20 * CHUNK + 5, LONG, (20 * CHUNK, 30 * CHUNK), 1),  # in its middle
        (34 * CHUNK, LONG, (34 * CHUNK, 1 << 60), 2),  # what is said of its end is wrong
        (35 * CHUNK, LONG, (35 * CHUNK, 36 * CHUNK), 1),
    ],
)
async def test_from_afar_who_begins_a_file_with_a_long_read_has_its_first_chunks_asked_for_at_once(
    offset: int, length: int, within: tuple[int, int] | None, chunks: int
) -> None:
    data = chunks_of(LETTERS)
    async with opened(data, capacity=64 * CHUNK) as (archive, repository):
        assert await archive.read(offset, length, within=within) == data[offset : offset + length]
        await wait_all_tasks_blocked(0.01)
        first = offset // CHUNK
        wanted = {archive.archive.index.digest(number) for number in range(first, first + chunks)}
        assert len(repository.chunk_reads) == chunks
        assert set(repository.chunk_reads) == wanted


async def test_from_afar_who_goes_on_after_a_long_read_has_all_requests_under_way_after_one_round_trip() -> None:
    data = chunks_of(LETTERS)
    async with opened(data, capacity=64 * CHUNK) as (archive, repository):
        asked = []
        for offset in range(0, 6 * CHUNK, 1 << 20):
            assert await archive.read(offset, 1 << 20) == data[offset : offset + (1 << 20)]
            await wait_all_tasks_blocked(0.01)
            if offset % CHUNK == 0:
                asked.append(len(repository.chunk_reads))
        assert asked == [4, 10, 19, 20, 21, 22]


async def test_files_that_follow_each_other_are_one_reading_for_the_read_ahead() -> None:
    """A file that begins where the one before ended is not begun anew: what is ahead grows."""
    data = chunks_of(LETTERS)
    async with opened(data, capacity=64 * CHUNK) as (archive, repository):
        for start in range(0, 32 * CHUNK, CHUNK):
            await archive.read(start, LONG, within=(start, start + CHUNK))
            await wait_all_tasks_blocked(0.01)
        assert len(repository.chunk_reads) == 36
        assert archive.cache.misses <= 2


async def test_close_by_a_long_read_asks_for_nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArchiveReader, "is_far", False)
    async with opened(chunks_of(LETTERS), capacity=64 * CHUNK) as (archive, repository):
        await archive.read(0, LONG)
        await wait_all_tasks_blocked(0.01)
        assert len(repository.chunk_reads) == 1


async def test_from_afar_what_found_no_room_is_read_ahead_later() -> None:
    data = chunks_of("abcdefghijklmnopqrstuvwxyz0123456789")
    async with opened(data, capacity=16 * CHUNK) as (archive, repository):
        for chunk in range(36):
            await archive.read(chunk * CHUNK, 100)
            await wait_all_tasks_blocked(0.01)
        assert len(repository.chunk_reads) == 36
        assert archive.cache.misses <= 2


async def test_random_reader_reads_nothing_ahead() -> None:
    data = chunks_of("abcdefghijklmnopqrstuvwxyz0123456789")
    async with opened(data, capacity=64 * CHUNK) as (archive, repository):
        for chunk in (30, 3, 17, 9, 24, 12):
            await archive.read(chunk * CHUNK, 4096)
        await trio.sleep(0.01)
        assert len(repository.chunk_reads) == 6


async def test_going_over_cached_chunks_again_soon_reads_nothing_ahead() -> None:
    data = chunks_of("abcdefghijklmnopqrstuvwxyz0123456789")
    async with opened(data, capacity=12 * CHUNK) as (archive, repository):
        counts = []
        for _ in range(10):
            for chunk in range(8):
                await archive.read(chunk * CHUNK, CHUNK)
                await wait_all_tasks_blocked(0.01)
            counts.append(len(repository.chunk_reads))
        assert counts[4] == counts[-1]


async def test_read_ahead_goes_on_behind_what_was_cached_before() -> None:
    data = chunks_of("abcdefghijklmnopqrstuvwxyz0123456789")
    async with opened(data, capacity=64 * CHUNK) as (archive, repository):
        for chunk in (0, 1, 2):
            await archive.read(chunk * CHUNK, CHUNK)
        await wait_all_tasks_blocked(0.01)
        for chunk in range(36):
            assert await archive.read(chunk * CHUNK, CHUNK) == data[chunk * CHUNK : (chunk + 1) * CHUNK]
            await wait_all_tasks_blocked(0.01)
        assert len(repository.chunk_reads) == 36
        assert archive.cache.misses <= 4


async def test_read_ahead_leaves_half_of_the_cache_alone() -> None:
    data = chunks_of("abcdefghijklmnopqrstuvwxyz")
    async with opened(data, capacity=4 * CHUNK) as (archive, repository):
        repository.read_delay_s = 0.001
        for offset in range(0, len(data), CHUNK):
            assert await archive.read(offset, CHUNK) == data[offset : offset + CHUNK]
            assert archive.cache.size <= 4 * CHUNK
        assert len(repository.chunk_reads) <= 26 + 13  # which of them comes first is for the scheduler to say


async def test_bad_chunk_fails_its_own_range_only() -> None:
    data = chunks_of("abcdefgh")
    async with opened(data) as (archive, repository):
        bad = archive.codec.digest(b"c" * CHUNK)
        good = repository.chunks[bad]
        repository.damage(bad)
        for chunk in range(8):
            if chunk == 2:
                with pytest.raises(CorruptChunkError, match=f"at {2 * CHUNK}, chunk {bad.hex()}"):
                    await archive.read(2 * CHUNK, 4096)
            else:
                assert await archive.read(chunk * CHUNK, 10) == data[chunk * CHUNK : chunk * CHUNK + 10]
        repository.chunks[bad] = good
        assert await archive.read(2 * CHUNK, 4) == b"cccc"


async def test_missing_chunk_that_was_read_ahead_fails_only_who_asks_for_it() -> None:
    data = chunks_of("abcdefgh")
    async with opened(data) as (archive, repository):
        missing = archive.codec.digest(b"d" * CHUNK)
        del repository.chunks[missing]
        for chunk in (0, 1, 2):
            await archive.read(chunk * CHUNK, CHUNK)
        await trio.sleep(0.02)
        with pytest.raises(ChunkNotFoundError, match=missing.hex()):
            await archive.read(3 * CHUNK, 1)
        assert await archive.read(4 * CHUNK, 1) == b"e"


async def test_two_archives_share_chunks_in_the_cache() -> None:
    async with opened(chunks_of("ab")) as (archive, repository):
        other = ArchiveReader(archive.reader, archive.codec, archive.archive, archive.cache)
        await archive.read(0, 1)
        assert other.read_cached(5, 3) == b"aaa"
        assert len(repository.chunk_reads) == 1


async def test_index_that_differs_from_the_manifest_is_not_opened() -> None:
    async with opened(chunks_of("ab")) as (archive, repository):
        files = repository.stored[SNAPSHOT].files
        files[FIDX] = files[FIDX][:-1] + bytes([files[FIDX][-1] ^ 1])
        manifest = repository.manifest(SNAPSHOT)
        with pytest.raises(FormatError, match="wrong index checksum"):
            await open_archive_reader(archive.reader, archive.codec, manifest, FIDX, archive.cache)
