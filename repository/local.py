"""A local datastore as a repository."""

import os
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from core.buffers import Buffer
from core.limits import in_io_thread
from core.progress import Progress
from datastore import changes
from datastore.blob import Blob
from datastore.codec import format_fingerprint
from datastore.errors import SnapshotNotFoundError, StoreError
from datastore.files import SyncLevel
from datastore.gc import DEFAULT_CUTOFF_S, LOCK_WAIT_S, GcReport, collect_garbage
from datastore.interface import RepairingChunkStore
from datastore.manifest import Manifest
from datastore.names import ROOT, Group, Namespace, Snapshot
from datastore.prune import KeepOptions, PruneResult, prune_group
from datastore.reader import LocalReader, open_reader
from datastore.resync import LocalResyncSession, open_resync, replace_manifest
from datastore.session import LocalBackupSession, open_session
from datastore.store import Datastore, SnapshotEntry
from datastore.upid import Upid
from datastore.usage_history import UsageSample, read_history
from repository.interface import FileInfo, GroupInfo, SnapshotInfo, StoreUsage
from repository.users import record_users

#: Seconds a writer waits for a garbage collection that excludes it.
WRITER_WAIT_S: Final = 60.0


class LocalRepository:
    """See `repository.interface.Repository`."""

    def __init__(self, store: Datastore, name: str, *, lock_wait_s: float = WRITER_WAIT_S) -> None:
        self.store: Final = store
        self._name = name
        self._lock_wait_s = lock_wait_s

    @property
    def name(self) -> str:
        """See `Repository.name`."""
        return self._name

    async def identity(self) -> str:
        """See `Repository.identity`: the store's UUID."""
        return await self.store.uuid()

    async def namespaces(self, parent: Namespace = ROOT, *, depth: int | None = None) -> list[Namespace]:
        """See `Repository.namespaces`."""
        return await in_io_thread(lambda: list(self.store.namespaces(parent, depth=depth)))

    async def groups(self, ns: Namespace = ROOT) -> list[GroupInfo]:
        """See `Repository.groups`."""
        return await in_io_thread(lambda: [self._group(group) for group in self.store.groups(ns)])

    async def snapshots(
        self, ns: Namespace = ROOT, group: Group | None = None, *, unfinished: bool = False
    ) -> list[SnapshotInfo]:
        """See `Repository.snapshots`."""

        def collect() -> list[SnapshotInfo]:
            groups = self.store.groups(ns) if group is None else [group]
            infos = []
            for snapshot in (one for each in groups for one in self.store.snapshots(each, unfinished=unfinished)):
                try:
                    infos.append(_info(self.store.entry(snapshot)))
                except SnapshotNotFoundError:
                    continue  # removed meanwhile
                except StoreError:
                    # Verify names it and tells why; neither that nor a listing may end at one bad folder.
                    finished, owner = self.store.is_finished(snapshot), self.store.listed_owner(snapshot.group)
                    infos.append(_info(SnapshotEntry(snapshot, finished, False, owner, (), None)))
            return infos

        return await in_io_thread(collect)

    async def snapshot(self, snapshot: Snapshot) -> SnapshotInfo:
        """See `Repository.snapshot`."""
        return await in_io_thread(lambda: _info(self.store.entry(snapshot)))

    async def latest(self, group: Group) -> Snapshot | None:
        """See `Repository.latest`."""
        return await in_io_thread(self.store.latest, group)

    async def forget(self, snapshot: Snapshot) -> None:
        """See `Repository.forget`."""
        await self.store.forget(snapshot)

    async def forget_group(self, group: Group) -> list[Snapshot]:
        """See `Repository.forget_group`."""
        return await self.store.forget_group(group)

    async def prune(
        self, group: Group, keep: KeepOptions, *, dry_run: bool = False, progress: Progress | None = None
    ) -> PruneResult:
        """See `Repository.prune`."""
        return await prune_group(self.store, group, keep, dry_run=dry_run, progress=progress)

    async def set_notes(self, target: Snapshot | Group, text: str) -> None:
        """See `Repository.set_notes`."""
        if isinstance(target, Group):
            await changes.set_group_notes(self.store, target, text)
        else:
            await changes.set_notes(self.store, target, text)

    async def upload_log(self, snapshot: Snapshot, blob: Blob | Buffer) -> None:
        """See `Repository.upload_log`."""
        await changes.store_client_log(self.store, snapshot, blob)

    async def set_protected(self, snapshot: Snapshot, *, protected: bool) -> bool:
        """See `Repository.set_protected`."""
        return await changes.set_protected(self.store, snapshot, protected=protected)

    async def set_owner(self, group: Group, owner: str) -> None:
        """See `Repository.set_owner`."""
        await changes.set_owner(self.store, group, owner)

    async def create_namespace(self, ns: Namespace, *, known: Collection[Namespace] | None = None) -> bool:
        """See `Repository.create_namespace`."""
        return await changes.create_namespace(self.store, ns)

    async def delete_namespace(self, ns: Namespace, *, groups: bool = False) -> changes.NamespaceRemoval:
        """See `Repository.delete_namespace`."""
        return await changes.delete_namespace(self.store, ns, groups=groups)

    async def move_namespace(self, source: Namespace, target: Namespace) -> changes.NamespaceMove:
        """See `Repository.move_namespace`."""
        return await changes.move_namespace(self.store, source, target)

    async def usage(self) -> StoreUsage:
        """See `Repository.usage`."""
        return StoreUsage(*await in_io_thread(self.store.usage))

    async def collect_garbage(
        self,
        *,
        cutoff_s: int = DEFAULT_CUTOFF_S,
        lock_wait_s: float = LOCK_WAIT_S,
        dry_run: bool = False,
        allow_empty: bool = False,
        progress: Progress | None = None,
    ) -> GcReport:
        """See `Repository.collect_garbage`."""
        report = await collect_garbage(
            self.store,
            cutoff_s=cutoff_s,
            lock_wait_s=lock_wait_s,
            dry_run=dry_run,
            allow_empty=allow_empty,
            progress=progress,
        )
        if report.missing_is_certain and report.missing and not dry_run:
            # Chunks of a bucket that are lost for certain: no backup may build on the snapshots that need them.
            upid = Upid.new("garbage_collection", self.name)
            await record_users(self, self, report.missing, (), Progress() if progress is None else progress, upid)
        return report

    async def why_not_recording(self) -> str:
        """See `VerifyRecorder.why_not_recording`."""
        try:
            self.store.check_writable()
        except StoreError as error:
            return error.why
        writable = await in_io_thread(os.access, self.store.base / ".chunks", os.W_OK)
        return "" if writable else "it is read-only, or this user has no right to write to it"

    async def record_verification(self, snapshot: Snapshot, state: str, upid: str) -> None:
        """See `VerifyRecorder.record_verification`."""
        await changes.update_manifest(self.store, snapshot, {"verify_state": {"state": state, "upid": upid}})

    async def quarantine(self, digest: bytes, wrong: Callable[[Blob], bool]) -> str | None:
        """See `VerifyRecorder.quarantine`."""
        return await self.store.chunks.quarantine(digest, wrong)

    async def repair(self, digest: bytes, wrong: Callable[[Blob], bool]) -> bool:
        """See `ChunkRepairer.repair`."""
        chunks = self.store.chunks
        return isinstance(chunks, RepairingChunkStore) and await chunks.repair(digest, wrong)

    async def gc_status(self) -> dict[str, Any] | None:
        """See `Repository.gc_status`."""
        return await in_io_thread(self.store.gc_status)

    async def usage_history(self) -> list[UsageSample]:
        """See `Repository.usage_history`."""
        return await in_io_thread(_history, self.store.base)

    @asynccontextmanager
    async def backup(self, snapshot: Snapshot, *, owner: str | None = None) -> AsyncIterator[LocalBackupSession]:
        """See `Repository.backup`."""
        async with open_session(self.store, snapshot, owner=owner, lock_wait_s=self._lock_wait_s) as session:
            yield session

    @asynccontextmanager
    async def reader(self, snapshot: Snapshot) -> AsyncIterator[LocalReader]:
        """See `Repository.reader`."""
        async with open_reader(self.store, snapshot) as reader:
            yield reader

    async def replace_manifest(self, snapshot: Snapshot, manifest: Manifest) -> None:
        """See `repository.sync.interface.ResyncTarget.replace_manifest`."""
        await replace_manifest(self.store, snapshot, manifest)

    @asynccontextmanager
    async def resync(self, snapshot: Snapshot) -> AsyncIterator[LocalResyncSession]:
        """See `repository.sync.interface.ResyncTarget.resync`."""
        async with open_resync(self.store, snapshot, lock_wait_s=self._lock_wait_s) as session:
            yield session

    def close(self) -> None:
        """Close the datastore."""
        self.store.close()

    def _group(self, group: Group) -> GroupInfo:
        finished = self.store.snapshots(group)
        return GroupInfo(
            group,
            owner=self.store.listed_owner(group),
            comment=self.store.listed_notes(group),
            count=len(finished),
            latest=finished[-1] if finished else None,
        )


