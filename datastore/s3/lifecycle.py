"""Datastores in buckets come and go: created, taken over, destroyed."""

from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from core.errors import FleeceError, UsageError
from core.limits import in_cpu_thread, in_io_thread
from core.nursery import open_nursery
from core.progress import Progress, Task
from datastore.codec import ChunkCodec
from datastore.creation import Made, make_store, remove_store
from datastore.errors import LockedError
from datastore.files import Owner, store_errors
from datastore.pbs import find_store
from datastore.s3.client import S3Client
from datastore.s3.counters import Counters
from datastore.s3.errors import S3Error
from datastore.s3.in_use import InUse
from datastore.s3.keys import StoreKeys
from datastore.s3.link import EndpointLink, RetryPolicy
from datastore.s3.opening import S3Datastore, S3Settings, open_store, opened
from datastore.s3.reconcile import reconcile
from datastore.s3.refresh import refresh
from datastore.s3.state import CacheState
from datastore.s3.xml import DeleteFailure, Listed

_ZERO_SIZE: Final = 4 << 20
#: Requests at once that delete a whole store, 1000 objects each.
_DELETERS: Final = 4


async def create_store(
    settings: S3Settings,
    *,
    reuse: bool = False,
    overwrite_in_use: bool = False,
    progress: Progress | None = None,
    counters: Counters | None = None,
    policy: RetryPolicy | None = None,
) -> None:
    """Set up a datastore in a bucket that exists, and its cache folder; takes some seconds.

    Failed, the folder and the marker are as they were.

    Args:
        settings: the datastore.
        reuse: take over what the bucket holds of this store: metadata is fetched, of chunks only the names. A cache of
            a bucket that lies in the folder is made anew.
        overwrite_in_use: even if another installation has marked the store as its own; that must not use it any more.
        progress: told how far it is.
        counters: count the requests.
        policy: how long requests are tried.

    Raises:
        UsageError: the store is in use, the bucket has backups and `reuse` is not given, the folder is not empty, or
            lies in a datastore.
        StoreError: no space, no rights, or access times that do not change.
        S3Error: the bucket cannot be used.
    """
    progress = Progress() if progress is None else progress
    base, where = settings.cache, f"{settings.bucket}/{settings.name}"
    counters = Counters() if counters is None else counters
    counted = counters.pbs()
    async with EndpointLink.open(settings.endpoint, counters=counters, policy=policy) as link:
        client, keys = S3Client(link, settings.bucket), StoreKeys(settings.name)
        await client.head_bucket()
        marker = await InUse(client, keys, _no_instance).read()
        if marker is not None and not overwrite_in_use:
            hint = "if it is not used there any more, --overwrite-in-use takes it over"
            raise UsageError("create datastore", where, f"it is in use by {marker}", hint)
        if not reuse and (await client.page(keys.metadata)).objects:
            why = "the bucket holds backups of a datastore of this name"
            raise UsageError("create datastore", where, why, "--reuse takes them over")
    with store_errors("create datastore", base):
        made = await in_io_thread(_make_cache, base, reuse)
    try:
        async with opened(settings, counters=counters, policy=policy) as store:
            state = CacheState(settings.name, settings.bucket, settings.endpoint.id, complete=not reuse)
            await in_io_thread(state.write, base, store.owner)
            try:
                await store.s3.in_use.take()
                codec = ChunkCodec()
                zero = await in_cpu_thread(lambda: codec.encode(bytes(_ZERO_SIZE)))
                digest = await in_cpu_thread(codec.zero_digest, _ZERO_SIZE)
                await store.chunks.check_access_times(digest, zero)
                if reuse:
                    await refresh(store, progress)
                    # Put-if-absent sends a whole chunk before it is told that there is one (R24).
                    await reconcile(store, progress)
                await store.s3.add_counts(counters, counted)
            except BaseException:
                with trio.move_on_after(10, shield=True), suppress(FleeceError):
                    await store.s3.in_use.put_back(marker)
                raise
    except BaseException:
        with trio.CancelScope(shield=True):
            await in_io_thread(_undo, base, made)
        raise


