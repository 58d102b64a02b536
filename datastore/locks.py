"""Locks of a local datastore: groups, snapshots, manifests, chunks, and the store as a whole.

Rules and paths: docs/formats.md, "Locks". Group, snapshot and manifest locks are flocks on files of their own; they lie
under `<base>/.fleece/locks`, and, if this host's PBS knows the store, in PBS's run-time folder as well. The store's
`.lock` is split by byte range between writers and garbage collection, chunk locks are single bytes of one file. Both
use open-file-description locks, which belong to the descriptor and vanish with the process.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from struct import Struct
from typing import Final

import trio

from datastore.errors import LockedError, StoreError
from datastore.files import FILE_MODE, Owner, make_folders, store_errors, unlink_quietly
from datastore.names import Group, Namespace, Snapshot

_LOG = logging.getLogger(__name__)

#: Where a store's own lock files lie, relative to its folder.
LOCK_FOLDER: Final = ".fleece/locks"
#: Lock files are shared with PBS's user and group.
_LOCK_MODE: Final = 0o660
#: Seconds between two looks at a lock that is held.
_POLL_S: Final = 0.05
#: Seconds to wait for a manifest lock, as PBS.
MANIFEST_WAIT_S: Final = 5.0
#: Seconds a chunk may be locked by somebody else before the insert fails: an insert takes milliseconds.
CHUNK_WAIT_S: Final = 60.0
#: The byte of `.lock` that writers hold shared; garbage collection holds all bytes below it exclusively.
_WRITER_BYTE: Final = 1 << 62
_FLOCK: Final = Struct(
    "h"    # l_type
    "h"    # l_whence
    "4x"
    "q"    # l_start
    "q"    # l_len
    "i"    # l_pid
    "4x"
)  # fmt: skip
#: Longest file name that PBS does not shorten.
_MAX_NAME: Final = 254


def escape(path: str) -> str:
    """`path` as one file name, the way systemd escapes paths: `vm/100` becomes `vm-100`, other bytes `\\xNN`."""
    escaped = []
    for position, byte in enumerate(path.lstrip("/").encode()):
        char = chr(byte)
        if char == "/":
            escaped.append("-")
        elif char.isascii() and (char.isalnum() or char == "_" or (char == "." and position > 0)):
            escaped.append(char)
        else:
            escaped.append(f"\\x{byte:02x}")
    return "".join(escaped)


def lock_file(ns: Namespace, path: str) -> str:
    """Path of the lock file below a lock root; `path` is that of the object without its namespace."""
    name = escape(path)
    folder = ":".join(ns.components)
    if len(name) > _MAX_NAME:
        name = f"hashed/{name[:80]}...{name[-80:]}-{hashlib.sha256(path.encode()).hexdigest()}"
    return f"{folder}/{name}" if folder else name


def _manifest_path(snapshot: Snapshot) -> str:
    return f"{snapshot}/.index.json.lck"


@dataclass(frozen=True, slots=True)
class LockRoot:
    """A folder of lock files below one that exists, and who owns what is created there."""

    base: Path
    folder: str  #: relative to `base`; made when it is needed
    owner: Owner

    @property
    def path(self) -> Path:
        """The folder."""
        return self.base / self.folder


class HeldLock:
    """A lock that is held, in one or two files; `release` is idempotent."""

    def __init__(self, files: list[tuple[int, Path]]) -> None:
        self._files = files

    def release(self, *, unlink: bool = False) -> None:
        """Give it up; with `unlink` the lock files go too (what they lock is gone)."""
        while self._files:
            fd, path = self._files.pop()
            if unlink:
                unlink_quietly(path)
            os.close(fd)


class StoreLocks:
    """The flock files of one store; `roots` gives the folders that have them, each time that one is locked."""

    def __init__(self, roots: Callable[[], Sequence[LockRoot]]) -> None:
        self._roots = roots

    @asynccontextmanager
    async def group(self, group: Group, *, wait_s: float = 0.0) -> AsyncIterator[HeldLock]:
        """Hold the group exclusively.

        Raises:
            LockedError: still held by somebody else after `wait_s`.
        """
        lock = await self.acquire_group(group, wait_s=wait_s)
        try:
            yield lock
        finally:
            lock.release()

    @asynccontextmanager
    async def snapshot(self, snapshot: Snapshot, *, shared: bool, wait_s: float = 0.0) -> AsyncIterator[HeldLock]:
        """Hold a snapshot, shared to read it, exclusively to write or remove it; errors as `group`."""
        lock = await self.acquire_snapshot(snapshot, shared=shared, wait_s=wait_s)
        try:
            yield lock
        finally:
            lock.release()

    @asynccontextmanager
    async def manifest(self, snapshot: Snapshot) -> AsyncIterator[HeldLock]:
        """Hold a manifest exclusively while it is changed; errors as `group`, after 5 s."""
        path = lock_file(snapshot.group.ns, _manifest_path(snapshot))
        lock = await self._acquire(path, f"manifest of {snapshot}", shared=False, wait_s=MANIFEST_WAIT_S)
        try:
            yield lock
        finally:
            lock.release()

    async def acquire_group(self, group: Group, *, wait_s: float = 0.0) -> HeldLock:
        """As `group`, to be released by the caller."""
        return await self._acquire(lock_file(group.ns, str(group)), f"group {group}", shared=False, wait_s=wait_s)

    async def acquire_snapshot(self, snapshot: Snapshot, *, shared: bool, wait_s: float = 0.0) -> HeldLock:
        """As `snapshot`, to be released by the caller."""
        path = lock_file(snapshot.group.ns, str(snapshot))
        return await self._acquire(path, f"snapshot {snapshot}", shared=shared, wait_s=wait_s)

    async def _acquire(self, relative: str, what: str, *, shared: bool, wait_s: float) -> HeldLock:
        held: list[tuple[int, Path]] = []
        give_up = trio.current_time() + wait_s
        try:
            # Ours first, then PBS's: the same order everywhere, so two waiters cannot block each other.
            for root in self._roots():
                while (locked := _try_flock(root, relative, shared=shared)) is None:
                    if trio.current_time() >= give_up:
                        raise LockedError(
                            "lock",
                            what,
                            "another backup, restore, mount or removal is using it",
                            "try again when it has ended",
                        )
                    await trio.sleep(_POLL_S)
                if locked[0] >= 0:
                    held.append(locked)
        except BaseException:
            HeldLock(held).release()
            raise
        return HeldLock(held)


def _try_flock(root: LockRoot, relative: str, *, shared: bool) -> tuple[int, Path] | None:
    """The locked descriptor and its path, None if held; descriptor -1 where a reader goes without."""
    path = root.path / relative
    while True:
        with store_errors("make the lock file", path):
            try:
                fd = _open_lock_file(root, relative)
            except OSError as error:
                if shared and error.errno == errno.EROFS:
                    _LOG.info("no lock for %s: the file system is read-only", relative)
                    return -1, path
                raise
        try:
            with store_errors("lock", path):
                if not _flock(fd, shared=shared):
                    os.close(fd)
                    return None
                if _is_still(fd, path):
                    return fd, path
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # removed and perhaps made anew between open and flock: whoever has that one is not us


def _flock(fd: int, *, shared: bool) -> bool:
    """Set a flock without waiting; False if somebody else holds it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_lock_file(root: LockRoot, relative: str) -> int:
    path = root.path / relative
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(2):
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            pass
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, _LOCK_MODE)
        except FileNotFoundError:
            folder = relative.rpartition("/")[0]
            make_folders(root.base, f"{root.folder}/{folder}".rstrip("/"), root.owner)
            continue
        except FileExistsError:
            continue
        os.fchmod(fd, _LOCK_MODE)
        root.owner.own(fd)
        return fd
    return os.open(path, flags | os.O_CREAT, _LOCK_MODE)


