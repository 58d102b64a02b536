"""The suite of the chunk store interface: runs over the local folder, and over a bucket with a cache in front."""

import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from core.errors import FormatError
from datastore.blob import Blob, BlobKind
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import ChunkNotFoundError, LockedError, StoreError
from datastore.files import Owner, SyncLevel
from datastore.interface import ChunkStore, PutResult
from datastore.local_chunks import LocalChunkStore
from tests.support.s3_stores import s3_place, s3_store

CODEC = ChunkCodec()
DATA = b"fleece" * 2000
DIGEST = CODEC.digest(DATA)
SMALL = CODEC.encode(DATA)
LARGE = CODEC.encode(DATA, compress=False)
SECRET = ChunkCodec(CryptKey.from_raw(bytes(range(32))), CryptMode.ENCRYPT)
#: What a client that lies may store under the digest of anything: nobody without its key can look into it.
SHORT_LIE = Blob.make(BlobKind.ENCRYPTED, b"x", iv=bytes(16), tag=bytes(16))
LONG_LIE = Blob.make(BlobKind.ENCRYPTED_ZSTD, bytes(len(LARGE) - 44), iv=bytes(16), tag=bytes(16))


#: What only a folder does, where a file is the chunk and not just a sign of it.
only_local = pytest.mark.parametrize("store", ["local"], indirect=True)


@pytest.fixture(params=["local", "s3", pytest.param("rgw", marks=pytest.mark.rgw)])
async def store(request: pytest.FixtureRequest, store_folder: Path) -> AsyncIterator[ChunkStore]:
    if request.param != "local":
        async with s3_store(store_folder, *s3_place(request)) as opened:
            yield opened.chunks
        return
    local = LocalChunkStore(store_folder, Owner.of(store_folder), SyncLevel.FILESYSTEM)
    yield local
    local.close()


@pytest.fixture
def path(store_folder: Path) -> Callable[[bytes], Path]:
    return lambda digest: store_folder / ".chunks" / digest.hex()[:4] / digest.hex()


async def test_a_chunk_comes_back_as_it_was_stored(store: ChunkStore) -> None:
    assert await store.insert(DIGEST, SMALL) == PutResult(False, len(SMALL))
    assert bytes(await store.read(DIGEST)) == bytes(SMALL)


async def test_many_chunks_come_back_in_the_order_asked_for(store: ChunkStore) -> None:
    chunks = {CODEC.digest(data): CODEC.encode(data) for data in (b"a" * 99, b"b" * 98, b"c" * 97)}
    for digest, blob in chunks.items():
        await store.insert(digest, blob)
    asked = [*reversed(chunks), next(iter(chunks))]
    assert [bytes(blob) for blob in await store.read_many(asked)] == [bytes(chunks[digest]) for digest in asked]
    assert sorted(store.disk_order(asked)) == [0, 1, 2, 3]


async def test_a_missing_chunk_is_named(store: ChunkStore) -> None:
    with pytest.raises(ChunkNotFoundError, match=DIGEST.hex()):
        await store.read(DIGEST)
    assert not await store.touch(DIGEST)


async def test_a_second_insert_is_a_duplicate_and_touches_the_chunk(
    store: ChunkStore, path: Callable[[bytes], Path]
) -> None:
    await store.insert(DIGEST, SMALL)
    os.utime(path(DIGEST), (1, 1))
    assert await store.insert(DIGEST, SMALL) == PutResult(True, len(SMALL))
    found = path(DIGEST).stat()
    assert found.st_atime > 1
    assert found.st_mtime == 1


