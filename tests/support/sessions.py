"""Doubles for the pipelines: disks in memory, a repository in memory, and a fault plan for both.

`MemoryRepository` keeps what the interface says and no more: encoded chunks by digest, index files and blobs by name.
It checks what a session must check (digests known before `append`, counts and checksums at `close_index`), so a
pipeline that breaks a rule of the interface fails here too.
"""

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from core.buffers import Buffer, WritableBuffer
from core.disks import Extent, ExtentState, ReadPlan
from core.errors import FleeceError, FormatError, SourceError, TargetError
from core.progress import Progress
from datastore.blob import MAX_ENCODED_BLOB, Blob
from datastore.changes import NamespaceMove, NamespaceRemoval
from datastore.errors import ChunkNotFoundError, SnapshotNotFoundError
from datastore.fixed_index import FixedHeader, FixedIndex
from datastore.gc import DEFAULT_CUTOFF_S, LOCK_WAIT_S, GcReport
from datastore.index import ArchiveIndex
from datastore.interface import PutResult
from datastore.manifest import Manifest
from datastore.names import MANIFEST_NAME, ROOT, Group, Namespace, Snapshot
from datastore.prune import KeepOptions, PruneResult
from datastore.usage_history import UsageSample
from repository.interface import FIXED_CHUNK_SIZE, GroupInfo, SnapshotInfo, StoreUsage

Hook = Callable[[str], None]


def nothing(call: str) -> None:
    """The fault plan without faults."""


@dataclass
class Faults:
    """Raises `error` at the `number`-th call (from 1) of the method `call`; must be met."""

    call: str
    number: int
    error: Exception
    seen: int = 0

    def __call__(self, call: str) -> None:
        if call == self.call:
            self.seen += 1
            if self.seen == self.number:
                raise self.error

    @property
    def met(self) -> bool:
        """True if the fault happened."""
        return self.seen >= self.number


class MemoryDisk:
    """A `DiskSource` over bytes that notes what is read and discarded."""

    def __init__(
        self,
        name: str,
        data: Buffer,
        *,
        extents: Sequence[Extent] | None = None,
        base: int | None = None,
        reason: str = "",
        delay_s: float = 0.0,
        hook: Hook = nothing,
    ) -> None:
        self.name, self.data, self.size = name, data, len(data)
        self.plan = ReadPlan(base, reason)
        self._extents = extents
        self._delay_s = delay_s
        self._hook = hook
        self.read: list[tuple[int, int]] = []
        self.discarded: list[tuple[int, int]] = []
        self.in_flight = self.most_in_flight = 0

    async def extents(self, *, incremental: bool = True) -> Sequence[Extent]:
        self._hook("extents")
        if self._extents is None:
            return [Extent(0, self.size, ExtentState.DATA)]
        if incremental:
            return self._extents
        return [
            Extent(offset, length, ExtentState.DATA if state is ExtentState.CLEAN else state)
            for offset, length, state in self._extents
        ]

    async def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        self._hook("read_into")
        if offset < 0 or offset + len(buffer) > self.size:
            raise SourceError("read", self.name, f"{offset}+{len(buffer)} is outside the disk")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await trio.sleep(self._delay_s)
        finally:
            self.in_flight -= 1
        buffer[:] = self.data[offset : offset + len(buffer)]
        self.read.append((offset, len(buffer)))

    async def discard(self, offset: int, length: int) -> None:
        self._hook("discard")
        self.discarded.append((offset, length))


class MemoryTarget:
    """A `DiskTarget` over a bytearray filled with rubbish, unless it is said to read as zeros."""

    def __init__(self, size: int, *, reads_zero: bool = False, hook: Hook = nothing) -> None:
        self.size, self.reads_zero = size, reads_zero
        self.data = bytearray(size) if reads_zero else bytearray(b"\xa5" * size)
        self.written = self.zeroed = 0
        self.flushed = False
        self._hook = hook

    async def write(self, offset: int, data: Buffer) -> None:
        self._hook("write")
        if offset < 0 or offset + len(data) > self.size:
            raise TargetError("write", "the target", f"{offset}+{len(data)} is outside")
        await trio.lowlevel.checkpoint()
        self.data[offset : offset + len(data)] = data
        self.written += len(data)

    async def zero(self, offset: int, length: int) -> None:
        self._hook("zero")
        await trio.lowlevel.checkpoint()
        self.data[offset : offset + length] = bytes(length)
        self.zeroed += length

    async def flush(self) -> None:
        self._hook("flush")
        self.flushed = True


