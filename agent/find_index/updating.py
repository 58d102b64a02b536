"""Follows a repository: snapshots that are new or changed are indexed, vanished ones leave the index.

Only what was read whole and without any warning is recorded, so that what is recorded never hides one; the rest is read
directly by every `find`, which then says what is wrong with it.
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from agent.archive_listing import Found, found, walk_archive
from agent.find_index.errors import IndexFileError, index_errors
from agent.find_index.files import IndexFile
from agent.find_index.recording import (
    NOT_ASKED,
    NOT_CLEAN,
    SEALED,
    UNUSUAL,
    Known,
    Part,
    Records,
    is_encrypted,
    mark_of,
    source_of,
    uses_catalog,
)
from agent.find_index.writing import StateWriter, UnusualOrderError
from agent.snapshot_archives import OpenSnapshot, in_walk, open_snapshot
from core.errors import FleeceError, FormatError
from core.limits import in_io_thread
from core.progress import Progress, Task
from datastore.codec import ChunkCodec, format_fingerprint
from datastore.errors import KeyNeededError
from datastore.names import CATALOG_NAME, Snapshot, strip_archive_type
from repository.archive import ChunkCache, open_cache
from repository.disks import disk_files
from repository.interface import Repository, SnapshotInfo
from repository.stored_bytes import archive_stream_names

T = TypeVar("T")

#: Bytes of chunks that are kept: an archive is read from its begin to its end, and from one directory's to the next.
_CACHE: Final = 16 << 20
#: Entries after which the progress is told of them.
_TELL: Final = 4096


@dataclass
class Updated:
    """What an update did."""

    indexed: int = 0  #: snapshots that were read, or found to be known already under another name
    archives: int = 0  #: of these, archives that had to be gone through
    entries: int = 0  #: entries of these archives
    removed: int = 0  #: snapshots that are not there any more
    left_out: dict[Snapshot, str] = field(default_factory=dict)  #: that could not be read, and why
    #: Warnings that belong to snapshots although these are in the index: their signature could not be checked.
    notes: dict[Snapshot, list[str]] = field(default_factory=dict)


class _NotCleanError(FleeceError):
    """It can be read, but not without a warning."""

    def __init__(self, snapshot: Snapshot, warning: str) -> None:
        super().__init__("index", str(snapshot), warning)


class Updater:
    """Brings an index up to date; its lock is held."""

    def __init__(
        self,
        file: IndexFile,
        connection: sqlite3.Connection,
        repository: Repository,
        codec: ChunkCodec,
    ) -> None:
        """The index `file`, opened as `connection`; what is encrypted is read with the key of `codec`."""
        self._path, self._records = file.path, Records(connection)
        self._repository, self._codec = repository, codec
        self._allowed = self._images = False
        self.done = Updated()

    async def update(
        self, infos: Sequence[SnapshotInfo], covers: Callable[[str], bool], progress: Progress, *, images: bool = False
    ) -> Updated:
        """Make the index agree with `infos`.

        Cancelled, what was read so far stays, and is not read again.

        Args:
            infos: the snapshots there are, by group and then oldest first.
            covers: whether they are all that there are in a namespace; what else is known there is forgotten.
            progress: is told how far it is.
            images: disk images, too.

        Raises:
            IndexFileError, DamagedIndexError: the index cannot be written, or is not what it should be.
        """
        self._images = images
        known = await self._in_thread(self._records.snapshots)
        self._allowed = await self._in_thread(lambda: self._records.encrypted_allowed)
        there = {_key(info.snapshot) for info in infos}
        gone = [one.id for key, one in known.items() if key not in there and covers(key[0])]
        if gone:
            await self._in_thread(lambda: self._records.forget(gone))
            self.done.removed = len(gone)
        todo = [info for info in infos if self._is_needed(info, known.get(_key(info.snapshot)))]
        if todo:
            with progress.task("index", len(todo), unit="snapshots") as task:
                for info in todo:
                    async with open_cache(_CACHE) as cache:
                        await self._try(info, known.get(_key(info.snapshot)), cache, task)
                    task.advance(1)
        await self._in_thread(self._records.tidy)
        await self._in_thread(self._records.finish_indexes)
        return self.done

    async def _in_thread(self, work: Callable[[], T]) -> T:
        def translated() -> T:
            with index_errors(self._path):
                return work()

        return await in_io_thread(translated)

    async def _try(self, info: SnapshotInfo, known: Known | None, cache: ChunkCache, task: Task) -> None:
        """Index one snapshot, or remember why that cannot be."""
        try:
            await self._snapshot(info, known, cache, task)
        except IndexFileError:
            raise
        except FleeceError as error:
            self.done.left_out[info.snapshot] = str(error)

    def _is_needed(self, info: SnapshotInfo, known: Known | None) -> bool:
        """Whether a snapshot must be opened."""
        if known is None or known.mark != mark_of(info):
            return True
        if self._images and any(part.why == NOT_ASKED for part in known.parts):
            return True
        key = self._codec.key
        if key is None:
            return False
        fits = info.fingerprint == format_fingerprint(key.fingerprint)
        if known.encrypted and not fits:
            return False  # with this key nothing can be learnt about it
        if known.checked != key.fingerprint:
            return True
        return self._allowed and any(part.why == SEALED for part in known.parts if self._images or not part.image)

    async def _snapshot(self, info: SnapshotInfo, known: Known | None, cache: ChunkCache, task: Task) -> None:
        quiet = Progress()
        async with open_snapshot(self._repository, info.snapshot, self._codec, cache, quiet) as opened:
            notes = list(quiet.warnings)
            if notes:
                self.done.notes[info.snapshot] = notes
            parts = [await self._part(opened, name, task) for name in opened.file_archives]
            if quiet.warnings != notes:
                raise _NotCleanError(info.snapshot, quiet.warnings[-1])
            before = {} if known is None or known.mark != mark_of(info) else {one.archive: one for one in known.parts}
            parts += [await self._image(opened, file, before, task) for file in disk_files(opened.manifest)]
        checked = b"" if notes or self._codec.key is None else self._codec.key.fingerprint
        mark = mark_of(info)
        if known is None or (known.mark, known.checked, known.parts) != (mark, checked, tuple(parts)):
            await self._in_thread(lambda: self._records.record(info.snapshot, mark, checked, parts))
        self.done.indexed += 1

    async def _part(self, opened: OpenSnapshot, name: str, task: Task) -> Part:
        manifest = opened.manifest
        filename, payload = archive_stream_names(manifest, name)
        entry = manifest.file(filename)
        encrypted = is_encrypted(entry.crypt_mode)
        if encrypted and (not self._allowed or opened.codec.key is None):
            return Part(name, None, encrypted, SEALED)
        source = source_of("archive", entry.csum)
        if uses_catalog((file.filename for file in manifest.files), payload):
            source = source_of("catalog", manifest.file(CATALOG_NAME).csum, entry.csum, filename)
        stream, root = await self._in_thread(lambda: self._records.stream(opened.snapshot.group, name))
        state = await self._in_thread(lambda: self._records.state(stream, source))
        if state is None:
            state = await self._index(opened, name, (stream, root), source, task)
        return Part(name, state, encrypted, UNUSUAL if state is None else "")

    async def _image(self, opened: OpenSnapshot, file: str, before: Mapping[str, Part], task: Task) -> Part:
        """A disk image; what was known of it `before` stays if nobody asks for images."""
        name, entry = strip_archive_type(file), opened.manifest.file(file)
        encrypted = is_encrypted(entry.crypt_mode)
        if encrypted and (not self._allowed or opened.codec.key is None):
            return Part(name, None, encrypted, SEALED)
        if not self._images:
            known = before.get(name)
            return known if known is not None and known.why != SEALED else Part(name, None, encrypted, NOT_ASKED)
        from agent.image_trees import index_entries, open_image_of

        # What is on a disk may lie on others as well, as a volume group does: then all of them tell what it is.
        disks = [(one, opened.manifest.file(one).csum) for one in disk_files(opened.manifest)]
        alone = source_of("image", entry.csum)
        together = source_of("images", file, *(part for disk in disks for part in disk))
        stream, root = await self._in_thread(lambda: self._records.stream(opened.snapshot.group, name))
        for source in (alone, together):
            state = await self._in_thread(lambda source=source: self._records.state(stream, source))  # type: ignore[misc]
            if state is not None:
                return Part(name, state, encrypted)
        quiet = Progress()
        try:
            async with open_image_of(replace(opened, progress=quiet), name, names_only=True) as accessor:
                await accessor.asked.volumes()
                source = together if accessor.asked.others else alone
                entries = index_entries(accessor, opened.snapshot, name)
                state = await self._write(f"{opened.snapshot} {name}", (stream, root), source, entries, task)
        except (FormatError, KeyNeededError):
            return Part(name, None, encrypted, NOT_CLEAN)
        if quiet.warnings:
            return Part(name, None, encrypted, NOT_CLEAN)
        return Part(name, state, encrypted, UNUSUAL if state is None else "")

    async def _index(
        self, opened: OpenSnapshot, name: str, place: tuple[int, int], source: bytes, task: Task
    ) -> int | None:
        """Read an archive into a new state; None if its order is one that the index cannot give back."""
        warnings = len(opened.progress.warnings)
        entries = await walk_archive(opened, name)
        if len(opened.progress.warnings) != warnings:
            raise _NotCleanError(opened.snapshot, opened.progress.warnings[-1])
        snapshot = opened.snapshot
        everything = (found(snapshot, name, path, item) for path, item, _ in entries)
        return await self._write(f"{snapshot} {name}", place, source, everything, task)

    async def _write(
        self, what: str, place: tuple[int, int], source: bytes, entries: Iterator[Found], task: Task
    ) -> int | None:
        """Write `entries` as a new state; None if their order is unusual."""
        records = self._records

        def work() -> int | None:
            with index_errors(self._path):
                state = records.begin_state(place[0], source)
                writer = StateWriter(records.connection, *place, state)
                try:
                    for one in entries:
                        writer.add(one)
                        if writer.entries % _TELL == 0:
                            task.update(note=f"{what}: {writer.entries} entries")
                    writer.finish()
                    records.finish_state(state, writer.entries)
                except UnusualOrderError:
                    self._give_up()
                    return None
                except BaseException:
                    self._give_up()
                    raise
                self.done.archives += 1
                self.done.entries += writer.entries
                return state

        return await in_walk(work)

    def _give_up(self) -> None:
        if self._records.connection.in_transaction:
            self._records.connection.execute("ROLLBACK")


def _key(snapshot: Snapshot) -> tuple[str, str, str]:
    return str(snapshot.group.ns), str(snapshot.group), snapshot.time


def covered(namespaces: Sequence[str], *, recursive: bool) -> Callable[[str], bool]:
    """Whether a listing of `namespaces`, the first with all below it if `recursive`, tells everything of one."""
    listed = set(namespaces)
    top = namespaces[0] if namespaces else ""

    def covers(ns: str) -> bool:
        return ns in listed or (recursive and (not top or ns.startswith(f"{top}/")))

    return covers


def usable_parts(
    info: SnapshotInfo,
    known: Known | None,
    key: bytes | None,
    notes: Mapping[Snapshot, object],
    *,
    images: bool = False,
) -> bool:
    """Whether the index answers for a snapshot as its archives would: it is as it was, and its key is the same.

    Args:
        info: as it is listed now.
        known: as the index has it.
        key: fingerprint of the key at hand.
        notes: snapshots that were opened with this key just now.
        images: whether it does for disk images; else for file archives.
    """
    if known is None or known.mark != mark_of(info):
        return False
    parts = [part for part in known.parts if part.image is images]
    if any(part.state is None for part in parts):
        return False
    if any(part.encrypted for part in parts):
        return key is not None and known.checked == key
    return key is None or known.checked == key or info.snapshot in notes
