import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import trio

from core.errors import SourceError, UsageError
from datastore import pbs
from datastore import session as session_module
from datastore.errors import LockedError, OwnerError, ProtectedError, SnapshotNotFoundError, StoreError
from datastore.files import Owner, SyncLevel, make_folder, remove_tree
from datastore.interface import PutResult
from datastore.local_meta import LocalMetaStore
from datastore.names import Group, Namespace, Snapshot
from datastore.session import open_session
from datastore.store import Datastore, SnapshotEntry
from repository.local import open_local
from tests.support.snapshots import put_all, read_image, write_snapshot
from tests.support.stores import chunk_files

FILES = {"disk.img.fidx": b"x" * 1000}


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


async def test_a_new_store_has_the_layout_owner_and_modes_of_pbs(tmpfs: Path) -> None:
    base = tmpfs / "new" / "store"
    umask = os.umask(0o077)
    try:
        store = await Datastore.create(base)
        store.close()
    finally:
        os.umask(umask)
    assert (mode(base), mode(base / ".chunks"), mode(base / ".lock")) == ("0o755", "0o750", "0o644")
    names = sorted(entry.name for entry in (base / ".chunks").iterdir())
    assert names == [f"{number:04x}" for number in range(1 << 16)]
    assert {mode(entry) for entry in (base / ".chunks").iterdir()} == {"0o750"}
    zero = "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8"
    assert (base / ".chunks" / "bb9f" / zero).is_file()
    if os.geteuid() == 0:
        owned = (base, base / ".lock", base / ".chunks", base / ".chunks/0000", base / ".chunks/bb9f" / zero)
        assert {(path.stat().st_uid, path.stat().st_gid) for path in owned} == {(34, 34)}


async def test_a_store_is_not_made_where_something_is(tmpfs: Path, store_folder: Path) -> None:
    (tmpfs / "full").mkdir()
    (tmpfs / "full" / "file").touch()
    (tmpfs / "file").touch()
    for path, why in [
        (tmpfs / "full", "the folder is not empty: file"),
        (tmpfs / "file", "it is no folder"),
        (store_folder, "it is a datastore already"),
        (store_folder / "inner", "it lies inside the datastore"),
    ]:
        with pytest.raises(UsageError, match=why):
            await Datastore.create(path)
    assert sorted(entry.name for entry in tmpfs.iterdir()) == ["file", "full"]


