"""The local metadata made anew from the bucket (R32, R33).

First everything is fetched into a folder beside, what has not changed is linked from the old tree. Then group after
group is exchanged. A refresh that is interrupted before that changes nothing; one that is interrupted in between leaves
old and new groups, and a note that it has to be done again before anything may be written.
"""

import ctypes
import errno
import hashlib
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from core.limits import in_io_thread
from core.nursery import open_nursery
from core.progress import Progress, Task
from datastore.files import (
    make_folders,
    read_file,
    remove_tree,
    replace_file,
    store_errors,
    sync_filesystem,
    temporary_path,
)
from datastore.names import MANIFEST_NAME, BackupType, is_time
from datastore.s3.client import META_LIMIT
from datastore.s3.counters import Work, counted_as
from datastore.s3.errors import S3AnswerError
from datastore.s3.keys import NAMESPACE_MARKER, MetaKey, MetaKind, StoreKeys
from datastore.s3.opening import S3Datastore
from datastore.s3.state import CacheState, no_changes, refreshing
from datastore.s3.xml import Listed

#: Objects fetched at once.
_PARALLEL: Final = 16
#: Seconds between two looks for writers that must end first.
_POLL_S: Final = 1.0
_WORK_FOLDER: Final = ".fleece/refresh"
_TYPES: Final = tuple(kind.value for kind in BackupType)
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class RefreshReport:
    """What a refresh found."""

    objects: int = 0  #: in the bucket
    fetched: int = 0
    linked: int = 0  #: unchanged, not fetched
    groups_changed: int = 0  #: exchanged, new or removed
    unfinished: list[str] = field(default_factory=list)  #: snapshots without a manifest, paths in the store
    strange: int = 0  #: objects that are no metadata of a datastore


@dataclass(frozen=True, slots=True)
class _Tree:
    """A folder that holds metadata: groups and namespaces by their paths."""

    groups: frozenset[str]
    namespaces: frozenset[str]


async def refresh(store: S3Datastore, progress: Progress | None = None, *, wait_s: float = 3600.0) -> RefreshReport:
    """Fetch the metadata of `store` from its bucket.

    Backups and other changes are refused meanwhile, and those that run are waited for; reading goes on.
    Cancelled or failed before groups are exchanged, the old metadata stays and counts.

    Args:
        store: which one.
        progress: told how far it is, and warned of unfinished snapshots and strange objects.
        wait_s: how long to wait for garbage collection and running backups.

    Raises:
        StoreError: another installation uses the store, no space, no rights.
        LockedError: it is being refreshed already, or a garbage collection or backup goes on for longer than `wait_s`.
        S3Error: the bucket is out of reach, or an object cannot be fetched.
    """
    progress = Progress() if progress is None else progress
    with counted_as(Work.REFRESH), refreshing(store.base, store.owner):
        await store.s3.in_use.check("refresh", fresh=True)
        async with store.chunks.exclusive(wait_s=wait_s):
            await _wait_for_writers(store, wait_s)
            # Notes, protection, removals: those that have begun are waited for.
            async with no_changes(store.base, store.owner, wait_s=wait_s):
                return await _Refresh(store, progress).run()


async def _wait_for_writers(store: S3Datastore, wait_s: float) -> None:
    from datastore.errors import LockedError
    from datastore.locks import ProcessLocker

    locker = ProcessLocker(store.base, store.owner)
    give_up = trio.current_time() + wait_s
    while running := await in_io_thread(locker.writers):
        if trio.current_time() >= give_up:
            raise LockedError("refresh", store.settings.name, f"a backup is running: {running[0]}", "try again later")
        await trio.sleep(_POLL_S)


