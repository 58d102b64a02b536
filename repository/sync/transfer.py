"""One snapshot on its way: chunks and blobs as they are stored, checked, and the manifest last.

Nothing is decrypted and nothing compressed again. What the source says is believed nowhere: an index must have the
size and checksum of the manifest, a blob too; a chunk's CRC must be right, and of one that is not encrypted also digest
and length. So damage at the source, or a lie, ends in an error and not in a listed snapshot.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from core.errors import FleeceError, FormatError, NotFoundError
from core.limits import in_cpu_thread
from core.nursery import open_nursery
from core.progress import Progress, Task
from datastore.blob import MAX_CHUNK_SIZE, MAX_ENCODED_CHUNK, Blob, BlobKind
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode
from datastore.digests import DigestSet
from datastore.errors import CorruptChunkError
from datastore.fixed_index import FixedIndex
from datastore.index import ArchiveIndex
from datastore.manifest import Manifest, ManifestFile
from datastore.names import CLIENT_LOG_NAME, MANIFEST_NAME, ArchiveKind, Snapshot, archive_kind
from repository.interface import BackupSession, Reader
from repository.sync.interface import LogSession, TestedBase
from repository.sync.options import SyncOptions
from repository.sync.report import SnapshotReport, snapshot_text

#: Chunks that are read and checked side by side.
_BATCH: Final = 4
#: Plain bytes of a batch: as many chunks of the usual 4 MiB, and one alone where an index says that they have 16 MiB.
_BATCH_BYTES: Final = 16 << 20
#: Batches of one archive on their way at a time: with `_BATCH` as many chunks as PBS has.
_WORKERS: Final = 5
#: Batches of a whole sync on their way at a time, which bounds its memory however many groups are synced at once.
MAX_BATCHES: Final = 10
#: Index entries handed over by one call.
_ENTRIES: Final = 512

#: A chunk that is wanted: digest, plain size.
Wanted = tuple[bytes, int]


@dataclass(slots=True)
class SyncContext:
    """What all groups of a sync share."""

    options: SyncOptions
    owner: str  #: of what is written
    progress: Progress
    batches: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(MAX_BATCHES))


@dataclass(frozen=True, slots=True)
class Source:
    """A snapshot of the source, opened."""

    reader: Reader
    manifest: Manifest
    raw: bytes  #: the manifest as stored


async def load_source(reader: Reader, snapshot: Snapshot) -> Source:
    """Read and check the manifest of `snapshot`.

    Raises:
        SnapshotNotFoundError: it is gone.
        FormatError: it is none, or that of another snapshot.
    """
    raw = await reader.manifest()
    manifest = await in_cpu_thread(lambda: Manifest.parse(raw, where=f"{snapshot}/{MANIFEST_NAME}"))
    group = snapshot.group
    if (manifest.type, manifest.id, manifest.ctime) != (group.type, group.id, snapshot.ctime):
        raise FormatError("read manifest", str(snapshot), f"it is that of another snapshot, {manifest.snapshot}")
    return Source(reader, manifest, raw)


async def send_snapshot(source: Source, session: BackupSession, context: SyncContext) -> SnapshotReport:
    """Bring everything of a snapshot into `session`; `finish` is the caller's.

    Raises:
        FormatError, CorruptChunkError: the source's data are damaged, or not what its manifest says.
        FleeceError: it cannot be read or written.
    """
    report = SnapshotReport(session.snapshot)
    total = sum(file.size for file in source.manifest.files)
    with context.progress.task(snapshot_text(session.snapshot), total) as task:
        for file in source.manifest.files:
            await send_file(source.reader, session, file, context, report, task)
    if isinstance(session, LogSession):
        async with context.batches:  # as for blobs
            log = await client_log(source.reader, context.progress)
            if log is not None:
                await _paced(context, len(log))
                await session.put_log(log)
                report.sent += len(log)
    # Manifest last: a snapshot counts as finished once it is there.
    await session.put_blob(MANIFEST_NAME, source.raw)
    return report


async def send_file(
    reader: Reader,
    session: BackupSession,
    file: ManifestFile,
    context: SyncContext,
    report: SnapshotReport,
    task: Task,
) -> None:
    """Bring one archive over. Errors as `send_snapshot`."""
    report.size += file.size
    if archive_kind(file.filename) is ArchiveKind.BLOB:
        where = f"{reader.snapshot}/{file.filename}"
        if file.size > MAX_ENCODED_CHUNK:
            raise FormatError("read blob", where, f"{file.size} bytes, at most {MAX_ENCODED_CHUNK} are possible")
        async with context.batches:
            raw = await reader.read_blob(file.filename, limit=file.size)
            blob = await in_cpu_thread(_checked_blob, raw, file, where)
            await _paced(context, len(raw))
            await session.put_blob(file.filename, blob)
        report.sent += len(raw)
        task.advance(file.size)
        return
    index = await open_checked(reader, file)
    previous = await session.previous_index(file.filename)
    absent: set[bytes] = set()
    if previous is not None and isinstance(session, TestedBase):
        absent.update(await session.missing_chunks(previous))
    size = file.size if isinstance(index, FixedIndex) else None
    if isinstance(index, FixedIndex):
        writer = await session.open_index(file.filename, size=size, chunk_size=index.chunk_size)
    else:
        writer = await session.open_index(file.filename)
    sender = _Sender(reader, session, writer, file, context, report, task)
    await sender.send(index, absent)
    for begin in range(0, index.count, _ENTRIES):
        numbers = range(begin, min(begin + _ENTRIES, index.count))
        await session.append(writer, [(index.span(number)[0], index.digest(number)) for number in numbers])
        await trio.lowlevel.checkpoint()  # an index of a million chunks must not hold up other groups
    await session.close_index(writer, index.count, index.size, index.csum)
    report.chunks += index.count


async def open_checked(reader: Reader, file: ManifestFile) -> ArchiveIndex:
    """The index of an archive, which is the one that the manifest means.

    Raises:
        FormatError: it is not.
        NotFoundError: it is not there.
    """
    index = await reader.open_index(file.filename, size=file.size)
    csum = await in_cpu_thread(lambda: index.csum)
    if (csum, index.size) != (file.csum, file.size):
        why = f"its checksum is {csum.hex()} for {index.size} bytes, the manifest says {file.csum.hex()}, {file.size}"
        raise FormatError("read index", index.where, why, "'fleece verify' tells which snapshots are whole")
    return index


async def client_log(reader: Reader, progress: Progress) -> Blob | None:
    """The log that came with a snapshot; None without one, or if it is damaged, which is told."""
    where = f"{reader.snapshot}/{CLIENT_LOG_NAME}"
    try:
        raw = await reader.read_blob(CLIENT_LOG_NAME, limit=MAX_ENCODED_CHUNK)
        blob = Blob.parse(raw, where=where)
        await in_cpu_thread(lambda: blob.check(where=where))
    except NotFoundError:
        return None
    except FormatError as error:
        progress.warn(f"the client log of {snapshot_text(reader.snapshot)} is left out: {error.why}")
        return None
    return blob


def _checked_blob(raw: bytes, file: ManifestFile, where: str) -> Blob:
    csum = hashlib.sha256(raw).digest()
    if (len(raw), csum) != (file.size, file.csum):
        why = f"its checksum is {csum.hex()} for {len(raw)} bytes, the manifest says {file.csum.hex()}, {file.size}"
        raise FormatError("read blob", where, why, "'fleece verify' tells which snapshots are whole")
    blob = Blob.parse(raw, where=where)
    blob.check(where=where)
    return blob


async def _paced(context: SyncContext, amount: int) -> None:
    if context.options.rate is not None:
        await context.options.rate.take(amount)


@dataclass(slots=True)
class _Sender:
    """Brings the chunks of one archive over, several at a time."""

    reader: Reader
    session: BackupSession
    writer: int
    file: ManifestFile
    context: SyncContext
    report: SnapshotReport
    task: Task
    codec: ChunkCodec = field(default_factory=ChunkCodec)

    async def send(self, index: ArchiveIndex, absent: set[bytes]) -> None:
        """Send what the target does not know; `absent`: chunks that it should know, but that are not there."""
        send, receive = trio.open_memory_channel[list[Wanted]](0)
        async with open_nursery() as nursery, send:
            for _ in range(min(_WORKERS, -(-index.count // _BATCH))):
                nursery.start_soon(self._work, receive.clone())
            receive.close()
            await self._choose(index, absent, send)

    async def _choose(
        self, index: ArchiveIndex, absent: set[bytes], send: trio.MemorySendChannel[list[Wanted]]
    ) -> None:
        """Hand on what has to be sent, each chunk once, in the order of the archive."""
        queued = DigestSet()
        batch: list[Wanted] = []
        batch_bytes = known = 0
        for number in range(index.count):
            digest, size = index.digest(number), index.span(number)[1]
            if digest in queued or (self.session.knows(digest) and digest not in absent):
                known += size
            else:
                if not 1 <= size <= MAX_CHUNK_SIZE:
                    raise FormatError("read index", index.where, f"chunk {number} has {size} bytes")
                queued.add(digest, size)
                if batch and (len(batch) == _BATCH or batch_bytes + size > _BATCH_BYTES):
                    await send.send(batch)
                    batch, batch_bytes = [], 0
                batch.append((digest, size))
                batch_bytes += size
            if not number % _ENTRIES:
                self.task.advance(known)
                known = 0
                await trio.lowlevel.checkpoint()
        self.task.advance(known)
        if batch:
            await send.send(batch)

    async def _work(self, receive: trio.MemoryReceiveChannel[list[Wanted]]) -> None:
        async with receive:
            async for batch in receive:
                async with self.context.batches:
                    await self._move(batch)

    async def _move(self, batch: list[Wanted]) -> None:
        blobs = await self.reader.read_chunks([digest for digest, _ in batch])
        where = f"{self.reader.snapshot}/{self.file.filename}"
        await in_cpu_thread(check_chunks, self.codec, blobs, batch, self.file.crypt_mode, where)
        async with open_nursery() as nursery:
            for blob, (digest, size) in zip(blobs, batch, strict=True):
                await _paced(self.context, len(blob))
                nursery.start_soon(self._put, digest, size, blob)

    async def _put(self, digest: bytes, size: int, blob: Blob) -> None:
        mend = getattr(self.session, "mend_chunk", None)
        if mend is not None:
            await mend(self.writer, digest, size, blob)
        else:
            await self.session.put_chunk(self.writer, digest, size, blob)
        self.report.chunks_sent += 1
        self.report.sent += len(blob)
        self.task.advance(size)


def check_chunks(
    codec: ChunkCodec, blobs: Sequence[Blob], wanted: Sequence[Wanted], mode: CryptMode, where: str
) -> None:
    """See to it that chunks are what they are taken for, as far as that can be told without their key.

    Raises:
        FormatError: encrypted where the manifest says otherwise, or the other way round; an impossible length.
        CorruptChunkError: a wrong CRC, or (not encrypted) digest or length.
    """
    if len(blobs) != len(wanted):
        raise FormatError("read chunks", where, f"{len(wanted)} were asked for, {len(blobs)} came")
    plain: list[tuple[Blob, bytes, int]] = []
    for blob, (digest, size) in zip(blobs, wanted, strict=True):
        at = f"{where}, chunk {digest.hex()}"
        if blob.kind.encrypted is not (mode is CryptMode.ENCRYPT):
            state = "encrypted" if blob.kind.encrypted else "not encrypted"
            raise FormatError("read chunk", at, f"it is {state}, the manifest says crypt mode {mode.value}")
        if not blob.kind.header_size < len(blob) <= MAX_ENCODED_CHUNK:
            raise FormatError("read chunk", at, f"encoded it has {len(blob)} bytes")
        if not blob.kind.encrypted:
            plain.append((blob, digest, size))
            continue
        try:
            blob.check(where=at)
        except FormatError as error:
            # A server would put a wrong CRC right, and nobody without the key could see the damage any more.
            raise CorruptChunkError(error.what, at, error.why) from error
        if blob.kind is BlobKind.ENCRYPTED and len(blob.payload) != size:
            raise CorruptChunkError("read chunk", at, f"it has {len(blob.payload)} bytes, the index says {size}")
    for found in _errors(codec.decode_many(plain, crypt_mode=None, where=where)):
        raise found


def _errors(results: Sequence[object]) -> Iterator[FleeceError]:
    return (one for one in results if isinstance(one, FleeceError))
