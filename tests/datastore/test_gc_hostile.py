"""Garbage collection and removal where the store is not as it should be: foreign files, lying clocks, failing calls."""

import errno
import os
import random
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore import gc_indexes
from datastore.codec import ChunkCodec
from datastore.errors import ProtectedError, StoreError
from datastore.files import Owner
from datastore.gc import collect_garbage
from datastore.locks import ChunkLocks, ProcessLocker
from datastore.names import Group, Snapshot
from datastore.prune import KeepOptions, Mark
from datastore.sweep import Sweep
from repository.local import LocalRepository, open_local
from tests.support.snapshots import CHUNK, write_snapshot
from tests.support.stores import chunk_files

CODEC = ChunkCodec()
DAY = 86_400
NAME = "disk.img.fidx"


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)


@pytest.fixture
async def repo(store_folder: Path) -> AsyncIterator[LocalRepository]:
    local = await open_local(store_folder)
    yield local
    local.close()


def image(seed: object, chunks: int = 3) -> bytes:
    return random.Random(str(seed)).randbytes(chunks * CHUNK)


async def write(repo: LocalRepository, ctime: int, data: bytes, group: str = "vm/100") -> Snapshot:
    return await write_snapshot(repo, group, ctime, {NAME: data})


def names(base: Path) -> set[str]:
    return {path.name for path in chunk_files(base)}


def hexes(data: bytes) -> set[str]:
    return {CODEC.digest(data[at : at + CHUNK]).hex() for at in range(0, len(data), CHUNK)}


def age(base: Path, seconds: float) -> None:
    for path in chunk_files(base):
        os.utime(path, (time.time() - seconds, path.stat().st_mtime))


