"""What `fleece find` does with the index: which snapshots it answers for, and keeping it up."""

import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.archive_listing import Found
from agent.find_index.errors import DamagedIndexError, IndexFileError, NoIndexError, index_errors
from agent.find_index.files import LOCK_WAIT_S, IndexFile, repository_key
from agent.find_index.recording import Known, Records
from agent.find_index.searching import Search
from agent.find_index.updating import Updated, Updater, covered, usable_parts
from agent.snapshot_archives import in_walk
from core.errors import BusyError, FleeceError
from core.limits import in_io_thread
from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.names import Namespace, Snapshot
from pxar.patterns import MatchPattern
from repository.interface import Repository, SnapshotInfo


@dataclass
class Answers:
    """The snapshots that the index answers for; empty without one."""

    parts: dict[Snapshot, list[tuple[str, int]]] = field(default_factory=dict)  #: file archives in order, and states
    images: dict[Snapshot, list[tuple[str, int]]] = field(default_factory=dict)  #: the same for disk images
    notes: Mapping[Snapshot, Sequence[str]] = field(default_factory=dict)  #: warnings that belong to some of them
    _file: IndexFile | None = None
    _search: Search | None = None

    async def found(self, snapshot: Snapshot, archive: str, state: int, add: Callable[[Found], None]) -> None:
        """Pass what matches in an archive of `parts` to `add`, in the archive's order.

        Raises:
            IndexFileError: the index is damaged, which shows only now.
        """
        file, search = self._file, self._search
        assert file is not None
        assert search is not None
        try:
            await in_walk(lambda: search.found(snapshot, archive, state, add))
        except DamagedIndexError:
            await _removed(file)  # the next one makes it anew
            raise


async def update_index(
    file: IndexFile, repository: Repository, infos: Sequence[SnapshotInfo], namespaces: Sequence[Namespace],
    codec: ChunkCodec, progress: Progress, *, recursive: bool, wait_s: float = LOCK_WAIT_S,
    rebuild: bool = False, encrypted: bool | None = None, images: bool = False,
) -> Updated | None:  # fmt: skip
    """Make the index `file` agree with `repository`; None if somebody else is doing that.

    A damaged one, or one of another version, is made anew.

    Args:
        infos: all snapshots of `namespaces`.
        namespaces: which; with `recursive` the first and all below it.
        codec: with the key at hand.
        wait_s: how long to wait for somebody else.
        rebuild: throw away what is there.
        images: disk images, too.
        encrypted: from now on names of encrypted archives may be written into it, or may not; None: as before.

    Raises:
        IndexFileError: it cannot be written.
    """
    names = [str(ns) for ns in namespaces]
    async with file.locked(wait_s) as held:
        if not held:
            return None
        allowed = encrypted if encrypted is not None or not rebuild else await in_io_thread(_allows_encrypted, file)
        if rebuild:
            await in_io_thread(file.remove)
        for again in (True, False):
            try:
                with closing(await in_io_thread(file.open_anew)) as connection:
                    if allowed is not None:
                        await in_io_thread(_allow_encrypted, file, connection, allowed)
                    updater = Updater(file, connection, repository, codec)
                    return await updater.update(infos, covered(names, recursive=recursive), progress, images=images)
            except DamagedIndexError as error:
                if not again:
                    raise
                progress.log(f"{error}; it is made anew")
                await in_io_thread(file.remove)
    raise AssertionError  # the second round returns or raises


def _allows_encrypted(file: IndexFile) -> bool:
    """Whether the index that is there, if it is one, may have names of encrypted archives."""
    try:
        with index_errors(file.path), closing(file.open()) as connection:
            return Records(connection).encrypted_allowed
    except IndexFileError:
        return False


def _allow_encrypted(file: IndexFile, connection: sqlite3.Connection, allowed: bool) -> None:
    with index_errors(file.path):
        Records(connection).allow_encrypted(allowed)


async def index_status(repository: Repository, infos: Sequence[SnapshotInfo], codec: ChunkCodec) -> dict[str, Any]:
    """What `fleece index status` tells; `infos` are the snapshots there are, `codec` has the key at hand."""
    file = IndexFile(await repository_key(repository))
    key = None if codec.key is None else codec.key.fingerprint

    def read() -> dict[str, Any]:
        with index_errors(file.path), closing(file.open()) as connection:
            records = Records(connection)
            connection.execute("BEGIN")
            known, counts = records.snapshots(), records.counts()
            missing = [info for info in infos if not usable_parts(info, known.get(_key(info.snapshot)), key, {})]
            return {
                "state": "ok" if records.searchable else "unfinished",
                "size": file.size,
                "snapshots": counts["snapshot"],
                "archives": counts["stream"],
                "states": counts["state"],
                "directories": counts["dir"],
                "entries": counts["entry"],
                "encrypted": records.encrypted_allowed,
                "not-indexed": len(missing),
            }

    document: dict[str, Any] = {"path": str(file.path)}
    try:
        return document | await in_io_thread(read)
    except NoIndexError:
        return document | {"state": "none", "not-indexed": len(infos)}
    except IndexFileError as error:
        return document | {"state": f"unusable: {error.why}", "not-indexed": len(infos)}


