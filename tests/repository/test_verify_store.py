"""Verify of a real datastore: what it records, what it sets aside, what it leaves alone, and how that heals."""

import errno
import os
import random
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from core.errors import FleeceError
from core.progress import Progress
from datastore.blob import Blob
from datastore.changes import update_manifest
from datastore.codec import ChunkCodec
from datastore.errors import StoreError
from datastore.gc import collect_garbage
from datastore.names import Group, Namespace, Snapshot
from datastore.upid import Upid
from repository.local import LocalRepository, open_local
from repository.verify import VerifyOptions, VerifyResult, choose, verify
from tests.support.snapshots import CHUNK, write_snapshot
from tests.support.stores import chunk_files
from tests.support.upkeep import run_and_kill

CODEC = ChunkCodec()
DAY = 86_400
NEW = VerifyOptions(ignore_verified=True)
KILLS = 50 if os.environ.get("FLEECE_TEST_LONG") else 8


@pytest.fixture
async def repo(store_folder: Path) -> AsyncIterator[LocalRepository]:
    local = await open_local(store_folder)
    yield local
    local.close()


def image(seed: object, chunks: int = 3) -> bytes:
    return random.Random(str(seed)).randbytes(chunks * CHUNK)


def chunk_path(repo: LocalRepository, data: bytes) -> Path:
    name = CODEC.digest(data).hex()
    return repo.store.base / ".chunks" / name[:4] / name


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


async def write(repo: LocalRepository, ctime: int, data: bytes, group: str | Group = "vm/100") -> Snapshot:
    return await write_snapshot(repo, group, ctime, {"disk.img.fidx": data})


async def run(repo: LocalRepository, options: VerifyOptions | None = None, **more: Any) -> list[VerifyResult]:
    return await verify(repo, await choose(repo), CODEC, options=options, **more)


async def states(repo: LocalRepository) -> dict[Snapshot, str | None]:
    infos = await repo.snapshots()
    return {info.snapshot: None if info.verification is None else info.verification["state"] for info in infos}


async def test_result_is_recorded_as_pbs_does(repo: LocalRepository) -> None:
    snapshot = await write(repo, 1000, image(1))
    before = repo.store.read_manifest(snapshot)
    await run(repo)
    info = await repo.snapshot(snapshot)
    assert info.verification is not None
    assert set(info.verification) == {"state", "upid"}
    upid = Upid.parse(info.verification["upid"])
    assert (info.verification["state"], upid.kind, upid.pid) == ("ok", "verify", os.getpid())
    assert repo.store.read_manifest(snapshot) != before
    assert (repo.store.base / snapshot.path / "index.json.blob").stat().st_mode & 0o777 == 0o644


async def test_order_is_that_of_pbs_and_benchmark_is_left_out(repo: LocalRepository) -> None:
    for group, ctime in (("vm/100", 1), ("vm/99", 1), ("vm/99", 2), ("host/benchmark", 1), ("ct/x", 1)):
        await write(repo, 1000 + ctime, image(1), group)
    inner = Group.parse("host/a", Namespace.parse("n"))
    await write(repo, 1001, image(1), inner)
    chosen = [f"{one.group.ns}:{one.group}/{one.ctime}" for one in await choose(repo)]
    assert chosen == [":ct/x/1001", ":vm/99/1002", ":vm/99/1001", ":vm/100/1001", "n:host/a/1001"]
    assert await choose(repo, Namespace.parse("n")) == [inner.at(1001)]


