"""A backup session: one snapshot being written into a datastore.

Order of writes and why it survives a crash: docs/formats.md, "Life of a snapshot". In short: chunks, indexes and blobs,
then everything is made durable, and only then the manifest appears, which makes the snapshot a listed one.
"""

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from core.buffers import Buffer
from core.errors import FleeceError, UsageError
from core.limits import in_io_thread
from core.nursery import grace
from datastore.blob import MAX_CHUNK_SIZE, MAX_ENCODED_CHUNK, Blob
from datastore.changes import update_manifest
from datastore.digests import DigestSet
from datastore.dynamic_index import DynamicIndexWriter
from datastore.errors import LockedError, OwnerError, StoreError
from datastore.files import SyncLevel, open_folder, store_errors, unlink_quietly
from datastore.fixed_index import FixedIndexWriter
from datastore.index import ArchiveIndex
from datastore.interface import BlockingChunkStore, PutResult
from datastore.locks import HeldLock
from datastore.manifest import Manifest
from datastore.names import CLIENT_LOG_NAME, MANIFEST_NAME, ArchiveKind, Group, Snapshot, archive_kind
from datastore.reader import open_snapshot_index
from datastore.store import Datastore
from datastore.upid import Upid
from datastore.written import WrittenFiles, check_csum, check_extent, named_blob

#: Owner of a new group where nobody says otherwise.
DEFAULT_OWNER: Final = "root@pam"
#: Seconds that throwing away a failed snapshot may take.
_ABORT_TIMEOUT_S: Final = 60.0
#: Seconds that the end of a session may go on for when it is cancelled there.
_FINISH_GRACE_S: Final = 30.0
_ABORT_HINT: Final = "the next backup of the group removes it"
_TAKEN: Final = "there is a snapshot of this second already"


@dataclass(slots=True)
class _OpenIndex:
    """An index being written."""

    name: str
    tmp: Path
    writer: FixedIndexWriter | DynamicIndexWriter
    short_chunk: bool = False  #: a chunk shorter than the chunk size was put; only the last one may be


