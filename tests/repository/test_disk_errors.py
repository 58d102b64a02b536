"""A full, broken or suddenly read-only disk at every single call of garbage collection, verify, prune and changes."""

import os
import random
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.gc import collect_garbage
from datastore.names import Group, Namespace, Snapshot
from datastore.prune import KeepOptions
from datastore.store import Datastore
from repository.local import LocalRepository, open_local
from repository.verify import VerifyOptions, choose, verify
from tests.support.crash import leftovers
from tests.support.disk_errors import at_every_call, each_in_turn
from tests.support.snapshots import CHUNK, write_snapshot

CODEC = ChunkCodec()
DAY = 86_400
NAME = "disk.img.fidx"
GROUP = Group.parse("vm/100")
#: Chunk folders that the tests use, which makes a sweep quick; every chunk must fall into one of them.
FOLDERS = 1024


@pytest.fixture
async def repo(store_folder: Path) -> AsyncIterator[LocalRepository]:
    local = await open_local(store_folder)
    yield local
    local.close()


def piece(seed: object) -> bytes:
    """A chunk in one of the first folders."""
    dice = random.Random(str(seed))
    while True:
        data = dice.randbytes(CHUNK)
        if int(CODEC.digest(data).hex()[:4], 16) < FOLDERS:
            return data


def image(seed: object, chunks: int = 3) -> bytes:
    return b"".join(piece(f"{seed} {number}") for number in range(chunks))


def chunk_path(repo: LocalRepository, data: bytes) -> Path:
    name = CODEC.digest(data).hex()
    return repo.store.base / ".chunks" / name[:4] / name


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def chunk_files(base: Path) -> list[Path]:
    """What lies in the first folders."""
    return [path for number in range(FOLDERS) for path in (base / f".chunks/{number:04x}").iterdir()]


async def is_whole(repo: LocalRepository) -> None:
    results = await verify(repo, await choose(repo), CODEC, options=VerifyOptions(record=False))
    assert [result.errors for result in results if result.errors] == []


@each_in_turn
@pytest.mark.timeout(300)
async def test_garbage_collection_leaves_what_is_used_and_the_next_one_ends_it(
    repo: LocalRepository, monkeypatch: pytest.MonkeyPatch, codes: Sequence[int]
) -> None:
    base = repo.store.base
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)
    monkeypatch.setattr("datastore.local_chunks._FOLDERS", FOLDERS)
    monkeypatch.setattr("datastore.local_chunks._FOLDERS_AT_ONCE", 256)
    used = image("used", 25)
    await write_snapshot(repo, GROUP, 1000, {NAME: used})
    unused = image("unused", 12)
    expected = {path.name for path in chunk_files(base)}

    async def prepare(number: int) -> Progress:
        await repo.forget(await write_snapshot(repo, "vm/200", 1000 + number, {NAME: unused}))
        bad = chunk_path(repo, unused[:CHUNK]).with_name(f"{CODEC.digest(unused[:CHUNK]).hex()}.0.bad")
        bad.write_bytes(b"bad")
        for path in chunk_files(base):
            os.utime(path, (time.time() - 3 * DAY,) * 2)
        return Progress()

    async def act(heard: Progress) -> None:
        await collect_garbage(repo.store, lock_wait_s=0, progress=heard)

    async def check(heard: Progress, ended_well: bool) -> None:
        names = {path.name for path in chunk_files(base)}
        assert expected <= names
        if ended_well:
            assert names == expected
        await is_whole(repo)
        report = await collect_garbage(repo.store, lock_wait_s=0)
        assert {path.name for path in chunk_files(base)} == expected
        assert report.missing_count == 0
        assert leftovers(base) == []

    calls = await at_every_call(codes, prepare, act, check)
    assert len(calls) > 40
    assert calls.count("utimensat") > 25, "marks"
    assert calls.count("unlink") >= 13, "removals"
    assert calls.count("rename") == 2, "the status, and the history"


