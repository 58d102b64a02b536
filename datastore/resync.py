"""A finished snapshot written once more: what a pull does to bring it up to date, or to mend it.

Until `finish` nothing of what is there changes: indexes wait as temporary files, blobs in memory. Then they take their
places one after the other, the manifest last. Cut off in between, each file is the old one or the new one; the next
verification, or the next pull with `--resync-corrupt`, finds and mends what does not fit.
"""

import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from core.buffers import Buffer
from core.errors import FleeceError, UsageError
from core.limits import in_io_thread
from core.nursery import grace
from datastore.blob import Blob
from datastore.codec import ChunkCodec
from datastore.dynamic_index import DynamicIndex
from datastore.errors import SnapshotNotFoundError, StoreError
from datastore.files import unlink_quietly
from datastore.fixed_index import FixedIndex
from datastore.index import ArchiveIndex
from datastore.manifest import Manifest, ManifestFile
from datastore.names import CLIENT_LOG_NAME, MANIFEST_NAME, ArchiveKind, Snapshot, archive_kind
from datastore.reader import open_snapshot_index
from datastore.session import LocalBackupSession, _usable_base, opened_folder
from datastore.store import Datastore
from datastore.written import named_blob

#: Bytes of blobs that wait for `finish`.
_MAX_WAITING: Final = 256 << 20
#: Seconds that `finish` may go on for when it is cancelled.
_GRACE_S: Final = 30.0
#: Seconds that throwing away what waits may take.
_ABORT_TIMEOUT_S: Final = 60.0


async def replace_manifest(store: Datastore, snapshot: Snapshot, manifest: Manifest) -> None:
    """Write another manifest of the same files; cancelled or failed, it is the old one or the new one.

    Raises:
        SnapshotNotFoundError: there is no such snapshot, or it is unfinished.
        LockedError: somebody else has held the manifest's lock for 5 seconds.
        FleeceError: it lists other files, or cannot be written.
    """
    store.check_writable()
    if not await in_io_thread(store.is_finished, snapshot):
        raise SnapshotNotFoundError("change the manifest of", str(snapshot), "there is no such snapshot")
    async with store.locks.manifest(snapshot):
        raw = await in_io_thread(store.read_manifest, snapshot)
        old = Manifest.parse(raw, where=f"{snapshot}/{MANIFEST_NAME}")
        if old.files != manifest.files:
            raise FleeceError("change the manifest of", str(snapshot), "it lists other files than the new one")
        blob = manifest.encode()
        await store.meta.put(f"{snapshot.path}/{MANIFEST_NAME}", [blob.header, blob.payload], replace=True, sync=True)


