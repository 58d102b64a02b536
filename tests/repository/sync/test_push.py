"""Pushing from a datastore into another one: what is chosen, what is transferred, what is left alone."""

import hashlib
import os
from typing import Any

import pytest
import trio

from core.errors import UsageError
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import SnapshotNotFoundError
from datastore.filters import GroupFilter
from datastore.manifest import Manifest, ManifestFile
from datastore.names import CLIENT_LOG_NAME, Group, Namespace
from datastore.s3.chunks import S3ChunkStore
from repository.interface import Repository
from repository.sync import Outcome
from repository.throttle import Throttle
from tests.repository.sync.conftest import Pair
from tests.support.snapshots import CHUNK, CODEC, put_file, read_image, write_snapshot
from tests.support.syncs import SERVER_CHUNK, Said, push, times, write

IMAGE = os.urandom(3 * CHUNK + 100)
GROUP = Group.parse("vm/100")
DEEP = Namespace.parse("a/b")


async def mark(repo: Repository, snapshot: object, state: str) -> None:
    await repo.record_verification(snapshot, state, "UPID:x")  # type: ignore[attr-defined]


async def test_snapshots_arrive_with_their_data_logs_notes_and_manifest(pair: Pair) -> None:
    first = await write_snapshot(pair.source, GROUP, 1000, {"disk.img.fidx": IMAGE, "vm.conf.blob": b"x"})
    await pair.source.upload_log(first, CODEC.encode_blob(b"the log"))
    await pair.source.set_notes(first, "two\nlines")
    await mark(pair.source, first, "ok")
    await pair.source.set_protected(first, protected=True)
    report = await push(pair.source, pair.target)
    (one,) = report.snapshots
    assert (one.snapshot, one.outcome, one.chunks, one.chunks_sent) == (first, Outcome.NEW, 4, 4)
    assert report.failed == {}
    assert (report.groups, report.namespaces) == (1, 1)
    assert await read_image(pair.target, first, "disk.img.fidx") == IMAGE
    (info,) = await pair.target.snapshots()
    assert (info.comment, info.owner, info.protected) == ("two\nlines", "root@pam", False)
    assert info.verification == {"state": "ok", "upid": "UPID:x"}
    async with pair.source.reader(first) as theirs, pair.target.reader(first) as ours:
        assert await theirs.manifest() == await ours.manifest()
        for name in (CLIENT_LOG_NAME, "vm.conf.blob"):
            assert await theirs.read_blob(name) == await ours.read_blob(name)
        index = await theirs.open_index("disk.img.fidx")
        for number in range(index.count):  # as they are stored, bit by bit
            digest = index.digest(number)
            assert bytes(await theirs.read_chunk(digest)) == bytes(await ours.read_chunk(digest))


async def test_chunks_that_the_previous_snapshot_of_the_target_has_are_not_sent(pair: Pair) -> None:
    changed = IMAGE[:CHUNK] + os.urandom(CHUNK) + IMAGE[2 * CHUNK :]
    await write_snapshot(pair.source, GROUP, 1000, {"disk.img.fidx": IMAGE})
    await push(pair.source, pair.target)
    second = await write_snapshot(pair.source, GROUP, 2000, {"disk.img.fidx": changed})
    (one,) = (await push(pair.source, pair.target)).snapshots
    assert (one.chunks, one.chunks_sent) == (4, 1)
    assert await read_image(pair.target, second, "disk.img.fidx") == changed
    again = await push(pair.source, pair.target)
    assert (again.snapshots, again.skipped) == ([], 2)


async def test_a_chunk_of_the_previous_snapshot_that_is_gone_is_sent_again(pair: Pair) -> None:
    await write_snapshot(pair.source, GROUP, 1000, {"disk.img.fidx": IMAGE})
    await push(pair.source, pair.target)
    digest = CODEC.digest(IMAGE[:CHUNK])
    path = pair.target.store.base / ".chunks" / digest.hex()[:4] / digest.hex()
    path.unlink()
    second = await write_snapshot(pair.source, GROUP, 2000, {"disk.img.fidx": IMAGE})
    (one,) = (await push(pair.source, pair.target)).snapshots
    assert one.chunks_sent == 1
    assert await read_image(pair.target, second, "disk.img.fidx") == IMAGE