@dataclass(slots=True)
class LocalBackupSession:
    """See `repository.interface.BackupSession`. Made by `open_session`; not for several tasks but for `put_chunk`."""

    store: Datastore
    snapshot: Snapshot
    base: Snapshot | None
    warnings: list[str]  #: for people, for example about a foreign owner
    _folder: int  #: descriptor of the store's, from before the first write: it is told of errors of the disk
    _set_aside: int = 0  #: `ChunkStore.times_set_aside` when it began, or when it looked last
    _known: DigestSet = field(default_factory=DigestSet)
    _writers: dict[int, _OpenIndex] = field(default_factory=dict)
    _next_writer: int = 1
    _files: WrittenFiles = field(default_factory=WrittenFiles)
    _manifest: Blob | None = None
    _finished: bool = False
    _aborted: bool = False
    foreign: bool = False  #: the group belongs to somebody else; whoever may not write there all the same looks at it
    cache_chunks: bool = True  #: False asks a store with a cache in front not to keep uploaded chunks there

    async def previous_manifest(self) -> bytes | None:
        """See `BackupSession.previous_manifest`."""
        if self.base is None:
            return None
        return await in_io_thread(self.store.read_manifest, self.base)

    async def previous_index(self, name: str) -> ArchiveIndex | None:
        """See `BackupSession.previous_index`."""
        if self.base is None:
            return None
        index = await in_io_thread(self._checked_previous, self.base, name)
        if index is not None:
            # Not in a thread: put_chunk and knows of other archives use the same set meanwhile.
            self._known.add_index(index)
        return index

    def _checked_previous(self, base: Snapshot, name: str) -> ArchiveIndex | None:
        try:
            manifest = Manifest.parse(self.store.read_manifest(base), where=str(base))
            listed = manifest.file(name)
            index = open_snapshot_index(self.store, base, name, listed.size)
        except FleeceError:
            return None
        return index if (index.csum, index.size) == (listed.csum, listed.size) else None

    def knows(self, digest: bytes) -> bool:
        """See `BackupSession.knows`."""
        return digest in self._known

    def known_size(self, digest: bytes) -> int | None:
        """Plain bytes of a known chunk; None if the session does not know it."""
        return self._known.size_of(digest)

    def learn(self, index: ArchiveIndex) -> None:
        """The chunks of an index of the base become known chunks."""
        self._known.add_index(index)

    async def open_index(
        self,
        name: str,
        *,
        size: int | None = None,
        chunk_size: int = 4 << 20,
        reuse_csum: bytes | None = None,
        learn: bool = True,
    ) -> int:
        """See `BackupSession.open_index`; with `learn` False the entries taken over do not become known chunks."""
        self._check_new(name)
        kind = archive_kind(name)
        where = f"{self.snapshot}/{name}"
        if kind is ArchiveKind.BLOB or (kind is ArchiveKind.FIXED) != (size is not None):
            raise UsageError(
                "write index", where, "a fixed index needs a size, a dynamic one has none, a blob is no index"
            )
        previous = None
        if reuse_csum is not None:
            if learn:
                previous = await self.previous_index(name)
            elif self.base is not None:
                previous = await in_io_thread(self._checked_previous, self.base, name)
            if previous is None or previous.csum != reuse_csum:
                raise StoreError("reuse index", where, "the base snapshot holds no such index", "back it up in full")
        tmp = self.store.base / self.snapshot.path / f"{name.rpartition('.')[0]}.tmp_{kind.value[1:]}"

        def make() -> FixedIndexWriter | DynamicIndexWriter:
            if size is None:
                return DynamicIndexWriter(tmp, where=where)
            base = None if previous is None else previous.digests
            return FixedIndexWriter(tmp, size, chunk_size, where=where, base=base)

        writer = await in_io_thread(make)
        number = self._next_writer
        self._next_writer += 1
        self._writers[number] = _OpenIndex(name, tmp, writer)
        return number

    async def put_chunk(self, writer: int, digest: bytes, size: int, blob: Blob) -> PutResult:
        """See `BackupSession.put_chunk`."""
        self._check_chunk(writer, size, blob)
        result = await self.store.chunks.insert(digest, blob, cache=self.cache_chunks, folder=self.snapshot.path)
        self._known.add(digest, size)
        return result

    @property
    def puts_block_briefly(self) -> bool:
        """See `BlockingPuts.puts_block_briefly`."""
        return isinstance(self.store.chunks, BlockingChunkStore) and self.store.chunks.blocks_briefly

    def put_chunk_blocking(self, writer: int, digest: bytes, size: int, blob: Blob) -> PutResult:
        """See `BlockingPuts.put_chunk_blocking`."""
        self._check_chunk(writer, size, blob)
        assert isinstance(self.store.chunks, BlockingChunkStore)
        return self.store.chunks.insert_blocking(digest, blob, folder=self.snapshot.path)

    def chunk_was_put(self, digest: bytes, size: int) -> None:
        """See `BlockingPuts.chunk_was_put`."""
        self._known.add(digest, size)

    def _check_chunk(self, writer: int, size: int, blob: Blob) -> None:
        index = self._writer(writer)
        where = f"{self.snapshot}/{index.name}"
        if not 1 <= size <= MAX_CHUNK_SIZE or not blob.kind.header_size < len(blob) <= MAX_ENCODED_CHUNK:
            raise UsageError("store chunk", where, f"{size} bytes, encoded {len(blob)}: a chunk has 1 byte to 16 MiB")
        if isinstance(index.writer, FixedIndexWriter) and size != index.writer.chunk_size:
            if size > index.writer.chunk_size or index.short_chunk:
                raise UsageError("store chunk", where, f"{size} bytes; only the last chunk may be short, none longer")
            index.short_chunk = True

    async def append(self, writer: int, entries: Sequence[tuple[int, bytes]]) -> None:
        """See `BackupSession.append`."""
        index = self._writer(writer)
        for offset, digest in entries:
            size = self._known.size_of(digest)
            if size is None:
                why = f"chunk {digest.hex()} at {offset} was neither put nor is it known from the base"
                raise UsageError("write index", f"{self.snapshot}/{index.name}", why)
            if isinstance(index.writer, FixedIndexWriter):
                index.writer.set(index.writer.number_of(offset, size), digest)
            else:
                index.writer.append(offset, size, digest)

    async def close_index(self, writer: int, count: int, size: int, csum: bytes) -> None:
        """See `BackupSession.close_index`."""
        index = self._writer(writer)
        await self._close_writer(index, count, size, csum)
        await self.store.meta.publish_index(index.tmp, f"{self.snapshot.path}/{index.name}")
        del self._writers[writer]
        self._files.add_index(index.name, size, csum)

    async def _close_writer(self, index: _OpenIndex, count: int, size: int, csum: bytes) -> None:
        """The temporary file is whole then, or gone if its checksum is not the announced one."""
        where = f"{self.snapshot}/{index.name}"
        check_extent((index.writer.count, index.writer.size), (count, size), where)
        found = await in_io_thread(index.writer.close)
        if found != csum:
            await in_io_thread(unlink_quietly, index.tmp)
        check_csum(found, csum, where)

    async def put_blob(self, name: str, blob: Blob | Buffer, *, for_client: bool = False) -> None:
        """See `BackupSession.put_blob`; `for_client` True: a blob may be replaced, and a client's log come along."""
        parsed = named_blob(name, blob, f"{self.snapshot}/{name}")
        if name == MANIFEST_NAME:
            # Manifest last: a snapshot counts as finished once it is there.
            self._manifest = parsed
            return
        again = for_client and (name in self._files or name == CLIENT_LOG_NAME)
        if not again or self._finished or self._aborted:
            self._check_new(name)
        await self.store.meta.put(f"{self.snapshot.path}/{name}", (parsed.header, parsed.payload), replace=again)
        self._files.add_blob(name, parsed)

    async def put_log(self, blob: Blob | Buffer) -> None:
        """See `repository.sync.interface.LogSession.put_log`."""
        await self.put_blob(CLIENT_LOG_NAME, blob, for_client=True)

    async def missing_chunks(self, index: ArchiveIndex) -> list[bytes]:
        """See `repository.sync.interface.TestedBase.missing_chunks`."""
        return await self.store.chunks.missing(index.digests)

    async def finish(self) -> None:
        """See `BackupSession.finish`."""
        where = str(self.snapshot)
        if self._finished or self._aborted:
            raise UsageError("finish", where, "the session is over")
        if self._writers:
            names = ", ".join(index.name for index in self._writers.values())
            raise UsageError("finish", where, f"still being written: {names}")
        if self._manifest is None or not self._files:
            raise UsageError("finish", where, "no manifest, or no file, was stored")
        self._files.check_manifest(self._manifest, self.snapshot)
        if self.base is not None and not await in_io_thread(self.store.is_finished, self.base):
            raise StoreError("finish", where, f"its base {self.base} has been removed meanwhile", "back it up again")
        folders = [self.snapshot.path]
        while "/" in folders[-1]:
            folders.append(folders[-1].rpartition("/")[0])
        async with grace(_FINISH_GRACE_S):
            # From here on the outcome is decided by the disk, not by an impatient caller. A bucket out of reach would
            # let them wait for a quarter of an hour.
            await self.store.meta.sync([*folders, ""], since=self._folder)
            if missing := await self._set_aside_meanwhile():
                why = f"verify set {missing} of its chunks aside meanwhile, since they are corrupt"
                raise StoreError("finish", where, why, "back it up again when 'fleece verify' has ended")
            path = f"{self.snapshot.path}/{MANIFEST_NAME}"
            await self.store.meta.put(path, (self._manifest.header, self._manifest.payload), replace=False, sync=True)
            self._finished = True
            await self._record_set_aside()

    async def _record_set_aside(self) -> None:
        """The manifest is in place: find out what verify has set aside since we looked last.

        It looks for the users of what it set aside later than that. It saw this snapshot, or we see its note.
        """
        try:
            if missing := await self._set_aside_meanwhile():
                self.warnings.append(f"verify set {missing} of its chunks aside while it ended: back it up again")
                state = {"state": "failed", "upid": str(Upid.new("backup", str(self.snapshot)))}
                await update_manifest(self.store, self.snapshot, {"verify_state": state})
        except FleeceError as error:
            # It is listed and stays so, which an error would deny.
            why = "whether verify set chunks of it aside while it ended could not be found out and recorded"
            self.warnings.append(f"{why}: {error}")

    def _written_indexes(self) -> list[str]:
        return [name for name in self._files if archive_kind(name) is not ArchiveKind.BLOB]

    def _open_written(self, name: str) -> ArchiveIndex:
        return open_snapshot_index(self.store, self.snapshot, name)

    async def _set_aside_meanwhile(self) -> int:
        """How many chunks of the indexes are not there any more, if some of the store were set aside.

        Those that the base has were taken over, and those that were there were kept, without a look into them. Of what
        was set aside before this session began, but had not been recorded yet, the base's state tells.
        """
        times = await self.store.chunks.times_set_aside()
        unusable = self.base is not None and await in_io_thread(_usable_base, self.store, self.base) is None
        if times == self._set_aside and not unusable:
            return 0
        self._set_aside = times
        missing: set[bytes] = set()
        for name in self._written_indexes():
            index = await in_io_thread(self._open_written, name)
            missing.update(await self.store.chunks.missing(index.digests))
        return len(missing)

    async def abort(self) -> None:
        """See `BackupSession.abort`."""
        if self._finished or self._aborted:
            return
        self._aborted = True
        for index in self._writers.values():
            index.writer.abort()
        self._writers.clear()
        await self.store.meta.delete_tree(self.snapshot.path)

    def _writer(self, number: int) -> _OpenIndex:
        if self._finished or self._aborted:
            raise UsageError("write to", str(self.snapshot), "the session is over")
        try:
            return self._writers[number]
        except KeyError:
            raise UsageError("write to", str(self.snapshot), f"there is no open index {number}") from None

    def _check_new(self, name: str) -> None:
        if self._finished or self._aborted:
            raise UsageError("write to", str(self.snapshot), "the session is over")
        if (
            name in (MANIFEST_NAME, CLIENT_LOG_NAME)
            or name in self._files
            or name in {w.name for w in self._writers.values()}
        ):
            raise UsageError("write", f"{self.snapshot}/{name}", "there is one already, or the name is reserved")


