"""What is special to a local store: the files themselves, and moving a namespace."""

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.errors import UsageError
from datastore import changes
from datastore.errors import LockedError, StoreError
from datastore.manifest import Manifest
from datastore.names import Group, Namespace
from datastore.store import Datastore
from repository.local import LocalRepository
from tests.support.snapshots import read_image, write_snapshot

GROUP = Group.parse("vm/100")
IMAGE = os.urandom(100_000)
FILES = {"disk.img.fidx": IMAGE, "vm.conf.blob": b"x"}
A, B = Namespace.parse("a"), Namespace.parse("b")


@pytest.fixture
async def repo(store_folder: Path) -> AsyncIterator[LocalRepository]:
    store = await Datastore.open(store_folder)
    yield LocalRepository(store, "test")
    store.close()


async def test_files_lie_where_pbs_has_them_and_with_its_modes(repo: LocalRepository) -> None:
    snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
    await repo.set_protected(snapshot, protected=True)
    await repo.set_notes(GROUP, "line\n")
    await repo.set_owner(GROUP, "b@pbs")
    folder = repo.store.base / snapshot.path
    expected = {folder / ".protected": b"", folder.parent / "notes": b"line\n", folder.parent / "owner": b"b@pbs\n"}
    for path, content in expected.items():
        assert path.read_bytes() == content
        assert path.stat().st_mode & 0o7777 == 0o644
    assert not list((repo.store.base / "vm").rglob("*tmp*"))


async def test_a_failed_update_leaves_the_old_manifest(repo: LocalRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
    before = repo.store.read_manifest(snapshot)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(StoreError, match="No space left"):
            await repo.set_notes(snapshot, "x")
    assert repo.store.read_manifest(snapshot) == before
    assert not list((repo.store.base / "vm").rglob("*tmp*"))
    manifest = await changes.update_manifest(repo.store, snapshot, {"verify_state": {"state": "ok", "upid": "U"}})
    assert manifest.verify_state == {"state": "ok", "upid": "U"}
    assert Manifest.parse(repo.store.read_manifest(snapshot), where="x").unprotected == manifest.unprotected


async def test_the_manifest_lock_excludes_other_writers(repo: LocalRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = await write_snapshot(repo, GROUP, 1000, FILES)
    monkeypatch.setattr("datastore.locks.MANIFEST_WAIT_S", 0.1)
    async with repo.store.locks.manifest(snapshot):
        with pytest.raises(LockedError):
            await repo.set_notes(snapshot, "x")


async def test_a_namespace_moves_with_all_it_holds(repo: LocalRepository) -> None:
    deep = Namespace.parse("a/x/y")
    for ns, name in ((A, "vm/1"), (deep, "host/h"), (deep, "vm/2")):
        await write_snapshot(repo, Group.parse(name, ns), 1000, FILES)
    await repo.create_namespace(Namespace.parse("a/empty"))
    done = await repo.move_namespace(A, Namespace.parse("b/c"))
    assert [f"{group.ns}: {group}" for group in done.moved] == ["b/c: vm/1", "b/c/x/y: host/h", "b/c/x/y: vm/2"]
    assert done.failed == {}
    assert [str(ns) for ns in await repo.namespaces()] == ["", "b", "b/c", "b/c/empty", "b/c/x", "b/c/x/y"]
    moved = Group.parse("vm/2", Namespace.parse("b/c/x/y"))
    assert await read_image(repo, moved.at(1000), "disk.img.fidx") == IMAGE
    await write_snapshot(repo, moved, 2000, FILES)


async def test_a_group_in_use_stays_and_a_second_try_takes_it_along(repo: LocalRepository) -> None:
    first, second = Group.parse("vm/1", A), Group.parse("vm/2", A)
    snapshot = await write_snapshot(repo, first, 1000, FILES)
    await write_snapshot(repo, second, 1000, FILES)
    async with repo.reader(snapshot):
        done = await repo.move_namespace(A, B)
    assert list(done.failed) == [first]
    assert [group.id for group in done.moved] == ["2"]
    assert len(await repo.snapshots(A)) == len(await repo.snapshots(B)) == 1
    async with repo.backup(first.at(2000)):
        assert list((await repo.move_namespace(A, B)).failed) == [first]
    assert (await repo.move_namespace(A, B)).failed == {}
    assert len(await repo.snapshots(B)) == 2
    assert not repo.store.namespace_exists(A)


async def test_no_namespace_moves_during_a_garbage_collection(repo: LocalRepository) -> None:
    await write_snapshot(repo, Group.parse("vm/1", A), 1000, FILES)
    async with repo.store.chunks.exclusive(wait_s=0):
        with pytest.raises(LockedError):
            await repo.move_namespace(A, B)
    assert not repo.store.namespace_exists(B)


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        ("", "b", "the root"),
        ("a", "", "the root"),
        ("a", "a", "lies inside"),
        ("a", "a/b", "lies inside"),
        ("a/b", "a", "lies inside"),
        ("a", "1/2/3/4/5/6/7", "more than 7 levels"),
        ("a", "taken", "holds a group vm/1 already"),
    ],
)
async def test_a_move_that_cannot_be_is_refused_before_anything_moves(
    repo: LocalRepository, source: str, target: str, why: str
) -> None:
    for name in ("a", "a/b", "taken"):
        await write_snapshot(repo, Group.parse("vm/1", Namespace.parse(name)), 1000, FILES)
    before = await repo.namespaces()
    with pytest.raises(UsageError, match=why):
        await repo.move_namespace(Namespace.parse(source), Namespace.parse(target))
    assert await repo.namespaces() == before
    assert len(await repo.snapshots(A)) == 1


async def test_foreign_files_keep_a_namespace_alive(repo: LocalRepository) -> None:
    await repo.create_namespace(Namespace.parse("a/b"))
    (repo.store.base / "ns/a/vm").mkdir()
    (repo.store.base / "ns/a/README").touch()
    removal = await repo.delete_namespace(A)
    assert (removal.removed, removal.kept) == ([Namespace.parse("a/b")], [A])
    assert (repo.store.base / "ns/a/README").exists()
    (repo.store.base / "ns/a/README").unlink()
    (repo.store.base / "ns/a/vm").symlink_to("/etc")
    assert (await repo.delete_namespace(A)).kept == [A]
    shutil.rmtree(repo.store.base / "ns")


async def test_an_unreadable_gc_status_is_none(repo: LocalRepository) -> None:
    for text in ("", "{", "[1]", "\0", "[" * 100000):
        (repo.store.base / ".gc-status").write_text(text)
        assert await repo.gc_status() is None
    (repo.store.base / ".gc-status").write_text('{"disk-bytes": 5}')
    assert await repo.gc_status() == {"disk-bytes": 5}
