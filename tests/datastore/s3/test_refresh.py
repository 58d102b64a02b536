"""Stores in buckets: set up, taken over, fetched anew, compared, destroyed."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import trio

from core.errors import UsageError
from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.errors import LockedError, StoreError
from datastore.names import ROOT, Group, Namespace
from datastore.s3.errors import S3Error
from datastore.s3.keys import ChunkKey, MetaKey, StoreKeys
from datastore.s3.lifecycle import create_store, destroy_store
from datastore.s3.opening import open_store
from datastore.s3.reconcile import compare_metadata, reconcile
from datastore.s3.refresh import exchange, refresh
from datastore.store import Datastore
from repository.local import LocalRepository
from repository.verify import verify
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_stores import IMPATIENT, NAME, adopt_folder, s3_store, settings
from tests.support.snapshots import CHUNK, CODEC, read_image, write_snapshot
from tests.support.waiting import until

GROUP = Group.parse("vm/100")
IMAGE = b"".join(bytes([number]) * CHUNK for number in range(1, 6))
FILES = {"disk.img.fidx": IMAGE, "vm.conf.blob": b"name: test\n"}


@pytest.fixture(autouse=True)
def _quick_access_time_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)


def tree(base: Path) -> dict[str, bytes]:
    """The metadata of a store: files by path, folders as paths that end in a slash."""
    found: dict[str, bytes] = {}
    for folder, folders, files in os.walk(base):
        if Path(folder) == base:
            folders[:] = [name for name in folders if not name.startswith(".")]
            continue
        relative = str(Path(folder).relative_to(base))
        found[f"{relative}/"] = b""
        found |= {f"{relative}/{name}": (Path(folder) / name).read_bytes() for name in files}
    return found


async def test_a_new_cache_gets_everything_and_the_next_refresh_fetches_nothing(
    store_pool: Any, s3_emulator: S3Emulator
) -> None:
    first, second = store_pool.lend(), store_pool.lend()
    try:
        async with s3_store(first, s3_emulator.endpoint()) as store:
            repo = LocalRepository(store, "test")
            await write_snapshot(repo, GROUP, 1000, FILES)
            snapshot = await write_snapshot(repo, GROUP, 2000, FILES)
            await repo.set_protected(snapshot, protected=True)
            await repo.create_namespace(Namespace.parse("a/empty"))
            await repo.set_notes(GROUP, "a group")
            expected = tree(first)
            s3_emulator.bucket.delete(store.keys.in_use)
        adopt_folder(settings(second, s3_emulator.endpoint()), complete=False)
        async with s3_store(second, s3_emulator.endpoint()) as store:
            with pytest.raises(StoreError, match="metadata is not complete"):
                store.check_writable()
            report = await refresh(store)
            assert tree(second) == expected
            assert (report.fetched, report.linked, report.groups_changed) == (9, 0, 1)
            store.check_writable()
            repo = LocalRepository(store, "test")
            assert await read_image(repo, snapshot, "disk.img.fidx") == IMAGE
            before = len(s3_emulator.requests("GET"))
            report = await refresh(store)
            assert (report.fetched, report.linked, report.groups_changed) == (0, 9, 0)
            assert len(s3_emulator.requests("GET")) - before == 1  # the marker
            assert tree(second) == expected
    finally:
        store_pool.take_back(first)
        store_pool.take_back(second)


async def test_what_was_removed_and_changed_elsewhere_is_so_here(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        old = await write_snapshot(repo, GROUP, 1000, FILES)
        await write_snapshot(repo, GROUP, 2000, FILES)
        await write_snapshot(repo, "vm/200", 2000, FILES)
        await repo.create_namespace(Namespace.parse("gone/inner"))
        bucket = s3_emulator.bucket
        for key in list(bucket.objects):
            if f"/{old}/" in key or "/vm/200/" in key or "/ns/gone/" in key:
                bucket.delete(key)
        bucket.put(store.keys.meta("vm/100/owner"), b"other@pam\n")
        bucket.put(f"{store.keys.metadata}../../etc/passwd", b"x")
        bucket.put(store.keys.meta("ct/1/2026-01-01T00:00:00Z/root.pxar.didx"), b"x")
        progress = Progress()
        report = await refresh(store, progress)
        assert [str(info.group) for info in await repo.groups()] == ["ct/1", "vm/100"]
        assert [info.snapshot.ctime for info in await repo.snapshots(ROOT, GROUP)] == [2000]
        assert store.group_owner(GROUP) == "other@pam"
        assert await repo.namespaces() == [ROOT]
        assert report.unfinished == ["ct/1/2026-01-01T00:00:00Z"]
        assert report.strange == 1
        assert len(progress.warnings) == 2
        assert list((store_folder / ".fleece").glob("refresh*/*")) == []


@pytest.mark.parametrize(
    ("what", "planned"),
    [
        ("the listing fails", {"operation": "LIST", "status": 500, "times": 8}),
        ("an object fails", {"operation": "GET", "key": "index.json.blob", "status": 500, "times": 8}),
        ("the keys are revoked", {"operation": "GET", "key": "owner", "status": 403, "code": "AccessDenied"}),
    ],
)
async def test_a_refresh_that_fails_while_fetching_changes_nothing(
    store_folder: Path, s3_emulator: S3Emulator, what: str, planned: dict[str, Any]
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, FILES)
        for key in [key for key in s3_emulator.bucket.objects if key.endswith(("owner", ".json.blob"))]:
            s3_emulator.bucket.put(key, s3_emulator.bucket.objects[key].data + b" ")
        before = tree(store_folder)
        s3_emulator.plan(kind="answer", **planned)
        with pytest.raises(S3Error):
            await refresh(store)
        s3_emulator.faults.clear()
        assert tree(store_folder) == before
        store.check_writable()
        await write_snapshot(repo, GROUP, 2000, FILES)


@pytest.mark.parametrize("step", range(3))
async def test_a_refresh_that_dies_in_the_exchange_leaves_whole_groups_and_is_done_again(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        for number in range(3):
            await write_snapshot(repo, f"vm/{number}", 1000, FILES)
        for key in [key for key in s3_emulator.bucket.objects if key.endswith("owner")]:
            s3_emulator.bucket.put(key, b"new@pam\n")
        done = 0

        def dies(one: Path, other: Path) -> None:
            nonlocal done
            if done == step:
                raise OSError(5, "killed")
            done += 1
            exchange(one, other)

        monkeypatch.setattr("datastore.s3.refresh.exchange", dies)
        with pytest.raises(StoreError, match="killed"):
            await refresh(store)
        monkeypatch.setattr("datastore.s3.refresh.exchange", exchange)
        owners = [store.group_owner(Group.parse(f"vm/{number}")) for number in range(3)]
        assert owners == ["new@pam"] * step + ["root@pam"] * (3 - step)
        assert len(await repo.snapshots()) == 3
        with pytest.raises(StoreError, match="not complete"):
            store.check_writable()
        with pytest.raises(StoreError, match="not complete"):
            await repo.collect_garbage()
        await refresh(store)
        assert {store.group_owner(Group.parse(f"vm/{number}")) for number in range(3)} == {"new@pam"}
        store.check_writable()


async def test_nobody_writes_during_a_refresh_and_reading_goes_on(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
        fault = s3_emulator.plan("LIST", "delay", seconds=60)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refresh, store)
            await until(lambda: fault.met)
            with pytest.raises(StoreError, match="being refreshed"):
                await write_snapshot(repo, GROUP, 2000, FILES)
            with pytest.raises(LockedError, match="being refreshed already"):
                await refresh(store)
            assert await read_image(repo, snapshot, "disk.img.fidx") == IMAGE
            fault.released.set()
        await write_snapshot(repo, GROUP, 2000, FILES)


@pytest.mark.parametrize("change", ["protect", "notes", "forget", "namespace"])
async def test_a_change_that_has_begun_is_waited_for_and_not_undone(
    store_folder: Path, s3_emulator: S3Emulator, change: str
) -> None:
    """Else the refresh would put back what it had read before: a protected snapshot would be none here."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, FILES)
        snapshot = await write_snapshot(repo, GROUP, 2000, FILES)
        changes = {
            "protect": lambda: repo.set_protected(snapshot, protected=True),
            "notes": lambda: repo.set_notes(GROUP, "a group"),
            "forget": lambda: repo.forget(snapshot),
            "namespace": lambda: repo.create_namespace(Namespace.parse("a")),
        }
        held = s3_emulator.plan("POST" if change == "forget" else "PUT", "delay", seconds=60)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(changes[change])
            await until(lambda: held.met == 1)
            listings, gets = len(s3_emulator.requests("LIST")), len(s3_emulator.requests("GET"))
            nursery.start_soon(refresh, store)
            await until(lambda: len(s3_emulator.requests("GET")) > gets)  # the mark of who uses the store
            await trio.sleep(0.3)
            assert len(s3_emulator.requests("LIST")) == listings  # it has not looked yet
            held.released.set()
        keys = s3_emulator.bucket.objects
        there = {path for path in tree(store_folder) if not path.endswith("/")}
        known = {path for path in there if store.keys.meta(path) in keys}
        assert there == known
        if change == "protect":
            assert f"{snapshot.path}/.protected" in there
        elif change == "notes":
            assert f"{GROUP.path}/notes" in there
        elif change == "forget":
            assert not any(path.startswith(f"{snapshot.path}/") for path in there)
        else:
            assert (store_folder / "ns/a").is_dir()


