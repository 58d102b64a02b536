"""Chunks in a bucket, with a cache in front: see `datastore.interface.ChunkStore`.

The order that everything rests on (R22): the object is durable in the bucket, then there is a local file or marker,
then the caller is told. The chunk's lock is held meanwhile. A crash in between costs a repeated upload that finds the
object there; the other way round it would cost the chunk.
"""

import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from core.buffers import Buffer
from core.errors import FleeceError, FormatError
from core.limits import in_cpu_thread, in_io_thread
from core.nursery import open_nursery
from core.progress import Progress
from datastore.blob import Blob
from datastore.codec import ChunkCodec
from datastore.errors import ChunkNotFoundError, StoreError
from datastore.files import Owner, SyncLevel, store_errors
from datastore.gc_status import GcStatus
from datastore.interface import PutResult, SweepGuard
from datastore.local_chunks import LocalChunkStore, check_access_times
from datastore.locks import ChunkLocks, Writer
from datastore.s3.cache import MIN_FREE, ChunkCache
from datastore.s3.cache_files import CacheFiles
from datastore.s3.chunk_locks import hold
from datastore.s3.client import CHUNK_LIMIT, S3Client
from datastore.s3.counters import Method, Work, counted_as, counted_unless_named
from datastore.s3.errors import S3BudgetError
from datastore.s3.in_use import InUse
from datastore.s3.keys import ChunkKey, StoreKeys
from datastore.s3.link import UnknownOutcome
from datastore.s3.objects import Outcome
from datastore.s3.pacing import DEFAULT_PARALLEL
from datastore.s3.state import check_complete
from datastore.s3.sweep import DELETE_GUARD_S, BucketSweep
from datastore.s3.unknown import UnknownDeletes

_LOG = logging.getLogger(__name__)
#: Chunks in memory at most, in multiples of the requests at once (R26).
_IN_MEMORY: Final = 2


@dataclass(slots=True)
class _Flight:
    """One chunk being read; others that want it wait."""

    done: trio.Event = field(default_factory=trio.Event)
    blob: Blob | None = None
    error: FleeceError | None = None  #: it ended with this; neither: the reader gave up


