"""The second half of garbage collection in a local folder: unused chunks go.

Rules: docs/formats.md, "Garbage collection".
"""

import os
import re
import stat
from collections.abc import Sequence
from typing import Final

import trio

from core.errors import os_reason
from datastore.errors import LockedError, StoreError
from datastore.files import store_errors, unlink_existing
from datastore.gc_status import GcStatus
from datastore.interface import SweepGuard
from datastore.locks import ChunkLocks

#: Seconds a sweep waits for a chunk that somebody holds; it stays then.
_SWEEP_WAIT_S: Final = 1.0
_CHUNK_NAME: Final = re.compile(r"([0-9a-fA-F]{64})(?:......)?", re.DOTALL)


class Sweep:
    """Looks at chunk files and removes old ones; used by several worker threads.

    Args:
        root: the folder `.chunks`.
        locks: of the chunks.
        min_atime: Unix seconds; what was last touched before goes.
        oldest_writer: Unix seconds; what was touched before that, and stays, is pending.
        guard: asked about every chunk before it goes.
        dry_run: count only.
    """

    def __init__(
        self, root: str, locks: ChunkLocks, min_atime: int, oldest_writer: int, guard: SweepGuard, dry_run: bool
    ) -> None:
        self._root, self._locks, self._guard, self._dry_run = root, locks, guard, dry_run
        self._min_atime, self._oldest_writer = min_atime, oldest_writer

    def folders(self, listed: Sequence[tuple[str, list[str]]], status: GcStatus) -> None:
        """Sweep the files of these folders and count them in `status`.

        Raises:
            StoreError: a chunk can be neither looked at nor locked nor removed, or one in use looks old.
        """
        for folder, names in listed:
            trio.from_thread.check_cancelled()
            for name in names:
                match = _CHUNK_NAME.fullmatch(name)
                if match is not None:
                    self._file(folder, name, match[1], status)

    def _file(self, folder: str, name: str, digest: str, status: GcStatus) -> None:
        path = f"{self._root}/{folder}/{name}"
        found = self._look(path)
        if found is None:
            return
        if name.endswith(".using"):  # a mark that only stores of a bucket have
            if not self._dry_run:
                self._unlink(path)
            return
        bad = name.endswith(".bad")
        if found[stat.ST_ATIME] < self._min_atime:
            if self._dry_run:
                self._count_removed(found, bad, status)
                return
            # The lock only for what is about to go, so that chunks that stay cost nothing; an insert may have touched
            # the file since the look.
            try:
                with store_errors("lock chunk", path), self._locks.hold(bytes.fromhex(digest), wait_s=_SWEEP_WAIT_S):
                    now = self._look(path)
                    if now is None:
                        return
                    if now[stat.ST_ATIME] < self._min_atime:
                        self._remove(path, name == digest and digest[:4] == folder, bad, status)
                        self._count_removed(now, bad, status)
                        return
                    found = now
            except LockedError:
                pass  # whoever holds it for so long uses it
        self._count_kept(found, bad, status)

    def _remove(self, path: str, proper: bool, bad: bool, status: GcStatus) -> None:
        if proper and self._guard.uses(bytes.fromhex(path[-64:])):
            raise StoreError(
                "collect garbage in",
                self._root,
                f"chunk {path[-64:]} was touched, but its access time stays old; did a clock jump?",
                "nothing that is in use was removed; see to the clocks and start again",
            )
        try:
            self._unlink(path)
        except StoreError:
            status.still_bad += bad
            raise

    def _look(self, path: str) -> os.stat_result | None:
        """The file's attributes; None if it is gone or no regular file."""
        try:
            found = os.stat(path, follow_symlinks=False)  # noqa: PTH116 - hot path, no Path objects
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError("look at chunk", path, os_reason(error)) from error
        return found if stat.S_ISREG(found.st_mode) else None

    def _unlink(self, path: str) -> None:
        with store_errors("remove chunk", path):
            unlink_existing(path)

    def _count_removed(self, found: os.stat_result, bad: bool, status: GcStatus) -> None:
        status.removed_bytes += found.st_size
        if bad:
            status.removed_bad += 1
        else:
            status.removed_chunks += 1

    def _count_kept(self, found: os.stat_result, bad: bool, status: GcStatus) -> None:
        if found[stat.ST_ATIME] < self._oldest_writer:
            status.pending_bytes += found.st_size
            if bad:
                status.still_bad += 1
            else:
                status.pending_chunks += 1
        else:
            status.disk_bytes += found.st_size
            status.disk_chunks += not bad
