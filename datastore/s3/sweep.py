"""The second half of garbage collection in a bucket: unused objects go, then unused files of the cache.

The bucket is listed while indexes are still being read; nothing is looked at before that has ended. Each object's file
in the cache tells its age. Objects go in batches of up to 1000 whose chunk locks are held until the answer is there.
What phase 1 marked `.using`, and no object of the listing adopts, is lost (R41).
"""

import math
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import ParkingLot

from core.errors import FleeceError, os_reason
from core.limits import in_io_thread
from core.nursery import open_nursery
from core.progress import Progress, Task
from datastore.errors import StoreError
from datastore.files import store_errors, unlink_existing
from datastore.gc_status import GcStatus, read_status
from datastore.interface import SweepGuard
from datastore.s3.cache_files import make_empty
from datastore.s3.errors import S3BackendError, S3Error, S3UnknownOutcomeError
from datastore.s3.keys import ChunkKey
from datastore.s3.sweep_cache import CacheSweep, looks_old
from datastore.s3.xml import MAX_DELETE_KEYS, Listed

if TYPE_CHECKING:
    from datastore.s3.chunks import S3ChunkStore


#: Seconds before the start of a run (or of the oldest writer) that an object must be old to go (R35).
DELETE_GUARD_S: Final = 300.0
#: Seconds that the clocks of this machine and the endpoint may differ.
_MAX_CLOCK_OFFSET_S: Final = 300.0
#: Objects in the last run from which on the bucket is listed in parallel (R38).
PARALLEL_FROM: Final = 20_000
#: Pages listed before they may be looked at, while indexes are read.
_PAGES_AHEAD: Final = 8
_LOOKERS: Final = 2
_DELETERS: Final = 4
#: Seconds that the first key of a batch waits for company; who wants to store that chunk waits as long.
_BATCH_AGE_S: Final = 30.0
#: Seconds that a request should take: some providers delete one key after the other, 12 ms each. Smaller batches let
#: all requests end at the same time then, and their locks are held for shorter.
_BATCH_S: Final = 3.0
_SMALLEST_BATCH: Final = 250
_ARCHIVE_TIERS: Final = frozenset({"GLACIER", "DEEP_ARCHIVE", "ARCHIVE"})


class _Fate(Enum):
    """What becomes of an object."""

    IN_USE = 1
    PENDING = 2  #: unused, but too young to go
    REMOVE = 3
    ADOPT = 4  #: used and there, but the cache did not know it
    KEEP_BAD = 5  #: a corrupt copy of a chunk that is lost
    STRANGE = 6  #: not to be looked at


@dataclass(slots=True)
class _Object:
    """One chunk object of the listing."""

    listed: Listed
    key: ChunkKey

    @property
    def bad(self) -> bool:
        return self.key.bad is not None


@dataclass(slots=True)
class _Looked:
    """What a worker thread found out about one page."""

    status: GcStatus = field(default_factory=GcStatus)
    doomed: list[_Object] = field(default_factory=list)  #: their locks are held
    busy: list[_Object] = field(default_factory=list)


