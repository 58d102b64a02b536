"""Verify beside backups and removals: no finished snapshot lacks a chunk and is believed to be sound."""

import errno
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.errors import LockedError, SnapshotNotFoundError, StoreError
from datastore.filters import GroupFilter
from datastore.names import Group, Namespace, Snapshot
from datastore.upid import Upid
from repository.local import LocalRepository, open_local
from repository.users import record_users
from repository.verify import VerifyOptions, VerifyResult, choose, verify
from tests.support.snapshots import CHUNK, put_all, read_image, write_snapshot

CODEC = ChunkCodec()
GROUP = Group.parse("vm/100")
NAME = "disk.img.fidx"


@pytest.fixture
async def repo(store_folder: Path) -> AsyncIterator[LocalRepository]:
    local = await open_local(store_folder)
    yield local
    local.close()


def image(seed: object, chunks: int = 3) -> bytes:
    return random.Random(str(seed)).randbytes(chunks * CHUNK)


def flip(repo: LocalRepository, data: bytes) -> Path:
    """Damage the chunk of `data`; its path."""
    name = CODEC.digest(data).hex()
    path = repo.store.base / ".chunks" / name[:4] / name
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    return path


async def write(repo: LocalRepository, ctime: int, data: bytes, group: Group = GROUP) -> Snapshot:
    return await write_snapshot(repo, group, ctime, {NAME: data})


async def run(repo: LocalRepository, **more: Any) -> list[VerifyResult]:
    return await verify(repo, await choose(repo), CODEC, **more)


async def state(repo: LocalRepository, snapshot: Snapshot) -> str | None:
    found = (await repo.snapshot(snapshot)).verification
    return None if found is None else found["state"]


class TestBackupThatRuns:
    async def test_it_fails_if_a_chunk_that_it_took_over_is_set_aside_and_the_next_one_heals(
        self, repo: LocalRepository
    ) -> None:
        """It is unfinished while verify looks for the users of the chunk, so verify cannot record it as failed."""
        data = image(1)
        first = await write(repo, 1000, data)
        with pytest.raises(StoreError, match="verify set 1 of its chunks aside meanwhile"):
            async with repo.backup(GROUP.at(2000)) as session:
                await session.previous_index(NAME)
                await put_all(session, {NAME: data})
                flip(repo, data[:CHUNK])
                assert [result.state for result in await run(repo)] == ["failed"]
                await session.finish()
        assert [info.snapshot for info in await repo.snapshots(unfinished=True)] == [first]
        await write(repo, 3000, data)
        assert [result.state for result in await run(repo)] == ["ok", "ok"]

    async def test_it_fails_if_a_chunk_that_was_there_already_is_set_aside(self, repo: LocalRepository) -> None:
        """Of another group: no base whose state could tell."""
        data = image(1)
        await write(repo, 1000, data, Group.parse("vm/1"))
        flip(repo, data[:CHUNK])
        with pytest.raises(StoreError, match="verify set 1 of its chunks aside"):
            async with repo.backup(GROUP.at(2000)) as session:
                await put_all(session, {NAME: data})
                await run(repo)
                await session.finish()

    async def test_it_fails_if_the_chunk_was_set_aside_before_but_its_base_is_recorded_later(
        self, repo: LocalRepository
    ) -> None:
        data = image(1)
        first = await write(repo, 1000, data)
        assert await repo.store.chunks.quarantine(CODEC.digest(data[:CHUNK]))
        with pytest.raises(StoreError, match="verify set 1 of its chunks aside"):
            async with repo.backup(GROUP.at(2000)) as session:
                await session.previous_index(NAME)
                await put_all(session, {NAME: data})
                await repo.record_verification(first, "failed", str(Upid.new("verify", "x")))
                await session.finish()

    @pytest.mark.parametrize("stored_anew", [False, True])
    async def test_it_ends_well_if_what_is_set_aside_is_not_its_own_or_stored_anew(
        self, repo: LocalRepository, stored_anew: bool
    ) -> None:
        data, other = image(1), image("other", 1)
        await write(repo, 1000, other, Group.parse("vm/1"))
        async with repo.backup(GROUP.at(2000)) as session:
            flip(repo, other)
            await run(repo)
            await put_all(session, {NAME: data + other if stored_anew else data})
            await session.finish()
        assert await state(repo, GROUP.at(2000)) is None
        assert (await verify(repo, [GROUP.at(2000)], CODEC))[0].errors == []

    @pytest.mark.parametrize("broken", ["", "update_manifest", "times_set_aside"])
    async def test_set_aside_at_its_very_end_it_is_recorded_as_failed(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch, broken: str
    ) -> None:
        """After its last look for such chunks, and before its manifest is there, which verify would find.

        If that cannot be recorded, or found out, the snapshot is listed all the same, and a warning says so.
        """

        async def fails(*rest: Any) -> None:
            raise StoreError("write", "somewhere", "Input/output error")

        data = image(1)
        await write(repo, 1000, data)
        real = repo.store.meta.put

        async def late(path: str, *rest: Any, **more: Any) -> None:
            if path == f"{GROUP.at(2000).path}/index.json.blob" and await state(repo, GROUP.at(1000)) is None:
                flip(repo, data[:CHUNK])
                await run(repo)
                if broken == "update_manifest":
                    monkeypatch.setattr("datastore.session.update_manifest", fails)
                elif broken:
                    monkeypatch.setattr(repo.store.chunks, broken, fails)
            await real(path, *rest, **more)

        monkeypatch.setattr(repo.store.meta, "put", late)
        async with repo.backup(GROUP.at(2000)) as session:
            await session.previous_index(NAME)
            await put_all(session, {NAME: data})
            await session.finish()
        assert any("back it up again" in warning for warning in session.warnings) is (broken != "times_set_aside")
        assert any("Input/output error" in warning for warning in session.warnings) is bool(broken)
        assert await state(repo, GROUP.at(2000)) == (None if broken else "failed")


