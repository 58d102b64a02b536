"""The indexes of a datastore, as garbage collection finds and reads them: every one, wherever it lies.

Rules: docs/formats.md, "Garbage collection".
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from core.errors import FleeceError, NotFoundError
from datastore.dynamic_index import DynamicIndex
from datastore.errors import StoreError
from datastore.files import store_errors
from datastore.fixed_index import FixedIndex
from datastore.index import ArchiveIndex
from datastore.index_file import DIGEST_SIZE
from datastore.names import ArchiveKind, Group
from datastore.store import Datastore

if TYPE_CHECKING:
    from numpy import uint64
    from numpy.typing import NDArray

#: Names of archives whose last index is remembered, and digests in these (32 MB): see `read_indexes`.
_MAX_REMEMBERED: Final = 64
_MAX_REMEMBERED_DIGESTS: Final = 1 << 20
_INDEXES: Final = (ArchiveKind.FIXED.value, ArchiveKind.DYNAMIC.value)


@dataclass(slots=True)
class ReadIndexes:
    """What one call in a worker thread read."""

    paths: list[str] = field(default_factory=list)  #: indexes that were read
    digests: "list[NDArray[uint64]]" = field(default_factory=list)
    waiting: int = 0  #: digests in there
    repeated: int = 0  #: digests left out because the index read before has them in the same place
    data_bytes: int = 0
    vanished: bool = False


def list_indexes(base: Path) -> list[str]:
    """Every `.fidx` and `.didx` below `base`, relative to it, wherever it lies; names that start with a dot are not
    looked at and links not followed. What vanishes meanwhile is left out.

    Raises:
        StoreError: a folder cannot be read, or another datastore lies in it.
    """
    for parent in base.resolve().parents:
        if _is_store(str(parent)):
            raise _nested(base, parent)
    found: list[str] = []
    folders = [""]
    while folders:
        relative = folders.pop()
        path = f"{base}/{relative}".rstrip("/")
        if relative and _is_store(path):
            raise _nested(Path(path), base)
        with store_errors("look for indexes in", path):
            try:
                with os.scandir(path) as entries:
                    for entry in entries:
                        if entry.name.startswith("."):
                            continue
                        name = f"{relative}/{entry.name}".lstrip("/")
                        if entry.name.endswith(_INDEXES):
                            found.append(name)
                        elif entry.is_dir(follow_symlinks=False):
                            folders.append(name)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except PermissionError:
                if relative == "lost+found":
                    continue
                raise
    return sorted(found)


def _is_store(path: str) -> bool:
    return os.path.isdir(f"{path}/.chunks") and os.path.isfile(f"{path}/.lock")  # noqa: PTH112, PTH113 - hot


def _nested(inner: Path, outer: Path) -> StoreError:
    why = f"the datastore {inner} lies in the datastore {outer}"
    return StoreError("collect garbage in", str(outer), why, "nothing was removed; move one of them elsewhere")


def indexes_of(store: Datastore, group: Group) -> list[str]:
    """The indexes of a group's snapshots, finished or not, the newest first; relative to the store."""
    found: list[str] = []
    for snapshot in reversed(store.snapshots(group, unfinished=True)):
        with store_errors("list", str(snapshot)):
            try:
                with os.scandir(store.base / snapshot.path) as entries:
                    names = [entry.name for entry in entries if entry.name.endswith(_INDEXES)]
            except FileNotFoundError:
                # Whatever took its place is newer than the listing.
                names = [f"vanished{_INDEXES[0]}"]
        found += [f"{snapshot.path}/{name}" for name in sorted(names)]
    return found


def read_indexes(base: Path, left: list[str], previous: "dict[str, NDArray[uint64]]", room: int) -> ReadIndexes:
    """Read the indexes `left` (taken out of it) until more than `room` digests have come together.

    Args:
        base: the store's folder.
        left: paths relative to it, a group's newest first.
        previous: the digests of the last index by file name. Most of those of a snapshot are the same as in the one
            after it, at the same place, which tells at once that they are known.
        room: digests to be returned, at most one index more.
    """
    import numpy as np

    read = ReadIndexes()
    left.reverse()
    try:
        while left and read.waiting < room:
            path = left.pop()
            index = _open_index(base, path)
            if index is None:
                read.vanished = True
                continue
            digests = np.frombuffer(index.digests, np.uint64).reshape(index.count, DIGEST_SIZE // 8)
            name = path.rpartition("/")[2]
            fresh = _differing(digests, previous.get(name))
            _remember(previous, name, digests)
            read.paths.append(path)
            read.data_bytes += index.size
            read.digests.append(fresh)
            read.waiting += len(fresh)
            read.repeated += index.count - len(fresh)
    finally:
        left.reverse()
    return read


def _remember(previous: "dict[str, NDArray[uint64]]", name: str, digests: "NDArray[uint64]") -> None:
    """Keep `digests` as the last of their name; the longest unseen go, for names may be as many as snapshots."""
    previous.pop(name, None)
    previous[name] = digests
    while len(previous) > 1 and (
        len(previous) > _MAX_REMEMBERED or sum(map(len, previous.values())) > _MAX_REMEMBERED_DIGESTS
    ):
        del previous[next(iter(previous))]


def _differing(digests: "NDArray[uint64]", before: "NDArray[uint64] | None") -> "NDArray[uint64]":
    """Those of `digests` that `before` has not in the same place."""
    if before is None:
        return digests
    import numpy as np

    common = min(len(digests), len(before))
    different = np.ones(len(digests), np.bool_)
    different[:common] = (digests[:common] != before[:common]).any(axis=1)
    return digests[different]


def _open_index(base: Path, path: str) -> ArchiveIndex | None:
    """The index; None if it vanished.

    Raises:
        StoreError: unreadable, or no index.
    """
    where = base / path
    try:
        if path.endswith(ArchiveKind.FIXED.value):
            return FixedIndex.open(where, where=path)
        return DynamicIndex.open(where, where=path)
    except NotFoundError as error:
        try:
            if not stat.S_ISLNK(where.lstat().st_mode):
                return None  # it is there again
        except OSError:
            return None
        failure: FleeceError = error
    except FleeceError as error:
        failure = error
    raise StoreError(
        "collect garbage in", str(base), f"{path} cannot be read as an index: {failure.why}",
        "nothing was removed, for it may name chunks; repair it, or remove it or its snapshot",
    ) from failure  # fmt: skip
