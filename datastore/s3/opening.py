"""A datastore in a bucket, opened: its backend, its background tasks, and the client that they share."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from core.errors import FleeceError, FormatError
from core.limits import in_io_thread
from core.nursery import open_nursery
from datastore.creation import S3_STATE, check_layout
from datastore.errors import StoreError
from datastore.files import Owner, SyncLevel
from datastore.gc_status import read_status
from datastore.pbs import find_store
from datastore.s3.cache import MIN_FREE
from datastore.s3.chunks import S3ChunkStore
from datastore.s3.client import S3Client
from datastore.s3.counter_file import CounterFile
from datastore.s3.counters import Counters, Work, counted_as
from datastore.s3.endpoint import Endpoint, check_bucket
from datastore.s3.in_use import InUse
from datastore.s3.keys import StoreKeys
from datastore.s3.link import EndpointLink, RetryPolicy
from datastore.s3.meta import S3MetaStore
from datastore.s3.pacing import DEFAULT_PARALLEL
from datastore.s3.settling import settle_unknown
from datastore.s3.state import CacheState, check_complete
from datastore.s3.sweep import DELETE_GUARD_S
from datastore.store import Datastore

_LOG = logging.getLogger(__name__)
#: Seconds between two looks for what earlier failures left to be done.
_UPKEEP_EVERY_S: Final = 60.0
#: Seconds between two additions to the store's counters.
_NOTE_COUNTS_EVERY_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class S3Settings:
    """A datastore in a bucket as configured.

    Raises:
        UsageError: no name of a datastore or bucket.
    """

    name: str  #: of the datastore; all keys begin with it
    endpoint: Endpoint
    bucket: str
    cache: Path  #: the local folder
    cache_limit: int | None = None  #: bytes of cached chunks; None: four fifths of the free space
    min_free: int = MIN_FREE  #: bytes that stay free on the cache's file system
    sync_level: SyncLevel = SyncLevel.FILESYSTEM  #: of the local copy of the metadata
    parallel: int = DEFAULT_PARALLEL  #: requests at once
    delete_guard_s: float = DELETE_GUARD_S  #: garbage collection spares objects younger than this at its start (R35)

    def __post_init__(self) -> None:
        StoreKeys(self.name)
        check_bucket(self.bucket)


class S3Backend:
    """See `datastore.interface.Backend`."""

    def __init__(self, settings: S3Settings, client: S3Client, owner: Owner, instance: Callable[[], Awaitable[str]]):
        self.base: Final = settings.cache
        self.keys: Final = StoreKeys(settings.name)
        self.counter_file: Final = CounterFile(settings.cache, owner)
        self.in_use: Final = InUse(client, self.keys, instance)
        self.chunks: Final = S3ChunkStore(
            client,
            self.keys,
            self.base,
            owner,
            self.in_use,
            sync_level=settings.sync_level,
            cache_limit=settings.cache_limit,
            min_free=settings.min_free,
            parallel=settings.parallel,
            delete_guard_s=settings.delete_guard_s,
        )
        self.meta: Final = S3MetaStore(client, self.keys, self.base, owner, settings.sync_level, self.in_use)
        self.chunks.before_sweep = self.catch_up
        #: Told of a threshold of the store's counters that was passed: name, value, threshold; in a worker thread.
        self.crossed: Callable[[str, int, int], None] = self._log_crossed

    async def catch_up(self) -> None:
        """Do what earlier failures left to be done.

        Raises:
            StoreError: a note of it cannot be read or written.
            S3Error: the bucket is out of reach.
        """
        await self.meta.replay_pending()
        await settle_unknown(self.chunks)

    async def upkeep(self) -> None:
        """Catch up every minute; for a background task, which failures do not end."""
        while True:
            try:
                with counted_as(Work.OTHER):
                    await self.catch_up()
            except FleeceError as error:
                _LOG.info("%s: left for later: %s", self.keys.store, error)
            await trio.sleep(_UPKEEP_EVERY_S)

    async def note_counts(self, counters: Counters) -> None:
        """Add what is counted to the store's counters every few seconds, and at the end; for a background task."""
        noted = counters.pbs()
        try:
            while True:
                await trio.sleep(_NOTE_COUNTS_EVERY_S)
                noted = await self.add_counts(counters, noted)
        finally:
            with trio.CancelScope(shield=True):  # a system call or two
                await self.add_counts(counters, noted)

    async def add_counts(self, counters: Counters, noted: dict[str, int]) -> dict[str, int]:
        """Add what was counted since `noted` to the store's counters; returns what is noted now."""
        return await in_io_thread(self._note_counts, counters.pbs(), noted)

    def _note_counts(self, now: dict[str, int], noted: dict[str, int]) -> dict[str, int]:
        added = {name: value - noted[name] for name, value in now.items()}
        if any(added.values()) and (self.base / S3_STATE).exists():  # it may just have been destroyed
            try:
                values = self.counter_file.add(added)
            except StoreError as error:
                _LOG.info("%s: requests are not counted: %s", self.keys.store, error)
            else:
                for name, threshold in values.thresholds.items():
                    value = values.counts[name]
                    if threshold and value - added[name] <= threshold < value:  # it was us, and only now
                        self.crossed(name, value, threshold)
        return now

    def _log_crossed(self, name: str, value: int, threshold: int) -> None:
        _LOG.warning("%s: %s is %d, more than the threshold %d", self.keys.store, name, value, threshold)

    async def count_cache(self) -> None:
        """Keep the cache within its limit; for a background task, which failures do not end."""
        try:
            await self.chunks.cache.run()
        except FleeceError as error:
            _LOG.warning("%s: the cache was not looked through: %s", self.keys.store, error)

    def check_writable(self) -> None:
        """See `Backend.check_writable`: the local metadata must be complete."""
        check_complete(self.base, "write to")

    def close(self) -> None:
        """See `Backend.close`."""
        self.chunks.close()


