"""Errors of the index.

FleeceError
└── IndexFileError            it cannot be used now: no space, no rights, busy
    └── DamagedIndexError     it is not what this version writes, and has to be made anew
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from core.errors import FleeceError, os_reason

#: What SQLite says of a file that is fine where the place is not.
_PLACE: Final = (
    "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH", "SQLITE_BUSY",
    "SQLITE_LOCKED", "SQLITE_PROTOCOL", "SQLITE_NOMEM", "SQLITE_NOLFS", "SQLITE_INTERRUPT",
)  # fmt: skip


class IndexFileError(FleeceError):
    """The index cannot be used."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__("use the index", str(path), why)


class NoIndexError(IndexFileError):
    """There is no index of this repository."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "there is none")


class DamagedIndexError(IndexFileError):
    """The index is none, or was altered."""


@contextmanager
def index_errors(path: Path) -> Iterator[None]:
    """Translate what SQLite and the file system say about the index `path`.

    Raises:
        IndexFileError, DamagedIndexError: in their place.
    """
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None) or "SQLITE_MISUSE"
        kind = IndexFileError if name.startswith(_PLACE) else DamagedIndexError
        raise kind(path, str(error)) from error
    except (UnicodeDecodeError, OverflowError) as error:
        raise DamagedIndexError(path, "a text in it is none") from error  # in what it holds, or in SQLite's complaint
    except OSError as error:
        raise IndexFileError(path, os_reason(error)) from error