@each_in_turn
async def test_verify_never_sets_a_chunk_aside_without_a_failed_snapshot(
    repo: LocalRepository, codes: Sequence[int]
) -> None:
    data = image("verified", 4)
    other = await write_snapshot(repo, "vm/1", 1000, {NAME: data[:CHUNK]})

    async def prepare(number: int) -> Snapshot:
        snapshot = await write_snapshot(repo, GROUP, 1000 + 10 * number, {NAME: data})
        for at in (0, 2):
            flip(chunk_path(repo, data[at * CHUNK : (at + 1) * CHUNK]))
        return snapshot

    async def act(snapshot: Snapshot) -> None:
        results = await verify(repo, [snapshot], CODEC, Progress())
        assert results[0].errors

    async def check(snapshot: Snapshot, ended_well: bool) -> None:
        info = await repo.snapshot(snapshot)
        recorded = info.verification is not None and info.verification["state"] == "failed"
        aside = [at for at in (0, 2) if not chunk_path(repo, data[at * CHUNK : (at + 1) * CHUNK]).exists()]
        assert recorded or not aside
        results = await verify(repo, await choose(repo), CODEC, Progress())
        assert {result.snapshot: result.state for result in results} == {other: "failed", snapshot: "failed"}
        # Nothing is in the way of healing.
        healed = await write_snapshot(repo, GROUP, snapshot.ctime + 5, {NAME: data})
        results = await verify(repo, await choose(repo), CODEC, Progress())
        assert [result.errors for result in results if result.errors] == []
        assert leftovers(repo.store.base) == []
        await repo.forget(snapshot)
        await repo.forget(healed)
        for path in chunk_files(repo.store.base):
            if path.name.endswith(".bad"):
                path.unlink()

    calls = await at_every_call(codes, prepare, act, check)
    # The state of this snapshot, of the other one, and the two chunks.
    assert calls.count("rename") == 4
    assert len(calls) > 20


@each_in_turn
async def test_prune_leaves_whole_snapshots_and_the_next_one_ends_it(
    repo: LocalRepository, codes: Sequence[int]
) -> None:
    data = {NAME: image("pruned", 1)}

    async def prepare(number: int) -> Group:
        group = Group.parse(f"vm/{number}")
        for ctime in range(1000, 1005):
            await write_snapshot(repo, group, ctime, data)
        return group

    async def act(group: Group) -> None:
        result = await repo.prune(group, KeepOptions(last=2))
        assert len(result.removed) + len(result.failed) == 3

    async def check(group: Group, ended_well: bool) -> None:
        left = [one.ctime for one in repo.store.snapshots(group, unfinished=True)]
        assert left[-2:] == [1003, 1004]
        await is_whole(repo)
        assert not (await repo.prune(group, KeepOptions(last=2))).failed
        assert [one.ctime for one in repo.store.snapshots(group, unfinished=True)] == [1003, 1004]
        await repo.forget_group(group)
        assert not (repo.store.base / group.path).exists()

    calls = await at_every_call(codes, prepare, act, check)
    assert calls.count("unlink") >= 12
    assert len(calls) > 20


