"""Small changes of what is in a datastore: notes, protection, owners, namespaces.

Each holds the lock that PBS holds for it (docs/formats.md, "Locks") and writes through the store's `MetaStore`, so that
it works on every backend.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from core.buffers import Buffer
from core.errors import FleeceError, UsageError
from core.limits import in_io_thread
from datastore.blob import MAX_ENCODED_CHUNK, Blob
from datastore.errors import SnapshotNotFoundError
from datastore.interface import RenamingMetaStore
from datastore.manifest import Manifest
from datastore.names import (
    CLIENT_LOG_NAME,
    MANIFEST_NAME,
    PROTECTED_NAME,
    Group,
    Namespace,
    Snapshot,
)
from datastore.store import Datastore

#: Bytes of notes: a manifest is read whole at every listing.
MAX_NOTES: Final = 1 << 16


async def update_manifest(store: Datastore, snapshot: Snapshot, changes: Mapping[str, Any]) -> Manifest:
    """Change the unprotected part of a manifest under its lock; the value None removes a key. Signatures stay valid.

    Cancelled or failed, the manifest is the old one or the new one.

    Raises:
        SnapshotNotFoundError: there is no such snapshot, or it is unfinished.
        LockedError: somebody else has held the manifest's lock for 5 seconds.
        FormatError: the manifest, or a value, is nothing a manifest can hold.
        StoreError: it cannot be read or written.
    """
    store.check_writable()
    await _need_snapshot(store, snapshot, "change the manifest of")  # else its lock file would be made for nothing
    async with store.locks.manifest(snapshot):
        raw = await in_io_thread(store.read_manifest, snapshot)
        manifest = Manifest.parse(raw, where=f"{snapshot}/{MANIFEST_NAME}").with_unprotected(changes)
        blob = manifest.encode()
        await store.meta.put(f"{snapshot.path}/{MANIFEST_NAME}", [blob.header, blob.payload], replace=True, sync=True)
    return manifest


async def set_notes(store: Datastore, snapshot: Snapshot, text: str) -> None:
    """Set the notes of a snapshot; the empty text removes them. Errors as `update_manifest`.

    Raises:
        UsageError: too long, or no Unicode.
    """
    _check_notes(text)
    await update_manifest(store, snapshot, {"notes": text or None})


async def set_group_notes(store: Datastore, group: Group, text: str) -> None:
    """Set the notes of a group; the empty text removes them.

    Raises:
        SnapshotNotFoundError: there is no such group.
        LockedError: a backup into the group is running.
        UsageError: too long, or no Unicode.
        StoreError: the file cannot be written.
    """
    store.check_writable()
    _check_notes(text)
    await _need_group(store, group, "change the notes of")
    async with store.locks.group(group):
        await _need_group(store, group, "change the notes of")
        path = f"{group.path}/notes"
        if text:
            await store.meta.put(path, [text.encode()], replace=True, sync=True)
        else:
            await store.meta.delete(path)


async def store_client_log(store: Datastore, snapshot: Snapshot, blob: Blob | Buffer) -> None:
    """Store the log of the client that made a snapshot, an encoded blob; the snapshot may be unfinished.

    Raises:
        SnapshotNotFoundError: there is no such snapshot.
        UsageError: there is a log already, or it is larger than a blob may be.
        FormatError: no blob, or its CRC is wrong.
        StoreError: it cannot be written.
    """
    where = f"{snapshot}/{CLIENT_LOG_NAME}"
    parsed = blob if isinstance(blob, Blob) else Blob.parse(blob, where=where)
    if len(parsed) > MAX_ENCODED_CHUNK:
        raise UsageError("store the log", where, f"{len(parsed)} bytes; at most {MAX_ENCODED_CHUNK} are possible")
    parsed.check(where=where)
    store.check_writable()
    path = f"{snapshot.path}/{CLIENT_LOG_NAME}"
    if not await in_io_thread(store.exists, snapshot):
        raise SnapshotNotFoundError("store the log", where, "there is no such snapshot")
    if await in_io_thread((store.base / path).exists):
        raise UsageError("store the log", where, "there is one already")
    await store.meta.put(path, [parsed.header, parsed.payload], replace=False, sync=True)


async def set_protected(store: Datastore, snapshot: Snapshot, *, protected: bool) -> bool:
    """Keep a snapshot from being removed, or allow that again; False if it was so already.

    Raises:
        SnapshotNotFoundError: not there.
        LockedError: it is being read, verified, written, or the base of a running backup.
        StoreError: the file cannot be written.
    """
    store.check_writable()
    what = "protect" if protected else "unprotect"
    await _need_snapshot(store, snapshot, what)
    async with store.locks.snapshot(snapshot, shared=False):
        await _need_snapshot(store, snapshot, what)
        if await in_io_thread(store.is_protected, snapshot) == protected:
            return False
        path = f"{snapshot.path}/{PROTECTED_NAME}"
        if protected:
            await store.meta.put(path, [], replace=False, sync=True)
        else:
            await store.meta.delete(path)
    return True


async def set_owner(store: Datastore, group: Group, owner: str) -> None:
    """Make `owner` (an auth id, checked by the caller) the owner of a group.

    Raises:
        SnapshotNotFoundError: there is no such group.
        LockedError: a backup into the group is running.
        StoreError: the file cannot be written.
    """
    store.check_writable()
    await _need_group(store, group, "change the owner of")
    async with store.locks.group(group):
        await _need_group(store, group, "change the owner of")
        await store.meta.put(f"{group.path}/owner", [f"{owner}\n".encode()], replace=True, sync=True)


async def create_namespace(store: Datastore, ns: Namespace) -> bool:
    """Make a namespace and those above it; False if it was there.

    Raises:
        UsageError: the root.
        StoreError: it cannot be made.
    """
    _refuse_root(ns, "create")
    store.check_writable()
    if await in_io_thread(store.namespace_exists, ns):
        return False
    await store.meta.create_namespace(ns)
    return True


@dataclass(slots=True)
class NamespaceRemoval:
    """What became of a namespace that was to go."""

    removed: list[Namespace] = field(default_factory=list)  #: innermost first
    kept: list[Namespace] = field(default_factory=list)  #: still hold something
    protected: list[Snapshot] = field(default_factory=list)  #: stayed for that reason


async def delete_namespace(store: Datastore, ns: Namespace, *, groups: bool = False) -> NamespaceRemoval:
    """Remove a namespace and the ones below it; with `groups` also their groups, except for protected snapshots.

    Raises:
        UsageError: the root.
        SnapshotNotFoundError: not there.
        FleeceError: it holds groups, and `groups` is not given.
        LockedError: a group is in use (what came before it is gone then).
        StoreError: files cannot be removed.
    """
    _refuse_root(ns, "delete")
    store.check_writable()
    below = await in_io_thread(lambda: list(store.namespaces(ns)))
    result = NamespaceRemoval()
    held = await in_io_thread(lambda: [group for one in below for group in store.groups(one)])
    if held and not groups:
        shown = ", ".join(f"{group.ns}: {group}" for group in held[:3]) + (", ..." if len(held) > 3 else "")
        raise FleeceError(
            "delete the namespace", str(ns), f"it holds {len(held)} groups ({shown})",
            "--delete-groups removes them and all their snapshots",
        )  # fmt: skip
    for group in held:
        with suppress(SnapshotNotFoundError):  # its last snapshot was pruned meanwhile
            result.protected += await store.forget_group(group)
    for one in reversed(below):  # depth first, so that what is inside comes before what it is in
        gone = await store.meta.delete_namespace(one)
        (result.removed if gone else result.kept).append(one)
    return result


@dataclass(slots=True)
class NamespaceMove:
    """What became of a namespace that was to move."""

    moved: list[Group] = field(default_factory=list)  #: as they are called now
    failed: dict[Group, str] = field(default_factory=dict)  #: stayed where they were, and why


async def move_namespace(store: Datastore, source: Namespace, target: Namespace) -> NamespaceMove:
    """Rename a namespace with all it holds; group by group, so that a group is always whole, here or there.

    A target that exists takes the groups in, so that a cut-off move can be repeated. No garbage collection may run
    meanwhile: it would miss the indexes of a group that moves from what it has yet to look at to what it has seen.

    Raises:
        UsageError: the root, a target inside the source or the other way round, too deep or long, a group that is in
            both, or a store whose backend cannot rename.
        SnapshotNotFoundError: the source is not there.
        LockedError: a garbage collection is running.
        StoreError: files cannot be renamed.
    """
    _refuse_root(source, "move")
    _refuse_root(target, "move")
    inside = (source.components[: len(target.components)], target.components[: len(source.components)])
    if inside[0] == target.components or inside[1] == source.components:
        raise UsageError("move the namespace", str(source), f"one of it and {target} lies inside the other")
    store.check_writable()
    if not await in_io_thread(store.namespace_exists, source):
        raise SnapshotNotFoundError("move the namespace", repr(str(source)), "it does not exist")
    meta = store.meta
    if not isinstance(meta, RenamingMetaStore):
        why = "the datastore lies in a bucket, where nothing can be renamed"
        raise UsageError(
            "move the namespace", str(source), why, "sync it to the new namespace, then delete the old one"
        )
    result = NamespaceMove()
    async with store.chunks.exclusive(wait_s=0):
        below = await in_io_thread(lambda: list(store.namespaces(source)))
        renamed = {one: Namespace.parse(f"{target}{str(one)[len(str(source)) :]}") for one in below}
        groups = await in_io_thread(lambda: [group for one in below for group in store.groups(one)])
        for group in groups:
            moved = Group(group.type, group.id, renamed[group.ns])
            if await in_io_thread((store.base / moved.path).exists):
                raise UsageError("move the namespace", str(source), f"{moved.ns} holds a group {moved} already")
        for one in renamed.values():
            await store.meta.create_namespace(one)
        for group in groups:
            moved = Group(group.type, group.id, renamed[group.ns])
            try:
                await _move_group(store, meta, group, moved)
            except FleeceError as error:
                result.failed[group] = str(error)
            else:
                result.moved.append(moved)
        for one in reversed(below):
            await store.meta.delete_namespace(one)
    return result


async def _move_group(store: Datastore, meta: RenamingMetaStore, group: Group, moved: Group) -> None:
    """Rename one group under the locks of its old and new name and of all its snapshots."""
    held = []
    done = False
    try:
        held.append(await store.locks.acquire_group(group))
        async with store.locks.group(moved):
            for snapshot in await in_io_thread(lambda: store.snapshots(group, unfinished=True)):
                held.append(await store.locks.acquire_snapshot(snapshot, shared=False))
            if await in_io_thread((store.base / moved.path).exists):
                raise FleeceError("move the group", str(group), f"{moved.ns} holds one of that name already")
            await meta.make_folders(moved.path.rpartition("/")[0])
            await meta.rename_folder(group.path, moved.path)
            done = True
    finally:
        for lock in reversed(held):
            lock.release(unlink=done)


async def _need_snapshot(store: Datastore, snapshot: Snapshot, what: str) -> None:
    if not await in_io_thread(store.exists, snapshot):
        raise SnapshotNotFoundError(
            what, str(snapshot), "there is no such snapshot", "'fleece list' shows what there is"
        )


async def _need_group(store: Datastore, group: Group, what: str) -> None:
    if not await in_io_thread((store.base / group.path).is_dir):
        raise SnapshotNotFoundError(what, str(group), "there is no such group", "'fleece list' shows what there is")


def _check_notes(text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError("set the notes", "", "the text is no Unicode") from None
    if size > MAX_NOTES:
        raise UsageError("set the notes", "", f"the text has {size} bytes, at most {MAX_NOTES} are allowed")


def _refuse_root(ns: Namespace, what: str) -> None:
    if not ns.components:
        raise UsageError(f"{what} the namespace", "''", "it is the root, which is always there")
