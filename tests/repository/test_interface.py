"""The suite of the repository interface: runs over a local datastore and one in a bucket."""

import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from core.errors import FleeceError, FormatError, NotFoundError, UsageError
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.errors import ChunkNotFoundError, LockedError, ProtectedError, SnapshotNotFoundError
from datastore.manifest import Manifest, ManifestFile
from datastore.names import MANIFEST_NAME, ROOT, Group, Namespace, Snapshot
from datastore.prune import KeepOptions, Mark
from repository.interface import Repository
from repository.local import LocalRepository, open_local
from repository.restore import restore_log, restore_manifest
from tests.support.s3_stores import s3_place, s3_store
from tests.support.snapshots import CHUNK, CODEC, put_all, put_file, put_image, read_image, write_snapshot

GROUP = Group.parse("vm/100")
#: Who owns new groups.
OWNER = "root@pam"
IMAGE = os.urandom(3 * CHUNK + 100)
FILES = {"disk.img.fidx": IMAGE, "vm.conf.blob": b"name: test\n"}


@pytest.fixture(params=["local", "s3", pytest.param("rgw", marks=pytest.mark.rgw)])
async def repo(request: pytest.FixtureRequest, store_folder: Path) -> AsyncIterator[Repository]:
    if request.param != "local":
        async with s3_store(store_folder, *s3_place(request)) as store:
            yield LocalRepository(store, "test")
        return
    local = await open_local(store_folder, name="test")
    yield local
    local.close()


async def test_a_finished_snapshot_is_listed_with_its_files_and_reads_back(repo: Repository) -> None:
    snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
    (info,) = await repo.snapshots()
    assert info == await repo.snapshot(snapshot)
    assert (info.snapshot, info.finished, info.protected, info.owner) == (snapshot, True, False, OWNER)
    assert [file.filename for file in info.files] == ["disk.img.fidx", "vm.conf.blob", MANIFEST_NAME]
    async with repo.reader(snapshot) as reader:
        sizes = [len(IMAGE), len(await reader.read_blob("vm.conf.blob")), len(await reader.manifest())]
    assert [file.size for file in info.files] == sizes
    assert info.size == sum(sizes)
    assert await read_image(repo, snapshot, "disk.img.fidx") == IMAGE
    async with repo.reader(snapshot) as reader:
        raw = await reader.read_blob("vm.conf.blob")
        assert CODEC.decode_blob(raw, crypt_mode=None, where="x") == b"name: test\n"
        assert await reader.read_blob("vm.conf.blob", limit=len(raw)) == raw
        with pytest.raises(FormatError):
            await reader.read_blob("vm.conf.blob", limit=len(raw) - 1)
        with pytest.raises(SnapshotNotFoundError):
            await reader.read_blob("other.conf.blob")
        with pytest.raises(NotFoundError):
            await reader.open_index("other.img.fidx")
        assert (await reader.open_index("disk.img.fidx", size=len(IMAGE))).size == len(IMAGE)
        with pytest.raises(FormatError, match=rf"disk\.img\.fidx: wrong size \({len(IMAGE)} != 1\)"):
            await reader.open_index("disk.img.fidx", size=1)
        with pytest.raises(ChunkNotFoundError):
            await reader.read_chunk(bytes(32))


async def test_the_log_and_the_manifest_of_a_snapshot_are_restored(repo: Repository) -> None:
    snapshot, pushed = await write_snapshot(repo, GROUP, 1000, FILES), await write_snapshot(repo, GROUP, 2000, FILES)
    async with repo.reader(snapshot) as reader:
        with pytest.raises(NotFoundError, match="no log came with the backup"):
            await restore_log(reader, CODEC)
        assert json.loads(await restore_manifest(reader))["backup-time"] == 1000
    blob = CODEC.encode_blob(b"all is well\n")
    await repo.upload_log(snapshot, blob)
    await repo.upload_log(pushed, CODEC.encode_blob(bytes(blob)))  # as PBS pushes one
    for one in (snapshot, pushed):
        async with repo.reader(one) as reader:
            assert await restore_log(reader, CODEC) == b"all is well\n"


async def test_a_repository_has_a_name_and_a_lasting_identity(repo: Repository) -> None:
    assert repo.name == "test"
    assert await repo.identity() == await repo.identity() != ""


