"""What `fleece find` does: looking for names in many snapshots, in the index or in the archives themselves."""

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from agent.archive_listing import Found, find_in
from agent.documents import in_namespace
from agent.find_index.answering import Answers, answers
from agent.snapshot_archives import OpenSnapshot, Selected, Selection, open_snapshot
from core.errors import FleeceError, FormatError, TargetError
from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.errors import KeyNeededError
from datastore.names import Snapshot, strip_archive_type
from pxar.patterns import MatchPattern
from repository.archive import ChunkCache
from repository.interface import Repository


class Bounds(NamedTuple):
    """How new and how large something must be; what has no time or no size is not within such a bound."""

    after_s: int | None = None  #: changed then or later, Unix seconds
    before_s: int | None = None  #: changed before
    least: int | None = None  #: bytes
    most: int | None = None

    def hold(self, one: Found) -> bool:
        """Whether `one` is within all of them."""
        time, size = one.mtime_s, one.size
        return (
            (self.after_s is None or (time is not None and time >= self.after_s))
            and (self.before_s is None or (time is not None and time < self.before_s))
            and (self.least is None or (size is not None and size >= self.least))
            and (self.most is None or (size is not None and size <= self.most))
        )


NO_BOUNDS: Final = Bounds()


class Query(NamedTuple):
    """What is looked for."""

    pattern: MatchPattern
    letters: frozenset[str]  #: kinds, as in catalogs
    archive: str | None  #: only in archives that a person calls so
    images: bool = False  #: also in the file systems of disk images
    bounds: Bounds = NO_BOUNDS

    @property
    def archive_name(self) -> str | None:
        """The archive's name, `root.pxar`, where a snapshot without it is nothing wrong."""
        if self.archive is None:
            return None
        return f"{strip_archive_type(self.archive).removesuffix('.pxar')}.pxar"


async def find_in_selection(
    repository: Repository, selection: Selection, query: Query, codec: ChunkCodec, cache: ChunkCache,
    progress: Progress, add: Callable[[Found], None], *, index: bool, recursive: bool,
) -> None:  # fmt: skip
    """Pass what `query` finds in the snapshots of `selection` to `add`, snapshot by snapshot.

    A snapshot that cannot be read is left out with a warning, unless it was named.

    Args:
        repository: where they lie.
        selection: which snapshots.
        query: what is looked for.
        codec: with the key at hand.
        cache: for what is read.
        progress: gets the warnings.
        add: called by one thread at a time, never by the event loop's.
        index: use the index; if the selection is whole namespaces, bring it up to date before.
        recursive: the selection's first namespace stands for those below it, too.

    Raises:
        FleeceError: a snapshot that was named cannot be read.
        TargetError: what is found cannot be written.
    """
    if query.bounds != NO_BOUNDS:
        add = _within(query.bounds, add)
    if not index:
        await _find(repository, selection, Answers(), query, codec, cache, progress, add)
        return
    infos = {snapshot: one.info for snapshot, one in selection.snapshots.items()}
    async with answers(
        repository, infos, query.pattern, query.letters, codec, progress,
        namespaces=selection.namespaces or None, recursive=recursive, images=query.images,
    ) as known:  # fmt: skip
        await _find(repository, selection, known, query, codec, cache, progress, add)


def _within(bounds: Bounds, add: Callable[[Found], None]) -> Callable[[Found], None]:
    def add_some(one: Found) -> None:
        if bounds.hold(one):
            add(one)

    return add_some


async def _find(
    repository: Repository, selection: Selection, known: Answers, query: Query, codec: ChunkCodec, cache: ChunkCache,
    progress: Progress, add: Callable[[Found], None],
) -> None:  # fmt: skip
    met: set[str] = set()  # archives that were looked into
    for snapshot, one in selection.snapshots.items():
        try:
            if await _answered(known, snapshot, one, query, progress, add, met):
                continue
            async with open_snapshot(repository, snapshot, codec, cache, progress) as opened:
                if query.images and await _find_in_named_image(opened, query, add):
                    met.add(query.archive_name or "")
                    continue
                if (states := _states(known.parts, snapshot, one, query)) is not None:
                    await _from_index(known, snapshot, states, query.archive_name, add, met)
                else:
                    await _find_in_archives(opened, one, query, add, met)
                if query.images and query.archive is None:
                    if (states := _states(known.images, snapshot, one, query)) is not None:
                        await _from_index(known, snapshot, states, None, add, met)
                    else:
                        await _find_in_images(opened, query, add)
        except FleeceError as error:
            if one.named or isinstance(error, TargetError):
                raise
            progress.warn(f"{in_namespace(snapshot)} was left out: {error}")
    if query.archive_name is not None and not met and selection.snapshots:
        hint = "" if query.images or ".img" not in str(query.archive) else "; disk images are looked into with --images"
        progress.warn(f"none of the snapshots has an archive {query.archive} that could be looked into{hint}")


async def _find_in_archives(
    opened: OpenSnapshot, one: Selected, query: Query, add: Callable[[Found], None], met: set[str]
) -> None:
    only = query.archive_name
    if query.archive is not None and one.named:
        only = opened.file_archive(query.archive)
    for name in opened.file_archives:
        if only in (None, name):
            met.add(name)
            await find_in(opened, name, query.pattern, query.letters, add)


async def _find_in_named_image(opened: OpenSnapshot, query: Query, add: Callable[[Found], None]) -> bool:
    """Look into the disk image that was named, and into nothing else; False if none was."""
    from agent.image_trees import find_in_image, image_part

    part = None if query.archive is None else image_part(opened.manifest, query.archive)
    if part is not None:
        await find_in_image(opened, part.name, query.pattern, query.letters, add)
    return part is not None


async def _find_in_images(opened: OpenSnapshot, query: Query, add: Callable[[Found], None]) -> None:
    """Look into all disk images; one that cannot be read is left out with a warning."""
    from agent.image_trees import find_in_image, image_names

    for name in image_names(opened):
        try:
            await find_in_image(opened, name, query.pattern, query.letters, add)
        except (FormatError, KeyNeededError) as error:
            opened.progress.warn(f"{opened.where(name)} was left out: {error}")


async def _answered(
    known: Answers, snapshot: Snapshot, one: Selected, query: Query, progress: Progress, add: Callable[[Found], None],
    met: set[str],
) -> bool:  # fmt: skip
    """Whether the index had the whole answer, which `add` got then."""
    states = _states(known.parts, snapshot, one, query)
    disks = _states(known.images, snapshot, one, query) if query.images else []
    if states is None or disks is None or (query.images and query.archive is not None):
        return False
    for warning in known.notes.get(snapshot, ()):
        progress.warn(warning)
    await _from_index(known, snapshot, states, query.archive_name, add, met)
    await _from_index(known, snapshot, disks, None, add, met)
    return True


def _states(
    of: Mapping[Snapshot, list[tuple[str, int]]], snapshot: Snapshot, one: Selected, query: Query
) -> list[tuple[str, int]] | None:
    """The states that the index answers with; None if the archives must be read."""
    if one.named and query.archive is not None:
        return None  # it may be missing, which is an error then, or be called by another of its names
    return of.get(snapshot)


async def _from_index(
    known: Answers, snapshot: Snapshot, states: list[tuple[str, int]], only: str | None, add: Callable[[Found], None],
    met: set[str],
) -> None:  # fmt: skip
    for name, state in states:
        if only in (None, name):
            met.add(name)
            await known.found(snapshot, name, state, add)
