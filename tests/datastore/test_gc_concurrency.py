"""Garbage collection beside writers in its own and in other processes, and killed at random moments."""

import os
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from core.limits import in_io_thread
from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.gc import collect_garbage
from datastore.names import Group
from repository.local import LocalRepository, open_local
from repository.verify import VerifyOptions, choose, verify
from tests.support.cache import ROOT
from tests.support.stores import chunk_files
from tests.support.upkeep import STEP_S, let_time_pass, oldest_start, run_and_kill, write_rounds

#: Rounds of each writer, and kills; all of them with `make test-long`.
LONG = bool(os.environ.get("FLEECE_TEST_LONG"))
ROUNDS = 200 if LONG else 7
KILLS = 100 if LONG else 8


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)


@pytest.fixture
async def repo(store_folder: Path) -> AsyncIterator[LocalRepository]:
    local = await open_local(store_folder)
    yield local
    local.close()


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.support.upkeep", *arguments]


async def everything_is_whole(repo: LocalRepository) -> None:
    results = await verify(repo, await choose(repo), ChunkCodec(), options=VerifyOptions(record=False))
    assert [result.errors for result in results if result.errors] == []


@pytest.mark.timeout(1200)
async def test_beside_four_writers_in_two_processes_no_chunk_in_use_is_lost(repo: LocalRepository) -> None:
    """Two writers in this process and two in others reuse old chunks and prune to one, while it collects all the time.

    Last uses are set back by days between collections, so that whatever is not protected goes at once.
    """
    base = repo.store.base
    rounds = str(ROUNDS)
    removed = collected = 0
    done = trio.Event()

    async def collect() -> None:
        nonlocal removed, collected
        while not done.is_set():
            await in_io_thread(lambda: let_time_pass(base, oldest_start(base)))
            heard = Progress()
            report = await collect_garbage(repo.store, progress=heard)
            assert heard.warnings == []
            removed += report.status.removed_chunks
            collected += 1

    async def foreign(number: int) -> None:
        command = program("write", str(base), f"vm/{number}", rounds, f"foreign {number}")
        result = await trio.run_process(command, cwd=ROOT, capture_stdout=True, check=False)
        assert (result.returncode, result.stdout) == (0, b"")

    async def own(number: int) -> None:
        assert await write_rounds(base, Group.parse(f"vm/{number}"), int(rounds), f"own {number}") == 0

    async with trio.open_nursery() as collecting:
        collecting.start_soon(collect)
        # Again on a machine so busy that the writers were done before much was collected.
        for _ in range(10):
            async with trio.open_nursery() as writing:
                for number in (1, 2):
                    writing.start_soon(own, number)
                    writing.start_soon(foreign, number + 2)
            if collected > 2 and removed:
                break
        done.set()
    assert collected > 2
    assert removed > 0, "nothing was at stake"
    await everything_is_whole(repo)


def set_back(base: Path) -> None:
    for path in chunk_files(base):
        found = path.stat()
        os.utime(path, (found.st_atime - STEP_S, found.st_mtime))


@pytest.mark.timeout(1200)
async def test_killed_at_any_moment_it_leaves_a_whole_store_and_the_next_one_succeeds(repo: LocalRepository) -> None:
    base = repo.store.base
    dice = random.Random(5)
    assert await write_rounds(base, Group.parse("vm/1"), 2, "kept") == 0
    killed = number = 0
    while killed < KILLS:
        number += 1
        assert number < 3 * KILLS + 20
        assert await write_rounds(base, Group.parse("vm/2"), 1, f"kill {number}") == 0
        set_back(base)
        killed += await trio.to_thread.run_sync(run_and_kill, "gc", base, dice)
        await everything_is_whole(repo)
        async with repo.store.chunks.writer(wait_s=0):
            pass
    report = await collect_garbage(repo.store, lock_wait_s=0)
    assert report.missing_count == 0
    await everything_is_whole(repo)
    assert [path.name for path in base.glob(".fleece/writers/*")] == []
