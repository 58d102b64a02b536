"""What verify finds, and what it leaves alone."""

import hashlib
from dataclasses import replace

import pytest

from core.errors import FleeceError
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import LockedError, StoreError
from datastore.manifest import Manifest
from datastore.names import MANIFEST_NAME, BackupType, Group, Snapshot
from repository.backup import SnapshotWriter
from repository.interface import FIXED_CHUNK_SIZE as CHUNK
from repository.verify import VerifyResult, verify
from tests.support.sessions import MemoryDisk, MemoryRepository, chunks_of

GROUP = Group(BackupType.VM, "100")
IMG, FIDX, CONF = "drive-scsi0.img", "drive-scsi0.img.fidx", "qemu-server.conf.blob"
KEY, OTHER_KEY = CryptKey(bytes(range(32))), CryptKey(bytes(range(1, 33)))


async def store(repository: MemoryRepository, ctime: int, data: bytes, codec: ChunkCodec | None = None) -> Snapshot:
    async with repository.backup(GROUP.at(ctime)) as session:
        writer = SnapshotWriter(session, codec or ChunkCodec())
        await writer.add_disk(MemoryDisk(IMG, data))
        await writer.add_blob("qemu-server.conf", b"name: fleece\n")
        await writer.finish()
    return GROUP.at(ctime)


async def check(repository: MemoryRepository, codec: ChunkCodec | None = None) -> list[VerifyResult]:
    before = {digest: bytes(data) for digest, data in repository.chunks.items()}
    files = {snapshot: dict(stored.files) for snapshot, stored in repository.stored.items()}
    results = await verify(repository, sorted(repository.stored, key=lambda one: one.ctime), codec or ChunkCodec())
    assert repository.chunks == before
    assert {snapshot: stored.files for snapshot, stored in repository.stored.items()} == files
    return results


@pytest.mark.parametrize("mode", list(CryptMode))
async def test_sound_snapshots_are_ok_and_shared_chunks_are_read_once(mode: CryptMode) -> None:
    codec = ChunkCodec(None if mode is CryptMode.NONE else KEY, mode)
    repository = MemoryRepository()
    for ctime, letters in ((1000, "ab?."), (2000, "aa?c.."), (3000, "cb")):
        await store(repository, ctime, chunks_of(letters, tail=99), codec)
    results = await check(repository, codec)
    assert [result.to_json() for result in results] == [
        {"snapshot": f"vm/100/{GROUP.at(ctime).time}", "state": "ok", "errors": [], "skipped": None}
        for ctime in (1000, 2000, 3000)
    ]
    assert len(repository.chunk_reads) == len(set(repository.chunk_reads)) == len(repository.chunks)


async def test_flipped_bit_fails_every_snapshot_that_uses_the_chunk_and_no_other() -> None:
    repository = MemoryRepository()
    for ctime, letters in ((1000, "ab"), (2000, "b"), (3000, "a")):
        await store(repository, ctime, chunks_of(letters))
    digest = ChunkCodec().digest(b"b" * CHUNK)
    repository.damage(digest)
    results = await check(repository)
    assert [result.state for result in results] == ["failed", "failed", "ok"]
    assert f"{FIDX} at {CHUNK}, chunk {digest.hex()}" in results[0].errors[0]
    assert "CRC" in results[0].errors[0]
    assert f"{FIDX} at 0" in results[1].errors[0]
    assert repository.chunk_reads.count(digest) == 2, "a look, and a second one before it counts as corrupt"


async def test_content_of_another_chunk_is_found_although_its_crc_is_right() -> None:
    repository = MemoryRepository()
    await store(repository, 1000, chunks_of("ab"))
    a, b = (ChunkCodec().digest(letter * CHUNK) for letter in (b"a", b"b"))
    repository.chunks[a] = repository.chunks[b]
    (result,) = await check(repository)
    assert len(result.errors) == 1
    assert "digest" in result.errors[0]


async def test_bad_last_chunk_is_counted_before_the_result_is_given() -> None:
    repository = MemoryRepository()
    await store(repository, 1000, chunks_of("ab"))
    digest = ChunkCodec().digest(b"b" * CHUNK)
    repository.chunks[digest] = bytes(ChunkCodec().encode(b"b" * (CHUNK - 1) + b"c"))
    assert [(await check(repository))[0].state for _ in range(5)] == ["failed"] * 5


async def test_missing_chunk_is_an_error() -> None:
    repository = MemoryRepository()
    await store(repository, 1000, chunks_of("ab"))
    del repository.chunks[ChunkCodec().digest(b"a" * CHUNK)]
    (result,) = await check(repository)
    assert "it is not in the store" in result.errors[0]


async def test_index_and_blob_are_compared_with_the_manifest() -> None:
    repository = MemoryRepository()
    snapshot = await store(repository, 1000, chunks_of("ab"))
    files = repository.stored[snapshot].files
    files[FIDX] = files[FIDX][:-1] + bytes([files[FIDX][-1] ^ 1])
    files[CONF] = files[CONF][:-1] + bytes([files[CONF][-1] ^ 1])
    (result,) = await check(repository)
    assert len(result.errors) == 2
    assert "wrong index checksum" in result.errors[0]
    assert "wrong checksum" in result.errors[1]


def change_csum(repository: MemoryRepository, snapshot: Snapshot, digests: bytes) -> None:
    """Let the manifest of a snapshot say that its index has these digests."""
    files = repository.stored[snapshot].files
    manifest = Manifest.new(snapshot)
    old = Manifest.parse(files[MANIFEST_NAME], where="").file(FIDX)
    manifest.add(replace(old, csum=hashlib.sha256(digests).digest()))
    files[MANIFEST_NAME] = bytes(manifest.encode())