def _is_still(fd: int, path: Path) -> bool:
    """True if `path` still names the open file (the "double stat")."""
    try:
        return os.fstat(fd).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _range_lock(fd: int, kind: int, start: int, length: int) -> bool:
    """Set an open-file-description lock without waiting; False if somebody else holds it.

    Whole-file record locks, as PBS takes them, are no substitute where these are missing: they belong to the process,
    so the first session to end would drop those of the others.
    """
    request = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno == errno.EINVAL:
            raise OSError(errno.EINVAL, "the file system has no open-file-description locks") from error
        raise
    return True


def _range_holder(fd: int, kind: int, start: int, length: int) -> int | None:
    """Process id of whoever is in the way of such a lock; -1 if an open-file-description lock is; None if nobody."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    found, _, _, _, pid = _FLOCK.unpack(answer)
    return None if found == fcntl.F_UNLCK else pid


@dataclass(frozen=True, slots=True)
class Writer:
    """A running writer of the store, as registered."""

    pid: int
    host: str
    start: float  #: Unix seconds

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(slots=True)
class ProcessLocker:
    """The store's `.lock` and its registry of writers.

    Writers hold a shared lock on one high byte, garbage collection an exclusive lock on everything below it, so both of
    Fleece run side by side while either excludes PBS's counterpart, which locks the whole file.
    """

    base: Path
    owner: Owner
    _registry: Path = field(init=False)

    def __post_init__(self) -> None:
        self._registry = self.base / ".fleece" / "writers"

    @asynccontextmanager
    async def writer(self, *, wait_s: float) -> AsyncIterator[Writer]:
        """Be a writer while the block runs.

        Raises:
            LockedError: garbage collection of PBS holds the store for longer than `wait_s`.
            StoreError: read-only, no rights, or a file system without locks.
        """
        fd = await self._lock(fcntl.F_RDLCK, _WRITER_BYTE, 1, wait_s, "write to")
        try:
            with suppress(StoreError):
                self.writers()  # what killed ones left goes
            with store_errors("register as a writer of", self.base):
                entry, path, writer = self._register()
            try:
                yield writer
            finally:
                unlink_quietly(path)
                os.close(entry)
        finally:
            os.close(fd)

    @asynccontextmanager
    async def exclusive(self, *, wait_s: float) -> AsyncIterator[float | None]:
        """Be the store's only garbage collection while the block runs; gives the start time of the oldest writer.

        Writers of Fleece may run; the time is None if there is none.

        Raises:
            LockedError: another garbage collection, or a writer of PBS, holds the store for longer than `wait_s`.
        """
        fd = await self._lock(fcntl.F_WRLCK, 0, _WRITER_BYTE, wait_s, "collect garbage in")
        try:
            yield min((writer.start for writer in self.writers()), default=None)
        finally:
            os.close(fd)

    def writers(self) -> list[Writer]:
        """The running writers; entries of dead ones are removed."""
        running = []
        with store_errors("look for writers of", self.base):
            try:
                entries = sorted(self._registry.iterdir())  # not glob, which passes over what it has no right to read
            except FileNotFoundError:
                return []
            for path in entries:
                try:
                    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                except FileNotFoundError:
                    continue
                try:
                    if _flock(fd, shared=False):
                        unlink_quietly(path)
                    else:
                        running.append(_parse_writer(os.pread(fd, 4096, 0), fd))
                finally:
                    os.close(fd)
        return running

    def _register(self) -> tuple[int, Path, Writer]:
        make_folders(self.base, ".fleece/writers", self.owner)
        writer = Writer(os.getpid(), socket.gethostname(), time.time())
        text = json.dumps({"pid": writer.pid, "host": writer.host, "start": writer.start})
        while True:
            path = self._registry / secrets.token_hex(16)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.fchmod(fd, FILE_MODE)
                self.owner.own(fd)
                os.write(fd, text.encode())
                writer = replace(writer, start=min(writer.start, os.fstat(fd).st_mtime))
            except BaseException:
                unlink_quietly(path)
                os.close(fd)
                raise
            if _is_still(fd, path):
                return fd, path, writer
            os.close(fd)  # garbage collection took it for a dead one before the flock

    async def _lock(self, kind: int, start: int, length: int, wait_s: float, what: str) -> int:
        path = self.base / ".lock"
        with store_errors(what, path):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            give_up = trio.current_time() + wait_s
            with store_errors("lock", path):
                while not _range_lock(fd, kind, start, length):
                    if trio.current_time() >= give_up:
                        holders = self._holders(fd, kind, start, length)
                        raise LockedError(what, str(self.base), holders, "try again later")
                    await trio.sleep(_POLL_S)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _holders(self, fd: int, kind: int, start: int, length: int) -> str:
        pid = _range_holder(fd, kind, start, length)
        if pid is not None and pid > 0:
            return f"process {pid} holds its lock (PBS on this host?)"
        writers = ", ".join(map(str, self.writers()))
        return f"its lock is held; running writers: {writers}" if writers else "another garbage collection is running"


def _parse_writer(text: bytes, fd: int) -> Writer:
    # Ages of chunks are times of the file system. So is that of the entry, written once; the writer's own clock may be
    # wrong. An entry that is being written, or is nonsense, still stands for a writer.
    made = os.fstat(fd).st_mtime
    try:
        fields = json.loads(text)
        return Writer(int(fields["pid"]), str(fields["host"])[:64], min(float(fields["start"]), made))
    except (ValueError, KeyError, TypeError, OverflowError):
        return Writer(0, "unknown host", made)


class ChunkLocks:
    """A lock per chunk without a file per chunk: a byte of one file, at the first 62 bits of the digest.

    Used from worker threads. Threads of this process exclude each other by a table, processes by the byte.
    """

    def __init__(self, base: Path, owner: Owner) -> None:
        self._root = LockRoot(base, LOCK_FOLDER, owner)
        self._fd = -1
        self._held: set[int] = set()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, digest: bytes, *, wait_s: float = CHUNK_WAIT_S) -> Iterator[None]:
        """Hold the chunk `digest` while the block runs.

        Raises:
            LockedError: somebody else holds it for longer than `wait_s`.
        """
        offset = _lock_byte(digest)
        give_up = time.monotonic() + wait_s
        with self._changed:
            while offset in self._held:
                if not self._changed.wait(give_up - time.monotonic()):
                    raise chunk_busy(digest)
            fd = self._open()
            self._held.add(offset)
        try:
            while not _range_lock(fd, fcntl.F_WRLCK, offset, 1):
                if time.monotonic() >= give_up:
                    raise chunk_busy(digest)
                time.sleep(0.002)
            try:
                yield
            finally:
                _range_lock(fd, fcntl.F_UNLCK, offset, 1)
        finally:
            with self._changed:
                self._held.remove(offset)
                self._changed.notify_all()

    def try_acquire(self, digest: bytes) -> bool:
        """Take the chunk `digest` without waiting, to be given back by `release`; False if somebody holds it."""
        offset = _lock_byte(digest)
        with self._changed:
            if offset in self._held or not _range_lock(self._open(), fcntl.F_WRLCK, offset, 1):
                return False
            self._held.add(offset)
            return True

    def release(self, digest: bytes) -> None:
        """Give back what `try_acquire` took."""
        offset = _lock_byte(digest)
        with self._changed:
            _range_lock(self._fd, fcntl.F_UNLCK, offset, 1)
            self._held.remove(offset)
            self._changed.notify_all()

    def _open(self) -> int:
        if self._fd < 0:
            self._fd = _open_lock_file(self._root, ".chunks.lock")
        return self._fd

    def close(self) -> None:
        """Close the file; nothing may be held."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _lock_byte(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big") >> 2


def chunk_busy(digest: bytes) -> LockedError:
    """The error for a chunk that stays locked."""
    return LockedError("lock chunk", digest.hex(), "another process holds it", "is one of them stopped?")