async def test_a_change_that_was_let_in_before_a_refresh_is_refused_while_it_looks(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    """The look whether the store may be written came too early to see the refresh."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
        listing = s3_emulator.plan("LIST", "delay", seconds=60)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refresh, store)
            await until(lambda: listing.met == 1)
            puts = len(s3_emulator.requests("PUT"))
            with pytest.raises(StoreError, match="being refreshed"):
                await store.s3.meta.put(f"{snapshot.path}/.protected", [b""], replace=True)
            with pytest.raises(StoreError, match="being refreshed"):
                await store.s3.meta.delete_tree(str(snapshot.path))
            assert len(s3_emulator.requests("PUT")) == puts
            listing.released.set()
        await store.s3.meta.put(f"{snapshot.path}/.protected", [b""], replace=True)


async def test_a_running_backup_is_waited_for(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        async with repo.backup(GROUP.at(1000)):
            with pytest.raises(LockedError, match="a backup is running"):
                await refresh(store, wait_s=0)


async def test_groups_with_one_name_in_the_other_are_kept_apart(store_folder: Path, s3_emulator: S3Emulator) -> None:
    """PBS lists `vm/1` to delete it, which also means `vm/10`."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        for ns in ("", "a", "ab"):
            if ns:
                await repo.create_namespace(Namespace.parse(ns))
            for name in ("1", "10", "100"):
                await write_snapshot(repo, Group.parse(f"vm/{name}", Namespace.parse(ns)), 1000, FILES)
        keys = {key for key in s3_emulator.bucket.objects if "/.cnt/" in key}
        await repo.forget_group(Group.parse("vm/1"))
        keys = {key for key in keys if not key.startswith(f"{NAME}/.cnt/vm/1/")}
        assert {key for key in s3_emulator.bucket.objects if "/.cnt/" in key} == keys
        await repo.delete_namespace(Namespace.parse("a"), groups=True)
        keys = {key for key in keys if not key.startswith(f"{NAME}/.cnt/ns/a/")}
        assert {key for key in s3_emulator.bucket.objects if "/.cnt/" in key} == keys


async def test_creating_taking_over_and_destroying(tmpfs: Path, s3_emulator: S3Emulator) -> None:
    wanted = settings(tmpfs / "cache", s3_emulator.endpoint())
    await create_store(wanted, policy=IMPATIENT)
    marker = json.loads(s3_emulator.bucket.objects[f"{NAME}/.in-use"].data)
    assert marker["hostname"] == os.uname().nodename
    with pytest.raises(StoreError, match="cache of an S3 bucket"):
        await Datastore.open(wanted.cache)
    async with open_store(wanted, policy=IMPATIENT) as store:
        assert marker["fleece"]["instance"] == await store.uuid()
        await write_snapshot(LocalRepository(store, "test"), GROUP, 1000, FILES)
        expected = tree(wanted.cache)
    other = settings(tmpfs / "other", s3_emulator.endpoint())
    for reuse in (False, True):
        with pytest.raises(UsageError, match="it is in use by"):
            await create_store(other, policy=IMPATIENT, reuse=reuse)
    with pytest.raises(UsageError, match="holds backups of a datastore of this name"):
        await create_store(other, policy=IMPATIENT, overwrite_in_use=True)
    assert not other.cache.exists()
    await create_store(other, policy=IMPATIENT, reuse=True, overwrite_in_use=True)
    assert tree(other.cache) == expected
    with pytest.raises(StoreError, match="another installation"):
        await destroy_store(wanted, data=True, policy=IMPATIENT)
    await destroy_store(other, data=False, policy=IMPATIENT)
    assert f"{NAME}/.in-use" not in s3_emulator.bucket.objects
    await create_store(other, policy=IMPATIENT, reuse=True)
    s3_emulator.bucket.put("another-store/.in-use", b"{}")
    s3_emulator.bucket.put(f"{NAME}2/.in-use", b"{}")
    await destroy_store(other, data=True, policy=IMPATIENT)
    assert set(s3_emulator.bucket.objects) == {"another-store/.in-use", f"{NAME}2/.in-use"}
    assert not other.cache.exists()


async def test_a_creation_that_fails_leaves_nothing(tmpfs: Path, s3_emulator: S3Emulator) -> None:
    wanted = settings(tmpfs / "cache", s3_emulator.endpoint())
    s3_emulator.plan("PUT", "answer", key=".chunks", status=403, code="AccessDenied")
    with pytest.raises(S3Error):
        await create_store(wanted, policy=IMPATIENT)
    assert not wanted.cache.exists()
    assert s3_emulator.bucket.objects == {}


async def test_objects_that_went_behind_our_back_are_found_out(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, FILES)
        cached, dropped, unmarked = (CODEC.digest(bytes([number]) * CHUNK) for number in (1, 2, 3))
        await store.s3.chunks.cache.drop(dropped)
        for digest in (cached, dropped):
            s3_emulator.bucket.delete(store.keys.chunk(digest))
        Path(store.s3.chunks.path(unmarked)).unlink()
        told = await reconcile(store, dry_run=True)
        assert (told.objects, told.marked, told.repaired, told.lost) == (3, 1, [cached], [dropped])
        assert store.keys.chunk(cached) not in s3_emulator.bucket.objects
        assert Path(store.s3.chunks.path(dropped)).exists()
        assert not Path(store.s3.chunks.path(unmarked)).exists()
        progress = Progress()
        report = await reconcile(store, progress)
        assert (report.objects, report.marked, report.repaired, report.lost) == (3, 1, [cached], [dropped])
        assert store.keys.chunk(cached) in s3_emulator.bucket.objects
        assert not Path(store.s3.chunks.path(dropped)).exists()
        assert Path(store.s3.chunks.path(unmarked)).stat().st_size == 0
        assert len(progress.warnings) == 2
        again = await reconcile(store)
        assert (again.objects, again.marked, again.repaired, again.lost) == (4, 0, [], [])


@pytest.mark.parametrize("page_size", [1, 2, 3, 1000])
async def test_reconciling_does_not_depend_on_pages(
    store_folder: Path, s3_emulator: S3Emulator, page_size: int
) -> None:
    s3_emulator.bucket.page_size = page_size
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        digests = [CODEC.digest(bytes([number])) for number in range(12)]
        for number, digest in enumerate(sorted(digests)):
            if number % 3 != 1:
                s3_emulator.bucket.put(store.keys.chunk(digest), b"x")
            if number % 3 != 2:
                store.s3.chunks.files.mark(digest)
        report = await reconcile(store)
        assert (report.objects, report.marked) == (8, 4)
        assert sorted(report.lost) == sorted(digests)[1::3]


async def test_metadata_on_one_side_only_is_named_and_stored(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        await write_snapshot(repo, GROUP, 1000, FILES)
        await repo.create_namespace(Namespace.parse("a"))
        for path in ("vm/100/owner", "ns/a/.namespace"):
            s3_emulator.bucket.delete(store.keys.meta(path))
        s3_emulator.bucket.put(store.keys.meta("vm/7/owner"), b"x@pam\n")
        report = await compare_metadata(store)
        assert (report.only_here, report.only_in_bucket) == (["ns/a/.namespace", "vm/100/owner"], ["vm/7/owner"])
        assert (await compare_metadata(store, upload=True)).uploaded == 2
        assert s3_emulator.bucket.objects[store.keys.meta("vm/100/owner")].data == b"root@pam\n"
        assert (await compare_metadata(store)).only_here == []


async def test_a_bucket_that_pbs_wrote_opens_and_verifies(
    golden: Path, golden_store: Path, store_folder: Path, s3_emulator: S3Emulator
) -> None:
    keys = StoreKeys("golds3")
    bucket = s3_emulator.bucket
    with tarfile.open(golden / "s3/objects.tar") as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            bucket.put(member.name, file.read())
    sizes = {}
    for line in (golden / "s3/keys.txt").read_text().splitlines():
        name, _, number = line.rpartition(" ")
        sizes[name] = int(number)
    files = {path.name: path for path in golden_store.rglob("*") if len(path.name) == 64}
    for name, size in sizes.items():
        key = keys.parse(name)
        assert isinstance(key, ChunkKey | MetaKey) or name == keys.in_use
        if isinstance(key, ChunkKey):
            assert name == keys.chunk(key.digest)
            path = files.get(key.digest.hex())
            if path is not None:
                bucket.put(name, path.read_bytes())
        elif isinstance(key, MetaKey):
            assert name == keys.meta(key.path)
            assert len(bucket.objects[name].data) == size
    wanted = settings(store_folder, s3_emulator.endpoint(), name="golds3")
    adopt_folder(wanted, complete=False)
    async with open_store(wanted, policy=IMPATIENT) as store:
        store.s3.in_use.overridden = True  # the marker is that of the PBS
        report = await refresh(store)
        assert (report.strange, report.unfinished) == (0, [])
        repo = LocalRepository(store, "test")
        snapshots = [info.snapshot for ns in await repo.namespaces() for info in await repo.snapshots(ns)]
        assert len(snapshots) > 10
        assert Namespace.parse("a/b") in await repo.namespaces()
        # The keys of the encrypted ones were others, and so are their chunks.
        plain = [one for one in snapshots if not str(one.group).startswith(("host/enc", "host/master"))]
        results = await verify(repo, plain, ChunkCodec())
        assert [result.errors for result in results if result.errors] == []
        here = set(tree(store_folder))
        assert {f"{keys.metadata}{path}" for path in here if not path.endswith("/")} == {
            name for name in sizes if "/.cnt/" in name and not name.endswith("/.namespace")
        }


def test_an_exchange_without_the_system_call_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        @staticmethod
        def renameat2(*_: object) -> int:
            import ctypes

            ctypes.set_errno(38)
            return -1

    def check() -> None:
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
            (tmp_path / name / name).touch()
        exchange(tmp_path / "one", tmp_path / "other")
        assert [entry.name for entry in (tmp_path / "one").iterdir()] == ["other"]
        assert [entry.name for entry in (tmp_path / "other").iterdir()] == ["one"]

    check()
    for name in ("one", "other"):
        for entry in (tmp_path / name).iterdir():
            entry.unlink()
        (tmp_path / name).rmdir()
    monkeypatch.setattr("datastore.s3.refresh._LIBC", Without)
    check()
