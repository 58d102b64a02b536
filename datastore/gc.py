"""Garbage collection: chunks that no index names any more are removed.

Rules and their reasons: docs/formats.md, "Garbage collection". First every index of the store is read and each chunk it
names is touched (marked), then every chunk that has not been touched for a day is removed (swept). Written against
`ChunkStore`; a backend brings its own `mark` and `sweep`. Fleece's backups go on meanwhile, PBS's do not start.

What makes it safe beside writers: a chunk that a running backup stores or finds there is touched after the backup
began, and nothing younger than the oldest backup goes; a chunk that it takes over from the snapshot before without
touching it is named by that snapshot's index, which nobody may remove until the new one is complete. So a group is
looked at again if anything of it vanished between the listing and the reading.
"""

import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from core.errors import UsageError
from core.limits import in_cpu_thread, in_io_thread
from core.nursery import open_nursery
from core.progress import Progress, Task
from datastore.codec import ChunkCodec
from datastore.errors import LockedError, SnapshotNotFoundError, StoreError
from datastore.gc_indexes import indexes_of, list_indexes, read_indexes
from datastore.gc_status import GcStatus, write_status
from datastore.index_file import DIGEST_SIZE
from datastore.marked import MarkedDigests
from datastore.store import Datastore
from datastore.upid import Upid
from datastore.usage_history import UsageSample, add_sample

if TYPE_CHECKING:
    from numpy import uint64
    from numpy.typing import NDArray

_LOG = logging.getLogger(__name__)

#: Seconds since the last touch after which an unused chunk goes: `relatime` updates once a day, and 5 minutes.
DEFAULT_CUTOFF_S: Final = 86_700
#: What PBS allows for it.
MIN_CUTOFF_S: Final = 60
MAX_CUTOFF_S: Final = 2880 * 60
#: Seconds to wait for somebody else's garbage collection, or for PBS's backups.
LOCK_WAIT_S: Final = 3600.0
#: Seconds before the start of the oldest writer that still count as its time.
_WRITER_MARGIN_S: Final = 300
#: Looks at the whole store before it counts as too busy; each looks at what the ones before have not read.
_MAX_LOOKS: Final = 10
#: Digests gathered before they are sorted and marked (4 MB), and marked by one call in a worker thread.
_MARK_AT_ONCE: Final = 1 << 17
_MARK_IN_A_CALL: Final = 1 << 13
#: Threads that mark; more than one helps where the disk has to seek for names.
_MARKERS: Final = 4
#: Seconds that the wall clock may drift from the monotonic one during a run; more is a jump.
_MAX_DRIFT_S: Final = 30.0
#: Missing chunks that are named.
_MAX_NAMED: Final = 20
_ZERO_SIZE: Final = 4 << 20


@dataclass(slots=True)
class GcReport:
    """What a garbage collection did, or with `dry_run` would have done."""

    status: GcStatus
    dry_run: bool
    duration_s: float = 0.0
    #: Chunks that are used, but not there; the first ones, of a store in a bucket all.
    missing: list[bytes] = field(default_factory=list)
    missing_count: int = 0
    missing_is_certain: bool = False  #: the bucket was asked: `missing` has them all
    strange: list[str] = field(default_factory=list)  #: indexes outside of any snapshot, relative to the store

    def to_json(self) -> dict[str, Any]:
        """What `fleece gc --output json` prints: the fields of `.gc-status` and what it lacks."""
        return {
            **self.status.to_json(),
            "dedup-factor": round(self.status.dedup_factor, 2),
            "missing-chunks": self.missing_count,
            "strange-indexes": list(self.strange),
            "dry-run": self.dry_run,
            "duration-s": round(self.duration_s, 3),
        }


