"""What is here and what is in the bucket, compared (R23): after objects went behind the store's back.

A local file is a claim that the object exists. A lifecycle rule or a person at a console may make it a false one, and
then backups skip the upload. The other way round, objects without a marker cost needless uploads.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from core.errors import FormatError
from core.limits import in_cpu_thread, in_io_thread
from core.nursery import open_nursery
from core.progress import Progress, Task
from datastore.blob import Blob
from datastore.files import read_file, store_errors
from datastore.s3.chunk_locks import hold
from datastore.s3.client import META_LIMIT
from datastore.s3.counters import Work, counted_as
from datastore.s3.keys import ChunkKey, MetaKey, MetaKind
from datastore.s3.opening import S3Datastore
from datastore.s3.refresh import list_local

_FOLDERS: Final = 1 << 16
_PARALLEL: Final = 8
_WAIT_S: Final = 3600.0


@dataclass(slots=True)
class ReconcileReport:
    """What was compared, and put right."""

    objects: int = 0  #: chunks in the bucket
    marked: int = 0  #: of them had no marker here
    repaired: list[bytes] = field(default_factory=list)  #: were gone, and stored again from the cache
    lost: list[bytes] = field(default_factory=list)  #: were gone; the next backup that has them stores them again


async def reconcile(
    store: S3Datastore, progress: Progress | None = None, *, dry_run: bool = False, wait_s: float = _WAIT_S
) -> ReconcileReport:
    """Compare chunk files with the bucket's chunks and put the files right; one request for 1000 chunks.

    Backups may run. Cancelled or failed, everything done so far is right.

    Args:
        store: which one.
        progress: told how far it is, and warned of what is lost.
        dry_run: change nothing; the report says what would be done.
        wait_s: how long to wait for a garbage collection.

    Raises:
        StoreError: files cannot be looked at or changed.
        LockedError: a garbage collection goes on for longer than `wait_s`.
        S3Error: the bucket is out of reach.
    """
    progress = Progress() if progress is None else progress
    with counted_as(Work.REFRESH):
        async with store.chunks.exclusive(wait_s=wait_s):
            with progress.task("compare chunks", None, "objects") as task:
                report = await _Reconcile(store, task, dry_run).run()
    if report.repaired:
        now = "can be stored again" if dry_run else "are stored again"
        progress.warn(f"{len(report.repaired)} chunks were gone from the bucket, and {now} from the cache")
    if report.lost:
        named = ", ".join(digest.hex() for digest in report.lost[:3]) + (", ..." if len(report.lost) > 3 else "")
        hint = "the next backups store those again that are still in their source; 'fleece gc' names what is lost"
        progress.warn(f"{len(report.lost)} chunks are gone from the bucket ({named}); {hint}")
    return report


class _Reconcile:
    def __init__(self, store: S3Datastore, task: Task, dry_run: bool) -> None:
        self._store, self._task, self._dry_run = store, task, dry_run
        self._chunks = store.s3.chunks
        self._report = ReconcileReport()
        self._begun = time.time()

    async def run(self) -> ReconcileReport:
        self._set_aside = await self._chunks.times_set_aside()
        after = b""  # the listing is in order: everything up to here has been compared
        async for page in self._store.client.pages(self._store.keys.chunks):
            keys = [self._store.keys.parse(listed.key) for listed in page.objects]
            there = [key.digest for key in keys if isinstance(key, ChunkKey) and key.bad is None]
            self._report.objects += len(there)
            end = max(there, default=after) if page.token is not None else b"\xff" * 32
            await self._compare(after, end, set(there))
            self._task.advance(len(page.objects))
            after = end
        return self._report

    async def _compare(self, after: bytes, end: bytes, there: set[bytes]) -> None:
        """Compare the digests behind `after` up to `end`."""
        here = await in_io_thread(self._here, after, end)
        await self._each([digest for digest in there if digest not in here], self._mark)
        await self._each([digest for digest in here if digest not in there], self._look)

    def _here(self, after: bytes, end: bytes) -> set[bytes]:
        """Chunk files in a range of digests that were not just made."""
        first = int.from_bytes(after[:2], "big") if after else 0
        last = int.from_bytes(end[:2], "big")
        found = self._chunks.files.scan(first, last - first + 1)
        return {file.digest for file in found if after < file.digest <= end}

    async def _each(self, digests: Sequence[bytes], work: Callable[[bytes], Awaitable[None]]) -> None:
        left = iter(digests)

        async def worker() -> None:
            for digest in left:
                async with hold(self._chunks.locks, digest):
                    await work(digest)

        async with open_nursery() as nursery:
            for _ in range(min(_PARALLEL, len(digests))):
                nursery.start_soon(worker)

    async def _mark(self, digest: bytes) -> None:
        """The object has no file here. A chunk that was set aside since the listing is not there any more."""
        changed = await self._chunks.times_set_aside() != self._set_aside
        if changed and await self._store.client.head(self._store.keys.chunk(digest)) is None:
            return
        if await in_io_thread(self._chunks.files.was_set_aside, digest):
            return  # the corrupt object, which could not be deleted
        if not self._dry_run:
            await in_io_thread(self._chunks.files.mark, digest)
        self._report.marked += 1

    async def _look(self, digest: bytes) -> None:
        """The file has no object in the listing: ask again, then store the chunk from the cache, or drop the claim."""
        if await self._store.client.head(self._store.keys.chunk(digest)) is not None:
            return
        if await in_io_thread(self._chunks.files.size, digest) is None:
            return  # removed meanwhile
        local = await in_io_thread(self._chunks.read_cached, digest)
        if isinstance(local, Blob) and await in_cpu_thread(self._is_sound, digest, local):
            if not self._dry_run:
                await self._store.client.put(self._store.keys.chunk(digest), (local.header, local.payload))
            self._report.repaired.append(digest)
            return
        if not self._dry_run:
            await self._chunks.forget(digest)
        self._report.lost.append(digest)

    def _is_sound(self, digest: bytes, blob: Blob) -> bool:
        try:
            self._chunks.checked(digest, blob)
        except FormatError:
            return False
        return True


@dataclass(slots=True)
class MetadataReport:
    """Metadata that is only on one side; paths in the store."""

    only_here: list[str] = field(default_factory=list)
    only_in_bucket: list[str] = field(default_factory=list)
    uploaded: int = 0


async def compare_metadata(
    store: S3Datastore, progress: Progress | None = None, *, upload: bool = False, wait_s: float = _WAIT_S
) -> MetadataReport:
    """Compare the local metadata with the bucket's by names, after a PBS of an older version deleted too much there.

    Args:
        store: which one.
        progress: warned of what is on one side only.
        upload: store in the bucket what is here only.
        wait_s: how long to wait for a garbage collection.

    Raises:
        StoreError: files cannot be read, or the store may not be written.
        S3Error: the bucket is out of reach.
    """
    progress = Progress() if progress is None else progress
    report = MetadataReport()
    with counted_as(Work.REFRESH):
        async with store.chunks.exclusive(wait_s=wait_s):
            there: set[str] = set()
            async for page in store.client.pages(store.keys.metadata):
                for listed in page.objects:
                    key = store.keys.parse(listed.key)
                    if isinstance(key, MetaKey):
                        there.add(key.path)
            with store_errors("compare the metadata of", store.base):
                here = await in_io_thread(list_local, store.base, store.keys)
            report.only_here, report.only_in_bucket = sorted(here - there), sorted(there - here)
            if upload:
                store.check_writable()
                for path in report.only_here:
                    await _upload(store, path)
                    report.uploaded += 1
    for path in report.only_here if not upload else ():
        progress.warn(f"{path} is here, but not in the bucket")
    for path in report.only_in_bucket:
        progress.warn(f"{path} is in the bucket, but not here; 'fleece datastore refresh' fetches it")
    return report


async def _upload(store: S3Datastore, path: str) -> None:
    key = store.keys.parse(store.keys.meta(path))
    data = b""
    if isinstance(key, MetaKey) and key.kind is not MetaKind.NAMESPACE:
        with store_errors("read", path):
            data = await in_io_thread(lambda: read_file(store.base / path, limit=META_LIMIT))
    await store.client.put(store.keys.meta(path), [data])