@only_local
async def test_a_chunk_that_pbs_sets_aside_between_look_and_touch_is_stored_anew(
    store: ChunkStore, path: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PBS's verify renames corrupt chunks without knowing Fleece's chunk locks."""
    await store.insert(DIGEST, SMALL)
    bad = path(DIGEST).with_name(f"{DIGEST.hex()}.0.bad")

    def late(name: str) -> None:
        Path(name).rename(bad)
        raise FileNotFoundError(name)

    monkeypatch.setattr("datastore.local_chunks.touch", late)
    assert await store.insert(DIGEST, SMALL) == PutResult(False, len(SMALL))
    assert path(DIGEST).read_bytes() == bad.read_bytes() == bytes(SMALL)


async def test_marking_tells_what_is_missing_and_touches_bad_copies(
    store: ChunkStore, path: Callable[[bytes], Path]
) -> None:
    await store.insert(DIGEST, SMALL)
    os.utime(path(DIGEST), (1, 1))
    gone = bytes(32)
    bad = path(gone).with_name(f"{gone.hex()}.3.bad")
    bad.touch()
    os.utime(bad, (1, 1))
    assert await store.mark(DIGEST + gone) == [gone]
    assert path(DIGEST).stat().st_atime > 1
    assert bad.stat().st_atime > 1


@only_local
@pytest.mark.parametrize(
    ("there", "incoming", "duplicate", "stays"),
    [
        (SMALL, LARGE, True, "there"),
        (LARGE, SMALL, False, "incoming"),
        (b"", SMALL, False, "incoming"),
        (bytes(SMALL)[:-1] + b"x", SMALL, True, "there"),  # equal length is taken for equal content
        (bytes(len(SMALL)), SMALL, False, "incoming"),
        (bytes(LARGE)[:4096], LARGE, False, "incoming"),
        (SECRET.encode(DATA), SECRET.encode(DATA + os.urandom(50)), True, "there"),
        (bytes(44), SECRET.encode(DATA), False, "incoming"),
        (bytes(SECRET.encode(DATA, compress=False))[:4096], SECRET.encode(DATA), False, "incoming"),
        (SHORT_LIE, LARGE, False, "incoming"),
        (LONG_LIE, LARGE, False, "incoming"),
    ],
    ids=[
        "shorter stays",
        "longer is replaced",
        "empty is replaced",
        "equal length stays",
        "zeros of a power cut are replaced",
        "what a power cut cut off is replaced",
        "encrypted stays",
        "zeros are replaced by an encrypted one",
        "an encrypted one that was cut off is replaced",
        "a shorter lie",
        "a lie as long",
    ],
)
async def test_what_is_there_decides(
    store: ChunkStore, path: Callable[[bytes], Path], there: Blob | bytes, incoming: Blob, duplicate: bool, stays: str
) -> None:
    path(DIGEST).write_bytes(bytes(there))
    result = await store.insert(DIGEST, incoming)
    expected = bytes(there if stays == "there" else incoming)
    assert result == PutResult(duplicate, len(expected))
    assert path(DIGEST).read_bytes() == expected


@only_local
@pytest.mark.parametrize(
    ("there", "incoming"),
    [
        (SMALL, SECRET.encode(DATA)),
        (LARGE, SECRET.encode(DATA)),
        (LARGE, LONG_LIE),
        (
            Blob.make(BlobKind.ENCRYPTED, b"1234", iv=bytes(16), tag=bytes(16)),
            Blob.make(BlobKind.ENCRYPTED, b"12345", iv=bytes(16), tag=bytes(16)),
        ),
    ],
    ids=["plain under an encrypted name", "plain, uncompressed", "plain, as long", "encrypted of another length"],
)
async def test_an_impossible_chunk_in_its_place_is_an_error(
    store: ChunkStore, path: Callable[[bytes], Path], there: Blob, incoming: Blob
) -> None:
    path(DIGEST).write_bytes(bytes(there))
    with pytest.raises(StoreError, match="another chunk is stored under its digest"):
        await store.insert(DIGEST, incoming)
    assert path(DIGEST).read_bytes() == bytes(there)


@only_local
async def test_a_chunk_that_the_disk_cannot_read_is_replaced(
    store: ChunkStore, path: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path(DIGEST).write_bytes(bytes(len(SMALL)))

    def bad(descriptor: int, size: int) -> bytes:
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr("datastore.local_chunks.os.read", bad)
    assert await store.insert(DIGEST, SMALL) == PutResult(False, len(SMALL))
    monkeypatch.undo()
    assert path(DIGEST).read_bytes() == bytes(SMALL)


async def test_a_folder_or_link_in_a_chunks_place_is_an_error(store: ChunkStore, path: Callable[[bytes], Path]) -> None:
    path(DIGEST).symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match="something that is no file"):
        await store.insert(DIGEST, SMALL)
    with pytest.raises(StoreError):
        await store.read(DIGEST)


@only_local
async def test_a_chunk_longer_than_any_is_refused_before_it_is_read(
    store: ChunkStore, path: Callable[[bytes], Path]
) -> None:
    with path(DIGEST).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match="at most 16777260 are possible"):
        await store.read(DIGEST)


@only_local
async def test_chunks_have_mode_644_and_no_other_file_appears(store: ChunkStore, path: Callable[[bytes], Path]) -> None:
    umask = os.umask(0o077)
    try:
        await store.insert(DIGEST, LARGE)
        await store.insert(DIGEST, SMALL)
    finally:
        os.umask(umask)
    assert path(DIGEST).stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in path(DIGEST).parent.iterdir()] == [DIGEST.hex()]


async def test_corrupt_chunks_are_set_aside_under_the_first_free_name(
    store: ChunkStore, path: Callable[[bytes], Path]
) -> None:
    names = []
    for _ in range(11):
        await store.insert(DIGEST, SMALL)
        names.append(await store.quarantine(DIGEST))
    assert names == [f"{DIGEST.hex()}.{number}.bad" for number in (*range(10), 9)]
    assert await store.quarantine(DIGEST) is None
    assert await store.insert(DIGEST, SMALL) == PutResult(False, len(SMALL))


async def test_parallel_inserts_of_one_chunk_store_it_once(store: ChunkStore) -> None:
    results: list[PutResult] = []

    async def insert() -> None:
        results.append(await store.insert(DIGEST, SMALL))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(insert)
    assert sorted(result.duplicate for result in results) == [False] + [True] * 19


async def test_writers_and_garbage_collection_hold_the_store(store: ChunkStore) -> None:
    async with store.writer(wait_s=0) as writer, store.exclusive(wait_s=0) as oldest:
        assert oldest == writer.start
        with pytest.raises(LockedError):
            async with store.exclusive(wait_s=0):
                pass


# What only a local folder can show.


@pytest.mark.parametrize("level", SyncLevel)
async def test_without_unnamed_files_the_result_is_the_same(
    store_folder: Path, path: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, level: SyncLevel
) -> None:
    real_open = os.open

    def no_tmpfile(name: "os.PathLike[str] | str", flags: int, mode: int = 0o777, **rest: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return real_open(name, flags, mode, **rest)

    monkeypatch.setattr(os, "open", no_tmpfile)
    local = LocalChunkStore(store_folder, Owner.of(store_folder), level)
    assert await local.insert(DIGEST, LARGE) == PutResult(False, len(LARGE))
    assert await local.insert(DIGEST, SMALL) == PutResult(False, len(SMALL))
    local.close()
    assert path(DIGEST).read_bytes() == bytes(SMALL)
    assert [entry.name for entry in path(DIGEST).parent.iterdir()] == [DIGEST.hex()]
    assert list((store_folder / ".fleece/tmp").iterdir()) == []


def noted(calls: list[str], name: str) -> Callable[..., Any]:
    real = getattr(os, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return real(*args, **kwargs)

    return call


async def test_level_file_syncs_the_chunk_before_its_name_and_the_folder_after(
    store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "link", "rename"):
        monkeypatch.setattr(os, name, noted(calls, name))
    for level, expected in [(SyncLevel.FILE, ["fsync", "link", "fsync"]), (SyncLevel.FILESYSTEM, ["link"])]:
        local = LocalChunkStore(store_folder, Owner.of(store_folder), level)
        data = os.urandom(100)
        calls.clear()
        await local.insert(CODEC.digest(data), CODEC.encode(data))
        assert calls == expected
        local.close()


async def test_a_missing_prefix_folder_says_that_the_layout_is_foreign(
    store_folder: Path, path: Callable[[bytes], Path]
) -> None:
    path(DIGEST).parent.rmdir()
    local = LocalChunkStore(store_folder, Owner.of(store_folder), SyncLevel.FILESYSTEM)
    try:
        with pytest.raises(StoreError, match=r"its folder is missing; is this a datastore"):
            await local.insert(DIGEST, SMALL)
    finally:
        local.close()
        path(DIGEST).parent.mkdir()


async def test_access_times_that_do_not_change_are_found_out(
    store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = LocalChunkStore(store_folder, Owner.of(store_folder), SyncLevel.FILESYSTEM)
    await local.check_access_times(DIGEST, SMALL)
    monkeypatch.setattr("datastore.local_chunks.touch", lambda path: None)
    with pytest.raises(StoreError, match="does not change its access time"):
        await local.check_access_times(DIGEST, SMALL)
    local.close()


async def test_two_processes_inserting_and_unlinking_the_same_chunks_never_lose_a_fresh_one(
    store_folder: Path, path: Callable[[bytes], Path]
) -> None:
    """The sweep's rule: look, lock, look again, unlink; an insert of the same chunk meanwhile keeps it."""
    script = """
import select, sys
from pathlib import Path
from datastore.files import Owner
from datastore.locks import ChunkLocks
base, digest = Path(sys.argv[1]), bytes.fromhex(sys.argv[2])
locks = ChunkLocks(base, Owner.of(base))
chunk = base / ".chunks" / digest.hex()[:4] / digest.hex()
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    with locks.hold(digest):
        try:
            if chunk.stat().st_atime < 1000:
                chunk.unlink()
        except FileNotFoundError:
            pass
"""
    command = [sys.executable, "-c", script, str(store_folder), DIGEST.hex()]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    local = LocalChunkStore(store_folder, Owner.of(store_folder), SyncLevel.FILESYSTEM)
    assert process.stdout is not None
    await process.stdout.receive_some()
    assert process.stdin is not None
    for _ in range(300):
        await local.insert(DIGEST, SMALL)
        assert path(DIGEST).exists()
        try:
            os.utime(path(DIGEST), (1, 1))
        except FileNotFoundError as error:
            raise AssertionError("a chunk that was just inserted is gone") from error
    await process.stdin.aclose()
    with trio.fail_after(60):
        assert await process.wait() == 0
    await process.stdout.aclose()
    local.close()