class _Refresh:
    """One refresh, under its locks."""

    def __init__(self, store: S3Datastore, progress: Progress) -> None:
        self._store, self._progress = store, progress
        self._base = store.base
        self._new = self._base / _WORK_FOLDER / f"new-{secrets.token_hex(4)}"
        self._report = RefreshReport()

    async def run(self) -> RefreshReport:
        with store_errors("refresh", self._base):
            await in_io_thread(remove_tree, self._base / _WORK_FOLDER)  # of one that was killed
            await in_io_thread(lambda: make_folders(self._base, self._relative(""), self._store.owner))
        try:
            await self._fetch_all()
            with store_errors("refresh", self._base):
                await in_io_thread(sync_filesystem, self._base)
            await in_io_thread(self._exchange)
        finally:
            with trio.CancelScope(shield=True), suppress(OSError):
                await in_io_thread(remove_tree, self._base / _WORK_FOLDER)
        self._tell()
        return self._report

    def _relative(self, path: str) -> str:
        return f"{_WORK_FOLDER}/{self._new.name}/{path}".rstrip("/")

    # Fetching.

    async def _fetch_all(self) -> None:
        send, receive = trio.open_memory_channel[tuple[Listed, MetaKey]](2 * _PARALLEL)
        with self._progress.task("fetch metadata", None, "objects") as task:

            async def work() -> None:
                async with receive.clone() as objects:
                    async for listed, key in objects:
                        await self._object(listed, key)
                        task.advance(1)

            async with open_nursery() as nursery:
                for _ in range(_PARALLEL):
                    nursery.start_soon(work)
                async with send, receive:
                    await self._list(send, task)

    async def _list(self, objects: "trio.MemorySendChannel[tuple[Listed, MetaKey]]", task: Task) -> None:
        async for page in self._store.client.pages(self._store.keys.metadata):
            self._report.objects += len(page.objects)
            task.update(total=self._report.objects)
            for listed in page.objects:
                key = self._store.keys.parse(listed.key)
                if isinstance(key, MetaKey):
                    await objects.send((listed, key))
                else:
                    self._report.strange += 1
                    task.advance(1)

    async def _object(self, listed: Listed, key: MetaKey) -> None:
        if key.kind is MetaKind.NAMESPACE:
            with store_errors("refresh", key.path):
                await in_io_thread(self._make_folder, key.path.rpartition("/")[0])
            return
        with store_errors("refresh", key.path):
            if await in_io_thread(self._link_unchanged, listed, key.path):
                self._report.linked += 1
                return
        found = await self._store.client.get(listed.key, limit=META_LIMIT)
        if found is None:
            await self._check_gone(listed)
            return
        with store_errors("refresh", key.path):
            await in_io_thread(self._write, key.path, found.data)
        self._report.fetched += 1

    async def _check_gone(self, listed: Listed) -> None:
        """An object that was listed is not found. Without an index, garbage collection would take its chunks.

        Raises:
            S3AnswerError: it is still listed.
        """
        page = await self._store.client.page(listed.key)
        if any(one.key == listed.key for one in page.objects):
            where = self._store.client.link.where(self._store.client.bucket, listed.key)
            why = "the endpoint lists it, but does not find it"
            raise S3AnswerError("fetch", where, why, "nothing was changed; try again later", status=404)

    def _make_folder(self, path: str) -> None:
        make_folders(self._base, self._relative(path), self._store.owner)

    def _link_unchanged(self, listed: Listed, path: str) -> bool:
        """Link the old file if it is what the bucket has, which its ETag tells where that is an MD5."""
        self._make_folder(path.rpartition("/")[0])
        old = self._base / path
        if len(listed.etag) != 32 or listed.size > META_LIMIT:
            return False
        try:
            if not old.is_file() or old.is_symlink() or old.stat().st_size != listed.size:
                return False
            data = read_file(old, limit=META_LIMIT)
            if hashlib.md5(data, usedforsecurity=False).hexdigest() != listed.etag.lower():
                return False
            os.link(old, self._new / path, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _write(self, path: str, data: bytes | bytearray) -> None:
        target = self._new / path
        replace_file(target, (data,), self._store.owner, temporary=temporary_path(self._new / "object"))

    # The exchange, in a worker thread: renames only.

    def _exchange(self) -> None:
        state = CacheState.read(self._base)
        assert state is not None
        state.completed(False).write(self._base, self._store.owner)
        with store_errors("put the metadata in place in", self._base):
            old, new = _look(self._base), _look(self._new)
            for ns in sorted(new.namespaces, key=lambda ns: ns.count("/")):
                make_folders(self._base, ns, self._store.owner)
            for group in sorted(new.groups):
                self._put_group(group, exists=group in old.groups)
            for group in sorted(old.groups - new.groups):
                self._remove(group)
            for ns in sorted(old.namespaces - new.namespaces, key=lambda ns: -ns.count("/")):
                for name in (*_TYPES, "ns", ""):
                    with suppress(OSError):
                        (self._base / ns / name).rmdir()
            sync_filesystem(self._base)
        state.completed(True).write(self._base, self._store.owner)

    def _put_group(self, group: str, *, exists: bool) -> None:
        if exists:
            if _same(self._base / group, self._new / group):
                return
            exchange(self._new / group, self._base / group)
        else:
            make_folders(self._base, group.rpartition("/")[0], self._store.owner)
            os.rename(self._new / group, self._base / group)  # noqa: PTH104 - beside exchange
        self._report.groups_changed += 1

    def _remove(self, group: str) -> None:
        gone = self._base / _WORK_FOLDER / f"gone-{secrets.token_hex(4)}"
        os.rename(self._base / group, gone)  # noqa: PTH104 - as above
        self._report.groups_changed += 1

    def _tell(self) -> None:
        groups = _look(self._base).groups
        for group in sorted(groups):
            for snapshot in sorted(os.listdir(self._base / group)):  # noqa: PTH208 - names
                folder = self._base / group / snapshot
                if is_time(snapshot) and not (folder / MANIFEST_NAME).exists():
                    self._report.unfinished.append(f"{group}/{snapshot}")
        for path in self._report.unfinished:
            self._progress.warn(f"{path} has no manifest in the bucket: an unfinished backup, which prune removes")
        if self._report.strange:
            count, prefix = self._report.strange, self._store.keys.metadata
            self._progress.warn(f"{count} objects below {prefix} belong to no snapshot; they were left alone")


def list_local(base: Path, keys: StoreKeys) -> set[str]:
    """The paths of all files below `base` that belong in the bucket, and of markers of namespaces.

    Raises:
        OSError: a folder cannot be read.
    """
    tree = _look(base)
    found = {f"{ns}/{NAMESPACE_MARKER}" for ns in tree.namespaces}
    for group in tree.groups:
        for folder, folders, files in os.walk(base / group):
            folders[:] = [name for name in folders if is_time(name)]
            paths = [str((Path(folder) / name).relative_to(base)) for name in files]
            found.update(path for path in paths if keys.parse(f"{keys.metadata}{path}") is not None)
    return found


def _look(root: Path) -> _Tree:
    """The groups and namespaces below `root`, by their paths."""
    groups: set[str] = set()
    namespaces: set[str] = set()
    waiting = [""]
    while waiting:
        ns = waiting.pop()
        for kind in _TYPES:
            groups.update(_join(ns, kind, name) for name in _folders(root / ns / kind))
        for name in _folders(root / ns / "ns"):
            namespaces.add(_join(ns, "ns", name))
            waiting.append(_join(ns, "ns", name))
    return _Tree(frozenset(groups), frozenset(namespaces))


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _same(old: Path, new: Path) -> bool:
    """True if both folders of a group hold the same files: those of the new one are links to those of the old one."""
    return _inodes(old) == _inodes(new)


def _inodes(group: Path) -> dict[str, int]:
    found = {}
    for folder, folders, files in os.walk(group):
        for name in files:
            path = Path(folder) / name
            found[str(path.relative_to(group))] = path.lstat().st_ino
        for name in folders:
            found[str((Path(folder) / name).relative_to(group))] = 0
    return found


def exchange(one: Path, other: Path) -> None:
    """Exchange two folders, so that nobody finds neither; on file systems that cannot, with a short gap.

    Raises:
        OSError: it cannot be done.
    """
    if _LIBC.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), str(other))
    aside = one.with_name(f"{one.name}.old")
    os.rename(other, aside)  # noqa: PTH104 - as above
    os.rename(one, other)  # noqa: PTH104
    os.rename(aside, one)  # noqa: PTH104
