"""Pulling: what is there already is looked at again, damage is mended, and a source is believed nowhere."""

import hashlib
import os
from typing import Any

import pytest

from core.errors import FleeceError
from datastore.blob import Blob, BlobKind
from datastore.fixed_index import FixedIndex
from datastore.manifest import Manifest
from datastore.names import CLIENT_LOG_NAME, Group
from repository.sync import Outcome
from tests.repository.sync.conftest import Pair
from tests.support.snapshots import CHUNK, CODEC, read_image, write_snapshot
from tests.support.stores import chunk_files
from tests.support.syncs import Faults, Faulty, Said, pull, times, write

IMAGE = os.urandom(3 * CHUNK + 100)
FILES = {"disk.img.fidx": IMAGE, "vm.conf.blob": b"x"}
GROUP = Group.parse("vm/100")
AT = GROUP.at(1000)


async def pulled(pair: Pair) -> None:
    await write_snapshot(pair.source, GROUP, 1000, FILES)
    assert len((await pull(pair.source, pair.target)).snapshots) == 1


def chunk_path(pair: Pair, data: bytes) -> Any:
    digest = CODEC.digest(data)
    return pair.target.store.base / ".chunks" / digest.hex()[:4] / digest.hex()


async def test_late_notes_and_logs_of_the_newest_snapshot_come_along(pair: Pair) -> None:
    await pulled(pair)
    assert (await pull(pair.source, pair.target)).snapshots == []
    await pair.source.set_notes(AT, "late")
    await pair.source.upload_log(AT, CODEC.encode_blob(b"log"))
    (one,) = (await pull(pair.source, pair.target)).snapshots
    assert (one.outcome, one.chunks_sent) == (Outcome.UPDATED, 0)
    (info,) = await pair.target.snapshots()
    assert info.comment == "late"
    assert CLIENT_LOG_NAME in [file.filename for file in info.files]
    assert (await pull(pair.source, pair.target)).snapshots == []


async def test_what_was_verified_here_stays_and_what_was_verified_there_comes_if_nothing_was(pair: Pair) -> None:
    await pulled(pair)
    await pair.source.record_verification(AT, "ok", "UPID:there")
    await pull(pair.source, pair.target)
    (info,) = await pair.target.snapshots()
    assert info.verification == {"state": "ok", "upid": "UPID:there"}
    await pair.target.record_verification(AT, "failed", "UPID:here")
    await pair.source.set_notes(AT, "x")
    await pull(pair.source, pair.target)
    (info,) = await pair.target.snapshots()
    assert (info.comment, info.verification) == ("x", {"state": "failed", "upid": "UPID:here"})


async def test_older_snapshots_and_protection_are_left_alone(pair: Pair) -> None:
    await pulled(pair)
    await write(pair.source, GROUP, 2000)
    await pull(pair.source, pair.target)
    await pair.target.set_protected(AT, protected=True)
    await pair.source.set_notes(AT, "late")
    report = await pull(pair.source, pair.target)
    assert (report.snapshots, report.skipped) == ([], 1)
    assert (await pair.target.snapshot(AT)).comment == ""


@pytest.mark.parametrize("damage", ["missing", "flipped", "index", "blob", "manifest"])
async def test_resync_corrupt_mends_what_a_verification_found(pair: Pair, damage: str) -> None:
    await pulled(pair)
    await write(pair.source, GROUP, 2000)
    await pull(pair.source, pair.target)
    path = chunk_path(pair, IMAGE[:CHUNK])
    folder = pair.target.store.base / AT.path
    if damage != "manifest":
        await pair.target.record_verification(AT, "failed", "UPID:here")
    await pair.target.set_protected(AT, protected=True)
    if damage == "missing":
        path.unlink()
    else:
        names = {"index": "disk.img.fidx", "blob": "vm.conf.blob", "manifest": "index.json.blob"}
        broken = folder / names[damage] if damage in names else path
        data = bytearray(broken.read_bytes())
        data[-1] ^= 1
        broken.unlink()
        broken.write_bytes(data)
    assert (await pull(pair.source, pair.target)).snapshots == []
    (one,) = (await pull(pair.source, pair.target, resync_corrupt=True)).snapshots
    assert one.outcome is Outcome.RESYNCED
    assert await read_image(pair.target, AT, "disk.img.fidx") == IMAGE
    info = await pair.target.snapshot(AT)
    assert (info.verification, info.protected) == (None, True)
    async with pair.source.reader(AT) as theirs, pair.target.reader(AT) as ours:
        assert await ours.read_blob("vm.conf.blob") == await theirs.read_blob("vm.conf.blob")
    assert sorted(file.name for file in folder.iterdir()) == [
        ".protected", "disk.img.fidx", "index.json.blob", "vm.conf.blob",
    ]  # fmt: skip
    assert (await pull(pair.source, pair.target, resync_corrupt=True)).snapshots == []


