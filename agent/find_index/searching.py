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
from agent.find_index.schema import LETTERS, OPEN
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


class _Start(NamedTuple):
    """A directory below which the tree is gone through."""

    id: int
    prefix: bytes
    first: int
    last: int


class Search:
    """A pattern in some states of the index; made by `search`, used by one thread at a time."""

    def __init__(
        self, connection: sqlite3.Connection, path: Path, pattern: MatchPattern, letters: frozenset[str],
        streams: Mapping[int, tuple[int, int]],
    ) -> None:  # fmt: skip
        """Look for `pattern`, kinds `letters`, in the states of `streams`; for each its stream and root directory.

        Raises:
            IndexFileError: the index `path` cannot be read, or is damaged.
        """
        self._connection, self._path, self._pattern, self._letters = connection, path, pattern, letters
        self._streams: Final = streams
        self._states: dict[int, list[int]] = {}
        for state, (stream, _) in sorted(streams.items()):
            self._states.setdefault(stream, []).append(state)
        self._folders: dict[int, tuple[int, bytes]] = {}
        with index_errors(path):
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
        stream, root = self._streams[state]
        if self._hits is not None:
            for one in self._hits.get(stream, ()):
                if one.first <= state <= one.last:
                    add(Found(snapshot, archive, one.path, one.letter, one.size, one.mtime_s))
            return
        if self._starts is None:
            starts = [_Start(root, b"/", 0, OPEN)]
        else:
            starts = [one for one in self._starts.get(stream, ()) if one.first <= state <= one.last]
        matches, done = self._pattern.matches, None
        for start in starts:
            if done is not None and start.prefix.startswith(done):
                continue  # it has been gone through
            done = start.prefix
            for row, path in self._below(start, state):
                if matches(path, row[4] == _DIRECTORY) and (letter := LETTERS[row[4]]) in self._letters:
                    add(Found(snapshot, archive, path, letter, _size(row[5]), row[6]))

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
            stream, prefix = self._folder(row[0])
            length += len(prefix)
            if count > MAX_HITS or length > _MAX_BYTES:
                cursor.close()
                return None
            if (letter := LETTERS[row[4]]) not in letters or not self._is_asked_for(stream, row[2], row[3]):
                continue
            path = prefix + row[1]
            if pattern.matches(path, row[4] == _DIRECTORY):
                hit = _Hit(path.replace(b"/", b"\0"), path, row[2], row[3], letter, _size(row[5]), row[6], row[7])
                hits.setdefault(stream, []).append(hit)
        for of_stream in hits.values():
            of_stream.sort(key=lambda hit: hit[:3])
        return hits

    def _starts_below(self, above: MatchPattern) -> dict[int, list[_Start]] | None:
        hits = self._find(above, frozenset("d"))
        if hits is None:
            return None
        return {
            stream: [_Start(hit.child, hit.path + b"/", hit.first, hit.last) for hit in found if hit.child is not None]
            for stream, found in hits.items()
        }

    def _is_asked_for(self, stream: int, first: int, last: int) -> bool:
        states = self._states.get(stream, ())
        at = bisect_left(states, first)
        return at < len(states) and states[at] <= last

    def _folder(self, number: int) -> tuple[int, bytes]:
        """Stream of a directory, and its path with a slash at the end."""
        names: list[tuple[int, bytes]] = []
        at: int | None = number
        while (known := self._folders.get(-1 if at is None else at)) is None:
            rows = self._connection.execute("SELECT stream, parent, name FROM dir WHERE id=?", (at,)).fetchall()
            stream, parent, name = rows[0] if len(rows) == 1 and len(names) <= MAX_DEPTH else (None, None, None)
            if not isinstance(stream, int) or not isinstance(parent, int | None) or not isinstance(name, bytes):
                raise DamagedIndexError(self._path, f"the directory {number} leads nowhere")
            if parent is None:
                known = (stream, b"/")
                self._folders[number if at is None else at] = known
                break
            names.append((number if at is None else at, name))
            at = parent
        stream, prefix = known
        for one, name in reversed(names):
            prefix += name + b"/"
            self._folders[one] = (stream, prefix)
        return stream, prefix

    def _below(self, start: _Start, state: int) -> Iterator[tuple[_Row, bytes]]:
        """Everything below a directory, in the archive's order."""
        stack = [(start.prefix, self._entries(start.id, state))]
        while stack:
            prefix, entries = stack[-1]
            for row in entries:
                path = prefix + row[1]
                yield row, path
                if row[4] == _DIRECTORY and row[7] is not None:
                    if len(stack) > MAX_DEPTH:
                        raise DamagedIndexError(self._path, "it is deeper than any tree")
                    stack.append((path + b"/", self._entries(row[7], state)))
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


def _size(stored: int | None) -> int | None:
    return stored if stored is None or stored >= 0 else stored + (1 << 64)
