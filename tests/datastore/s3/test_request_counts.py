"""What reading, backups and garbage collection cost, counted by the endpoint, through the repository."""

import os
from collections import Counter
from pathlib import Path

import pytest

from core.buffers import Buffer
from core.errors import FleeceError
from datastore.names import Group, Snapshot
from datastore.s3.counters import Counters, Method, Work
from datastore.s3.errors import S3UnavailableError
from datastore.s3.link import RetryPolicy
from datastore.s3.opening import S3Datastore
from repository.archive import _FAR_WINDOW, open_archive_reader, open_cache
from repository.fetch import fetch
from repository.local import LocalRepository
from repository.locate import load_readable, open_archive
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_faults import ALWAYS
from tests.support.s3_stores import NAME, s3_store
from tests.support.snapshots import CHUNK, CODEC, put_all, write_snapshot

GROUP = Group.parse("vm/100")
IMAGE = os.urandom(48 * CHUNK)
DIGESTS = [CODEC.digest(IMAGE[offset : offset + CHUNK]) for offset in range(0, len(IMAGE), CHUNK)]
DISK = "disk.img.fidx"


async def make_cold(store: S3Datastore, *, but: int = 0) -> None:
    """Drop all chunks of `IMAGE` from the cache but the first few."""
    for digest in DIGESTS[but:]:
        await store.s3.chunks.cache.drop(digest)


async def restore(repo: LocalRepository, snapshot: Snapshot) -> bytes:
    """As a restore reads."""
    found: dict[int, bytes] = {}

    async def consume(number: int, data: Buffer | FleeceError) -> None:
        assert not isinstance(data, FleeceError)
        found[number] = bytes(data)

    async with repo.reader(snapshot) as reader:
        manifest, codec = await load_readable(reader, CODEC)
        archive = await open_archive(reader, codec, manifest, DISK)
        await fetch(reader, codec, archive, range(archive.index.count), consume)
    return b"".join(found[number] for number in sorted(found))


async def mount(repo: LocalRepository, snapshot: Snapshot, step: int) -> bytes:
    """As a mount reads, one request of the kernel after the other."""
    async with repo.reader(snapshot) as reader, open_cache() as cache:
        manifest, codec = await load_readable(reader, CODEC)
        archive = await open_archive_reader(reader, codec, manifest, DISK, cache)
        return b"".join([bytes(await archive.read(at, step)) for at in range(0, len(IMAGE), step)])


@pytest.mark.parametrize("way", ["restore", "mount"])
async def test_reading_a_cold_store_keeps_many_requests_in_flight_and_asks_once_for_each_chunk(
    store_folder: Path, s3_emulator: S3Emulator, way: str
) -> None:
    counters = Counters()
    async with s3_store(store_folder, s3_emulator.endpoint(), counters=counters) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {DISK: IMAGE})
        await make_cold(store)
        before = len(s3_emulator.requests())
        s3_emulator.latency_s = 0.05
        data = await (restore(repo, snapshot) if way == "restore" else mount(repo, snapshot, CHUNK // 2))
        assert data == IMAGE
        assert s3_emulator.most_at_once["GET"] == 8, "all that the endpoint may be asked at once"
        asked = Counter(one.key for one in s3_emulator.requests()[before:])
        assert asked == Counter(store.keys.chunk(digest) for digest in DIGESTS)
        ahead = counters.totals(Work.PREFETCH).requests.get(Method.GET, 0)
        assert ahead + counters.totals(Work.RESTORE).requests.get(Method.GET, 0) == len(DIGESTS)
        assert (ahead > len(DIGESTS) // 2) is (way == "mount")


@pytest.mark.parametrize("way", ["restore", "mount"])
async def test_nothing_that_the_cache_holds_is_fetched(store_folder: Path, s3_emulator: S3Emulator, way: str) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {DISK: IMAGE})
        await make_cold(store, but=40)
        before = len(s3_emulator.requests())
        for _ in range(2):
            data = await (restore(repo, snapshot) if way == "restore" else mount(repo, snapshot, CHUNK))
            assert data == IMAGE
        asked = [one.key for one in s3_emulator.requests()[before:]]
        assert sorted(asked) == sorted(store.keys.chunk(digest) for digest in DIGESTS[40:])


async def test_without_the_bucket_a_mount_goes_on_with_what_is_cached_and_with_the_rest_when_it_is_back(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    impatient = RetryPolicy(patience_s=0.1, base_s=0.01, cap_s=0.02)
    async with s3_store(store_folder, s3_emulator.endpoint(), policy=impatient) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {DISK: IMAGE})
        await make_cold(store, but=8)
        s3_emulator.plan("*", "reset", times=ALWAYS)
        async with repo.reader(snapshot) as reader, open_cache() as cache:
            manifest, codec = await load_readable(reader, CODEC)
            archive = await open_archive_reader(reader, codec, manifest, DISK, cache)
            for at in range(0, 8 * CHUNK, CHUNK // 2):
                assert await archive.read(at, CHUNK // 2) == IMAGE[at : at + CHUNK // 2]
            for at in (20 * CHUNK, 8 * CHUNK):
                with pytest.raises(S3UnavailableError, match="emulator:bucket"):
                    await archive.read(at, 1)
            s3_emulator.faults.clear()
            assert await archive.read(8 * CHUNK, len(IMAGE)) == IMAGE[8 * CHUNK :]


async def test_a_limit_on_prefetch_stops_prefetch_and_not_the_reading(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    counters = Counters(limit_requests=5)
    async with s3_store(store_folder, s3_emulator.endpoint(), counters=counters) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {DISK: IMAGE})
        await make_cold(store)
        assert await mount(repo, snapshot, CHUNK) == IMAGE
        assert 5 <= counters.totals(Work.PREFETCH).requests[Method.GET] < 5 + 2 * _FAR_WINDOW  # under way


async def test_an_unchanged_backup_of_a_thousand_chunks_makes_at_most_twenty_requests(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    """Also in another group, where no base proves that the chunks are there, and after a restart."""
    image = b"".join(number.to_bytes(4, "big") * 16 for number in range(1000))
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await write_snapshot(LocalRepository(store, "test"), GROUP, 1000, {DISK: image}, chunk_size=4096 // 64)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        for group in (GROUP, Group.parse("ct/7")):
            before = len(s3_emulator.requests())
            async with repo.backup(group.at(2000)) as session:
                await session.previous_index(DISK)
                await put_all(session, {DISK: image, "vm.conf.blob": b"x"}, chunk_size=4096 // 64)
                await session.finish()
            made = s3_emulator.requests()[before:]
            assert len(made) <= 20
            assert [one for one in made if "/.chunks/" in one.key] == []


async def test_garbage_collection_of_2500_chunks_makes_three_list_requests(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {DISK: IMAGE})
        for number in range(2500 - len(DIGESTS) - 1):  # and the chunk of zeros
            digest = CODEC.digest(b"%d" % number)
            s3_emulator.bucket.put(store.keys.chunk(digest), b"x")
            store.s3.chunks.files.mark(digest)
        await repo.collect_garbage()
        chunks = sum(key.startswith(f"{NAME}/.chunks/") for key in s3_emulator.bucket.objects)
        assert chunks == 2500
        before = len(s3_emulator.requests())
        report = await repo.collect_garbage()
        made = Counter(one.operation for one in s3_emulator.requests()[before:])
        assert made == {"LIST": 3, "GET": 1}
        assert report.status.disk_chunks + report.status.pending_chunks == 2500
