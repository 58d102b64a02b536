"""A datastore: creation, opening, and the removal of what is in it.

Layout: docs/formats.md, "Layout". `datastore.tree` reads what is there, `datastore.session` writes snapshots,
`datastore.reader` reads their contents.
"""

import errno
import uuid
from pathlib import Path
from typing import Final, Self

from core.limits import in_io_thread
from datastore.codec import ChunkCodec
from datastore.creation import S3_STATE, check_layout, make_store, remove_store
from datastore.errors import LockedError, ProtectedError, SnapshotNotFoundError, StoreError
from datastore.files import Owner, SyncLevel, create_file, make_folders, read_file, store_errors
from datastore.interface import Backend, ChunkStore, MetaStore
from datastore.local_backend import LocalBackend
from datastore.locks import LOCK_FOLDER, LockRoot, StoreLocks
from datastore.names import Group, Snapshot
from datastore.pbs import LOCKS, OLD_LOCKING, PbsStore, find_store
from datastore.tree import MAX_TEXT, FileEntry, SnapshotEntry, StoreTree

__all__ = ["Datastore", "FileEntry", "SnapshotEntry"]


class Datastore(StoreTree):
    """One datastore, open. Made by `create` and `open`; `close` gives its descriptors back."""

    def __init__(self, base: Path, sync_level: SyncLevel, pbs: PbsStore | None, backend: Backend | None = None) -> None:
        """`backend` None: chunks lie in `base`, too. Otherwise `datastore.s3` has made it."""
        super().__init__(base)
        self.sync_level: Final = sync_level
        self.owner: Final = Owner.of(base)
        self.pbs = pbs  #: what this host's PBS says of it, as of its opening or the last change
        self._backend: Final = LocalBackend(base, self.owner, sync_level) if backend is None else backend
        self.chunks: ChunkStore = self._backend.chunks
        self.meta: MetaStore = self._backend.meta
        self.locks: Final = StoreLocks(self._lock_roots)

    def _lock_roots(self) -> list[LockRoot]:
        roots = [LockRoot(self.base, LOCK_FOLDER, self.owner)]
        # PBS makes its folder with its first lock after a boot, which may be after ours.
        if self.pbs is not None and LOCKS.parent.is_dir():
            roots.append(LockRoot(LOCKS.parent, f"{LOCKS.name}/{self.pbs.name}", self.owner))
        return roots

    @property
    def name(self) -> str:
        """Its name in task ids: PBS's for it, else the folder's."""
        return self.base.name if self.pbs is None else self.pbs.name

    @classmethod
    async def create(cls, path: Path, *, sync_level: SyncLevel = SyncLevel.FILESYSTEM) -> Self:
        """Make a new, empty datastore in the folder `path` and open it; takes some seconds.

        The folder is made if it is missing; apart from names that start with a dot and `lost+found` it must be empty.
        Run as root, the store belongs to user and group `backup` where those exist. If the creation fails, what it made
        is removed.

        Raises:
            UsageError: the folder is not empty, lies in another datastore, or is one already.
            StoreError: no space, no rights, or a file system without usable access times.
        """
        path = await in_io_thread(path.absolute)
        with store_errors("create datastore", path):
            made = await in_io_thread(make_store, path)
        store = cls(path, sync_level, find_store(path))
        try:
            codec = ChunkCodec()
            size = 4 << 20
            await store.chunks.check_access_times(codec.zero_digest(size), codec.encode(bytes(size)))
        except BaseException:
            store.close()
            await in_io_thread(made.undo)
            raise
        return store

    @classmethod
    async def open(cls, path: Path, *, sync_level: SyncLevel = SyncLevel.FILESYSTEM) -> Self:
        """Open the datastore in the folder `path`; changes nothing.

        Raises:
            StoreError: not a datastore, no rights, in a maintenance mode of PBS that refuses reading, or the cache of a
                bucket.
        """
        path = await in_io_thread(path.absolute)
        await in_io_thread(check_layout, path)
        pbs = await in_io_thread(find_store, path)
        if pbs is not None and pbs.s3:
            why = "it is PBS's cache of an S3 bucket; chunks that are written here would never reach the bucket"
            raise StoreError("open datastore", str(path), why, "use this store through PBS")
        if await in_io_thread((path / S3_STATE).exists):
            why = "it is the cache of an S3 bucket, which must be opened by the name of its datastore"
            raise StoreError("open datastore", str(path), why, "'fleece datastore list' shows the names")
        if pbs is not None and pbs.refuses_reading:
            raise StoreError("open datastore", str(path), f"PBS has it in maintenance mode {pbs.maintenance!r}")
        return cls(path, sync_level, pbs)

    @classmethod
    async def destroy(cls, path: Path) -> None:
        """Delete the datastore in the folder `path` with every backup in it; foreign files in the folder stay.

        Snapshots go first and chunks last, so that a cut-off removal leaves no snapshot without its chunks.

        Raises:
            StoreError: not a datastore, or files cannot be removed.
            LockedError: a backup or a garbage collection is running.
        """
        store = await cls.open(path)
        try:
            store.check_writable()
            async with store.chunks.exclusive(wait_s=0) as oldest_writer:
                if oldest_writer is not None:
                    raise LockedError(
                        "destroy datastore", str(path), "a backup is running", "try again when it has ended"
                    )
                with store_errors("destroy datastore", path):
                    await in_io_thread(remove_store, store.base)
        finally:
            store.close()

    def close(self) -> None:
        """Give the descriptors back; nothing may be running."""
        self._backend.close()

    def check_readable(self) -> None:
        """See to it that backups may be read now; opening has done so, but may be long ago.

        Raises:
            StoreError: PBS's maintenance mode forbids it.
        """
        self.pbs = find_store(self.base)
        if self.pbs is not None and self.pbs.refuses_reading:
            raise StoreError("read from", str(self.base), f"PBS has it in maintenance mode {self.pbs.maintenance!r}")

    def check_writable(self) -> None:
        """See to it that snapshots may be written and removed now.

        Raises:
            StoreError: PBS's maintenance mode or way of locking forbids it, or the backend does.
        """
        self._backend.check_writable()
        self.pbs = find_store(self.base)  # a server has it open for months
        if self.pbs is None:
            return
        if self.pbs.refuses_writing:
            raise StoreError("write to", str(self.base), f"PBS has it in maintenance mode {self.pbs.maintenance!r}")
        if OLD_LOCKING.exists():
            raise StoreError(
                "write to",
                str(self.base),
                "this host's PBS still uses its old way of locking",
                f"reboot the host after its upgrade ({OLD_LOCKING} goes away then)",
            )

    async def uuid(self) -> str:
        """What tells this store from all others; made at its first use."""

        def read_or_make() -> str:
            path = self.base / ".fleece" / "uuid"
            with store_errors("read", path):
                try:
                    return str(uuid.UUID(read_file(path, limit=MAX_TEXT).decode().strip()))
                except FileNotFoundError:
                    pass
                except ValueError:
                    raise StoreError(
                        "read", str(path), "it holds no UUID", "remove it: a new one will be made"
                    ) from None
                make_folders(self.base, ".fleece", self.owner)
                create_file(path, f"{uuid.uuid4()}\n".encode(), self.owner)
                return read_file(path, limit=MAX_TEXT).decode().strip()

        return await in_io_thread(read_or_make)

    async def write_new_owner(self, group: Group, owner: str) -> None:
        """Give the new group an owner.

        Raises:
            StoreError: it has one, or the file cannot be written.
        """
        await self.meta.create(f"{group.path}/owner", f"{owner}\n".encode())

    # Removal.

    async def forget(self, snapshot: Snapshot, *, only_unfinished: bool = False) -> None:
        """Remove one snapshot, and its group if that is empty then. Chunks stay until garbage collection.

        Args:
            snapshot: which one.
            only_unfinished: it has no manifest, and if it has got one meanwhile, it stays.

        Raises:
            SnapshotNotFoundError: not there.
            ProtectedError: protected.
            LockedError: it is being read, verified or written.
            StoreError: the files cannot be removed.
        """
        self.check_writable()
        if not await in_io_thread(self.exists, snapshot):
            raise SnapshotNotFoundError("remove", str(snapshot), "there is no such snapshot")
        # What is unfinished may be about to be written, by a pull of PBS too: that goes under the group's lock only.
        finished = not only_unfinished and await in_io_thread(self.is_finished, snapshot)
        if finished:
            await self._remove_snapshot(snapshot)
        try:
            async with self.locks.group(snapshot.group) as group_lock:
                if not finished:
                    await self._remove_snapshot(snapshot, only_unfinished=only_unfinished)
                if await self.remove_empty_group(snapshot.group):
                    group_lock.release(unlink=True)
        except LockedError:
            if not finished:
                raise
            # Otherwise somebody writes a new snapshot, so the group is needed.

    async def _remove_snapshot(self, snapshot: Snapshot, *, only_unfinished: bool = False) -> None:
        lock = await self.locks.acquire_snapshot(snapshot, shared=False)
        gone = False
        try:
            async with self.locks.manifest(snapshot) as manifest_lock:
                if self.is_protected(snapshot):
                    hint = f"'fleece unprotect {snapshot}' allows it"
                    raise ProtectedError("remove", str(snapshot), "it is protected", hint)
                if only_unfinished and self.is_finished(snapshot):
                    raise LockedError("remove", str(snapshot), "it was finished meanwhile")
                await self.meta.delete_tree(snapshot.path)
                gone = True
                manifest_lock.release(unlink=True)
        finally:
            lock.release(unlink=gone)

    async def forget_group(self, group: Group) -> list[Snapshot]:
        """Remove a group's unprotected snapshots, and the group if nothing is left; returns those that stayed.

        Raises:
            SnapshotNotFoundError: there is no such group.
            LockedError: a backup into the group is running (then nothing is removed), or one of the snapshots is being
                read (then the older ones are gone).
            StoreError: the files cannot be removed.
        """
        self.check_writable()
        if not await in_io_thread((self.base / group.path).is_dir):
            raise SnapshotNotFoundError("remove", str(group), "there is no such group")
        kept = []
        async with self.locks.group(group) as lock:
            for snapshot in await in_io_thread(lambda: self.snapshots(group, unfinished=True)):
                try:
                    await self._remove_snapshot(snapshot)
                except ProtectedError:
                    kept.append(snapshot)
            if not kept and await self.remove_empty_group(group):
                lock.release(unlink=True)
        return kept

    async def remove_unfinished(self, group: Group) -> None:
        """Remove what killed backups left in a group; the caller holds the group's lock. Busy ones stay."""
        for snapshot in await in_io_thread(lambda: self.snapshots(group, unfinished=True)):
            if self.is_finished(snapshot):
                continue
            try:
                lock = await self.locks.acquire_snapshot(snapshot, shared=False)
            except LockedError:
                continue
            try:
                if not self.is_finished(snapshot):
                    await self.meta.delete_tree(snapshot.path)
            finally:
                lock.release(unlink=not self.exists(snapshot))

    async def remove_empty_group(self, group: Group) -> bool:
        """Remove a group without snapshots, its owner and notes; the caller holds its lock. False if it stays.

        Raises:
            StoreError: the files cannot be removed.
        """
        if await in_io_thread(lambda: self.snapshots(group, unfinished=True)):
            return False
        for name in ("notes", "owner"):
            await self.meta.delete(f"{group.path}/{name}")

        def remove_folder() -> bool:
            with store_errors("remove", str(group)):
                try:
                    (self.base / group.path).rmdir()
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                        raise
                    return False  # a foreign file is in it, or it is gone
            return True

        return await in_io_thread(remove_folder)