async def test_a_resync_that_fails_leaves_what_was_there(pair: Pair) -> None:
    await pulled(pair)
    await pair.target.record_verification(AT, "failed", "UPID:here")
    before = {file.name: file.read_bytes() for file in (pair.target.store.base / AT.path).iterdir()}
    faults = Faults()
    await pull(Faulty(pair.source, faults), pair.target)
    for call in range(2, 14):  # the first one asks who it is, and may fail
        faults = Faults(call, FleeceError("go on", "", "planned"))
        try:
            report = await pull(Faulty(pair.source, faults), pair.target, resync_corrupt=True)
        except FleeceError:
            report = None
        if report is not None and not report.failed:
            break
        now = {file.name: file.read_bytes() for file in (pair.target.store.base / AT.path).iterdir()}
        if now != before:  # mended; only the question for a log came later
            assert (await pair.target.snapshot(AT)).verification is None
            assert await read_image(pair.target, AT, "disk.img.fidx") == IMAGE
            assert call > 7
            break
    else:
        pytest.fail("it never got through")
    assert call > 5


async def test_a_foreign_owner_fails_the_group_and_the_run(pair: Pair) -> None:
    await pulled(pair)
    await write(pair.source, "vm/2", 1000)
    await pair.target.set_owner(GROUP, "other@pbs")
    report = await pull(pair.source, pair.target)
    assert report.failed == {"vm/100": "it belongs to other@pbs at the target, not to root@pam"}
    assert await times(pair.target, "vm/2") == [1000]


async def test_transfer_last_still_looks_at_the_newest_one_that_is_there(pair: Pair) -> None:
    await pulled(pair)
    await pair.source.set_notes(AT, "late")
    await write(pair.source, GROUP, 2000, 3000)
    await pull(pair.source, pair.target, transfer_last=1)
    assert await times(pair.target, GROUP) == [1000, 3000]
    assert (await pair.target.snapshot(AT)).comment == "late"


async def other_manifest(inner: Any) -> bytes:
    manifest = Manifest.new(Group.parse("vm/7").at(1000))
    return bytes(manifest.encode(CODEC))


async def other_index(inner: Any, name: str, *, size: int | None = None) -> FixedIndex:
    index = await inner.open_index(name, size=size)
    digests = bytearray(index.digests)
    digests[0] ^= 1
    return FixedIndex(index.header, memoryview(digests), index.where)


async def other_size(inner: Any, name: str, *, size: int | None = None) -> FixedIndex:
    index = await inner.open_index(name)
    digests = bytes(index.digests)[: 2 * 32]
    head = type(index.header)(
        index.header.uuid, 0, hashlib.sha256(digests).digest(), CHUNK + 5, index.header.chunk_size
    )
    return FixedIndex(head, memoryview(digests), index.where)


async def other_blob(inner: Any, name: str, **named: Any) -> bytes:
    return bytes(CODEC.encode_blob(b"something else"))


async def other_chunks(inner: Any, digests: Any) -> list[Blob]:
    return [CODEC.encode(b"y" * CHUNK) for _ in digests]


async def short_chunks(inner: Any, digests: Any) -> list[Blob]:
    return (await inner.read_chunks(digests))[:-1]  # type: ignore[no-any-return]