class S3Datastore(Datastore):
    """One datastore in a bucket, open. Made by `open_store`."""

    def __init__(self, settings: S3Settings, client: S3Client) -> None:
        base = settings.cache
        owner = Owner.of(base)
        self.settings: Final = settings
        self.client: Final = client
        self.s3: Final = S3Backend(settings, client, owner, self.uuid)
        super().__init__(base, settings.sync_level, find_store(base), self.s3)

    @property
    def name(self) -> str:
        """See `Datastore.name`: that with which all keys begin."""
        return self.settings.name

    @property
    def keys(self) -> StoreKeys:
        """The keys of its objects."""
        return self.s3.keys

    def usage(self) -> tuple[int, int, int]:
        """See `StoreTree.usage`: what is used is known from the last garbage collection; a bucket has no size.

        Raises:
            StoreError: unreadable.
        """
        try:
            status = read_status(self.base)
        except FormatError:
            status = None
        return 0, 0 if status is None else status.disk_bytes + status.pending_bytes, 0

    @property
    def counters(self) -> Counters:
        """What it cost so far."""
        return self.client.link.counters


@asynccontextmanager
async def open_store(
    settings: S3Settings, *, counters: Counters | None = None, policy: RetryPolicy | None = None
) -> AsyncIterator[S3Datastore]:
    """The datastore, open while the block runs. Opening it sends nothing, so it works without the bucket.

    Args:
        settings: which one.
        counters: count its requests; shared ones may be given.
        policy: how long requests are tried.

    Raises:
        StoreError: the cache folder is none, is another store's, or belongs to a PBS of this host.
    """
    await in_io_thread(_check, settings)
    async with opened(settings, counters=counters, policy=policy) as store, open_nursery() as nursery:
        nursery.start_soon(store.s3.count_cache)
        nursery.start_soon(store.s3.upkeep)
        nursery.start_soon(store.s3.note_counts, store.counters)
        try:
            yield store
        finally:
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def opened(
    settings: S3Settings, *, counters: Counters | None = None, policy: RetryPolicy | None = None
) -> AsyncIterator[S3Datastore]:
    """As `open_store`, without a look at the folder and without background tasks; for what makes and removes stores."""
    async with EndpointLink.open(
        settings.endpoint, counters=counters, policy=policy, parallel=settings.parallel
    ) as link:
        store = await in_io_thread(S3Datastore, settings, S3Client(link, settings.bucket))
        try:
            yield store
        finally:
            store.close()


def _check(settings: S3Settings) -> None:
    base = settings.cache
    check_layout(base)
    pbs = find_store(base)
    if pbs is not None:
        why = f"PBS of this host uses it as {pbs.name!r}, and only one of them may have it open"
        raise StoreError("open datastore", str(base), why, "give Fleece a cache folder of its own")
    state = CacheState.read(base)
    if state is None:
        why = "the folder is no cache of a bucket"
        raise StoreError("open datastore", str(base), why, "'fleece datastore create --s3' makes one")
    if (state.store, state.bucket) != (settings.name, settings.bucket):
        why = f"the folder is the cache of datastore {state.store!r} in bucket {state.bucket!r}"
        raise StoreError("open datastore", str(base), why, "each datastore needs a cache folder of its own")
