"""Snapshots in the index, what is known of their archives, and throwing away what no snapshot has any more."""

import hashlib
import sqlite3
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Final, NamedTuple

from agent.find_index.schema import NAME_INDEX, OPEN
from datastore.crypt_mode import CryptMode
from datastore.names import CATALOG_NAME, CLIENT_LOG_NAME, MANIFEST_NAME, Group, Snapshot
from repository.interface import SnapshotInfo

#: Why an archive has no state.
SEALED: Final = "sealed"  # encrypted, and the key was not there or names of such archives are not allowed
UNUSUAL: Final = "order"  # names in no order, which the index could not give back
NOT_ASKED: Final = "image"  # a disk image, which nobody has asked for yet
NOT_CLEAN: Final = "warned"  # a disk image that can only be read with warnings, or not at all
#: Directories whose entries are deleted at once.
_AT_ONCE: Final = 1000


class Part(NamedTuple):
    """One archive of a snapshot."""

    archive: str  #: `root.pxar`, `drive-scsi0.img`
    state: int | None  #: None: it must be read itself
    encrypted: bool
    why: str = ""  #: it has no state: `SEALED`, `UNUSUAL`, `NOT_ASKED`, `NOT_CLEAN`

    @property
    def image(self) -> bool:
        """Whether it is a disk image, and not a file archive."""
        return not self.archive.endswith(".pxar")


class Place(NamedTuple):
    """Where a state belongs."""

    stream: int
    root: int  #: its directory
    image: bool  #: of a disk: a pattern counts from the root of each of its volumes, too


class Known(NamedTuple):
    """What the index has of one snapshot."""

    id: int
    mark: bytes
    checked: bytes  #: fingerprint of the key that its manifest was checked with; empty: without one
    parts: tuple[Part, ...]

    @property
    def encrypted(self) -> bool:
        """Whether one of its archives is."""
        return any(part.encrypted for part in self.parts)


