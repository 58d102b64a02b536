"""Processes that work on a datastore at the same time, for the tests of garbage collection, verify and prune.

    python -m tests.support.upkeep write STORE GROUP ROUNDS SEED    back up, prune to one, all over again
    python -m tests.support.upkeep gc STORE                         one garbage collection
    python -m tests.support.upkeep verify STORE                     verify everything
    python -m tests.support.upkeep prune STORE                      prune every group to two snapshots

The last three print a line when the work begins and another when it has ended. A writer reuses old data: of a pool of
chunks that all writers share, of its own snapshot before, and new. Prints a line per problem and ends with 1 if there
was one. `let_time_pass` is the virtual clock.
"""

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from core.errors import FleeceError
from datastore.codec import ChunkCodec
from datastore.errors import LockedError
from datastore.files import Owner
from datastore.gc import collect_garbage
from datastore.locks import ChunkLocks, ProcessLocker
from datastore.names import Group
from datastore.prune import KeepOptions
from repository.local import open_local
from repository.verify import choose, verify
from tests.support.cache import ROOT
from tests.support.snapshots import CHUNK, put_all, read_image
from tests.support.stores import chunk_files

#: Chunks that writers have in common.
POOL = 12
PIECE = CHUNK
#: Seconds the virtual clock goes on at a step: more than the cut-off of garbage collection.
STEP_S = 2 * 86_400


def image(dice: random.Random, before: bytes) -> bytes:
    """The next image of a writer: of its last one, of the pool, and new."""
    pieces = []
    for number in range(8):
        kind = dice.choice("bbbpppn")
        old = before[number * PIECE : (number + 1) * PIECE]
        if kind == "b" and old:
            pieces.append(old)
        elif kind == "n":
            pieces.append(dice.randbytes(PIECE))
        else:
            pieces.append(random.Random(dice.randrange(POOL)).randbytes(PIECE))
    return b"".join(pieces)


def let_time_pass(base: Path, since: float) -> None:
    """Set chunks that nobody has used after `since` back by days, as time would; no garbage collection may run.

    `since` is the start of the oldest writer: what it and its successors touched is not made old. Chunk locks keep an
    insert from touching a chunk between look and change.
    """
    chunk_locks = ChunkLocks(base, Owner.of(base))
    try:
        for path in chunk_files(base):
            with suppress(FileNotFoundError), chunk_locks.hold(bytes.fromhex(path.name[:64])):
                found = path.stat()
                if found.st_atime < since:
                    os.utime(path, (found.st_atime - STEP_S, found.st_mtime))
    finally:
        chunk_locks.close()


def oldest_start(base: Path) -> float:
    """When the oldest writer began; now, if there is none."""
    now = time.time()
    return min([*(writer.start for writer in ProcessLocker(base, Owner.of(base)).writers()), now]) - 0.1


async def write_rounds(base: Path, group: Group, rounds: int, seed: str) -> int:
    """Back up `rounds` times, with and without a base, and check what is stored after each; returns the problems."""
    dice = random.Random(seed)
    repo = await open_local(base)
    problems, data = 0, b""
    try:
        last = await repo.latest(group)
        ctime = 1000 if last is None else last.ctime
        for number in range(rounds):
            ctime += 1
            data = image(dice, data)
            snapshot = group.at(ctime)
            async with repo.backup(snapshot) as session:
                if dice.random() < 0.8:
                    await session.previous_index("disk.img.fidx")
                await put_all(session, {"disk.img.fidx": data})
                await trio.sleep(dice.random() * 0.4)  # long enough for collections to begin meanwhile
                if dice.random() < 0.1:
                    continue  # given up; the snapshot before stays
                await session.finish()
            if last is not None:
                for attempt in range(100):
                    try:
                        await repo.forget(last)
                        break
                    except LockedError:
                        await trio.sleep(0.01 * attempt)
            last = snapshot
            await trio.sleep(dice.random() * 0.3)
            try:
                if await read_image(repo, last, "disk.img.fidx") != data:
                    raise FleeceError("read", str(last), "it holds other data")
            except FleeceError as error:
                problems += 1
                print(f"{group} round {number}: {error}", flush=True)
    finally:
        repo.close()
    return problems


def run_and_kill(what: str, base: Path, dice: random.Random) -> bool:
    """Run `gc`, `verify` or `prune` and kill it at a random moment of its work; False if that ended before.

    The last run that ended before tells how long the work takes; one in ten is let end.
    """
    command = [sys.executable, "-m", "tests.support.upkeep", what, str(base)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        begun = time.monotonic()
        delay_s = dice.random() * _work_s[what] if what in _work_s and dice.random() > 0.1 else None
        if select.select([process.stdout], [], [], delay_s)[0]:
            _work_s[what] = time.monotonic() - begun
        else:
            process.kill()
        lines = list(iter(process.stdout.readline, b""))
        ended = b"ended\n" in lines
        assert ended or process.wait() == -signal.SIGKILL, lines
        return not ended


#: Seconds that the work of a program took the last time.
_work_s: dict[str, float] = {}


async def run_gc(base: Path) -> int:
    repo = await open_local(base)
    try:
        with announced():
            report = await collect_garbage(repo.store, lock_wait_s=60)
        print(report.status.removed_chunks, report.missing_count, flush=True)
        return int(report.missing_count > 0)
    finally:
        repo.close()


async def run_verify(base: Path) -> int:
    repo = await open_local(base)
    try:
        with announced():
            results = await verify(repo, await choose(repo), ChunkCodec())
        for result in results:
            for line in result.errors:
                print(line, flush=True)
        return int(any(result.errors for result in results))
    finally:
        repo.close()


async def run_prune(base: Path) -> int:
    repo = await open_local(base)
    try:
        with announced():
            results = [await repo.prune(info.group, KeepOptions(last=2)) for info in await repo.groups()]
        return int(any(result.failed for result in results))
    finally:
        repo.close()


@contextmanager
def announced() -> Iterator[None]:
    """Say when the work in the block begins, and that it has ended."""
    print("begun", flush=True)
    yield
    print("ended", flush=True)


def main() -> int:
    """See the module."""
    what, base = sys.argv[1], Path(sys.argv[2])
    if what == "write":
        rounds, seed = int(sys.argv[4]), sys.argv[5]
        return int(trio.run(write_rounds, base, Group.parse(sys.argv[3]), rounds, seed) > 0)
    sys.modules["datastore.local_chunks"]._ACCESS_TIME_WAIT_S = 0.02  # type: ignore[attr-defined]
    return trio.run({"gc": run_gc, "verify": run_verify, "prune": run_prune}[what], base)


if __name__ == "__main__":
    sys.exit(main())
