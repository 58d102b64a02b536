"""Syncs that fail or end at any call, run twice at once, or lose what they were about to read."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from core.errors import FleeceError
from datastore.errors import LockedError
from datastore.names import Group, Snapshot
from tests.repository.sync.conftest import Pair
from tests.support.snapshots import CHUNK, read_image, write_snapshot
from tests.support.syncs import Faults, Faulty, Said, pull, push, times, write

GROUP = Group.parse("vm/100")
IMAGE = bytes([7]) * CHUNK + bytes([8]) * CHUNK
CHANGED = bytes([7]) * CHUNK + bytes([9]) * CHUNK


async def filled(pair: Pair) -> None:
    await write_snapshot(pair.source, GROUP, 1000, {"d.img.fidx": IMAGE, "c.conf.blob": b"x"})
    await write_snapshot(pair.source, GROUP, 2000, {"d.img.fidx": CHANGED, "c.conf.blob": b"x"})


async def whole(pair: Pair) -> None:
    for info in await pair.target.snapshots():
        expected = IMAGE if info.snapshot.ctime == 1000 else CHANGED
        assert await read_image(pair.target, info.snapshot, "d.img.fidx") == expected


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("kind", ["error", "cancelled"])
async def test_at_every_call(pair: Pair, side: str, kind: str) -> None:
    await filled(pair)
    call, reached = 0, 0
    while True:
        call += 1
        faults = Faults(call, FleeceError("go on", "", "planned"))
        sides: dict[str, Any] = {"source": pair.source, "target": pair.target}
        sides[side] = Faulty(sides[side], faults)
        with trio.CancelScope() as scope:
            if kind == "cancelled":
                faults.call = _cancelling(faults, scope)  # type: ignore[method-assign]
            try:
                report = await push(sides["source"], sides["target"])
            except FleeceError:
                report = None
        # What is listed is whole, and nothing else is left.
        listed = await times(pair.target, GROUP, unfinished=True)
        assert listed in ([], [1000], [1000, 2000])
        await whole(pair)
        if len(faults.calls) < call:
            assert report is not None
            assert (report.failed, listed) == ({}, [1000, 2000])
            break
        reached = max(reached, len(listed))
        again = await push(pair.source, pair.target)
        assert again.failed == {}
        assert await times(pair.target, GROUP) == [1000, 2000]
        await pair.target.forget_group(GROUP)
    assert call > 12
    assert reached >= 1


def _cancelling(faults: Faults, scope: trio.CancelScope) -> Any:
    def call(name: str) -> None:
        faults.calls.append(name)
        if len(faults.calls) == faults.fail_at:
            scope.cancel()

    return call


async def test_two_syncs_at_once_do_not_disturb_each_other(pair: Pair) -> None:
    await filled(pair)
    for name in ("vm/1", "vm/2", "vm/3"):
        await write(pair.source, name, 1000, 2000)
    reports = []

    async def one() -> None:
        reports.append(await push(pair.source, pair.target, parallel=2))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        nursery.start_soon(one)
    # Who came second to a group says so, unless it was done by then.
    for report in reports:
        assert all("another" in why or "lock" in why or "running" in why for why in report.failed.values())
    final = await push(pair.source, pair.target)
    assert final.failed == {}
    for name in ("vm/1", "vm/2", "vm/3", "vm/100"):
        assert await times(pair.target, name, unfinished=True) == [1000, 2000]
    assert await read_image(pair.target, GROUP.at(2000), "d.img.fidx") == CHANGED


async def test_a_snapshot_that_is_pruned_meanwhile_is_passed_over(pair: Pair) -> None:
    await filled(pair)
    removed: list[bool] = []

    async def snapshots(inner: Any, *given: Any, **named: Any) -> Any:
        found = await inner.snapshots(*given, **named)
        if not removed:
            removed.append(True)
            await inner.forget(GROUP.at(1000))
        return found

    said = Said()
    report = await push(Faulty(pair.source, Faults(), {"snapshots": snapshots}), pair.target, said)
    assert report.failed == {}
    assert await times(pair.target, GROUP) == [2000]
    assert "vm/100/1970-01-01T00:16:40Z was removed meanwhile: passed over" in said.lines


async def test_a_snapshot_that_is_being_read_is_not_pruned(pair: Pair) -> None:
    await filled(pair)
    tried: list[bool] = []

    async def read_blob(inner: Any, name: str, **named: Any) -> Any:
        if not tried:
            tried.append(True)
            with pytest.raises(LockedError):
                await pair.source.forget(inner.snapshot)
        return await inner.read_blob(name, **named)

    report = await pull(Faulty(pair.source, Faults(), {"reader.read_blob": read_blob}), pair.target)
    assert tried
    assert report.failed == {}
    assert await times(pair.target, GROUP) == [1000, 2000]


async def test_a_damaged_manifest_is_left_out_of_a_push_and_fails_a_pull(pair: Pair) -> None:
    await filled(pair)
    path = pair.source.store.base / GROUP.at(1000).path / "index.json.blob"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    said = Said()
    report = await pull(pair.source, pair.target)
    assert list(report.failed) == ["vm/100"]
    assert await times(pair.target, GROUP, unfinished=True) == []
    report = await push(pair.source, pair.target, said)
    assert report.failed == {}
    assert await times(pair.target, GROUP) == [2000]
    assert "is left out" in said.warnings[0]


def leave(pair: Pair, time: str) -> Path:
    """The folder of a snapshot without a manifest."""
    left = pair.target.store.base / "vm/1" / time
    left.mkdir(parents=True)
    (left.parent / "owner").write_text("root@pam\n")
    return left


@pytest.mark.parametrize("way", [push, pull])
async def test_what_a_killed_sync_left_is_synced_by_the_next_one(pair: Pair, way: Any) -> None:
    await write(pair.source, "vm/1", 1000, 2000)
    left = leave(pair, "1970-01-01T00:33:20Z")
    (left / "disk.tmp_fidx").touch()
    report = await way(pair.source, pair.target)
    assert report.failed == {}
    assert await times(pair.target, "vm/1") == [1000, 2000]


async def test_an_unfinished_snapshot_that_a_server_does_not_replace_does_not_end_the_group(pair: Pair) -> None:
    await write(pair.source, "vm/1", 1000, 2000)
    leave(pair, "1970-01-01T00:16:40Z")

    @asynccontextmanager
    async def backup(inner: Any, snapshot: Snapshot, **named: Any) -> AsyncIterator[Any]:
        if snapshot.ctime == 1000:
            raise FleeceError("back up to", str(snapshot), "backup directory already exists.")
        async with inner.backup(snapshot, **named) as session:
            yield session

    said = Said()
    report = await push(pair.source, Faulty(pair.target, Faults(), {"backup": backup}), said)
    assert report.failed == {}
    assert await times(pair.target, "vm/1") == [2000]
    assert "is left out: an unfinished one" in said.warnings[0]
