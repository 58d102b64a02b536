"""Upkeep over the wire while a backup or a restore runs over the wire: every operation at every moment of each.

Whatever it does, what is listed can be restored afterwards, and no lock is left.
"""

import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from datastore.errors import LockedError, SnapshotNotFoundError
from datastore.manifest import Manifest, ManifestFile
from datastore.names import Group, Snapshot
from datastore.prune import KeepOptions
from repository.interface import BackupSession, Repository
from repository.local import LocalRepository, open_local
from tests.support.snapshots import CODEC, read_image, write_snapshot
from tests.support.stores import chunk_files
from tests.support.wire_server import wire_server

CHUNK = 4 << 20
GROUP = Group.parse("vm/100")
OLD, BASE, NEW = GROUP.at(1000), GROUP.at(2000), GROUP.at(3000)
NAME = "disk.img.fidx"
USER = "adm@pbs"
DAYS_S = 3 * 86400
#: Chunks of the three snapshots: what BASE alone has, what nobody has any more, and what only NEW has.
OF_OLD, SHARED, OF_BASE, ORPHAN, FRESH = (bytes([number]) * CHUNK for number in range(1, 6))
IMAGES = {OLD: OF_OLD + SHARED, BASE: SHARED + OF_BASE, NEW: SHARED + OF_BASE + ORPHAN + FRESH}

Operation = Callable[[Repository], Awaitable[object]]
#: What would take away what a backup is made from or into, and a restore reads.
REFUSED: dict[str, Operation] = {
    "forget the base": lambda repo: repo.forget(BASE),
    "protect the base": lambda repo: repo.set_protected(BASE, protected=True),
}
REFUSED_BESIDE_A_BACKUP: dict[str, Operation] = {
    **REFUSED,
    "forget the unfinished one": lambda repo: repo.forget(NEW),
    "forget the group": lambda repo: repo.forget_group(GROUP),
}
#: Each of these goes through, and both removals take OLD away.
COLLECT: Operation = lambda repo: repo.collect_garbage()  # noqa: E731
REMOVALS: dict[str, Operation] = {
    "prune": lambda repo: repo.prune(GROUP, KeepOptions(last=1)),
    "forget": lambda repo: repo.forget(OLD),
}
ORDERS = [("prune", True), ("forget", False)]
#: In their order; a backup is stopped behind each of them.
MOMENTS = ["open", "base read", "chunks sent", "index closed", "manifest sent"]


@dataclass
class Both:
    """Two connections to one server, and the store behind it."""

    local: LocalRepository
    ours: Repository
    theirs: Repository

    def let_days_pass(self) -> None:
        """What is stored until now was used days ago."""
        for path in chunk_files(self.local.store.base):
            found = path.stat()
            os.utime(path, (found.st_atime - DAYS_S, found.st_mtime))


@pytest.fixture
async def both(store_folder: Path, tmp_path: Path) -> AsyncIterator[Both]:
    local = await open_local(store_folder, name="main", lock_wait_s=0)
    try:
        async with wire_server(tmp_path / "server", {"main": local}) as server:
            server.right("/", USER, "Admin")
            async with server.repository(USER) as ours, server.repository(USER) as theirs:
                await write_snapshot(ours, GROUP, 500, {NAME: ORPHAN}, chunk_size=CHUNK)
                for snapshot in (OLD, BASE):
                    await write_snapshot(ours, GROUP, snapshot.ctime, {NAME: IMAGES[snapshot]}, chunk_size=CHUNK)
                await ours.forget(GROUP.at(500))
                yield Both(local, ours, theirs)
    finally:
        local.close()


async def back_up(repo: Repository, stop: Callable[[str], Awaitable[None]]) -> None:
    """Write NEW on top of BASE, and wait for `stop` behind each step."""
    image = IMAGES[NEW]
    async with repo.backup(NEW) as session:
        await stop("open")
        assert await session.previous_index(NAME) is not None
        await stop("base read")
        manifest = Manifest.new(NEW)
        manifest.add(await write_image(session, image, stop))
        await stop("index closed")
        await session.put_blob("index.json.blob", manifest.encode(CODEC))
        await stop("manifest sent")
        await session.finish()


