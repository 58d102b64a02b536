"""The cache's limit with several processes, and what must not be dropped in its name."""

import os
from itertools import count
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from datastore.files import Owner
from datastore.s3.cache_growth import CacheGrowth
from datastore.s3.errors import S3UnavailableError
from datastore.s3.link import RetryPolicy
from datastore.s3.opening import S3Datastore
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_faults import ALWAYS
from tests.support.s3_stores import s3_store
from tests.support.snapshots import CODEC
from tests.support.waiting import PATIENCE_S, until

BLOBS = [CODEC.encode(os.urandom(4000)) for _ in range(40)]
DIGESTS = [CODEC.digest(CODEC.decode(blob, digest=None, size=None, crypt_mode=None, where="")) for blob in BLOBS]
SIZE = len(BLOBS[0])
IMPATIENT = RetryPolicy(attempts=2, patience_s=0.3, base_s=0.01, cap_s=0.02)


def on_disk(store: S3Datastore) -> int:
    return sum(store.s3.chunks.files.size(digest) or 0 for digest in DIGESTS)


async def test_two_processes_keep_one_limit(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own idea of what is there; what the other has cached is found out."""
    monkeypatch.setattr("datastore.s3.cache._FOREIGN", 4 * SIZE)
    limit = 10 * SIZE
    endpoint = s3_emulator.endpoint()
    async with (
        s3_store(store_folder, endpoint, cache_limit=limit) as one,
        s3_store(store_folder, endpoint, cache_limit=limit) as two,
    ):
        for number in range(0, len(BLOBS), 2):
            for store, which in ((one, number), (two, number + 1)):
                await store.chunks.insert(DIGESTS[which], BLOBS[which])
                if number == 0:
                    await store.s3.chunks.cache.settled()
        await until(lambda: on_disk(one) <= limit + 5 * SIZE)
        # One that only one of them goes on to use gets the limit for itself.
        with trio.fail_after(20):
            for rounds in count():
                for number in range(20):
                    await one.chunks.read(DIGESTS[number])
                # A look through the folder may still be going on.
                if rounds >= 2 and on_disk(one) <= limit + 5 * SIZE:
                    break
        for digest, blob in zip(DIGESTS, BLOBS, strict=True):
            assert bytes(await two.chunks.read(digest)) == bytes(blob)


async def test_a_first_look_through_the_folder_rests_until_somebody_waits_for_it(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rests that never end by themselves, only the hurry can end it."""
    monkeypatch.setattr("datastore.s3.cache._REST", 1e12)
    async with s3_store(store_folder, s3_emulator.endpoint(), cache_limit=10 * SIZE) as store:
        cache = store.s3.chunks.cache
        await store.chunks.insert(DIGESTS[0], BLOBS[0])
        await wait_all_tasks_blocked(0.1)
        assert not cache._counted.is_set()
        with trio.fail_after(60):
            await cache.settled()
        assert cache.total == SIZE


async def test_a_first_look_hurries_once_much_was_cached(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.s3.cache._REST", 1e12)
    monkeypatch.setattr("datastore.s3.cache._FOREIGN", 3 * SIZE)
    async with s3_store(store_folder, s3_emulator.endpoint(), cache_limit=10 * SIZE) as store:
        cache = store.s3.chunks.cache
        for number in range(4):
            await store.chunks.insert(DIGESTS[number], BLOBS[number])
        with trio.fail_after(60):
            await cache._counted.wait()
        assert cache.total == 4 * SIZE


async def test_what_another_process_dropped_is_not_counted(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint(), cache_limit=10 * SIZE) as store:
        cache = store.s3.chunks.cache
        for number in range(8):
            await store.chunks.insert(DIGESTS[number], BLOBS[number])
        for number in range(4):
            store.s3.chunks.files.empty(DIGESTS[number])
        await cache.count()
        assert cache.total == 4 * SIZE == on_disk(store)


async def test_a_chunk_that_an_old_delete_may_hit_is_not_dropped_by_an_eviction_that_has_chosen_it(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen before, stored once more meanwhile: what the cache has may soon be all that there is (R31)."""
    async with s3_store(store_folder, s3_emulator.endpoint(), cache_limit=10 * SIZE) as store:
        chunks = store.s3.chunks
        await store.chunks.insert(DIGESTS[0], BLOBS[0])
        empty = chunks.cache._empty

        def late(digests: list[bytes]) -> tuple[list[bytes], int]:
            chunks.unknown.add([DIGESTS[0]])
            chunks.unknown.stored(DIGESTS[0])
            return empty(digests)

        monkeypatch.setattr(chunks.cache, "_empty", late)
        chunks.cache._limit = 1
        await chunks.cache.make_room()
        assert Path(chunks.path(DIGESTS[0])).stat().st_size == SIZE
        assert chunks.cache.total == SIZE


async def test_a_chunk_that_somebody_holds_is_passed_over(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint(), cache_limit=10 * SIZE) as store:
        chunks = store.s3.chunks
        for number in range(2):
            await store.chunks.insert(DIGESTS[number], BLOBS[number])
        assert chunks.locks.try_acquire(DIGESTS[0])
        chunks.cache._limit = 1
        with trio.fail_after(PATIENCE_S):
            await chunks.cache.make_room()
        assert [Path(chunks.path(digest)).stat().st_size for digest in DIGESTS[:2]] == [SIZE, 0]
        chunks.locks.release(DIGESTS[0])


def test_growth_is_what_others_added(tmp_path: Path) -> None:
    owner = Owner.of(tmp_path)
    one, two = CacheGrowth(tmp_path, owner), CacheGrowth(tmp_path, owner)
    one.add(100)
    two.add(1000)
    two.add(1000)
    one.add(1)
    assert (one.foreign, two.foreign) == (2000, 0)
    one.forget()
    two.add(5)
    assert (one.foreign, two.foreign) == (0, 1)
    (tmp_path / ".fleece/s3-cache-growth").write_bytes(b"bad")
    one.add(7)  # begins anew, which looks like a great deal of foreign bytes: one look too many, and no harm
    one.forget()
    two.add(3)
    one.add(1)
    assert one.foreign == 3


async def test_readers_that_wait_for_a_chunk_share_its_failure(store_folder: Path, s3_emulator: S3Emulator) -> None:
    """Otherwise each would try for as long again, one after the other."""
    async with s3_store(store_folder, s3_emulator.endpoint(), policy=IMPATIENT) as store:
        await store.chunks.insert(DIGESTS[0], BLOBS[0])
        await store.s3.chunks.cache.drop(DIGESTS[0])
        s3_emulator.plan("GET", "reset", times=ALWAYS)
        failures = []

        async def reader() -> None:
            try:
                await store.chunks.read(DIGESTS[0])
            except S3UnavailableError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(reader)
        assert len(failures) == 20
        assert len(set(map(id, failures))) == 1
        s3_emulator.faults.clear()
        assert bytes(await store.chunks.read(DIGESTS[0])) == bytes(BLOBS[0])
