"""Folders whose objects could not be deleted yet (R29): `.s3-pending-delete`, one prefix a line.

A backup that fails because its bucket is out of reach cannot remove what it has stored. The note makes a later command
do so, before garbage collection and when the store is opened.
"""

import fcntl
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from datastore.files import FILE_MODE, Owner, read_file, store_errors

NOTE_NAME: Final = ".s3-pending-delete"
_MAX_SIZE: Final = 16 << 20


class PendingDeletes:
    """The note of one cache folder; quick system calls."""

    def __init__(self, base: Path, owner: Owner) -> None:
        self._path, self._owner = base / NOTE_NAME, owner

    def prefixes(self) -> list[str]:
        """What must go, in the order of the notes.

        Raises:
            StoreError: unreadable.
        """
        with store_errors("read", self._path):
            try:
                text = read_file(self._path, limit=_MAX_SIZE).decode(errors="replace")
            except FileNotFoundError:
                return []
        return list(dict.fromkeys(line for line in text.splitlines() if line.endswith("/")))

    def add(self, prefix: str) -> None:
        """Write down a prefix, which ends in `/`, durably.

        Raises:
            StoreError: it cannot be written.
        """
        self._change(lambda known: [*known, prefix])

    def remove(self, done: Iterable[str]) -> None:
        """These are gone. Errors as `add`."""
        gone = set(done)
        self._change(lambda known: [prefix for prefix in known if prefix not in gone])

    def _change(self, change: Callable[[list[str]], list[str]]) -> None:
        with store_errors("write", self._path):
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
            try:
                os.fchmod(fd, FILE_MODE)
                self._owner.own(fd)
                fcntl.flock(fd, fcntl.LOCK_EX)
                known = os.pread(fd, _MAX_SIZE, 0).decode(errors="replace").splitlines()
                text = "".join(f"{prefix}\n" for prefix in change(known)).encode()
                # Over the old lines, and cut off then: killed in between, or with a full disk, no note is lost.
                os.pwrite(fd, text, 0)
                os.ftruncate(fd, len(text))
                os.fsync(fd)
            finally:
                os.close(fd)