async def test_chunk_that_an_index_uses_with_two_lengths_is_an_error() -> None:
    """A restore of this image would stop at its end."""
    repository = MemoryRepository()
    snapshot = await store(repository, 1000, chunks_of("a", tail=99))
    files = repository.stored[snapshot].files
    digest = ChunkCodec().digest(b"a" * CHUNK)
    files[FIDX] = files[FIDX][:-32] + digest
    change_csum(repository, snapshot, 2 * digest)
    (result,) = await check(repository)
    assert result.errors == [f"{snapshot}/{FIDX} at {CHUNK}: chunk {digest.hex()} has {CHUNK} bytes, not 99"]


async def test_missing_files_are_errors_and_the_others_are_still_checked() -> None:
    repository = MemoryRepository()
    snapshot = await store(repository, 1000, chunks_of("ab"))
    del repository.stored[snapshot].files[FIDX]
    (result,) = await check(repository)
    assert len(result.errors) == 1
    assert FIDX in result.errors[0]


async def test_unreadable_manifest_fails_the_snapshot() -> None:
    repository = MemoryRepository()
    snapshot = await store(repository, 1000, chunks_of("ab"))
    files = repository.stored[snapshot].files
    files["index.json.blob"] = files["index.json.blob"][:30]
    (result,) = await check(repository)
    assert result.state == "failed"
    assert "index.json.blob" in result.errors[0]


class TestEncrypted:
    async def test_without_the_key_the_crcs_are_checked(self) -> None:
        codec = ChunkCodec(KEY, CryptMode.ENCRYPT)
        repository = MemoryRepository()
        await store(repository, 1000, chunks_of("ab"), codec)
        assert [result.state for result in await check(repository)] == ["ok"]
        repository.damage(codec.digest(b"a" * CHUNK))
        (result,) = await check(repository)
        assert "CRC" in result.errors[0]

    async def test_with_another_key_the_crcs_are_checked_and_nothing_else(self) -> None:
        codec, other = ChunkCodec(KEY, CryptMode.ENCRYPT), ChunkCodec(OTHER_KEY, CryptMode.ENCRYPT)
        repository = MemoryRepository()
        await store(repository, 1000, chunks_of("ab"), codec)
        assert [result.state for result in await check(repository, other)] == ["ok"]
        repository.damage(codec.digest(b"a" * CHUNK))
        (result,) = await check(repository, other)
        assert "CRC" in result.errors[0]

    async def test_plain_chunk_in_an_encrypted_archive_is_an_error(self) -> None:
        codec = ChunkCodec(KEY, CryptMode.ENCRYPT)
        repository = MemoryRepository()
        await store(repository, 1000, chunks_of("ab"), codec)
        repository.chunks[codec.digest(b"a" * CHUNK)] = bytes(ChunkCodec().encode(b"a" * CHUNK))
        for given in (None, codec):
            (result,) = await check(repository, given)
            assert "not encrypted" in result.errors[0]

    @pytest.mark.parametrize("first", [1000, 2000])
    async def test_encrypted_chunk_under_the_digest_of_a_plain_one_is_an_error_whoever_has_it_too(
        self, first: int
    ) -> None:
        codec, plain = ChunkCodec(KEY, CryptMode.ENCRYPT), ChunkCodec()
        repository = MemoryRepository()
        lie = await store(repository, 1000, chunks_of("ab"), codec)
        await store(repository, 2000, chunks_of("cd"))
        digest = plain.digest(b"c" * CHUNK)
        repository.chunks[digest] = repository.chunks[codec.digest(b"a" * CHUNK)]
        files = repository.stored[lie].files
        files[FIDX] = files[FIDX].replace(codec.digest(b"a" * CHUNK), digest)
        change_csum(repository, lie, digest + codec.digest(b"b" * CHUNK))
        order = [GROUP.at(first), GROUP.at(3000 - first)]
        results = {result.snapshot: result for result in await verify(repository, order, plain)}
        assert results[lie].state == "ok"  # of which the key would say more
        assert results[GROUP.at(2000)].state == "failed"


async def test_snapshot_that_is_gone_or_locked_is_skipped_as_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    repository = MemoryRepository()
    snapshot = await store(repository, 1000, chunks_of("a"))
    (result,) = await verify(repository, [GROUP.at(5)], ChunkCodec())
    assert (result.state, result.skipped) == ("ok", "removed meanwhile")
    assert result.to_json()["skipped"] == "removed meanwhile"

    def locked(snapshot: Snapshot) -> None:
        raise LockedError("lock", str(snapshot), "it is being removed")

    monkeypatch.setattr(repository, "reader", locked)
    (result,) = await verify(repository, [snapshot], ChunkCodec())
    assert (result.state, result.skipped) == ("ok", "locked (it is being removed)")


async def test_disk_that_cannot_be_read_stops_the_run_and_blames_no_chunk() -> None:
    def unreadable(call: str) -> None:
        if call == "read_chunk":
            raise StoreError("read chunk", "somewhere", "Input/output error") from OSError(5, "Input/output error")

    repository = MemoryRepository()
    await store(repository, 1000, chunks_of("abcdefghijklmnopqrstuvwxyz"))
    repository.hook = unreadable
    with pytest.raises(FleeceError, match="20 chunks in a row could not be read"):
        await verify(repository, [GROUP.at(1000)], ChunkCodec())


async def test_many_bad_chunks_are_summed_up() -> None:
    repository = MemoryRepository()
    await store(repository, 1000, chunks_of("abcdefghijklmnopqrstuvwxyz"))
    for digest in list(repository.chunks):
        repository.damage(digest)
    (result,) = await check(repository)
    assert len(result.errors) == 21
    assert result.errors[-1].endswith("6 more chunks are bad")