def mark_of(info: SnapshotInfo) -> bytes:
    """A digest of what a listing says of a snapshot's contents: another one means that it has to be looked at again.

    Local datastores and those in buckets list checksums, so that there it is exact; servers list names and sizes.
    """
    text = repr(
        (
            info.fingerprint,
            [
                (file.filename, None if file.filename == MANIFEST_NAME else file.size, file.crypt_mode, file.csum)
                for file in info.files
                if file.filename != CLIENT_LOG_NAME
            ],
        )
    )
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def source_of(*parts: bytes | str) -> bytes:
    """A digest that tells what a state was read from."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(4, "big") + raw)
    return digest.digest()


def is_encrypted(mode: CryptMode) -> bool:
    """Whether names in an archive of this mode are a secret."""
    return mode is CryptMode.ENCRYPT


def uses_catalog(filenames: Iterable[str], payload: str | None) -> bool:
    """Whether a self-contained archive of such a snapshot is read from its catalog."""
    return payload is None and CATALOG_NAME in filenames


def _check(kind: type | tuple[type, ...], *values: object) -> None:
    """Raise `sqlite3.DatabaseError` for a value that was never written: SQLite has columns of any type."""
    if not all(isinstance(value, kind) for value in values):
        raise sqlite3.DatabaseError("a value of it has another type")


class Records:
    """The tables but for the entries; used by one thread at a time. Methods raise `sqlite3.Error`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection: Final = connection

    def snapshots(self, group: Group | None = None) -> dict[tuple[str, str, str], Known]:
        """Everything known, by namespace, group and time; of one group only if it is given."""
        where, values = ("", ()) if group is None else (" WHERE ns=? AND grp=?", (str(group.ns), str(group)))
        parts: dict[int, list[Part]] = {}
        for number, archive, state, encrypted, why in self.connection.execute(
            "SELECT snapshot, archive, state, encrypted, why FROM part"
            f" WHERE snapshot IN (SELECT id FROM snapshot{where}) ORDER BY snapshot, position",
            values,
        ):
            _check(bytes, archive, why)
            _check((int, NoneType), state)
            parts.setdefault(number, []).append(Part(archive.decode(), state, bool(encrypted), why.decode()))
        found = {}
        for number, ns, grp, time, mark, checked in self.connection.execute(
            f"SELECT id, ns, grp, time, mark, checked FROM snapshot{where}", values
        ):
            _check(bytes, ns, grp, time, mark, checked)
            key = (ns.decode(), grp.decode(), time.decode())
            found[key] = Known(number, mark, checked, tuple(parts.get(number, ())))
        return found

    def places(self, states: Iterable[int]) -> dict[int, Place]:
        """Where `states` belong; those that are not there are left out."""
        found = {}
        statement = (
            "SELECT stream.id, root, archive FROM state JOIN stream ON stream.id=stream WHERE state.id=? AND complete=1"
        )
        for state in states:
            for stream, root, archive in self.connection.execute(statement, (state,)):
                _check(int, stream, root)
                _check(bytes, archive)
                found[state] = Place(stream, root, not archive.endswith(b".pxar"))
        return found

    def record(self, snapshot: Snapshot, mark: bytes, checked: bytes, parts: Sequence[Part]) -> None:
        """Put a snapshot in the place of what was known of it."""
        key = (str(snapshot.group.ns), str(snapshot.group), snapshot.time)
        self.connection.execute("BEGIN IMMEDIATE")
        self._forget("ns=? AND grp=? AND time=?", key)
        number = self.connection.execute(
            "INSERT INTO snapshot(ns, grp, time, mark, checked) VALUES(?, ?, ?, ?, ?)", (*key, mark, checked)
        ).lastrowid
        self.connection.executemany(
            "INSERT INTO part VALUES(?, ?, ?, ?, ?, ?)",
            [(number, at, one.archive, one.state, one.encrypted, one.why) for at, one in enumerate(parts)],
        )
        self.connection.execute("COMMIT")

    def forget(self, numbers: Iterable[int]) -> None:
        """Remove snapshots; what only they had stays until `tidy`."""
        self.connection.execute("BEGIN IMMEDIATE")
        for number in numbers:
            self._forget("id=?", (number,))
        self.connection.execute("COMMIT")

    def _forget(self, where: str, values: tuple[object, ...]) -> None:
        chosen = f"SELECT id FROM snapshot WHERE {where}"
        self.connection.execute(f"DELETE FROM part WHERE snapshot IN ({chosen})", values)
        self.connection.execute(f"DELETE FROM snapshot WHERE {where}", values)

    # Streams and states.

    def stream(self, group: Group, archive: str) -> tuple[int, int]:
        """The stream of an archive and its root directory, made if it is new."""
        key = (str(group.ns), str(group), archive)
        for stream, root in self.connection.execute(
            "SELECT id, root FROM stream WHERE ns=? AND grp=? AND archive=?", key
        ):
            return stream, root
        self.connection.execute("BEGIN IMMEDIATE")
        stream = self.connection.execute("INSERT INTO stream VALUES(NULL, ?, ?, ?, 0)", key).lastrowid
        root = self.connection.execute("INSERT INTO dir VALUES(NULL, ?, NULL, '')", (stream,)).lastrowid
        self.connection.execute("UPDATE stream SET root=? WHERE id=?", (root, stream))
        self.connection.execute("COMMIT")
        assert stream is not None
        assert root is not None
        return stream, root

    def state(self, stream: int, source: bytes) -> int | None:
        """The finished state of `stream` that was read from `source`; None if there is none."""
        for (state,) in self.connection.execute(
            "SELECT id FROM state WHERE stream=? AND source=? AND complete=1", (stream, source)
        ):
            return int(state)
        return None

    def begin_state(self, stream: int, source: bytes) -> int:
        """The number of a new state, which counts once `finish_state` was called."""
        state = self.connection.execute("INSERT INTO state VALUES(NULL, ?, ?, 0, 0)", (stream, source)).lastrowid
        assert state is not None
        return state

    def finish_state(self, state: int, entries: int) -> None:
        """Everything of `state` is written."""
        if not self.connection.in_transaction:
            self.connection.execute("BEGIN IMMEDIATE")
        self.connection.execute("UPDATE state SET complete=1, entries=? WHERE id=?", (entries, state))
        self.connection.execute("COMMIT")

    # Tidying up.

    def tidy(self) -> None:
        """Throw away what no snapshot has: states, streams, and entries that were in none of the states left."""
        unused = self.connection.execute(
            "SELECT id, stream FROM state WHERE NOT EXISTS (SELECT 1 FROM part WHERE part.state=state.id)"
        ).fetchall()
        if unused:
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.executemany("DELETE FROM state WHERE id=?", [(state,) for state, _ in unused])
            self.connection.execute("COMMIT")
        newest: dict[int, int] = {}
        for state, stream in unused:
            newest[stream] = max(state, newest.get(stream, 0))
        for stream, state in newest.items():
            self._tidy_stream(stream, state)
        for (stream,) in self.connection.execute(
            "SELECT id FROM stream WHERE NOT EXISTS (SELECT 1 FROM state WHERE state.stream=stream.id)"
        ).fetchall():
            self._remove_stream(stream)

    def _tidy_stream(self, stream: int, gone: int) -> None:
        """Delete the entries whose run lies between two neighbouring states, or after the last.

        `gone` is the newest state that was removed. If it was the stream's newest, what is open becomes what the
        newest that is left has.
        """
        states = [
            state for (state,) in self.connection.execute("SELECT id FROM state WHERE stream=? ORDER BY id", (stream,))
        ]
        if not states:
            return
        of_stream = (
            f"entry INDEXED BY entry_ended WHERE last<{OPEN} AND last>=? AND last<? AND first>?"
            " AND (SELECT stream FROM dir WHERE dir.id=entry.dir)=?"
        )
        self.connection.execute("BEGIN IMMEDIATE")
        if gone > states[-1]:
            self.connection.execute(
                f"UPDATE entry SET last={OPEN} - 1 WHERE first>? AND last={OPEN}"
                " AND dir IN (SELECT id FROM dir WHERE stream=?)",
                (states[-1], stream),
            )
            self.connection.execute(
                f"UPDATE entry INDEXED BY entry_ended SET last={OPEN} WHERE last<{OPEN} AND last>=? AND first<=?"
                " AND (SELECT stream FROM dir WHERE dir.id=entry.dir)=?",
                (states[-1], states[-1], stream),
            )
        for before, after in zip([0, *states], [*states, OPEN], strict=True):
            values = (before, after, before, stream)
            dirs = self.connection.execute(f"SELECT child FROM {of_stream} AND child IS NOT NULL", values).fetchall()
            self.connection.execute(f"DELETE FROM {of_stream}", values)
            self.connection.executemany(
                "DELETE FROM dir WHERE id=? AND NOT EXISTS"
                " (SELECT 1 FROM entry WHERE entry.dir=dir.parent AND entry.name=dir.name AND entry.child=dir.id)",
                dirs,
            )
        self.connection.execute("COMMIT")

    def _remove_stream(self, stream: int) -> None:
        """Delete everything of a stream without states, a part at a time: what is cut off is gone on with."""
        while True:
            dirs = self.connection.execute(f"SELECT id FROM dir WHERE stream=? LIMIT {_AT_ONCE}", (stream,)).fetchall()
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.executemany("DELETE FROM entry WHERE dir=?", dirs)
            self.connection.executemany("DELETE FROM dir WHERE id=?", dirs)
            if len(dirs) < _AT_ONCE:
                self.connection.execute("DELETE FROM stream WHERE id=?", (stream,))
            self.connection.execute("COMMIT")
            if len(dirs) < _AT_ONCE:
                return

    def finish_indexes(self) -> None:
        """See to it that names can be searched."""
        if not self.searchable:
            self.connection.execute(NAME_INDEX)

    @property
    def searchable(self) -> bool:
        """False before the first update has ended."""
        ((count,),) = self.connection.execute("SELECT count(*) FROM sqlite_schema WHERE name='entry_name'")
        return bool(count)

    # Consent.

    @property
    def encrypted_allowed(self) -> bool:
        """Whether names of encrypted archives may be written into the index."""
        return bool(self.connection.execute("SELECT 1 FROM about WHERE key='encrypted'").fetchall())

    def allow_encrypted(self, allowed: bool) -> None:
        """Allow that, or take it back and forget every snapshot with such names."""
        self.connection.execute("BEGIN IMMEDIATE")
        if allowed:
            self.connection.execute("INSERT OR REPLACE INTO about VALUES('encrypted', '1')")
        else:
            self.connection.execute("DELETE FROM about WHERE key='encrypted'")
            sealed = self.connection.execute("SELECT DISTINCT snapshot FROM part WHERE encrypted=1").fetchall()
            self.connection.executemany("DELETE FROM part WHERE snapshot=?", sealed)
            self.connection.executemany("DELETE FROM snapshot WHERE id=?", sealed)
        self.connection.execute("COMMIT")

    def counts(self) -> dict[str, int]:
        """How many rows the tables have, by name."""
        found = {}
        for table in ("snapshot", "stream", "state", "dir", "entry"):
            ((found[table],),) = self.connection.execute(f"SELECT count(*) FROM {table}")
        return found