async def test_groups_come_in_the_order_of_pbs_and_count_finished_snapshots(repo: Repository) -> None:
    for group in ("vm/100", "vm/9", "ct/abc", "ct/7", "host/x"):
        await write_snapshot(repo, group, 1000, FILES)
    await write_snapshot(repo, "vm/9", 2000, FILES)
    groups = await repo.groups()
    assert [str(info.group) for info in groups] == ["ct/7", "ct/abc", "host/x", "vm/9", "vm/100"]
    assert [info.count for info in groups] == [1, 1, 1, 2, 1]
    assert str(groups[3].latest) == "vm/9/1970-01-01T00:33:20Z"
    assert await repo.latest(Group.parse("vm/9")) == Group.parse("vm/9").at(2000)
    assert await repo.latest(Group.parse("vm/8")) is None


async def test_namespaces_keep_groups_apart(repo: Repository) -> None:
    ns = Namespace.parse("a/b")
    assert await repo.create_namespace(ns)  # servers want it to be there
    await write_snapshot(repo, Group.parse("vm/1", ns), 1000, FILES)
    assert [str(found) for found in await repo.namespaces()] == ["", "a", "a/b"]
    assert [str(found) for found in await repo.namespaces(depth=1)] == ["", "a"]
    assert [str(found) for found in await repo.namespaces(Namespace.parse("a"))] == ["a", "a/b"]
    assert await repo.groups() == []
    assert [str(info.group) for info in await repo.groups(ns)] == ["vm/1"]
    with pytest.raises(SnapshotNotFoundError):
        await repo.namespaces(Namespace.parse("nowhere"))
    with pytest.raises(SnapshotNotFoundError):
        await repo.groups(Namespace.parse("nowhere"))


async def test_nothing_is_listed_before_finish_and_nothing_stays_without_it(repo: Repository) -> None:
    with pytest.raises(RuntimeError):
        async with repo.backup(GROUP.at(1000)) as session:
            await put_all(session, FILES)
            assert await repo.snapshots() == []
            raise RuntimeError("the source died")
    assert await repo.snapshots(unfinished=True) == []
    assert await repo.groups() == []


async def test_cancelled_in_the_middle_nothing_stays(repo: Repository) -> None:
    with trio.CancelScope() as scope:
        async with repo.backup(GROUP.at(1000)) as session:
            await put_all(session, FILES)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert await repo.snapshots(unfinished=True) == []
    await write_snapshot(repo, GROUP, 1000, FILES)


async def test_a_new_snapshot_must_be_newer_than_the_newest(repo: Repository) -> None:
    await write_snapshot(repo, GROUP, 1000, FILES)
    for ctime in (999, 1000):
        with pytest.raises(FleeceError, match="not after that of the newest snapshot"):
            await write_snapshot(repo, GROUP, ctime, FILES)
    assert len(await repo.snapshots()) == 1


async def test_one_backup_of_a_group_at_a_time(repo: Repository) -> None:
    async with repo.backup(GROUP.at(1000)):
        with pytest.raises(LockedError, match="group vm/100"):
            await write_snapshot(repo, GROUP, 1001, FILES)
        await write_snapshot(repo, "vm/101", 1001, FILES)


async def test_the_base_is_the_newest_finished_snapshot_and_stays_while_it_is_used(repo: Repository) -> None:
    base = await write_snapshot(repo, GROUP, 1000, FILES)
    async with repo.backup(GROUP.at(2000)) as session:
        assert session.base == base
        manifest = await session.previous_manifest()
        assert manifest is not None
        index = await session.previous_index("disk.img.fidx")
        assert index is not None
        assert (index.size, index.count) == (len(IMAGE), 4)
        assert all(session.knows(index.digest(number)) for number in range(4))
        assert await session.previous_index("other.img.fidx") is None
        with pytest.raises(LockedError):
            await repo.forget(base)
        async with repo.reader(base) as reader:
            assert await reader.manifest() == manifest
    await repo.forget(base)


