"""Entries that match, in the states that are asked for.

Where a pattern says something about the last name of a path, names are searched in SQL and only what is found is
looked at: its path is put together and matched. Otherwise (`**`, or far too much found) the tree is gone through, as
that of an archive would be, in the part of it that the pattern can mean.
"""

import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from agent.archive_listing import MAX_DEPTH, Found
from agent.find_index.conditions import condition_of, directories_above
from agent.find_index.errors import DamagedIndexError, index_errors
from agent.find_index.recording import Place
from agent.find_index.schema import LETTERS, OPEN, VOLUME
from datastore.names import Snapshot
from pxar.patterns import MatchPattern

#: Rows that a search may find, and bytes of their paths; beyond that the tree is gone through.
MAX_HITS: Final = 100_000
_MAX_BYTES: Final = 32 << 20
_PAGE: Final = 1000
_DIRECTORY: Final = LETTERS.index("d")

_COLUMNS: Final = "e.dir, e.name, e.first, e.last, e.kind, e.size, e.mtime, e.child"
_OF_NAME: Final = (
    f"SELECT {_COLUMNS} FROM entry c INDEXED BY entry_name"
    " CROSS JOIN entry e ON e.dir=c.dir AND e.name=c.name AND e.first=c.first WHERE {} LIMIT ?"
)
_OF_DIRECTORY: Final = (
    f"SELECT {_COLUMNS} FROM entry e WHERE e.dir=? AND e.name>CAST(? AS TEXT) AND e.first<=? AND e.last>=?"
    f" ORDER BY e.name LIMIT {_PAGE}"
)

_VOLUMES: Final = (
    f"SELECT child FROM entry WHERE kind={_DIRECTORY} AND size={VOLUME} AND child IS NOT NULL"
    f" AND (dir=? OR dir IN (SELECT child FROM entry WHERE dir=? AND kind={_DIRECTORY} AND size={VOLUME}))"
)

_Row = tuple[int, bytes, int, int, int, int | None, int | None, int | None]


class _Hit(NamedTuple):
    """An entry and the run of states that have it; sorted as an archive's directories are."""

    key: bytes
    path: bytes
    first: int
    last: int
    letter: str
    size: int | None
    mtime_s: int | None
    child: int | None
    volume: int


class _Folder(NamedTuple):
    """A directory."""

    stream: int
    prefix: bytes  #: its path and a slash
    volume: int  #: bytes of the path of the volume that it lies in; 0 without one


class _Start(NamedTuple):
    """A directory below which the tree is gone through."""

    id: int
    folder: _Folder
    first: int
    last: int