@dataclass(slots=True)
class LocalResyncSession(LocalBackupSession):
    """See `repository.sync.interface.ResyncSession`. Made by `open_resync`."""

    waiting: dict[str, Blob] = field(default_factory=dict)
    indexes: dict[str, str] = field(default_factory=dict)  #: temporary file by name, both in the snapshot's folder
    _written: list[str] = field(default_factory=list)  #: names of all indexes that are new

    async def keep(self, file: ManifestFile) -> bool:
        """See `ResyncSession.keep`."""
        self._check_new(file.filename)

        def fits() -> bool:
            try:
                if archive_kind(file.filename) is ArchiveKind.BLOB:
                    raw = self.store.read_file(self.snapshot, file.filename)
                    return (len(raw), hashlib.sha256(raw).digest()) == (file.size, file.csum)
                index = open_snapshot_index(self.store, self.snapshot, file.filename, file.size)
                return index.csum == file.csum
            except FleeceError:
                return False

        if not await in_io_thread(fits):
            return False
        self._files.add_kept(file)
        return True

    async def mend_chunk(self, writer: int, digest: bytes, size: int, blob: Blob) -> bool:
        """See `ResyncSession.mend_chunk`."""
        result = await self.put_chunk(writer, digest, size, blob)
        if not result.duplicate:
            return True
        codec = ChunkCodec()

        def wrong(there: Blob) -> bool:
            try:
                if there.kind.encrypted:
                    # Without the key only its CRC can be looked at: any other blob of it may be right as well.
                    there.check(where=digest.hex())
                    return not blob.kind.encrypted
                codec.decode(there, digest=digest, size=size, crypt_mode=None, where=digest.hex())
            except FleeceError:
                return True
            return blob.kind.encrypted

        if await self.store.chunks.quarantine(digest, wrong) is None:
            return False
        await self.put_chunk(writer, digest, size, blob)
        return True

    async def close_index(self, writer: int, count: int, size: int, csum: bytes) -> None:
        """See `BackupSession.close_index`: it waits for `finish`."""
        index = self._writer(writer)
        await self._close_writer(index, count, size, csum)
        self.indexes[index.name] = index.tmp.name
        self._written.append(index.name)
        del self._writers[writer]
        self._files.add_index(index.name, size, csum)

    async def put_blob(self, name: str, blob: Blob | Buffer, *, for_client: bool = False) -> None:
        """See `BackupSession.put_blob`: it waits for `finish`."""
        where = f"{self.snapshot}/{name}"
        parsed = named_blob(name, blob, where)
        if sum(len(one) for one in self.waiting.values()) + len(parsed) > _MAX_WAITING:
            why = f"{len(parsed)} bytes; all blobs together have at most {_MAX_WAITING}"
            raise UsageError("store blob", where, why)
        if name == MANIFEST_NAME:
            self._manifest = parsed
            return
        if name != CLIENT_LOG_NAME:
            self._check_new(name)
        self.waiting[name] = parsed
        self._files.add_blob(name, parsed)

    async def finish(self) -> None:
        """See `BackupSession.finish`: everything takes its place, and what the manifest does not list goes.

        Protection and the client's log stay. If it raises, some files may be the new ones already.
        """
        where = str(self.snapshot)
        if self._finished or self._aborted:
            raise UsageError("finish", where, "the session is over")
        if self._writers or self._manifest is None:
            raise UsageError("finish", where, "an index is still being written, or there is no manifest")
        manifest = self._files.check_manifest(self._manifest, self.snapshot)
        folder = self.snapshot.path
        async with grace(_GRACE_S):
            await self.store.meta.sync([folder, ""], since=self._folder)
            if missing := await self._set_aside_meanwhile():
                why = f"verify set {missing} of its chunks aside meanwhile, since they are corrupt"
                raise StoreError("finish", where, why, "pull it again when 'fleece verify' has ended")
            await self._put_in_place(manifest, self._manifest)
            # The users that verify looks for cannot be told while we hold them.
            await self._record_set_aside()

    def _written_indexes(self) -> list[str]:
        return list(self._written)

    def _open_written(self, name: str) -> ArchiveIndex:
        tmp = self.indexes.get(name)
        if tmp is None:
            return open_snapshot_index(self.store, self.snapshot, name)
        path = self.store.base / self.snapshot.path / tmp
        where = f"{self.snapshot}/{name}"
        if archive_kind(name) is ArchiveKind.FIXED:
            return FixedIndex.open(path, where=where)
        return DynamicIndex.open(path, where=where)

    async def _put_in_place(self, manifest: Manifest, blob: Blob) -> None:
        folder = self.snapshot.path
        async with self.store.locks.manifest(self.snapshot):
            for name, one in self.waiting.items():
                await self.store.meta.put(f"{folder}/{name}", (one.header, one.payload), replace=True, sync=True)
            for name, tmp in list(self.indexes.items()):
                await self.store.meta.publish_index(self.store.base / folder / tmp, f"{folder}/{name}")
                del self.indexes[name]
            path = f"{folder}/{MANIFEST_NAME}"
            await self.store.meta.put(path, (blob.header, blob.payload), replace=True, sync=True)
            self._finished = True
            listed = {file.filename for file in manifest.files} | {MANIFEST_NAME, CLIENT_LOG_NAME}
            for name in await in_io_thread(self._archives):
                if name not in listed:
                    await self.store.meta.delete(f"{folder}/{name}")

    def _archives(self) -> list[str]:
        """The files of the folder that a manifest could list."""
        found = []
        try:
            names = [path.name for path in (self.store.base / self.snapshot.path).iterdir()]
        except OSError as error:
            raise StoreError("list", str(self.snapshot), str(error)) from error
        for name in names:
            try:
                archive_kind(name)
            except UsageError:
                continue
            found.append(name)
        return found

    async def abort(self) -> None:
        """Throw away what waits; the snapshot stays as it is."""
        if self._finished or self._aborted:
            return
        self._aborted = True
        for index in self._writers.values():
            index.writer.abort()
        self._writers.clear()
        for tmp in self.indexes.values():
            await in_io_thread(unlink_quietly, self.store.base / self.snapshot.path / tmp)
        self.indexes.clear()
        self.waiting.clear()


@asynccontextmanager
async def open_resync(
    store: Datastore, snapshot: Snapshot, *, lock_wait_s: float = 60.0
) -> AsyncIterator[LocalResyncSession]:
    """Write `snapshot`, which is finished, once more while the block runs; without `finish` it stays as it is.

    Takes the locks of a session in the same order. Known chunks come from the newest other snapshot of the group.

    Raises:
        SnapshotNotFoundError: it is not there, or unfinished.
        LockedError: it is being read, a backup of the group is running, or the store stays locked.
        StoreError: read-only, in maintenance.
    """
    store.check_writable()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(store.chunks.writer(wait_s=lock_wait_s))
        folder = stack.enter_context(opened_folder(store))
        if not await in_io_thread(store.is_finished, snapshot):
            raise SnapshotNotFoundError("write again", str(snapshot), "there is no such snapshot")
        await stack.enter_async_context(store.locks.group(snapshot.group))
        base = await in_io_thread(store.latest, snapshot.group)
        if base is not None and base.ctime == snapshot.ctime:
            base = None  # what is damaged is no proof of anything
        if base is not None:
            await stack.enter_async_context(store.locks.snapshot(base, shared=True))
        set_aside = await store.chunks.times_set_aside()
        usable = await in_io_thread(_usable_base, store, base)
        await stack.enter_async_context(store.locks.snapshot(snapshot, shared=False))
        if not await in_io_thread(store.is_finished, snapshot):
            raise SnapshotNotFoundError("write again", str(snapshot), "it was removed meanwhile")
        session = LocalResyncSession(store, snapshot, usable, [], folder, set_aside)
        try:
            yield session
        finally:
            with trio.fail_after(_ABORT_TIMEOUT_S, shield=True):
                await session.abort()
