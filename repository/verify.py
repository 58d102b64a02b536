"""Verify: is everything there that snapshots say, and is it what it was?

Per snapshot the manifest, then each file it lists: a blob's size and checksum, an index's size and checksum, and every
chunk: CRC, length and digest. Chunks that several snapshots share are checked once per run. Where the repository allows
it (`VerifyRecorder`), the result goes into the manifest, and chunks that are wrong at a second look too are set aside,
so that the next backup stores them anew.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from core.errors import FleeceError, FormatError
from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.errors import LockedError, SnapshotNotFoundError
from datastore.filters import GroupFilter, passes
from datastore.manifest import Manifest
from datastore.names import ROOT, BackupType, Namespace, Snapshot
from datastore.s3.errors import S3BudgetError
from datastore.upid import Upid
from repository.interface import OriginReads, Repository, VerifyRecorder
from repository.locate import load_readable
from repository.users import record_users
from repository.verify_chunks import Check, Record, Seen, set_waiting_aside

_DAY_S: Final = 86_400
#: Seconds that an interrupted run may take to find the snapshots that use chunks which it set aside.
_RECORD_TIMEOUT_S: Final = 600.0
#: The group into which `proxmox-backup-client benchmark` writes; whole-store runs leave it out, as PBS does.
_BENCHMARK: Final = (BackupType.HOST, "benchmark")


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What a run looks at, and what it leaves behind."""

    ignore_verified: bool = False  #: pass over snapshots that were found to be ok; failed ones are looked at again
    outdated_after: int | None = None  #: but not if that is more than so many full days ago; None: for ever
    max_duration_s: float | None = None  #: begin no further snapshot after so many seconds
    max_bytes: int | None = None  #: begin no further snapshot after so many plain bytes of chunks
    record: bool = True  #: write results into manifests and set corrupt chunks aside, where the repository allows it
    part: Callable[[bytes], bool] | None = None  #: read only chunks of which it says so; `ok` is not recorded then


@dataclass(slots=True)
class VerifyResult:
    """What came out for one snapshot."""

    snapshot: Snapshot
    errors: list[str] = field(default_factory=list)
    skipped: str = ""  #: why it was not looked at (locked, verified before, removed meanwhile); counts as ok

    @property
    def state(self) -> str:
        """`ok` or `failed`."""
        return "failed" if self.errors else "ok"

    def to_json(self) -> dict[str, Any]:
        """One element of what `fleece verify --output json` prints."""
        return {
            "snapshot": str(self.snapshot),
            "state": self.state,
            "errors": list(self.errors),
            "skipped": self.skipped or None,
        }


async def choose(
    repository: Repository, ns: Namespace = ROOT, *, depth: int | None = None, filters: Sequence[GroupFilter] = ()
) -> list[Snapshot]:
    """The finished snapshots of a namespace and those below it, in the order in which PBS verifies them.

    Groups as listed, of each the newest snapshot first, and without the group of `proxmox-backup-client benchmark`.

    Args:
        repository: where they lie.
        ns: the namespace.
        depth: how many levels below it; None: all.
        filters: only groups that these mean.

    Raises:
        SnapshotNotFoundError: the namespace is not there.
    """
    chosen: list[Snapshot] = []
    for namespace in await repository.namespaces(ns, depth=depth):
        try:
            groups = await repository.groups(namespace)
        except SnapshotNotFoundError:
            if namespace == ns:
                raise
            continue  # removed meanwhile
        for info in groups:
            if (info.group.type, info.group.id) != _BENCHMARK and passes(filters, info.group):
                found = await repository.snapshots(namespace, info.group)
                chosen += [one.snapshot for one in reversed(found)]
    return chosen


async def verify(
    repository: Repository,
    snapshots: Sequence[Snapshot],
    codec: ChunkCodec,
    progress: Progress | None = None,
    options: VerifyOptions | None = None,
    *,
    upid: Upid | None = None,
) -> list[VerifyResult]:
    """Verify `snapshots` one after the other, in the given order; as `verify_snapshot`.

    If a limit of `options` ends the run early, the snapshots that it did not reach are missing in the result, and
    `progress` is warned; so it is of snapshots outside of the run that use a chunk which was set aside. These are
    recorded as failed too, so that no backup builds on them.

    Raises:
        FleeceError: as `verify_snapshot`.
    """
    seen = Seen()
    progress = Progress() if progress is None else progress
    options = VerifyOptions() if options is None else options
    upid = Upid.new("verify", repository.name) if upid is None else upid
    recorder = await _recorder(repository, options, progress)
    begun = time.monotonic()
    results: list[VerifyResult] = []
    try:
        for snapshot in snapshots:
            if reason := _limit(options, time.monotonic() - begun, seen.bytes):
                progress.warn(f"{len(snapshots) - len(results)} of {len(snapshots)} snapshots not looked at: {reason}")
                break
            try:
                result = await verify_snapshot(
                    repository, snapshot, codec, progress, seen, options=options, recorder=recorder, upid=upid
                )
            except S3BudgetError as error:
                left = len(snapshots) - len(results)
                progress.warn(f"{left} of {len(snapshots)} snapshots not, or not wholly, looked at: {error.why}")
                break
            results.append(result)
        await set_waiting_aside(seen)
    finally:
        if seen.set_aside and recorder is not None:
            # Also when the run was interrupted: no backup may build on a snapshot that lacks a chunk now.
            with trio.move_on_after(_RECORD_TIMEOUT_S) as scope:
                scope.shield = True
                failed = [result.snapshot for result in results if result.errors]
                users = await record_users(repository, recorder, seen.set_aside, failed, progress, upid)
                for result in results:
                    result.errors += users.get(result.snapshot, [])
    return results