async def _no_instance() -> str:
    return ""


def _make_cache(base: Path, reuse: bool) -> Made:
    """Make the cache folder; with `reuse` one that is a bucket's cache already goes first."""
    if reuse and (base / ".chunks").is_dir():
        pbs = find_store(base)
        if pbs is not None:
            why = f"PBS of this host uses it as {pbs.name!r}"
            raise UsageError("create datastore", str(base), why, "remove the datastore there first, without its data")
        if CacheState.read(base) is None:
            why = "it is a datastore, not the cache of a bucket"
            raise UsageError("create datastore", str(base), why, "give another folder")
        remove_store(base)
    return make_store(base)


def _undo(base: Path, made: Made) -> None:
    remove_store(base)
    made.undo()


async def destroy_store(
    settings: S3Settings,
    *,
    data: bool,
    override: bool = False,
    progress: Progress | None = None,
    counters: Counters | None = None,
    policy: RetryPolicy | None = None,
) -> None:
    """Give a store up: remove its marker, and with `data` every object of it and the cache folder.

    Metadata goes first and chunks last, so that a cut-off removal leaves no snapshot without its chunks; called again,
    it goes on. Without `data` everything stays as it is, and `create_store` with `reuse` takes it up again.

    Args:
        settings: the datastore.
        data: delete every backup.
        override: even if the marker is another installation's.
        progress: told how far it is.
        counters: count the requests.
        policy: how long requests are tried.

    Raises:
        StoreError: another installation uses the store, or files cannot be removed.
        LockedError: a backup or a garbage collection is running.
        S3Error: the bucket is out of reach, or refuses to delete objects.
    """
    progress = Progress() if progress is None else progress
    async with open_store(settings, counters=counters, policy=policy) as store:
        store.s3.in_use.overridden = override
        await store.s3.in_use.check("destroy datastore", fresh=True)
        async with store.chunks.exclusive(wait_s=0) as oldest_writer:
            if oldest_writer is not None:
                raise LockedError("destroy datastore", settings.name, "a backup is running", "try again when it ended")
            if data:
                await in_io_thread(_incomplete, store)  # what is left here is no truth any more
                with progress.task("delete objects", None, "objects") as task:
                    for prefix in (store.keys.metadata, store.keys.chunks, store.keys.everything):
                        await _delete_all(store, prefix, task)
            else:
                await store.s3.in_use.give_back()
            if data:
                with store_errors("destroy datastore", settings.cache):
                    await in_io_thread(remove_store, settings.cache)


def _incomplete(store: S3Datastore) -> None:
    state = CacheState.read(store.base)
    if state is not None:
        state.completed(False).write(store.base, Owner.of(store.base))


async def _delete_all(store: S3Datastore, prefix: str, task: Task) -> None:
    """Delete every object below `prefix`, the marker last.

    Raises:
        S3Error: the bucket is out of reach, or refuses to delete some of them.
    """
    failures: list[DeleteFailure] = []
    send, receive = trio.open_memory_channel[list[Listed]](_DELETERS)

    async def work() -> None:
        async with receive.clone() as pages:
            async for objects in pages:
                keys = [listed.key for listed in objects]
                failures.extend(await store.client.delete_many([key for key in keys if key != store.keys.in_use]))
                task.advance(len(keys))

    async with open_nursery() as nursery:
        for _ in range(_DELETERS):
            nursery.start_soon(work)
        async with send, receive:
            # Each page is asked for with the token of the one before, so that what is being deleted does not matter.
            async for page in store.client.pages(prefix):
                if page.objects:
                    await send.send(page.objects)
    if failures:
        first = failures[0]
        why = f"{len(failures)} objects were not deleted, the first one: {first.key}: {first.code} {first.message}"
        raise S3Error("destroy datastore", store.settings.name, why.rstrip(), code=first.code)
    if prefix == store.keys.everything:
        await store.s3.in_use.give_back()
