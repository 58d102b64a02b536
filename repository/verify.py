"""Verify: is everything there that snapshots say, and is it what it was?

Per snapshot the manifest, then each file it lists: a blob's size and checksum, an index's size and checksum, and every
chunk: CRC, length and digest. Chunks that several snapshots share are checked once per run. Where the repository allows
it (`VerifyRecorder`), the result goes into the manifest, and chunks that are wrong at a second look too are set aside,
so that the next backup stores them anew.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import trio

from core.buffers import Buffer
from core.errors import FleeceError, FormatError
from core.limits import in_cpu_thread
from core.progress import Progress, Task
from datastore.blob import Blob
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode
from datastore.digests import DigestSet
from datastore.errors import ChunkNotFoundError, KeyNeededError, LockedError, SnapshotNotFoundError
from datastore.filters import GroupFilter, passes
from datastore.index import ArchiveIndex
from datastore.manifest import Manifest, ManifestFile
from datastore.names import ROOT, ArchiveKind, BackupType, Namespace, Snapshot, archive_kind
from datastore.s3.errors import S3BackendError
from datastore.upid import Upid
from repository.fetch import fetch
from repository.findings import Lines, is_system_error
from repository.interface import ChunkRepairer, OriginReads, Reader, Repository, VerifyRecorder
from repository.locate import Archive, check_index, load_readable
from repository.users import record_users

#: Chunks in a row that the system cannot read before the run stops: it is the disk, not the chunks.
MAX_SYSTEM_ERRORS: Final = 20
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


@dataclass(slots=True)
class Seen:
    """Chunks that one run has checked already."""

    good: DigestSet = field(default_factory=DigestSet)
    bad: dict[bytes, str] = field(default_factory=dict)  #: digest -> what is wrong with it
    set_aside: dict[bytes, str] = field(default_factory=dict)  #: digest -> name it has now
    system_errors: int = 0  #: in a row
    bytes: int = 0  #: plain bytes of chunks read


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
            results.append(
                await verify_snapshot(
                    repository, snapshot, codec, progress, seen, options=options, recorder=recorder, upid=upid
                )
            )
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
                manifest, codec = await load_readable(reader, codec)
            except FleeceError as error:
                result.errors.append(str(error))
                return result
            if options is not None and (reason := _verified_before(manifest, options)):
                result.skipped = reason
                progress.log(f"{snapshot} skipped: {reason}")
                return result
            upid = Upid.new("verify_snapshot", str(snapshot)) if upid is None else upid
            record = None if recorder is None else _Record(recorder, snapshot, str(upid))
            check = _Check(reader, codec, manifest, progress, Seen() if seen is None else seen, record)
            for entry in manifest.files:
                result.errors += await check.file(entry)
            if record is not None:
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


@dataclass(slots=True)
class _Record:
    """Writes down what is found about one snapshot."""

    recorder: VerifyRecorder
    snapshot: Snapshot
    upid: str
    written: str = ""  #: the state that the manifest has from us
    _writing: trio.Lock = field(default_factory=trio.Lock)

    async def state(self, state: str) -> None:
        """Record `ok` or `failed`; errors as `VerifyRecorder.record_verification`."""
        async with self._writing:  # several chunks are counted at the same time
            if self.written != state:
                await self.recorder.record_verification(self.snapshot, state, self.upid)
                self.written = state

    async def set_aside(self, digest: bytes, wrong: Callable[[Blob], bool]) -> str | None:
        """Set a chunk aside; before that the snapshot counts as failed, so that a crash leaves no base without it."""
        await self.state("failed")
        return await self.recorder.quarantine(digest, wrong)


@dataclass(slots=True)
class _Check:
    """Checks the files of one snapshot."""

    reader: Reader
    codec: ChunkCodec
    manifest: Manifest
    progress: Progress
    seen: Seen
    record: _Record | None = None

    async def file(self, entry: ManifestFile) -> list[str]:
        """What is wrong with one file."""
        try:
            if archive_kind(entry.filename) is ArchiveKind.BLOB:
                await self._blob(entry)
                return []
            index = await self.reader.open_index(entry.filename, size=entry.size)
            await check_index(index, entry)
        except FleeceError as error:
            return [str(error)]
        return await self._chunks(index, entry)

    async def _blob(self, entry: ManifestFile) -> None:
        where = f"{self.reader.snapshot}/{entry.filename}"
        raw = await self.reader.read_blob(entry.filename)
        if len(raw) != entry.size:
            raise FormatError("verify", where, f"wrong size ({len(raw)} != {entry.size})")

        def check() -> None:
            csum = hashlib.sha256(raw).digest()
            if csum != entry.csum:
                raise FormatError("verify", where, f"wrong checksum ({csum.hex()} != {entry.csum.hex()})")
            # Without the key the CRC, which is looked at first, is all that can be said.
            with suppress(KeyNeededError):
                self.codec.decode_blob(raw, crypt_mode=None, where=where)

        await in_cpu_thread(check)

    async def _chunks(self, index: ArchiveIndex, entry: ManifestFile) -> list[str]:
        archive = Archive(index, entry, None)
        errors = Lines(index.where)
        numbers = list(self._unseen(index, errors))
        total = sum(index.span(number)[1] for number in numbers)
        with self.progress.task(f"{self.reader.snapshot}/{entry.filename}", total) as task:

            async def consume(number: int, data: Buffer | FleeceError) -> None:
                await self._count(archive, number, data, errors, task)

            await fetch(self.reader, self.codec, archive, numbers, consume)
        return errors.all()

    def _unseen(self, index: ArchiveIndex, errors: Lines) -> Iterator[int]:
        """Numbers of chunks that are to be read, each digest once; known faults go to `errors`."""
        here: dict[bytes, int] = {}
        for number in range(index.count):
            digest, (offset, length) = index.digest(number), index.span(number)
            size = self.seen.good.size_of(digest)
            if size is None:
                size = here.get(digest)
            if size is None and digest not in self.seen.bad:
                here[digest] = length
                yield number
            elif size is None:
                errors.add(f"{index.where} at {offset}: {self.seen.bad[digest]}")
            elif size != length:
                errors.add(f"{index.where} at {offset}: chunk {digest.hex()} has {size} bytes, not {length}")

    async def _count(
        self, archive: Archive, number: int, data: Buffer | FleeceError, errors: Lines, task: Task
    ) -> None:
        digest, (_, length) = archive.index.digest(number), archive.index.span(number)
        task.advance(length)
        self.seen.bytes += length
        encrypted = archive.entry.crypt_mode is CryptMode.ENCRYPT
        if not isinstance(data, FleeceError) or (isinstance(data, KeyNeededError) and encrypted):
            self.seen.system_errors = 0
            self.seen.good.add(digest, length)
            return
        if isinstance(data, S3BackendError):
            raise data  # nothing in the bucket can be read, which says nothing about the chunk (R43)
        if isinstance(data, FormatError | ChunkNotFoundError):
            again = await self._look_again(archive, number, data)
            if again is None:
                self.seen.good.add(digest, length)
                return
            data = again
        if errors.add(str(data)):
            self.progress.log(str(data))
        if is_system_error(data):
            # Not remembered as bad: the next snapshot that has it asks again.
            self.seen.system_errors += 1
            if self.seen.system_errors >= MAX_SYSTEM_ERRORS:
                raise FleeceError(
                    "verify",
                    str(self.reader.snapshot),
                    f"{MAX_SYSTEM_ERRORS} chunks in a row could not be read, the last one: {data.why}",
                    "look after the disk or the rights first",
                ) from data
            return
        self.seen.system_errors = 0
        if digest not in self.seen.good:
            self.seen.bad[digest] = data.why

    async def _look_again(
        self, archive: Archive, number: int, first: FormatError | ChunkNotFoundError
    ) -> FleeceError | None:
        """Read a chunk that is wrong or missing a second time, and set it aside if it is wrong again.

        Returns:
            what is wrong, None if it is right now. A chunk that only does not fit its archive (encrypted or not, its
            length) is good in itself.
        """
        digest, (_, length) = archive.index.digest(number), archive.index.span(number)
        where = archive.chunk_where(number)
        try:
            blob = await self.reader.read_chunk(digest)
        except ChunkNotFoundError as error:
            if await self._repaired(digest, where):
                return None
            return ChunkNotFoundError("read", where, error.why)
        except FormatError:
            if await self._repaired(digest, where):
                return None
            return await self._set_aside(digest, first)
        except FleeceError as error:
            return error
        size = await in_cpu_thread(self._plain_size, blob, digest)
        if size is None:
            if await self._repaired(digest, where):
                return None
            return await self._set_aside(digest, first)
        mode = archive.entry.crypt_mode
        if size in (0, length) and blob.kind.encrypted is (mode is CryptMode.ENCRYPT):
            self.progress.warn(f"{where} was wrong at the first look ({first.why}) and right at the second")
            return None
        self.seen.good.add(digest, size or length)
        return first

    async def _repaired(self, digest: bytes, where: str) -> bool:
        """Try to put a good copy of the chunk in its place, where there may be one (R42)."""
        if self.record is None or not isinstance(self.record.recorder, ChunkRepairer):
            return False
        try:
            if not await self.record.recorder.repair(digest, partial(self._is_wrong, digest)):
                return False
        except FleeceError as failure:
            self.progress.warn(str(failure))
            return False
        self.progress.warn(f"{where} was missing or corrupt, and is repaired from another copy")
        return True

    def _plain_size(self, blob: Blob, digest: bytes) -> int | None:
        """Plain bytes of the chunk, 0 if only its key tells; None if it is wrong."""
        try:
            return len(self.codec.decode(blob, digest=digest, size=None, crypt_mode=None, where=digest.hex()))
        except KeyNeededError:
            return 0
        except FleeceError:
            return 0 if self._may_be_another_key(blob) else None

    def _may_be_another_key(self, blob: Blob) -> bool:
        """True if the chunk is whole, and nothing says that our key is the one it was encrypted with."""
        try:
            blob.check(where="")
        except FormatError:
            return False
        key = self.codec.key
        return blob.kind.encrypted and (key is None or self.manifest.fingerprint != key.fingerprint)

    async def _set_aside(self, digest: bytes, error: FleeceError) -> FleeceError:
        if self.record is None:
            return error
        # The chunk's lock is held for a last look: a backup may have stored it anew since.
        wrong = partial(self._is_wrong, digest)
        try:
            name = await self.record.set_aside(digest, wrong)
        except FleeceError as failure:
            self.progress.warn(str(failure))
            return error
        if name is None:
            return error
        self.seen.set_aside[digest] = name
        return type(error)(error.what, error.where, f"{error.why}; the chunk is set aside as {name}", error.hint)

    def _is_wrong(self, digest: bytes, blob: Blob) -> bool:
        return self._plain_size(blob, digest) is None
