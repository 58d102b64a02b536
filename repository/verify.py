"""Verify: is everything there that snapshots say, and is it what it was? Changes nothing.

Per snapshot the manifest, then each file it lists: a blob's size and checksum, an index's size and checksum, and every
chunk: CRC, length and digest. Chunks that several snapshots share are checked once per run.
"""

import errno
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from core.buffers import Buffer
from core.errors import FleeceError, FormatError
from core.limits import in_cpu_thread
from core.progress import Progress, Task
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode
from datastore.digests import DigestSet
from datastore.errors import CorruptChunkError, KeyNeededError, LockedError, SnapshotNotFoundError
from datastore.index import ArchiveIndex
from datastore.manifest import Manifest, ManifestFile
from datastore.names import ArchiveKind, Snapshot, archive_kind
from repository.fetch import fetch
from repository.interface import Reader, Repository
from repository.locate import Archive, check_index, load_readable

#: Chunks in a row that the system cannot read before the run stops: it is the disk, not the chunks.
MAX_SYSTEM_ERRORS: Final = 20
#: Lines about single chunks per file; the count of the others follows.
MAX_CHUNK_LINES: Final = 20
_SYSTEM_ERRORS: Final = frozenset((errno.EIO, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM))


@dataclass(slots=True)
class VerifyResult:
    """What came out for one snapshot."""

    snapshot: Snapshot
    errors: list[str] = field(default_factory=list)
    skipped: str = ""  #: why it was not looked at (locked, removed meanwhile); counts as ok

    @property
    def state(self) -> str:
        """`ok` or `failed`."""
        return "failed" if self.errors else "ok"

    def to_json(self) -> dict[str, Any]:
        """One element of what `fleece verify --output json` prints."""
        return {"snapshot": str(self.snapshot), "state": self.state, "errors": list(self.errors)}


@dataclass(slots=True)
class Seen:
    """Chunks that one run has checked already."""

    good: DigestSet = field(default_factory=DigestSet)
    bad: dict[bytes, str] = field(default_factory=dict)  #: digest -> what is wrong with it
    system_errors: int = 0  #: in a row


async def verify(
    repository: Repository, snapshots: Sequence[Snapshot], codec: ChunkCodec, progress: Progress | None = None
) -> list[VerifyResult]:
    """Verify `snapshots` one after the other, in the given order; as `verify_snapshot`."""
    seen = Seen()
    progress = Progress() if progress is None else progress
    return [await verify_snapshot(repository, snapshot, codec, progress, seen) for snapshot in snapshots]


async def verify_snapshot(
    repository: Repository,
    snapshot: Snapshot,
    codec: ChunkCodec,
    progress: Progress | None = None,
    seen: Seen | None = None,
) -> VerifyResult:
    """Check one finished snapshot under its shared lock.

    Without the key of an encrypted snapshot, or with another one, only CRCs can be checked, and signatures cannot.

    Args:
        repository: where it lies.
        snapshot: the snapshot.
        codec: with the key, if there is one.
        progress: told about each file and everything that is wrong.
        seen: of this run, so that shared chunks are read once.

    Raises:
        FleeceError: so many chunks in a row could not be read by the system that it makes no sense to go on.
    """
    progress = Progress() if progress is None else progress
    result = VerifyResult(snapshot)
    try:
        async with repository.reader(snapshot) as reader:
            try:
                manifest, codec = await load_readable(reader, codec)
            except FleeceError as error:
                result.errors.append(str(error))
                return result
            check = _Check(reader, codec, manifest, progress, Seen() if seen is None else seen)
            for entry in manifest.files:
                result.errors += await check.file(entry)
    except LockedError as error:
        result.skipped = f"locked ({error.why})"
    except SnapshotNotFoundError:
        result.skipped = "removed meanwhile"
    if result.skipped:
        progress.log(f"{snapshot} skipped: {result.skipped}")
    return result


@dataclass(slots=True)
class _Check:
    """Checks the files of one snapshot."""

    reader: Reader
    codec: ChunkCodec
    manifest: Manifest
    progress: Progress
    seen: Seen

    async def file(self, entry: ManifestFile) -> list[str]:
        """What is wrong with one file."""
        try:
            if archive_kind(entry.filename) is ArchiveKind.BLOB:
                await self._blob(entry)
                return []
            index = await self.reader.open_index(entry.filename)
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
        errors: list[str] = []
        numbers = list(self._unseen(index, errors))
        total = sum(index.span(number)[1] for number in numbers)
        with self.progress.task(f"{self.reader.snapshot}/{entry.filename}", total) as task:

            async def consume(number: int, data: Buffer | FleeceError) -> None:
                self._count(archive, number, data, errors, task)

            await fetch(self.reader, self.codec, archive, numbers, consume)
        if len(errors) > MAX_CHUNK_LINES:
            errors[MAX_CHUNK_LINES:] = [f"{index.where}: {len(errors) - MAX_CHUNK_LINES} more chunks are bad"]
        return errors

    def _unseen(self, index: ArchiveIndex, errors: list[str]) -> Iterator[int]:
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
                errors.append(f"{index.where} at {offset}: {self.seen.bad[digest]}")
            elif size != length:
                errors.append(f"{index.where} at {offset}: chunk {digest.hex()} has {size} bytes, not {length}")

    def _count(self, archive: Archive, number: int, data: Buffer | FleeceError, errors: list[str], task: Task) -> None:
        digest, (_, length) = archive.index.digest(number), archive.index.span(number)
        task.advance(length)
        encrypted = archive.entry.crypt_mode is CryptMode.ENCRYPT
        if not isinstance(data, FleeceError) or (isinstance(data, KeyNeededError) and encrypted):
            self.seen.system_errors = 0
            self.seen.good.add(digest, length)
            return
        errors.append(str(data))
        self.progress.log(str(data))
        if _is_system_error(data):
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
        if isinstance(data, FormatError) and not isinstance(data, CorruptChunkError):
            # Of the wrong kind for this archive; the chunk itself may be good.
            self.seen.good.add(digest, length)
        else:
            self.seen.bad[digest] = data.why


def _is_system_error(error: BaseException | None) -> bool:
    """True if the system could not read, which says nothing about the chunk."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno in _SYSTEM_ERRORS
        error = error.__cause__
    return False
