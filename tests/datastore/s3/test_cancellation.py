"""Operations cancelled at every step: locks are given back, claims stay true, and the next attempt succeeds."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from datastore.blob import Blob
from datastore.names import Group
from datastore.s3.opening import S3Datastore
from datastore.s3.settling import settle_unknown
from repository.local import LocalRepository
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_stores import s3_store, settings
from tests.support.snapshots import CODEC, write_snapshot

DATA = os.urandom(5000)
DIGEST = CODEC.digest(DATA)
BLOB = CODEC.encode(DATA)
MAX_STEPS = 400


class CancelAt(trio.abc.Instrument):
    """Cancels a scope when a task is about to make its step `number`."""

    def __init__(self, scope: trio.CancelScope, number: int) -> None:
        self._scope, self._number, self._steps = scope, number, 0
        self._task = trio.lowlevel.current_task()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """See `trio.abc.Instrument`."""
        if task is self._task:
            self._steps += 1
            if self._steps == self._number:
                self._scope.cancel()


@asynccontextmanager
async def cancelled_at(number: int) -> AsyncIterator[trio.CancelScope]:
    """A scope that is cancelled at step `number` of this task."""
    with trio.CancelScope() as scope:
        instrument = CancelAt(scope, number)
        trio.lowlevel.add_instrument(instrument)
        try:
            yield scope
        finally:
            trio.lowlevel.remove_instrument(instrument)


async def at_every_step(
    prepare: Callable[[], Awaitable[object]],
    work: Callable[[], Awaitable[object]],
    check: Callable[[], Awaitable[object]],
) -> int:
    """Prepare, work until cancelled at the first, second, ... step, and check; returns how many steps were cut."""
    for number in range(1, MAX_STEPS):
        await prepare()
        async with cancelled_at(number) as scope:
            await work()
        await check()
        if not scope.cancelled_caught:
            return number - 1
    raise AssertionError(f"more than {MAX_STEPS} steps")


def assert_nothing_is_held(store: S3Datastore) -> None:
    chunks = store.s3.chunks
    assert not chunks.locks._held
    assert not chunks.cache._pins
    assert not chunks._flights
    assert chunks._downloads.borrowed_tokens == 0
    assert store.client.link.gate._running == 0


def assert_claim_is_true(store: S3Datastore, emulator: S3Emulator) -> None:
    if Path(store.s3.chunks.path(DIGEST)).exists():
        assert emulator.bucket.objects[store.keys.chunk(DIGEST)].data == bytes(BLOB)


async def test_insert(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:

        async def prepare() -> None:
            s3_emulator.bucket.delete(store.keys.chunk(DIGEST))
            store.s3.chunks.files.remove(DIGEST)
            store.s3.chunks.cache.forget(DIGEST)

        async def check() -> None:
            assert_nothing_is_held(store)
            assert_claim_is_true(store, s3_emulator)
            await store.chunks.insert(DIGEST, BLOB)
            assert s3_emulator.bucket.objects[store.keys.chunk(DIGEST)].data == bytes(BLOB)
            assert bytes(await store.chunks.read(DIGEST)) == bytes(BLOB)

        assert await at_every_step(prepare, lambda: store.chunks.insert(DIGEST, BLOB), check) >= 5


@pytest.mark.parametrize("known", [True, False])
async def test_read(store_folder: Path, s3_emulator: S3Emulator, known: bool) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(DIGEST, BLOB)

        async def prepare() -> None:
            if known:
                await store.s3.chunks.cache.drop(DIGEST)
            else:
                store.s3.chunks.files.remove(DIGEST)
                store.s3.chunks.cache.forget(DIGEST)

        async def check() -> None:
            assert_nothing_is_held(store)
            assert_claim_is_true(store, s3_emulator)
            assert bytes(await store.chunks.read(DIGEST)) == bytes(BLOB)

        assert await at_every_step(prepare, lambda: store.chunks.read(DIGEST), check) >= 5


async def test_quarantine(store_folder: Path, s3_emulator: S3Emulator) -> None:
    """The bytes are never lost, and a backup after that stores the chunk in any case."""

    def wrong(blob: Blob) -> bool:
        return bytes(blob) != bytes(BLOB)

    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        bucket, key = s3_emulator.bucket, store.keys.chunk(DIGEST)
        other = bytes(CODEC.encode(b"other"))

        async def prepare() -> None:
            for number in range(10):
                bucket.delete(store.keys.bad_chunk(DIGEST, number))
                Path(store.s3.chunks.files.bad(DIGEST, number)).unlink(missing_ok=True)
            bucket.put(key, other)
            store.s3.chunks.files.mark(DIGEST)

        async def check() -> None:
            assert_nothing_is_held(store)
            copies = [bucket.objects.get(store.keys.bad_chunk(DIGEST, number)) for number in range(10)]
            there = [*copies, bucket.objects.get(key)]
            assert other in [stored.data for stored in there if stored is not None]
            with trio.fail_after(60):
                await store.chunks.quarantine(DIGEST, wrong)
            await store.chunks.insert(DIGEST, BLOB)
            assert bucket.objects[key].data == bytes(BLOB)

        assert await at_every_step(prepare, lambda: store.chunks.quarantine(DIGEST, wrong), check) >= 10


async def test_settling(store_folder: Path, s3_emulator: S3Emulator) -> None:
    """A chunk that an old delete has hit is stored again, whenever the first try was cut off."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        chunks = store.s3.chunks

        async def prepare() -> None:
            chunks.unknown._clock = lambda: 1000.0
            chunks.unknown.add([DIGEST])
            await store.chunks.insert(DIGEST, BLOB)
            s3_emulator.bucket.delete(store.keys.chunk(DIGEST))
            chunks.unknown._clock = lambda: 9000.0

        async def check() -> None:
            assert_nothing_is_held(store)
            await settle_unknown(chunks)
            assert s3_emulator.bucket.objects[store.keys.chunk(DIGEST)].data == bytes(BLOB)
            assert chunks.unknown.due() == []

        assert await at_every_step(prepare, lambda: settle_unknown(chunks), check) >= 5