async def wrong_crc(inner: Any, digests: Any) -> list[Blob]:
    return [Blob(one.kind, one.crc ^ 1, one.payload) for one in await inner.read_chunks(digests)]


async def encrypted_chunks(inner: Any, digests: Any) -> list[Blob]:
    return [
        Blob.make(BlobKind.ENCRYPTED, one.payload, iv=bytes(16), tag=bytes(16))
        for one in await inner.read_chunks(digests)
    ]


async def bomb(inner: Any, digests: Any) -> list[Blob]:
    return [CODEC.encode(bytes(16 << 20)) for _ in digests]


@pytest.mark.parametrize(
    ("lie", "function", "message"),
    [
        ("reader.manifest", other_manifest, "that of another snapshot, vm/7"),
        ("reader.open_index", other_index, "the manifest says"),
        ("reader.open_index", other_size, "the manifest says"),
        ("reader.read_blob", other_blob, "the manifest says"),
        ("reader.read_chunks", other_chunks, "digest"),
        ("reader.read_chunks", short_chunks, "were asked for"),
        ("reader.read_chunks", wrong_crc, "CRC"),
        ("reader.read_chunks", encrypted_chunks, "it is encrypted, the manifest says"),
        ("reader.read_chunks", bomb, "bytes"),
    ],
)
async def test_a_source_that_lies_leaves_no_snapshot(pair: Pair, lie: str, function: object, message: str) -> None:
    await write_snapshot(pair.source, GROUP, 1000, FILES)
    await write(pair.source, "vm/2", 1000)
    said = Said()

    async def lying(inner: Any, *given: Any, **named: Any) -> Any:
        honest = getattr(inner, lie.partition(".")[2])
        true = inner.snapshot.group.id == "2" or given == (CLIENT_LOG_NAME,)
        return await (honest(*given, **named) if true else function(inner, *given, **named))  # type: ignore[operator]

    report = await pull(Faulty(pair.source, Faults(), {lie: lying}), pair.target, said)
    assert list(report.failed) == ["vm/100"]
    assert message in report.failed["vm/100"]
    assert await times(pair.target, GROUP, unfinished=True) == []
    assert await times(pair.target, "vm/2") == [1000]
    # No chunk came in under a name that is not its own.
    for path in chunk_files(pair.target.store.base):
        blob = Blob.parse(path.read_bytes(), where="x")
        assert CODEC.digest(CODEC.decode_blob(bytes(blob), crypt_mode=None, where="x")).hex() == path.name


async def test_a_damaged_log_is_left_out_and_told(pair: Pair) -> None:
    await write_snapshot(pair.source, GROUP, 1000, FILES)
    raw = bytearray(bytes(CODEC.encode_blob(b"log")))
    raw[-1] ^= 1
    (pair.source.store.base / AT.path / CLIENT_LOG_NAME).write_bytes(raw)
    said = Said()
    report = await pull(pair.source, pair.target, said)
    assert report.failed == {}
    assert "the client log of vm/100/1970-01-01T00:16:40Z is left out" in said.warnings[0]
    assert await times(pair.target, GROUP) == [1000]


async def test_a_snapshot_in_a_bucket_is_brought_up_to_date_and_mended(bucket_pair: Pair) -> None:
    pair = bucket_pair
    await pulled(pair)
    await pair.source.set_notes(AT, "late")
    (one,) = (await pull(pair.source, pair.target)).snapshots
    assert one.outcome is Outcome.UPDATED
    assert (await pair.target.snapshot(AT)).comment == "late"
    await pair.target.record_verification(AT, "failed", "UPID:here")
    (pair.target.store.base / AT.path / "disk.img.fidx").write_bytes(b"nothing")
    (one,) = (await pull(pair.source, pair.target, resync_corrupt=True)).snapshots
    assert one.outcome is Outcome.RESYNCED
    assert await read_image(pair.target, AT, "disk.img.fidx") == IMAGE
    assert (await pair.target.snapshot(AT)).verification is None
