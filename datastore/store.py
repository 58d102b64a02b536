"""A datastore: creation, opening, and what is in it.

Layout: docs/formats.md, "Layout". `Datastore` reads the local tree (complete on every backend) and removes snapshots;
`datastore.session` writes them, `datastore.reader` reads their contents.
"""

import errno
import json
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from core.errors import FleeceError, UsageError, os_reason
from core.limits import in_io_thread
from datastore.blob import MAX_BLOB_SIZE
from datastore.codec import ChunkCodec
from datastore.crypt_mode import CryptMode
from datastore.errors import LockedError, ProtectedError, SnapshotNotFoundError, StoreError
from datastore.files import (
    FOLDER_MODE,
    Owner,
    SyncLevel,
    create_file,
    make_folder,
    make_folders,
    read_file,
    remove_tree,
    store_errors,
)
from datastore.interface import ChunkStore, MetaStore
from datastore.local_chunks import CHUNK_FOLDER_MODE, LocalChunkStore, fill_chunk_folder
from datastore.local_meta import LocalMetaStore
from datastore.locks import LOCK_FOLDER, LockRoot, StoreLocks
from datastore.manifest import Manifest
from datastore.names import (
    MANIFEST_NAME,
    MAX_NAMESPACE_DEPTH,
    PROTECTED_NAME,
    ROOT,
    ArchiveKind,
    BackupType,
    Group,
    Namespace,
    Snapshot,
    is_safe_id,
    is_time,
    parse_time,
)
from datastore.pbs import LOCKS, OLD_LOCKING, PbsStore, find_store

