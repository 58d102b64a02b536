"""An archive's entries on their way into the index: compared with the state before, only what differs is written.

Both come in the order of the archive, that is by name within each directory, so that nothing is kept in memory but the
directories that are open, a page of each. What is written so far is made durable now and then: a state that is not
finished harms nothing (see `schema`).
"""

import sqlite3
from typing import Any, Final

from agent.archive_listing import Found
from agent.find_index.schema import LETTERS, OPEN

#: Entries of a directory that are read at once.
_PAGE: Final = 1000
#: Rows that are gathered before they are written.
_BATCH: Final = 10_000
#: Rows after which what was written is made durable, so that the log of a transaction stays small.
_COMMIT: Final = 200_000
_DIRECTORY: Final = LETTERS.index("d")
_KINDS: Final = {letter: number for number, letter in enumerate(LETTERS)}

_INSERT: Final = "INSERT INTO entry VALUES(?, CAST(? AS TEXT), ?, ?, ?, ?, ?, ?)"
_END: Final = "UPDATE entry SET last=? WHERE dir=? AND name=CAST(? AS TEXT) AND first=?"
_INSERT_DIR: Final = "INSERT INTO dir VALUES(?, ?, ?, CAST(? AS TEXT))"
_OPEN_ENTRIES: Final = (
    "SELECT name, first, kind, size, mtime, child FROM entry"
    f" WHERE dir=? AND name>CAST(? AS TEXT) AND first<? AND last={OPEN} ORDER BY name LIMIT {_PAGE}"
)

#: name, first, kind, size, mtime, child
_Row = tuple[bytes, int, int, int | None, int | None, int | None]


class UnusualOrderError(Exception):
    """The archive's names are not in the order in which all known writers put them, or one comes twice."""


class _Level:
    """A directory that is open."""

    __slots__ = ("at", "id", "last", "more", "prefix", "rows")

    def __init__(self, number: int, prefix: bytes, *, fresh: bool) -> None:
        self.id = number
        self.prefix = prefix  #: its path and a slash
        self.last = b""  #: the name that came last
        self.rows: list[_Row] = []  #: of the state before
        self.at = 0  #: how many of them are done
        self.more = not fresh  #: there may be more