def _limit(options: VerifyOptions, duration_s: float, read: int) -> str:
    """Why no further snapshot is begun; empty if one may be."""
    if options.max_duration_s is not None and duration_s >= options.max_duration_s:
        return "the time is up"
    if options.max_bytes is not None and read >= options.max_bytes:
        return "enough bytes were read"
    return ""


async def _recorder(repository: Repository, options: VerifyOptions, progress: Progress) -> VerifyRecorder | None:
    if not options.record or not isinstance(repository, VerifyRecorder):
        return None
    if reason := await repository.why_not_recording():
        progress.warn(f"results are not recorded, and corrupt chunks not set aside: {reason}")
        return None
    return repository


async def verify_snapshot(
    repository: Repository,
    snapshot: Snapshot,
    codec: ChunkCodec,
    progress: Progress | None = None,
    seen: Seen | None = None,
    *,
    options: VerifyOptions | None = None,
    recorder: VerifyRecorder | None = None,
    upid: Upid | None = None,
) -> VerifyResult:
    """Check one finished snapshot under its shared lock.

    Without the key of an encrypted snapshot, or with another one, only CRCs can be checked, and signatures cannot.

    Args:
        repository: where it lies.
        snapshot: the snapshot.
        codec: with the key, if there is one.
        progress: told about each file and everything that is wrong.
        seen: of this run, so that shared chunks are read once.
        options: whether to pass over what was verified before.
        recorder: takes the result and corrupt chunks; None changes nothing.
        upid: of the run, goes into the manifest.

    Raises:
        FleeceError: so many chunks in a row could not be read by the system that it makes no sense to go on.

    Cancelled, no result is recorded.
    """
    progress = Progress() if progress is None else progress
    result = VerifyResult(snapshot)
    try:
        async with repository.reader(snapshot) as reader:
            if isinstance(reader, OriginReads):
                reader = reader.from_origin()
            try:
                manifest, codec = await load_readable(reader, codec, must_be_signed=True)
            except FleeceError as error:
                result.errors.append(str(error))
                return result
            if options is not None and (reason := _verified_before(manifest, options)):
                result.skipped = reason
                progress.log(f"{snapshot} skipped: {reason}")
                return result
            upid = Upid.new("verify_snapshot", str(snapshot)) if upid is None else upid
            record = None if recorder is None else Record(recorder, snapshot, str(upid))
            part = None if options is None else options.part
            run = Seen() if seen is None else seen
            check = Check(reader, codec, manifest, progress, run, record, part)
            for entry in manifest.files:
                result.errors += await check.file(entry)
            if seen is None:
                await set_waiting_aside(run)
            if record is not None and (part is None or result.errors):
                try:
                    await record.state(result.state)
                except LockedError as error:
                    result.errors.append(f"the result could not be recorded: {error}")
                except SnapshotNotFoundError:
                    raise
                except FleeceError as error:
                    progress.warn(f"the result could not be recorded: {error}")
    except LockedError as error:
        result.skipped = f"locked ({error.why})"
    except SnapshotNotFoundError:
        result.skipped = "removed meanwhile"
    if result.skipped:
        progress.log(f"{snapshot} skipped: {result.skipped}")
    return result


def _verified_before(manifest: Manifest, options: VerifyOptions) -> str:
    """Why the snapshot need not be looked at; empty if it must be."""
    state = manifest.verify_state
    if not options.ignore_verified or state is None or state.get("state") != "ok":
        return ""
    try:
        start = Upid.parse(str(state.get("upid"))).start
    except FormatError:
        return ""  # somebody's note without a time: better look
    days = int(time.time() - start) // _DAY_S
    if options.outdated_after is not None and days > options.outdated_after:
        return ""
    return f"verified {days} days ago" if days > 1 else "recently verified"
