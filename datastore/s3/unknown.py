"""Deletes whose outcome nobody knows, and what was stored while they may still happen (R31).

A batch of deletes that timed out or lost its connection may be carried out at any time later. For an hour its chunks
are stored without a condition, so that the endpoint's old copy does not stand in for the new one, are not dropped from
the cache, and are looked for once the hour is over.

The list is a file of the cache folder, so that all processes know it: a line `<hex> <Unix seconds> <what>` each, `d`
for a delete and `s` for a chunk that was stored meanwhile.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from datastore.files import FILE_MODE, Owner, make_folders, read_file, store_errors

#: Seconds after which a delete is not expected to happen any more.
UNKNOWN_FOR_S: Final = 3600.0
_NAME: Final = ".fleece/s3-unknown"
_MAX_SIZE: Final = 64 << 20
_DELETE: Final = "d"
_STORED: Final = "s"


class UnknownDeletes:
    """The list; quick system calls, from any thread of one event loop's process at a time.

    Args:
        base: the cache folder.
        owner: of the file.
        clock: Unix seconds.
    """

    def __init__(self, base: Path, owner: Owner, clock: Callable[[], float] = time.time) -> None:
        self._base, self._owner, self._clock = base, owner, clock
        self._path = base / _NAME
        self._seen: tuple[int, int] | None = None  # inode and size of the file when it was read
        self._deletes: dict[bytes, float] = {}
        self._stored: dict[bytes, float] = {}
        self._unwritten: dict[bytes, float] = {}  # deletes that only this process knows of

    def add(self, digests: Iterable[bytes]) -> None:
        """These may be deleted at any time from now on.

        Raises:
            StoreError: it cannot be written down; this process knows it all the same.
        """
        digests, now = list(digests), self._clock()
        self._unwritten.update(dict.fromkeys(digests, now))
        self._append(digests, _DELETE)
        for digest in digests:
            self._unwritten.pop(digest, None)

    def stored(self, digest: bytes) -> None:
        """The chunk was stored meanwhile, and must be looked for later. Errors as `add`."""
        self._append([digest], _STORED)

    def may_be_deleted(self, digest: bytes) -> bool:
        """True if an old delete may still hit the chunk.

        Raises:
            StoreError: the list cannot be read.
        """
        self._look()
        return self._clock() < self._over_at(digest)

    def _over_at(self, digest: bytes) -> float:
        return max(self._deletes.get(digest, 0.0), self._unwritten.get(digest, 0.0)) + UNKNOWN_FOR_S

    def must_stay(self, digest: bytes) -> bool:
        """True if the cache must not drop the chunk: what it has may be all that there is."""
        return digest in self._stored

    def due(self) -> list[bytes]:
        """Chunks that must be looked for now. Errors as `may_be_deleted`."""
        self._look()
        now = self._clock()
        return [digest for digest in self._stored if self._over_at(digest) <= now]

    def settle(self, digests: Iterable[bytes]) -> None:
        """These were looked for. Forgets everything that is over. Errors as `add`."""
        done = set(digests)
        with store_errors("change", self._path), _Locked(self._base, self._owner) as fd:
            deletes, stored = _parse(os.pread(fd, _MAX_SIZE, 0))
            limit = self._clock() - UNKNOWN_FOR_S
            # A chunk that another delete may hit since it was looked for must be looked for once more.
            again = {digest for digest in done if deletes.get(digest, 0.0) > limit}
            lines = [_line(digest, at, _DELETE) for digest, at in deletes.items() if at > limit]
            lines += [
                _line(digest, at, _STORED) for digest, at in stored.items() if digest not in done or digest in again
            ]
            text = "".join(lines).encode()
            # Over the old lines, and cut off then: killed in between, or with a full disk, none that counts is lost.
            os.pwrite(fd, text, 0)
            os.ftruncate(fd, len(text))
        self._seen = None

    def _append(self, digests: Iterable[bytes], what: str) -> None:
        text = "".join(_line(digest, self._clock(), what) for digest in digests)
        with store_errors("write", self._path), _Locked(self._base, self._owner) as fd:
            os.lseek(fd, 0, os.SEEK_END)
            os.write(fd, text.encode())
        self._seen = None
        self._look()

    def _look(self) -> None:
        with store_errors("read", self._path):
            try:
                found = self._path.stat()
            except FileNotFoundError:
                self._deletes, self._stored, self._seen = {}, {}, None
                return
            state = (found.st_ino, found.st_size)
            if state == self._seen:
                return
            # Not read under its lock: a line that is just being written concerns what another process does now.
            self._deletes, self._stored = _parse(read_file(self._path, limit=_MAX_SIZE))
            self._seen = state


class _Locked:
    """The open file, locked, while the block runs."""

    def __init__(self, base: Path, owner: Owner) -> None:
        self._base, self._owner = base, owner

    def __enter__(self) -> int:
        make_folders(self._base, ".fleece", self._owner)
        self._fd = os.open(self._base / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            os.fchmod(self._fd, FILE_MODE)
            self._owner.own(self._fd)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except BaseException:
            os.close(self._fd)
            raise
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _line(digest: bytes, at: float, what: str) -> str:
    return f"{digest.hex()} {at:.0f} {what}\n"


def _parse(data: bytes) -> tuple[dict[bytes, float], dict[bytes, float]]:
    deletes: dict[bytes, float] = {}
    stored: dict[bytes, float] = {}
    for line in data.decode("ascii", "replace").splitlines():
        name, _, rest = line.partition(" ")
        at, _, what = rest.partition(" ")
        try:
            (deletes if what == _DELETE else stored)[bytes.fromhex(name)] = float(at)
        except ValueError:
            continue  # half a line, of a full disk or a killed process
    return deletes, stored
