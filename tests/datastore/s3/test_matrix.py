"""Events of the failure matrix that concern a whole store: hosts, keys, gateways, the end of a cancelled backup."""

import os
from pathlib import Path

import pytest
import trio

from core.progress import Progress
from datastore.errors import StoreError
from datastore.gc import collect_garbage
from datastore.names import Group
from datastore.s3.errors import S3BackendError, S3ObjectError, S3UnavailableError
from datastore.s3.in_use import ForeignStoreError
from datastore.s3.link import RetryPolicy
from datastore.s3.pending import NOTE_NAME
from repository.local import LocalRepository
from repository.verify import verify
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_faults import ALWAYS
from tests.support.s3_stores import s3_store
from tests.support.snapshots import CHUNK, CODEC, put_all, read_image, write_snapshot
from tests.support.waiting import PATIENCE_S

GROUP = Group.parse("vm/100")
IMAGE = os.urandom(12 * CHUNK)


@pytest.fixture(autouse=True)
def _quick_access_time_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)


async def test_a_cancelled_backup_does_not_wait_for_a_bucket_that_is_away(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest's upload is not given up at once, but the patience of a quarter of an hour does not count then."""
    monkeypatch.setattr("datastore.session._FINISH_GRACE_S", 0.5)
    monkeypatch.setattr("datastore.s3.meta.ABANDON_AFTER_S", 0.3)
    patient = RetryPolicy(base_s=0.05, cap_s=0.1)
    async with s3_store(store_folder, s3_emulator.endpoint(), policy=patient) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 500, {"disk.img.fidx": IMAGE})
        with trio.fail_after(60), trio.CancelScope() as scope:
            async with repo.backup(GROUP.at(1000)) as session:
                await put_all(session, {"disk.img.fidx": IMAGE})
                s3_emulator.plan("*", "reset", times=ALWAYS)
                scope.cancel()
                await session.finish()
        assert scope.cancelled_caught
        assert [info.snapshot for info in await repo.snapshots(unfinished=True)] == [GROUP.at(500)]
        prefix = store.keys.meta_prefix(GROUP.at(1000).path)
        assert prefix in (store_folder / NOTE_NAME).read_text()
        s3_emulator.faults.clear()
        await store.s3.catch_up()
        assert [key for key in s3_emulator.bucket.objects if key.startswith(prefix)] == []


