"""Chunks compared with the listing of their bucket: what is gone, or cannot be what it was, without reading it (R45).

One request for 1000 chunks. A chunk must be listed with a size that it can have; where the cache has a copy, size and
MD5 must be those of the copy. What looks wrong is then asked for itself, and repaired from the cache if possible.
"""

import hashlib
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from core.errors import FleeceError, FormatError
from core.limits import in_cpu_thread, in_io_thread
from core.nursery import open_nursery
from core.progress import Progress, Task
from datastore.blob import Blob
from datastore.digests import DigestSet
from datastore.errors import ChunkNotFoundError, StoreError
from datastore.s3.counters import Work, counted_as
from datastore.s3.keys import ChunkKey
from datastore.s3.opening import S3Datastore
from datastore.s3.xml import Listed

#: Bytes that an encoded chunk has more than its plain data at most: the header of an encrypted one.
_HEADER: Final = 44
#: Bytes of the shortest encoded chunk: a header and one byte.
_SHORTEST: Final = 13
#: Chunks in a row that are not listed as they must be from which on it is the bucket, not the chunks (R43).
MAX_BAD_IN_A_ROW: Final = 20
_PARALLEL: Final = 8
_ARCHIVE_TIERS: Final = frozenset({"GLACIER", "DEEP_ARCHIVE", "ARCHIVE"})


@dataclass(slots=True)
class ListingReport:
    """What a comparison found."""

    listed: int = 0  #: of the wanted chunks
    compared: int = 0  #: of them with a copy in the cache
    repaired: list[bytes] = field(default_factory=list)  #: were gone or wrong, and stored again from the cache
    bad: dict[bytes, str] = field(default_factory=dict)  #: digest -> what is wrong
    archived: int = 0  #: chunks in a tier that cannot be read


async def compare_listing(
    store: S3Datastore, wanted: DigestSet, progress: Progress | None = None, *, change: bool = True
) -> ListingReport:
    """Compare `wanted` (digests with plain sizes) with what the bucket lists.

    Args:
        store: which one.
        wanted: chunks that must be there.
        progress: told how far it is.
        change: repair from the cache, and drop the markers of chunks that are gone, so that a backup stores them anew.

    Raises:
        FleeceError: so many chunks in a row are missing or wrong that it is the bucket; nothing was changed.
        S3Error: the bucket is out of reach.
        StoreError: the cache cannot be read or written.
    """
    progress = Progress() if progress is None else progress
    report = ListingReport()
    with counted_as(Work.VERIFY):
        found = DigestSet()
        suspects: dict[bytes, str] = {}
        with progress.task("compare with the listing", None, "objects") as task:
            async with aclosing(store.client.pages(store.keys.chunks)) as pages:
                async for page in pages:
                    await _page(store, page.objects, wanted, found, suspects, report)
                    task.advance(len(page.objects))
        row = 0
        for digest, _ in wanted.ascending():
            if digest not in found:
                suspects[digest] = "it is not in the bucket"
            row = row + 1 if digest in suspects else 0
            if row > MAX_BAD_IN_A_ROW:
                raise FleeceError(
                    "verify",
                    store.name,
                    f"more than {MAX_BAD_IN_A_ROW} chunks in a row are not in the bucket as they must be",
                    "nothing was changed; is it the right bucket?",
                )
        with progress.task("look again", len(suspects), "chunks") as task:
            await _look_again(store, suspects, report, task, change)
    if report.archived:
        progress.warn(f"{report.archived} chunks lie in an archive tier: they cannot be read, and so not be restored")
    return report


async def _page(
    store: S3Datastore,
    objects: Sequence[Listed],
    wanted: DigestSet,
    found: DigestSet,
    suspects: dict[bytes, str],
    report: ListingReport,
) -> None:
    here: list[tuple[bytes, int, Listed]] = []
    for listed in objects:
        key = store.keys.parse(listed.key)
        if isinstance(key, ChunkKey) and key.bad is None and (size := wanted.size_of(key.digest)) is not None:
            here.append((key.digest, size, listed))
            found.add(key.digest, 0)
            report.archived += listed.storage_class in _ARCHIVE_TIERS

    def compare() -> int:
        compared = 0
        for digest, size, listed in here:
            if not _SHORTEST <= listed.size <= size + _HEADER:
                suspects[digest] = f"the object has {listed.size} bytes, the chunk has {size}"
                continue
            try:
                data = store.s3.chunks.files.read(digest)
            except StoreError:
                continue
            if not data:
                continue
            compared += 1
            etag = listed.etag.lower()
            if len(data) != listed.size:
                suspects[digest] = f"the object has {listed.size} bytes, the cache's copy {len(data)}"
            elif len(etag) == 32 and hashlib.md5(data, usedforsecurity=False).hexdigest() != etag:
                suspects[digest] = "the object's ETag is not the MD5 of the cache's copy"
        return compared

    report.listed += len(here)
    report.compared += await in_io_thread(compare)


async def _look_again(
    store: S3Datastore, suspects: dict[bytes, str], report: ListingReport, task: Task, change: bool
) -> None:
    chunks = store.s3.chunks
    left = iter(suspects.items())

    def is_wrong(digest: bytes, blob: Blob) -> bool:
        try:
            chunks.checked(digest, blob)
        except FormatError:
            return True
        return False

    async def is_sound(digest: bytes) -> bool:
        """Reads it: a size or MD5 that is not the cache's may be that of another writer's compression."""
        try:
            return not await in_cpu_thread(is_wrong, digest, await chunks.fetch(digest, fresh=True))
        except (ChunkNotFoundError, FormatError):
            return False

    async def work() -> None:
        for digest, why in left:
            if not await is_sound(digest):
                if change and await chunks.repair(digest, partial(is_wrong, digest)):
                    report.repaired.append(digest)
                else:
                    report.bad[digest] = why
            task.advance(1)

    async with open_nursery() as nursery:
        for _ in range(min(_PARALLEL, len(suspects))):
            nursery.start_soon(work)
