"""Deletes whose outcome nobody knows, and what was stored while they may still happen (R31).

A batch of deletes that timed out or lost its connection may be carried out at any time later. For an hour its chunks
are stored without a condition, so that the endpoint's old copy does not stand in for the new one, are not dropped from
the cache, and are looked for once the hour is over.

The list is a file of the cache folder, so that all processes know it: a line `<hex> <Unix seconds> <what>` each, `d`
for a delete and `s` for a chunk that was stored meanwhile. A second file has the digests, 32 bytes each, of the batches
whose answers a garbage collection is waiting for: if it is killed then, it cannot tell.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from datastore.errors import StoreError
from datastore.files import FILE_MODE, Owner, make_folders, read_file, store_errors, write_all

_LOG = logging.getLogger(__name__)
#: Seconds after which a delete is not expected to happen any more.
UNKNOWN_FOR_S: Final = 3600.0
_NAME: Final = ".fleece/s3-unknown"
_RUNNING: Final = ".fleece/s3-deleting"
_MAX_SIZE: Final = 64 << 20
_DIGEST: Final = 32
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
        self._running: list[bytes] = []  # of our own batches that are under way
        self._running_lock = threading.Lock()

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
        """True if an old delete may still hit the chunk; the caller holds its lock.

        Raises:
            StoreError: the list cannot be read.
        """
        self._look()
        if self._clock() < self._over_at(digest):
            return True
        if digest not in self._read_running():
            return False
        # Whoever sent that held the lock that is ours now, so he was killed before he had the answer.
        self.add([digest])
        return True

    def begin(self) -> None:
        """Before the first batch of a garbage collection: take over what a killed one left. It is the only one."""
        data = self._read_running()
        left = [data[at : at + _DIGEST] for at in range(0, len(data), _DIGEST)]
        try:
            if left:
                self.add(left)
        except StoreError as error:
            _LOG.warning("deletes of a garbage collection that was killed are not written down: %s", error)
            self._running = left
        else:
            self.ended(left)

    def began(self, digests: Iterable[bytes]) -> None:
        """A batch is about to be sent; the caller holds the locks of its chunks until `ended`."""
        with self._running_lock:
            at = _DIGEST * len(self._running)
            self._running += digests
            self._write_running(at)

    def ended(self, digests: Iterable[bytes]) -> None:
        """The answer is there, or `add` has been told that there is none."""
        gone = set(digests)
        with self._running_lock:
            if gone:
                self._running = [digest for digest in self._running if digest not in gone]
                self._write_running(0)

    def _write_running(self, at: int) -> None:
        """Write what runs from byte `at` on. Killed in between, none that runs is lost: they only move to the front."""
        try:
            with store_errors("write", self._base / _RUNNING):
                make_folders(self._base, ".fleece", self._owner)
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                fd = os.open(self._base / _RUNNING, flags, FILE_MODE)
                try:
                    os.fchmod(fd, FILE_MODE)
                    self._owner.own(fd)
                    os.lseek(fd, at, os.SEEK_SET)
                    write_all(fd, [b"".join(self._running)[at:]])
                    os.ftruncate(fd, _DIGEST * len(self._running))
                finally:
                    os.close(fd)
        except StoreError as error:
            # A full disk must not keep anybody from making room.
            _LOG.info("%s", error)

    def _read_running(self) -> bytes:
        with store_errors("read", self._base / _RUNNING):
            try:
                return read_file(self._base / _RUNNING, limit=_MAX_SIZE)
            except FileNotFoundError:
                return b""

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