#: User and group of a new store made by root, where they exist: PBS's `backup`.
BACKUP_ID: Final = 34
#: Bytes of an `owner` file and of group notes that are read.
_MAX_TEXT: Final = 1 << 16
_SUFFIXES: Final = tuple(kind.value for kind in ArchiveKind)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a snapshot: what its manifest says, or that it is there without being listed."""

    filename: str
    size: int | None
    crypt_mode: CryptMode | None


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """What a listing says of one snapshot."""

    snapshot: Snapshot
    finished: bool
    protected: bool
    owner: str | None
    files: tuple[FileEntry, ...]
    manifest: Manifest | None  #: None if unfinished or unreadable


class Datastore:
    """One datastore, open. Made by `create` and `open`; `close` gives its descriptors back."""

    def __init__(self, base: Path, sync_level: SyncLevel, pbs: PbsStore | None) -> None:
        self.base: Final = base
        self.sync_level: Final = sync_level
        self.owner: Final = Owner.of(base)
        self.pbs: Final = pbs
        local = LocalChunkStore(base, self.owner, sync_level)
        self._local = local
        self.chunks: ChunkStore = local
        self.meta: MetaStore = LocalMetaStore(base, self.owner, sync_level)
        roots = [LockRoot(base, LOCK_FOLDER, self.owner)]
        if pbs is not None and LOCKS.is_dir():
            roots.append(LockRoot(LOCKS, pbs.name, self.owner))
        self.locks: Final = StoreLocks(roots)

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
            made = await in_io_thread(_create, path)
        store = cls(path, sync_level, find_store(path))
        try:
            codec = ChunkCodec()
            size = 4 << 20
            await store._local.check_access_times(codec.zero_digest(size), codec.encode(bytes(size)))
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
                bucket of PBS.
        """
        path = await in_io_thread(path.absolute)
        await in_io_thread(_check_layout, path)
        pbs = await in_io_thread(find_store, path)
        if pbs is not None and pbs.s3:
            why = "it is PBS's cache of an S3 bucket; chunks that are written here would never reach the bucket"
            raise StoreError("open datastore", str(path), why, "use this store through PBS")
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
                    await in_io_thread(_destroy, store.base)
        finally:
            store.close()

    def close(self) -> None:
        """Give the descriptors back; nothing may be running."""
        self._local.close()

    def check_writable(self) -> None:
        """See to it that snapshots may be written and removed now.

        Raises:
            StoreError: PBS's maintenance mode or way of locking forbids it.
        """
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
                    return str(uuid.UUID(read_file(path, limit=_MAX_TEXT).decode().strip()))
                except FileNotFoundError:
                    pass
                except ValueError:
                    raise StoreError(
                        "read", str(path), "it holds no UUID", "remove it: a new one will be made"
                    ) from None
                make_folders(self.base, ".fleece", self.owner)
                create_file(path, f"{uuid.uuid4()}\n".encode(), self.owner)
                return read_file(path, limit=_MAX_TEXT).decode().strip()

        return await in_io_thread(read_or_make)

    # Reading the tree. These are quick system calls; a listing of the whole store runs in one thread.

    def namespace_exists(self, ns: Namespace) -> bool:
        """True if the namespace's folder is there."""
        return (self.base / ns.path).is_dir()

    def namespaces(self, parent: Namespace = ROOT, *, depth: int | None = None) -> Iterator[Namespace]:
        """`parent` and the namespaces below it, depth first; names that are none are passed over.

        Raises:
            SnapshotNotFoundError: `parent` is not there.
            StoreError: a folder is unreadable.
        """
        if not self.namespace_exists(parent):
            raise SnapshotNotFoundError("list namespace", repr(str(parent)), "it does not exist")
        left = MAX_NAMESPACE_DEPTH - len(parent.components)
        yield from self._namespaces(parent, left if depth is None else min(depth, left))

    def _namespaces(self, ns: Namespace, depth: int) -> Iterator[Namespace]:
        yield ns
        if depth > 0:
            for name in self._folders(f"{ns.path}/ns".lstrip("/")):
                if is_safe_id(name):
                    yield from self._namespaces(Namespace((*ns.components, name)), depth - 1)

    def groups(self, ns: Namespace = ROOT) -> list[Group]:
        """The groups of one namespace in PBS's order; links and other names are passed over.

        Raises:
            SnapshotNotFoundError: the namespace is not there.
            StoreError: a folder is unreadable.
        """
        if not self.namespace_exists(ns):
            raise SnapshotNotFoundError("list namespace", repr(str(ns)), "it does not exist")
        groups = [
            Group(kind, name, ns)
            for kind in BackupType
            for name in self._folders(f"{ns.path}/{kind.value}".lstrip("/"))
            if is_safe_id(name)
        ]
        return sorted(groups, key=lambda group: group.sort_key)

    def snapshots(self, group: Group, *, unfinished: bool = False) -> list[Snapshot]:
        """The snapshots of a group, oldest first; without those that have no manifest unless `unfinished`."""
        found = []
        for name in self._folders(group.path):
            if not is_time(name):
                continue
            try:
                snapshot = Snapshot(group, parse_time(name), name)
            except UsageError:
                continue  # looks like a time, but is none
            if unfinished or self.is_finished(snapshot):
                found.append(snapshot)
        return sorted(found, key=lambda snapshot: (snapshot.ctime, snapshot.time))

    def latest(self, group: Group) -> Snapshot | None:
        """The newest finished snapshot of a group."""
        return next((s for s in reversed(self.snapshots(group, unfinished=True)) if self.is_finished(s)), None)

    def exists(self, snapshot: Snapshot) -> bool:
        """True if the snapshot's folder is there, finished or not."""
        return (self.base / snapshot.path).is_dir()

    def is_finished(self, snapshot: Snapshot) -> bool:
        """True if the snapshot has a manifest, or if that cannot be told: what is unfinished may be removed."""
        try:
            found = (self.base / snapshot.path / MANIFEST_NAME).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return stat.S_ISREG(found.st_mode)

    def is_protected(self, snapshot: Snapshot) -> bool:
        """True if the snapshot must not be removed.

        Raises:
            StoreError: it cannot be told.
        """
        with store_errors("look at", f"{snapshot}/{PROTECTED_NAME}"):
            try:
                (self.base / snapshot.path / PROTECTED_NAME).lstat()
            except FileNotFoundError:
                return False
            return True

    def read_manifest(self, snapshot: Snapshot) -> bytes:
        """The snapshot's manifest blob as stored.

        Raises:
            SnapshotNotFoundError: no such snapshot, or it is unfinished.
            StoreError: unreadable.
        """
        return self.read_file(snapshot, MANIFEST_NAME)

    def read_file(self, snapshot: Snapshot, name: str) -> bytes:
        """The blob file `name` of a snapshot as stored; errors as `read_manifest`."""
        where = f"{snapshot}/{name}"
        with store_errors("read", where):
            try:
                return read_file(self.base / snapshot.path / name, limit=MAX_BLOB_SIZE + 4096)
            except FileNotFoundError:
                missing = not self.exists(snapshot)
        why = "there is no such snapshot" if missing else "it is unfinished or lacks this file"
        raise SnapshotNotFoundError("read", where, why, "'fleece list' shows what there is")

    def group_owner(self, group: Group) -> str | None:
        """Who may write the group: the first line of its `owner` file, None if there is none."""
        text = self._text(f"{group.path}/owner")
        return None if text is None else text.partition("\n")[0].rstrip()

    def listed_owner(self, group: Group) -> str | None:
        """As `group_owner`, but an unreadable file does not spoil a listing: None."""
        try:
            return self.group_owner(group)
        except StoreError:
            return None

    def listed_notes(self, group: Group) -> str:
        """The group's notes; empty if they cannot be read, which does not spoil a listing."""
        try:
            return self._text(f"{group.path}/notes") or ""
        except StoreError:
            return ""

    def usage(self) -> tuple[int, int, int]:
        """Bytes in all, used and available on the file system of the store.

        Raises:
            StoreError: it cannot be asked.
        """
        with store_errors("ask for the space of", self.base):
            found = os.statvfs(self.base)
        return (
            found.f_blocks * found.f_frsize,
            (found.f_blocks - found.f_bfree) * found.f_frsize,
            found.f_bavail * found.f_frsize,
        )

    def gc_status(self) -> dict[str, Any] | None:
        """What the last garbage collection wrote; None if there is nothing, or nothing that can be read."""
        try:
            status = json.loads(self._text(".gc-status") or "null")
        except (ValueError, RecursionError, StoreError):
            return None
        return status if isinstance(status, dict) else None

    def write_new_owner(self, group: Group, owner: str) -> None:
        """Give the new group an owner.

        Raises:
            StoreError: it has one, or the file cannot be written.
        """
        with store_errors("write", f"{group}/owner"):
            if not create_file(self.base / group.path / "owner", f"{owner}\n".encode(), self.owner):
                raise StoreError("write", f"{group}/owner", "it exists already")

    def entry(self, snapshot: Snapshot) -> SnapshotEntry:
        """Everything a listing says of `snapshot`; an unreadable manifest is left out, not an error.

        Raises:
            SnapshotNotFoundError: not there.
            StoreError: its folder is unreadable.
        """
        with store_errors("list", str(snapshot)):
            try:
                with os.scandir(self.base / snapshot.path) as entries:
                    names = {
                        entry.name
                        for entry in entries
                        if entry.is_file(follow_symlinks=False) or entry.name == PROTECTED_NAME
                    }
            except FileNotFoundError as error:
                raise SnapshotNotFoundError("list", str(snapshot), os_reason(error)) from error
        manifest, raw = None, b""
        if MANIFEST_NAME in names:
            try:
                raw = self.read_manifest(snapshot)
                manifest = Manifest.parse(raw, where=str(snapshot))
            except FleeceError:
                manifest = None
        listed = {} if manifest is None else {file.filename: file for file in manifest.files}
        # PBS's order: what the manifest lists, the manifest, then what is there besides.
        files = [FileEntry(file.filename, file.size, file.crypt_mode) for file in listed.values()]
        if MANIFEST_NAME in names:
            signed = manifest is not None and manifest.signature is not None
            size = len(raw) or None
            files.append(FileEntry(MANIFEST_NAME, size, CryptMode.SIGN_ONLY if signed else CryptMode.NONE))
        extra = sorted(
            name for name in names if name.endswith(_SUFFIXES) and name not in listed and name != MANIFEST_NAME
        )
        files += [FileEntry(name, None, None) for name in extra if is_safe_id(name)]
        return SnapshotEntry(
            snapshot,
            finished=MANIFEST_NAME in names,
            protected=PROTECTED_NAME in names,
            owner=self.listed_owner(snapshot.group),
            files=tuple(files),
            manifest=manifest,
        )

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

    def _folders(self, relative: str) -> list[str]:
        with store_errors("list", relative or str(self.base)):
            try:
                if relative and (self.base / relative).is_symlink():
                    return []  # what a link leads to is no part of the store
                with os.scandir(self.base / relative) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
            except FileNotFoundError:
                return []

    def _text(self, relative: str) -> str | None:
        with store_errors("read", relative):
            try:
                return read_file(self.base / relative, limit=_MAX_TEXT).decode(errors="replace")
            except FileNotFoundError:
                return None