async def remove_index(folder: Path, one: IndexFile | None = None) -> list[Path]:
    """Delete the index `one`, or every index in `folder`; returns the files that were there.

    Raises:
        BusyError: another process updates it.
        IndexFileError: it cannot be deleted.
    """
    if one is not None:
        files = [one]
    else:
        found = await in_io_thread(lambda: sorted(folder.glob("*.sqlite")))
        files = [IndexFile("", folder, stem=path.stem) for path in found]
    removed = []
    for file in files:
        if not file.exists():
            continue
        async with file.locked() as held:
            if not held:
                raise BusyError("remove the index", str(file.path), "another process updates it")
            await in_io_thread(file.remove)
        removed.append(file.path)
    return removed


@asynccontextmanager
async def answers(
    repository: Repository, infos: Mapping[Snapshot, SnapshotInfo | None], pattern: MatchPattern,
    letters: frozenset[str], codec: ChunkCodec, progress: Progress, *,
    namespaces: Sequence[Namespace] | None, recursive: bool, images: bool = False,
) -> AsyncIterator[Answers]:  # fmt: skip
    """What the index knows of `pattern`, while the block runs. Where it cannot be used there are no answers.

    Args:
        repository: where the snapshots lie.
        infos: the snapshots that are asked for, as they are listed now; None where that is not known yet.
        pattern: what is looked for.
        letters: of which kinds.
        codec: with the key at hand.
        progress: is warned if there should be an index and cannot be.
        namespaces: `infos` are all their snapshots, with `recursive` also of those below the first, and the index shall
            be brought up to date; None: it is used as it is, if there is one.
        images: disk images are asked for, too.
    """
    async with AsyncExitStack() as stack:
        yield await _answers(
            stack, repository, infos, pattern, letters, codec, progress, namespaces,
            recursive=recursive, images=images,
        )  # fmt: skip


async def _answers(
    stack: AsyncExitStack, repository: Repository, infos: Mapping[Snapshot, SnapshotInfo | None],
    pattern: MatchPattern, letters: frozenset[str], codec: ChunkCodec, progress: Progress,
    namespaces: Sequence[Namespace] | None, *, recursive: bool, images: bool,
) -> Answers:  # fmt: skip
    file = IndexFile(await repository_key(repository))
    notes: Mapping[Snapshot, Sequence[str]] = {}
    for again in (True, False):
        try:
            if namespaces is not None:
                listed = [info for info in infos.values() if info is not None]
                done = await update_index(
                    file, repository, listed, namespaces, codec, progress, recursive=recursive, images=images
                )
                notes = {} if done is None else done.notes
                if done is None:
                    progress.log("another process updates the index; what it does not have yet is read directly")
            elif not file.exists():
                return Answers()
            connection = stack.enter_context(closing(await in_io_thread(file.open)))
            return await _search(file, connection, repository, infos, pattern, letters, codec, notes, images=images)
        except DamagedIndexError as error:
            if again and namespaces is not None and await _removed(file):
                continue
            progress.log(f"{error}; the archives are read themselves")
        except NoIndexError:
            pass  # somebody else has just begun it, or thrown it away
        except IndexFileError as error:
            if namespaces is not None:
                progress.warn(f"{error}; the archives are read themselves")
        return Answers()
    return Answers()


async def _removed(file: IndexFile) -> bool:
    """Throw a damaged index away, so that it is made anew; False if somebody else is at work with it."""
    async with file.locked(0) as held:
        if held:
            await in_io_thread(file.remove)
        return held


async def _search(
    file: IndexFile, connection: sqlite3.Connection, repository: Repository,
    infos: Mapping[Snapshot, SnapshotInfo | None], pattern: MatchPattern, letters: frozenset[str], codec: ChunkCodec,
    notes: Mapping[Snapshot, Sequence[str]], *, images: bool,
) -> Answers:  # fmt: skip
    records = Records(connection)

    def read() -> dict[tuple[str, str, str], Known]:
        with index_errors(file.path):
            # All that follows sees one state of the file, whoever writes to it.
            connection.execute("BEGIN")
            return records.snapshots() if records.searchable else {}

    known = await in_io_thread(read)
    key = None if codec.key is None else codec.key.fingerprint
    parts: dict[Snapshot, list[tuple[str, int]]] = {}
    disks: dict[Snapshot, list[tuple[str, int]]] = {}
    for snapshot, listed in infos.items():
        one = known.get(_key(snapshot))
        if one is None:
            continue
        try:
            info = await repository.snapshot(snapshot) if listed is None else listed
        except FleeceError:
            continue  # who opens it will say what is wrong with it
        for asked, states, of_images in ((True, parts, False), (images, disks, True)):
            if asked and usable_parts(info, one, key, notes, images=of_images):
                states[snapshot] = [
                    (part.archive, part.state)
                    for part in one.parts
                    if part.image is of_images and part.state is not None
                ]

    def look() -> Search:
        with index_errors(file.path):
            found = [*parts.values(), *disks.values()]
            wanted = sorted({state for states in found for _, state in states})
            places = records.places(wanted)
            if len(places) != len(wanted):
                raise DamagedIndexError(file.path, "a state is missing")
        return Search(connection, file.path, pattern, letters, places)

    search = await in_io_thread(look)
    return Answers(parts, disks, notes, file, search)


def _key(snapshot: Snapshot) -> tuple[str, str, str]:
    return str(snapshot.group.ns), str(snapshot.group), snapshot.time