@asynccontextmanager
async def open_session(
    store: Datastore,
    snapshot: Snapshot,
    *,
    owner: str | None = None,
    lock_wait_s: float = 60.0,
    for_client: bool = False,
    cache_chunks: bool = True,
) -> AsyncIterator[LocalBackupSession]:
    """Write `snapshot` while the block runs; without `finish` everything of it is removed at the end.

    If it cannot be removed, the error of the block comes out all the same, with a note; only where there is none, or
    just a cancellation, that failure is the error.

    Takes, in this order, the store's shared lock, the group's, the base's (shared) and the snapshot's; first removes
    what killed sessions left in the group.

    Args:
        owner: of a new group (default `root@pam`); an existing group must belong to them, or the process to root or
            the store's owner, which gives a warning.
        lock_wait_s: how long to wait for a garbage collection that excludes writers.
        for_client: a server's: nobody but the owner may write, whoever runs the server; and, as PBS's server has it,
            the time need not be newer than that of a snapshot whose verification failed.
        cache_chunks: see `LocalBackupSession.cache_chunks`.

    Raises:
        LockedError: another backup of the group is running, or the store stays locked.
        OwnerError: the group is somebody else's.
        UsageError: the time is not newer than that of the newest snapshot.
        StoreError: full, read-only, in maintenance.
    """
    store.check_writable()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(store.chunks.writer(wait_s=lock_wait_s))
        folder = stack.enter_context(opened_folder(store))
        group_lock = await stack.enter_async_context(store.locks.group(snapshot.group))
        made = await store.meta.make_folders(snapshot.group.path)
        new_group = store.base / snapshot.group.path in made
        try:
            warnings = await _check_owner(store, snapshot.group, owner, strict=for_client)
            foreign = bool(warnings)
            await store.remove_unfinished(snapshot.group)
            base = await in_io_thread(store.latest, snapshot.group)
            if not for_client or await in_io_thread(_usable_base, store, base) is not None:
                _check_newer(snapshot, base)
            if base == snapshot:  # of no use as one; its shared lock below would stand in our own way
                raise LockedError("write", str(snapshot), _TAKEN)
            if base is not None:
                await stack.enter_async_context(store.locks.snapshot(base, shared=True))
            set_aside = await store.chunks.times_set_aside()  # before the base's state, which verify writes first
            usable = await in_io_thread(_usable_base, store, base)
            lock = await stack.enter_async_context(store.locks.snapshot(snapshot, shared=False))
            # No checkpoint from here to the session, which removes the folder if it fails.
            if not await store.meta.make_folders(snapshot.path):
                raise LockedError("write", str(snapshot), _TAKEN)
            if store.sync_level is SyncLevel.NONE:
                warnings.append("sync level 'none': a power cut may leave this snapshot listed, but without its data")
            session = LocalBackupSession(
                store, snapshot, usable, warnings, folder, set_aside, foreign=foreign, cache_chunks=cache_chunks
            )
        except BaseException as error:
            if new_group:
                async with _cleaning(snapshot, error):
                    await _remove_group(store, snapshot.group, group_lock)
            raise

        async def clean(cause: BaseException | None) -> None:
            if session._finished:
                return
            async with _cleaning(snapshot, cause):
                await session.abort()
                lock.release(unlink=True)
                if new_group:
                    await _remove_group(store, snapshot.group, group_lock)

        try:
            yield session
        except BaseException as error:
            await clean(error)
            raise
        await clean(None)