@dataclass(frozen=True, slots=True)
class _Made:
    """What a creation has to take back if it fails: what was not there before."""

    folders: Sequence[Path]  #: the store's own and those above it, from below
    trees: Sequence[Path]  #: of the store's own folders
    lock: Path | None

    @classmethod
    def missing(cls, path: Path) -> Self:
        """What a creation in `path` will make."""
        lock = path / ".lock"
        return cls(
            [folder for folder in (path, *path.parents) if not folder.exists()],
            [tree for tree in (path / ".chunks", path / ".fleece") if not os.path.lexists(tree)],
            None if os.path.lexists(lock) else lock,
        )

    def undo(self) -> None:
        """Remove it; folders that are in use by others stay."""
        for tree in self.trees:
            remove_tree(tree)
        if self.lock is not None:
            self.lock.unlink(missing_ok=True)
        for folder in self.folders:
            try:
                folder.rmdir()
            except OSError:
                return


def _create(path: Path) -> _Made:
    """Make the files of an empty store."""
    if path.is_dir():
        if (path / ".chunks").exists() and not (path / ".chunks" / "ffff").exists():
            why = "an earlier creation was interrupted there"
            raise UsageError("create datastore", str(path), why, f"remove {path}/.chunks and {path}/.lock")
        if (path / ".chunks").exists():
            raise _exists_already(path)
        names = sorted(entry.name for entry in path.iterdir())
        if foreign := [name for name in names if not name.startswith(".") and name != "lost+found"]:
            raise UsageError("create datastore", str(path), f"the folder is not empty: {', '.join(foreign[:3])}")
    elif path.exists():
        raise UsageError("create datastore", str(path), "it is no folder")
    for parent in path.resolve().parents:
        if (parent / ".chunks").is_dir() and (parent / ".lock").exists():
            raise UsageError("create datastore", str(path), f"it lies inside the datastore {parent}")
    made = _Made.missing(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        os.chmod(path, FOLDER_MODE)  # noqa: PTH101 - beside chown, which pathlib lacks
        if os.geteuid() == 0 and _backup_user_exists():
            os.chown(path, BACKUP_ID, BACKUP_ID)
        owner = Owner.of(path)
        # PBS's order: the chunk folder, then the lock file, then the 65536 folders.
        if not make_folder(path / ".chunks", owner, CHUNK_FOLDER_MODE):
            raise _exists_already(path)
        create_file(path / ".lock", b"", owner)
        fill_chunk_folder(path / ".chunks", owner)
    except UsageError:
        raise  # somebody else has begun a store here since we looked: nothing of it is ours
    except BaseException:
        made.undo()
        raise
    return made


def _exists_already(path: Path) -> UsageError:
    return UsageError("create datastore", str(path), "it is a datastore already", "'fleece datastore list' shows it")


def _backup_user_exists() -> bool:
    import grp
    import pwd

    try:
        return pwd.getpwnam("backup").pw_uid == BACKUP_ID and grp.getgrnam("backup").gr_gid == BACKUP_ID
    except KeyError:
        return False


def _destroy(base: Path) -> None:
    for name in (*(kind.value for kind in BackupType), "ns", ".chunks", ".fleece"):
        remove_tree(base / name)
    for name in (".gc-status", ".lock"):
        (base / name).unlink(missing_ok=True)
    # It may hold foreign files, be a mount point, or lie in a folder that is not ours: the store is gone in any case.
    with suppress(OSError):
        base.rmdir()


def _check_layout(path: Path) -> None:
    hint = "'fleece datastore create' makes one"
    try:
        if not path.is_dir():
            why = "there is no such folder" if not path.exists() else "it is no folder"
            raise StoreError("open datastore", str(path), why, hint)
        chunks = path / ".chunks"
        if not chunks.is_dir() or not (path / ".lock").is_file():
            raise StoreError(
                "open datastore", str(path), "the folder is no datastore (.chunks and .lock are needed)", hint
            )
        if not os.access(chunks, os.R_OK | os.X_OK):
            raise StoreError(
                "open datastore",
                str(path),
                "no right to read its chunks",
                "run as root or as the owner of the datastore",
            )
        missing = [name for name in ("0000", "7fff", "ffff") if not (chunks / name).is_dir()]
    except OSError as error:
        raise StoreError("open datastore", str(path), os_reason(error)) from error
    if missing:
        why = f"its layout is foreign: {chunks / missing[0]} is missing"
        raise StoreError("open datastore", str(path), why, "was it copied without its empty folders?")
