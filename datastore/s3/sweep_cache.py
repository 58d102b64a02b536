"""The last part of garbage collection in a bucket: files of the cache without an object, and what they say is lost."""

import os
import re
import stat
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final

import trio

from core.limits import in_io_thread
from core.nursery import open_nursery
from core.progress import Progress
from datastore.errors import StoreError
from datastore.files import store_errors, unlink_existing
from datastore.interface import SweepGuard
from datastore.s3.cache_files import list_folder

if TYPE_CHECKING:
    from datastore.s3.chunks import S3ChunkStore

_SWEEPERS: Final = 2
_FOLDERS: Final = 1 << 16
_FOLDERS_AT_ONCE: Final = 512
_FILE_NAME: Final = re.compile(r"([0-9a-f]{64})(?:\.(using|[0-9]\.bad))?")


class CacheSweep:
    """Sweeps the files that `BucketSweep` has left.

    Args:
        store: the chunks.
        min_atime: Unix seconds; older files go.
        guard: asked about every chunk before its file goes.
        kept: digests whose files stay, since their objects may be there.
        adopted: digests that a dry run found in the bucket.
        dry_run: remove marks of this run only.
    """

    def __init__(
        self,
        store: "S3ChunkStore",
        min_atime: int,
        guard: SweepGuard,
        *,
        kept: Collection[bytes],
        adopted: Collection[bytes],
        dry_run: bool,
    ) -> None:
        self._store, self._files, self._locks = store, store.files, store.locks
        self._min_atime, self._guard, self._dry_run = min_atime, guard, dry_run
        self._kept, self._adopted = kept, adopted

    async def run(self, progress: Progress) -> list[bytes]:
        """Remove old files without an object, and all `.using`; returns the chunks that these stood for.

        Raises:
            StoreError: a file can be neither looked at nor removed, or one in use looks old.
            S3Error: the bucket cannot be asked.
        """
        jobs = iter(range(0, _FOLDERS, _FOLDERS_AT_ONCE))
        orphans: list[bytes] = []

        async def work() -> None:
            for start in jobs:
                orphans.extend(await in_io_thread(self._sweep_folders, start))

        with progress.task("sweep the cache", None, "folders"):
            async with open_nursery() as nursery:
                for _ in range(_SWEEPERS):
                    nursery.start_soon(work)
            orphans.sort()
            lost = [digest for digest in orphans if digest not in self._adopted]
            if not self._dry_run:
                # A listing may be older than an upload of another host, or than a verification that set chunks aside.
                there = await self._store.adopt(lost)
                lost = [digest for digest, found in zip(lost, there, strict=True) if not found]
            await in_io_thread(self._remove_marks, orphans)
        if not self._dry_run:
            await in_io_thread(self._files.remove_temporary_files, self._min_atime)
        return lost

    def _sweep_folders(self, start: int) -> list[bytes]:
        orphans = []
        for number in range(start, start + _FOLDERS_AT_ONCE):
            for entry in list_folder(f"{self._files.folder}/{number:04x}"):
                match = _FILE_NAME.fullmatch(entry.name)
                if match is None:
                    continue
                digest = bytes.fromhex(match[1])
                if match[2] == "using":
                    if digest not in self._kept and self._files.size(digest) is None:
                        orphans.append(digest)
                    elif digest not in self._kept and not self._dry_run:
                        with store_errors("remove", entry.path):
                            unlink_existing(entry.path)
                elif not self._dry_run:
                    self._sweep_file(entry.path, digest, bad=match[2] is not None)
        return orphans

    def _sweep_file(self, path: str, digest: bytes, *, bad: bool) -> None:
        if digest in self._kept or not self._is_old(path):
            return
        with store_errors("lock chunk", path):
            if not self._locks.try_acquire(digest):
                return
        try:
            if not self._is_old(path):
                return
            if not bad and self._guard.uses(digest):
                raise looks_old(self._files.base, digest)
            with store_errors("remove chunk", path):
                unlink_existing(path)
        finally:
            self._locks.release(digest)
        if not bad:
            trio.from_thread.run_sync(self._store.cache.forget, digest)

    def _is_old(self, path: str) -> bool:
        with store_errors("look at chunk", path):
            try:
                found = os.stat(path, follow_symlinks=False)  # noqa: PTH116 - as above
            except FileNotFoundError:
                return False
        return stat.S_ISREG(found.st_mode) and found[stat.ST_ATIME] < self._min_atime

    def _remove_marks(self, digests: Sequence[bytes]) -> None:
        for digest in digests:
            with store_errors("remove", self._files.using(digest)):
                unlink_existing(self._files.using(digest))


def looks_old(base: object, digest: bytes) -> StoreError:
    """The error for a chunk that was marked in this run, but whose file says otherwise."""
    return StoreError(
        "collect garbage in",
        str(base),
        f"chunk {digest.hex()} was touched, but its access time stays old; did a clock jump?",
        "nothing that is in use was removed; see to the clocks and start again",
    )