async def test_only_changed_chunks_need_appending_when_the_base_is_reused(repo: Repository) -> None:
    await write_snapshot(repo, GROUP, 1000, FILES)
    changed = bytearray(IMAGE)
    changed[CHUNK : 2 * CHUNK] = b"n" * CHUNK
    new = bytes(changed[CHUNK : 2 * CHUNK])
    async with repo.backup(GROUP.at(2000)) as session:
        base = await session.previous_index("disk.img.fidx")
        assert base is not None
        digests = [base.digest(number) for number in range(4)]
        digests[1] = CODEC.digest(new)
        writer = await session.open_index("disk.img.fidx", size=len(IMAGE), chunk_size=CHUNK, reuse_csum=base.csum)
        assert not session.knows(digests[1])
        await session.put_chunk(writer, digests[1], CHUNK, CODEC.encode(new))
        assert session.knows(digests[1])
        await session.append(writer, [(CHUNK, digests[1])])
        csum = hashlib.sha256(b"".join(digests)).digest()
        await session.close_index(writer, 4, len(IMAGE), csum)
        manifest = Manifest.new(session.snapshot)
        manifest.add(ManifestFile("disk.img.fidx", CODEC.mode, len(IMAGE), csum))
        await session.put_blob(MANIFEST_NAME, manifest.encode(CODEC))
        await session.finish()
    assert await read_image(repo, GROUP.at(2000), "disk.img.fidx") == bytes(changed)
    assert await read_image(repo, GROUP.at(1000), "disk.img.fidx") == IMAGE


async def test_reuse_without_a_fitting_base_is_refused(repo: Repository) -> None:
    await write_snapshot(repo, GROUP, 1000, FILES)
    async with repo.backup(GROUP.at(2000)) as session:
        base = await session.previous_index("disk.img.fidx")
        assert base is not None
        for name, size, csum in [
            ("disk.img.fidx", len(IMAGE), bytes(32)),
            ("other.img.fidx", len(IMAGE), base.csum),
            ("disk.img.fidx", len(IMAGE) + 2 * CHUNK, base.csum),
        ]:
            with pytest.raises(FleeceError):
                await session.open_index(name, size=size, chunk_size=CHUNK, reuse_csum=csum)


async def test_dynamic_indexes_are_appended_in_order(repo: Repository) -> None:
    pieces = [b"a" * 1000, b"b" * 17, b"c" * 70000]
    digests = CODEC.digest_many(pieces)
    async with repo.backup(GROUP.at(1000)) as session:
        writer = await session.open_index("root.pxar.didx")
        for piece, digest in zip(pieces, digests, strict=True):
            await session.put_chunk(writer, digest, len(piece), CODEC.encode(piece))
        await session.append(writer, [(0, digests[0])])
        with pytest.raises(FleeceError):
            await session.append(writer, [(999, digests[1])])
        await session.append(writer, [(1000, digests[1]), (1017, digests[2])])
        entries, end = hashlib.sha256(), 0
        for piece, digest in zip(pieces, digests, strict=True):
            end += len(piece)
            entries.update(end.to_bytes(8, "little") + digest)
        await session.close_index(writer, 3, end, entries.digest())
        manifest = Manifest.new(session.snapshot)
        manifest.add(ManifestFile("root.pxar.didx", CODEC.mode, end, entries.digest()))
        await session.put_blob(MANIFEST_NAME, manifest.encode(CODEC))
        await session.finish()
    async with repo.reader(GROUP.at(1000)) as reader:
        index = await reader.open_index("root.pxar.didx")
        assert [index.span(number) for number in range(3)] == [(0, 1000), (1000, 17), (1017, 70000)]
        assert bytes(index.digests) == b"".join(digests)