async def test_a_backup_cancelled_at_its_end_counts_if_the_bucket_answers(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        with trio.CancelScope() as scope:
            async with repo.backup(GROUP.at(1000)) as session:
                await put_all(session, {"disk.img.fidx": IMAGE})
                scope.cancel()
                await session.finish()
        assert (await repo.snapshot(GROUP.at(1000))).finished


async def test_two_hosts_with_one_store_delete_nothing_of_each_other(
    store_folder: Path, tmpfs: Path, s3_emulator: S3Emulator
) -> None:
    """The second one took the store over; the first one, which has not noticed, may write but not delete."""
    from datastore.s3.lifecycle import create_store
    from tests.support.s3_stores import settings

    async with s3_store(store_folder, s3_emulator.endpoint()) as first:
        repo = LocalRepository(first, "first")
        await first.s3.in_use.take()
        old = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        second_place = settings(tmpfs / "second", s3_emulator.endpoint())
        await create_store(second_place, reuse=True, overwrite_in_use=True)
        before = dict(s3_emulator.bucket.objects)
        for attempt in (lambda: collect_garbage(first), lambda: repo.forget(old), lambda: repo.forget_group(GROUP)):
            with pytest.raises(StoreError, match="in use by"):
                await attempt()
        assert s3_emulator.bucket.objects == before
        async with s3_store(tmpfs / "second", s3_emulator.endpoint()) as second:
            other = LocalRepository(second, "second")
            assert await read_image(other, old, "disk.img.fidx") == IMAGE
            await collect_garbage(second)
            # What the first one still writes is younger than the second one's collection, and stays.
            new = os.urandom(CHUNK)
            await first.chunks.insert(CODEC.digest(new), CODEC.encode(new))
            await collect_garbage(second)
            assert first.keys.chunk(CODEC.digest(new)) in s3_emulator.bucket.objects


async def test_a_host_that_has_lost_its_store_deletes_nothing_that_it_still_had_to(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    """Neither what earlier failures left, nor what a failing backup has stored, nor markers, nor corrupt chunks."""
    fake = s3_emulator.bucket
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        kept = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        await repo.set_protected(kept, protected=True)
        left = store.keys.meta_prefix(GROUP.at(2000).path)
        fake.put(f"{left}disk.img.fidx", b"of a backup that failed")
        fake.put(store.keys.in_use, b'{"hostname":"another"}')
        (store_folder / NOTE_NAME).write_text(f"{left}\n")
        before = set(fake.objects)
        for attempt in (
            store.s3.catch_up,
            lambda: repo.set_protected(kept, protected=False),
            lambda: store.chunks.quarantine(CODEC.digest(IMAGE[:CHUNK])),
        ):
            with pytest.raises(ForeignStoreError, match="in use by another"):
                await attempt()
        with pytest.raises(ZeroDivisionError):
            async with repo.backup(GROUP.at(3000)) as session:
                await put_all(session, {"disk.img.fidx": IMAGE})
                raise ZeroDivisionError
        assert before <= set(fake.objects)
        assert (await repo.snapshot(kept)).protected
        assert [info.snapshot for info in await repo.snapshots(unfinished=True)] == [kept]
        failed = store.keys.meta_prefix(GROUP.at(3000).path)
        assert (store_folder / NOTE_NAME).read_text().splitlines() == [left, failed]
        assert [key for key in fake.objects if key.startswith(failed)] != []
        await store.s3.in_use.take()
        await store.s3.catch_up()
        assert [key for key in fake.objects if key.startswith((left, failed))] == []


async def test_revoked_keys_end_running_jobs_at_once_and_cached_reads_go_on(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        secret, s3_emulator.secret = s3_emulator.secret, "another"
        before = len(s3_emulator.requests())
        with pytest.raises(S3BackendError, match="secret key"):
            await write_snapshot(repo, GROUP, 2000, {"disk.img.fidx": os.urandom(CHUNK)})
        with pytest.raises(S3BackendError, match="secret key"):
            await verify(repo, [snapshot], CODEC)
        with pytest.raises(S3BackendError, match="secret key"):
            await collect_garbage(store)
        refused = s3_emulator.requests()[before:]
        assert {one.status for one in refused} == {403}
        assert len(refused) < 3 * 16, "no retries: at most what was in flight"
        assert await read_image(repo, snapshot, "disk.img.fidx") == IMAGE
        store.client.link.use_keys(s3_emulator.access_key, s3_emulator.secret)
        await write_snapshot(repo, GROUP, 3000, {"disk.img.fidx": os.urandom(CHUNK)})
        s3_emulator.secret = secret


async def test_a_backup_survives_a_gateway_that_ends_and_comes_back(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    policy = RetryPolicy(base_s=0.02, cap_s=0.1)
    image = os.urandom(60 * CHUNK)
    s3_emulator.latency_s = 0.01
    async with s3_store(store_folder, s3_emulator.endpoint(), policy=policy) as store:
        repo = LocalRepository(store, "test")
        async with trio.open_nursery() as nursery:

            async def crash() -> None:
                while len(s3_emulator.requests("PUT")) < 20:  # noqa: ASYNC110 - it runs in threads of its own
                    await trio.sleep(0.005)
                s3_emulator.plan("*", "reset", times=12)
                s3_emulator.cut_connections()

            nursery.start_soon(crash)
            snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image})
        assert await read_image(repo, snapshot, "disk.img.fidx") == image
        (result,) = await verify(repo, [snapshot], CODEC)
        assert result.errors == []


@pytest.mark.parametrize("operation", ["GET", "PUT"])
async def test_a_connection_that_stalls_is_replaced(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setattr("datastore.s3.wire.INACTIVITY_TIMEOUT_S", 0.3)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        if operation == "PUT":
            s3_emulator.plan("PUT", "deaf", skip=2, key=".chunks")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        for offset in range(0, len(IMAGE), CHUNK):
            await store.s3.chunks.cache.drop(CODEC.digest(IMAGE[offset : offset + CHUNK]))
        if operation == "GET":
            s3_emulator.plan("GET", "stall", skip=2, key=".chunks")
        with trio.fail_after(PATIENCE_S):
            assert await read_image(repo, snapshot, "disk.img.fidx") == IMAGE


async def test_a_lost_cache_is_made_anew_and_the_next_backup_uploads_nothing(
    store_folder: Path, tmpfs: Path, s3_emulator: S3Emulator
) -> None:
    """R24: put-if-absent sends a whole chunk before the endpoint says that it is there."""
    from datastore.s3.lifecycle import create_store
    from tests.support.s3_stores import settings

    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        snapshot = await write_snapshot(LocalRepository(store, "test"), GROUP, 1000, {"disk.img.fidx": IMAGE})
    progress = Progress()
    await create_store(
        settings(tmpfs / "new", s3_emulator.endpoint()), reuse=True, overwrite_in_use=True, progress=progress
    )
    async with s3_store(tmpfs / "new", s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        before = len(s3_emulator.requests())
        await write_snapshot(repo, GROUP, 2000, {"disk.img.fidx": IMAGE})
        await write_snapshot(repo, Group.parse("vm/200"), 2000, {"disk.img.fidx": IMAGE})
        sent = [one for one in s3_emulator.requests()[before:] if "/.chunks/" in one.key]
        assert sent == []
        assert await read_image(repo, snapshot, "disk.img.fidx") == IMAGE


async def test_an_endpoint_that_is_away_fails_a_backup_once(store_folder: Path, s3_emulator: S3Emulator) -> None:
    impatient = RetryPolicy(attempts=2, patience_s=0.2, base_s=0.01, cap_s=0.02)
    async with s3_store(store_folder, s3_emulator.endpoint(), policy=impatient) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 500, {"disk.img.fidx": IMAGE})
        s3_emulator.plan("*", "reset", times=ALWAYS)
        with trio.fail_after(60), pytest.raises(S3UnavailableError, match="emulator:bucket"):
            await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": os.urandom(20 * CHUNK)})
        assert [info.snapshot for info in await repo.snapshots(unfinished=True)] == [GROUP.at(500)]


async def test_a_full_quota_fails_backups_by_name_and_space_can_be_made(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await store.s3.in_use.take()
        old = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        kept = await write_snapshot(repo, GROUP, 1500, {"a.conf.blob": b"x"})
        await collect_garbage(store)  # stores the chunk that every store has
        s3_emulator.plan("PUT", "answer", status=403, code="QuotaExceeded", times=ALWAYS)
        with pytest.raises(S3BackendError, match="QuotaExceeded"):
            await write_snapshot(repo, GROUP, 2000, {"disk.img.fidx": os.urandom(CHUNK)})
        assert [info.snapshot for info in await repo.snapshots(unfinished=True)] == [old, kept]
        await repo.forget(old)
        for path in (store_folder / ".chunks").glob("*/" + 64 * "?"):
            os.utime(path, (1, 1))
        for stored in s3_emulator.bucket.objects.values():
            stored.last_modified -= 5 * 86_400
        report = await collect_garbage(store, allow_empty=True)
        assert report.status.removed_chunks == len(IMAGE) // CHUNK


async def test_archive_tiers_are_warned_of_by_all_that_list(store_folder: Path, s3_emulator: S3Emulator) -> None:
    from repository.verify_modes import VerifyMode, verify_by

    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        digest = CODEC.digest(IMAGE[:CHUNK])
        s3_emulator.bucket.objects[store.keys.chunk(digest)].storage_class = "GLACIER"
        for work in (
            lambda progress: collect_garbage(store, progress=progress),
            lambda progress: verify_by(VerifyMode.parse("listing"), repo, [snapshot], CODEC, progress),
        ):
            progress = Progress()
            await work(progress)
            assert [text for text in progress.warnings if "archive tier" in text]
        await store.s3.chunks.cache.drop(digest)
        with pytest.raises(S3ObjectError, match="archive tier GLACIER"):
            await read_image(repo, snapshot, "disk.img.fidx")
        (result,) = await verify(repo, [snapshot], CODEC)
        assert len(result.errors) == 1
        assert [key for key in s3_emulator.bucket.objects if key.endswith(".bad")] == []
