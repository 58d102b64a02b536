"""Chunks in a bucket with a cache in front: what is asked for, kept, dropped, and survives."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from core.buffers import Buffer
from core.errors import FormatError
from core.progress import Progress
from datastore.blob import Blob
from datastore.errors import ChunkNotFoundError
from datastore.gc import collect_garbage
from datastore.interface import PutResult
from datastore.names import Group
from datastore.s3.cache_files import CacheFiles
from datastore.s3.errors import S3BackendError, S3Error
from datastore.s3.link import RetryPolicy
from datastore.s3.opening import S3Datastore
from datastore.s3.pending import NOTE_NAME
from datastore.s3.reconcile import reconcile
from repository.local import LocalRepository
from repository.verify import verify
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_stores import NAME, s3_store
from tests.support.snapshots import CHUNK, CODEC, put_all, read_image, write_snapshot

GROUP = Group.parse("vm/100")
DATA = os.urandom(5000)
DIGEST = CODEC.digest(DATA)
BLOB = CODEC.encode(DATA)
OTHERS = [os.urandom(4000 + number) for number in range(6)]


def path(store: S3Datastore, digest: bytes = DIGEST) -> Path:
    return Path(store.s3.chunks.path(digest))


async def test_a_chunk_is_stored_once_and_asked_for_never_while_the_cache_has_it(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        assert await store.chunks.insert(DIGEST, BLOB) == PutResult(False, len(BLOB))
        assert await store.chunks.insert(DIGEST, BLOB) == PutResult(True, len(BLOB))
        assert bytes(await store.chunks.read(DIGEST)) == bytes(BLOB)
        assert [one.request for one in s3_emulator.requests()] == [
            f"PUT /bucket/{NAME}/.chunks/{DIGEST.hex()[:4]}/{DIGEST.hex()}"
        ]
        (put,) = s3_emulator.requests()
        assert put.header("if-none-match") == "*"


@pytest.mark.parametrize("state", ["cached", "marker", "only in the bucket", "not to be cached"])
async def test_every_kind_of_duplicate_touches_the_chunk(
    store_folder: Path, s3_emulator: S3Emulator, state: str
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(DIGEST, BLOB)
        if state == "marker":
            await store.s3.chunks.cache.drop(DIGEST)
        if state == "only in the bucket":
            path(store).unlink()
        else:
            os.utime(path(store), (1, 1))
        result = await store.chunks.insert(DIGEST, BLOB, cache=state != "not to be cached")
        assert result == PutResult(True, len(BLOB))
        assert path(store).stat().st_atime > 1


async def test_what_is_not_to_be_cached_leaves_a_marker(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(DIGEST, BLOB, cache=False)
        assert path(store).stat().st_size == 0


@pytest.mark.parametrize("fault", ["answer", "reset"])
async def test_a_failed_upload_leaves_no_claim(store_folder: Path, s3_emulator: S3Emulator, fault: str) -> None:
    policy = RetryPolicy(attempts=2, patience_s=0.2, base_s=0.01, cap_s=0.02)
    async with s3_store(store_folder, s3_emulator.endpoint(), policy=policy) as store:
        s3_emulator.plan("PUT", "reset" if fault == "reset" else "answer", status=500, times=1 << 20)
        with pytest.raises(S3Error):
            await store.chunks.insert(DIGEST, BLOB)
        assert not path(store).exists()
        s3_emulator.faults.clear()
        assert not (await store.chunks.insert(DIGEST, BLOB)).duplicate


async def test_an_upload_whose_answer_was_lost_is_stored(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        s3_emulator.plan("PUT", "lost")
        await store.chunks.insert(DIGEST, BLOB)
        assert path(store).read_bytes() == bytes(BLOB)
        assert [one.status for one in s3_emulator.requests("PUT")] == [0, 412]


async def test_readers_of_one_chunk_share_one_request(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(DIGEST, BLOB, cache=False)
        s3_emulator.latency_s = 0.1
        blobs = await store.chunks.read_many([DIGEST] * 20)
        assert {bytes(blob) for blob in blobs} == {bytes(BLOB)}
        assert len(s3_emulator.requests("GET")) == 1
        assert path(store).stat().st_size == len(BLOB)


async def test_a_reader_that_gives_up_leaves_the_request_to_the_next(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(DIGEST, BLOB, cache=False)
        s3_emulator.latency_s = 0.2
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.05):
                await store.chunks.read(DIGEST)
            nursery.start_soon(store.chunks.read, DIGEST)
        assert path(store).stat().st_size == len(BLOB)


@pytest.mark.parametrize("kind", ["corrupt", "truncate", "cut"])
async def test_a_body_damaged_on_the_way_is_fetched_again_and_never_cached(
    store_folder: Path, s3_emulator: S3Emulator, kind: str
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(DIGEST, BLOB, cache=False)
        s3_emulator.plan("GET", kind)  # type: ignore[arg-type]
        assert bytes(await store.chunks.read(DIGEST)) == bytes(BLOB)
        assert path(store).read_bytes() == bytes(BLOB)


@pytest.mark.parametrize("known", [True, False])
async def test_an_object_that_is_wrong_is_reported_and_not_cached(
    store_folder: Path, s3_emulator: S3Emulator, known: bool
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        s3_emulator.bucket.put(store.keys.chunk(DIGEST), bytes(CODEC.encode(b"something else")))
        if known:
            store.s3.chunks.files.mark(DIGEST)
        with pytest.raises(FormatError):
            await store.chunks.read(DIGEST)
        assert len(s3_emulator.requests("GET")) == 2
        assert path(store).exists() == known
        assert not known or path(store).stat().st_size == 0


async def test_a_damaged_cached_chunk_is_fetched_again(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(DIGEST, BLOB)
        for damaged in (bytes(BLOB)[:-1] + b"\x00", bytes(BLOB)[:100], b"x"):
            path(store).write_bytes(damaged)
            assert bytes(await store.chunks.read(DIGEST)) == bytes(BLOB)
            assert path(store).read_bytes() == bytes(BLOB)


async def test_missing_means_absent_in_the_bucket(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(DIGEST, BLOB)
        path(store).unlink()
        assert await store.chunks.missing(DIGEST + bytes(32)) == [bytes(32)]
        assert path(store).stat().st_size == 0
        with pytest.raises(ChunkNotFoundError, match="not in the bucket"):
            await store.chunks.read(bytes(32))
        s3_emulator.plan("GET", "answer", status=404, code="NoSuchBucket")
        with pytest.raises(S3BackendError):
            await store.chunks.read(bytes(31) + b"1")


async def test_the_cache_keeps_its_limit_also_after_a_restart(store_folder: Path, s3_emulator: S3Emulator) -> None:
    digests = [CODEC.digest(data) for data in OTHERS]
    blobs = [CODEC.encode(data) for data in OTHERS]
    size = sum(map(len, blobs[-3:]))

    def cached(store: S3Datastore) -> list[bool]:
        return [path(store, digest).stat().st_size > 0 for digest in digests]

    async with s3_store(store_folder, s3_emulator.endpoint(), cache_limit=size) as store:
        for digest, blob in zip(digests, blobs, strict=True):
            await store.chunks.insert(digest, blob)
        assert cached(store) == [False] * 3 + [True] * 3
        await store.chunks.read(digests[3])
        await store.chunks.read(digests[0])
        assert cached(store) == [True, False, False, True, False, True]
        for number, digest in enumerate(digests):
            os.utime(path(store, digest), (number, 1))
    async with s3_store(store_folder, s3_emulator.endpoint(), cache_limit=len(blobs[5]) + 1) as store:
        await store.s3.chunks.cache.count()
        assert cached(store) == [False] * 5 + [True]
        assert store.s3.chunks.cache.total == len(blobs[5])
        for digest, blob in zip(digests, blobs, strict=True):
            assert bytes(await store.chunks.read(digest)) == bytes(blob)
        assert sum(cached(store)) <= 1


async def test_a_chunk_that_is_being_read_is_not_dropped(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint(), cache_limit=1) as store:
        with store.s3.chunks.cache.pinned(DIGEST):
            await store.chunks.insert(DIGEST, BLOB)
            await store.chunks.insert(CODEC.digest(OTHERS[0]), CODEC.encode(OTHERS[0]))
            assert path(store).stat().st_size == len(BLOB)
        await store.s3.chunks.cache.make_room()
        assert path(store).stat().st_size == 0


async def test_a_full_cache_disk_fails_neither_backup_nor_restore(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: CacheFiles, digest: bytes, parts: Sequence[Buffer]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(CODEC.digest(OTHERS[0]), CODEC.encode(OTHERS[0]))
        monkeypatch.setattr(CacheFiles, "write", full)
        await store.chunks.insert(DIGEST, BLOB)
        assert path(store).stat().st_size == 0
        assert path(store, CODEC.digest(OTHERS[0])).stat().st_size == 0  # dropped to make room
        assert bytes(await store.chunks.read(DIGEST)) == bytes(BLOB)


async def test_without_the_bucket_what_is_cached_can_be_read(store_folder: Path, s3_emulator: S3Emulator) -> None:
    policy = RetryPolicy(attempts=2, patience_s=0.2, base_s=0.01, cap_s=0.02)
    image = os.urandom(3 * CHUNK)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        snapshot = await write_snapshot(LocalRepository(store, "test"), GROUP, 1000, {"disk.img.fidx": image})
    s3_emulator.plan("*", "reset", times=1 << 20)
    async with s3_store(store_folder, s3_emulator.endpoint(), policy=policy) as store:
        repo = LocalRepository(store, "test")
        assert [info.snapshot for info in await repo.snapshots()] == [snapshot]
        assert await read_image(repo, snapshot, "disk.img.fidx") == image
        assert s3_emulator.requests()[-1].operation == "PUT"
        with pytest.raises(S3Error):
            await store.chunks.read(DIGEST)


async def test_an_unchanged_backup_makes_few_requests(store_folder: Path, s3_emulator: S3Emulator) -> None:
    image = b"".join(number.to_bytes(4, "big") * 16 for number in range(1000))
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image})
        before = len(s3_emulator.requests())
        async with repo.backup(GROUP.at(2000)) as session:
            await session.previous_index("disk.img.fidx")
            await put_all(session, {"disk.img.fidx": image, "vm.conf.blob": b"x"})
            await session.finish()
        operations = [one.operation for one in s3_emulator.requests()[before:]]
        assert operations == ["PUT"] * 3  # index, blob, manifest


async def test_a_failed_backup_with_the_bucket_away_is_cleaned_up_later(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    policy = RetryPolicy(attempts=2, patience_s=0.2, base_s=0.01, cap_s=0.02)
    async with s3_store(store_folder, s3_emulator.endpoint(), policy=policy) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 500, {"a.conf.blob": b"x"})
        with pytest.raises(RuntimeError, match="the source failed"):
            async with repo.backup(GROUP.at(1000)) as session:
                await put_all(session, {"a.conf.blob": b"x"})
                s3_emulator.plan("*", "reset", times=1 << 20)
                raise RuntimeError("the source failed")
        prefix = store.keys.meta_prefix(GROUP.at(1000).path)
        assert (store_folder / NOTE_NAME).read_text() == f"{prefix}\n"
        assert not (store_folder / GROUP.at(1000).path).exists()
        assert [key for key in s3_emulator.bucket.objects if key.startswith(prefix)]
        s3_emulator.faults.clear()
        await store.s3.catch_up()
        assert [key for key in s3_emulator.bucket.objects if key.startswith(prefix)] == []
        assert (store_folder / NOTE_NAME).read_text() == ""


async def test_forgetting_a_backup_fails_with_the_bucket_away_and_succeeds_later(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    policy = RetryPolicy(attempts=2, patience_s=0.2, base_s=0.01, cap_s=0.02)
    async with s3_store(store_folder, s3_emulator.endpoint(), policy=policy) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"a.conf.blob": b"x"})
        s3_emulator.plan("POST", "answer", status=503, times=1 << 20)
        with pytest.raises(S3Error):
            await repo.forget(snapshot)
        assert (await repo.snapshot(snapshot)).finished
        s3_emulator.faults.clear()
        s3_emulator.bucket.delete(store.keys.meta(f"{snapshot.path}/index.json.blob"))  # half of it happened
        await repo.forget(snapshot)
        assert [key for key in s3_emulator.bucket.objects if "/.cnt/" in key] == []


async def test_verify_reads_the_bucket_and_repairs_from_the_cache(store_folder: Path, s3_emulator: S3Emulator) -> None:
    image = b"".join(bytes([number]) * CHUNK for number in range(1, 5))
    digests = [CODEC.digest(image[offset : offset + CHUNK]) for offset in range(0, len(image), CHUNK)]
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": image})
        gone, wrong, lost, bad = digests
        s3_emulator.bucket.delete(store.keys.chunk(gone))
        s3_emulator.bucket.put(store.keys.chunk(wrong), b"nonsense")
        for digest in (lost, bad):
            await store.s3.chunks.cache.drop(digest)
        s3_emulator.bucket.delete(store.keys.chunk(lost))
        s3_emulator.bucket.put(store.keys.chunk(bad), bytes(BLOB))
        progress = Progress()
        (result,) = await verify(repo, [snapshot], CODEC, progress)
        assert len([text for text in progress.warnings if "is repaired from another copy" in text]) == 2
        assert len(result.errors) == 2
        for digest in (gone, wrong):
            found = Blob.parse(s3_emulator.bucket.objects[store.keys.chunk(digest)].data, where="")
            assert CODEC.decode(found, digest=digest, size=CHUNK, crypt_mode=None, where="")
        assert not path(store, lost).exists()
        assert store.keys.bad_chunk(bad, 0) in s3_emulator.bucket.objects
        assert store.keys.chunk(bad) not in s3_emulator.bucket.objects
        await write_snapshot(repo, GROUP, 2000, {"disk.img.fidx": image})
        (result,) = await verify(repo, [GROUP.at(2000)], CODEC)
        assert result.errors == []


async def test_verify_blames_no_chunk_for_the_network(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": os.urandom(3 * CHUNK)})
        s3_emulator.plan("GET", "answer", status=500, times=1 << 20, key=".chunks")
        (result,) = await verify(repo, [snapshot], CODEC)
        assert len(result.errors) == 3
        s3_emulator.faults.clear()
        (result,) = await verify(repo, [snapshot], CODEC)
        assert result.errors == []
        s3_emulator.plan("GET", "answer", status=404, code="NoSuchBucket", key=".chunks", times=1 << 20)
        with pytest.raises(S3BackendError, match="the bucket does not exist"):
            await verify(repo, [snapshot], CODEC)
        assert [key for key in s3_emulator.bucket.objects if key.endswith(".bad")] == []


async def test_a_number_that_the_bucket_has_is_not_taken_twice(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(DIGEST, BLOB)
        s3_emulator.bucket.put(store.keys.bad_chunk(DIGEST, 0), b"of another host")
        assert await store.chunks.quarantine(DIGEST) == f"{DIGEST.hex()}.1.bad"
        assert s3_emulator.bucket.objects[store.keys.bad_chunk(DIGEST, 0)].data == b"of another host"


async def test_a_copy_that_fails_keeps_the_original(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(DIGEST, BLOB)
        s3_emulator.plan("COPY", "answer", status=403, code="AccessDenied")
        with pytest.raises(S3Error):
            await store.chunks.quarantine(DIGEST)
        assert store.keys.chunk(DIGEST) in s3_emulator.bucket.objects
        assert path(store).stat().st_size == len(BLOB)


async def test_a_corrupt_object_that_could_not_be_deleted_is_replaced_by_the_next_backup(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        await store.chunks.insert(DIGEST, BLOB)
        s3_emulator.bucket.put(store.keys.chunk(DIGEST), b"corrupt")
        s3_emulator.plan("DELETE", "answer", status=403, code="AccessDenied")
        with pytest.raises(S3Error):
            await store.chunks.quarantine(DIGEST)
        assert s3_emulator.bucket.objects[store.keys.bad_chunk(DIGEST, 0)].data == b"corrupt"
        assert await store.chunks.missing(DIGEST) == [DIGEST], "what a backup at its end asks"
        assert (await reconcile(store)).marked == 0
        assert not (await store.chunks.insert(DIGEST, BLOB)).duplicate
        assert await store.chunks.missing(DIGEST) == []
        assert s3_emulator.bucket.objects[store.keys.chunk(DIGEST)].data == bytes(BLOB)


async def test_a_no_cache_backup_beside_a_garbage_collection_loses_nothing(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PBS deletes such chunks."""
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": os.urandom(CHUNK)})
        async with store.chunks.writer(wait_s=0):
            await store.chunks.insert(DIGEST, BLOB, cache=False)
            await collect_garbage(store)
            assert store.keys.chunk(DIGEST) in s3_emulator.bucket.objects