class S3ChunkStore:
    """The chunk store of a datastore in a bucket.

    Args:
        client: the bucket.
        keys: of the store.
        base: the cache folder, laid out as a local datastore.
        owner: of its files.
        in_use: says whether we may delete.
        sync_level: of local files that are no chunks.
        cache_limit: bytes of the cache; None takes four fifths of the free space.
        min_free: bytes that stay free on the cache's file system.
        parallel: requests at once.
        delete_guard_s: objects younger than this at the start of a garbage collection stay whatever their age here.
    """

    def __init__(
        self,
        client: S3Client,
        keys: StoreKeys,
        base: Path,
        owner: Owner,
        in_use: InUse,
        *,
        sync_level: SyncLevel = SyncLevel.FILESYSTEM,
        cache_limit: int | None = None,
        min_free: int = MIN_FREE,
        parallel: int = DEFAULT_PARALLEL,
        delete_guard_s: float = DELETE_GUARD_S,
    ) -> None:
        self.client: Final = client
        self.keys: Final = keys
        self.base: Final = base
        self.owner: Final = owner
        self.in_use: Final = in_use
        self.files: Final = CacheFiles(base, owner)
        self.locks: Final = ChunkLocks(base, owner)
        self.unknown: Final = UnknownDeletes(base, owner)
        self.cache: Final = ChunkCache(
            self.files, self.locks, limit=cache_limit, min_free=min_free, keep=self.unknown.must_stay
        )
        self.parallel: Final = parallel
        self.delete_guard_s = delete_guard_s
        self.before_sweep: Callable[[], object] | None = None  #: an async function, called before a sweep
        self._local = LocalChunkStore(base, owner, sync_level)
        self._downloads = trio.CapacityLimiter(_IN_MEMORY * parallel)
        self._flights: dict[bytes, _Flight] = {}
        self._codec = ChunkCodec()
        self._zero: bytes | None = None
        self._warned = False
        client.link.on_unknown_outcome(self._note_unknown)

    def path(self, digest: bytes) -> str:
        """Where the chunk lies in the cache, if it does."""
        return self.files.path(digest)

    # Writing

    async def insert(self, digest: bytes, blob: Blob, *, cache: bool = True, folder: str | None = None) -> PutResult:
        """See `ChunkStore.insert`; `folder` is not needed."""
        async with hold(self.locks, digest):
            known, uncertain = await in_io_thread(self._known, digest)
            if known is not None and not uncertain:
                return PutResult(True, known or len(blob))
            parts = (blob.header, blob.payload)
            if uncertain:
                # An old delete may hit at any time: the endpoint's "there already" means nothing now (R31).
                await in_io_thread(self.unknown.stored, digest)
            # Beside a corrupt copy, what the endpoint has may be the original of it, which could not be deleted.
            doubtful = uncertain or await in_io_thread(self.files.was_set_aside, digest)
            put = await self.client.put(self.keys.chunk(digest), parts, if_absent=not doubtful)
            if cache or uncertain:
                await self.cache.put(digest, parts)
            await in_io_thread(self.files.mark, digest)
        return PutResult(put.outcome is Outcome.DUPLICATE or known is not None, len(blob))

    def _known(self, digest: bytes) -> tuple[int | None, bool]:
        """Size of the local file, which is touched (R20), None if there is none; and whether it may be deleted yet."""
        return self.files.touch(digest), self.unknown.may_be_deleted(digest)

    # Reading

    async def read(self, digest: bytes, *, origin: bool = False) -> Blob:
        """See `ChunkStore.read`; what comes from the cache or goes into it is checked as far as that needs no key."""
        if origin:
            with counted_as(Work.VERIFY):
                async with self._downloads:
                    return await self.fetch(digest)
        while (flight := self._flights.get(digest)) is not None:
            await flight.done.wait()
            if flight.blob is not None:
                return flight.blob
            if flight.error is not None:
                raise flight.error
        flight = self._flights[digest] = _Flight()
        try:
            with counted_unless_named(Work.RESTORE), self.cache.pinned(digest):
                flight.blob = await self._read(digest)
            return flight.blob
        except S3BudgetError:
            raise  # of this reader's work; others may go on
        except FleeceError as error:
            # Who has waited need not try for as long again, one after the other.
            flight.error = error
            raise
        finally:
            del self._flights[digest]
            flight.done.set()

    async def read_many(self, digests: Sequence[bytes], *, origin: bool = False) -> list[Blob]:
        """See `ChunkStore.read_many`; several requests run at once."""
        found: dict[int, Blob] = {}

        async def one(number: int) -> None:
            found[number] = await self.read(digests[number], origin=origin)

        async with open_nursery() as nursery:
            for number in range(len(digests)):
                nursery.start_soon(one, number)
        return [found[number] for number in range(len(digests))]

    async def _read(self, digest: bytes) -> Blob:
        local = await in_io_thread(self.read_cached, digest)
        if isinstance(local, Blob):
            self.cache.used(digest, len(local))
            return local
        async with self._downloads:
            if local is not None:
                # There is a marker. Not under the lock: a backup that has the chunk, too, need not wait for us.
                blob = await self._fetch_sound(digest)
                await self._keep(digest, blob)
                return blob
            return await self._read_unknown(digest)

    async def _read_unknown(self, digest: bytes) -> Blob:
        """Read a chunk of which there is no marker: then the file is a new claim, so the lock is held all the time."""
        try:
            async with hold(self.locks, digest):
                local = await in_io_thread(self.read_cached, digest)
                if isinstance(local, Blob):
                    self.cache.used(digest, len(local))
                    return local
                blob = await self._fetch_sound(digest)
                if not await in_io_thread(self.unknown.may_be_deleted, digest):
                    await self._cache(digest, blob)
                return blob
        except StoreError as error:
            if error.what != "make the lock file":
                raise
            self._cannot_cache(error)  # a folder that we may only read
        return await self._fetch_sound(digest)

    async def _keep(self, digest: bytes, blob: Blob) -> None:
        """Put a chunk that was read into the cache, if its marker is still there and nobody holds it."""
        try:
            if not self.locks.try_acquire(digest):
                return
        except OSError as error:
            self._cannot_cache(error)
            return
        try:
            if await in_io_thread(self.files.size, digest) is not None:
                await self._cache(digest, blob)
        finally:
            self.locks.release(digest)

    async def _cache(self, digest: bytes, blob: Blob) -> None:
        try:
            await self.cache.put(digest, (blob.header, blob.payload))
        except StoreError as error:
            self._cannot_cache(error)

    def _cannot_cache(self, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning("nothing is cached in %s: %s", self.base, error)

    def read_cached(self, digest: bytes) -> Blob | bool | None:
        """In a worker thread: the chunk if the cache has it whole, True if there is a marker, None if nothing is known.

        A cached file that is damaged becomes a marker (R25).

        Raises:
            StoreError: it cannot be looked at.
        """
        size = self.files.size(digest)
        if not size:
            return None if size is None else True
        try:
            data = self.files.read(digest)
            if not data:  # dropped meanwhile
                return None if data is None else True
            blob = Blob.parse(data, where=digest.hex())
            blob.check(where=digest.hex())
        except (FormatError, StoreError) as error:
            _LOG.warning("the cached chunk %s is unusable (%s); it is fetched again", digest.hex(), error)
            self.files.empty(digest)
            return True
        return blob

    async def fetch(self, digest: bytes, *, fresh: bool = False) -> Blob:
        """The object as it is in the bucket, only its header checked.

        Raises:
            ChunkNotFoundError: it is absent for certain.
            FormatError: no blob.
            S3Error: as `S3Client.get`.
        """
        found = await self.client.get(self.keys.chunk(digest), limit=CHUNK_LIMIT, fresh=fresh)
        if found is None:
            raise ChunkNotFoundError("read chunk", digest.hex(), "it is not in the bucket")
        return Blob.parse(found.data, where=digest.hex())

    async def _fetch_sound(self, digest: bytes) -> Blob:
        """As `fetch`, with CRC and, if it is not encrypted, digest checked; wrong ones are fetched once more (R25)."""
        try:
            return await in_cpu_thread(self.checked, digest, await self.fetch(digest))
        except FormatError:
            return await in_cpu_thread(self.checked, digest, await self.fetch(digest, fresh=True))

    def checked(self, digest: bytes, blob: Blob) -> Blob:
        """The chunk, checked as far as that needs no key; if it needed to be decoded for that, with what it holds.

        Raises:
            FormatError: its CRC or digest is wrong.
        """
        return self._codec.opened(blob, digest, where=digest.hex())

    def disk_order(self, digests: Sequence[bytes]) -> list[int]:
        """See `ChunkStore.disk_order`: as they are, for they are asked for at once."""
        return list(range(len(digests)))

    # Garbage collection

    async def touch(self, digest: bytes) -> bool:
        """See `ChunkStore.touch`."""
        return await in_io_thread(self.files.touch, digest) is not None

    async def mark(self, digests: Buffer) -> list[bytes]:
        """See `ChunkStore.mark`. No request is sent."""
        absent = await self._local.mark(digests)

        def note() -> list[bytes]:
            return [digest for digest in absent if not self.files.note_use(digest)]

        return await in_io_thread(note) if absent else []

    async def missing(self, digests: Buffer) -> list[bytes]:
        """See `ChunkStore.missing`; asks for each chunk of which there is no marker."""
        absent = await self._local.mark(digests)
        return [digest for digest, there in zip(absent, await self.adopt(absent), strict=True) if not there]

    async def adopt(self, digests: Sequence[bytes]) -> list[bool]:
        """Look in the bucket for chunks of which there is no file, and make markers of those that are there.

        What was set aside is not: if its object is still there, it is the corrupt one, which could not be deleted.
        """
        found = dict.fromkeys(digests, False)
        left = iter(list(found))

        async def work() -> None:
            for digest in left:
                async with hold(self.locks, digest):
                    if await in_io_thread(self.files.was_set_aside, digest):
                        # A backup may have stored it anew since.
                        found[digest] = await in_io_thread(self.files.size, digest) is not None
                    elif await self.client.head(self.keys.chunk(digest)) is not None:
                        await in_io_thread(self.files.mark, digest)
                        found[digest] = True

        async with open_nursery() as nursery:
            for _ in range(min(self.parallel, len(found))):
                nursery.start_soon(work)
        return [found[digest] for digest in digests]

    async def sweep(
        self,
        min_atime: int,
        oldest_writer: int,
        guard: SweepGuard,
        status: GcStatus,
        progress: Progress,
        *,
        dry_run: bool = False,
        allow_empty: bool = False,
    ) -> list[bytes]:
        """See `ChunkStore.sweep`."""
        with counted_as(Work.GC):
            await self.in_use.check("collect garbage in", fresh=True)
            await in_io_thread(check_complete, self.base, "collect garbage in")
            if self.before_sweep is not None and not dry_run:
                await self.before_sweep()  # type: ignore[misc]
            sweep = BucketSweep(
                self, min_atime, oldest_writer, guard, status, progress, dry_run=dry_run, allow_empty=allow_empty
            )
            return await sweep.run()

    async def check_access_times(
        self, zero_digest: bytes, zero_blob: Blob, *, task_status: "trio.TaskStatus[float]" = trio.TASK_STATUS_IGNORED
    ) -> None:
        """See `ChunkStore.check_access_times`."""
        self._zero = zero_digest
        with counted_as(Work.GC):
            await check_access_times(self, self.base, self.path(zero_digest), zero_digest, zero_blob, task_status)

    @property
    def zero_digest(self) -> bytes | None:
        """The chunk that every store has, once it is known."""
        return self._zero

    # Damage

    async def quarantine(self, digest: bytes, wrong: Callable[[Blob], bool] | None = None) -> str | None:
        """See `ChunkStore.quarantine`: the object gets the first name that is free here and in the bucket (R44)."""
        await self.in_use.check("set the corrupt chunk aside in")
        async with hold(self.locks, digest):
            if wrong is not None and not await self._is_wrong(digest, wrong):
                return None
            number = await self._free_number(digest)
            with store_errors("set the corrupt chunk aside", self.path(digest)):
                await in_io_thread(self._local.note_set_aside)
            bad = self.keys.bad_chunk(digest, number)
            if not await self.client.copy(self.keys.chunk(digest), bad):
                await self.forget(digest)
                return None
            # The claim goes before the object: an object without a marker, which a kill would leave, is harmless.
            await in_io_thread(self.files.set_aside, digest, number)
            self.cache.forget(digest)
            await self.client.delete(self.keys.chunk(digest))
            # Once more, for a backup that looked in between and found the chunk in its place.
            with suppress(OSError):
                await in_io_thread(self._local.note_set_aside)
            return os.path.basename(self.files.bad(digest, number))  # noqa: PTH119

    async def _is_wrong(self, digest: bytes, wrong: Callable[[Blob], bool]) -> bool:
        """Look a last time, over a connection of its own (R43); an absent object is not wrong."""
        try:
            return await in_cpu_thread(wrong, await self.fetch(digest, fresh=True))
        except ChunkNotFoundError:
            return False
        except FormatError:
            return True

    async def _free_number(self, digest: bytes) -> int:
        for number in await in_io_thread(self.files.free_numbers, digest):
            if await self.client.head(self.keys.bad_chunk(digest, number)) is None:
                return number
        return 9

    async def repair(self, digest: bytes, wrong: Callable[[Blob], bool]) -> bool:
        """Put the cache's copy into the bucket if what is there is missing or wrong, and the copy is not (R42).

        Without such a copy the marker of a missing object goes, so that the next backup stores the chunk anew.

        Args:
            digest: the chunk.
            wrong: says so of a chunk, in a worker thread.

        Returns:
            True if the bucket has the right chunk now.

        Raises:
            S3Error: the bucket cannot be asked or written.
        """
        async with hold(self.locks, digest):
            absent = False
            try:
                if not await in_cpu_thread(wrong, await self.fetch(digest, fresh=True)):
                    return True
            except ChunkNotFoundError:
                absent = True
            except FormatError:
                pass
            local = await in_io_thread(self.read_cached, digest)
            if isinstance(local, Blob) and not await in_cpu_thread(wrong, local):
                await self.client.put(self.keys.chunk(digest), (local.header, local.payload))
                return True
            if absent:
                with store_errors("note the missing chunk", self.path(digest)):
                    await in_io_thread(self._local.note_set_aside)
                await self.forget(digest)
            return False

    async def forget(self, digest: bytes) -> None:
        """The object is gone: remove its file, so that the next backup stores it anew; the caller holds the lock.

        Raises:
            StoreError: no rights.
        """
        await in_io_thread(self.files.remove, digest)
        self.cache.forget(digest)

    async def times_set_aside(self) -> int:
        """See `ChunkStore.times_set_aside`."""
        return await self._local.times_set_aside()

    def count_set_aside(self) -> int:
        """As `times_set_aside`, in a worker thread."""
        return self._local.count_set_aside()

    def _note_unknown(self, outcome: UnknownOutcome) -> None:
        if outcome.method not in (Method.POST, Method.DELETE):
            return
        parsed = map(self.keys.parse, outcome.keys)
        digests = [key.digest for key in parsed if isinstance(key, ChunkKey) and key.bad is None]
        if not digests:
            return
        try:
            self.unknown.add(digests)
        except StoreError as error:
            # Whoever waits for the answer has an error of his own, or is being cancelled.
            _LOG.error("other processes are not told of %d deletes that may still happen: %s", len(digests), error)

    # The store as a whole

    @asynccontextmanager
    async def writer(self, *, wait_s: float) -> AsyncIterator[Writer]:
        """See `ChunkStore.writer`.

        Raises:
            StoreError: the local metadata is not complete, or being refreshed.
        """
        async with self._local.writer(wait_s=wait_s) as writer:
            # After registering: a refresh waits for those that have registered before it began.
            await in_io_thread(check_complete, self.base, "write to")
            with counted_as(Work.BACKUP):
                yield writer

    @asynccontextmanager
    async def exclusive(self, *, wait_s: float) -> AsyncIterator[float | None]:
        """See `ChunkStore.exclusive`."""
        async with self._local.exclusive(wait_s=wait_s) as oldest:
            yield oldest

    def close(self) -> None:
        """Close the descriptors that are kept."""
        self.locks.close()
        self._local.close()
