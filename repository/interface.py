"""Where snapshots live: one interface to a local datastore or a remote server.

`repository.local` implements it over a `datastore.Datastore`; the wire's remote implements it over HTTP/2. One test
suite (`tests/repository/test_interface.py`) runs over every implementation.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from core.buffers import Buffer
from core.progress import Progress
from datastore.blob import MAX_ENCODED_BLOB, Blob
from datastore.changes import NamespaceMove, NamespaceRemoval
from datastore.crypt_mode import CryptMode
from datastore.filters import GroupFilter
from datastore.gc import DEFAULT_CUTOFF_S, LOCK_WAIT_S, GcReport
from datastore.index import ArchiveIndex
from datastore.interface import PutResult
from datastore.names import ROOT, Group, Namespace, Snapshot
from datastore.prune import KeepOptions, PruneResult
from datastore.usage_history import UsageSample

if TYPE_CHECKING:
    from repository.verify import VerifyOptions, VerifyResult

#: Bytes of every chunk of a fixed index but the last: what PBS always uses.
FIXED_CHUNK_SIZE: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a snapshot as listed."""

    filename: str  #: with type extension
    size: int | None  #: bytes (images and streams plain, blobs encoded), None if unknown
    crypt_mode: CryptMode | None
    csum: bytes | None = None  #: as the manifest has it; servers do not list it


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """One snapshot as listed."""

    snapshot: Snapshot
    files: tuple[FileInfo, ...]  #: manifest order, then `index.json.blob`, then what is not listed
    finished: bool  #: has a manifest
    owner: str | None
    protected: bool
    comment: str  #: notes, all lines
    verification: dict[str, Any] | None  #: `{"state": "ok"|"failed", "upid": ...}` as in the manifest
    fingerprint: str | None  #: of the key, colon-separated hex
    size: int | None  #: sum of the file sizes, the manifest's included
    added: int | None = None  #: bytes of new chunks that its backup stored, as far as its manifest tells


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """One group as listed."""

    group: Group
    owner: str | None
    comment: str
    count: int  #: finished snapshots
    latest: Snapshot | None  #: newest finished snapshot


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Space where a datastore lies, in bytes."""

    total: int  #: 0 for a bucket, which has no size
    used: int  #: of a bucket by its chunks, as of the last garbage collection
    available: int  #: for whoever asks; less than `total - used` where some is reserved for root


class BackupSession(Protocol):
    """One snapshot being written. It is listed after `finish`, and never before.

    Left by an exception, cancelled or killed, it leaves no listed snapshot; what it stored is reused or swept by
    garbage collection.
    """

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot being written."""
        ...

    @property
    def base(self) -> Snapshot | None:
        """Newest finished snapshot of the group that is not known bad; locked until `finish`. None if there is none."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What a person should know about this session, for example that the group is somebody else's.

        `finish` may add to it.
        """
        ...

    async def previous_manifest(self) -> bytes | None:
        """The base's manifest blob as stored (raw), None without a base."""
        ...

    async def previous_index(self, name: str) -> ArchiveIndex | None:
        """The base's index `name` (full file name), checked against its manifest; its chunks become known chunks.

        None on any failure: no base, no such archive, unreadable, checksum differs.
        """
        ...

    def knows(self, digest: bytes) -> bool:
        """True if the chunk need not be put: a known chunk, or one put in this session."""
        ...

    async def open_index(
        self, name: str, *, size: int | None = None, chunk_size: int = FIXED_CHUNK_SIZE, reuse_csum: bytes | None = None
    ) -> int:
        """Open the index `name` for writing and return its writer id; the kind follows from the extension.

        Args:
            name: full file name, new in this snapshot.
            size: image size in bytes; only and always for a fixed index.
            chunk_size: of a fixed index, a power of two.
            reuse_csum: prefill a fixed index with the base's entries, whose csum must be this; then only changed
                chunks need appending.

        Raises:
            FleeceError: the base cannot be reused (no base, other csum, other number of chunks), or names clash.
        """
        ...

    async def put_chunk(self, writer: int, digest: bytes, size: int, blob: Blob) -> PutResult:
        """Store one chunk (`size` plain bytes) as it is; many calls may be in flight.

        Cancelled or failed, the chunk is there whole or not at all.
        """
        ...

    async def append(self, writer: int, entries: Sequence[tuple[int, bytes]]) -> None:
        """Set index entries: (offset of the chunk's first byte, digest). Each digest must be known (`knows`).

        A fixed index takes any order, a dynamic one needs each offset to be the end of the entry before.
        """
        ...

    async def close_index(self, writer: int, count: int, size: int, csum: bytes) -> None:
        """Put the index in place after comparing what the caller thinks is in it.

        `count` is the number of entries of the index (of a reused fixed one too), `size` the archive's bytes, `csum`
        the SHA-256 over the entry area.
        """
        ...

    async def put_blob(self, name: str, blob: Blob | Buffer) -> None:
        """Store the encoded blob `name`. `index.json.blob` (the manifest) comes last and appears only in `finish`."""
        ...

    async def finish(self) -> None:
        """Make everything durable as the store's sync level says, then list the snapshot.

        Once this returns, a dirty bitmap may be handed over. If it raises, the snapshot is not listed.
        """
        ...

    async def abort(self) -> None:
        """Throw the snapshot away; also done by leaving the session without `finish`."""
        ...