class TestClocks:
    async def test_clock_that_is_set_back_during_the_sweep_stops_it(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a backup stores now looks two days old then, and would go."""
        base, data = repo.store.base, image("running")
        real_time, real_folders, moved = time.time, Sweep.folders, [0]

        def backup_and_clock(self: Sweep, *arguments: Any) -> None:
            if not moved[0]:
                moved[0] = -2 * DAY
                for path in chunk_files(base):
                    if path.name in hexes(data):
                        os.utime(path, (real_time() - 2 * DAY,) * 2)
            real_folders(self, *arguments)

        await repo.forget(await write(repo, 1000, data))
        monkeypatch.setattr(Sweep, "folders", backup_and_clock)
        monkeypatch.setattr(time, "time", lambda: real_time() + moved[0])
        with pytest.raises(StoreError, match="the clock was set by -172800 seconds"):
            await collect_garbage(repo.store)
        assert hexes(data) <= names(base)

    async def test_chunk_from_the_future_stays_and_counts_as_used(self, repo: LocalRepository) -> None:
        await repo.forget(await write(repo, 1000, image(1)))
        age(repo.store.base, -400 * DAY)
        report = await collect_garbage(repo.store, cutoff_s=60)
        assert (report.status.disk_chunks, report.status.removed_chunks) == (4, 0)

    async def test_writer_from_the_future_protects_no_less(self, repo: LocalRepository) -> None:
        base = repo.store.base
        await repo.forget(await write(repo, 1000, image(1)))
        age(base, DAY / 2)
        async with repo.store.chunks.writer(wait_s=0):
            (entry,) = (base / ".fleece/writers").iterdir()
            entry.write_text(entry.read_text().replace('"start": ', '"start": 9'))
            os.utime(entry, (time.time() + 400 * DAY,) * 2)
            report = await collect_garbage(repo.store)
        assert (report.status.pending_chunks, report.status.removed_chunks) == (3, 0)


class TestRegistry:
    @pytest.mark.parametrize("kind", ["file", "unreadable"])
    async def test_registry_that_cannot_be_listed_means_unknown_writers_not_none(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        base = repo.store.base
        await repo.forget(await write(repo, 1000, image(1)))
        age(base, 3 * DAY)
        registry = base / ".fleece/writers"
        if kind == "file":
            shutil.rmtree(registry)
            registry.touch()
        else:
            real = Path.iterdir

            def refuse(self: Path) -> Any:
                if self == registry:
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
                return real(self)

            monkeypatch.setattr(Path, "iterdir", refuse)
        with pytest.raises(StoreError, match="cannot look for writers of"):
            await collect_garbage(repo.store)
        assert len(names(base)) == 3
        if kind == "file":
            registry.unlink()

    async def test_no_registry_is_no_writer(self, repo: LocalRepository) -> None:
        assert ProcessLocker(repo.store.base, Owner.of(repo.store.base)).writers() == []
        assert (await collect_garbage(repo.store)).status.disk_chunks == 1


async def test_locks_that_fail_are_a_clear_error(repo: LocalRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    await repo.forget(await write(repo, 1000, image(1)))
    age(repo.store.base, 3 * DAY)
    real = ChunkLocks.hold

    def refuse(self: ChunkLocks, digest: bytes, **more: Any) -> Any:
        if digest.hex() in hexes(image(1)):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return real(self, digest, **more)

    monkeypatch.setattr(ChunkLocks, "hold", refuse)
    with pytest.raises(StoreError, match=r"cannot lock chunk .*: No locks available"):
        await collect_garbage(repo.store)
    assert len(names(repo.store.base)) == 4


async def test_folder_that_cannot_be_listed_means_no_sweep(
    repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = repo.store.base
    snapshot = await write(repo, 1000, image(1))
    await repo.forget(await write(repo, 1000, image(2), "vm/200"))
    age(base, 3 * DAY)
    real = os.scandir
    for folder in (base / snapshot.path, base / "vm", base / ".chunks/00ff"):
        for code in (errno.EACCES, errno.EIO):

            def refuse(path: Any = ".", folder: Path = folder, code: int = code) -> Any:
                if str(path) == str(folder):
                    raise OSError(code, os.strerror(code), str(path))
                return real(path)

            with monkeypatch.context() as patch:
                patch.setattr(os, "scandir", refuse)
                with pytest.raises(StoreError, match=os.strerror(code)):
                    await collect_garbage(repo.store)
            assert len(names(base)) == 7


def test_indexes_with_names_of_their_own_are_not_all_remembered() -> None:
    """Archives named by date: as many names as snapshots."""
    previous: dict[str, Any] = {}
    for number in range(1000):
        gc_indexes._remember(previous, f"{number}.didx", np.zeros((1000, 4), np.uint64))
    assert list(previous) == [f"{number}.didx" for number in range(1000 - 64, 1000)]
    gc_indexes._remember(previous, "940.didx", np.ones((1, 4), np.uint64))
    assert len(previous) == 64
    assert list(previous)[-1] == "940.didx"
    for number in range(20):
        gc_indexes._remember(previous, f"large-{number}", np.zeros((1 << 18, 4), np.uint64))
    assert list(previous) == [f"large-{number}" for number in range(16, 20)]
    gc_indexes._remember(previous, "enormous", np.zeros((1 << 21, 4), np.uint64))
    assert list(previous) == ["enormous"]


class TestRemoval:
    @pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
    async def test_manifest_that_cannot_be_looked_at_makes_no_snapshot_unfinished(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        """The next backup, and prune, remove unfinished ones."""
        first = await write(repo, 1000, image(1))
        real = Path.lstat

        def refuse(self: Path) -> os.stat_result:
            if self == repo.store.base / first.path / "index.json.blob":
                raise OSError(code, os.strerror(code), str(self))
            return real(self)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "lstat", refuse)
            await write(repo, 2000, image(2))
            await repo.prune(first.group, KeepOptions(last=5))
        assert [info.snapshot.ctime for info in await repo.snapshots()] == [1000, 2000]

    @pytest.mark.parametrize("kind", ["a link to nowhere", "a folder"])
    async def test_whatever_is_called_protected_protects(self, repo: LocalRepository, kind: str) -> None:
        first = await write(repo, 1000, image(1))
        await write(repo, 2000, image(2))
        mark = repo.store.base / first.path / ".protected"
        if kind == "a folder":
            mark.mkdir()
        else:
            mark.symlink_to("/nowhere/at/all")
        result = await repo.prune(first.group, KeepOptions(last=1))
        assert [decision.mark for decision in result.decisions] == [Mark.PROTECTED, Mark.KEEP]
        with pytest.raises(ProtectedError):
            await repo.forget(first)

    async def test_protection_that_cannot_be_told_is_a_clear_error(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = await write(repo, 1000, image(1))
        real = Path.lstat

        def refuse(self: Path) -> os.stat_result:
            if self.name == ".protected":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
            return real(self)

        monkeypatch.setattr(Path, "lstat", refuse)
        with pytest.raises(StoreError, match="Input/output error"):
            await repo.forget(first)
        assert (repo.store.base / first.path / "index.json.blob").exists()

    async def test_group_that_is_pruned_away_meanwhile_stops_no_namespace_from_going(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from datastore.names import Namespace

        ns = Namespace.parse("a")
        one = await write_snapshot(repo, Group.parse("vm/1", ns), 1000, {NAME: image(1)})
        await write_snapshot(repo, Group.parse("vm/2", ns), 1000, {NAME: image(2)})
        real = repo.store.forget_group
        seen: list[Group] = []

        async def prune_first(group: Group) -> list[Snapshot]:
            if not seen:
                seen.append(group)
                await repo.forget(one)
            return await real(group)

        monkeypatch.setattr(repo.store, "forget_group", prune_first)
        removal = await repo.delete_namespace(ns, groups=True)
        assert removal.removed == [ns]
        assert not (repo.store.base / "ns/a").exists()
