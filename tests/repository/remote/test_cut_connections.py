"""The connection ends at every frame of a small backup, and of a restore."""

import os

import pytest
import trio
import trio.testing

from core.errors import FleeceError
from datastore.names import Group
from repository.remote import reader as reader_module
from repository.remote.errors import FinishUnknownError, RemoteError, RemoteRefusedError, RemoteUnavailableError
from repository.remote.repository import RemoteRepository
from tests.support.pbs_double import PbsDouble
from tests.support.remote import remote
from tests.support.snapshots import read_image, write_snapshot
from tests.support.waiting import PATIENCE_S

CHUNK = 4 << 20
GROUP = Group.parse("vm/100")
IMAGE = bytes(range(256)) * 40
CHANGED = os.urandom(70_000)  # more than a window or a frame before the server's settings
NAME = "disk.img.fidx"


async def write(repo: RemoteRepository, ctime: int, image: bytes) -> None:
    await write_snapshot(repo, GROUP, ctime, {NAME: image, "vm.conf.blob": b"x"}, chunk_size=CHUNK)


async def count_frames(double: PbsDouble, image: bytes) -> int:
    async with remote(double) as repo:
        await write(repo, 1000, IMAGE)
        before = double.frames
        await write(repo, 2000, image)
    return double.frames - before


async def test_a_backup_that_is_cut_at_any_frame_is_whole_or_gone_and_the_next_one_succeeds() -> None:
    frames = await count_frames(PbsDouble(), CHANGED)
    assert frames > 20
    outcomes = set()
    for cut in range(1, frames + 1):
        double = PbsDouble()
        async with remote(double) as repo:
            await write(repo, 1000, IMAGE)
            double.cut_at = double.frames + cut
            lost: RemoteUnavailableError | None = None
            try:
                await write(repo, 2000, CHANGED)
            except RemoteUnavailableError as error:
                lost = error
            outcomes.add("done" if lost is None else "lost")
            if lost is not None:
                assert not isinstance(lost, FinishUnknownError)
                assert "back it up again" in str(lost)
                assert [info.snapshot.ctime for info in await repo.snapshots(unfinished=True)] == [1000]
                assert double.busy == set()
                await write(repo, 2000, CHANGED)
            assert [info.snapshot.ctime for info in await repo.snapshots()] == [1000, 2000]
            assert await read_image(repo, GROUP.at(2000), NAME) == CHANGED
    # Cut behind `finish`, the snapshot is there, and the client knows.
    assert outcomes == {"lost", "done"}


async def test_a_restore_that_is_cut_at_any_frame_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        await write(repo, 1000, CHANGED)
        before = double.frames
        assert await read_image(repo, GROUP.at(1000), NAME) == CHANGED
        frames = double.frames - before
        assert frames > 8
        for cut in range(1, frames + 1):
            double.cut_at = double.frames + cut
            connections = double.connections
            assert await read_image(repo, GROUP.at(1000), NAME) == CHANGED
            if double.cut_at is None:
                assert double.connections == connections + 2
            double.cut_at = None
        await repo.forget(GROUP.at(1000))  # nobody holds it


@pytest.mark.parametrize("state", ["done", "removed", "away"])
async def test_a_lost_answer_to_finish_is_looked_up(state: str, autojump_clock: trio.testing.MockClock) -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        double.hold_answers = {"finish"}
        if state == "done":
            await write(repo, 1000, IMAGE)
            assert sum(asked.path == "/finish" for asked in double.asked) == 1
            return

        def lose(key: object) -> None:
            if state == "removed":
                double.folders.clear()
            else:
                double.away = True

        double.on_finish = lose
        error = FinishUnknownError if state == "away" else RemoteUnavailableError
        with pytest.raises(error, match="found out" if state == "away" else "it was not finished"):
            await write(repo, 1000, IMAGE)
        assert sum(asked.path == "/finish" for asked in double.asked) == 1


async def test_a_reader_gives_up_after_a_while(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "PATIENCE_S", 30.0)
    double = PbsDouble()
    async with remote(double) as repo:
        await write(repo, 1000, IMAGE)
        async with repo.reader(GROUP.at(1000)) as reader:
            index = await reader.open_index(NAME)
            double.away, double.cut_at = True, 0
            start = trio.current_time()
            with pytest.raises(RemoteUnavailableError, match="Connection refused"):
                await reader.read_chunk(index.digest(0))
            assert 10 < trio.current_time() - start < 40
            double.away = False
            assert len(await reader.read_chunk(index.digest(0))) > 0


async def test_an_index_that_changes_between_two_connections_is_refused(
    autojump_clock: trio.testing.MockClock,
) -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        await write(repo, 1000, IMAGE)
        async with repo.reader(GROUP.at(1000)) as reader:
            index = await reader.open_index(NAME)
            folder = next(iter(double.folders.values()))
            folder.files[NAME] = folder.files[NAME][:-1] + os.urandom(1)
            double.cut_at = 0
            with pytest.raises((RemoteError, FleeceError), match="another one than before"):
                await reader.read_chunk(index.digest(0))


async def test_a_server_that_never_answers_finish_is_left_before_anybody_looks(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """While it holds the session nobody may open the snapshot, so the connection has to end first."""
    double = PbsDouble()
    async with remote(double) as repo:
        double.silent = {"finish"}
        with pytest.raises(RemoteUnavailableError, match="no answer within 3600 s, and it was not finished") as caught:
            await write(repo, 1000, IMAGE)
        assert not isinstance(caught.value, FinishUnknownError)
        double.silent = set()
        await write(repo, 2000, IMAGE)


async def test_a_backup_can_be_cancelled_while_the_server_does_not_take_the_manifest() -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        double.silent = {"blob"}  # and nothing but the manifest is one
        with trio.fail_after(PATIENCE_S):  # for ever, if the wait were shielded
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write_image, repo)
                await double.fell_silent.wait()
                nursery.cancel_scope.cancel()
        assert await repo.snapshots(unfinished=True) == []


async def write_image(repo: RemoteRepository) -> None:
    await write_snapshot(repo, GROUP, 1000, {NAME: IMAGE}, chunk_size=CHUNK)


@pytest.mark.parametrize("status", [400, 401, 403])
async def test_a_reader_that_may_not_come_back_does_not_say_that_chunks_are_missing(
    status: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Whoever verifies or syncs by it would blame the store."""
    double = PbsDouble()
    async with remote(double) as repo:
        await write(repo, 1000, IMAGE)
        async with repo.reader(GROUP.at(1000)) as reader:
            index = await reader.open_index(NAME)
            double.refuse_upgrades = (status, "maintenance mode: read-only")
            double.cut_at = 0
            for ask in (lambda: reader.read_chunk(index.digest(0)), lambda: reader.read_blob("qemu-server.conf.blob")):
                with pytest.raises(RemoteRefusedError, match="maintenance mode"):
                    await ask()
            double.refuse_upgrades = None
            assert len(await reader.read_chunk(index.digest(0))) > 0