@runtime_checkable
class BlockingPuts(Protocol):
    """What a `BackupSession` offers besides, if its store takes chunks by a few quick system calls.

    Who has just compressed a chunk in a worker thread can then store it there: two hand-overs less, and it is written
    from that core's cache.
    """

    @property
    def puts_block_briefly(self) -> bool:
        """True if `put_chunk_blocking` may be used and waits for no device as a rule."""
        ...

    def put_chunk_blocking(self, writer: int, digest: bytes, size: int, blob: Blob) -> PutResult:
        """As `put_chunk`, in the calling worker thread; several threads at a time.

        The session does not know the chunk until the event loop calls `chunk_was_put`.
        """
        ...

    def chunk_was_put(self, digest: bytes, size: int) -> None:
        """In the event loop: `put_chunk_blocking` has stored this chunk."""
        ...


@runtime_checkable
class PutsAtOnce(Protocol):
    """What a `BackupSession` offers besides, if its way is so long that the usual number of puts may not fill it."""

    @property
    def puts_at_once(self) -> int:
        """Chunks that should be on their way to it at a time, at least 1."""
        ...


class Reader(Protocol):
    """One snapshot being read; holds its shared lock, so prune leaves it alone meanwhile."""

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot being read."""
        ...

    async def manifest(self) -> bytes:
        """The manifest blob as stored (raw)."""
        ...

    async def open_index(self, name: str, *, size: int | None = None) -> ArchiveIndex:
        """The index `name` (full file name). The caller compares it with the manifest.

        Given the `size` that the manifest lists, an index of another archive is refused before it takes memory.

        Raises:
            NotFoundError: not there.
            FormatError: no index, or of another size.
        """
        ...

    async def read_blob(self, name: str, *, limit: int = MAX_ENCODED_BLOB) -> bytes:
        """The encoded blob `name` as stored (raw), of at most `limit` bytes: those that the manifest lists, if it does.

        Raises:
            NotFoundError: not there.
            FormatError, RemoteAnswerError: it is longer, and took no more memory than `limit`.
        """
        ...

    async def read_chunk(self, digest: bytes) -> Blob:
        """The chunk as stored; nothing of it is checked but its header.

        Raises:
            ChunkNotFoundError: not in the store.
        """
        ...

    async def read_chunks(self, digests: Sequence[bytes]) -> list[Blob]:
        """Several chunks in one call, in the given order; as `read_chunk`."""
        ...

    def disk_order(self, digests: Sequence[bytes]) -> list[int]:
        """Positions in `digests` in the order in which reading is quickest."""
        ...


@runtime_checkable
class VerifyRecorder(Protocol):
    """What a `Repository` offers besides, if a verification can change it. A server verifies by itself."""

    async def why_not_recording(self) -> str:
        """Why nothing can be recorded now (read-only, no rights, maintenance); empty if it can."""
        ...

    async def record_verification(self, snapshot: Snapshot, state: str, upid: str) -> None:
        """Write the result (`ok` or `failed`) into the manifest; the caller may hold the snapshot's shared lock.

        Raises:
            SnapshotNotFoundError: it is gone.
            LockedError: its manifest is held by somebody else for 5 seconds.
            FleeceError: it cannot be written.
        """
        ...

    async def quarantine(self, digest: bytes, wrong: Callable[[Blob], bool]) -> str | None:
        """Set a chunk aside if `wrong` says so of what is there now; see `ChunkStore.quarantine`.

        Returns:
            its new name; None if it stayed or is gone.
        """
        ...


@runtime_checkable
class ChunkRepairer(Protocol):
    """What a `VerifyRecorder` offers besides, if it may have a good copy of a chunk somewhere else."""

    async def repair(self, digest: bytes, wrong: Callable[[Blob], bool]) -> bool:
        """Put the good copy in the place of a chunk that is missing, or of which `wrong` says so.

        Returns:
            True if the chunk is right now.

        Raises:
            FleeceError: it cannot be read or written.
        """
        ...


@runtime_checkable
class OriginReads(Protocol):
    """What a `Reader` offers besides, if chunks may come out of a cache."""

    def from_origin(self) -> "Reader":
        """The same, but chunks come from where they lie."""
        ...


@runtime_checkable
class BlockingReads(Protocol):
    """What a `Reader` offers besides, if chunks are read by a few system calls.

    Who decompresses a chunk in a worker thread can then read it there: a hand-over less, and it is in that core's
    cache.
    """

    @property
    def reads_block_briefly(self) -> bool:
        """True if `read_chunk_blocking` may be used and waits for no network."""
        ...

    def read_chunk_blocking(self, digest: bytes) -> Blob:
        """As `read_chunk`, in the calling worker thread; several threads at a time."""
        ...


@runtime_checkable
class ServerVerify(Protocol):
    """What a `Repository` on a server offers besides: it verifies where the data lie."""

    async def verify_there(
        self,
        selection: Namespace | Group | Snapshot,
        options: "VerifyOptions",
        progress: Progress,
        *,
        depth: int | None = None,
        filters: tuple[GroupFilter, ...] = (),
    ) -> "list[VerifyResult]":
        """Have the server verify, and follow it to the end; cancelled, it is asked to stop.

        Args:
            selection: a namespace means those below it too.
            options: `ignore_verified` and `outdated_after` count, the rest is the server's affair.
            progress: gets the lines of the server's log.
            depth: levels below a namespace; None: all.
            filters: only groups that these mean.

        Raises:
            SnapshotNotFoundError: not there.
            FleeceError: the server says no, is away, or failed for another reason than damaged snapshots.
        """
        ...


class Repository(Protocol):
    """A datastore, local or remote."""

    @property
    def name(self) -> str:
        """As the command line takes it."""
        ...

    async def identity(self) -> str:
        """What tells this datastore from all others; dirty bitmaps are bound to it."""
        ...

    async def namespaces(self, parent: Namespace = ROOT, *, depth: int | None = None) -> list[Namespace]:
        """`parent` and all namespaces below it, depth first; `depth` limits how far down."""
        ...

    async def groups(self, ns: Namespace = ROOT) -> list[GroupInfo]:
        """The groups of one namespace in PBS's order."""
        ...

    async def snapshots(
        self, ns: Namespace = ROOT, group: Group | None = None, *, unfinished: bool = False
    ) -> list[SnapshotInfo]:
        """The snapshots of a namespace or group, by group and then oldest first."""
        ...

    async def snapshot(self, snapshot: Snapshot) -> SnapshotInfo:
        """One snapshot.

        Raises:
            SnapshotNotFoundError: not there.
        """
        ...

    async def latest(self, group: Group) -> Snapshot | None:
        """The newest finished snapshot of a group."""
        ...

    async def forget(self, snapshot: Snapshot) -> None:
        """Remove one snapshot; its chunks stay until garbage collection.

        Raises:
            ProtectedError, LockedError, SnapshotNotFoundError.
        """
        ...

    async def forget_group(self, group: Group) -> list[Snapshot]:
        """Remove a group's unprotected snapshots (and the group, if none is left); returns those that stayed."""
        ...

    async def prune(
        self, group: Group, keep: KeepOptions, *, dry_run: bool = False, progress: Progress | None = None
    ) -> PruneResult:
        """Remove the snapshots of a group that `keep` does not cover, the oldest first; none if `dry_run`.

        What cannot be removed stays, with a warning to `progress`. Cancelled, the rest stays.
        """
        ...

    async def set_notes(self, target: Snapshot | Group, text: str) -> None:
        """Set the notes of a snapshot or group; the empty text removes them.

        Raises:
            SnapshotNotFoundError, LockedError.
            UsageError: longer than 64 KiB.
        """
        ...

    async def upload_log(self, snapshot: Snapshot, blob: Blob | Buffer) -> None:
        """Store the log of the client that made a snapshot as `client.log.blob`, an encoded blob.

        Raises:
            SnapshotNotFoundError: not there.
            FormatError: no blob, or its CRC is wrong.
            FleeceError: there is a log already, or it cannot be written.
        """
        ...

    async def set_protected(self, snapshot: Snapshot, *, protected: bool) -> bool:
        """Keep a snapshot from being removed, or allow that again; False if it was so already.

        Raises:
            SnapshotNotFoundError, LockedError (it is in use).
        """
        ...

    async def set_owner(self, group: Group, owner: str) -> None:
        """Make `owner` (an auth id) the owner of a group.

        Raises:
            SnapshotNotFoundError, LockedError (a backup into it is running).
        """
        ...

    async def create_namespace(self, ns: Namespace, *, known: Collection[Namespace] | None = None) -> bool:
        """Make a namespace and those above it; False if it was there.

        `known`: the namespaces that are there, as the caller has just seen, so that they need not be listed again.
        """
        ...

    async def delete_namespace(self, ns: Namespace, *, groups: bool = False) -> NamespaceRemoval:
        """Remove a namespace and those below it; with `groups` also their groups, except for protected snapshots.

        Raises:
            SnapshotNotFoundError, LockedError.
            FleeceError: it holds groups, and `groups` is not given.
        """
        ...

    async def move_namespace(self, source: Namespace, target: Namespace) -> NamespaceMove:
        """Rename a namespace with all it holds, group by group.

        Raises:
            SnapshotNotFoundError, LockedError (a garbage collection is running).
            UsageError: names that cannot be, a group that is in both, or a repository that cannot do this: only a
                datastore in a local folder can.
        """
        ...

    async def usage(self) -> StoreUsage:
        """How full the place is where the datastore lies."""
        ...

    async def collect_garbage(
        self,
        *,
        cutoff_s: int = DEFAULT_CUTOFF_S,
        lock_wait_s: float = LOCK_WAIT_S,
        dry_run: bool = False,
        allow_empty: bool = False,
        progress: Progress | None = None,
    ) -> GcReport:
        """Remove the chunks that no snapshot uses any more; as `datastore.gc.collect_garbage`."""
        ...

    async def gc_status(self) -> dict[str, Any] | None:
        """What the last garbage collection found, with PBS's keys; None before the first, or if it is unreadable."""
        ...

    async def usage_history(self) -> list[UsageSample]:
        """How full it was after garbage collections, oldest first, one a day; empty where that is not known."""
        ...

    def backup(self, snapshot: Snapshot, *, owner: str | None = None) -> AbstractAsyncContextManager[BackupSession]:
        """Write a new snapshot while the block runs; without `finish` it is thrown away at the end.

        Raises:
            LockedError: a backup of this group is running.
            OwnerError: the group is somebody else's.
            FleeceError: the time is not newer than the newest snapshot's, the store is full or read-only.
        """
        ...

    def reader(self, snapshot: Snapshot) -> AbstractAsyncContextManager[Reader]:
        """Read a snapshot while the block runs; a second reader beside an open backup session works.

        Raises:
            SnapshotNotFoundError, LockedError.
        """
        ...
