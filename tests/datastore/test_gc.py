"""Garbage collection: what goes, what stays, what is counted, and when it refuses."""

import json
import os
import random
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from core.errors import UsageError
from core.progress import Progress
from datastore import gc, locks
from datastore.codec import ChunkCodec
from datastore.errors import LockedError, StoreError
from datastore.gc import DEFAULT_CUTOFF_S, GcReport, collect_garbage
from datastore.gc_indexes import list_indexes, read_indexes
from datastore.gc_status import GcStatus, read_status
from datastore.marked import MarkedDigests
from datastore.names import Snapshot
from datastore.upid import Upid
from repository.local import LocalRepository, open_local
from tests.support.golden_store import unpack_golden_store
from tests.support.snapshots import CHUNK, write_snapshot
from tests.support.stores import chunk_files

CODEC = ChunkCodec()
DAY = 86_400
ZERO = CODEC.zero_digest(4 << 20)


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The access-time test waits a hundredth of its second: enough for a file system in memory."""
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)


@pytest.fixture
async def repo(store_folder: Path) -> AsyncIterator[LocalRepository]:
    local = await open_local(store_folder)
    yield local
    local.close()


def image(seed: object, chunks: int = 3) -> bytes:
    return random.Random(str(seed)).randbytes(chunks * CHUNK)


def chunk_path(base: Path, digest: bytes) -> Path:
    return base / ".chunks" / digest.hex()[:4] / digest.hex()


def age(base: Path, seconds: float, *digests: bytes) -> None:
    """Set the last use of chunks (default: all there are) back: the virtual clock of these tests."""
    paths = [chunk_path(base, digest) for digest in digests] or chunk_files(base)
    for path in paths:
        found = path.lstat()
        os.utime(path, (time.time() - seconds, found.st_mtime), follow_symlinks=False)


def chunks(base: Path) -> set[str]:
    return {path.name for path in chunk_files(base)}


async def write(repo: LocalRepository, ctime: int, data: bytes, group: str = "vm/100") -> Snapshot:
    return await write_snapshot(repo, group, ctime, {"disk.img.fidx": data})


def digests_of(data: bytes) -> list[bytes]:
    return [CODEC.digest(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]


class Heard(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


async def test_what_snapshots_use_stays_and_the_rest_goes_after_a_day(repo: LocalRepository) -> None:
    base = repo.store.base
    kept, gone = image("kept"), image("gone")
    await write(repo, 1000, kept)
    old = await write(repo, 2000, gone, "vm/200")
    await repo.forget(old)
    age(base, DEFAULT_CUTOFF_S - 60)
    report = await collect_garbage(repo.store)
    assert (report.status.pending_chunks, report.status.removed_chunks) == (3, 0)
    age(base, DEFAULT_CUTOFF_S + 60)
    report = await collect_garbage(repo.store)
    assert (report.status.pending_chunks, report.status.removed_chunks) == (0, 3)
    assert chunks(base) == {digest.hex() for digest in [*digests_of(kept), ZERO]}


async def test_every_counter_agrees_with_a_computed_model(repo: LocalRepository) -> None:
    """Against files laid out by a dice, a model of the rules in ten lines."""
    base = repo.store.base
    dice = random.Random(7)
    snapshots = [
        await write(repo, 1000 + number, image(number % 3, 2 + number % 4), f"vm/{number}") for number in range(6)
    ]
    used = {digest.hex() for number in range(6) for digest in digests_of(image(number % 3, 2 + number % 4))}
    now = time.time()
    ages = {"old": 2 * DAY, "young": DAY // 2, "fresh": -1}
    expected = GcStatus()
    for number in range(60):
        name = dice.randbytes(32).hex()
        ending = dice.choice(["", "", ".0.bad", ".9.bad", ".other", ".using", ".tmp_Ab12Cd"])
        name = name.upper() if number % 7 == 0 else name
        path = base / ".chunks" / dice.choice([name[:4].lower(), "0123"]) / (name + ending)
        size = dice.randrange(1, 5000)
        path.write_bytes(bytes(size))
        kind = dice.choice(list(ages))
        os.utime(path, (now - ages[kind], now))
        if len(path.name) not in (64, 70) or ending == ".using":
            continue
        bad = ending.endswith(".bad")
        if kind == "old":
            expected.removed_bytes += size
            expected.removed_bad += bad
            expected.removed_chunks += not bad
        elif kind == "young":
            expected.pending_bytes += size
            expected.still_bad += bad
            expected.pending_chunks += not bad
        else:
            expected.disk_bytes += size
            expected.disk_chunks += not bad
    lost = sorted(used)[0]
    (base / ".chunks" / lost[:4] / lost).unlink()
    rescued = base / ".chunks" / lost[:4] / f"{lost}.0.bad"
    rescued.write_bytes(b"bad")
    os.utime(rescued, (1, 1))
    for name in sorted(used)[1:]:
        os.utime(base / ".chunks" / name[:4] / name, (1, 1))
        expected.disk_bytes += (base / ".chunks" / name[:4] / name).stat().st_size
        expected.disk_chunks += 1
    expected.disk_bytes += 3 + len(CODEC.encode(bytes(4 << 20)))
    expected.disk_chunks += 1
    expected.index_file_count = len(snapshots)
    expected.index_data_bytes = sum((2 + number % 4) * CHUNK for number in range(6))
    expected.cache_misses = len(used)
    expected.cache_hits = sum(2 + number % 4 for number in range(6)) - len(used)
    # A file with a time of its own second is neither young nor fresh for sure: none is used above.
    report = await collect_garbage(repo.store)
    assert replace(report.status, upid=None) == expected
    assert report.missing == [bytes.fromhex(lost)]
    assert not [path for path in chunk_files(base) if path.suffix == ".using"]
    assert any(path.suffix == ".tmp_Ab12Cd" for path in chunk_files(base)), "other names are left alone"


async def test_links_and_folders_among_the_chunks_are_left_alone(repo: LocalRepository, tmp_path: Path) -> None:
    base = repo.store.base
    link = base / ".chunks/0000" / ("0" * 64)
    link.symlink_to("/etc/passwd")
    os.utime(link, (1, 1), follow_symlinks=False)
    folder = base / ".chunks/0001" / ("1" * 64)
    folder.mkdir()
    os.utime(folder, (1, 1))
    report = await collect_garbage(repo.store)
    assert report.status.removed_chunks == 0
    assert link.is_symlink()
    assert folder.is_dir()
    folder.rmdir()


async def test_missing_folders_of_chunks_are_fine(repo: LocalRepository) -> None:
    folder = repo.store.base / ".chunks/abcd"
    folder.rmdir()
    try:
        assert (await collect_garbage(repo.store)).status.disk_chunks == 1
    finally:
        folder.mkdir()


async def test_status_file_is_what_pbs_parses(repo: LocalRepository) -> None:
    await write(repo, 1000, image(1))
    report = await collect_garbage(repo.store)
    path = repo.store.base / ".gc-status"
    text = path.read_text()
    assert "\n" not in text
    assert list(json.loads(text)) == [
        "upid", "index-file-count", "index-data-bytes", "disk-bytes", "disk-chunks", "removed-bytes", "removed-chunks",
        "pending-bytes", "pending-chunks", "removed-bad", "still-bad", "cache-stats",
    ]  # fmt: skip
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.stat().st_uid == repo.store.base.stat().st_uid
    assert read_status(repo.store.base) == report.status
    upid = Upid.parse(json.loads(text)["upid"])
    assert (upid.kind, upid.id, upid.pid) == ("garbage_collection", repo.store.base.name, os.getpid())
    assert abs(upid.start - time.time()) < 60
    assert str(upid) == json.loads(text)["upid"]


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"upid": 5}', b'{"index-file-count": -1}', b"[" * 50_000, b"\xff"]
)
def test_status_that_is_none_is_an_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / ".gc-status").write_bytes(text)
    with pytest.raises(ValueError, match="gc-status"):
        read_status(tmp_path)


async def test_dry_run_removes_nothing_and_counts_the_same(repo: LocalRepository) -> None:
    base = repo.store.base
    await repo.forget(await write(repo, 1000, image("gone")))
    await write(repo, 1001, image("kept"))
    age(base, 2 * DAY)
    before = chunks(base)
    rehearsal = await collect_garbage(repo.store, dry_run=True)
    assert chunks(base) == before | {ZERO.hex()}
    assert not (base / ".gc-status").exists()
    real = await collect_garbage(repo.store)
    assert replace(real.status, upid=None) == replace(rehearsal.status, upid=None)
    assert real.status.removed_chunks == 3
    assert rehearsal.to_json()["dry-run"] is True


async def test_bad_chunk_goes_once_its_chunk_is_there_again(repo: LocalRepository) -> None:
    base = repo.store.base
    snapshot = await write(repo, 1000, image(1))
    digest = digests_of(image(1))[0]
    assert await repo.store.chunks.quarantine(digest) == f"{digest.hex()}.0.bad"
    bad = chunk_path(base, digest).with_name(f"{digest.hex()}.0.bad")
    os.utime(bad, (1, 1))
    report = await collect_garbage(repo.store)
    assert (report.status.removed_bad, report.missing_count) == (0, 1)
    assert bad.exists(), "the only copy of a chunk in use may still be of some help"
    await write(repo, 2000, image(1), "vm/200")
    os.utime(bad, (1, 1))
    report = await collect_garbage(repo.store)
    assert (report.status.removed_bad, report.missing_count, bad.exists()) == (1, 0, False)
    assert await repo.snapshot(snapshot)


class TestWritersBeside:
    async def test_chunks_since_the_oldest_writer_began_stay_however_old(self, repo: LocalRepository) -> None:
        base = repo.store.base
        async with repo.store.chunks.writer(wait_s=0):
            entry = next((base / ".fleece/writers").iterdir())
            begun = time.time() - 5 * DAY
            text = json.loads(entry.read_text())
            entry.write_text(json.dumps({**text, "start": begun}))
            for name, seconds in (("a", 5 * DAY - 60), ("b", 5 * DAY + 240), ("c", 5 * DAY + 3600)):
                await repo.store.chunks.insert(CODEC.digest(name.encode()), CODEC.encode(name.encode()))
                age(base, seconds, CODEC.digest(name.encode()))
            report = await collect_garbage(repo.store)
        assert chunks(base) == {CODEC.digest(b"a").hex(), CODEC.digest(b"b").hex(), ZERO.hex()}
        status = report.status
        assert (status.removed_chunks, status.pending_chunks, status.disk_chunks) == (1, 1, 2)

    async def test_writer_whose_clock_is_two_days_ahead_is_believed_by_its_entry(self, repo: LocalRepository) -> None:
        """It has run for three days, says one; its first chunks would go."""
        base = repo.store.base
        data = b"first chunk"
        async with repo.store.chunks.writer(wait_s=0):
            entry = next((base / ".fleece/writers").iterdir())
            text = json.loads(entry.read_text())
            entry.write_text(json.dumps({**text, "start": time.time() - DAY}))
            os.utime(entry, (time.time() - 3 * DAY,) * 2)
            await repo.store.chunks.insert(CODEC.digest(data), CODEC.encode(data))
            age(base, 3 * DAY - 10, CODEC.digest(data))
            await collect_garbage(repo.store)
        assert CODEC.digest(data).hex() in chunks(base)

    async def test_backup_goes_on_during_the_sweep(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An old chunk that a backup takes up again between look and lock stays."""
        base = repo.store.base
        data = image("reused", 1)
        await repo.forget(await write(repo, 1000, data))
        age(base, 3 * DAY)
        real = locks.ChunkLocks.hold

        def late(self: locks.ChunkLocks, digest: bytes, **wait: float) -> Any:
            if digest == CODEC.digest(data):
                os.utime(chunk_path(base, digest))  # what an insert in another process does
            return real(self, digest, **wait)

        monkeypatch.setattr(locks.ChunkLocks, "hold", late)
        report = await collect_garbage(repo.store)
        assert (report.status.removed_chunks, report.status.disk_chunks) == (0, 2)
        assert CODEC.digest(data).hex() in chunks(base)

    async def test_chunk_that_stays_locked_stays(self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch) -> None:
        base = repo.store.base
        data = image("held", 1)
        await repo.forget(await write(repo, 1000, data))
        age(base, 3 * DAY)
        monkeypatch.setattr("datastore.sweep._SWEEP_WAIT_S", 0.05)
        other = locks.ChunkLocks(base, repo.store.owner)
        with other.hold(CODEC.digest(data)):
            report = await collect_garbage(repo.store)
        other.close()
        assert (report.status.removed_chunks, report.status.pending_chunks) == (0, 1)

    async def test_second_collection_and_backups_of_pbs_are_waited_for(self, repo: LocalRepository) -> None:
        heard = Heard()
        async with repo.store.chunks.exclusive(wait_s=0):
            with pytest.raises(LockedError, match="another garbage collection is running"):
                await collect_garbage(repo.store, lock_wait_s=0.1, progress=heard)
        assert "waiting for the lock" in heard.lines[0]

    async def test_lock_that_becomes_free_in_time_is_taken(self, repo: LocalRepository) -> None:
        async def hold(*, task_status: "trio.TaskStatus[None]") -> None:
            async with repo.store.chunks.exclusive(wait_s=0):
                task_status.started()
                await trio.sleep(0.2)

        async with trio.open_nursery() as nursery:
            await nursery.start(hold)
            assert (await collect_garbage(repo.store, lock_wait_s=20)).status.disk_chunks == 1


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