async def test_into_a_bucket(bucket_pair: Pair) -> None:
    pair = bucket_pair
    snapshots = [
        await write_snapshot(pair.source, GROUP, ctime, {"disk.img.fidx": IMAGE, "a.conf.blob": b"x"})
        for ctime in (1000, 2000)
    ]
    await pair.source.upload_log(snapshots[0], CODEC.encode_blob(b"log"))
    report = await push(pair.source, pair.target)
    assert [one.chunks_sent for one in report.snapshots] == [4, 0]
    for snapshot in snapshots:
        assert await read_image(pair.target, snapshot, "disk.img.fidx") == IMAGE
    assert any(file.filename == CLIENT_LOG_NAME for file in (await pair.target.snapshots())[0].files)


async def test_out_of_a_bucket_whose_cache_is_cold(bucket_pair: Pair) -> None:
    bucket, folder = bucket_pair.target, bucket_pair.source
    snapshot = await write_snapshot(bucket, GROUP, 1000, {"disk.img.fidx": IMAGE, "a.conf.blob": b"x"})
    chunks = bucket.store.chunks
    assert isinstance(chunks, S3ChunkStore)
    for offset in range(0, len(IMAGE), CHUNK):
        await chunks.cache.drop(CODEC.digest(IMAGE[offset : offset + CHUNK]))
    report = await push(bucket, folder)
    assert [one.chunks_sent for one in report.snapshots] == [4]
    assert await read_image(folder, snapshot, "disk.img.fidx") == IMAGE


async def test_namespaces_are_mapped_made_and_bounded(pair: Pair) -> None:
    await write(pair.source, "vm/1", 1000)
    for ns in (Namespace.parse("a"), DEEP, Namespace.parse("a/b/c")):
        await write(pair.source, Group.parse("vm/2", ns), 1000)
    said = Said()
    anchors = {"source_ns": Namespace.parse("a"), "target_ns": Namespace.parse("x/y")}
    report = await push(pair.source, pair.target, said, max_depth=1, **anchors)
    assert [str(ns) for ns in await pair.target.namespaces()] == ["", "x", "x/y", "x/y/b"]
    assert [str(ns) for ns in report.created] == ["x", "x/y", "x/y/b"]
    assert await times(pair.target, Group.parse("vm/2", Namespace.parse("x/y/b"))) == [1000]
    assert await times(pair.target, "vm/1") == []
    assert "created namespace x/y/b in to" in said.lines
    with pytest.raises(UsageError, match="the source is 3 levels deep"):
        await push(pair.source, pair.target, target_ns=Namespace.parse("1/2/3/4/5"))
    with pytest.raises(UsageError, match="1 levels below it are deeper than 7"):
        await push(pair.source, pair.target, max_depth=1, target_ns=Namespace.parse("1/2/3/4/5/6/7"))
    with pytest.raises(SnapshotNotFoundError):
        await push(pair.source, pair.target, source_ns=Namespace.parse("nowhere"))


async def test_group_filters_and_parallel_groups(pair: Pair) -> None:
    for group in ("vm/1", "vm/2", "vm/3", "host/a", "ct/5"):
        await write(pair.source, group, 1000, 2000)
    filters = tuple(map(GroupFilter.parse, ("type:vm", "type:ct", "exclude:group:vm/2")))
    report = await push(pair.source, pair.target, filters=filters, parallel=3)
    assert [str(info.group) for info in await pair.target.groups()] == ["ct/5", "vm/1", "vm/3"]
    assert (report.groups, len(report.snapshots), report.failed) == (3, 6, {})


async def test_transfer_last_counts_from_the_newest(pair: Pair) -> None:
    await write(pair.source, "vm/1", 1000, 2000, 3000, 4000)
    said = Said()
    report = await push(pair.source, pair.target, said, transfer_last=2)
    assert await times(pair.target, "vm/1") == [3000, 4000]
    assert report.skipped == 2
    assert (
        "vm/1: skipped 2 snapshots (1970-01-01T00:16:40Z .. 1970-01-01T00:33:20Z), due to transfer-last" in said.lines
    )
    # What is older than the newest one there is never pushed later.
    assert (await push(pair.source, pair.target)).snapshots == []


async def test_verified_only_takes_what_was_found_sound(pair: Pair) -> None:
    one, two, three = await write(pair.source, "vm/1", 1000, 2000, 3000)
    await mark(pair.source, one, "ok")
    await mark(pair.source, two, "failed")
    await push(pair.source, pair.target, verified_only=True)
    assert await times(pair.target, "vm/1") == [1000]
    assert three.ctime == 3000