async def open_local(
    path: str | Path,
    *,
    name: str | None = None,
    sync_level: SyncLevel = SyncLevel.FILESYSTEM,
    lock_wait_s: float = WRITER_WAIT_S,
) -> LocalRepository:
    """Open the datastore in the folder `path` as a repository; to be closed with `close`.

    Args:
        name: as the command line takes it, default the path.
        sync_level: how durable a finished backup is.
        lock_wait_s: how long a backup waits for a garbage collection that excludes writers.

    Raises:
        StoreError: not a datastore, no rights, in maintenance.
    """
    store = await Datastore.open(Path(path), sync_level=sync_level)
    return LocalRepository(store, name or str(path), lock_wait_s=lock_wait_s)


def _history(base: Path) -> list[UsageSample]:
    try:
        return read_history(base)
    except StoreError:
        return []


def _info(entry: SnapshotEntry) -> SnapshotInfo:
    manifest = entry.manifest
    fingerprint = None if manifest is None else manifest.fingerprint
    files = tuple(FileInfo(file.filename, file.size, file.crypt_mode, file.csum) for file in entry.files)
    return SnapshotInfo(
        entry.snapshot,
        files=files,
        finished=entry.finished,
        owner=entry.owner,
        protected=entry.protected,
        comment="" if manifest is None else manifest.notes or "",
        verification=None if manifest is None else manifest.verify_state,
        fingerprint=None if fingerprint is None else format_fingerprint(fingerprint),
        size=None if manifest is None else sum(file.size or 0 for file in files),
        added=None if manifest is None else _added(manifest),
    )


def _added(manifest: Manifest) -> int | None:
    """PBS counts chunks that were there already in its sum of stored bytes: their share is taken off."""
    stats = manifest.chunk_upload_stats or {}
    stored, count, duplicates = (stats.get(name) for name in ("compressed_size", "count", "duplicates"))
    if not isinstance(stored, int) or not isinstance(count, int) or not isinstance(duplicates, int):
        return None
    return stored * (count - duplicates) // count if 0 <= duplicates <= count and count else 0