@contextmanager
def opened_folder(store: Datastore) -> Iterator[int]:
    """The store's folder, open while a session writes; see `MetaStore.sync`."""
    with store_errors("write to", store.base):
        folder = open_folder(store.base)
    try:
        yield folder
    finally:
        os.close(folder)


@asynccontextmanager
async def _cleaning(snapshot: Snapshot, cause: BaseException | None) -> AsyncIterator[None]:
    """Shielded, for a bounded time; what goes wrong in the block becomes a note at `cause`, and does not hide it.

    Raises:
        StoreError: it went wrong, and `cause` is none, or a cancellation, which nobody would read the note of.
    """
    try:
        with trio.fail_after(_ABORT_TIMEOUT_S, shield=True):
            yield
    except (FleeceError, OSError, trio.TooSlowError) as failure:
        why = f"not done within {_ABORT_TIMEOUT_S:g} s" if isinstance(failure, trio.TooSlowError) else str(failure)
        if not isinstance(cause, Exception):
            raise StoreError("remove what was written of", str(snapshot), why, _ABORT_HINT) from failure
        cause.add_note(f"afterwards what was written of {snapshot} could not be removed: {why}; {_ABORT_HINT}")


async def _remove_group(store: Datastore, group: Group, lock: HeldLock) -> None:
    if await store.remove_empty_group(group):
        lock.release(unlink=True)