async def test_what_a_session_is_told_wrongly_it_refuses(repo: Repository) -> None:
    blob = CODEC.encode(b"x" * CHUNK)
    digest = CODEC.digest(b"x" * CHUNK)
    async with repo.backup(GROUP.at(1000)) as session:
        for name, size in [("a.img.fidx", None), ("a.pxar.didx", 5), ("a.conf.blob", 5), (MANIFEST_NAME, None)]:
            with pytest.raises(UsageError):
                await session.open_index(name, size=size)
        writer = await session.open_index("a.img.fidx", size=2 * CHUNK, chunk_size=CHUNK)
        with pytest.raises(UsageError, match="there is one already"):
            await session.open_index("a.img.fidx", size=2 * CHUNK, chunk_size=CHUNK)
        with pytest.raises(UsageError, match="neither put nor is it known"):
            await session.append(writer, [(0, digest)])
        with pytest.raises(UsageError, match="a chunk has 1 byte to 16 MiB"):
            await session.put_chunk(writer, digest, 0, blob)
        with pytest.raises(UsageError, match="only the last chunk may be short"):
            await session.put_chunk(writer, digest, 2 * CHUNK, blob)
        with pytest.raises(UsageError, match="there is no open index 77"):
            await session.put_chunk(77, digest, CHUNK, blob)
        await session.put_chunk(writer, digest, CHUNK, blob)
        for offset in (1, CHUNK + 1, 2 * CHUNK, -CHUNK):
            with pytest.raises(FleeceError):
                await session.append(writer, [(offset, digest)])
        await session.append(writer, [(0, digest)])
        with pytest.raises(UsageError, match="announced are 1"):
            await session.close_index(writer, 1, CHUNK, bytes(32))
        with pytest.raises(UsageError, match=r"still being written: a\.img\.fidx"):
            await session.finish()
        await session.append(writer, [(CHUNK, digest)])
        with pytest.raises(UsageError, match="its checksum is"):
            await session.close_index(writer, 2, 2 * CHUNK, bytes(32))


async def test_an_index_with_a_gap_is_never_put_in_place(repo: Repository) -> None:
    piece = b"x" * CHUNK
    async with repo.backup(GROUP.at(1000)) as session:
        writer = await session.open_index("a.img.fidx", size=2 * CHUNK, chunk_size=CHUNK)
        digest = CODEC.digest(piece)
        await session.put_chunk(writer, digest, CHUNK, CODEC.encode(piece))
        await session.append(writer, [(CHUNK, digest)])
        with pytest.raises(FleeceError, match="1 of 2 entries were never set"):
            await session.close_index(writer, 2, 2 * CHUNK, hashlib.sha256(bytes(32) + digest).digest())


async def test_a_damaged_blob_is_refused(repo: Repository) -> None:
    good = bytes(CODEC.encode_blob(b"text"))
    async with repo.backup(GROUP.at(1000)) as session:
        for bad in (b"", good[:11], good[:-1] + b"X", b"no magic" + good[8:]):
            with pytest.raises(FormatError):
                await session.put_blob("a.conf.blob", bad)
        with pytest.raises(UsageError):
            await session.put_blob("a.img.fidx", good)
        await session.put_blob("a.conf.blob", good)
        with pytest.raises(UsageError, match="there is one already"):
            await session.put_blob("a.conf.blob", good)


async def test_a_manifest_that_lists_what_was_not_stored_is_refused(repo: Repository) -> None:
    async with repo.backup(GROUP.at(1000)) as session:
        with pytest.raises(UsageError, match="no manifest"):
            await session.finish()
        await put_file(session, "a.conf.blob", b"text")
        manifest = Manifest.new(session.snapshot)
        manifest.add(ManifestFile("a.conf.blob", CryptMode.NONE, 5, bytes(32)))
        await session.put_blob(MANIFEST_NAME, manifest.encode(CODEC))
        with pytest.raises(UsageError, match=r"a\.conf\.blob is not what was stored"):
            await session.finish()
    assert await repo.snapshots(unfinished=True) == []


async def test_forgetting_the_last_snapshot_removes_the_group(repo: Repository) -> None:
    first = await write_snapshot(repo, GROUP, 1000, FILES)
    second = await write_snapshot(repo, GROUP, 2000, FILES)
    async with repo.reader(first):
        with pytest.raises(LockedError):
            await repo.forget(first)
    await repo.forget(first)
    with pytest.raises(SnapshotNotFoundError):
        await repo.forget(first)
    assert [info.snapshot for info in await repo.snapshots()] == [second]
    await repo.forget(second)
    assert await repo.groups() == []


async def test_reading_what_is_not_there_says_so(repo: Repository) -> None:
    missing = Snapshot.parse("vm/1/2026-01-01T00:00:00Z")
    with pytest.raises(SnapshotNotFoundError, match="no such snapshot"):
        async with repo.reader(missing):
            pass
    with pytest.raises(SnapshotNotFoundError):
        await repo.snapshot(missing)
    with pytest.raises(SnapshotNotFoundError):
        await repo.forget_group(missing.group)