class TestUsers:
    async def test_snapshots_that_end_while_users_are_looked_for_are_found_too(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = image(1)
        first = await write(repo, 1000, data)
        digest = CODEC.digest(data[:CHUNK])
        real = repo.record_verification

        async def and_a_backup_ends(snapshot: Snapshot, found: str, upid: str) -> None:
            if snapshot == first:
                await write(repo, 2000, data, Group.parse("ct/1"))
            await real(snapshot, found, upid)

        monkeypatch.setattr(repo, "record_verification", and_a_backup_ends)
        heard = Progress()
        lines = await record_users(repo, repo, {digest}, [], heard, Upid.new("verify", "x"))
        assert sorted(map(str, lines)) == ["ct/1/1970-01-01T00:33:20Z", "vm/100/1970-01-01T00:16:40Z"]
        assert {await state(repo, one) for one in lines} == {"failed"}
        assert len(heard.warnings) == 2

    async def test_snapshot_that_is_locked_for_a_moment_is_waited_for(
        self, repo: LocalRepository, autojump_clock: trio.testing.MockClock
    ) -> None:
        data = image(1)
        first = await write(repo, 1000, data)
        lock = await repo.store.locks.acquire_snapshot(first, shared=False)
        heard = Progress()
        lines: dict[Snapshot, list[str]] = {}

        async def look() -> None:
            lines.update(
                await record_users(repo, repo, {CODEC.digest(data[:CHUNK])}, [], heard, Upid.new("verify", "x"))
            )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await trio.sleep(2)
            lock.release()
        assert list(lines) == [first]
        lock = await repo.store.locks.acquire_snapshot(first, shared=False)
        await look()
        lock.release()
        assert "not looked at" in heard.warnings[-1]

    async def test_namespaces_that_vanish_are_no_error(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data, gone = image(1), Namespace.parse("gone")
        await write(repo, 1000, data)
        real = repo.namespaces

        async def with_a_gone_one(*arguments: Any, **more: Any) -> list[Namespace]:
            return [*await real(*arguments, **more), gone]

        monkeypatch.setattr(repo, "namespaces", with_a_gone_one)
        flip(repo, data[:CHUNK])
        assert [result.state for result in await run(repo)] == ["failed"]
        with pytest.raises(SnapshotNotFoundError):
            await choose(repo, gone)


async def test_a_pull_that_mends_a_snapshot_fails_if_a_chunk_that_it_took_over_is_set_aside(
    repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may bring along a verify state that says "ok", which nobody would look behind."""
    monkeypatch.setattr("repository.users._PAUSE_S", 0.0)  # the pull keeps the snapshot locked
    old, new = image("old"), image("new")
    mended = await write(repo, 1000, old)
    newest = await write(repo, 2000, new)
    async with repo.resync(mended) as session:
        assert await session.previous_index(NAME) is not None
        await put_all(session, {NAME: new})
        flip(repo, new[:CHUNK])
        await verify(repo, [newest], CODEC, options=VerifyOptions())
        with pytest.raises(StoreError, match="verify set 1 of its chunks aside meanwhile"):
            await session.finish()
    assert await read_image(repo, mended, NAME) == old


async def test_depth_and_filters_choose_groups(repo: LocalRepository) -> None:
    for ns, group in (("", "vm/1"), ("", "ct/1"), ("a", "vm/2"), ("a/b", "vm/3")):
        await write(repo, 1000, image(1), Group.parse(group, Namespace.parse(ns)))

    async def chosen(ns: str = "", **options: Any) -> list[str]:
        found = await choose(repo, Namespace.parse(ns), **options)
        return [f"{one.group.ns}:{one.group}" for one in found]

    assert await chosen(depth=0) == [":ct/1", ":vm/1"]
    assert await chosen("a", depth=0) == ["a:vm/2"]
    assert await chosen(depth=1, filters=[GroupFilter.parse("type:vm")]) == [":vm/1", "a:vm/2"]
    assert await chosen(filters=[GroupFilter.parse("exclude:regex:/[12]$")]) == ["a/b:vm/3"]


@contextmanager
def unreadable(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int) -> Iterator[None]:
    """What is in `folder` can be neither listed nor looked at (root may read everything, so modes are of no use)."""
    real_scandir, real_open, real_lstat = os.scandir, os.open, Path.lstat

    def refuse(path: Any) -> None:
        if Path(os.fsdecode(path)).is_relative_to(folder):
            raise OSError(code, os.strerror(code), str(path))

    def scandir(path: Any = ".") -> Any:
        refuse(path)
        return real_scandir(path)

    def opened(path: Any, *rest: Any, **more: Any) -> int:
        refuse(path)
        return real_open(path, *rest, **more)

    def lstat(self: Path) -> os.stat_result:
        if self != folder:
            refuse(self)
        return real_lstat(self)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        patch.setattr(os, "open", opened)
        patch.setattr(Path, "lstat", lstat)
        yield


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
async def test_folder_that_cannot_be_read_is_a_failed_snapshot_and_hides_no_other(
    repo: LocalRepository, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    bad = await write(repo, 1000, image(1))
    good = await write(repo, 2000, image(2))
    with unreadable(monkeypatch, repo.store.base / bad.path, code):
        assert [info.snapshot for info in await repo.snapshots()] == [bad, good]
        results = await run(repo)
    assert [(result.snapshot, result.state) for result in results] == [(good, "ok"), (bad, "failed")]
    assert os.strerror(code) in results[1].errors[0]
    assert [result.state for result in await run(repo)] == ["ok", "ok"]


async def test_group_whose_notes_are_no_file_is_verified(repo: LocalRepository) -> None:
    first = await write(repo, 1000, image(1))
    (repo.store.base / first.group.path / "notes").mkdir()
    (repo.store.base / first.group.path / "link").symlink_to("/etc")
    (repo.store.base / "vm/101").symlink_to("100")
    assert [result.snapshot for result in await run(repo)] == [first]


async def test_result_that_cannot_be_recorded_for_whatever_reason_is_a_warning(
    repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(repo, 1000, image(1))

    async def refuse(*arguments: object) -> None:
        raise StoreError("write", "it", "No space left on device")

    monkeypatch.setattr(repo, "record_verification", refuse)
    heard = Progress()
    data = image(1)
    assert [result.errors for result in await run(repo, progress=heard)] == [[]]
    assert "No space" in heard.warnings[0]
    # Not recorded as failed, a chunk is not set aside either: a backup would build on a snapshot that lacks it.
    path = flip(repo, data[:CHUNK])
    assert [result.state for result in await run(repo)] == ["failed"]
    assert path.exists()


async def test_locked_by_a_chunk_that_somebody_holds_it_goes_on(
    repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = image(1)
    await write(repo, 1000, data)
    flip(repo, data[:CHUNK])

    async def held(*arguments: object) -> str | None:
        raise LockedError("lock chunk", "it", "another process holds it")

    monkeypatch.setattr(repo, "quarantine", held)
    (result,) = await run(repo, options=VerifyOptions())
    assert len(result.errors) == 1
    assert await state(repo, GROUP.at(1000)) == "failed"