async def write_image(session: BackupSession, image: bytes, stop: Callable[[str], Awaitable[None]]) -> ManifestFile:
    """Upload what the base does not have, wait, and write the index."""
    writer = await session.open_index(NAME, size=len(image), chunk_size=CHUNK)
    chunks = [image[offset : offset + CHUNK] for offset in range(0, len(image), CHUNK)]
    digests = CODEC.digest_many(chunks)
    sent = 0
    for chunk, digest in zip(chunks, digests, strict=True):
        if not session.knows(digest):
            await session.put_chunk(writer, digest, CHUNK, CODEC.encode(chunk))
            sent += 1
    assert sent == 2, "the base has the other two"
    await stop("chunks sent")
    await session.append(writer, [(number * CHUNK, digest) for number, digest in enumerate(digests)])
    csum = hashlib.sha256(b"".join(digests)).digest()
    await session.close_index(writer, len(digests), len(image), csum)
    return ManifestFile(NAME, CODEC.mode, len(image), csum)


async def upkeep(repo: Repository, refused: dict[str, Operation], removal: str, collect_first: bool) -> None:
    """Everything that may happen beside it; OLD is gone afterwards."""
    for name, operation in refused.items():
        with pytest.raises((LockedError, SnapshotNotFoundError)):
            print(name, await operation(repo))
    steps = [COLLECT, REMOVALS[removal]]
    for operation in steps if collect_first else reversed(steps):
        await operation(repo)


async def assert_whole(both: Both, expected: set[Snapshot]) -> None:
    """Exactly these are listed, each reads back, and nobody holds anything."""
    assert {info.snapshot for info in await both.theirs.snapshots()} == expected
    for snapshot in expected:
        assert await read_image(both.theirs, snapshot, NAME) == IMAGES[snapshot]
    assert await both.theirs.forget_group(GROUP) == []
    assert await both.theirs.groups() == []


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("removal", "collect_first"), ORDERS)
async def test_beside_a_backup(both: Both, removal: str, collect_first: bool, moment: str) -> None:
    both.let_days_pass()

    async def stop(at: str) -> None:
        if at == moment:
            await upkeep(both.theirs, REFUSED_BESIDE_A_BACKUP, removal, collect_first)

    await back_up(both.ours, stop)
    await assert_whole(both, {BASE, NEW})


@pytest.mark.parametrize(("removal", "collect_first"), ORDERS)
async def test_beside_a_backup_that_is_given_up(both: Both, removal: str, collect_first: bool) -> None:
    both.let_days_pass()

    async def stop(at: str) -> None:
        if at == "chunks sent":
            await upkeep(both.theirs, REFUSED_BESIDE_A_BACKUP, removal, collect_first)
            scope.cancel()
            await trio.lowlevel.checkpoint()

    with trio.CancelScope() as scope:
        await back_up(both.ours, stop)
    assert scope.cancelled_caught
    await assert_whole(both, {BASE})


@pytest.mark.parametrize("opened", [False, True], ids=["before its index is opened", "with its index open"])
@pytest.mark.parametrize(("removal", "collect_first"), ORDERS)
async def test_beside_a_restore(both: Both, removal: str, collect_first: bool, opened: bool) -> None:
    both.let_days_pass()
    async with both.ours.reader(BASE) as reader:
        if not opened:
            await upkeep(both.theirs, REFUSED, removal, collect_first)
        index = await reader.open_index(NAME)
        if opened:
            await upkeep(both.theirs, REFUSED, removal, collect_first)
        read = b""
        for number in range(index.count):
            digest = index.digest(number)
            blob = await reader.read_chunk(digest)
            read += CODEC.decode(blob, digest=digest, size=CHUNK, crypt_mode=CODEC.mode, where="read")
        assert read == IMAGES[BASE]
    await assert_whole(both, {BASE})