async def test_several_images_may_be_written_at_once(repo: Repository) -> None:
    images = {f"disk{number}.img.fidx": os.urandom(5 * CHUNK + number) for number in range(4)}
    async with repo.backup(GROUP.at(1000)) as session:
        manifest = Manifest.new(session.snapshot)

        async def one(name: str, data: bytes) -> None:
            manifest.add(await put_image(session, name, data))

        async with trio.open_nursery() as nursery:
            for name, data in images.items():
                nursery.start_soon(one, name, data)
        await session.put_blob(MANIFEST_NAME, manifest.encode(CODEC))
        await session.finish()
        with pytest.raises(UsageError, match="the session is over"):
            await session.finish()
        with pytest.raises(UsageError, match="the session is over"):
            await session.open_index("late.img.fidx", size=1)
    for name, data in images.items():
        assert await read_image(repo, GROUP.at(1000), name) == data


async def test_a_base_that_vanishes_under_the_session_fails_it(repo: Repository, store_folder: Path) -> None:
    base = await write_snapshot(repo, GROUP, 1000, FILES)
    with pytest.raises(FleeceError, match="has been removed meanwhile"):
        async with repo.backup(GROUP.at(2000)) as session:
            await put_all(session, FILES)
            (store_folder / base.path / MANIFEST_NAME).unlink()
            await session.finish()
    assert [str(info.snapshot) for info in await repo.snapshots()] == []


async def test_the_manifest_of_another_snapshot_is_refused(repo: Repository) -> None:
    async with repo.backup(GROUP.at(1000)) as session:
        other = Manifest.new(GROUP.at(1001))
        other.add(await put_file(session, "a.conf.blob", b"text"))
        await session.put_blob(MANIFEST_NAME, other.encode(CODEC))
        with pytest.raises(UsageError, match="that of another snapshot"):
            await session.finish()


async def test_prune_removes_what_no_option_covers(repo: Repository) -> None:
    snapshots = [await write_snapshot(repo, GROUP, ctime, FILES) for ctime in (1000, 2000, 3000)]
    assert await repo.set_protected(snapshots[0], protected=True)
    planned = await repo.prune(GROUP, KeepOptions(last=1), dry_run=True)
    assert [(one.snapshot, one.mark) for one in planned.decisions] == [
        (snapshots[0], Mark.PROTECTED), (snapshots[1], Mark.REMOVE), (snapshots[2], Mark.KEEP),
    ]  # fmt: skip
    assert len(await repo.snapshots()) == 3
    done = await repo.prune(GROUP, KeepOptions(last=1))
    assert done.decisions == planned.decisions
    assert done.removed == {snapshots[1]}
    assert [info.snapshot for info in await repo.snapshots()] == [snapshots[0], snapshots[2]]
    assert (await repo.prune(GROUP, KeepOptions())).removed == set()


async def test_a_protected_snapshot_is_not_removed(repo: Repository) -> None:
    snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
    assert await repo.set_protected(snapshot, protected=True)
    assert not await repo.set_protected(snapshot, protected=True)
    assert (await repo.snapshot(snapshot)).protected
    with pytest.raises(ProtectedError):
        await repo.forget(snapshot)
    assert await repo.forget_group(GROUP) == [snapshot]
    assert await repo.set_protected(snapshot, protected=False)
    assert not await repo.set_protected(snapshot, protected=False)
    assert not (await repo.snapshot(snapshot)).protected
    await repo.forget(snapshot)


async def test_protection_waits_for_nobody_who_uses_the_snapshot(repo: Repository) -> None:
    snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
    async with repo.reader(snapshot):
        with pytest.raises(LockedError):
            await repo.set_protected(snapshot, protected=True)
    assert not (await repo.snapshot(snapshot)).protected


async def test_notes_of_snapshots_and_groups_are_kept_apart(repo: Repository) -> None:
    snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
    before = await repo.snapshot(snapshot)
    await repo.set_notes(snapshot, "übrig\nzwei")
    await repo.set_notes(GROUP, "the web server")
    info = await repo.snapshot(snapshot)
    assert info.comment == "übrig\nzwei"
    assert info.files[:-1] == before.files[:-1]
    (group,) = await repo.groups()
    assert group.comment == "the web server"
    async with repo.reader(snapshot) as reader:  # notes may be written while somebody reads
        await repo.set_notes(snapshot, "new")
        manifest = Manifest.parse(await reader.manifest(), where="x")
    assert manifest.unprotected["notes"] == "new"
    await repo.set_notes(snapshot, "")
    await repo.set_notes(GROUP, "")
    assert (await repo.snapshot(snapshot)).comment == ""
    assert (await repo.groups())[0].comment == ""
    assert await read_image(repo, snapshot, "disk.img.fidx") == IMAGE
    for target in (snapshot, GROUP):
        for text in ("x" * 70000, "\ud800"):
            with pytest.raises(UsageError):
                await repo.set_notes(target, text)