class TestChanges:
    """Each is done, or not done; what was there is whole, and it can be done again."""

    @pytest.fixture
    async def subject(self, repo: LocalRepository) -> Snapshot:
        await repo.create_namespace(Namespace.parse("kept"))
        return await write_snapshot(repo, GROUP, 1000, {NAME: image("changed", 2)})

    @each_in_turn
    async def test_notes_of_a_snapshot(self, repo: LocalRepository, subject: Snapshot, codes: Sequence[int]) -> None:
        async def prepare(number: int) -> str:
            return f"round {number}"

        async def act(text: str) -> None:
            await repo.set_notes(subject, text)

        async def check(text: str, ended_well: bool) -> None:
            comment = (await repo.snapshot(subject)).comment
            assert comment == text or not ended_well
            await is_whole(repo)
            await repo.set_notes(subject, "before")
            assert leftovers(repo.store.base) == []

        calls = await at_every_call(codes, prepare, act, check)
        assert {"open", "writev", "fsync", "rename"} <= set(calls)

    @each_in_turn
    async def test_notes_and_owner_of_a_group(
        self, repo: LocalRepository, subject: Snapshot, codes: Sequence[int]
    ) -> None:
        group = subject.group

        async def prepare(number: int) -> int:
            await repo.set_notes(group, "before")
            await repo.set_owner(group, "before@pbs")
            return number

        async def act(number: int) -> None:
            await repo.set_notes(group, f"round {number}")
            await repo.set_owner(group, f"round{number}@pbs")
            await repo.set_notes(group, "")

        async def check(number: int, ended_well: bool) -> None:
            (info,) = await repo.groups()
            assert info.comment in ("before", f"round {number}", "")
            assert info.owner in ("before@pbs", f"round{number}@pbs")
            assert leftovers(repo.store.base) == []

        calls = await at_every_call(codes, prepare, act, check)
        assert (calls.count("rename"), calls.count("unlink")) == (2, 1)

    @each_in_turn
    async def test_protection(self, repo: LocalRepository, subject: Snapshot, codes: Sequence[int]) -> None:
        async def prepare(number: int) -> None:
            await repo.set_protected(subject, protected=False)

        async def act(nothing: None) -> None:
            await repo.set_protected(subject, protected=True)

        async def back(nothing: None) -> None:
            await repo.set_protected(subject, protected=False)

        async def check(nothing: None, ended_well: bool) -> None:
            await is_whole(repo)
            assert leftovers(repo.store.base) == []
            await repo.set_protected(subject, protected=True)
            assert (await repo.snapshot(subject)).protected

        assert "rename" in await at_every_call(codes, prepare, act, check)

        async def protect(number: int) -> None:
            await repo.set_protected(subject, protected=True)

        assert "unlink" in await at_every_call(codes, protect, back, check)

    @each_in_turn
    async def test_forgetting(self, repo: LocalRepository, subject: Snapshot, codes: Sequence[int]) -> None:
        async def prepare(number: int) -> Group:
            group = Group.parse(f"ct/{number}", Namespace.parse("kept"))
            for ctime in (1000, 2000):
                await write_snapshot(repo, group, ctime, {NAME: image("forgotten", 1)})
            return group

        async def act(group: Group) -> None:
            await repo.forget(group.at(1000))
            await repo.forget_group(group)

        async def check(group: Group, ended_well: bool) -> None:
            await is_whole(repo)
            if (repo.store.base / group.path).exists():
                assert not ended_well
                await repo.forget_group(group)
            assert not (repo.store.base / group.path).exists()

        calls = await at_every_call(codes, prepare, act, check)
        assert calls.count("rmdir") == 3

    @each_in_turn
    async def test_namespaces(self, repo: LocalRepository, subject: Snapshot, codes: Sequence[int]) -> None:
        a, b = Namespace.parse("a/x"), Namespace.parse("b")
        base = repo.store.base

        async def prepare(number: int) -> Group:
            return Group.parse("vm/7", a)

        async def act(group: Group) -> None:
            await repo.create_namespace(a)
            await write_snapshot(repo, group, 1000, {NAME: image("moved", 1)})
            move = await repo.move_namespace(a, b)
            if move.failed:
                return
            await repo.delete_namespace(b, groups=True)

        async def check(group: Group, ended_well: bool) -> None:
            await is_whole(repo)
            held = [one.group for ns in await repo.namespaces() for one in await repo.groups(ns)]
            assert len(held) <= 2, "a group is here or there"
            for ns in (Namespace.parse("a"), b):
                if repo.store.namespace_exists(ns):
                    await repo.delete_namespace(ns, groups=True)
            assert sorted(path.name for path in (base / "ns").iterdir()) == ["kept"]

        calls = await at_every_call(codes, prepare, act, check)
        assert len(calls) > 50


async def test_a_full_disk_is_freed_by_prune_and_garbage_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:  # noqa: ASYNC221
        pytest.skip("no right to mount a small file system")
    try:
        monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)
        (await Datastore.create(disk / "store")).close()
        repo = await open_local(disk / "store")
        try:
            await fill_and_free(repo, disk / "filler")
        finally:
            repo.close()
    finally:
        subprocess.run(["umount", str(disk)], check=True)  # noqa: ASYNC221


async def fill_and_free(repo: LocalRepository, filler: Path) -> None:
    for ctime in (1000, 2000):
        await write_snapshot(repo, GROUP, ctime, {NAME: image(ctime, 20)})
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    result = await repo.prune(GROUP, KeepOptions(last=1))
    assert [one.ctime for one in result.removed] == [1000]
    for path in chunk_files(repo.store.base):
        os.utime(path, (time.time() - 3 * DAY,) * 2)
    report = await collect_garbage(repo.store)
    assert report.status.removed_chunks == 20
    await is_whole(repo)
    await write_snapshot(repo, GROUP, 3000, {NAME: image(3000, 10)})