async def test_who_comes_second_leaves_the_new_store_alone(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have found the folder empty; the first one is ready when the second one begins."""
    base = tmpfs / "store"
    real = make_folder
    made: list[bool] = []

    def late(path: Path, owner: Owner, mode: int) -> bool:
        if not made:
            made.append(real(path, owner, mode))
        return real(path, owner, mode)

    monkeypatch.setattr("datastore.creation.make_folder", late)
    with pytest.raises(UsageError, match="it is a datastore already"):
        await Datastore.create(base)
    assert made == [True]
    assert (base / ".chunks").is_dir()


async def test_an_interrupted_creation_is_named(tmpfs: Path) -> None:
    (tmpfs / ".chunks" / "0000").mkdir(parents=True)
    with pytest.raises(UsageError, match="an earlier creation was interrupted there"):
        await Datastore.create(tmpfs)


async def test_a_failed_creation_leaves_nothing(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.local_chunks.touch", lambda path: None)
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0)
    with pytest.raises(StoreError, match="does not change its access time"):
        await Datastore.create(tmpfs / "a" / "store")
    assert list(tmpfs.iterdir()) == []


async def test_a_failed_creation_leaves_what_was_there_before(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmpfs / ".lock").write_bytes(b"theirs")
    (tmpfs / ".fleece").mkdir()
    (tmpfs / ".fleece" / "uuid").write_text("theirs")
    monkeypatch.setattr("datastore.local_chunks.touch", lambda path: None)
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0)
    with pytest.raises(StoreError, match="does not change its access time"):
        await Datastore.create(tmpfs)
    assert sorted(path.name for path in tmpfs.iterdir()) == [".fleece", ".lock"]
    assert (tmpfs / ".lock").read_bytes() == b"theirs"
    assert (tmpfs / ".fleece" / "uuid").read_text() == "theirs"


@pytest.mark.parametrize("what", ["missing", "file", "empty folder", "no lock", "foreign layout"])
async def test_what_is_no_store_is_not_opened(tmpfs: Path, what: str) -> None:
    path = tmpfs / "store"
    if what == "file":
        path.touch()
    elif what != "missing":
        path.mkdir()
    if what in ("no lock", "foreign layout"):
        (path / ".chunks").mkdir()
    if what == "foreign layout":
        (path / ".lock").touch()
        (path / ".chunks" / "00").mkdir()
    reasons = {
        "missing": "there is no such folder",
        "file": "it is no folder",
        "foreign layout": "its layout is foreign: .*0000 is missing",
    }
    with pytest.raises(StoreError, match=reasons.get(what, "the folder is no datastore")):
        await Datastore.open(path)


async def test_foreign_names_are_passed_over_in_listings(store_folder: Path) -> None:
    repo = await open_local(store_folder)
    snapshot = await write_snapshot(repo, "vm/100", 1000, FILES)
    for name in (
        "vm/-bad",
        "vm/100/2026-13-01T00:00:00Z",
        "vm/100/2026-01-01T24:00:00Z",
        "vm/100/notatime",
        "xx/1",
        "ns/-x",
    ):
        (store_folder / name).mkdir(parents=True)
    (store_folder / "vm" / "101").symlink_to(store_folder / "vm" / "100")
    (store_folder / "vm" / "102").touch()
    assert [str(info.group) for info in await repo.groups()] == ["vm/100"]
    assert [info.snapshot for info in await repo.snapshots(unfinished=True)] == [snapshot]
    assert len(await repo.namespaces()) == 1
    repo.close()


async def test_an_unreadable_manifest_does_not_hide_its_snapshot(store_folder: Path) -> None:
    repo = await open_local(store_folder)
    snapshot = await write_snapshot(repo, "vm/100", 1000, FILES)
    (store_folder / snapshot.path / "index.json.blob").write_bytes(b"nonsense")
    (info,) = await repo.snapshots()
    assert info.finished
    assert [(file.filename, file.size) for file in info.files] == [("index.json.blob", 8), ("disk.img.fidx", None)]
    # It is no base either, so the next backup is a full one.
    async with repo.backup(Group.parse("vm/100").at(2000)) as session:
        assert session.base is None
    repo.close()


async def test_protected_snapshots_stay(store_folder: Path) -> None:
    repo = await open_local(store_folder)
    first = await write_snapshot(repo, "vm/100", 1000, FILES)
    await write_snapshot(repo, "vm/100", 2000, FILES)
    (store_folder / first.path / ".protected").touch()
    with pytest.raises(ProtectedError, match="it is protected"):
        await repo.forget(first)
    assert await repo.forget_group(first.group) == [first]
    assert [info.snapshot for info in await repo.snapshots()] == [first]
    assert (await repo.snapshot(first)).protected
    repo.close()


async def test_a_group_that_is_being_written_is_not_removed(store_folder: Path) -> None:
    repo = await open_local(store_folder)
    snapshots = [await write_snapshot(repo, "vm/100", ctime, FILES) for ctime in (1000, 2000)]
    async with repo.backup(Group.parse("vm/100").at(3000)):
        with pytest.raises(LockedError):
            await repo.forget_group(Group.parse("vm/100"))
    assert [info.snapshot for info in await repo.snapshots()] == snapshots
    assert await repo.forget_group(Group.parse("vm/100")) == []
    assert not (store_folder / "vm" / "100").exists()
    with pytest.raises(SnapshotNotFoundError, match="there is no such group"):
        await repo.forget_group(Group.parse("vm/100"))
    repo.close()


async def test_a_listing_passes_over_what_is_removed_meanwhile(
    store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = await open_local(store_folder)
    snapshots = [await write_snapshot(repo, "vm/100", ctime, FILES) for ctime in (1000, 2000)]
    real = repo.store.entry

    def racing(snapshot: Snapshot) -> SnapshotEntry:
        if snapshot == snapshots[0]:
            shutil.rmtree(store_folder / snapshot.path)
        return real(snapshot)

    monkeypatch.setattr(repo.store, "entry", racing)
    assert [info.snapshot for info in await repo.snapshots()] == snapshots[1:]
    repo.close()


async def test_what_a_killed_backup_left_is_removed_by_the_next_one(store_folder: Path) -> None:
    repo = await open_local(store_folder)
    left = store_folder / "vm/100/2020-01-01T00:00:00Z"
    left.mkdir(parents=True)
    (left / "disk.img.tmp_fidx").write_bytes(b"half")
    busy = Snapshot.parse("vm/100/2020-01-02T00:00:00Z")
    (store_folder / busy.path).mkdir()
    async with repo.store.locks.snapshot(busy, shared=False):
        await write_snapshot(repo, "vm/100", 1 << 31, FILES)
    assert not left.exists()
    assert (store_folder / busy.path).exists()  # somebody else writes that one
    repo.close()


async def test_a_chunk_that_replaces_another_is_written_in_the_snapshots_folder(
    store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed backup leaves of it then goes with the unfinished snapshot."""
    from datastore.codec import ChunkCodec

    data, codec = b"fleece" * 1000, ChunkCodec()
    repo = await open_local(store_folder)
    digest, snapshot = codec.digest(data), Group.parse("vm/100").at(1000)
    await repo.store.chunks.insert(digest, codec.encode(data, compress=False))
    real, sources = os.rename, []

    def noting(source: Path, target: Path) -> None:
        sources.append(source.parent)
        real(source, target)

    monkeypatch.setattr(os, "rename", noting)
    async with repo.backup(snapshot) as session:
        writer = await session.open_index("disk.img.fidx", size=len(data))
        small = codec.encode(data)
        assert await session.put_chunk(writer, digest, len(data), small) == PutResult(False, len(small))
    assert sources == [store_folder / snapshot.path]
    repo.close()


async def test_a_backup_is_told_of_what_could_not_be_written_since_it_began(
    store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells a descriptor of errors since it was opened; one opened at the end only of what nobody knows."""
    synced: list[int | Path] = []
    monkeypatch.setattr("datastore.local_meta.sync_filesystem", synced.append)
    repo = await open_local(store_folder)
    async with repo.backup(Group.parse("vm/100").at(1000)) as session:
        before = {fd for fd in map(int, os.listdir("/proc/self/fd")) if fd_path(fd) == store_folder}  # noqa: PTH208
        await put_all(session, FILES)
        await session.finish()
    assert len(synced) == 1
    assert synced[0] in before
    assert not any(fd_path(fd) == store_folder for fd in before), "it is closed at the end"
    repo.close()


def fd_path(fd: int) -> Path | None:
    try:
        return Path(f"/proc/self/fd/{fd}").readlink()
    except OSError:
        return None


async def test_folders_that_vanish_under_a_backup_are_a_clear_error(store_folder: Path) -> None:
    from datastore.codec import ChunkCodec

    repo = await open_local(store_folder)
    for gone in ("vm", ".chunks/c4df"):
        with pytest.raises(StoreError, match=r"No such file or directory|its folder is missing"):
            async with repo.backup(Group.parse("vm/100").at(1000)) as session:
                writer = await session.open_index("disk.img.fidx", size=6)
                shutil.rmtree(store_folder / gone)
                blob = ChunkCodec().encode(b"fleece")
                await session.put_chunk(writer, ChunkCodec().digest(b"fleece"), 6, blob)
                await session.put_blob("vm.conf.blob", blob)
    repo.close()


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written cannot be removed."""

    async def refused(self: LocalMetaStore, path: str) -> None:
        raise StoreError("remove", path, "Input/output error")

    monkeypatch.setattr(LocalMetaStore, "delete_tree", refused)


@pytest.mark.usefixtures("stuck")
async def test_the_first_error_of_a_backup_is_told_although_its_removal_fails_too(store_folder: Path) -> None:
    store = await Datastore.open(store_folder)
    snapshot = Group.parse("vm/100").at(1000)
    with pytest.raises(SourceError, match="cannot read disk: broken") as caught:
        async with open_session(store, snapshot):
            raise SourceError("read", "disk", "broken")
    (note,) = caught.value.__notes__
    assert f"what was written of {snapshot} could not be removed: " in note
    assert "Input/output error" in note
    store.close()


@pytest.mark.usefixtures("stuck")
@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_cannot_be_removed_is_the_error_where_there_is_no_other(cancelled: bool, store_folder: Path) -> None:
    store = await Datastore.open(store_folder)
    snapshot = Group.parse("vm/100").at(1000)
    told = pytest.raises(StoreError, match=f"cannot remove what was written of {snapshot}: .*Input/output error")
    with told, trio.CancelScope() as scope:
        async with open_session(store, snapshot):
            if cancelled:
                scope.cancel()
                await trio.sleep_forever()
    store.close()


async def test_a_removal_that_hangs_is_given_up(store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hanging(self: Datastore, group: Group) -> bool:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(Datastore, "remove_empty_group", hanging)
    monkeypatch.setattr(session_module, "_ABORT_TIMEOUT_S", 0.2)
    store = await Datastore.open(store_folder)
    with pytest.raises(SourceError) as caught:
        async with open_session(store, Group.parse("vm/100").at(1000)):
            raise SourceError("read", "disk", "broken")
    assert "not done within 0.2 s" in caught.value.__notes__[0]
    store.close()


async def test_a_snapshot_with_a_failed_verification_is_no_base(store_folder: Path) -> None:
    from datastore.codec import ChunkCodec
    from datastore.manifest import Manifest

    repo = await open_local(store_folder)
    snapshot = await write_snapshot(repo, "vm/100", 1000, FILES)
    path = store_folder / snapshot.path / "index.json.blob"
    manifest = Manifest.parse(path.read_bytes(), where="x")
    for state, base in [("ok", snapshot), ("failed", None)]:
        upid = "UPID:pbs:00000001:00000002:00000003:00000004:verify:x:root@pam:"
        changed = manifest.with_unprotected({"verify_state": {"state": state, "upid": upid}})
        path.write_bytes(bytes(changed.encode(ChunkCodec())))
        async with repo.backup(snapshot.group.at(2000)) as session:
            assert session.base == base
        assert ((await repo.snapshot(snapshot)).verification or {})["state"] == state
    repo.close()


async def test_groups_keep_their_owner(store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await Datastore.open(store_folder)
    group = Group.parse("vm/100")
    async with open_session(store, group.at(1000), owner="joe@pbs"):
        assert store.group_owner(group) == "joe@pbs"
        assert (store_folder / "vm/100/owner").read_bytes() == b"joe@pbs\n"
        assert mode(store_folder / "vm/100/owner") == "0o644"
    assert store.group_owner(group) is None  # nothing was written, so the new group went again
    repo = await open_local(store_folder)
    async with repo.backup(group.at(1000), owner="joe@pbs!tok") as session:
        from tests.support.snapshots import put_all

        await put_all(session, FILES)
        await session.finish()
    quiet = ("joe@pbs!tok", "joe@pbs", None)
    for owner in (*quiet, "ann@pbs", "joe@pbs!t"):
        async with open_session(store, group.at(2000), owner=owner) as session:
            assert bool(session.warnings) == (owner not in quiet)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(OwnerError, match=r"it belongs to joe@pbs!tok, not to ann@pbs"):
        async with open_session(store, group.at(2000), owner="ann@pbs"):
            pass
    store.close()
    repo.close()


async def test_everything_belongs_to_the_owner_of_the_store(store_folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(store_folder, 1234, 2345)
    repo = await open_local(store_folder)
    await write_snapshot(repo, Group.parse("vm/100", Namespace.parse("a")), 1000, FILES)
    owners = {(path.lstat().st_uid, path.lstat().st_gid) for path in (store_folder / "ns").rglob("*")}
    owners |= {(path.lstat().st_uid, path.lstat().st_gid) for path in (store_folder / ".fleece").rglob("*")}
    owners |= {(path.lstat().st_uid, path.lstat().st_gid) for path in chunk_files(store_folder)}
    assert owners == {(1234, 2345)}
    repo.close()


async def test_a_link_in_the_store_leads_no_write_out_of_it(store_folder: Path, tmp_path: Path) -> None:
    repo = await open_local(store_folder)
    (store_folder / "vm").mkdir()
    (store_folder / "vm" / "100").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="something that is no folder is in its place"):
        await write_snapshot(repo, "vm/100", 1000, FILES)
    assert list(tmp_path.iterdir()) == []
    repo.close()


def test_a_link_put_in_the_place_of_a_new_folder_is_not_followed(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(0o700)
    real = Path.mkdir

    def mkdir_and_swap(path: Path, mode: int) -> None:
        real(path, mode)
        path.rmdir()
        path.symlink_to(victim)

    monkeypatch.setattr(Path, "mkdir", mkdir_and_swap)
    with pytest.raises(OSError):
        make_folder(store_folder / "vm", Owner.of(store_folder))
    assert mode(victim) == "0o700"


async def test_a_store_is_destroyed_with_all_backups_but_not_under_a_writer(tmpfs: Path, store_folder: Path) -> None:
    base = tmpfs / "store"
    shutil.copytree(store_folder, base)
    (base / "foreign").touch()
    repo = await open_local(base)
    await write_snapshot(repo, "vm/100", 1000, FILES)
    async with repo.backup(Group.parse("vm/101").at(1)):
        with pytest.raises(LockedError, match="a backup is running"):
            await Datastore.destroy(base)
    repo.close()
    await Datastore.destroy(base)
    assert [entry.name for entry in base.iterdir()] == ["foreign"]


async def test_a_store_on_a_mount_point_is_destroyed_but_for_its_folder(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmpfs / "store"
    base.mkdir()
    for name in (".chunks/0000", ".chunks/7fff", ".chunks/ffff"):
        (base / name).mkdir(parents=True)
    (base / ".lock").touch()
    real = Path.rmdir

    def busy(path: Path) -> None:
        if path == base:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        real(path)

    monkeypatch.setattr(Path, "rmdir", busy)
    await Datastore.destroy(base)
    assert list(base.iterdir()) == []


def test_a_tree_goes_even_if_somebody_else_removes_parts_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / "tree" / name).mkdir(parents=True)
    real, calls = os.rmdir, []

    def racing(path: str, **rest: int) -> None:
        calls.append(path)
        real(path, **rest)
        if len(calls) == 1:
            raise FileNotFoundError(path)  # as if it had been gone

    monkeypatch.setattr(os, "rmdir", racing)
    remove_tree(tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []


async def test_reading_works_on_a_store_that_cannot_be_written(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Stands for a read-only mount, which not everybody may make: every new file is refused with EROFS."""
    repo = await open_local(store_folder)
    snapshot = await write_snapshot(repo, "vm/100", 1000, FILES)
    shutil.rmtree(store_folder / ".fleece")
    real_open, real_mkdir = os.open, os.mkdir

    def read_only_open(path: "str | os.PathLike[str]", flags: int, mode: int = 0o777, **rest: int) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(store_folder)):
            raise OSError(30, os.strerror(30))
        return real_open(path, flags, mode, **rest)

    def read_only_mkdir(path: "str | os.PathLike[str]", *rest: int, **more: int) -> None:
        if str(path).startswith(str(store_folder)):
            raise OSError(30, os.strerror(30))
        real_mkdir(path, *rest, **more)

    monkeypatch.setattr(os, "open", read_only_open)
    monkeypatch.setattr(os, "mkdir", read_only_mkdir)
    caplog.set_level("INFO")
    assert await read_image(repo, snapshot, "disk.img.fidx") == FILES["disk.img.fidx"]
    assert "the file system is read-only" in caplog.text
    with pytest.raises(StoreError, match="Read-only file system"):
        await write_snapshot(repo, "vm/100", 2000, FILES)
    repo.close()


async def test_listing_what_is_not_there(store_folder: Path) -> None:
    store = await Datastore.open(store_folder)
    with pytest.raises(SnapshotNotFoundError):
        store.groups(Namespace.parse("x"))
    with pytest.raises(SnapshotNotFoundError):
        store.entry(Snapshot.parse("vm/1/2020-01-01T00:00:00Z"))
    assert store.snapshots(Group.parse("vm/1")) == []
    store.close()


# A store that this host's PBS knows as well.


@pytest.fixture
def known_to_pbs(store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store stands in a datastore.cfg; returns that file. Locks and configuration lie in a temporary folder."""
    config = tmp_path / "datastore.cfg"
    config.write_text(f"datastore: other\n\tpath /nowhere\n\ndatastore: tank\n\tcomment mine\n\tpath {store_folder}\n")
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr("datastore.store.LOCKS", tmp_path / "locks")
    monkeypatch.setattr("datastore.store.OLD_LOCKING", tmp_path / "old-locking")
    monkeypatch.setattr("datastore.store.find_store", lambda base: pbs.find_store(base, config))
    return config


async def test_locks_are_taken_where_pbs_looks_for_them_too(known_to_pbs: Path, store_folder: Path) -> None:
    import fcntl

    repo = await open_local(store_folder)
    snapshot = Snapshot.parse("vm/100/2026-01-01T00:00:00Z")
    locks = known_to_pbs.parent / "locks" / "tank"
    async with repo.backup(snapshot):
        for name in ("vm-100", r"vm-100-2026\x2d01\x2d01T00\x3a00\x3a00Z"):
            with (locks / name).open("r+") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (locks / "vm-100").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(LockedError):
            async with repo.backup(snapshot):
                pass
    repo.close()


async def test_a_lock_of_ours_may_be_the_first_since_pbs_was_started(known_to_pbs: Path, store_folder: Path) -> None:
    import fcntl

    locks = known_to_pbs.parent / "locks"
    locks.rmdir()
    repo = await open_local(store_folder)
    async with repo.backup(Snapshot.parse("vm/100/2026-01-01T00:00:00Z")):
        with (locks / "tank" / "vm-100").open("r+") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    repo.close()


async def test_what_pbs_is_told_while_a_store_is_open_counts(known_to_pbs: Path, store_folder: Path) -> None:
    repo = await open_local(store_folder)
    known = known_to_pbs.read_text()
    known_to_pbs.write_text(known + "\tmaintenance-mode offline\n")
    with pytest.raises(StoreError, match="PBS has it in maintenance mode 'offline'"):
        await write_snapshot(repo, "vm/1", 1000, FILES)
    known_to_pbs.write_text(known)
    snapshot = await write_snapshot(repo, "vm/1", 1000, FILES)
    known_to_pbs.write_text(known + "\tmaintenance-mode offline\n")
    with pytest.raises(StoreError, match="PBS has it in maintenance mode 'offline'"):
        await read_image(repo, snapshot, "disk.img.fidx")
    repo.close()


@pytest.mark.parametrize(
    ("mode_line", "reads", "writes"),
    [
        ("", True, True),
        ("\tmaintenance-mode read-only,message=later\n", True, False),
        ("\tmaintenance-mode type=read-only\n", True, False),
        ("\tmaintenance-mode offline\n", False, False),
        ("\tmaintenance-mode type=delete\n", False, False),
        ("\tmaintenance-mode s3-refresh\n", False, False),
    ],
)
async def test_a_maintenance_mode_of_pbs_is_respected(
    known_to_pbs: Path, store_folder: Path, mode_line: str, reads: bool, writes: bool
) -> None:
    known_to_pbs.write_text(known_to_pbs.read_text() + mode_line)
    if not reads:
        with pytest.raises(StoreError, match="PBS has it in maintenance mode"):
            await open_local(store_folder)
        return
    repo = await open_local(store_folder)
    if writes:
        await write_snapshot(repo, "vm/1", 1000, FILES)
    else:
        with pytest.raises(StoreError, match="PBS has it in maintenance mode 'read-only'"):
            await write_snapshot(repo, "vm/1", 1000, FILES)
    repo.close()


async def test_the_cache_of_a_bucket_of_pbs_is_not_taken_for_a_local_store(
    known_to_pbs: Path, store_folder: Path
) -> None:
    with known_to_pbs.open("a") as file:
        file.write("\tbackend bucket=b,client=c,type=s3\n")
    with pytest.raises(StoreError, match="it is PBS's cache of an S3 bucket"):
        await Datastore.open(store_folder)


async def test_the_old_way_of_locking_is_refused(known_to_pbs: Path, store_folder: Path) -> None:
    (known_to_pbs.parent / "old-locking").touch()
    repo = await open_local(store_folder)
    with pytest.raises(StoreError, match="still uses its old way of locking; reboot"):
        await write_snapshot(repo, "vm/1", 1000, FILES)
    repo.close()


def test_a_host_without_pbs_has_no_stores_of_it(tmp_path: Path) -> None:
    assert pbs.read_config(tmp_path / "none.cfg") == []
    (tmp_path / "x.cfg").write_bytes(b"\xff\xfe\nnonsense\n path /x\ndatastore: a\n  comment no path\n")
    assert pbs.read_config(tmp_path / "x.cfg") == []


async def test_two_writers_of_different_groups_run_side_by_side(store_folder: Path) -> None:
    repos = [await open_local(store_folder) for _ in range(2)]
    async with trio.open_nursery() as nursery:
        for number, repo in enumerate(repos):
            nursery.start_soon(write_snapshot, repo, f"vm/{number}", 1000, {"disk.img.fidx": os.urandom(300_000)})
    assert len(await repos[0].snapshots()) == 2
    for repo in repos:
        repo.close()


async def test_level_none_says_that_it_promises_nothing(store_folder: Path) -> None:
    for level, warned in [(SyncLevel.NONE, True), (SyncLevel.FILE, False), (SyncLevel.FILESYSTEM, False)]:
        repo = await open_local(store_folder, sync_level=level)
        async with repo.backup(Group.parse("vm/1").at(1000)) as session:
            assert any("a power cut may leave" in warning for warning in session.warnings) == warned
        repo.close()


async def test_an_unfinished_snapshot_is_forgotten_only_while_nobody_writes_its_group(store_folder: Path) -> None:
    repo = await open_local(store_folder)
    left = Snapshot.parse("vm/1/2020-01-01T00:00:00Z")
    (store_folder / left.path).mkdir(parents=True)
    async with repo.store.locks.group(left.group):
        with pytest.raises(LockedError):
            await repo.forget(left)
    assert (store_folder / left.path).exists()
    await repo.forget(left)
    assert not (store_folder / "vm/1").exists()
    repo.close()


async def test_an_unreadable_owner_does_not_spoil_the_listing(store_folder: Path) -> None:
    repo = await open_local(store_folder)
    snapshot = await write_snapshot(repo, "vm/1", 1000, FILES)
    owner = store_folder / "vm/1/owner"
    owner.unlink()
    owner.symlink_to("/etc/shadow")
    assert (await repo.snapshot(snapshot)).owner is None
    assert [info.owner for info in await repo.groups()] == [None]
    with pytest.raises(StoreError):
        await write_snapshot(repo, "vm/1", 2000, FILES)
    repo.close()


async def test_level_file_leaves_foreign_files_above_the_group_alone(
    store_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("datastore.local_meta.sync_path", synced.append)
    (store_folder / "foreign").touch()
    repo = await open_local(store_folder, sync_level=SyncLevel.FILE)
    snapshot = await write_snapshot(repo, "vm/1", 1000, FILES)
    folder = store_folder / snapshot.path
    assert [folder / "disk.img.fidx", folder, folder.parent / "owner", folder.parent] == synced[:4]
    assert [store_folder / "vm", store_folder] == synced[4:]
    repo.close()
