"""What nobody expected goes wrong in the middle of a mount: its users notice only what concerns them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from datastore.codec import ChunkCodec
from datastore.names import Snapshot
from datastore.reader import LocalReader
from fusefs.opened import open_snapshot
from fusefs.pool import SnapshotPool
from repository.archive import open_cache
from repository.local import open_local
from tests.fusefs.mounts import CHUNK, FIRST, random_bytes, write


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError(), RuntimeError("a fault of ours")])
async def test_what_goes_wrong_while_reading_ahead_does_not_end_the_cache(
    store_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    repo = await open_local(store_folder)
    image = random_bytes(12 * CHUNK, 1)
    snapshot = await write(repo, "vm/7", FIRST, {"a.img.fidx": image})
    broken = ChunkCodec().digest(image[4 * CHUNK : 5 * CHUNK])
    read = LocalReader.read_chunk_blocking

    def fail(self: LocalReader, digest: bytes) -> object:
        if digest == broken:
            raise error
        return read(self, digest)

    monkeypatch.setattr(LocalReader, "read_chunk_blocking", fail)
    async with open_cache() as cache, open_snapshot(repo, None, snapshot, cache) as opened:
        content = await opened.content("a.img.fidx")
        for number in range(4):
            assert bytes(await content.read(number * CHUNK, 4096)) == image[number * CHUNK : number * CHUNK + 4096]
            await trio.sleep(0.05)
        assert bytes(await content.read(6 * CHUNK, 4096)) == image[6 * CHUNK : 6 * CHUNK + 4096]
        with pytest.raises(type(error)):
            await content.read(4 * CHUNK, 4096)
    repo.close()


async def test_a_look_that_fails_in_any_way_keeps_the_snapshot_of_its_users_open() -> None:
    closed = []

    @asynccontextmanager
    async def opening(snapshot: Snapshot) -> AsyncIterator[int]:
        yield 1
        closed.append(snapshot)

    async def exists(snapshot: Snapshot) -> object:
        raise OSError(24, "Too many open files")

    async with trio.open_nursery() as nursery:
        pool = SnapshotPool(opening, exists, nursery)
        lease = await pool.acquire(Snapshot.parse("vm/1/2026-01-01T00:00:00Z"))
        entry = lease._entry
        entry.last_look -= 100
        entry.wake.set()
        await trio.sleep(0.05)
        assert len(pool) == 1
        assert not lease.stale
        assert not closed
        lease.release()
        nursery.cancel_scope.cancel()
