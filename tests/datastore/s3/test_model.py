"""Random interleavings of everything that stores, moves and deletes chunks: what a snapshot needs is always there.

Each round starts a few kinds of work at once over one bucket: backups with and without the cache, verify that sets
chunks aside, prune, garbage collection, caches that lose files, and requests that fail, are lost, or happen late. After
each round the clock is moved on by days. Backups that are cut off are crashes: nothing of them is cleaned up.
"""

import hashlib
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from core.errors import FleeceError
from core.progress import Progress
from datastore.crypt_mode import CryptMode
from datastore.gc import collect_garbage
from datastore.manifest import Manifest, ManifestFile
from datastore.names import Group, Snapshot
from datastore.s3.opening import S3Datastore
from datastore.upid import Upid
from repository.local import LocalRepository
from repository.users import record_users
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_stores import s3_store
from tests.support.snapshots import CODEC, put_file
from tests.support.stores import StorePool

PIECE = 512
POOL = 12
DAY_S = 86_400


def pieces(dice: random.Random) -> list[bytes]:
    return [bytes([dice.randrange(POOL)]) * PIECE for _ in range(4)]


class Model:
    """One bucket, one cache, and what must be in the bucket."""

    def __init__(self, store: S3Datastore, emulator: S3Emulator, dice: random.Random) -> None:
        self.store, self.emulator, self.dice = store, emulator, dice
        self.repo = LocalRepository(store, "model")
        self.needed: dict[Snapshot, set[bytes]] = {}  #: chunks of finished snapshots
        self.running: dict[int, set[bytes]] = {}  #: chunks that running backups have stored
        self.excused: set[bytes] = set()  #: set aside since: the next backup stores them again
        self.time = 1000
        self.did: set[str] = set()

    async def backup(self, group: Group) -> None:
        self.time += 1
        ctime = self.time
        stored: set[bytes] = set()
        self.running[ctime] = stored
        try:
            with suppress(FleeceError):
                async with self.repo.backup(group.at(ctime)) as session:
                    data = pieces(self.dice)
                    writer = await session.open_index("disk.img.fidx", size=len(data) * PIECE, chunk_size=PIECE)
                    cache = self.dice.random() < 0.6
                    if self.dice.random() < 0.7:
                        await session.previous_index("disk.img.fidx")
                    known = [CODEC.digest(piece) for piece in data]
                    for piece, digest in zip(data, known, strict=True):
                        if not session.knows(digest):
                            await self.store.chunks.insert(digest, CODEC.encode(piece), cache=cache)
                            session.chunk_was_put(digest, PIECE)
                            self.excused.discard(digest)
                            stored.add(digest)
                        await trio.sleep(self.dice.random() * 0.01)
                    await session.append(writer, [(number * PIECE, digest) for number, digest in enumerate(known)])
                    csum = hashlib.sha256(b"".join(known)).digest()
                    await session.close_index(writer, len(known), len(data) * PIECE, csum)
                    manifest = Manifest.new(session.snapshot)
                    manifest.add(ManifestFile("disk.img.fidx", CryptMode.NONE, len(data) * PIECE, csum))
                    manifest.add(await put_file(session, "a.conf.blob", b"x"))
                    await session.put_blob("index.json.blob", manifest.encode(CODEC))
                    await session.finish()
                    self.needed[session.snapshot] = set(known)
                    self.did.add("cached" if cache else "not cached")
        finally:
            del self.running[ctime]

    async def prune(self) -> None:
        if len(self.needed) > 1:
            snapshot = self.dice.choice(sorted(self.needed, key=str)[:-1])
            chunks = self.needed.pop(snapshot)
            try:
                await self.repo.forget(snapshot)
                self.did.add("prune")
            except FleeceError:
                if await trio.to_thread.run_sync(self.store.is_finished, snapshot):
                    self.needed[snapshot] = chunks

    async def collect(self) -> None:
        with suppress(FleeceError):
            await collect_garbage(self.store)
            self.did.add("gc")

    async def set_aside(self) -> None:
        """As verify does: the snapshots that use the chunk are recorded as failed first."""
        digest = CODEC.digest(bytes([self.dice.randrange(POOL)]) * PIECE)
        if any(digest in chunks for chunks in self.running.values()):
            return
        try:
            for snapshot, chunks in list(self.needed.items()):
                if digest in chunks:
                    await self.repo.record_verification(snapshot, "failed", "")
            self.excused.add(digest)
            if await self.store.chunks.quarantine(digest) is None:
                return
            self.excused.add(digest)  # a backup may have found it there until then; it finds out at its end
        except FleeceError:
            return
        self.did.add("set aside")
        await record_users(self.repo, self.repo, [digest], (), Progress(), Upid.new("verify", "model"))

    async def lose_cache(self) -> None:
        """Content and markers of the cache go, as on a disk that was replaced; only between rounds."""
        for path in self.files():
            if self.dice.random() < 0.5:
                path.unlink()
        self.did.add("cache lost")

    def files(self) -> list[Path]:
        """Everything in the chunk folders; only those that can hold something are looked at."""
        digests = [CODEC.zero_digest(4 << 20), *(CODEC.digest(bytes([number]) * PIECE) for number in range(POOL))]
        folders = {Path(self.store.s3.chunks.path(digest)).parent for digest in digests}
        return sorted(path for folder in folders for path in folder.iterdir())

    def days_pass(self) -> None:
        for path in self.files():
            os.utime(path, (path.stat().st_atime - 2 * DAY_S, 1))
        with self.emulator.lock:
            for stored in self.emulator.bucket.objects.values():
                stored.last_modified -= 2 * DAY_S

    def check(self) -> None:
        with self.emulator.lock:
            there = set(self.emulator.bucket.objects)
        for snapshot, chunks in list(self.needed.items()):
            for digest in chunks - self.excused:
                assert self.store.keys.chunk(digest) in there, f"{snapshot} lacks {digest.hex()}"

    async def round(self) -> None:
        """Several kinds of work at once; some are cut off in the middle."""
        for kind in ("PUT", "POST", "GET", "LIST", "HEAD", "COPY", "DELETE"):
            if self.dice.random() < 0.3:
                fault = self.dice.choice(["reset", "lost"])
                self.emulator.plan(kind, fault, skip=self.dice.randrange(4))  # type: ignore[arg-type]

        async def cut_off(group: Group) -> None:
            with trio.move_on_after(self.dice.random() * 0.3):
                await self.backup(group)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                group = Group.parse(f"vm/{number}")
                nursery.start_soon(cut_off if self.dice.random() < 0.3 else self.backup, group)
            for work in (self.prune, self.collect, self.set_aside):
                if self.dice.random() < 0.7:
                    nursery.start_soon(work)
        self.emulator.faults.clear()
        self.check()


@pytest.mark.parametrize("seed", range(4))
async def test_no_chunk_that_a_snapshot_needs_is_ever_absent(
    store_pool: StorePool, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)
    dice = random.Random(seed)
    base = store_pool.lend()
    try:
        did: set[str] = set()
        for _ in range(2):  # the second time with what the first one left
            async with s3_store(base, s3_emulator.endpoint(), delete_guard_s=300.0, cache_limit=4 * PIECE) as store:
                model = Model(store, s3_emulator, dice)
                model.time = 1000 + len(s3_emulator.log)
                for _ in range(5):
                    await model.round()
                    model.days_pass()
                    if dice.random() < 0.3:
                        await model.lose_cache()
                await model.collect()
                model.check()
                did |= model.did
                for snapshot in list(model.needed):
                    with suppress(FleeceError):
                        await model.repo.forget(snapshot)
        assert {"gc", "cached", "prune"} <= did
    finally:
        store_pool.take_back(base)