async def test_notes_leave_a_signature_valid(repo: Repository) -> None:
    key = CryptKey.from_raw(bytes(range(32)))
    async with repo.backup(GROUP.at(1000)) as session:
        manifest = Manifest.new(session.snapshot)
        manifest.add(await put_file(session, "vm.conf.blob", b"x"))
        await session.put_blob(MANIFEST_NAME, manifest.encode(ChunkCodec(key, CryptMode.SIGN_ONLY)))
        await session.finish()
    await repo.set_notes(GROUP.at(1000), "signed")
    async with repo.reader(GROUP.at(1000)) as reader:
        read = Manifest.parse(await reader.manifest(), where="x", key=key)
    assert (read.notes, read.fingerprint) == ("signed", key.fingerprint)
    assert read.signature is not None


async def test_the_owner_of_a_group_changes_unless_a_backup_runs(repo: Repository) -> None:
    snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
    await repo.set_owner(GROUP, "backup@pbs!host1")
    assert (await repo.snapshot(snapshot)).owner == "backup@pbs!host1"
    async with repo.backup(GROUP.at(2000), owner="backup@pbs!host1"):
        with pytest.raises(LockedError):
            await repo.set_owner(GROUP, "root@pam")
        with pytest.raises(LockedError):
            await repo.set_notes(GROUP, "x")
    assert (await repo.groups())[0].owner == "backup@pbs!host1"


async def test_changing_what_is_not_there_says_so(repo: Repository) -> None:
    missing = Snapshot.parse("vm/1/2026-01-01T00:00:00Z")
    for change in (
        lambda: repo.set_notes(missing, "x"),
        lambda: repo.set_notes(missing.group, "x"),
        lambda: repo.set_owner(missing.group, "a@b"),
        lambda: repo.set_protected(missing, protected=True),
        lambda: repo.set_protected(missing, protected=False),
        lambda: repo.delete_namespace(Namespace.parse("a")),
        lambda: repo.move_namespace(Namespace.parse("a"), Namespace.parse("b")),
    ):
        with pytest.raises(SnapshotNotFoundError):
            await change()
    assert (await repo.groups(), await repo.namespaces()) == ([], [ROOT])


async def test_namespaces_are_made_and_removed_with_what_they_hold(repo: Repository) -> None:
    inner = Namespace.parse("a/b")
    assert await repo.create_namespace(inner)
    assert not await repo.create_namespace(Namespace.parse("a"))
    assert [str(ns) for ns in await repo.namespaces()] == ["", "a", "a/b"]
    kept = await write_snapshot(repo, Group.parse("vm/1", inner), 1000, FILES)
    await write_snapshot(repo, Group.parse("vm/2", inner), 1000, FILES)
    with pytest.raises(FleeceError, match="it holds 2 groups"):
        await repo.delete_namespace(Namespace.parse("a"))
    await repo.set_protected(kept, protected=True)
    removal = await repo.delete_namespace(Namespace.parse("a"), groups=True)
    assert (removal.protected, removal.removed, removal.kept) == ([kept], [], [inner, Namespace.parse("a")])
    assert [info.group.id for info in await repo.groups(inner)] == ["1"]
    await repo.set_protected(kept, protected=False)
    removal = await repo.delete_namespace(Namespace.parse("a"), groups=True)
    assert (removal.removed, removal.kept) == ([inner, Namespace.parse("a")], [])
    assert await repo.namespaces() == [ROOT]
    for change in (repo.create_namespace, repo.delete_namespace):
        with pytest.raises(UsageError, match="the root"):
            await change(ROOT)


async def test_the_space_of_a_repository_can_be_asked(repo: Repository) -> None:
    usage = await repo.usage()
    if usage.total:
        assert 0 < usage.available <= usage.total
        assert usage.used <= usage.total
    else:  # a bucket has no size
        assert (usage.used, usage.available) == (0, 0)
    assert await repo.gc_status() is None