async def collect_garbage(
    store: Datastore,
    *,
    cutoff_s: int = DEFAULT_CUTOFF_S,
    lock_wait_s: float = LOCK_WAIT_S,
    dry_run: bool = False,
    allow_empty: bool = False,
    upid: Upid | None = None,
    progress: Progress | None = None,
) -> GcReport:
    """Remove every chunk of `store` that no index names and nobody has touched for `cutoff_s` seconds.

    Cancelled, failed or killed, the store is whole: what is left is removed by the next run. Nothing is removed if any
    index cannot be read, or if access times or clocks cannot be trusted.

    Args:
        store: the datastore.
        cutoff_s: 60 to 172800 seconds.
        lock_wait_s: how long to wait for another garbage collection or a backup of PBS.
        dry_run: mark, but remove nothing, and write neither `.gc-status` nor the history of the space used.
        upid: of the task, for `.gc-status`; None makes one.
        progress: told how far it is, and warned of missing chunks and indexes outside of snapshots.

    Raises:
        UsageError: a cut-off that PBS does not allow either.
        LockedError: the store stays locked.
        StoreError: an index is unreadable or none, no rights, access times that do not change, a clock that jumped.
    """
    if not MIN_CUTOFF_S <= cutoff_s <= MAX_CUTOFF_S:
        why = f"{MIN_CUTOFF_S} seconds to {MAX_CUTOFF_S // 86400} days are possible"
        raise UsageError("collect garbage with a cut-off of", f"{cutoff_s} seconds", why)
    progress = Progress() if progress is None else progress
    store.check_writable()
    if upid is None:
        upid = Upid.new("garbage_collection", store.name)
    report = GcReport(GcStatus(str(upid)), dry_run)
    begun = time.monotonic()
    async with _exclusive(store, lock_wait_s, progress) as oldest_writer:
        await _collect(store, cutoff_s, oldest_writer, report, progress, allow_empty)
        report.duration_s = time.monotonic() - begun
        if not dry_run:
            for note in (_write_status, _add_to_history):
                try:
                    await in_io_thread(note, store, report.status)
                except StoreError as error:
                    # As in PBS the work counts, not the note about it.
                    progress.warn(str(error))
    return report


def _write_status(store: Datastore, status: GcStatus) -> None:
    write_status(store.base, status, store.owner)


def _add_to_history(store: Datastore, status: GcStatus) -> None:
    _, used, _ = store.usage()
    sample = UsageSample(int(time.time()), used, status.disk_bytes + status.pending_bytes)
    add_sample(store.base, sample, store.owner)


@asynccontextmanager
async def _exclusive(store: Datastore, wait_s: float, progress: Progress) -> AsyncIterator[float | None]:
    held = False
    try:
        async with store.chunks.exclusive(wait_s=0) as oldest_writer:
            held = True
            yield oldest_writer
            return
    except LockedError as error:
        if held or wait_s <= 0:
            raise
        progress.log(f"waiting for the lock of {store.base} ({error.why})")
    async with store.chunks.exclusive(wait_s=wait_s) as oldest_writer:
        yield oldest_writer


async def _collect(
    store: Datastore,
    cutoff_s: int,
    oldest_writer: float | None,
    report: GcReport,
    progress: Progress,
    allow_empty: bool,
) -> None:
    codec = ChunkCodec()
    zero = await in_cpu_thread(lambda: codec.encode(bytes(_ZERO_SIZE)))
    digest = await in_cpu_thread(codec.zero_digest, _ZERO_SIZE)
    clock = _Clock(store.base)
    async with open_nursery() as nursery:
        tested = trio.Event()

        async def test(*, task_status: "trio.TaskStatus[float]") -> None:
            await store.chunks.check_access_times(digest, zero, task_status=task_status)
            tested.set()

        file_time = int(await nursery.start(test))
        # Marks get the file system's time (of another host perhaps), so ages are counted back from that.
        now = min(file_time, int(clock.start))
        oldest = min(now, file_time) if oldest_writer is None else min(int(oldest_writer), now)
        min_atime = now - cutoff_s
        if oldest < min_atime:
            min_atime = oldest - _WRITER_MARGIN_S
        marked = await in_io_thread(MarkedDigests)
        guard = _Guard(marked, clock)

        async def sweep() -> None:
            lost = await store.chunks.sweep(
                min_atime, oldest, guard, report.status, progress, dry_run=report.dry_run, allow_empty=allow_empty
            )
            if lost is not None:  # what the cache did not know may be there all the same
                report.missing, report.missing_count, report.missing_is_certain = lost, len(lost), True

        nursery.start_soon(sweep)
        marks = _Marks(store, marked, report, progress)
        await marks.run()
        await tested.wait()
        clock.check()
        guard.allow()
    if report.missing_count:
        named = ", ".join(one.hex() for one in report.missing[:3]) + (", ..." if report.missing_count > 3 else "")
        hint = "'fleece verify' names the snapshots"
        progress.warn(f"{report.missing_count} chunks are used, but not there ({named}); {hint}")