async def test_forget(store_folder: Path, s3_emulator: S3Emulator) -> None:
    """A snapshot is whole, or goes at the next attempt; never does a manifest outlive what it lists."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await store.s3.in_use.take()
        group = Group.parse("vm/100")
        times = iter(range(1000, 10_000))
        snapshot = group.at(999)

        async def prepare() -> None:
            nonlocal snapshot
            snapshot = await write_snapshot(repo, group, next(times), {"a.conf.blob": b"x"})

        async def check() -> None:
            assert_nothing_is_held(store)
            prefix = store.keys.meta_prefix(snapshot.path)
            left = {key.removeprefix(prefix) for key in s3_emulator.bucket.objects if key.startswith(prefix)}
            assert left in ({"a.conf.blob", "index.json.blob"}, {"a.conf.blob"}, set())
            if store.exists(snapshot):
                await repo.forget(snapshot)
            assert not [key for key in s3_emulator.bucket.objects if key.startswith(prefix)]

        assert await at_every_step(prepare, lambda: repo.forget(snapshot), check) >= 5


async def test_a_creation_that_fails_gives_the_marker_of_the_other_host_back(
    tmpfs: Path, s3_emulator: S3Emulator
) -> None:
    from datastore.s3.errors import S3Error
    from datastore.s3.lifecycle import create_store

    wanted = settings(tmpfs / "cache", s3_emulator.endpoint())
    fleece = b'{"instance":"4e0f6a8e-0000-4000-8000-000000000000","since":"2026-01-01T00:00:00Z"}'
    marker = b'{"hostname":"other","fleece":' + fleece + b"}"
    key = f"{wanted.name}/.in-use"
    s3_emulator.bucket.put(key, marker)
    s3_emulator.plan("LIST", "answer", status=403, code="AccessDenied")
    with pytest.raises(S3Error):
        await create_store(wanted, reuse=True, overwrite_in_use=True)
    assert s3_emulator.bucket.objects[key].data == marker
    assert not wanted.cache.exists() or list(wanted.cache.iterdir()) == []
