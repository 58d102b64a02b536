"""Garbage collection of a bucket: what goes, what stays, what it costs, and what happens when it goes wrong."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from core.progress import Progress
from datastore.errors import StoreError
from datastore.gc import GcReport, collect_garbage
from datastore.names import Group
from datastore.s3.errors import S3BackendError
from datastore.s3.link import RetryPolicy
from datastore.s3.opening import S3Datastore
from datastore.s3.settling import settle_unknown
from datastore.s3.xml import DeleteFailure
from repository.local import LocalRepository
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_faults import ALWAYS
from tests.support.s3_stores import NAME, s3_store
from tests.support.snapshots import CHUNK, CODEC, read_image, write_snapshot

DAY_S = 86_400
GROUP = Group.parse("vm/100")


@pytest.fixture(autouse=True)
def _quick_access_time_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)


def let_days_pass(store: S3Datastore, emulator: S3Emulator, days: int = 2) -> None:
    """Make everything that is there now `days` older."""
    for folder in os.scandir(store.base / ".chunks"):
        for file in os.scandir(folder.path):
            found = file.stat()
            os.utime(file.path, (found.st_atime - days * DAY_S, found.st_mtime))
    for stored in emulator.bucket.objects.values():
        stored.last_modified -= days * DAY_S


def chunk_keys(emulator: S3Emulator) -> set[str]:
    return {key for key in emulator.bucket.objects if key.startswith(f"{NAME}/.chunks/")}


async def collect(
    store: S3Datastore, progress: Progress | None = None, *, dry_run: bool = False, allow_empty: bool = False
) -> GcReport:
    return await collect_garbage(store, progress=progress, dry_run=dry_run, allow_empty=allow_empty)


def image(*numbers: int) -> bytes:
    return b"".join(bytes([number]) * CHUNK for number in numbers)


async def test_what_no_index_names_goes_and_the_rest_stays(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        old = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image(1, 2, 3)})
        kept = await write_snapshot(repo, GROUP, 2000, {"disk.img.fidx": image(2, 3, 4)})
        await repo.forget(old)
        let_days_pass(store, s3_emulator)
        report = await collect(store)
        assert (report.status.removed_chunks, report.status.disk_chunks, report.missing) == (1, 4, [])
        assert store.keys.chunk(CODEC.digest(image(1))) not in chunk_keys(s3_emulator)
        assert not Path(store.s3.chunks.path(CODEC.digest(image(1)))).exists()
        assert await read_image(repo, kept, "disk.img.fidx") == image(2, 3, 4)


async def test_the_number_of_requests_is_that_of_the_listing(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image(1)})
        for number in range(2500):
            digest = CODEC.digest(b"%d" % number)
            s3_emulator.bucket.put(store.keys.chunk(digest), b"x")
            store.s3.chunks.files.mark(digest)
        await collect(store)
        before = len(s3_emulator.requests())
        report = await collect(store)
        made = s3_emulator.requests()[before:]
        assert [one.operation for one in made if one.operation != "GET"] == ["LIST"] * 3
        assert [one.key for one in made if one.operation == "GET"] == [f"{NAME}/.in-use"]
        assert report.status.pending_chunks + report.status.disk_chunks == 2502
        let_days_pass(store, s3_emulator)
        before = len(s3_emulator.requests())
        assert (await collect(store)).status.removed_chunks == 2500
        assert [one.operation for one in s3_emulator.requests()[before:]].count("POST") == 3


async def test_a_slow_provider_is_given_smaller_batches_to_delete(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.s3.sweep._DELETERS", 1)
    monkeypatch.setattr("datastore.s3.sweep._BATCH_S", 0.01)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image(1)})
        for number in range(1700):
            digest = CODEC.digest(b"%d" % number)
            s3_emulator.bucket.put(store.keys.chunk(digest), b"x")
            store.s3.chunks.files.mark(digest)
        let_days_pass(store, s3_emulator)
        s3_emulator.latency_per_delete_s = 0.0001
        assert (await collect(store)).status.removed_chunks == 1700
        first, *others = s3_emulator.requests("POST")
        assert first.size > 65536  # a thousand keys or so
        assert sum(one.body.count(b"<Key>") for one in others) == 700
        assert max(one.body.count(b"<Key>") for one in others) == 250


async def test_a_chunk_that_only_the_bucket_knows_is_adopted_if_it_is_used(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image(1, 2)})
        path = Path(store.s3.chunks.path(CODEC.digest(image(1))))
        path.unlink()
        let_days_pass(store, s3_emulator)
        report = await collect(store)
        assert (report.status.removed_chunks, report.missing) == (0, [])
        assert path.stat().st_size == 0
        assert not path.with_name(f"{path.name}.using").exists()


async def test_a_lost_chunk_is_named_and_its_snapshots_are_no_base(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image(1, 2)})
        lost = CODEC.digest(image(1))
        Path(store.s3.chunks.path(lost)).unlink()
        s3_emulator.bucket.delete(store.keys.chunk(lost))
        report = await repo.collect_garbage()
        assert report.missing == [lost]
        verification = (await repo.snapshot(snapshot)).verification
        assert verification is not None
        assert verification["state"] == "failed"
        await write_snapshot(repo, GROUP, 2000, {"disk.img.fidx": image(1, 2)})
        assert store.keys.chunk(lost) in s3_emulator.bucket.objects
        assert (await repo.collect_garbage()).missing == []


async def test_a_young_object_without_a_marker_stays(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint(), delete_guard_s=300.0) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image(1)})
        foreign = store.keys.chunk(bytes(32))
        s3_emulator.bucket.put(foreign, b"of another host", now=time.time() - 100)
        assert (await collect(store)).status.removed_chunks == 0
        s3_emulator.bucket.objects[foreign].last_modified -= 500
        assert (await collect(store)).status.removed_chunks == 1
        assert foreign not in s3_emulator.bucket.objects


async def test_a_failed_batch_ends_in_a_warning_and_its_files_stay(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image(9)})
        doomed = [CODEC.digest(image(number)) for number in (1, 2)]
        for number, digest in zip((1, 2), doomed, strict=True):
            await store.chunks.insert(digest, CODEC.encode(image(number)))
        let_days_pass(store, s3_emulator)
        refused = store.keys.chunk(doomed[0])
        s3_emulator.plan("POST", "answer", status=200, failed_keys={refused: "AccessDenied"})
        progress = Progress()
        report = await collect(store, progress)
        assert report.status.removed_chunks == 1
        assert [text for text in progress.warnings if refused in text]
        assert [Path(store.s3.chunks.path(digest)).exists() for digest in doomed] == [True, False]


async def test_a_delete_that_may_still_happen_loses_no_later_upload(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    """The batch is cut off, a backup stores the chunk again, then the old delete happens (R31)."""
    data = image(1)
    digest, blob = CODEC.digest(data), CODEC.encode(data)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image(9)})
        await store.chunks.insert(digest, blob)
        let_days_pass(store, s3_emulator)
        s3_emulator.plan("POST", "answer", status=500, times=8)
        progress = Progress()
        with trio.fail_after(60):
            await collect(store, progress)
        assert [text for text in progress.warnings if "not deleted" in text or "perhaps" in text]
        s3_emulator.faults.clear()
        before = len(s3_emulator.requests("PUT"))
        await store.chunks.insert(digest, blob)
        (put,) = s3_emulator.requests("PUT")[before:]
        assert put.header("if-none-match") is None
        s3_emulator.bucket.delete(store.keys.chunk(digest))  # the old delete
        unknown = store.s3.chunks.unknown
        unknown._clock = lambda: time.time() + 3700
        await settle_unknown(store.s3.chunks)
        assert s3_emulator.bucket.objects[store.keys.chunk(digest)].data == bytes(blob)
        assert unknown.due() == []


async def test_what_a_killed_garbage_collection_was_deleting_loses_no_later_upload(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is gone, and nobody holds the chunk any more; then the endpoint gets round to its request."""
    digest, blob = CODEC.digest(image(1)), CODEC.encode(image(1))
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await write_snapshot(LocalRepository(store, "test"), GROUP, 1000, {"disk.img.fidx": image(9)})
        await store.chunks.insert(digest, blob)
        let_days_pass(store, s3_emulator)
        real, note = store.client.delete_many, store.base / ".fleece/s3-deleting"
        left: list[bytes] = []

        async def noting(keys: Sequence[str]) -> list[DeleteFailure]:
            left.append(note.read_bytes())
            return await real(keys)

        monkeypatch.setattr(store.client, "delete_many", noting)
        await collect(store)
        assert left == [digest]
        assert note.read_bytes() == b"", "the answer is there"
        assert not store.s3.chunks.unknown.may_be_deleted(digest)
        # As it were if it had been killed instead of getting the answer.
        note.write_bytes(left[0])
        s3_emulator.bucket.put(store.keys.chunk(digest), bytes(blob))
        before = len(s3_emulator.requests("PUT"))
        await store.chunks.insert(digest, blob)
        (put,) = s3_emulator.requests("PUT")[before:]
        assert put.header("if-none-match") is None
        s3_emulator.bucket.delete(store.keys.chunk(digest))
        await collect(store)
        assert note.read_bytes() == b""
        unknown = store.s3.chunks.unknown
        unknown._clock = lambda: time.time() + 3700
        await settle_unknown(store.s3.chunks)
        assert s3_emulator.bucket.objects[store.keys.chunk(digest)].data == bytes(blob)