class Search:
    """A pattern in some states of the index; made by `search`, used by one thread at a time."""

    def __init__(
        self, connection: sqlite3.Connection, path: Path, pattern: MatchPattern, letters: frozenset[str],
        streams: Mapping[int, Place],
    ) -> None:  # fmt: skip
        """Look for `pattern`, kinds `letters`, in the states of `streams`, each in its place.

        Raises:
            IndexFileError: the index `path` cannot be read, or is damaged.
        """
        self._connection, self._path, self._pattern, self._letters = connection, path, pattern, letters
        self._streams: Final = streams
        self._states: dict[int, list[int]] = {}
        for state, place in sorted(streams.items()):
            self._states.setdefault(place.stream, []).append(state)
        self._folders: dict[int, _Folder] = {}
        with index_errors(path):
            self._volumes = self._find_volumes()
            self._hits = self._find(pattern, letters)
            self._starts: dict[int, list[_Start]] | None = None
            above = directories_above(pattern) if self._hits is None else None
            if above is not None:
                self._starts = self._starts_below(above)
        self._folders.clear()

    @property
    def goes_through(self) -> bool:
        """Whether `found` reads the index, instead of giving what was found already."""
        return self._hits is None

    def found(self, snapshot: Snapshot, archive: str, state: int, add: Callable[[Found], None]) -> None:
        """Pass what matches in `state`, which is that of `archive` in `snapshot`, to `add`, in the archive's order.

        Raises:
            IndexFileError: the index cannot be read, or is damaged.
        """
        stream, root, _ = self._streams[state]
        if self._hits is not None:
            for one in self._hits.get(stream, ()):
                if one.first <= state <= one.last:
                    add(Found(snapshot, archive, one.path, one.letter, one.size, one.mtime_s))
            return
        if self._starts is None:
            starts = [_Start(root, _Folder(stream, b"/", 0), 0, OPEN)]
        else:
            starts = [one for one in self._starts.get(stream, ()) if one.first <= state <= one.last]
        done = None
        for start in starts:
            if done is not None and start.folder.prefix.startswith(done):
                continue  # it has been gone through
            done = start.folder.prefix
            for row, path, volume in self._below(start, state):
                if (letter := LETTERS[row[4]]) in self._letters and _matches(self._pattern, path, volume, letter):
                    add(Found(snapshot, archive, path, letter, _size(row), row[6]))

    def _find(self, pattern: MatchPattern, letters: frozenset[str]) -> dict[int, list[_Hit]] | None:
        """What matches, by stream; None if the last name says nothing, or too much is found."""
        last = pattern.last_name
        condition = None if last is None else condition_of(last)
        if condition is None:
            return None
        cursor = self._connection.execute(_OF_NAME.format(condition.sql), (*condition.values, MAX_HITS + 1))
        hits: dict[int, list[_Hit]] = {}
        count = length = 0
        for row in cursor:
            count += 1
            self._check(row)
            folder = self._folder(row[0])
            length += len(folder.prefix)
            if count > MAX_HITS or length > _MAX_BYTES:
                cursor.close()
                return None
            if (letter := LETTERS[row[4]]) not in letters or not self._is_asked_for(folder.stream, row[2], row[3]):
                continue
            path = folder.prefix + row[1]
            volume = len(path) if row[7] in self._volumes else folder.volume
            if _matches(pattern, path, volume, letter):
                hit = _Hit(path.replace(b"/", b"\0"), path, row[2], row[3], letter, _size(row), row[6], row[7], volume)
                hits.setdefault(folder.stream, []).append(hit)
        for of_stream in hits.values():
            of_stream.sort(key=lambda hit: hit[:3])
        return hits

    def _starts_below(self, above: MatchPattern) -> dict[int, list[_Start]] | None:
        hits = self._find(above, frozenset("d"))
        if hits is None:
            return None
        return {
            stream: [
                _Start(hit.child, _Folder(stream, hit.path + b"/", hit.volume), hit.first, hit.last)
                for hit in found
                if hit.child is not None
            ]
            for stream, found in hits.items()
        }

    def _is_asked_for(self, stream: int, first: int, last: int) -> bool:
        states = self._states.get(stream, ())
        at = bisect_left(states, first)
        return at < len(states) and states[at] <= last

    def _find_volumes(self) -> set[int]:
        """The directories that are volumes of disks, or volume groups: at the top, and one below."""
        found: set[int] = set()
        for stream, root in {(place.stream, place.root) for place in self._streams.values() if place.image}:
            rows = self._connection.execute(_VOLUMES, (root, root)).fetchall()
            found |= {child for (child,) in rows}
            self._folders[root] = _Folder(stream, b"/", 0)
        return found

    def _folder(self, number: int) -> _Folder:
        """A directory by its number."""
        names: list[tuple[int, bytes]] = []
        at = number
        while (known := self._folders.get(at)) is None:
            rows = self._connection.execute("SELECT stream, parent, name FROM dir WHERE id=?", (at,)).fetchall()
            stream, parent, name = rows[0] if len(rows) == 1 and len(names) <= MAX_DEPTH else (None, None, None)
            if not isinstance(stream, int) or not isinstance(parent, int | None) or not isinstance(name, bytes):
                raise DamagedIndexError(self._path, f"the directory {number} leads nowhere")
            if parent is None:
                known = self._folders[at] = _Folder(stream, b"/", 0)
                break
            names.append((at, name))
            at = parent
        for one, name in reversed(names):
            known = self._folders[one] = self._inner(known, one, name)
        return known

    def _inner(self, outer: _Folder, number: int, name: bytes) -> _Folder:
        """The directory `name` in another."""
        prefix = outer.prefix + name + b"/"
        return _Folder(outer.stream, prefix, len(prefix) - 1 if number in self._volumes else outer.volume)

    def _below(self, start: _Start, state: int) -> Iterator[tuple[_Row, bytes, int]]:
        """Everything below a directory, in the archive's order: entry, path, and `_Folder.volume`."""
        stack = [(start.folder, self._entries(start.id, state))]
        while stack:
            folder, entries = stack[-1]
            for row in entries:
                if row[4] != _DIRECTORY or row[7] is None:
                    yield row, folder.prefix + row[1], folder.volume
                    continue
                inner = self._inner(folder, row[7], row[1])
                yield row, inner.prefix[:-1], inner.volume
                if len(stack) > MAX_DEPTH:
                    raise DamagedIndexError(self._path, "it is deeper than any tree")
                stack.append((inner, self._entries(row[7], state)))
                break
            else:
                stack.pop()

    def _entries(self, directory: int, state: int) -> Iterator[_Row]:
        """What a directory has in `state`, by name."""
        name, rows = b"", None
        while rows is None or len(rows) == _PAGE:
            with index_errors(self._path):
                rows = self._connection.execute(_OF_DIRECTORY, (directory, name, state, state)).fetchall()
            for row in rows:
                self._check(row)
                name = row[1]
                yield row

    def _check(self, row: _Row) -> None:
        """Raise `DamagedIndexError` for what no version of this program writes."""
        _, name, first, last, kind, size, mtime, child = row
        if not (
            isinstance(name, bytes) and name and b"/" not in name
            and isinstance(first, int) and isinstance(last, int) and 0 < first <= last
            and isinstance(kind, int) and 0 <= kind < len(LETTERS)
            and isinstance(size, int | None) and isinstance(mtime, int | None) and isinstance(child, int | None)
        ):  # fmt: skip
            raise DamagedIndexError(self._path, "an entry of it has other values")


def _matches(pattern: MatchPattern, path: bytes, volume: int, letter: str) -> bool:
    """Whether `pattern` matches a path, or what is left of it behind its volume."""
    if pattern.matches(path, letter == "d"):
        return True
    within = path[volume:]
    return bool(volume and within) and pattern.matches(within, letter == "d")


def _size(row: _Row) -> int | None:
    stored = row[5]
    if stored is None or row[4] == _DIRECTORY:
        return None
    return stored if stored >= 0 else stored + (1 << 64)
