"""Changes of metadata in a bucket: what each asks of the endpoint, and what goes with what."""

from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from core.errors import UsageError
from core.progress import Progress
from datastore.names import Group, Namespace
from datastore.s3.versions import purge_versions
from repository.local import LocalRepository
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_stores import s3_store
from tests.support.snapshots import CHUNK, write_snapshot

GROUP = Group.parse("vm/100")
FILES = {"disk.img.fidx": bytes(CHUNK // 2) + bytes([1]) * (CHUNK // 2), "a.conf.blob": b"x"}


@pytest.fixture(autouse=True)
def _quick_access_time_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)


async def test_every_change_makes_few_requests_and_reading_none(store_folder: Path, s3_emulator: S3Emulator) -> None:
    """Beside these, one GET a minute asks whether the store is still ours (R34)."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await store.s3.in_use.take()
        await store.s3.in_use.check("ask once")
        first, second, third = [await write_snapshot(repo, GROUP, at, FILES) for at in (1000, 2000, 3000)]
        deep, other = Namespace.parse("a/b"), Group.parse("ct/7")
        await write_snapshot(repo, other, 1000, FILES)
        await repo.set_notes(other, "x")
        steps: list[tuple[Callable[[], Awaitable[object]], dict[str, int]]] = [
            (lambda: repo.create_namespace(deep), {"PUT": 2}),
            (lambda: repo.set_owner(GROUP, "a@pbs"), {"PUT": 1}),
            (lambda: repo.set_notes(GROUP, "of the group"), {"PUT": 1}),
            (lambda: repo.set_notes(first, "of the snapshot"), {"PUT": 1}),
            (lambda: repo.set_protected(first, protected=True), {"PUT": 1}),
            (lambda: repo.set_protected(first, protected=True), {}),
            (lambda: repo.set_protected(first, protected=False), {"DELETE": 1}),
            (lambda: repo.snapshots(), {}),
            (lambda: repo.groups(), {}),
            (lambda: repo.namespaces(), {}),
            (lambda: repo.usage(), {}),
            (lambda: repo.forget(first), {"LIST": 1, "POST": 1}),
            # The last one of its group: owner and notes go with it.
            (lambda: repo.forget(other.at(1000)), {"LIST": 1, "POST": 1, "DELETE": 2}),
            (lambda: repo.forget_group(GROUP), {"LIST": 2, "POST": 2, "DELETE": 2}),
            (lambda: repo.delete_namespace(Namespace.parse("a")), {"DELETE": 2}),
        ]
        for number, (step, expected) in enumerate(steps):
            before = len(s3_emulator.requests())
            await step()
            made = Counter(one.operation for one in s3_emulator.requests()[before:])
            assert made == expected, number
        assert [key for key in s3_emulator.bucket.objects if "/.cnt/" in key] == []
        assert (second, third) == (GROUP.at(2000), GROUP.at(3000))


async def test_what_a_removal_that_was_cut_off_left_goes_when_it_is_repeated(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    """R30: objects that are gone already are no error."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await store.s3.in_use.take()
        snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
        for name in ("index.json.blob", "disk.img.fidx"):
            s3_emulator.bucket.delete(store.keys.meta(f"{snapshot.path}/{name}"))
        await repo.forget(snapshot)
        assert [key for key in s3_emulator.bucket.objects if "/.cnt/" in key] == []
        assert await repo.groups() == []


async def test_a_namespace_in_a_bucket_is_not_moved(store_folder: Path, s3_emulator: S3Emulator) -> None:
    """Every object would have to be copied; a sync does that, and can be repeated."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        source = Namespace.parse("a")
        await repo.create_namespace(source)
        await write_snapshot(repo, Group.parse("vm/1", source), 1000, FILES)
        before = len(s3_emulator.requests())
        with pytest.raises(UsageError, match="sync it to the new namespace"):
            await repo.move_namespace(source, Namespace.parse("b"))
        assert s3_emulator.requests()[before:] == []
        assert [str(ns) for ns in await repo.namespaces()] == ["", "a"]


async def test_a_bucket_with_object_lock_is_append_only(store_folder: Path, s3_emulator: S3Emulator) -> None:
    """Backups, prune and garbage collection work; what they remove stays below as long as it is locked."""
    fake = s3_emulator.bucket
    fake.object_lock = "GOVERNANCE"
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.client.object_lock()
        fake.versioning = "Enabled"
        repo = LocalRepository(store, "test")
        removed = await write_snapshot(repo, GROUP, 1000, FILES)
        kept = await write_snapshot(repo, GROUP, 2000, {"disk.img.fidx": bytes([2]) * CHUNK})
        await repo.forget(removed)
        for stored in fake.objects.values():
            stored.last_modified -= 3 * 86_400
        for file in (store_folder / ".chunks").glob("*/" + 64 * "?"):
            file.unlink()
        progress = Progress()
        report = await repo.collect_garbage(progress=progress)
        assert (report.status.removed_chunks, progress.warnings) == (1, [])
        assert [info.snapshot for info in await repo.snapshots()] == [kept]
        hidden = [one.id for known in fake.versions.values() for one in known[1:]]
        fake.locked.update(hidden)
        purged = await purge_versions(store, Progress())
        assert (purged.versions, purged.locked, purged.markers) == (0, len(hidden), 0)
        assert all(one.header("content-md5") for one in s3_emulator.requests("PUT"))