class _Clock:
    """Finds out whether the clock was set during a run: ages mean nothing then."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self.start = time.time()
        self._monotonic = time.monotonic()

    def check(self) -> None:
        """Raises StoreError if it was."""
        drift = (time.time() - self.start) - (time.monotonic() - self._monotonic)
        if abs(drift) > _MAX_DRIFT_S:
            raise StoreError(
                "collect garbage in", str(self._base), f"the clock was set by {drift:+.0f} seconds meanwhile",
                "nothing that is in use was removed; start it again",
            )  # fmt: skip


class _Guard:
    """See `datastore.interface.SweepGuard`."""

    def __init__(self, marked: MarkedDigests, clock: _Clock) -> None:
        self._marked, self._clock = marked, clock
        self._ready = trio.Event()

    def allow(self) -> None:
        """Everything is marked, and the tests have passed."""
        self._ready.set()

    async def ready(self) -> None:
        """See `SweepGuard.ready`; who finds that nothing may be removed raises, which cancels this."""
        await self._ready.wait()

    def uses(self, digest: bytes) -> bool:
        """See `SweepGuard.uses`."""
        # Set back during the sweep, the clock gives what a backup stores now the age of what is unused.
        self._clock.check()
        return digest in self._marked


class _Marks:
    """The first half: reads every index and marks what it names."""

    def __init__(self, store: Datastore, marked: MarkedDigests, report: GcReport, progress: Progress) -> None:
        self._store, self._marked, self._report, self._progress = store, marked, report, progress
        self._done: set[str] = set()  #: indexes that were read, relative to the store

    async def run(self) -> None:
        """Mark everything.

        Raises:
            StoreError: an index is unreadable or none, a folder cannot be listed, or the store is too busy.
        """
        for _ in range(_MAX_LOOKS):
            if await self._look():
                return
        raise StoreError(
            "collect garbage in", str(self._store.base),
            f"indexes vanished while they were to be read, {_MAX_LOOKS} times in a row",
            "nothing was removed; start it again when fewer snapshots are being removed",
        )  # fmt: skip

    async def _look(self) -> bool:
        """Read every index not read yet; False if one vanished, so that what took its place must be looked for."""
        store = self._store
        everything = await in_io_thread(list_indexes, store.base)
        complete = True
        with self._progress.task("mark", len(everything), "indexes") as task:
            task.advance(sum(path in self._done for path in everything))
            for ns in await in_io_thread(lambda: list(store.namespaces())):
                try:
                    groups = await in_io_thread(store.groups, ns)
                except SnapshotNotFoundError:
                    continue  # its indexes are in `everything`
                for group in groups:
                    paths = await in_io_thread(indexes_of, store, group)
                    complete &= await self._read(paths, task)
            strange = [path for path in everything if path not in self._done]
            complete &= await self._read(strange, task)
            await self._mark()
        for path in strange:
            if path in self._done and path not in self._report.strange:
                self._report.strange.append(path)
                self._progress.warn(f"{path} is outside of any snapshot; what it names is kept")
        return complete

    async def _read(self, paths: Sequence[str], task: Task) -> bool:
        left = [path for path in paths if path not in self._done]
        previous: dict[str, NDArray[uint64]] = {}
        complete = True
        while left:
            room = _MARK_AT_ONCE - self._marked.waiting
            read = await in_io_thread(read_indexes, self._store.base, left, previous, room)
            self._done.update(read.paths)
            self._report.status.index_file_count += len(read.paths)
            self._report.status.index_data_bytes += read.data_bytes
            for digests in read.digests:
                self._marked.add(digests)
            self._marked.total += read.repeated
            complete &= not read.vanished
            task.advance(len(read.paths))
            if self._marked.waiting >= _MARK_AT_ONCE:
                await self._mark()
        return complete

    async def _mark(self) -> None:
        """Mark what is waiting."""
        view = memoryview(await in_cpu_thread(self._marked.take))
        status, step = self._report.status, _MARK_IN_A_CALL * DIGEST_SIZE
        status.cache_misses = self._marked.taken
        status.cache_hits = self._marked.total - self._marked.taken
        # Ascending, so each call works in folders of its own, one after the other.
        pieces = iter(range(0, len(view), step))

        async def work() -> None:
            for start in pieces:
                missing = await self._store.chunks.mark(view[start : start + step])
                self._report.missing_count += len(missing)
                self._report.missing += missing[: max(0, _MAX_NAMED - len(self._report.missing))]
                for digest in missing:
                    _LOG.info("chunk %s is used, but not there", digest.hex())

        async with open_nursery() as nursery:
            for _ in range(_MARKERS):
                nursery.start_soon(work)


def summary(report: GcReport) -> Iterable[str]:
    """The report for people."""
    from core.units import format_size

    status = report.status
    would = "would be removed" if report.dry_run else "removed"
    yield f"original data  {format_size(status.index_data_bytes)} in {status.index_file_count} indexes"
    yield f"in use         {format_size(status.disk_bytes)} in {status.disk_chunks} chunks"
    yield f"dedup factor   {status.dedup_factor:.2f}"
    yield f"{would:<14} {format_size(status.removed_bytes)} in {status.removed_chunks} chunks"
    yield f"pending        {format_size(status.pending_bytes)} in {status.pending_chunks} chunks"
    if status.removed_bad or status.still_bad:
        yield f"corrupt chunks {status.removed_bad} {would}, {status.still_bad} pending"
    if report.missing_count:
        yield f"missing        {report.missing_count} chunks"