class StateWriter:
    """Writes one state of a stream; used by one thread, which holds the index's lock."""

    def __init__(self, connection: sqlite3.Connection, stream: int, root: int, state: int) -> None:
        """Begin to write `state` of `stream`, whose root directory is `root`."""
        self._connection: Final = connection
        self._stream: Final = stream
        self._state: Final = state
        self._levels = [_Level(root, b"/", fresh=False)]
        self._inserts: list[tuple[Any, ...]] = []
        self._dirs: list[tuple[Any, ...]] = []
        self._ends: list[tuple[Any, ...]] = []
        self._unsaved = 0
        ((last,),) = connection.execute("SELECT max(id) FROM dir")
        self._known_dirs: Final[int] = last or 0  #: directories with a higher number are new, and so hold nothing yet
        self._last_dir: int = last or 0
        self.entries = 0  #: so far

    def add(self, one: Found) -> None:
        """The next entry of the archive.

        Raises:
            UnusualOrderError: it is not behind the one before.
            sqlite3.Error: it cannot be written.
        """
        path = one.path
        slash = path.rindex(b"/") + 1
        while self._levels[-1].prefix != path[:slash]:
            self._leave()
            if not self._levels:
                raise UnusualOrderError
        level, name, kind = self._levels[-1], path[slash:], _KINDS[one.letter]
        if name <= level.last:
            raise UnusualOrderError
        level.last = name
        self.entries += 1
        size = one.size if one.size is None or one.size <= OPEN else one.size - (1 << 64)
        old = self._old(level, name)
        if old is None:
            child = self._directory(level, name) if kind == _DIRECTORY else None
        else:
            child = self._changed(level, old, kind, size, one.mtime_s)
        if old is None or old[2:5] != (kind, size, one.mtime_s):
            self._inserts.append((level.id, name, self._state, OPEN, kind, size, one.mtime_s, child))
            if len(self._inserts) >= _BATCH:
                self.flush()
        if child is not None:
            self._levels.append(_Level(child, path + b"/", fresh=child > self._known_dirs))

    def finish(self) -> None:
        """All entries have come: what is left of the state before ends; everything is written, not yet durable.

        Raises:
            sqlite3.Error: it cannot be written.
        """
        while self._levels:
            self._leave()
        self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
        for statement, rows in ((_END, self._ends), (_INSERT_DIR, self._dirs), (_INSERT, self._inserts)):
            if rows:
                self._connection.executemany(statement, rows)
                self._unsaved += len(rows)
                rows.clear()
        if self._unsaved >= _COMMIT:
            self._connection.execute("COMMIT")
            self._unsaved = 0

    def _old(self, level: _Level, name: bytes) -> _Row | None:
        """What the state before has under `name`; what it has before that is not there any more."""
        while True:
            if level.at >= len(level.rows) and not self._page(level):
                return None
            row = level.rows[level.at]
            if row[0] > name:
                return None
            level.at += 1
            if row[0] == name:
                return row
            self._end(level.id, row)

    def _page(self, level: _Level) -> bool:
        if not level.more:
            return False
        after = level.rows[-1][0] if level.rows else b""
        level.rows = self._connection.execute(_OPEN_ENTRIES, (level.id, after, self._state)).fetchall()
        if any(type(row[0]) is not bytes for row in level.rows):
            raise sqlite3.DatabaseError("a name in it is none")
        level.at = 0
        level.more = len(level.rows) == _PAGE
        return bool(level.rows)

    def _leave(self) -> None:
        """The innermost open directory has no more entries."""
        level = self._levels.pop()
        while level.at < len(level.rows) or self._page(level):
            self._end(level.id, level.rows[level.at])
            level.at += 1

    def _changed(self, level: _Level, old: _Row, kind: int, size: int | None, mtime: int | None) -> int | None:
        """End `old` if the entry is not what it was; returns its directory, if it is one."""
        child = old[5]
        if kind != _DIRECTORY:
            if old[2:5] != (kind, size, mtime):
                self._end(level.id, old)
            return None
        if old[2] != _DIRECTORY or child is None:
            self._end(level.id, old)
            return self._directory(level, old[0])
        if old[2:5] != (kind, size, mtime):
            self._ends.append((self._state - 1, level.id, old[0], old[1]))  # what it holds is compared
        return child

    def _directory(self, level: _Level, name: bytes) -> int:
        """The number of a directory that the state before did not have; it may have had one long ago."""
        if level.id <= self._known_dirs:
            statement = "SELECT id FROM dir WHERE parent=? AND name=CAST(? AS TEXT)"
            for (known,) in self._connection.execute(statement, (level.id, name)):
                return int(known)
        self._last_dir += 1
        self._dirs.append((self._last_dir, self._stream, level.id, name))
        return self._last_dir

    def _end(self, directory: int, row: _Row) -> None:
        """An entry is not there any more; nor is what it holds."""
        if len(self._ends) >= _BATCH:
            self.flush()
        self._ends.append((self._state - 1, directory, row[0], row[1]))
        if row[2] != _DIRECTORY or row[5] is None:
            return
        below = [row[5]]
        while below:
            directory, after, page = below.pop(), b"", None
            while page is None or len(page) == _PAGE:
                page = self._connection.execute(_OPEN_ENTRIES, (directory, after, self._state)).fetchall()
                for name, first, kind, _, _, child in page:
                    self._ends.append((self._state - 1, directory, name, first))
                    if kind == _DIRECTORY and child is not None:
                        below.append(child)
                    after = name
            if len(self._ends) >= _BATCH:
                self.flush()
