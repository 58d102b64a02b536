"""Archives of a snapshot to disks, streams and files, each chunk checked."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from core.errors import FleeceError, FormatError, NotFoundError, TargetError
from datastore.blob import Blob
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import ChunkNotFoundError, CorruptChunkError, KeyNeededError
from datastore.manifest import Manifest, ManifestFile
from datastore.names import BackupType, Group
from repository.backup import SnapshotWriter
from repository.fetch import MAX_READERS, READERS, SLOW_READ_S, Way
from repository.interface import FIXED_CHUNK_SIZE as CHUNK
from repository.local import open_local
from repository.restore import load_manifest, restore_blob, restore_disk, restore_stream
from tests.support.sessions import (
    BlockingMemoryReader,
    Faults,
    MemoryDisk,
    MemoryReader,
    MemoryRepository,
    MemoryTarget,
    StagedError,
    chunks_of,
)

SNAPSHOT = Group(BackupType.VM, "100").at(1_700_000_000)
IMG, FIDX, CONF = "drive-scsi0.img", "drive-scsi0.img.fidx", "qemu-server.conf.blob"
KEY = CryptKey(bytes(range(32)))
DATA = chunks_of("a..b?", "a....cdefghijklmn", tail=777)


@asynccontextmanager
async def stored(
    data: bytes = DATA, codec: ChunkCodec | None = None, *, blocking: bool = False
) -> AsyncIterator[tuple[MemoryRepository, MemoryReader, ChunkCodec, Manifest]]:
    """A snapshot with one disk and one file, open for reading."""
    repository = MemoryRepository(blocking=blocking)
    codec = codec or ChunkCodec()
    async with repository.backup(SNAPSHOT) as session:
        writer = SnapshotWriter(session, codec)
        await writer.add_disk(MemoryDisk(IMG, data))
        await writer.add_blob("qemu-server.conf", b"name: fleece\n")
        await writer.finish()
    async with repository.reader(SNAPSHOT) as reader:
        yield repository, reader, codec, await load_manifest(reader, codec)


@pytest.mark.parametrize("mode", list(CryptMode))
async def test_disk_comes_back_as_it_was(mode: CryptMode) -> None:
    codec = ChunkCodec(None if mode is CryptMode.NONE else KEY, mode)
    async with stored(codec=codec) as (_, reader, codec, manifest):
        target = MemoryTarget(len(DATA))
        await restore_disk(reader, codec, manifest, FIDX, target)
        assert target.data == DATA
        assert target.zeroed == 6 * CHUNK
        assert target.flushed


async def test_zero_chunks_are_left_out_where_the_target_reads_as_zeros() -> None:
    async with stored() as (repository, reader, codec, manifest):
        target = MemoryTarget(len(DATA) + 4096, reads_zero=True)
        await restore_disk(reader, codec, manifest, FIDX, target)
        assert target.data[: len(DATA)] == DATA
        assert target.zeroed == 0
        assert target.written == len(DATA) - 6 * CHUNK
        assert codec.zero_digest() not in repository.chunk_reads


async def test_all_zero_disk_is_restored_without_reading_a_chunk() -> None:
    async with stored(chunks_of("..")) as (repository, reader, codec, manifest):
        target = MemoryTarget(2 * CHUNK)
        await restore_disk(reader, codec, manifest, FIDX, target)
        assert target.data == bytes(2 * CHUNK)
        assert repository.chunk_reads == []


async def test_zeros_at_the_end_of_an_image_of_larger_chunks_are_written_where_they_belong(store_folder: Path) -> None:
    """Other writers may make chunks of 8 or 16 MiB; then only a short last one is as long as the zero chunk."""
    codec, repository = ChunkCodec(), await open_local(store_folder)
    parts = [b"x" * (4 * CHUNK), bytes(CHUNK)]
    digests = codec.digest_many(parts)
    manifest = Manifest.new(SNAPSHOT)
    csum = hashlib.sha256(b"".join(digests)).digest()
    manifest.add(ManifestFile(FIDX, CryptMode.NONE, 5 * CHUNK, csum))
    async with repository.backup(SNAPSHOT) as session:
        writer = await session.open_index(FIDX, size=5 * CHUNK, chunk_size=4 * CHUNK)
        for part, digest in zip(parts, digests, strict=True):
            await session.put_chunk(writer, digest, len(part), codec.encode(part))
        await session.append(writer, [(0, digests[0]), (4 * CHUNK, digests[1])])
        await session.close_index(writer, 2, 5 * CHUNK, csum)
        await session.put_blob("index.json.blob", manifest.encode(codec))
        await session.finish()
    async with repository.reader(SNAPSHOT) as reader:
        target = MemoryTarget(5 * CHUNK)
        await restore_disk(reader, codec, manifest, FIDX, target)
    repository.close()
    assert target.data == b"".join(parts)


async def test_smaller_target_is_refused_before_anything_is_written() -> None:
    async with stored() as (_, reader, codec, manifest):
        target = MemoryTarget(len(DATA) - 1)
        with pytest.raises(TargetError, match=rf"the target has {len(DATA) - 1} bytes, the image {len(DATA)}"):
            await restore_disk(reader, codec, manifest, FIDX, target)
        assert target.written == target.zeroed == 0


async def test_stream_gets_every_byte_in_order_also_when_later_chunks_come_first() -> None:
    async with stored() as (repository, reader, codec, manifest):
        repository.read_delay_s = 0.001
        received = bytearray()

        async def sink(data: bytes | bytearray | memoryview) -> None:
            await trio.lowlevel.checkpoint()
            received.extend(data)

        await restore_stream(reader, codec, manifest, FIDX, sink)
        assert received == DATA


async def test_chunks_are_read_in_the_thread_that_decodes_them_where_that_is_quick() -> None:
    async with stored(blocking=True) as (repository, reader, codec, manifest):
        target = MemoryTarget(len(DATA))
        await restore_disk(reader, codec, manifest, FIDX, target)
        assert target.data == DATA
        assert isinstance(reader, BlockingMemoryReader)
        assert reader.blocking_reads == len(repository.chunk_reads) == 17


async def test_slow_reads_go_on_with_many_in_flight() -> None:
    data = chunks_of("abcdefghijklmnopqrstuvwxyz" * 3)
    async with stored(data, blocking=True) as (repository, reader, codec, manifest):
        repository.read_delay_s = 3 * SLOW_READ_S
        received = bytearray()

        async def sink(piece: bytes | bytearray | memoryview) -> None:
            received.extend(piece)

        await restore_stream(reader, codec, manifest, FIDX, sink)
        assert received == data
        assert isinstance(reader, BlockingMemoryReader)
        assert 0 < reader.blocking_reads < 60
        assert len(repository.chunk_reads) == 78


@pytest.mark.parametrize("gone", [True, False])
async def test_chunk_that_fails_in_the_thread_that_decodes_it_is_named(gone: bool) -> None:
    async with stored(chunks_of("ab"), blocking=True) as (repository, reader, codec, manifest):
        digest = codec.digest(b"b" * CHUNK)
        if gone:
            del repository.chunks[digest]
        else:
            repository.damage(digest)
        with pytest.raises((ChunkNotFoundError, CorruptChunkError), match=f"at {CHUNK}, chunk {digest.hex()}"):
            await restore_disk(reader, codec, manifest, FIDX, MemoryTarget(2 * CHUNK))


async def test_stream_stops_in_front_of_a_bad_chunk() -> None:
    data = chunks_of("abcdefgh")
    async with stored(data) as (repository, reader, codec, manifest):
        repository.damage(codec.digest(b"f" * CHUNK))
        received = bytearray()

        async def sink(piece: bytes | bytearray | memoryview) -> None:
            received.extend(piece)

        with pytest.raises(CorruptChunkError):
            await restore_stream(reader, codec, manifest, FIDX, sink)
        assert received == data[: 5 * CHUNK]


@pytest.mark.parametrize("position", [0, 8, 12, 40, -1])
async def test_bad_chunk_names_snapshot_archive_offset_and_digest(position: int) -> None:
    async with stored(chunks_of("ab")) as (repository, reader, codec, manifest):
        digest = codec.digest(b"b" * CHUNK)
        repository.damage(digest, position)
        where = rf"{SNAPSHOT}/{FIDX} at {CHUNK}, chunk {digest.hex()}"
        with pytest.raises(FormatError, match=where):
            await restore_disk(reader, codec, manifest, FIDX, MemoryTarget(2 * CHUNK))


async def test_chunk_with_the_content_of_another_is_found_by_its_digest() -> None:
    async with stored(chunks_of("ab")) as (repository, reader, codec, manifest):
        a, b = (codec.digest(letter * CHUNK) for letter in (b"a", b"b"))
        repository.chunks[a] = repository.chunks[b]
        with pytest.raises(CorruptChunkError, match=f"chunk {a.hex()}"):
            await restore_disk(reader, codec, manifest, FIDX, MemoryTarget(2 * CHUNK))


async def test_chunk_of_another_length_is_refused() -> None:
    async with stored(chunks_of("ab")) as (repository, reader, codec, manifest):
        repository.chunks[codec.digest(b"a" * CHUNK)] = bytes(codec.encode(b"a" * (CHUNK - 1)))
        with pytest.raises(CorruptChunkError, match=str(CHUNK)):
            await restore_disk(reader, codec, manifest, FIDX, MemoryTarget(2 * CHUNK))


async def test_plain_chunk_in_an_encrypted_archive_is_refused() -> None:
    async with stored(chunks_of("ab"), ChunkCodec(KEY, CryptMode.ENCRYPT)) as (repository, reader, codec, manifest):
        repository.chunks[codec.digest(b"a" * CHUNK)] = bytes(ChunkCodec().encode(b"a" * CHUNK))
        with pytest.raises(FormatError, match="not encrypted"):
            await restore_disk(reader, codec, manifest, FIDX, MemoryTarget(2 * CHUNK))


async def test_missing_chunk_is_named() -> None:
    async with stored(chunks_of("ab")) as (repository, reader, codec, manifest):
        digest = codec.digest(b"a" * CHUNK)
        del repository.chunks[digest]
        with pytest.raises(ChunkNotFoundError, match=f"at 0, chunk {digest.hex()}"):
            await restore_disk(reader, codec, manifest, FIDX, MemoryTarget(2 * CHUNK))


async def test_index_that_differs_from_the_manifest_is_refused() -> None:
    async with stored(chunks_of("ab")) as (repository, reader, codec, manifest):
        files = repository.stored[SNAPSHOT].files
        files[FIDX] = files[FIDX][:-1] + bytes([files[FIDX][-1] ^ 1])
        target = MemoryTarget(2 * CHUNK)
        with pytest.raises(FormatError, match="wrong index checksum"):
            await restore_disk(reader, codec, manifest, FIDX, target)
        assert target.written == 0


async def test_encrypted_disk_without_its_key_says_what_is_needed() -> None:
    async with stored(codec=ChunkCodec(KEY, CryptMode.ENCRYPT)) as (_, reader, _, manifest):
        with pytest.raises(KeyNeededError, match="--keyfile"):
            await restore_disk(reader, ChunkCodec(), manifest, FIDX, MemoryTarget(len(DATA)))


async def test_archive_that_is_not_listed_is_not_found() -> None:
    async with stored() as (_, reader, codec, manifest):
        with pytest.raises(NotFoundError, match="the snapshot holds"):
            await restore_disk(reader, codec, manifest, "drive-scsi9.img.fidx", MemoryTarget(1))


@pytest.mark.parametrize("call", ["write", "zero", "flush"])
async def test_failing_target_fails_the_restore_with_its_own_error(call: str) -> None:
    async with stored() as (_, reader, codec, manifest):
        faults = Faults(call, 1, StagedError("write", "the target", "no space left"))
        with pytest.raises(StagedError, match="no space left"):
            await restore_disk(reader, codec, manifest, FIDX, MemoryTarget(len(DATA), hook=faults))
        assert faults.met


async def test_small_file_comes_back_as_it_was() -> None:
    for codec in (ChunkCodec(), ChunkCodec(KEY, CryptMode.ENCRYPT)):
        async with stored(chunks_of("a"), codec) as (_, reader, codec, manifest):
            assert await restore_blob(reader, codec, manifest, CONF) == b"name: fleece\n"


@pytest.mark.parametrize(("position", "why"), [(None, "wrong size"), (20, "wrong checksum")])
async def test_small_file_that_differs_from_the_manifest_is_refused(position: int | None, why: str) -> None:
    async with stored(chunks_of("a")) as (repository, reader, codec, manifest):
        files = repository.stored[SNAPSHOT].files
        raw = bytearray(files[CONF])
        if position is None:
            raw += b"!"
        else:
            raw[position] ^= 1
        files[CONF] = bytes(raw)
        with pytest.raises(FleeceError, match=why):
            await restore_blob(reader, codec, manifest, CONF)


async def test_encrypted_small_file_without_its_key_is_not_restored() -> None:
    async with stored(chunks_of("a"), ChunkCodec(KEY, CryptMode.ENCRYPT)) as (_, reader, _, manifest):
        with pytest.raises(KeyNeededError):
            await restore_blob(reader, ChunkCodec(), manifest, CONF)


async def test_chunks_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = hashlib.shake_256(b"seed").digest(CHUNK) + chunks_of("abcdefghijklmnopqrstuvwxyz" * 2)
    async with stored(data) as (repository, reader, codec, manifest):
        target = MemoryTarget(len(data), reads_zero=True)
        most = 0

        class Slow(MemoryTarget):
            async def write(self, offset: int, piece: bytes | bytearray | memoryview) -> None:
                nonlocal most
                most = max(most, len(repository.chunk_reads) - target.written // CHUNK)
                await trio.sleep(0.001)
                await target.write(offset, piece)

        await restore_disk(reader, codec, manifest, FIDX, Slow(len(data), reads_zero=True))
        assert target.data == data
        assert most <= 48


def answers(way: Way, count: int, *, round_trip_s: float, chunk_s: float) -> None:
    """`count` answers over a line that takes `chunk_s` for each chunk, one after the other."""
    due = [0.0] * way.width  # when the answers under way come
    free = now = 0.0
    for _ in range(count):
        due.sort()
        now = due.pop(0)
        while len(due) < way.width:
            free = max(free, now + round_trip_s) + chunk_s
            due.append(free)
            way.answered(free - now)


def test_more_chunks_are_asked_for_at_a_time_as_long_as_the_line_has_room() -> None:
    near, far, thin = Way(), Way(), Way()
    answers(near, 500, round_trip_s=0.0002, chunk_s=0.003)
    answers(far, 500, round_trip_s=0.15, chunk_s=0.008)
    answers(thin, 500, round_trip_s=0.15, chunk_s=1.0)
    assert near.width == thin.width == READERS
    assert 0.15 / 0.008 < far.width <= MAX_READERS
    endless = Way()
    answers(endless, 2000, round_trip_s=0.6, chunk_s=0.001)
    assert endless.width == MAX_READERS


@pytest.mark.parametrize(("unhurried", "most"), [(0.0, READERS), (float("inf"), MAX_READERS)])
async def test_chunks_that_are_asked_for_one_by_one_are_under_way_together(
    unhurried: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repository.fetch.UNHURRIED", unhurried)
    data = chunks_of("abcdefghijklmnopqrstuvwxyz" * 4)
    async with stored(data) as (_, reader, codec, manifest):
        under_way = highest = 0
        read = reader.read_chunks

        async def counted(digests: Sequence[bytes]) -> list[Blob]:
            nonlocal under_way, highest
            assert len(digests) == 1
            under_way += 1
            highest = max(highest, under_way)
            await trio.sleep(0.02)
            under_way -= 1
            return await read(digests)

        monkeypatch.setattr(reader, "read_chunks", counted)
        target = MemoryTarget(len(data))
        await restore_disk(reader, codec, manifest, FIDX, target)
        assert target.data == data
        assert (highest == most) if most == READERS else (READERS < highest <= most)
