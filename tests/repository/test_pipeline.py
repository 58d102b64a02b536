"""The pipelines over a real datastore: rounds of backup, restore, verify and random reads against a model in memory."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from core.disks import Extent, ExtentState
from core.errors import SourceError
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import CorruptChunkError
from datastore.names import BackupType, Group
from repository.archive import open_archive_reader, open_cache
from repository.backup import SnapshotWriter
from repository.interface import FIXED_CHUNK_SIZE as CHUNK
from repository.local import LocalRepository, open_local
from repository.report import ArchiveReport
from repository.restore import load_manifest, restore_disk, restore_stream
from repository.verify import verify
from tests.support.sessions import Faults, MemoryDisk, MemoryTarget, chunks_of

GROUP = Group(BackupType.VM, "100")
NAMES = ("drive-scsi0.img", "drive-scsi1.img")
KEY = CryptKey(bytes(range(32)))
CODECS = {
    "plain": ChunkCodec(),
    "encrypted": ChunkCodec(KEY, CryptMode.ENCRYPT),
    "signed": ChunkCodec(KEY, CryptMode.SIGN_ONLY),
}


@pytest.fixture
async def repo(store_folder: Path) -> AsyncIterator[LocalRepository]:
    repository = await open_local(store_folder)
    yield repository
    repository.close()


async def back_up(repo: LocalRepository, ctime: int, codec: ChunkCodec, *disks: MemoryDisk) -> list[ArchiveReport]:
    async with repo.backup(GROUP.at(ctime)) as session:
        writer = SnapshotWriter(session, codec)
        reports = await writer.add_disks(disks)
        await writer.finish()
    return reports


def change(disk: bytearray, choose: random.Random) -> list[Extent]:
    """Write somewhere; returns the map of a dirty bitmap of 64 KiB, as QEMU would give it."""
    block = 65536
    dirty: set[int] = set()
    for _ in range(choose.randrange(4)):
        offset = choose.randrange(len(disk))
        data = choose.choice([b"\0", b"x", choose.randbytes(1)]) * choose.choice([1, 4096, CHUNK + 17])
        data = data[: len(disk) - offset]
        disk[offset : offset + len(data)] = data
        dirty.update(range(offset // block, (offset + len(data) - 1) // block + 1))
    extents: list[Extent] = []
    for number in range(-(-len(disk) // block)):
        state = ExtentState.DATA if number in dirty else ExtentState.CLEAN
        length = min(block, len(disk) - number * block)
        if extents and extents[-1].state is state:
            extents[-1] = Extent(extents[-1].offset, extents[-1].length + length, state)
        else:
            extents.append(Extent(number * block, length, state))
    return extents


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
async def test_every_backup_of_a_chain_holds_the_disks_as_they_were(repo: LocalRepository, codec: ChunkCodec) -> None:
    choose = random.Random(codec.mode.value)
    disks = [bytearray(chunks_of("a?.b", tail=1234)), bytearray(chunks_of("?a."))]
    kept: list[list[bytes]] = []
    for number in range(6):
        maps = [change(disk, choose) for disk in disks]
        base = 1000 + number - 1 if number and number != 3 else None  # the fourth lost its bitmaps
        sources = [
            MemoryDisk(name, bytes(disk), extents=extents, base=base, reason="VM restarted")
            for name, disk, extents in zip(NAMES, disks, maps, strict=True)
        ]
        reports = await back_up(repo, 1000 + number, codec, *sources)
        kept.append([bytes(disk) for disk in disks])
        for report, source, extents in zip(reports, sources, maps, strict=True):
            assert report.read == sum(length for _, length in source.read)
            if base is None:
                assert (report.mode.value, report.read) == ("full", source.size)
            else:
                assert report.dirty == sum(one.length for one in extents if one.state is not ExtentState.CLEAN)
                assert report.read <= 5 * CHUNK
    for number, images in enumerate(kept):
        async with repo.reader(GROUP.at(1000 + number)) as reader, open_cache(4 * CHUNK) as cache:
            manifest = await load_manifest(reader, codec)
            for name, image in zip(NAMES, images, strict=True):
                target = MemoryTarget(len(image))
                await restore_disk(reader, codec, manifest, f"{name}.fidx", target)
                assert target.data == image
                archive = await open_archive_reader(reader, codec, manifest, f"{name}.fidx", cache)
                for _ in range(10):
                    offset, length = choose.randrange(len(image)), choose.choice([1, 4096, 131072, CHUNK])
                    assert await archive.read(offset, length) == image[offset : offset + length]
    results = await verify(repo, [info.snapshot for info in await repo.snapshots()], codec)
    assert [(result.state, result.errors) for result in results] == [("ok", [])] * 6


async def test_stream_of_an_image_is_the_image(repo: LocalRepository) -> None:
    data = chunks_of("abc..?defghijklmnopq?", tail=7)
    await back_up(repo, 1000, ChunkCodec(), MemoryDisk(NAMES[0], data))
    received = bytearray()

    async def sink(piece: bytes | bytearray | memoryview) -> None:
        received.extend(piece)

    async with repo.reader(GROUP.at(1000)) as reader:
        manifest = await load_manifest(reader, ChunkCodec())
        await restore_stream(reader, ChunkCodec(), manifest, f"{NAMES[0]}.fidx", sink)
    assert received == data


async def test_second_run_after_a_failed_one_succeeds_and_uses_what_it_stored(repo: LocalRepository) -> None:
    data = chunks_of("abcdefgh")
    faults = Faults("read_into", 7, SourceError("read", NAMES[0], "the frozen view is broken"))
    with pytest.raises(SourceError):
        await back_up(repo, 1000, ChunkCodec(), MemoryDisk(NAMES[0], data, hook=faults))
    assert await repo.snapshots(unfinished=True) == []
    (report,) = await back_up(repo, 1001, ChunkCodec(), MemoryDisk(NAMES[0], data))
    assert (report.new + report.reused, report.chunks) == (len(data), 8)
    (result,) = await verify(repo, [GROUP.at(1001)], ChunkCodec())
    assert result.state == "ok"


async def test_cancelled_run_leaves_no_snapshot(repo: LocalRepository) -> None:
    with trio.move_on_after(0.05) as scope:
        await back_up(repo, 1000, ChunkCodec(), MemoryDisk(NAMES[0], chunks_of("?????????"), delay_s=0.02))
    assert scope.cancelled_caught
    assert await repo.snapshots(unfinished=True) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
async def test_damaged_chunk_file_is_found_by_verify_and_stops_a_restore(
    repo: LocalRepository, store_folder: Path, damage: str
) -> None:
    codec = ChunkCodec()
    await back_up(repo, 1000, codec, MemoryDisk(NAMES[0], chunks_of("abc?")))
    digest = codec.digest(b"b" * CHUNK).hex()
    path = store_folder / ".chunks" / digest[:4] / digest
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(bytes({"flip": content, "truncate": content[:20], "empty": b""}[damage]))
    (result,) = await verify(repo, [GROUP.at(1000)], codec)
    assert len(result.errors) == 1
    assert f"at {CHUNK}, chunk {digest}" in result.errors[0]
    async with repo.reader(GROUP.at(1000)) as reader:
        manifest = await load_manifest(reader, codec)
        with pytest.raises((CorruptChunkError, ValueError, LookupError), match=f"at {CHUNK}, chunk {digest}"):
            await restore_disk(reader, codec, manifest, f"{NAMES[0]}.fidx", MemoryTarget(4 * CHUNK))