async def test_a_delete_that_cannot_be_written_down_is_known_to_this_process(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full as well: the garbage collection goes on, and the next upload is unconditional all the same."""
    data = image(1)
    digest, blob = CODEC.digest(data), CODEC.encode(data)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await write_snapshot(LocalRepository(store, "test"), GROUP, 1000, {"disk.img.fidx": image(9)})
        await store.chunks.insert(digest, blob)
        let_days_pass(store, s3_emulator)
        s3_emulator.plan("POST", "lost", times=ALWAYS)
        unknown = store.s3.chunks.unknown

        def full(*_words: object) -> None:
            raise StoreError("write", "the list", "no space left")

        with monkeypatch.context() as patch:
            patch.setattr(unknown, "_append", full)
            store.client.link.policy = RetryPolicy(patience_s=0.05, base_s=0.01, cap_s=0.02)
            with trio.fail_after(60):
                await collect(store)
        s3_emulator.faults.clear()
        assert "deletes that may still happen" in caplog.text
        assert unknown.may_be_deleted(digest)
        before = len(s3_emulator.requests("PUT"))
        await store.chunks.insert(digest, blob)
        (put,) = s3_emulator.requests("PUT")[before:]
        assert put.header("if-none-match") is None
        assert unknown.due() == []
        unknown._clock = lambda: time.time() + 3700
        assert unknown.due() == [digest]


async def test_without_any_index_nothing_goes_unless_that_is_meant(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        assert (await collect(store)).status.disk_chunks == 1  # the chunk that every store has
        await store.chunks.insert(CODEC.digest(image(1)), CODEC.encode(image(1)))
        let_days_pass(store, s3_emulator)
        with pytest.raises(StoreError, match="not one index here, but the bucket holds chunks"):
            await collect(store)
        assert len(chunk_keys(s3_emulator)) == 2
        await collect(store, allow_empty=True)
        assert len(chunk_keys(s3_emulator)) == 1


@pytest.mark.parametrize("marker", [b'{"hostname":"elsewhere"}', b'{"hostname":"x","fleece":{"instance":"y"}}', b"?"])
async def test_with_a_foreign_marker_nothing_goes(store_folder: Path, s3_emulator: S3Emulator, marker: bytes) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image(1)})
        s3_emulator.bucket.put(store.keys.in_use, marker)
        for work in (lambda: collect(store), lambda: repo.forget(snapshot)):
            with pytest.raises(StoreError, match="nothing that another installation has stored may be deleted"):
                await work()


async def test_a_wrong_clock_stops_it(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await write_snapshot(LocalRepository(store, "test"), GROUP, 1000, {"disk.img.fidx": image(1)})
        s3_emulator.clock_offset_s = 400
        with pytest.raises(StoreError, match="differ by"):
            await collect(store)


async def test_a_dry_run_changes_nothing(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image(1, 2)})
        await store.chunks.insert(CODEC.digest(image(3)), CODEC.encode(image(3)))
        Path(store.s3.chunks.path(CODEC.digest(image(1)))).unlink()
        let_days_pass(store, s3_emulator)
        objects = set(s3_emulator.bucket.objects)
        files = {entry.name for folder in os.scandir(store.base / ".chunks") for entry in os.scandir(folder.path)}
        report = await collect(store, dry_run=True)
        assert (report.status.removed_chunks, report.missing) == (1, [])
        zero = CODEC.zero_digest(4 << 20).hex()
        assert set(s3_emulator.bucket.objects) - objects == {f"{NAME}/.chunks/{zero[:4]}/{zero}", store.keys.in_use}
        found = {entry.name for folder in os.scandir(store.base / ".chunks") for entry in os.scandir(folder.path)}
        assert found - files == {zero}


async def test_a_large_bucket_is_listed_in_parallel(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.s3.sweep.PARALLEL_FROM", 2)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await write_snapshot(LocalRepository(store, "test"), GROUP, 1000, {"disk.img.fidx": image(1, 2, 3, 4)})
        await collect(store)
        before = len(s3_emulator.requests("LIST"))
        report = await collect(store)
        assert len(s3_emulator.requests("LIST")) - before == 16
        assert report.status.disk_chunks == 5


async def test_corrupt_copies_stay_while_their_chunk_is_lost(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image(1, 2)})
        digest = CODEC.digest(image(1))
        name = await store.chunks.quarantine(digest)
        bad = store.keys.bad_chunk(digest, 0)
        assert name == f"{digest.hex()}.0.bad"
        assert bad in s3_emulator.bucket.objects
        let_days_pass(store, s3_emulator)
        report = await collect(store)
        assert (report.status.removed_bad, report.missing) == (0, [digest])
        assert bad in s3_emulator.bucket.objects
        await store.chunks.insert(digest, CODEC.encode(image(1)))
        let_days_pass(store, s3_emulator)
        report = await collect(store)
        assert (report.status.removed_bad, report.missing) == (1, [])
        assert bad not in s3_emulator.bucket.objects


async def test_a_corrupt_object_that_could_not_be_deleted_counts_as_lost(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await write_snapshot(LocalRepository(store, "test"), GROUP, 1000, {"disk.img.fidx": image(1, 2)})
        digest = CODEC.digest(image(1))
        s3_emulator.plan("DELETE", "answer", status=403, code="AccessDenied")
        with pytest.raises(S3BackendError):
            await store.chunks.quarantine(digest)
        for dry_run in (True, False):
            assert (await collect(store, dry_run=dry_run)).missing == [digest]
            assert not Path(store.s3.chunks.path(digest)).exists()