class TestIndexes:
    """One that cannot be read means that nothing is removed; one in a strange place counts."""

    @pytest.fixture
    async def unused(self, repo: LocalRepository) -> str:
        """An old chunk that nothing uses, unless the store holds something else too."""
        await repo.forget(await write(repo, 1000, image("unused", 1)))
        age(repo.store.base, 3 * DAY)
        return digests_of(image("unused", 1))[0].hex()

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(b"x" * 5000),
            lambda path: (path.unlink(), path.mkdir()),
            lambda path: (path.unlink(), path.symlink_to("/nowhere")),
            make_pipe,
            lambda path: path.rename(path.with_suffix(".didx")),
        ],
        ids=["truncated", "empty", "foreign", "a folder", "a dead link", "a pipe", "of the other kind"],
    )
    @pytest.mark.parametrize("place", ["vm/200/1970-01-01T00:33:20Z/disk.img.fidx", "elsewhere/deep/x.fidx"])
    async def test_unreadable_one_stops_everything_and_is_named(
        self, repo: LocalRepository, unused: str, spoil: Callable[[Path], object], place: str
    ) -> None:
        base = repo.store.base
        snapshot = await write(repo, 2000, image("used"), "vm/200")
        path = base / place
        if not path.exists():
            path.parent.mkdir(parents=True)
            shutil.copy(base / snapshot.path / "disk.img.fidx", path)
        spoil(path)
        with pytest.raises(StoreError, match=rf"{place.rpartition('.')[0]}\..idx cannot be read as an index"):
            await collect_garbage(repo.store)
        assert unused in chunks(base)
        assert not (base / ".gc-status").exists()

    async def test_strange_places_count_and_are_reported(self, repo: LocalRepository, unused: str) -> None:
        base = repo.store.base
        snapshot = await write(repo, 2000, image("a"), "vm/200")
        target = base / snapshot.path / "disk.img.fidx"
        places = ["copy.fidx", "lost+found/x.fidx", "vm/notes.fidx", "ns/-no-name/x.fidx", "vm/100x/2026-99-99T00:00:00Z/y.fidx"]  # fmt: skip  # noqa: E501
        for place in places:
            (base / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, base / place)
        (base / "link.fidx").symlink_to("copy.fidx")
        (base / ".hidden").mkdir()
        (base / ".hidden/z.fidx").write_bytes(b"not looked at")
        shutil.copy(target, base / snapshot.path / ".x.fidx")
        await repo.forget(snapshot)
        age(base, 3 * DAY)
        heard = Heard()
        report = await collect_garbage(repo.store, progress=heard)
        assert sorted(report.strange) == sorted([*places, "link.fidx"])
        assert len(heard.warnings) == 6
        assert {digest.hex() for digest in digests_of(image("a"))} <= chunks(base)
        assert unused not in chunks(base)
        assert report.status.index_file_count == 6

    async def test_stray_folders_under_ns_and_impossible_dates_do_not_stop_it(
        self, repo: LocalRepository, unused: str
    ) -> None:
        """Both make PBS's garbage collection fail."""
        for stray in ("ns/.x", "ns/a b/vm", "ns/a/ns/%", "vm/100/2026-13-01T00:00:00Z", "vm/100/2026-01-01T25:00:00Z"):
            (repo.store.base / stray).mkdir(parents=True)
        assert (await collect_garbage(repo.store)).status.removed_chunks == 1

    async def test_unfinished_snapshots_and_namespaces_count(self, repo: LocalRepository) -> None:
        base = repo.store.base
        snapshot = await write(repo, 1000, image("unfinished"))
        (base / snapshot.path / "index.json.blob").unlink()
        shutil.copytree(base / "vm", base / "ns/a/ns/b/vm")
        shutil.rmtree(base / "vm")
        age(base, 3 * DAY)
        report = await collect_garbage(repo.store)
        assert (report.status.removed_chunks, report.status.disk_chunks, report.strange) == (0, 4, [])

    async def test_store_whose_name_starts_with_a_dot_is_looked_at(self, store_folder: Path) -> None:
        hidden = store_folder.with_name(f".{store_folder.name}")
        store_folder.rename(hidden)
        try:
            (hidden / "x").mkdir()
            (hidden / "x/y.fidx").touch()
            assert list_indexes(hidden) == ["x/y.fidx"]
        finally:
            hidden.rename(store_folder)

    async def test_stores_inside_each_other_are_refused(self, repo: LocalRepository) -> None:
        inner = repo.store.base / "inner"
        (inner / ".chunks").mkdir(parents=True)
        (inner / ".lock").touch()
        with pytest.raises(StoreError, match="lies in the datastore"):
            await collect_garbage(repo.store)
        with pytest.raises(StoreError, match="lies in the datastore"):
            list_indexes(inner)

    async def test_index_that_vanishes_makes_it_look_again(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A backup finishes while its predecessor, which alone proves that a chunk is used, is pruned.

        Not only if the vanished one is the newest, as in PBS: here the newest was listed while it was unfinished.
        """
        base = repo.store.base
        data = image("known")
        first = await write(repo, 1000, data)
        age(base, 3 * DAY)
        unfinished = base / "vm/100/1970-01-01T00:33:20Z"
        unfinished.mkdir()
        real = read_indexes

        def prune_first(base: Path, left: list[str], *rest: Any) -> Any:
            if (base / first.path).exists():
                (base / first.path / "disk.img.fidx").rename(unfinished / "disk.img.fidx")
                shutil.rmtree(base / first.path)
            return real(base, left, *rest)

        monkeypatch.setattr(gc, "read_indexes", prune_first)
        report = await collect_garbage(repo.store)
        assert (report.status.removed_chunks, report.status.index_file_count, report.strange) == (0, 1, [])
        assert {digest.hex() for digest in digests_of(data)} <= chunks(base)

    async def test_store_in_which_indexes_vanish_for_ever_is_left_alone(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch, unused: str
    ) -> None:
        monkeypatch.setattr(gc, "list_indexes", lambda base: ["vm/1/gone.fidx"])
        with pytest.raises(StoreError, match="vanished while they were to be read"):
            await collect_garbage(repo.store)
        assert unused in chunks(repo.store.base)

    async def test_each_chunk_is_touched_once_in_whole_folders(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = image("shared", 40)
        for number in range(8):
            await write(repo, 1000 + number, data[number * CHUNK :] + image(number, 2))
        touched: list[bytes] = []
        real = repo.store.chunks.mark

        async def noted(digests: Any) -> list[bytes]:
            packed = bytes(digests)
            touched.extend(packed[at : at + 32] for at in range(0, len(packed), 32))
            return await real(digests)

        monkeypatch.setattr(repo.store.chunks, "mark", noted)
        monkeypatch.setattr(gc, "_MARK_AT_ONCE", 50)
        monkeypatch.setattr(gc, "_MARK_IN_A_CALL", 7)
        report = await collect_garbage(repo.store)
        assert len(touched) == len(set(touched)) == report.status.cache_misses == 40 + 16
        assert report.status.cache_hits == sum(42 - number for number in range(8)) - 56


class TestClocks:
    async def test_file_system_that_keeps_access_times_is_refused(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await repo.forget(await write(repo, 1000, image(1)))
        age(repo.store.base, 3 * DAY)
        before = chunks(repo.store.base)
        monkeypatch.setattr("datastore.local_chunks.touch", lambda path: None)
        with pytest.raises(StoreError, match="does not change its access time"):
            await collect_garbage(repo.store)
        assert before <= chunks(repo.store.base)

    async def test_marks_that_leave_access_times_as_they_were_remove_nothing_in_use(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file system that takes touches and forgets them, or a clock that jumps between test and mark."""
        await write(repo, 1000, image(1))
        age(repo.store.base, 3 * DAY)
        before = chunks(repo.store.base)
        monkeypatch.setattr("datastore.local_chunks.touch_in", lambda folder, path: True)
        with pytest.raises(StoreError, match="did a clock jump"):
            await collect_garbage(repo.store)
        assert before <= chunks(repo.store.base)

    @pytest.mark.parametrize("jump", [-2 * DAY, 2 * DAY])
    async def test_clock_that_is_set_meanwhile_stops_it(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch, jump: int
    ) -> None:
        await repo.forget(await write(repo, 1000, image(1)))
        age(repo.store.base, 3 * DAY)
        before = chunks(repo.store.base)
        real_time, real_take, moved = time.time, MarkedDigests.take, [0]

        def set_clock(self: MarkedDigests) -> bytes:
            moved[0] = jump
            return real_take(self)

        monkeypatch.setattr(MarkedDigests, "take", set_clock)
        monkeypatch.setattr(time, "time", lambda: real_time() + moved[0])
        with pytest.raises(StoreError, match="the clock was set by"):
            await collect_garbage(repo.store)
        assert before <= chunks(repo.store.base)

    @pytest.mark.parametrize("off", [-2 * DAY, 2 * DAY])
    async def test_clock_two_days_off_against_that_of_the_files_is_safe(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch, off: int
    ) -> None:
        """The files lie on a server whose clock is right; ours is not."""
        base = repo.store.base
        await write(repo, 1000, image("used"))
        await repo.forget(await write(repo, 1000, image("young"), "vm/2"))
        age(base, DAY // 2)
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + off)
        report = await collect_garbage(repo.store)
        assert {digest.hex() for digest in digests_of(image("used"))} <= chunks(base)
        assert report.status.removed_chunks == 0, "12 hours old by the clock that counts"

    @pytest.mark.parametrize("cutoff", [0, 59, 2880 * 60 + 1])
    async def test_cutoff_that_pbs_refuses_is_refused(self, repo: LocalRepository, cutoff: int) -> None:
        with pytest.raises(UsageError, match="are possible"):
            await collect_garbage(repo.store, cutoff_s=cutoff)

    async def test_cutoff_is_what_it_says(self, repo: LocalRepository) -> None:
        await repo.forget(await write(repo, 1000, image(1)))
        age(repo.store.base, 70)
        assert (await collect_garbage(repo.store)).status.pending_chunks == 3
        assert (await collect_garbage(repo.store, cutoff_s=60)).status.removed_chunks == 3


async def test_old_temporary_files_go_and_new_ones_stay(repo: LocalRepository) -> None:
    folder = repo.store.base / ".fleece/tmp"
    folder.mkdir(parents=True)
    (folder / "new.tmp_1").touch()
    (folder / "old.tmp_2").touch()
    os.utime(folder / "old.tmp_2", (time.time() - 3 * DAY,) * 2)
    await collect_garbage(repo.store)
    assert [path.name for path in folder.iterdir()] == ["new.tmp_1"]


async def test_file_that_cannot_be_removed_stops_it(repo: LocalRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    await repo.forget(await write(repo, 1000, image(1)))
    age(repo.store.base, 3 * DAY)

    def refuse(path: str) -> bool:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("datastore.sweep.unlink_existing", refuse)
    with pytest.raises(StoreError, match="remove chunk"):
        await collect_garbage(repo.store)


async def test_each_one_that_removes_adds_to_the_history_what_is_left(repo: LocalRepository) -> None:
    await write(repo, 1000, image("kept"))
    await collect_garbage(repo.store, dry_run=True)
    assert await repo.usage_history() == []
    before = int(time.time())
    report = await collect_garbage(repo.store)
    (sample,) = await repo.usage_history()
    assert sample.chunk_bytes == report.status.disk_bytes + report.status.pending_bytes > 0
    assert sample.chunk_bytes <= sample.used <= (await repo.usage()).total
    assert before <= sample.time <= time.time()
    (repo.store.base / ".fleece/usage-history").unlink()
    (repo.store.base / ".fleece/usage-history").mkdir()
    assert await repo.usage_history() == []


@pytest.mark.parametrize("note", ["write_status", "add_sample"])
async def test_status_that_cannot_be_written_is_a_warning(
    repo: LocalRepository, monkeypatch: pytest.MonkeyPatch, note: str
) -> None:
    def full(*args: object) -> None:
        raise StoreError("write", ".gc-status", "No space left on device")

    monkeypatch.setattr(gc, note, full)
    heard = Heard()
    report: GcReport = await collect_garbage(repo.store, progress=heard)
    assert report.status.disk_chunks == 1
    assert "No space left" in heard.warnings[0]


async def test_golden_store_is_counted_as_pbs_counted_it(golden: Path, repo: LocalRepository) -> None:
    base = repo.store.base
    unpack_golden_store(golden, base)
    theirs = read_status(base)
    assert theirs is not None
    assert Upid.parse(str(theirs.upid)).kind == "garbage_collection"
    assert str(Upid.parse(str(theirs.upid))) == theirs.upid
    assert json.dumps(theirs.to_json(), separators=(",", ":")) == (base / ".gc-status").read_text()
    age(base, 3 * DAY)
    report = await collect_garbage(repo.store)
    assert replace(report.status, upid=None) == replace(theirs, upid=None)
    assert (report.missing_count, report.strange) == (0, [])
