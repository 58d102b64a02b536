"""All files that are no chunks, in a bucket and in the local folder: see `datastore.interface.MetaStore`.

The bucket first, the local folder last (R30): whoever is interrupted does the whole thing again, and finds half of it
done. Reading needs the local folder only.
"""

import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from core.buffers import Buffer
from core.limits import in_io_thread
from datastore.errors import StoreError
from datastore.files import Owner, SyncLevel, read_file, store_errors
from datastore.local_meta import LocalMetaStore
from datastore.names import MANIFEST_NAME, PROTECTED_NAME, BackupType, Namespace, is_time
from datastore.s3.client import META_LIMIT, S3Client
from datastore.s3.errors import S3BackendError, S3Error, S3UnavailableError
from datastore.s3.in_use import ForeignStoreError, InUse
from datastore.s3.keys import NAMESPACE_MARKER, StoreKeys
from datastore.s3.pending import PendingDeletes
from datastore.s3.state import begin_change
from datastore.s3.xml import DeleteFailure, batches

_LOG = logging.getLogger(__name__)
#: Seconds that removing an unfinished snapshot waits for the bucket before it leaves a note (R29).
ABANDON_AFTER_S: Final = 20.0
_TREES: Final = frozenset((*(kind.value for kind in BackupType), "ns"))


