"""The file of an index: where it lies, who may write it, and opening it.

Names of files are private, so the folder and the files in it are for their owner alone. An index is a cache: a file
that is not exactly what this version writes is thrown away, and never asked.
"""

import fcntl
import hashlib
import os
import sqlite3
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote

import trio

from agent.find_index.errors import DamagedIndexError, IndexFileError, NoIndexError, index_errors
from agent.find_index.schema import APPLICATION_ID, INDEXES, NAME_INDEX, TABLES, VERSION
from agent.places import state_dir
from core.errors import os_reason
from core.limits import in_io_thread
from repository.interface import Repository

#: Seconds that one who looks waits for another who updates; then it reads what is not indexed itself.
LOCK_WAIT_S: Final = 5.0
_POLL_S: Final = 0.05
#: Seconds SQLite waits where two processes meet for a moment.
_BUSY_S: Final = 30.0
#: KiB of pages in memory.
_CACHE_KIB: Final = 16 << 10
#: Bytes of a row; the longest name has 4095.
_MAX_ROW: Final = 1 << 16


def index_folder() -> Path:
    """Where all indexes of this user lie."""
    return state_dir() / "find-index"


async def repository_key(repository: Repository) -> str:
    """What tells `repository` from others here: its folder (of one in a bucket, its cache), or user and server.

    Unlike `Repository.identity` it never writes, so that read-only datastores can be looked into; and what a user of a
    server may see is theirs alone.
    """
    from repository.local import LocalRepository

    if isinstance(repository, LocalRepository):
        base = repository.store.base
        return f"folder {await in_io_thread(base.resolve)}"
    user = getattr(repository, "auth_id", "")
    return f"server {user} {await repository.identity()}"


class IndexFile:
    """The index of one repository on this host; it may not be there yet."""

    def __init__(self, repository: str, folder: Path | None = None, *, stem: str = "") -> None:
        """`repository` as `repository_key` gives it; nothing is opened. `stem`: only a file's name is known."""
        self.repository: Final = repository
        self.folder: Final = index_folder() if folder is None else folder
        stem = stem or hashlib.sha256(repository.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self.path: Final = self.folder / f"{stem}.sqlite"
        self._lock: Final = self.folder / f"{stem}.lock"

    def exists(self) -> bool:
        """Whether there is one, of whatever kind."""
        return os.path.lexists(self.path)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        total = 0
        for path in self._files():
            with suppress(OSError):
                total += path.lstat().st_size
        return total

    def _files(self) -> list[Path]:
        return [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm", "-journal")]

    def remove(self) -> None:
        """Delete it; the caller holds the lock.

        Raises:
            IndexFileError: it cannot be deleted.
        """
        for path in self._files():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise IndexFileError(path, os_reason(error)) from error

    @asynccontextmanager
    async def locked(self, wait_s: float = LOCK_WAIT_S) -> AsyncIterator[bool]:
        """Be the only one who writes while the block runs; False if somebody else is, for longer than `wait_s`.

        A process that is killed lets go. Cancelled, it is let go.

        Raises:
            IndexFileError: the folder cannot be written.
        """
        descriptor = await in_io_thread(self._open_lock)
        try:
            deadline = trio.current_time() + wait_s
            while not (held := self._try_lock(descriptor)) and trio.current_time() < deadline:  # noqa: ASYNC110
                await trio.sleep(_POLL_S)  # flock cannot be waited for with an end
            yield held
        finally:
            os.close(descriptor)

    def _open_lock(self) -> int:
        with index_errors(self._lock):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise IndexFileError(self.folder, "it is no folder of this user")
            if stat.S_IMODE(found.st_mode) != 0o700:
                self.folder.chmod(0o700)
            return os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    @staticmethod
    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def open(self, *, make: bool = False) -> sqlite3.Connection:
        """Open it, in autocommit mode, for one thread at a time.

        Args:
            make: begin one if there is none; only for who holds the lock.

        Raises:
            NoIndexError: there is none.
            IndexFileError: it cannot be used.
            DamagedIndexError: it is not what this version writes for this repository, or somebody else's.
        """
        with index_errors(self.path):
            self._check_file(make)
            connection = sqlite3.connect(
                f"file:{quote(str(self.path))}?mode=rw", uri=True, timeout=_BUSY_S, isolation_level=None,
                check_same_thread=False, cached_statements=256,
            )  # fmt: skip
            try:
                self._prepare(connection, make)
            except BaseException:
                connection.close()
                raise
            return connection

    def open_anew(self) -> sqlite3.Connection:
        """Open it, or begin anew if it is not what it should be; only for who holds the lock.

        Raises:
            IndexFileError: it cannot be used.
        """
        try:
            return self.open(make=True)
        except DamagedIndexError:
            self.remove()
            return self.open(make=True)

    def _check_file(self, make: bool) -> None:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if make else 0)
        try:
            descriptor = os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            raise NoIndexError(self.path) from None
        except OSError as error:
            if self.path.is_symlink() or self.path.is_dir():
                raise DamagedIndexError(self.path, "it is no regular file") from error
            raise
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
                raise DamagedIndexError(self.path, "it is no regular file of this user alone")
            if stat.S_IMODE(found.st_mode) & 0o177:
                os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)

    def _prepare(self, connection: sqlite3.Connection, make: bool) -> None:
        connection.text_factory = bytes
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_ROW)
        for pragma in (
            "trusted_schema=OFF", "cell_size_check=ON", f"cache_size=-{_CACHE_KIB}", "secure_delete=ON",
            "synchronous=NORMAL", "journal_size_limit=0",
        ):  # fmt: skip
            connection.execute(f"PRAGMA {pragma}")
        if self._is_empty(connection):
            if not make:
                raise NoIndexError(self.path)
            # Unlike the other settings this one stays with the file.
            connection.execute("PRAGMA journal_mode=WAL")
            self._make(connection)
        self._check(connection)

    @staticmethod
    def _is_empty(connection: sqlite3.Connection) -> bool:
        ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_schema")
        ((version,),) = connection.execute("PRAGMA user_version")
        return bool(tables == 0 and version == 0)

    def _make(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={VERSION}")
        for statement in (*TABLES.values(), *INDEXES.values()):
            connection.execute(statement)
        connection.execute("INSERT INTO about VALUES('repository', CAST(? AS TEXT))", (_text(self.repository),))
        connection.execute("COMMIT")

    def _check(self, connection: sqlite3.Connection) -> None:
        """Whether everything about the file is as this version makes it: no trigger or view of anybody else."""
        ((application,),) = connection.execute("PRAGMA application_id")
        ((version,),) = connection.execute("PRAGMA user_version")
        if (application, version) != (APPLICATION_ID, VERSION):
            raise DamagedIndexError(self.path, f"it has the form {application:#x}.{version}")
        wanted = {statement.encode() for statement in (*TABLES.values(), *INDEXES.values())}
        found = {
            sql
            for name, sql in connection.execute("SELECT name, sql FROM sqlite_schema")
            if name != b"sqlite_sequence" and not name.startswith(b"sqlite_autoindex_")
        }
        if found - {NAME_INDEX.encode()} != wanted:
            raise DamagedIndexError(self.path, "its tables are others")
        rows = connection.execute("SELECT value FROM about WHERE key='repository'").fetchall()
        if rows != [(_text(self.repository),)]:
            raise DamagedIndexError(self.path, "it belongs to another repository")


def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
