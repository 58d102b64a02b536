"""What a datastore needs of a storage backend: one store for chunks, one for all other files.

The local folder implements both (`local_chunks`, `local_meta`); the S3 backend puts a bucket behind them. Garbage
collection, verify, prune and sessions are written against these two. One test suite
(`tests/datastore/test_chunk_store.py`) runs over every implementation.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import trio

from core.buffers import Buffer
from core.progress import Progress
from datastore.blob import Blob
from datastore.gc_status import GcStatus
from datastore.locks import Writer
from datastore.names import Namespace


class PutResult(NamedTuple):
    """What became of a chunk that was handed over."""

    duplicate: bool  #: the store had it already
    stored: int  #: bytes it takes in the store


class SweepGuard(Protocol):
    """What a sweep must ask before it removes anything."""

    async def ready(self) -> None:
        """Return once everything in use is marked and access times are known to be right.

        Before that a sweep may list names, but no age counts. Raises if nothing may be removed.
        """
        ...

    def uses(self, digest: bytes) -> bool:
        """True if this run has marked the chunk; for worker threads, about what is about to be removed.

        An age that says otherwise is wrong then, and so may be all others.

        Raises:
            StoreError: the clock was set meanwhile.
        """
        ...


class ChunkStore(Protocol):
    """Chunks by digest."""

    async def insert(self, digest: bytes, blob: Blob, *, cache: bool = True, folder: str | None = None) -> PutResult:
        """Store the chunk; one that is there is touched and kept.

        `cache` False asks a store with a cache in front not to keep it there. `folder` (relative to the store's) takes
        the temporary file where one is needed: that of a session's snapshot, so that what a killed one leaves goes with
        the unfinished snapshot. Cancelled or failed, the chunk is there whole or not at all.

        Raises:
            StoreError: no space, no rights, or a file that cannot be this chunk is in its place.
            LockedError: another process holds the chunk for a minute.
        """
        ...

    async def read(self, digest: bytes, *, origin: bool = False) -> Blob:
        """The chunk as stored; only its header is checked. `origin` True passes by a cache.

        Raises:
            ChunkNotFoundError: not there.
            FormatError: no blob.
            StoreError: unreadable.
        """
        ...

    async def read_many(self, digests: Sequence[bytes], *, origin: bool = False) -> list[Blob]:
        """Several chunks, in the given order; as `read`."""
        ...

    async def touch(self, digest: bytes) -> bool:
        """Mark the chunk as used now; False if it is not there."""
        ...

    async def check_access_times(
        self, zero_digest: bytes, zero_blob: Blob, *, task_status: "trio.TaskStatus[float]" = trio.TASK_STATUS_IGNORED
    ) -> None:
        """See to it that touching a chunk changes its access time, which garbage collection lives on; takes 1 s.

        Also puts the zero chunk into the store. Started in a nursery, it gives the time (Unix seconds) by the clock
        that sets access times, before it begins to wait.

        Raises:
            StoreError: access times do not change here.
        """
        ...

    async def mark(self, digests: Buffer) -> list[bytes]:
        """Touch many chunks (packed digests, ascending as a rule) for garbage collection.

        Returns:
            the missing ones; their bad copies are touched. A store with a cache in front gives those that are not known
            to be there, and remembers that they are used; `sweep` finds out which of them are missing.
        """
        ...

    async def missing(self, digests: Buffer) -> list[bytes]:
        """Touch chunks as `mark` does, and give those that are not there for certain.

        Raises:
            StoreError: it cannot be told.
        """
        ...

    async def sweep(
        self,
        min_atime: int,
        oldest_writer: int,
        guard: SweepGuard,
        status: GcStatus,
        progress: Progress,
        *,
        dry_run: bool = False,
        allow_empty: bool = False,
    ) -> list[bytes] | None:
        """Remove every chunk that was last touched before `min_atime`, under its lock, and count all of them.

        Cancelled or failed, everything that is left is whole, and `status` counts what was done.

        Returns:
            the chunks that are used, but not there; None if `mark` gave just these.

        Args:
            min_atime: Unix seconds.
            oldest_writer: Unix seconds; what was touched before, but not before `min_atime`, is pending.
            guard: asked before the first look at an age, and about every chunk before it goes.
            status: gets the counters of chunks.
            progress: told how far it is.
            dry_run: count only; what would go counts as removed.
            allow_empty: without any index, too, remove what a bucket holds: it is no mistake.

        Raises:
            StoreError: a chunk can be neither looked at nor removed, or one in use looks old.
        """
        ...

    async def quarantine(self, digest: bytes, wrong: Callable[[Blob], bool] | None = None) -> str | None:
        """Set a chunk that was found corrupt aside under a `.bad` name.

        Args:
            digest: the chunk.
            wrong: says so of what is there now, in a worker thread, while nobody else can change it; what is no blob is
                wrong in any case. None: it is.

        Returns:
            its new name; None if it is not there, or not wrong.

        Raises:
            StoreError: it cannot be read or renamed.
            LockedError: another process holds the chunk for a minute.
        """
        ...

    async def times_set_aside(self) -> int:
        """A number that grows whenever a chunk is set aside, by this process or another one.

        A backup takes over chunks without looking at them; if the number has grown since it began, it must.

        Raises:
            StoreError: it cannot be read.
        """
        ...

    def disk_order(self, digests: Sequence[bytes]) -> list[int]:
        """Positions in `digests` in the order in which reading is quickest."""
        ...

    def writer(self, *, wait_s: float) -> AbstractAsyncContextManager[Writer]:
        """Be a writer while the block runs: garbage collection keeps what is inserted meanwhile.

        Raises:
            LockedError: somebody else's garbage collection holds the store for longer than `wait_s`.
        """
        ...

    def exclusive(self, *, wait_s: float) -> AbstractAsyncContextManager[float | None]:
        """Be the only garbage collection while the block runs; gives the start time of the oldest writer, or None.

        Raises:
            LockedError: another one, or a writer that this store cannot run beside, for longer than `wait_s`.
        """
        ...


@runtime_checkable
class BlockingChunkStore(Protocol):
    """What a chunk store offers besides, if inserting and reading are a few quick system calls.

    Who has just compressed a chunk in a worker thread can then store it there: two hand-overs less, and it is written
    from that core's cache (a fifth of the CPU time of a backup). So it is with reading and decompressing.
    """

    @property
    def blocks_briefly(self) -> bool:
        """True if `insert_blocking` waits for no device as a rule."""
        ...

    def read_blocking(self, digest: bytes) -> Blob:
        """As `ChunkStore.read`, in the calling worker thread; several threads at a time."""
        ...

    def insert_blocking(self, digest: bytes, blob: Blob, *, folder: str | None = None) -> PutResult:
        """As `ChunkStore.insert`, in the calling worker thread; several threads at a time."""
        ...


@runtime_checkable
class RepairingChunkStore(Protocol):
    """What a chunk store offers besides, if it has another copy of some chunks."""

    async def repair(self, digest: bytes, wrong: Callable[[Blob], bool]) -> bool:
        """Put the copy in the place of a chunk that is missing or wrong, if the copy itself is right.

        Args:
            digest: the chunk.
            wrong: says so of a chunk, in a worker thread.

        Returns:
            True if the store has the right chunk now.

        Raises:
            StoreError: it cannot be read or written.
        """
        ...


class MetaStore(Protocol):
    """Every other file of a datastore, by its path relative to the store's folder.

    The local tree is complete on every backend, so reading goes straight to the files; only writing passes here.
    """

    async def put(self, path: str, data: Sequence[Buffer], *, replace: bool, sync: bool = False) -> None:
        """Write the file atomically; with `replace` False one that is there is an error. `sync` makes it durable.

        Raises:
            StoreError: it is there, no space, no rights.
        """
        ...

    async def create(self, path: str, data: bytes) -> None:
        """Make a small file, whole or not at all.

        Raises:
            StoreError: it is there, no space, no rights.
        """
        ...

    async def publish_index(self, tmp: Path, path: str) -> None:
        """Give a finished index, written at `tmp` in the same folder, its name."""
        ...

    async def delete(self, path: str) -> bool:
        """Remove the file; False if it is not there."""
        ...

    async def delete_tree(self, path: str) -> None:
        """Remove the folder and all in it, a manifest first, so that a cut-off removal never looks like a backup."""
        ...

    async def make_folders(self, path: str) -> list[Path]:
        """Make the folder and those on the way to it; returns the ones that were missing, outermost first."""
        ...

    async def create_namespace(self, ns: Namespace) -> None:
        """Make the namespace and its parents; one that is there is fine."""
        ...

    async def delete_namespace(self, ns: Namespace) -> bool:
        """Remove a namespace that holds nothing; False if it holds something and stays. One that is gone is fine.

        Raises:
            StoreError: no rights.
        """
        ...

    async def sync(self, folders: Sequence[str], *, since: int) -> None:
        """Make everything written so far durable, as the store's sync level says.

        Args:
            folders: the snapshot's folder and those above it, which level `file` syncs one by one.
            since: descriptor of the store's folder, opened before the first write that counts.

        Raises:
            StoreError: something written since then did not get to the disk.
        """
        ...


class Backend(Protocol):
    """Where a datastore's bytes lie: what `Datastore` is made of."""

    @property
    def chunks(self) -> ChunkStore:
        """Its chunks."""
        ...

    @property
    def meta(self) -> MetaStore:
        """Its other files."""
        ...

    def check_writable(self) -> None:
        """See to it that the store may be written now.

        Raises:
            StoreError: it may not.
        """
        ...

    def close(self) -> None:
        """Give descriptors back; nothing may be running."""
        ...


@runtime_checkable
class RenamingMetaStore(Protocol):
    """What a metadata store offers besides, if a folder can get another name at once. Buckets cannot."""

    async def make_folders(self, path: str) -> list[Path]:
        """See `MetaStore.make_folders`."""
        ...

    async def rename_folder(self, path: str, target: str) -> None:
        """Give the folder `path` the path `target`, which is free and whose parent exists.

        Raises:
            StoreError: it cannot be done; the folder is where it was.
        """
        ...
