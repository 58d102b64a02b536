"""What verify says about single chunks: lines for people, and whether an error says anything about the chunk."""

import errno
from typing import Final

from datastore.s3.errors import S3Error

#: Lines about single chunks per file; the count of the others follows.
MAX_CHUNK_LINES: Final = 20
_SYSTEM_ERRORS: Final = frozenset((errno.EIO, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM))


class Lines:
    """Lines about single chunks of one file: the first `MAX_CHUNK_LINES`, and how many more; there may be millions."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._lines: list[str] = []
        self._more = 0

    def add(self, line: str) -> bool:
        """Add a line; False if it is only counted."""
        if len(self._lines) < MAX_CHUNK_LINES:
            self._lines.append(line)
            return True
        self._more += 1
        return False

    def all(self) -> list[str]:
        """The lines, and one about the others."""
        return [*self._lines, f"{self._where}: {self._more} more chunks are bad"] if self._more else self._lines


def is_system_error(error: BaseException | None) -> bool:
    """True if the system, or the network, could not read, which says nothing about the chunk."""
    if isinstance(error, S3Error):
        return True
    while error is not None:
        if isinstance(error, OSError):
            return error.errno in _SYSTEM_ERRORS
        error = error.__cause__
    return False