class S3MetaStore:
    """The metadata store of a datastore in a bucket.

    Args:
        client: the bucket.
        keys: of the store.
        base: the cache folder.
        owner: of its files.
        sync_level: how durable the local copy is.
        in_use: says whether we may delete.
    """

    def __init__(
        self, client: S3Client, keys: StoreKeys, base: Path, owner: Owner, sync_level: SyncLevel, in_use: InUse
    ) -> None:
        self._client, self._keys, self._base, self._in_use = client, keys, base, in_use
        self._owner = owner
        self._local = LocalMetaStore(base, owner, sync_level)
        self._pending = PendingDeletes(base, owner)
        self._replaying = trio.Lock()

    @asynccontextmanager
    async def _change(self, what: str) -> AsyncIterator[None]:
        """Change bucket and folder in the block, which no refresh sees half done.

        Raises:
            StoreError: a refresh is under way.
        """
        fd = await in_io_thread(begin_change, self._base, self._owner, what)
        try:
            yield
        finally:
            os.close(fd)

    async def put(self, path: str, data: Sequence[Buffer], *, replace: bool, sync: bool = False) -> None:
        """See `MetaStore.put`."""
        if not replace and await in_io_thread(os.path.lexists, self._base / path):
            raise StoreError("write", path, "it exists already")
        if _is_stored(path):
            name = path.rpartition("/")[2]
            async with self._change("write"):
                await self._client.put(self._keys.meta(path), data, if_absent=name == PROTECTED_NAME)
                await self._local.put(path, data, replace=replace, sync=sync)
        else:
            await self._local.put(path, data, replace=replace, sync=sync)

    async def create(self, path: str, data: bytes) -> None:
        """See `MetaStore.create`."""
        if await in_io_thread(os.path.lexists, self._base / path):
            raise StoreError("write", path, "it exists already")
        async with self._change("write"):
            await self._client.put(self._keys.meta(path), [data])
            await self._local.create(path, data)

    async def publish_index(self, tmp: Path, path: str) -> None:
        """See `MetaStore.publish_index`."""

        def read() -> bytes:
            with store_errors("read", path):
                return read_file(tmp, limit=META_LIMIT)

        async with self._change("write"):
            await self._client.put(self._keys.meta(path), [await in_io_thread(read)])
            await self._local.publish_index(tmp, path)

    async def delete(self, path: str) -> bool:
        """See `MetaStore.delete`; asks the bucket for nothing that is not here."""
        if not await in_io_thread(os.path.lexists, self._base / path):
            return False
        if not _is_stored(path):
            return await self._local.delete(path)
        await self._in_use.check("remove")
        async with self._change("remove"):
            await self._client.delete(self._keys.meta(path))
            return await self._local.delete(path)

    async def delete_tree(self, path: str) -> None:
        """See `MetaStore.delete_tree`.

        An unfinished snapshot goes locally even if the bucket is out of reach; a note says what is left there.

        Raises:
            StoreError: another installation uses the store.
            S3Error: the bucket is out of reach, or refuses to delete some of the objects.
        """
        prefix = self._keys.meta_prefix(path)
        if not is_time(path.rpartition("/")[2]) or await in_io_thread(
            os.path.lexists, self._base / path / MANIFEST_NAME
        ):
            await self._in_use.check("remove")
            async with self._change("remove"):
                await self.delete_objects(prefix)
                await self._local.delete_tree(path)
            return
        async with self._change("remove"):
            await self._abandon(path, prefix)

    async def _abandon(self, path: str, prefix: str) -> None:
        """Remove an unfinished snapshot here, and in the bucket now or later.

        If another installation uses the store by now, it is later: when it is ours again.
        """
        done = False
        try:
            with trio.move_on_after(ABANDON_AFTER_S):
                await self._in_use.check("remove")
                await self.delete_objects(prefix)
                done = True
        except (S3UnavailableError, S3BackendError, ForeignStoreError) as error:
            _LOG.warning("what was stored of %s stays in the bucket for now: %s", path, error)
        finally:
            if not done:
                self._pending.add(prefix)
        await self._local.delete_tree(path)

    async def delete_objects(self, prefix: str) -> int:
        """Delete all objects whose keys begin with `prefix`, which ends in `/`; manifests go first.

        Returns:
            how many there were.

        Raises:
            S3Error: the bucket is out of reach, or refuses to delete some of them.
        """
        keys = []
        async for page in self._client.pages(prefix):
            keys += [listed.key for listed in page.objects if listed.key.startswith(prefix)]
        # A removal that is cut off never leaves what looks like a finished backup.
        keys.sort(key=lambda key: not key.endswith(f"/{MANIFEST_NAME}"))
        failures: list[DeleteFailure] = []
        for batch in batches(keys):
            failures += await self._client.delete_many(batch)
        if failures:
            first = failures[0]
            why = f"{len(failures)} of {len(keys)} objects were not deleted: {first.key}: {first.code} {first.message}"
            raise S3Error("delete the objects below", prefix, why.rstrip(), code=first.code)
        return len(keys)

    async def replay_pending(self) -> None:
        """Delete what earlier failures left; a prefix that a new backup has taken into use is left to that.

        Raises:
            S3Error: as `delete_objects`.
            StoreError: the note cannot be read or written, or another installation uses the store.
        """
        # One at a time: a backup that begins where notes are waits until what was there has gone.
        async with self._replaying:
            done = []
            for prefix in await in_io_thread(self._pending.prefixes):
                path = prefix.removeprefix(self._keys.metadata).rstrip("/")
                if not prefix.startswith(self._keys.metadata) or not _is_stored(path):
                    done.append(prefix)  # nothing of ours
                    continue
                await self._in_use.check("remove what was left in")
                async with self._change("remove what was left in"):
                    if not await in_io_thread(os.path.lexists, self._base / path):
                        await self.delete_objects(prefix)
                done.append(prefix)
            if done:
                await in_io_thread(self._pending.remove, done)

    async def make_folders(self, path: str) -> list[Path]:
        """See `MetaStore.make_folders`. What an earlier backup left in a folder's place goes first."""
        if self._keys.meta_prefix(path) in await in_io_thread(self._pending.prefixes):
            await self.replay_pending()
        return await self._local.make_folders(path)

    async def create_namespace(self, ns: Namespace) -> None:
        """See `MetaStore.create_namespace`: a marker for each level that is new."""
        for depth in range(1, len(ns.components) + 1):
            level = Namespace(ns.components[:depth])
            if not await in_io_thread((self._base / level.path).is_dir):
                async with self._change("create the namespace in"):
                    await self._client.put(self._keys.namespace_marker(level), [], if_absent=True)
                    await self._local.make_folders(level.path)

    async def delete_namespace(self, ns: Namespace) -> bool:
        """See `MetaStore.delete_namespace`."""
        if not await in_io_thread(self._holds_nothing, ns):
            return False
        await self._in_use.check("remove the namespace")
        async with self._change("remove the namespace in"):
            await self._client.delete(self._keys.namespace_marker(ns))
            if await self._local.delete_namespace(ns):
                return True
            # Somebody put something into it meanwhile.
            await self._client.put(self._keys.namespace_marker(ns), [], if_absent=True)
            return False

    def _holds_nothing(self, ns: Namespace) -> bool:
        with store_errors("look into the namespace", str(ns)):
            for name in _TREES:
                try:
                    with os.scandir(self._base / ns.path / name) as entries:
                        if next(entries, None) is not None:
                            return False
                except (FileNotFoundError, NotADirectoryError):
                    continue
        return True

    async def sync(self, folders: Sequence[str], *, since: int) -> None:
        """See `MetaStore.sync`. The bucket is durable already, but what garbage collection reads is here."""
        await self._local.sync(folders, since=since)


def _is_stored(path: str) -> bool:
    """True for paths of backups; what else lies in the folder is local."""
    return path.partition("/")[0] in _TREES and not path.endswith(f"/{NAMESPACE_MARKER}")