async def test_encrypted_only_and_encrypted_data_need_no_key(pair: Pair) -> None:
    codec = ChunkCodec(CryptKey.from_raw(bytes(range(32))), CryptMode.ENCRYPT)
    await write(pair.source, "vm/1", 1000)
    snapshot = Group.parse("vm/2").at(1000)
    image = os.urandom(CHUNK)
    digest = codec.digest(image)
    async with pair.source.backup(snapshot) as session:
        writer = await session.open_index("disk.img.fidx", size=CHUNK, chunk_size=CHUNK)
        await session.put_chunk(writer, digest, CHUNK, codec.encode(image))
        await session.append(writer, [(0, digest)])
        csum = hashlib.sha256(digest).digest()
        await session.close_index(writer, 1, CHUNK, csum)
        manifest = Manifest.new(snapshot)
        manifest.add(ManifestFile("disk.img.fidx", CryptMode.ENCRYPT, CHUNK, csum))
        await session.put_blob("index.json.blob", manifest.encode(codec))
        await session.finish()
    report = await push(pair.source, pair.target, encrypted_only=True)
    assert report.failed == {}
    assert await times(pair.target, "vm/1") == []
    async with pair.target.reader(snapshot) as reader:
        blob = await reader.read_chunk(digest)
        where = "x"
        assert bytes(codec.decode(blob, digest=digest, size=CHUNK, crypt_mode=CryptMode.ENCRYPT, where=where)) == image
        Manifest.parse(await reader.manifest(), where=where, key=codec.key)  # its signature is the source's


async def test_a_group_of_somebody_else_is_left_out_with_a_warning(pair: Pair) -> None:
    await write(pair.source, "vm/1", 1000, 2000)
    await write(pair.source, "vm/2", 1000)
    await write(pair.target, "vm/1", 1000)
    await pair.target.set_owner(Group.parse("vm/1"), "other@pbs")
    said = Said()
    report = await push(pair.source, pair.target, said)
    assert await times(pair.target, "vm/1") == [1000]
    assert await times(pair.target, "vm/2") == [1000]
    assert report.failed == {}
    assert said.warnings == ["vm/1 is left out: it belongs to other@pbs at the target, not to root@pam"]


async def test_new_groups_belong_to_the_owner_that_is_named(pair: Pair) -> None:
    await write(pair.source, "vm/1", 1000)
    await push(pair.source, pair.target, owner="backup@pbs!host")
    assert [info.owner for info in await pair.target.groups()] == ["backup@pbs!host"]


async def test_an_unfinished_snapshot_of_the_source_waits(pair: Pair) -> None:
    await write(pair.source, "vm/1", 1000)
    async with pair.source.backup(Group.parse("vm/1").at(2000)) as session:
        await put_file(session, "vm.conf.blob", b"x")
        await push(pair.source, pair.target, remove_vanished=True)
    assert await times(pair.target, "vm/1", unfinished=True) == [1000]


async def test_a_rate_limits_what_goes_over(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    await write_snapshot(pair.source, GROUP, 1000, {"disk.img.fidx": IMAGE})
    report = await push(pair.source, pair.target, rate=Throttle(CHUNK // 10))
    assert 25 < report.duration_s < 45
    assert await times(pair.target, GROUP) == [1000]


async def test_the_same_datastore_on_both_sides_is_refused(pair: Pair) -> None:
    with pytest.raises(UsageError, match="is the same datastore"):
        await push(pair.source, pair.source)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parallel": 0}, "1 to 32"),
        ({"parallel": 33}, "1 to 32"),
        ({"transfer_last": 0}, "at least 1"),
        ({"resync_corrupt": True}, "never touches"),
        ({"remove_anyway": True}, "belongs to --remove-vanished"),
        ({"max_depth": 8}, "0 to 7"),
    ],
)
async def test_options_that_make_no_sense_are_refused(pair: Pair, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        await push(pair.source, pair.target, **wrong)


async def test_many_chunks_go_over_in_the_order_of_the_archive_and_each_once(pair: Pair) -> None:
    image = b"".join(bytes([number % 40 + 1]) * CHUNK for number in range(60))
    snapshot = await write_snapshot(pair.source, GROUP, 1000, {"disk.img.fidx": image})
    (one,) = (await push(pair.source, pair.target)).snapshots
    assert (one.chunks, one.chunks_sent) == (60, 40)
    assert await read_image(pair.target, snapshot, "disk.img.fidx") == image
    assert SERVER_CHUNK == 64 * CHUNK
