"""All files of a local datastore that are no chunks: written atomically, removed safely."""

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from core.buffers import Buffer
from core.limits import in_io_thread
from datastore.errors import StoreError
from datastore.files import (
    Owner,
    SyncLevel,
    create_file,
    make_folders,
    remove_tree,
    replace_file,
    store_errors,
    sync_filesystem,
    sync_path,
    unlink_existing,
)
from datastore.names import MANIFEST_NAME, BackupType, Namespace

#: Of the folders that are synced, those that hold files of a snapshot: its own and its group's.
_FOLDERS_WITH_FILES: Final = 2
#: What a namespace's folder holds: groups by type, and the namespaces in it.
_NAMESPACE_FOLDERS: Final = (*(kind.value for kind in BackupType), "ns")


class LocalMetaStore:
    """The metadata store of a local datastore; see `datastore.interface.MetaStore`."""

    def __init__(self, base: Path, owner: Owner, sync_level: SyncLevel) -> None:
        self._base = base
        self._owner = owner
        self._level = sync_level

    async def put(self, path: str, data: Sequence[Buffer], *, replace: bool, sync: bool = False) -> None:
        """See `MetaStore.put`. Without `replace` the caller holds the snapshot's exclusive lock."""
        target = self._base / path

        def write() -> None:
            with store_errors("write", path):
                if not replace and os.path.lexists(target):
                    raise StoreError("write", path, "it exists already")
                replace_file(target, data, self._owner, sync=sync and self._level is not SyncLevel.NONE)

        await in_io_thread(write)

    async def create(self, path: str, data: bytes) -> None:
        """See `MetaStore.create`."""

        def make() -> None:
            with store_errors("write", path):
                if not create_file(self._base / path, data, self._owner):
                    raise StoreError("write", path, "it exists already")

        await in_io_thread(make)

    async def publish_index(self, tmp: Path, path: str) -> None:
        """See `MetaStore.publish_index`."""

        def publish() -> None:
            with store_errors("put in place", path):
                fd = os.open(tmp, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    self._owner.own(fd)
                finally:
                    os.close(fd)
                os.rename(tmp, self._base / path)  # noqa: PTH104 - one system call that the crash tests count

        await in_io_thread(publish)

    async def delete(self, path: str) -> bool:
        """See `MetaStore.delete`."""

        def remove() -> bool:
            with store_errors("remove", path):
                return unlink_existing(self._base / path)

        return await in_io_thread(remove)

    async def delete_tree(self, path: str) -> None:
        """See `MetaStore.delete_tree`."""

        def remove() -> None:
            with store_errors("remove", path):
                remove_tree(self._base / path, first=(MANIFEST_NAME,))

        await in_io_thread(remove)

    async def make_folders(self, path: str) -> list[Path]:
        """See `MetaStore.make_folders`."""

        def make() -> list[Path]:
            with store_errors("make the folder", path):
                return make_folders(self._base, path, self._owner)

        return await in_io_thread(make)

    async def create_namespace(self, ns: Namespace) -> None:
        """See `MetaStore.create_namespace`."""
        if ns.components:
            await self.make_folders(ns.path)

    async def delete_namespace(self, ns: Namespace) -> bool:
        """See `MetaStore.delete_namespace`."""
        folder = self._base / ns.path

        def remove() -> bool:
            with store_errors("remove the namespace", str(ns)):
                for name in _NAMESPACE_FOLDERS:
                    _remove_empty(folder / name)
                return _remove_empty(folder)

        return await in_io_thread(remove)

    async def rename_folder(self, path: str, target: str) -> None:
        """See `RenamingMetaStore.rename_folder`."""

        def rename() -> None:
            with store_errors("move", path):
                os.rename(self._base / path, self._base / target)  # noqa: PTH104 - as above

        await in_io_thread(rename)

    async def sync(self, folders: Sequence[str], *, since: int) -> None:
        """See `MetaStore.sync`."""
        if self._level is SyncLevel.FILESYSTEM:
            with store_errors("sync", str(self._base)):
                await in_io_thread(sync_filesystem, since)
        elif self._level is SyncLevel.FILE:
            with store_errors("sync", str(self._base)):
                await in_io_thread(_sync_folders, [self._base / folder for folder in folders])


def _remove_empty(path: Path) -> bool:
    """Remove an empty folder; False if it is not empty."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # a link, or a file, in its place
            return False
        raise
    return True


def _sync_folders(folders: Iterable[Path]) -> None:
    # The snapshot's and its group's files; above them are only folders of ours, and foreign files.
    for depth, folder in enumerate(folders):
        if depth < _FOLDERS_WITH_FILES:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        with suppress(FileNotFoundError):  # somebody's temporary file, renamed meanwhile
                            sync_path(Path(entry.path))
        sync_path(folder)