class BucketSweep:
    """One sweep; see `ChunkStore.sweep` for the arguments."""

    def __init__(
        self,
        store: "S3ChunkStore",
        min_atime: int,
        oldest_writer: int,
        guard: SweepGuard,
        status: GcStatus,
        progress: Progress,
        *,
        dry_run: bool,
        allow_empty: bool,
    ) -> None:
        self._store = store
        self._client, self._keys, self._files, self._locks = store.client, store.keys, store.files, store.locks
        self._min_atime, self._oldest, self._guard = min_atime, oldest_writer, guard
        self._status, self._progress = status, progress
        self._dry_run, self._allow_empty = dry_run, allow_empty
        self._set_aside = 0  # chunks set aside before the bucket was listed
        self._youngest = 0.0  # LastModified from which on an object stays
        self._queue: list[_Object] = []  # doomed ones that wait for their batch
        self._queued_at = 0.0
        self._all_looked_at = False
        self._deleters = ParkingLot()  # wait for something to delete
        self._lookers = ParkingLot()  # wait until something was deleted
        self._batch_size = MAX_DELETE_KEYS
        self._busy: list[_Object] = []
        self._kept: set[bytes] = set()  # could not be deleted, or were busy: their files stay
        self._adopted: set[bytes] = set()  # in a dry run
        self._failures: list[str] = []
        self._foreign = 0
        self._archived: set[str] = set()

    async def run(self) -> list[bytes]:
        """Sweep; returns the digests of chunks that are used, but not there.

        Raises:
            StoreError: nothing may be removed, a file can be neither looked at nor removed, or one in use looks old.
            S3Error: the bucket cannot be listed.
        """
        self._set_aside = await self._store.times_set_aside()
        if not self._dry_run:
            await in_io_thread(self._store.unknown.begin)
        with self._progress.task("sweep the bucket", None, "objects") as task:
            await self._sweep_bucket(task)
        cache = CacheSweep(
            self._store, self._min_atime, self._guard, kept=self._kept, adopted=self._adopted, dry_run=self._dry_run
        )
        lost = await cache.run(self._progress)
        self._report()
        return lost

    # The bucket.

    async def _sweep_bucket(self, task: Task) -> None:
        pages, listed = trio.open_memory_channel[list[Listed]](_PAGES_AHEAD)
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(self._list, pages)
                for _ in range(_DELETERS):
                    nursery.start_soon(self._delete_batches)
                async with open_nursery() as lookers:
                    for _ in range(_LOOKERS):
                        lookers.start_soon(self._look_at_pages, listed.clone(), task)
                    listed.close()
                self._all_looked_at = True
                self._deleters.unpark_all()
            if self._busy:
                await self._look_again()
        finally:
            self._release(self._queue)

    async def _list(self, pages: trio.MemorySendChannel[list[Listed]]) -> None:
        """Hand over the listing page by page, one stream, or one for each first digit of a large bucket."""
        async with pages, open_nursery() as nursery:
            if await in_io_thread(self._was_large):
                for digit in "0123456789abcdef":
                    nursery.start_soon(self._list_prefix, self._keys.chunks + digit, pages.clone())
            else:
                nursery.start_soon(self._list_prefix, self._keys.chunks, pages.clone())

    async def _list_prefix(self, prefix: str, pages: trio.MemorySendChannel[list[Listed]]) -> None:
        async with pages, aclosing(self._client.pages(prefix)) as listing:
            async for page in listing:
                await pages.send(page.objects)

    def _was_large(self) -> bool:
        try:
            last = read_status(self._files.base)
        except FleeceError:
            return False
        return last is not None and last.disk_chunks + last.pending_chunks + last.removed_chunks > PARALLEL_FROM

    async def _look_at_pages(self, pages: trio.MemoryReceiveChannel[list[Listed]], task: Task) -> None:
        async with pages:
            await self._guard.ready()
            self._check_clock()
            async for page in pages:
                objects = self._chunk_objects(page)
                looked = await in_io_thread(self._look_at, objects)
                self._status.add(looked.status)
                self._busy += looked.busy
                if looked.doomed and not self._queue:
                    self._queued_at = trio.current_time()
                self._queue += looked.doomed
                task.advance(len(page))
                self._deleters.unpark_all()
                while len(self._queue) >= MAX_DELETE_KEYS:
                    await self._lookers.park()

    def _check_clock(self) -> None:
        offset = self._client.link.clock_offset_s or 0.0
        if abs(offset) > _MAX_CLOCK_OFFSET_S:
            raise StoreError(
                "collect garbage in",
                str(self._files.base),
                f"the clocks of this machine and the endpoint differ by {abs(offset):.0f} seconds",
                "nothing was removed; set the clock right",
            )
        self._youngest = self._oldest - self._store.delete_guard_s - abs(offset)

    def _chunk_objects(self, page: Sequence[Listed]) -> list[_Object]:
        """The chunks of a page; everything else is counted and left alone (R8)."""
        objects = []
        for listed in page:
            key = self._keys.parse(listed.key)
            if not isinstance(key, ChunkKey):
                self._foreign += 1
                continue
            if listed.storage_class in _ARCHIVE_TIERS:
                self._archived.add(listed.storage_class)
            objects.append(_Object(listed, key))
        if not self._allow_empty and not self._status.index_file_count:
            self._refuse_chunks(objects)
        return objects

    def _refuse_chunks(self, objects: Sequence[_Object]) -> None:
        """Without any index, nothing but the chunk that every store has may be there (R36)."""
        if any(one.key.digest != self._store.zero_digest for one in objects):
            raise StoreError(
                "collect garbage in",
                str(self._files.base),
                "there is not one index here, but the bucket holds chunks",
                "nothing was removed; 'fleece datastore refresh' fetches the indexes, "
                "and if all backups are meant to be gone, --allow-empty removes their chunks",
            )

    def _look_at(self, objects: Sequence[_Object]) -> _Looked:
        """In a worker thread: decide about every object of a page; those that go stay locked."""
        looked = _Looked()
        try:
            for one in objects:
                trio.from_thread.check_cancelled()
                fate = self._fate(one)
                if fate in (_Fate.REMOVE, _Fate.ADOPT) and not self._dry_run:
                    # The lock only for what is about to change, so that chunks that stay cost nothing.
                    with store_errors("lock chunk", one.listed.key):
                        if not self._locks.try_acquire(one.key.digest):
                            looked.busy.append(one)
                            continue
                    try:
                        fate = self._fate(one)
                        if fate is _Fate.REMOVE:
                            self._check_unused(one)
                            looked.doomed.append(one)
                            continue
                        if fate is _Fate.ADOPT:
                            self._adopt(one.key.digest)
                    finally:
                        if not looked.doomed or looked.doomed[-1] is not one:
                            self._locks.release(one.key.digest)
                self._count(one, fate, looked.status)
        except BaseException:
            self._release(looked.doomed)
            raise
        return looked

    def _adopt(self, digest: bytes) -> None:
        """Make a marker of an object that the listing has, under its lock.

        If chunks were set aside since the sweep began, the listing may be older than that; the bucket is asked later.
        """
        if self._store.count_set_aside() == self._set_aside:
            self._files.mark(digest)
        else:
            self._files.note_use(digest)

    def _fate(self, one: _Object) -> _Fate:
        path = self._file(one)
        try:
            found = os.stat(path, follow_symlinks=False)  # noqa: PTH116 - hot path, no Path objects
        except FileNotFoundError:
            return self._fate_unknown(one)
        except OSError as error:
            raise StoreError("look at chunk", path, os_reason(error)) from error
        if not stat.S_ISREG(found.st_mode):
            return _Fate.STRANGE
        atime = found[stat.ST_ATIME]
        if atime >= self._oldest:
            return _Fate.IN_USE
        return self._unless_young(one) if atime < self._min_atime else _Fate.PENDING

    def _fate_unknown(self, one: _Object) -> _Fate:
        used = os.path.lexists(self._files.using(one.key.digest))
        if one.bad:
            return _Fate.KEEP_BAD if used else self._unless_young(one)
        if used or one.key.digest in self._adopted or self._guard.uses(one.key.digest):
            # Beside a corrupt copy it is the original of that, which could not be deleted: the chunk is lost.
            aside = self._set_aside and self._files.was_set_aside(one.key.digest)
            return _Fate.IN_USE if aside else _Fate.ADOPT
        return self._unless_young(one)

    def _unless_young(self, one: _Object) -> _Fate:
        return _Fate.PENDING if one.listed.last_modified > self._youngest else _Fate.REMOVE

    def _check_unused(self, one: _Object) -> None:
        if not one.bad and self._guard.uses(one.key.digest):
            raise looks_old(self._files.base, one.key.digest)

    def _count(self, one: _Object, fate: _Fate, status: GcStatus) -> None:
        size = one.listed.size
        if fate is _Fate.REMOVE:
            status.removed_bytes += size
            status.removed_bad += one.bad
            status.removed_chunks += not one.bad
        elif fate is _Fate.PENDING:
            status.pending_bytes += size
            status.still_bad += one.bad
            status.pending_chunks += not one.bad
        elif fate is not _Fate.STRANGE:
            status.disk_bytes += size
            status.disk_chunks += not one.bad
            if fate is _Fate.ADOPT and self._dry_run:
                self._adopted.add(one.key.digest)

    # Deleting.

    async def _delete_batches(self) -> None:
        while batch := await self._next_batch():
            begun = trio.current_time()
            await self._delete(batch)
            if len(batch) >= _SMALLEST_BATCH:
                per_key_s = (trio.current_time() - begun) / len(batch)
                self._batch_size = int(max(_SMALLEST_BATCH, min(MAX_DELETE_KEYS, _BATCH_S / max(per_key_s, 1e-6))))

    async def _next_batch(self) -> list[_Object]:
        """What is to be deleted together next; nothing at the end."""
        while True:
            due = self._queued_at + _BATCH_AGE_S if self._queue else math.inf
            size = self._batch_size
            if len(self._queue) >= size or (self._queue and (self._all_looked_at or trio.current_time() >= due)):
                batch, self._queue = self._queue[:size], self._queue[size:]
                self._queued_at = trio.current_time()
                self._lookers.unpark_all()
                return batch
            if self._all_looked_at:
                return []
            with trio.move_on_at(due):
                await self._deleters.park()

    async def _delete(self, batch: list[_Object]) -> None:
        """Delete the objects; the locks are given back in any case.

        Their files, which claim that the objects are there, go first: killed in between, we leave objects without a
        marker, which is harmless. What the endpoint refuses to delete gets its marker again, of the old age (R39).
        What may be deleted later gets none, so that a backup stores it again (R31).
        """
        chunks = [one.key.digest for one in batch if not one.bad]
        try:
            ages = await in_io_thread(self._remove_files, batch)
            for one in batch:
                if not one.bad:
                    self._store.cache.forget(one.key.digest)
            await in_io_thread(self._store.unknown.began, chunks)
            try:
                failures = await self._client.delete_many([one.listed.key for one in batch])
            except S3BackendError:
                await in_io_thread(self._restore_files, batch, ages)
                raise
            except S3UnknownOutcomeError as error:
                # The link has told the list of unknown deletes of them.
                self._failures.append(f"{len(batch)} objects were perhaps not deleted: {error.why}")
                self._keep(batch)
                return
            except S3Error as error:
                self._failures.append(f"{len(batch)} objects were not deleted: {error.why}")
                await in_io_thread(self._restore_files, batch, ages)
                self._keep(batch)
                return
            failed = {failure.key for failure in failures}
            for failure in failures[:3]:
                self._failures.append(f"{failure.key} was not deleted: {failure.code} {failure.message}".rstrip())
            if len(failures) > 3:
                self._failures.append(f"{len(failures) - 3} more objects were not deleted")
            refused = [one for one in batch if one.listed.key in failed]
            await in_io_thread(self._restore_files, refused, ages)
            self._keep(refused)
            for one in batch:
                if one.listed.key not in failed:
                    self._count(one, _Fate.REMOVE, self._status)
        finally:
            with trio.CancelScope(shield=True):  # a few system calls
                await in_io_thread(self._store.unknown.ended, chunks)
            self._release(batch)

    def _keep(self, objects: Sequence[_Object]) -> None:
        for one in objects:
            self._kept.add(one.key.digest)
            self._count(one, _Fate.PENDING, self._status)

    def _file(self, one: _Object) -> str:
        digest, number = one.key.digest, one.key.bad
        return self._files.path(digest) if number is None else self._files.bad(digest, number)

    def _remove_files(self, objects: Sequence[_Object]) -> dict[str, tuple[float, float]]:
        """Remove the files; returns access and modification times by key."""
        ages: dict[str, tuple[float, float]] = {}
        for one in objects:
            path = self._file(one)
            with store_errors("remove chunk", path), suppress(FileNotFoundError):
                found = os.stat(path, follow_symlinks=False)  # noqa: PTH116 - as above
                unlink_existing(path)
                ages[one.listed.key] = (found.st_atime, found.st_mtime)
        return ages

    def _restore_files(self, objects: Sequence[_Object], ages: Mapping[str, tuple[float, float]]) -> None:
        """Make markers of the files that were removed."""
        for one in objects:
            if one.listed.key in ages:
                with store_errors("mark chunk", self._file(one)):
                    make_empty(self._file(one), self._store.owner)
                    os.utime(self._file(one), ages[one.listed.key])

    async def _look_again(self) -> None:
        """Look once more at what somebody held: a chunk whose corrupt copy was in a batch, or one being stored."""
        while self._busy:
            busy, self._busy = self._busy, []
            for start in range(0, len(busy), MAX_DELETE_KEYS):
                looked = await in_io_thread(self._look_at, busy[start : start + MAX_DELETE_KEYS])
                self._status.add(looked.status)
                self._busy += looked.busy
                if looked.doomed:
                    await self._delete(looked.doomed)
            if len(self._busy) == len(busy):  # somebody else holds them; several copies of one chunk go in turn
                self._kept.update(one.key.digest for one in busy)
                return

    def _release(self, objects: Sequence[_Object]) -> None:
        for one in objects:
            self._locks.release(one.key.digest)

    def _report(self) -> None:
        for text in self._failures:
            self._progress.warn(text)
        if self._foreign:
            self._progress.log(f"{self._foreign} objects below {self._keys.chunks} are no chunks; they were left alone")
        if self._archived:
            tiers = ", ".join(sorted(self._archived))
            self._progress.warn(f"chunks lie in the archive tier {tiers}: they cannot be read, and so not be restored")
