"""Reading one snapshot of a datastore."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from core.errors import UsageError
from core.limits import in_io_thread
from datastore.blob import MAX_ENCODED_BLOB, Blob
from datastore.dynamic_index import DynamicIndex
from datastore.errors import SnapshotNotFoundError
from datastore.fixed_index import FixedIndex
from datastore.index import ArchiveIndex
from datastore.interface import BlockingChunkStore
from datastore.names import MANIFEST_NAME, ArchiveKind, Snapshot, archive_kind
from datastore.store import Datastore


@dataclass(frozen=True, slots=True)
class LocalReader:
    """See `repository.interface.Reader`."""

    store: Datastore
    snapshot: Snapshot
    origin: bool = False  #: chunks come from where they lie, not from a cache

    def from_origin(self) -> "LocalReader":
        """See `OriginReads.from_origin`."""
        return replace(self, origin=True)

    async def manifest(self) -> bytes:
        """See `Reader.manifest`."""
        return await in_io_thread(self.store.read_manifest, self.snapshot)

    async def open_index(self, name: str, *, size: int | None = None) -> ArchiveIndex:
        """See `Reader.open_index`."""
        return await in_io_thread(open_snapshot_index, self.store, self.snapshot, name, size)

    async def read_blob(self, name: str, *, limit: int = MAX_ENCODED_BLOB) -> bytes:
        """See `Reader.read_blob`."""
        if archive_kind(name) is not ArchiveKind.BLOB:
            raise UsageError("read blob", f"{self.snapshot}/{name}", "its name does not end in .blob")
        return await in_io_thread(self.store.read_file, self.snapshot, name, limit)

    async def read_chunk(self, digest: bytes) -> Blob:
        """See `Reader.read_chunk`."""
        return await self.store.chunks.read(digest, origin=self.origin)

    async def read_chunks(self, digests: Sequence[bytes]) -> list[Blob]:
        """See `Reader.read_chunks`."""
        return await self.store.chunks.read_many(digests, origin=self.origin)

    @property
    def reads_block_briefly(self) -> bool:
        """See `BlockingReads.reads_block_briefly`."""
        return isinstance(self.store.chunks, BlockingChunkStore)

    def read_chunk_blocking(self, digest: bytes) -> Blob:
        """See `BlockingReads.read_chunk_blocking`."""
        assert isinstance(self.store.chunks, BlockingChunkStore)
        return self.store.chunks.read_blocking(digest)

    def disk_order(self, digests: Sequence[bytes]) -> list[int]:
        """See `Reader.disk_order`."""
        return self.store.chunks.disk_order(digests)


@asynccontextmanager
async def open_reader(store: Datastore, snapshot: Snapshot) -> AsyncIterator[LocalReader]:
    """Read `snapshot` while the block runs, holding its shared lock.

    Raises:
        SnapshotNotFoundError: not there, or unfinished.
        LockedError: it is being removed or written.
        StoreError: PBS has the store in a maintenance mode that refuses reading.
    """
    await in_io_thread(store.check_readable)
    if not await in_io_thread(store.is_finished, snapshot):
        raise _not_there(store, snapshot)
    async with store.locks.snapshot(snapshot, shared=True):
        if not await in_io_thread(store.is_finished, snapshot):
            raise _not_there(store, snapshot)
        yield LocalReader(store, snapshot)


def open_snapshot_index(store: Datastore, snapshot: Snapshot, name: str, size: int | None = None) -> ArchiveIndex:
    """Open the index `name` of `snapshot`, that of an archive of `size` bytes; nothing else is compared.

    Raises:
        NotFoundError: not there.
        FormatError: no index, or one of another size.
        StoreError: unreadable.
    """
    kind = archive_kind(name)
    where = f"{snapshot}/{name}"
    path = store.base / snapshot.path / name
    if kind is ArchiveKind.FIXED:
        return FixedIndex.open(path, where=where, size=size)
    if kind is ArchiveKind.DYNAMIC:
        return DynamicIndex.open(path, where=where, size=size)
    raise UsageError("read index", where, "a blob is no index")


def _not_there(store: Datastore, snapshot: Snapshot) -> SnapshotNotFoundError:
    why = f"it is unfinished (no {MANIFEST_NAME})" if store.exists(snapshot) else "there is no such snapshot"
    return SnapshotNotFoundError("read", str(snapshot), why, f"'fleece list {snapshot.group}' shows what there is")