class TestCorruptChunks:
    async def test_they_are_set_aside_and_heal_with_the_next_backup(self, repo: LocalRepository) -> None:
        data = image(1)
        first = await write(repo, 1000, data)
        path = chunk_path(repo, data[:CHUNK])
        flip(path)
        broken = path.read_bytes()
        (result,) = await run(repo)
        assert result.state == "failed"
        assert f"the chunk is set aside as {path.name}.0.bad" in result.errors[0]
        assert not path.exists()
        assert path.with_name(f"{path.name}.0.bad").read_bytes() == broken
        assert await states(repo) == {first: "failed"}
        async with repo.backup(first.group.at(1500)) as session:
            assert session.base is None, "no backup builds on a failed one"
        second = await write(repo, 2000, data)
        assert [result.state for result in await run(repo, NEW)] == ["ok", "ok"], "failed ones are looked at again"
        assert await states(repo) == {first: "ok", second: "ok"}
        bad = path.with_name(f"{path.name}.0.bad")
        os.utime(bad, (1, 1))
        assert (await collect_garbage(repo.store)).status.removed_bad == 1

    async def test_every_snapshot_that_uses_one_is_found_looked_at_or_not(self, repo: LocalRepository) -> None:
        shared = image("shared", 1)
        one = await write(repo, 1000, shared + image(1), "vm/1")
        two = await write(repo, 1000, image(2) + shared, "vm/2")
        three = await write(repo, 1000, image(3), "vm/3")
        four = await write(repo, 1000, shared, Group.parse("vm/4", Namespace.parse("deep")))
        assert [result.state for result in await run(repo)] == ["ok"] * 4
        flip(chunk_path(repo, shared))
        heard = Progress()
        results = await verify(repo, [one], CODEC, heard)
        assert [result.state for result in results] == ["failed"]
        assert await states(repo) == {one: "failed", two: "failed", three: "ok"}
        assert (await repo.snapshot(four)).verification != (await repo.snapshot(three)).verification
        assert sum(CODEC.digest(shared).hex() in line for line in heard.warnings) == 2

    @pytest.mark.parametrize("content", [b"", b"short", bytes(100), b"x" * 70_000], ids=["empty", "short", "0", "x"])
    async def test_what_is_no_blob_is_set_aside(self, repo: LocalRepository, content: bytes) -> None:
        await write(repo, 1000, image(1))
        path = chunk_path(repo, image(1)[:CHUNK])
        path.write_bytes(content)
        (result,) = await run(repo)
        assert len(result.errors) == 1
        assert path.with_name(f"{path.name}.0.bad").read_bytes() == content

    async def test_digest_mismatch_of_the_last_chunk_is_recorded(self, repo: LocalRepository) -> None:
        """PBS 4.1.1 records `ok` here: it counts the errors before its decoders have ended."""
        data = image(1, 2)
        snapshot = await write(repo, 1000, data)
        path = chunk_path(repo, data[CHUNK:])
        for _ in range(5):
            path.write_bytes(bytes(CODEC.encode(b"of another content")))
            assert [result.state for result in await run(repo)] == ["failed"]
            assert await states(repo) == {snapshot: "failed"}
            assert not path.exists()

    async def test_unset_entries_of_an_index_are_missing_chunks(self, repo: LocalRepository) -> None:
        """PBS closes such an index; verify finds it."""
        import hashlib
        from dataclasses import replace

        from datastore.manifest import Manifest

        snapshot = await write(repo, 1000, image(1))
        path = repo.store.base / snapshot.path / "disk.img.fidx"
        path.write_bytes(path.read_bytes()[:-32] + bytes(32))
        manifest = Manifest.parse(repo.store.read_manifest(snapshot), where="")
        new = Manifest.new(snapshot)
        csum = hashlib.sha256(path.read_bytes()[4096:]).digest()
        new.add(replace(manifest.file("disk.img.fidx"), csum=csum))
        (repo.store.base / snapshot.path / "index.json.blob").write_bytes(bytes(new.encode()))
        (result,) = await run(repo)
        assert bytes(32).hex() in result.errors[0]
        assert "not in the store" in result.errors[0]

    async def test_wrong_once_and_right_at_the_second_look_stays(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A bit that flips in memory or on a cable condemns no chunk."""
        await write(repo, 1000, image(1))
        store = repo.store.chunks
        real, calls = store.read_blocking, []  # type: ignore[attr-defined]

        def flaky(digest: bytes) -> Blob:
            calls.append(digest)
            blob: Blob = real(digest)
            return blob if len(calls) > 1 else Blob(blob.kind, blob.crc ^ 1, blob.payload)

        monkeypatch.setattr(store, "read_blocking", flaky)
        heard = Progress()
        results = await run(repo, progress=heard)
        assert [result.state for result in results] == ["ok"]
        assert "right at the second" in heard.warnings[0]
        assert not [path for path in chunk_files(repo.store.base) if path.suffix == ".bad"]

    async def test_chunk_that_is_stored_anew_between_look_and_rename_stays(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = image(1, 1)
        await write(repo, 1000, data)
        path = chunk_path(repo, data)
        good = path.read_bytes()
        path.write_bytes(b"")
        real = repo.quarantine

        async def late(digest: bytes, wrong: Any) -> str | None:
            path.write_bytes(good)
            return await real(digest, wrong)

        monkeypatch.setattr(repo, "quarantine", late)
        await run(repo)
        assert path.read_bytes() == good

    @pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM])
    async def test_what_the_system_cannot_read_is_not_renamed_and_stops_the_run(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        """PBS sets such chunks aside, one after the other: a whole store, if the rights are wrong."""
        few = await write(repo, 1000, image(1), "vm/1")
        many = await write(repo, 1000, image(2, 30), "vm/2")

        def refuse(path: object, **_: object) -> bytes:
            raise OSError(code, os.strerror(code), str(path))

        monkeypatch.setattr("datastore.local_chunks.read_file", refuse)
        with pytest.raises(FleeceError, match="20 chunks in a row could not be read"):
            await run(repo)
        assert not [path for path in chunk_files(repo.store.base) if path.suffix == ".bad"]
        assert await states(repo) == {few: "failed", many: None}

    async def test_no_record_changes_nothing(self, repo: LocalRepository) -> None:
        await write(repo, 1000, image(1))
        path = chunk_path(repo, image(1)[:CHUNK])
        flip(path)
        before = {one: one.read_bytes() for one in repo.store.base.rglob("*") if one.is_file()}
        assert [result.state for result in await run(repo, VerifyOptions(record=False))] == ["failed"]
        after = {one: one.read_bytes() for one in repo.store.base.rglob("*") if one.is_file()}
        assert {one: after[one] for one in after if ".fleece" not in one.parts} == {
            one: before[one] for one in before if ".fleece" not in one.parts
        }

    async def test_store_that_cannot_be_written_is_only_looked_at(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await write(repo, 1000, image(1))

        def refuse() -> None:
            raise StoreError("write to", "it", "PBS has it in maintenance mode 'read-only'")

        monkeypatch.setattr(repo.store, "check_writable", refuse)
        heard = Progress()
        assert [result.state for result in await run(repo, progress=heard)] == ["ok"]
        assert "maintenance" in heard.warnings[0]
        assert list((await states(repo)).values()) == [None]


class TestOptions:
    async def record(self, repo: LocalRepository, snapshot: Snapshot, state: str, days: float) -> None:
        upid = Upid("host", 1, 1, 1, int(time.time() - days * DAY), "verify", "x", "root@pam")
        await update_manifest(repo.store, snapshot, {"verify_state": {"state": state, "upid": str(upid)}})

    @pytest.mark.parametrize(
        ("state", "days", "outdated_after", "looked_at"),
        [
            ("ok", 400, None, False),
            ("ok", 2.5, 2, False),
            ("ok", 3.1, 2, True),
            ("ok", 0.9, 0, False),
            ("ok", 1.1, 0, True),
            ("failed", 0, None, True),
            ("failed", 0, 30, True),
        ],
    )
    async def test_what_was_verified_before_is_passed_over(
        self, repo: LocalRepository, state: str, days: float, outdated_after: int | None, looked_at: bool
    ) -> None:
        snapshot = await write(repo, 1000, image(1))
        await self.record(repo, snapshot, state, days)
        (result,) = await run(repo, VerifyOptions(ignore_verified=True, outdated_after=outdated_after))
        assert (not result.skipped) == looked_at
        assert result.state == "ok"

    async def test_state_without_a_time_is_no_reason_to_pass_over(self, repo: LocalRepository) -> None:
        snapshot = await write(repo, 1000, image(1))
        await update_manifest(repo.store, snapshot, {"verify_state": {"state": "ok", "upid": "yesterday"}})
        assert not (await run(repo, NEW))[0].skipped

    async def test_limits_end_the_run_between_snapshots_and_the_next_one_goes_on(self, repo: LocalRepository) -> None:
        for number in range(5):
            await write(repo, 1000, image(number), f"vm/{number}")
        for options, count in [
            (VerifyOptions(ignore_verified=True, max_bytes=4 * CHUNK), 2),
            (VerifyOptions(ignore_verified=True, max_duration_s=0.0), 0),
            (VerifyOptions(ignore_verified=True, max_bytes=CHUNK), 1),
        ]:
            heard = Progress()
            results = await run(repo, options, progress=heard)
            assert sum(not result.skipped for result in results) == count
            assert "not looked at" in heard.warnings[-1]
        assert list((await states(repo)).values()) == ["ok"] * 3 + [None] * 2
        assert sum(not result.skipped for result in await run(repo, NEW)) == 2

    async def test_busy_snapshot_is_skipped_and_busy_manifest_counts_as_failed(
        self, repo: LocalRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("datastore.locks.MANIFEST_WAIT_S", 0.1)
        snapshot = await write(repo, 1000, image(1))
        async with repo.store.locks.snapshot(snapshot, shared=False):
            (result,) = await run(repo)
        assert (result.state, result.skipped.partition(" ")[0]) == ("ok", "locked")
        async with repo.store.locks.manifest(snapshot):
            (result,) = await run(repo)
        assert "could not be recorded" in result.errors[0]
        assert await states(repo) == {snapshot: None}


async def test_golden_store_is_sound_and_says_so(golden: Path, repo: LocalRepository) -> None:
    with tarfile.open(golden / "store.tar") as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(repo.store.base)
    theirs = [info.verification for info in await repo.snapshots()]
    assert all(Upid.parse(one["upid"]).id for one in theirs if one is not None)
    assert str(Upid.parse(theirs[0]["upid"])) == theirs[0]["upid"]  # type: ignore[index]
    assert all(result.skipped for result in await run(repo, NEW))
    results = await run(repo)
    assert [result.errors for result in results if result.errors] == []
    assert len(results) == len(theirs) + 1, "those of the root, and the one in namespace a/b"
    report = await collect_garbage(repo.store)
    assert (report.status.disk_chunks, report.missing_count) == (65, 0)


@pytest.mark.timeout(1200)
async def test_killed_at_any_moment_it_leaves_a_store_that_opens_heals_and_collects(repo: LocalRepository) -> None:
    dice = random.Random(3)
    group, data = Group.parse("vm/100"), image("killed", 40)
    killed = number = 0
    while killed < KILLS:
        number += 1
        assert number < 3 * KILLS + 20
        await write(repo, 1000 + 2 * number, data, group)
        victims = [data[at * CHUNK : (at + 1) * CHUNK] for at in dice.sample(range(40), k=3)]
        for victim in victims:
            flip(chunk_path(repo, victim))
        killed += await trio.to_thread.run_sync(run_and_kill, "verify", repo.store.base, dice)
        await run(repo)
        await write(repo, 1001 + 2 * number, data, group)
        results = await run(repo)
        assert [result.errors for result in results if result.errors] == []
        for info in (await repo.snapshots())[:-1]:
            await repo.forget(info.snapshot)
    report = await collect_garbage(repo.store)
    assert report.missing_count == 0