async def _check_owner(store: Datastore, group: Group, owner: str | None, *, strict: bool) -> list[str]:
    current = await in_io_thread(store.group_owner, group)
    if current is None:
        if strict and await in_io_thread(lambda: bool(store.snapshots(group))):
            # Whoever became its owner could read them, and perhaps remove them.
            why = f"it has backups, but no owner, and does not become {owner}'s by writing to it"
            raise OwnerError("write to group", str(group), why, f"'fleece owner {group} AUTHID' gives it one")
        await store.write_new_owner(group, owner or DEFAULT_OWNER)
        return []
    if owner is None or current == owner or ("!" not in owner and current.startswith(f"{owner}!")):
        return []
    if not strict and os.geteuid() in (0, store.owner.uid):
        return [f"group {group} belongs to {current}, not to {owner}; writing anyway as the store's owner"]
    raise OwnerError("write to group", str(group), f"it belongs to {current}, not to {owner}")


def _check_newer(snapshot: Snapshot, newest: Snapshot | None) -> None:
    if newest is not None and newest.ctime >= snapshot.ctime:
        raise UsageError(
            "write",
            str(snapshot),
            f"its time is not after that of the newest snapshot, {newest.time}",
            "check the clock",
        )


def _usable_base(store: Datastore, base: Snapshot | None) -> Snapshot | None:
    """The base unless its manifest is unreadable or its verification failed: what it holds may be damaged."""
    if base is None:
        return None
    try:
        state = Manifest.parse(store.read_manifest(base), where=str(base)).verify_state
    except FleeceError:
        return None
    return None if state is not None and state.get("state") == "failed" else base
