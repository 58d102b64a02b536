"""Listings and objects that no honest endpoint would give, and what old versions of PBS have left behind."""

import json
from pathlib import Path

import pytest
import trio

from core.progress import Progress
from datastore.names import Group
from datastore.s3.client import S3Client
from datastore.s3.errors import S3AnswerError, S3BackendError
from datastore.s3.in_use import InUseMarker
from datastore.s3.reconcile import reconcile
from datastore.s3.refresh import refresh
from repository.local import LocalRepository
from tests.support.s3_bucket import FakeBucket
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_faults import ALWAYS
from tests.support.s3_service import BUCKET
from tests.support.s3_stores import NAME, s3_store
from tests.support.snapshots import CHUNK, CODEC, read_image, write_snapshot

GROUP = Group.parse("vm/100")
DAY_S = 86_400


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)
    monkeypatch.setattr("datastore.s3.paging.MAX_EMPTY_PAGES", 20)


@pytest.mark.parametrize("kind", ["the same pages in turn", "empty pages", "backwards"])
async def test_a_listing_without_end_is_found_out(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pages = 0

    def page(self: FakeBucket, prefix: str, token: str | None) -> tuple[list[str], str | None]:
        nonlocal pages
        pages += 1
        keys = sorted(key for key in self.objects if key.startswith(prefix))
        chosen = {
            "the same pages in turn": keys[pages % 2 : pages % 2 + 1],
            "empty pages": [],
            "backwards": keys[-pages:][:1],
        }[kind]
        return chosen, f"token-{pages}"

    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": bytes(range(1, 9)) * (CHUNK // 4)})
        monkeypatch.setattr(FakeBucket, "page", page)
        for work in (lambda: refresh(store), lambda: reconcile(store), lambda: repo.collect_garbage()):
            with trio.fail_after(60), pytest.raises(S3AnswerError, match="list the objects"):
                await work()
        monkeypatch.undo()
        assert len(await repo.snapshots()) == 1


async def test_an_object_that_is_listed_and_not_found_fails_the_refresh(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    """Without its index, garbage collection would take the snapshot's chunks."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": bytes(range(1, 9)) * (CHUNK // 4)})
        (store.base / snapshot.path / "disk.img.fidx").write_bytes(b"so it is not linked")
        s3_emulator.plan("GET", "answer", status=404, code="NoSuchKey", key=".fidx", times=ALWAYS)
        with pytest.raises(S3AnswerError, match="lists it, but does not find it"):
            await refresh(store)
        assert (await repo.snapshot(snapshot)).finished
        s3_emulator.faults.clear()
        await refresh(store)
        assert await read_image(repo, snapshot, "disk.img.fidx") == bytes(range(1, 9)) * (CHUNK // 4)


async def test_an_object_deleted_between_listing_and_reading_is_no_error(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"a.conf.blob": b"x"})
        notes = store.keys.meta(f"{GROUP.path}/notes")
        s3_emulator.bucket.put(notes, b"soon gone")
        get = S3Client.get

        async def late(self: S3Client, key: str, **options: object) -> object:
            if key == notes:
                s3_emulator.bucket.delete(notes)
            return await get(self, key, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(S3Client, "get", late)
        await refresh(store)
        assert [info.snapshot for info in await repo.snapshots()] == [snapshot]


async def test_what_old_versions_of_pbs_left_behind_is_survived(store_folder: Path, s3_emulator: S3Emulator) -> None:
    """Corrupt copies, chunks at wrong places, owners and notes without backups, markers of odd shapes."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        image = bytes(range(1, 9)) * (CHUNK // 4)
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image})
        bucket, digest = s3_emulator.bucket, bytes(range(32))
        bad = [store.keys.bad_chunk(digest, number) for number in range(3)]
        foreign = [
            f"{NAME}/.chunks/ffff/{digest.hex()}",  # at a wrong place
            f"{NAME}/.chunks/{digest.hex()[:4]}/{digest.hex().upper()}",
            f"{NAME}/.chunks/{digest.hex()[:4]}/{digest.hex()}.0.bad/.0.bad",
            f"{NAME}/.chunks/{digest.hex()[:4]}/{digest.hex()}.12.bad",
            f"{NAME}/.chunks/{digest.hex()[:4]}/../../../etc/passwd",
            f"{NAME}/.chunks/",
            f"{NAME}/.cnt/vm/../../x/owner",
            f"{NAME}/.cnt//vm/1/owner",
            f"{NAME}/tmp_abcdef/x",
        ]
        left = [f"{NAME}/.cnt/vm/200/owner", f"{NAME}/.cnt/vm/300/notes", f"{NAME}/.cnt/ns/a/ns/b/.namespace"]
        for key in (*bad, *foreign, *left):
            bucket.put(key, b"root@pam\n" if key.endswith("owner") else b"")
        progress = Progress()
        report = await refresh(store, progress)
        assert report.strange == 2
        assert (store.base / "ns/a/ns/b").is_dir(), "an empty namespace is not lost"
        assert not (store.base.parent / "x").exists()
        assert [info.snapshot for info in await repo.snapshots()] == [snapshot]
        await reconcile(store)
        for stored in bucket.objects.values():
            stored.last_modified -= 3 * DAY_S
        assert (await repo.collect_garbage()).status.removed_bad == 3
        assert [key for key in bad if key in bucket.objects] == []
        assert [key for key in foreign if key not in bucket.objects] == [], "what is not understood is left alone"
        assert await read_image(repo, snapshot, "disk.img.fidx") == image
        assert CODEC.digest(image[:CHUNK]).hex() in str(sorted(bucket.objects))


def test_a_forged_marker_names_nobody_in_a_way_that_harms() -> None:
    forged = {"hostname": "h\x1b[2J\n" + "x" * 9999, "fleece": {"instance": ["no", "text"], "since": {"a": "b"}}}
    marker = InUseMarker.parse(json.dumps(forged).encode())
    assert (marker.instance, marker.since) == (None, None)
    assert str(marker).isprintable()
    assert len(str(marker)) < 100
    forged["fleece"] = {"instance": "someone", "since": "\x1b]0;title\x07"}
    assert str(InUseMarker.parse(json.dumps(forged).encode())).isprintable()


async def test_headers_of_a_redirect_are_shown_as_text(s3_emulator: S3Emulator) -> None:
    s3_emulator.plan("GET", "answer", status=301, headers={"x-amz-bucket-region": "eu\x9b31m" + "x" * 999})
    async with S3Client.open(s3_emulator.endpoint(), BUCKET) as client:
        with pytest.raises(S3BackendError, match="the bucket is in region eu") as raised:
            await client.get("st1/a")
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400