@dataclass
class Stored:
    """One snapshot in memory."""

    snapshot: Snapshot
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class _Writer:
    name: str
    size: int
    digests: bytearray
    ctime: int = 1


class MemorySession:
    """A `BackupSession` over a `MemoryRepository`; fixed indexes only."""

    def __init__(self, repository: "MemoryRepository", snapshot: Snapshot, base: Snapshot | None) -> None:
        self.repository, self.snapshot, self.base = repository, snapshot, base
        self.stored = Stored(snapshot)
        self.sizes: dict[bytes, int] = {}
        self.writers: dict[int, _Writer] = {}
        self.puts: list[bytes] = []
        self.in_flight = self.most_in_flight = 0
        self.appended: list[tuple[int, int]] = []  # writer, number
        self.finished = False
        self.warnings: list[str] = []

    async def previous_manifest(self) -> bytes | None:
        return None if self.base is None else self.repository.stored[self.base].files[MANIFEST_NAME]

    async def previous_index(self, name: str) -> ArchiveIndex | None:
        if self.base is None or name not in self.repository.stored[self.base].files:
            return None
        index = FixedIndex.from_bytes(self.repository.stored[self.base].files[name], where=f"{self.base}/{name}")
        for number in range(index.count):
            self.sizes[index.digest(number)] = index.span(number)[1]
        return index

    def knows(self, digest: bytes) -> bool:
        return digest in self.sizes

    async def open_index(
        self, name: str, *, size: int | None = None, chunk_size: int = FIXED_CHUNK_SIZE, reuse_csum: bytes | None = None
    ) -> int:
        self.repository.hook("open_index")
        assert size is not None
        digests = bytearray(32 * -(-size // chunk_size))
        if reuse_csum is not None:
            previous = await self.previous_index(name)
            assert previous is not None
            assert previous.csum == reuse_csum
            digests[:] = previous.digests
        number = len(self.writers) + 1
        self.writers[number] = _Writer(name, size, digests)
        return number

    async def put_chunk(self, writer: int, digest: bytes, size: int, blob: Blob) -> PutResult:
        assert writer in self.writers
        assert not self.knows(digest), "a known chunk was put"
        assert digest not in self.puts, "a chunk was put twice"
        self.puts.append(digest)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await trio.sleep(self.repository.put_delay_s)
            if self.repository.put_gate is not None:
                await self.repository.put_gate.wait()
        finally:
            self.in_flight -= 1
        self.repository.hook("put_chunk")
        duplicate = digest in self.repository.chunks
        if not duplicate:
            self.repository.chunks[digest] = bytes(blob)
        self.sizes[digest] = size
        return PutResult(duplicate, len(self.repository.chunks[digest]))

    async def append(self, writer: int, entries: Sequence[tuple[int, bytes]]) -> None:
        self.repository.hook("append")
        index = self.writers[writer]
        for offset, digest in entries:
            assert self.sizes[digest] == min(FIXED_CHUNK_SIZE, index.size - offset)
            number, rest = divmod(offset, FIXED_CHUNK_SIZE)
            assert rest == 0
            index.digests[32 * number : 32 * (number + 1)] = digest
            self.appended.append((writer, number))

    async def close_index(self, writer: int, count: int, size: int, csum: bytes) -> None:
        self.repository.hook("close_index")
        index = self.writers[writer]
        assert bytes(32) not in [bytes(index.digests[at : at + 32]) for at in range(0, len(index.digests), 32)]
        assert (len(index.digests) // 32, index.size) == (count, size)
        assert hashlib.sha256(index.digests).digest() == csum
        header = FixedHeader(bytes(16), 1, csum, size, FIXED_CHUNK_SIZE)
        self.stored.files[index.name] = header.pack() + bytes(index.digests)

    async def put_blob(self, name: str, blob: Blob | Buffer) -> None:
        self.repository.hook("put_blob")
        assert name not in self.stored.files
        self.stored.files[name] = bytes(blob)

    async def finish(self) -> None:
        self.repository.hook("finish")
        assert MANIFEST_NAME in self.stored.files
        self.repository.stored[self.snapshot] = self.stored
        self.finished = True

    async def abort(self) -> None:
        self.stored = Stored(self.snapshot)


class BlockingMemorySession(MemorySession):
    """A `MemorySession` that takes chunks in worker threads too (`BlockingPuts`)."""

    puts_block_briefly = True
    blocking_puts = 0

    def put_chunk_blocking(self, writer: int, digest: bytes, size: int, blob: Blob) -> PutResult:
        assert writer in self.writers
        assert digest not in self.puts, "a chunk was put twice"
        self.puts.append(digest)
        self.blocking_puts += 1
        time.sleep(self.repository.put_delay_s)
        self.repository.hook("put_chunk")
        duplicate = digest in self.repository.chunks
        self.repository.chunks.setdefault(digest, bytes(blob))
        return PutResult(duplicate, len(self.repository.chunks[digest]))

    def chunk_was_put(self, digest: bytes, size: int) -> None:
        self.sizes[digest] = size


class MemoryReader:
    """A `Reader` over a `MemoryRepository` that counts what is read."""

    def __init__(self, repository: "MemoryRepository", stored: Stored) -> None:
        self.repository, self.stored, self.snapshot = repository, stored, stored.snapshot

    async def manifest(self) -> bytes:
        return self.stored.files[MANIFEST_NAME]

    async def open_index(self, name: str, *, size: int | None = None) -> ArchiveIndex:
        where = f"{self.snapshot}/{name}"
        if name not in self.stored.files:
            raise SnapshotNotFoundError("read index", where, "there is no such file")
        index = FixedIndex.from_bytes(self.stored.files[name], where=where)
        if size not in (None, index.size):
            raise FormatError("read index", where, f"wrong size ({index.size} != {size})")
        return index

    async def read_blob(self, name: str, *, limit: int = MAX_ENCODED_BLOB) -> bytes:
        if name not in self.stored.files:
            raise SnapshotNotFoundError("read blob", f"{self.snapshot}/{name}", "there is no such file")
        if (size := len(self.stored.files[name])) > limit:
            why = f"wrong size ({size} bytes, at most {limit} are possible)"
            raise FormatError("read blob", f"{self.snapshot}/{name}", why)
        return self.stored.files[name]

    async def read_chunk(self, digest: bytes) -> Blob:
        await trio.sleep(self.repository.read_delay_s)
        return self._chunk(digest)

    async def read_chunks(self, digests: Sequence[bytes]) -> list[Blob]:
        await trio.sleep(self.repository.read_delay_s)
        return [self._chunk(digest) for digest in digests]

    def disk_order(self, digests: Sequence[bytes]) -> list[int]:
        return sorted(range(len(digests)), key=lambda position: digests[position])

    def _chunk(self, digest: bytes) -> Blob:
        self.repository.hook("read_chunk")
        self.repository.chunk_reads.append(digest)
        if digest not in self.repository.chunks:
            raise ChunkNotFoundError("read chunk", digest.hex(), "it is not in the store")
        return Blob.parse(self.repository.chunks[digest], where=digest.hex())


class BlockingMemoryReader(MemoryReader):
    """A `MemoryReader` that gives chunks in worker threads too (`BlockingReads`)."""

    reads_block_briefly = True
    blocking_reads = 0

    def read_chunk_blocking(self, digest: bytes) -> Blob:
        self.blocking_reads += 1
        time.sleep(self.repository.read_delay_s)
        return self._chunk(digest)


def _not_here() -> FleeceError:
    return FleeceError("do this", "memory:", "a repository in memory has no upkeep")


class NoUpkeep:
    """The upkeep of a `Repository` that has none: everything is refused."""

    async def prune(
        self, group: Group, keep: KeepOptions, *, dry_run: bool = False, progress: Progress | None = None
    ) -> PruneResult:
        raise _not_here()

    async def set_notes(self, target: Snapshot | Group, text: str) -> None:
        raise _not_here()

    async def upload_log(self, snapshot: Snapshot, blob: Blob | Buffer) -> None:
        raise _not_here()

    async def set_protected(self, snapshot: Snapshot, *, protected: bool) -> bool:
        raise _not_here()

    async def set_owner(self, group: Group, owner: str) -> None:
        raise _not_here()

    async def create_namespace(self, ns: Namespace, *, known: Collection[Namespace] | None = None) -> bool:
        raise _not_here()

    async def delete_namespace(self, ns: Namespace, *, groups: bool = False) -> NamespaceRemoval:
        raise _not_here()

    async def move_namespace(self, source: Namespace, target: Namespace) -> NamespaceMove:
        raise _not_here()

    async def usage(self) -> StoreUsage:
        raise _not_here()

    async def collect_garbage(
        self,
        *,
        cutoff_s: int = DEFAULT_CUTOFF_S,
        lock_wait_s: float = LOCK_WAIT_S,
        dry_run: bool = False,
        allow_empty: bool = False,
        progress: Progress | None = None,
    ) -> GcReport:
        raise _not_here()

    async def gc_status(self) -> dict[str, Any] | None:
        return None

    async def usage_history(self) -> list[UsageSample]:
        return []


class MemoryRepository(NoUpkeep):
    """A `Repository` as far as the pipelines use it."""

    name = "memory:"

    def __init__(self, *, hook: Hook = nothing, blocking: bool = False) -> None:
        self.hook = hook
        self.session = BlockingMemorySession if blocking else MemorySession
        self.open_reader = BlockingMemoryReader if blocking else MemoryReader
        self.chunks: dict[bytes, bytes] = {}
        self.stored: dict[Snapshot, Stored] = {}
        self.chunk_reads: list[bytes] = []
        self.put_delay_s = self.read_delay_s = 0.0
        self.put_gate: trio.Event | None = None  #: puts wait for it
        self.failed_verification: set[Snapshot] = set()

    async def identity(self) -> str:
        return self.name

    async def namespaces(self, parent: Namespace = ROOT, *, depth: int | None = None) -> list[Namespace]:
        return [parent]

    async def groups(self, ns: Namespace = ROOT) -> list[GroupInfo]:
        return [
            GroupInfo(group, None, "", 1, await self.latest(group))
            for group in dict.fromkeys(snapshot.group for snapshot in self.stored)
        ]

    async def snapshots(
        self, ns: Namespace = ROOT, group: Group | None = None, *, unfinished: bool = False
    ) -> list[SnapshotInfo]:
        return [await self.snapshot(snapshot) for snapshot in self.stored]

    async def snapshot(self, snapshot: Snapshot) -> SnapshotInfo:
        state = {"state": "failed"} if snapshot in self.failed_verification else None
        return SnapshotInfo(snapshot, (), True, None, False, "", state, None, None)

    async def latest(self, group: Group) -> Snapshot | None:
        return max(
            (snapshot for snapshot in self.stored if snapshot.group == group),
            key=lambda snapshot: snapshot.ctime,
            default=None,
        )

    async def forget(self, snapshot: Snapshot) -> None:
        del self.stored[snapshot]

    async def forget_group(self, group: Group) -> list[Snapshot]:
        for snapshot in [snapshot for snapshot in self.stored if snapshot.group == group]:
            del self.stored[snapshot]
        return []

    @asynccontextmanager
    async def backup(self, snapshot: Snapshot, *, owner: str | None = None) -> AsyncIterator[MemorySession]:
        base = await self.latest(snapshot.group)
        yield self.session(self, snapshot, None if base in self.failed_verification else base)

    @asynccontextmanager
    async def reader(self, snapshot: Snapshot) -> AsyncIterator[MemoryReader]:
        if snapshot not in self.stored:
            raise SnapshotNotFoundError("read", str(snapshot), "there is no such snapshot")
        yield self.open_reader(self, self.stored[snapshot])

    def manifest(self, snapshot: Snapshot) -> Manifest:
        """The parsed manifest of a snapshot, for tests that look at it."""
        return Manifest.parse(self.stored[snapshot].files[MANIFEST_NAME], where=str(snapshot))

    def damage(self, digest: bytes, position: int = -1) -> None:
        """Flip a bit of a stored chunk."""
        data = bytearray(self.chunks[digest])
        data[position] ^= 1
        self.chunks[digest] = bytes(data)


def chunks_of(*letters: str, tail: int = 0) -> bytes:
    """A disk image whose chunks are full of one letter each (`.` zeros, `?` incompressible), and a tail of `~`."""
    pieces = []
    for position, letter in enumerate("".join(letters)):
        if letter == ".":
            pieces.append(bytes(FIXED_CHUNK_SIZE))
        elif letter == "?":
            pieces.append(hashlib.shake_256(bytes([position])).digest(FIXED_CHUNK_SIZE))
        else:
            pieces.append(letter.encode() * FIXED_CHUNK_SIZE)
    return b"".join(pieces) + b"~" * tail


class StagedError(FleeceError):
    """An error that only tests raise."""
