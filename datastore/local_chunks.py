"""Chunks in a local folder: `.chunks/abcd/<digest>`.

Rules of insertion and their reasons: docs/formats.md, "Chunk store".
"""

import binascii
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Final

import trio

from core.buffers import Buffer
from core.errors import FormatError, os_reason
from core.limits import in_io_thread
from core.nursery import open_nursery
from core.progress import Progress
from datastore.blob import MAX_ENCODED_CHUNK, Blob, BlobKind
from datastore.errors import ChunkNotFoundError, StoreError
from datastore.files import (
    FILE_MODE,
    Owner,
    SyncLevel,
    create_unnamed,
    link_unnamed,
    make_folders,
    read_file,
    replace_file,
    settle_folder,
    store_errors,
    sync_path,
    temporary_path,
    touch,
    touch_in,
    unlink_quietly,
    write_all,
)
from datastore.gc_status import GcStatus
from datastore.interface import ChunkStore, PutResult, SweepGuard
from datastore.locks import ChunkLocks, ProcessLocker, Writer
from datastore.sweep import Sweep

CHUNK_FOLDER_MODE: Final = 0o750
#: Seconds between the two looks of the access-time test: time stamps of file systems are as coarse as this.
_ACCESS_TIME_WAIT_S: Final = 1.0
#: Names for set-aside chunks run from `.0.bad` to `.9.bad`.
_BAD_NAMES: Final = 10
#: A byte for every time that a chunk was about to be set aside, or has been: its length is what counts.
_SET_ASIDE: Final = ".fleece/set-aside"
#: Folders in `.chunks`.
_FOLDERS: Final = 1 << 16
#: Names that a sweep lists before it may look at them, while the access-time test waits (100 bytes each).
_LISTED_EARLY: Final = 100_000
#: Folders listed, and swept, by one call in a worker thread.
_FOLDERS_AT_ONCE: Final = 512
_PLAIN: Final = (BlobKind.PLAIN.value, BlobKind.PLAIN_ZSTD.value)
_ENCRYPTED: Final = (BlobKind.ENCRYPTED.value, BlobKind.ENCRYPTED_ZSTD.value)
#: Threads that sweep. Names in memory are quick in one already; a disk that seeks likes more.
_SWEEPERS: Final = 4


class LocalChunkStore:
    """The chunk store of a local datastore; see `datastore.interface.ChunkStore`."""

    def __init__(self, base: Path, owner: Owner, sync_level: SyncLevel) -> None:
        self._base = base
        self._folder = str(base / ".chunks")
        self._owner = owner
        self._sync = sync_level is SyncLevel.FILE
        self._locker = ProcessLocker(base, owner)
        self._locks = ChunkLocks(base, owner)

    def path(self, digest: bytes) -> str:
        """Where the chunk `digest` lies."""
        name = digest.hex()
        return f"{self._folder}/{name[:4]}/{name}"

    async def insert(self, digest: bytes, blob: Blob, *, cache: bool = True, folder: str | None = None) -> PutResult:
        """See `ChunkStore.insert`."""
        return await in_io_thread(lambda: self.insert_blocking(digest, blob, folder=folder))

    async def read(self, digest: bytes, *, origin: bool = False) -> Blob:
        """See `ChunkStore.read`."""
        return await in_io_thread(self.read_blocking, digest)

    async def read_many(self, digests: Sequence[bytes], *, origin: bool = False) -> list[Blob]:
        """See `ChunkStore.read_many`."""
        return await in_io_thread(lambda: [self.read_blocking(digest) for digest in digests])

    async def touch(self, digest: bytes) -> bool:
        """See `ChunkStore.touch`."""
        return await in_io_thread(self._touch, self.path(digest))

    async def mark(self, digests: Buffer) -> list[bytes]:
        """See `ChunkStore.mark`."""
        return await in_io_thread(self._mark, digests)

    async def missing(self, digests: Buffer) -> list[bytes]:
        """See `ChunkStore.missing`."""
        return await in_io_thread(self._mark, digests)

    async def sweep(
        self,
        min_atime: int,
        oldest_writer: int,
        guard: SweepGuard,
        status: GcStatus,
        progress: Progress,
        *,
        dry_run: bool = False,
        allow_empty: bool = False,
    ) -> None:
        """See `ChunkStore.sweep`."""
        # Listing 65536 folders takes half a second, which the access-time test waits anyway.
        listed: list[tuple[str, list[str]]] = []
        names = start = 0
        while start < _FOLDERS and names < _LISTED_EARLY:
            found = await in_io_thread(self._list, start)
            listed += found
            names += sum(len(inside) for _, inside in found)
            start += _FOLDERS_AT_ONCE
        await guard.ready()
        sweep = Sweep(self._folder, self._locks, min_atime, oldest_writer, guard, dry_run)

        def work() -> Iterator[list[tuple[str, list[str]]] | int]:
            for at in range(0, len(listed), _FOLDERS_AT_ONCE):
                yield listed[at : at + _FOLDERS_AT_ONCE]
            yield from range(start, _FOLDERS, _FOLDERS_AT_ONCE)

        jobs = work()
        with progress.task("sweep", _FOLDERS, "folders") as task:
            task.advance(start - len(listed))

            async def run() -> None:
                for job in jobs:
                    counted = GcStatus()
                    try:
                        folders = await in_io_thread(self._list, job) if isinstance(job, int) else job
                        await in_io_thread(sweep.folders, folders, counted)
                    finally:
                        status.add(counted)
                    task.advance(_FOLDERS_AT_ONCE if isinstance(job, int) else len(job))

            async with open_nursery() as nursery:
                for _ in range(_SWEEPERS):
                    nursery.start_soon(run)
        if not dry_run:
            await in_io_thread(self._remove_temporary_files, min_atime)

    async def quarantine(self, digest: bytes, wrong: Callable[[Blob], bool] | None = None) -> str | None:
        """See `ChunkStore.quarantine`."""
        return await in_io_thread(self._quarantine, digest, wrong)

    async def times_set_aside(self) -> int:
        """See `ChunkStore.times_set_aside`."""
        return await in_io_thread(self.count_set_aside)

    def disk_order(self, digests: Sequence[bytes]) -> list[int]:
        """See `ChunkStore.disk_order`: by inode, as PBS; those that cannot be looked at last."""

        def inode(position: int) -> int:
            try:
                return os.stat(self.path(digests[position]), follow_symlinks=False).st_ino  # noqa: PTH116 - hot
            except OSError:
                return 1 << 64

        return sorted(range(len(digests)), key=inode)

    def writer(self, *, wait_s: float) -> AbstractAsyncContextManager[Writer]:
        """See `ChunkStore.writer`."""
        return self._locker.writer(wait_s=wait_s)

    def exclusive(self, *, wait_s: float) -> AbstractAsyncContextManager[float | None]:
        """See `ChunkStore.exclusive`."""
        return self._locker.exclusive(wait_s=wait_s)

    async def check_access_times(
        self, zero_digest: bytes, zero_blob: Blob, *, task_status: "trio.TaskStatus[float]" = trio.TASK_STATUS_IGNORED
    ) -> None:
        """See `ChunkStore.check_access_times`."""
        await check_access_times(self, self._base, self.path(zero_digest), zero_digest, zero_blob, task_status)

    def close(self) -> None:
        """Close the descriptors that are kept."""
        self._locks.close()

    # The rest runs in worker threads.

    @property
    def blocks_briefly(self) -> bool:
        """See `BlockingChunkStore.blocks_briefly`: not with an fsync for each chunk."""
        return not self._sync

    def insert_blocking(self, digest: bytes, blob: Blob, *, folder: str | None = None) -> PutResult:
        """See `BlockingChunkStore.insert_blocking`."""
        path = self.path(digest)
        with store_errors("store chunk", path), self._locks.hold(digest):
            while True:
                try:
                    found = os.stat(path, follow_symlinks=False)  # noqa: PTH116 - hot path, no Path objects
                    if self._keep(path, found, blob):
                        touch(path)
                        return PutResult(True, found.st_size)
                except FileNotFoundError:
                    # New, or set aside this very moment by PBS's verify, which does not know our locks.
                    if self._write_new(path, blob, folder):
                        return PutResult(False, len(blob))
                    continue  # a writer that does not know our locks was quicker: look at its file
                self._replace(path, blob, folder)
                return PutResult(False, len(blob))

    def _keep(self, path: str, found: os.stat_result, blob: Blob) -> bool:
        """True if the file that is there stays, False if `blob` replaces it."""
        if not stat.S_ISREG(found.st_mode):
            raise StoreError("store chunk", path, "something that is no file is in its place", "remove it")
        if found.st_size == 0 or (found.st_size > len(blob) and not blob.kind.encrypted):
            return False
        magic = _magic(path)
        if magic not in (_ENCRYPTED if blob.kind.encrypted else _PLAIN):
            # The disk has lost it, in a power cut for example. Or it is plain or encrypted, and what comes is not: the
            # key is part of an encrypted chunk's digest. One under that of a plain chunk is a lie, which a client may
            # have told so that others lack what they store later.
            if blob.kind.encrypted and magic in _PLAIN:
                raise _another_chunk(path)
            return False
        if found.st_size == len(blob):
            return True  # equal length is taken for equal content, as in PBS; verify is there to find out
        if not _is_sound(path):
            return False  # cut off, by a power cut or a repair of the file system
        if magic == BlobKind.ENCRYPTED.value and blob.kind is BlobKind.ENCRYPTED:
            raise _another_chunk(path)
        return True

    def _write_new(self, path: str, blob: Blob, temporary: str | None) -> bool:
        folder = Path(path).parent
        try:
            fd = create_unnamed(folder)
        except FileNotFoundError:
            raise StoreError(
                "store chunk",
                path,
                "its folder is missing",
                "is this a datastore? all of .chunks/0000 to ffff must exist",
            ) from None
        if fd is None:
            self._replace(path, blob, temporary)
            return True
        try:
            os.fchmod(fd, FILE_MODE)
            self._owner.own(fd)
            write_all(fd, (blob.header, blob.payload))
            if self._sync:
                os.fsync(fd)
            try:
                link_unnamed(fd, Path(path))
            except FileExistsError:
                return False
        finally:
            os.close(fd)
        if self._sync:
            sync_path(folder)
        return True

    def _replace(self, path: str, blob: Blob, folder: str | None) -> None:
        # Not in .chunks itself: nothing is ever deleted there by its name, so a left-over would stay for ever.
        if folder is None:
            folder = ".fleece/tmp"
            make_folders(self._base, folder, self._owner)
        temporary = temporary_path(self._base / folder / os.path.basename(path))  # noqa: PTH119
        replace_file(Path(path), (blob.header, blob.payload), self._owner, sync=self._sync, temporary=temporary)

    def read_blocking(self, digest: bytes) -> Blob:
        """See `BlockingChunkStore.read_blocking`."""
        path = self.path(digest)
        try:
            data = read_file(path, limit=MAX_ENCODED_CHUNK)
        except FileNotFoundError:
            raise ChunkNotFoundError("read chunk", digest.hex(), "it is not in the store") from None
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise FormatError("read chunk", digest.hex(), os_reason(error)) from error
            raise StoreError("read chunk", path, os_reason(error)) from error
        return Blob.parse(data, where=digest.hex())

    def _touch(self, path: str) -> bool:
        with store_errors("touch chunk", path):
            try:
                touch(path)
            except FileNotFoundError:
                return False
        return True

    def _mark(self, digests: Buffer) -> list[bytes]:
        names = binascii.hexlify(digests)
        missing = []
        with store_errors("mark chunks in", self._folder):
            folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for start in range(0, len(names), 64):
                    name = names[start : start + 64]
                    path = b"%b/%b" % (name[:4], name)
                    if not touch_in(folder, path):
                        missing.append(bytes.fromhex(name.decode()))
                        for number in range(_BAD_NAMES):
                            touch_in(folder, b"%b.%d.bad" % (path, number))
            finally:
                os.close(folder)
        return missing

    def _list(self, start: int) -> list[tuple[str, list[str]]]:
        """The names in `_FOLDERS_AT_ONCE` folders from number `start` on, by folder; not the empty and missing ones."""
        found = []
        with store_errors("list chunks in", self._folder):
            for number in range(start, start + _FOLDERS_AT_ONCE):
                folder = f"{number:04x}"
                try:
                    with os.scandir(f"{self._folder}/{folder}") as entries:
                        names = [entry.name for entry in entries]
                except (FileNotFoundError, NotADirectoryError):
                    continue
                if names:
                    found.append((folder, names))
        return found

    def _remove_temporary_files(self, before: int) -> None:
        """Remove what killed processes left in the folder for temporary files before `before` (Unix seconds)."""
        try:
            with os.scandir(self._base / ".fleece/tmp") as entries:
                old = [
                    Path(entry.path)
                    for entry in entries
                    if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < before
                ]
        except OSError:
            return  # there is none, or somebody else is at work in it
        for path in old:
            unlink_quietly(path)

    def _bad_names(self, digest: bytes) -> list[str]:
        return [f"{self.path(digest)}.{number}.bad" for number in range(_BAD_NAMES)]

    def _quarantine(self, digest: bytes, wrong: Callable[[Blob], bool] | None) -> str | None:
        path = self.path(digest)
        with store_errors("set the corrupt chunk aside", path), self._locks.hold(digest):
            if wrong is not None:
                try:
                    if not wrong(self.read_blocking(digest)):
                        return None
                except ChunkNotFoundError:
                    return None
                except FormatError:
                    pass  # no blob at all
            names = self._bad_names(digest)
            bad = next((name for name in names if not os.path.lexists(name)), names[-1])
            self.note_set_aside()
            try:
                os.rename(path, bad)  # noqa: PTH104 - str paths throughout
            except FileNotFoundError:
                return None
            # Once more, for a backup that looked in between and found the chunk in its place.
            with suppress(OSError):
                self.note_set_aside()
            return os.path.basename(bad)  # noqa: PTH119

    def count_set_aside(self) -> int:
        """See `ChunkStore.times_set_aside`."""
        with store_errors("look at", self._base / _SET_ASIDE):
            try:
                return (self._base / _SET_ASIDE).stat().st_size
            except FileNotFoundError:
                return 0

    def note_set_aside(self) -> None:
        """Let `times_set_aside` grow.

        Raises:
            OSError: no space, no rights.
        """
        make_folders(self._base, ".fleece", self._owner)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._base / _SET_ASIDE, flags, FILE_MODE)
        try:
            os.fchmod(fd, FILE_MODE)
            self._owner.own(fd)
            os.write(fd, b"\n")
        finally:
            os.close(fd)


def fill_chunk_folder(chunks: Path, owner: Owner) -> None:
    """Make the 65536 folders of the empty folder `chunks`.

    Raises:
        OSError: no space, no rights, or one exists.
    """
    folder = os.open(chunks, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number in range(1 << 16):
            name = f"{number:04x}"
            os.mkdir(name, CHUNK_FOLDER_MODE, dir_fd=folder)
            settle_folder(name, owner, CHUNK_FOLDER_MODE, dir_fd=folder)
    finally:
        os.close(folder)


async def check_access_times(
    store: ChunkStore,
    base: Path,
    path: str,
    zero_digest: bytes,
    zero_blob: Blob,
    task_status: "trio.TaskStatus[float]" = trio.TASK_STATUS_IGNORED,
) -> None:
    """See `ChunkStore.check_access_times`, of a store that has the zero chunk as the file `path`."""
    await store.insert(zero_digest, zero_blob)
    for attempt in range(2):
        with store_errors("use the chunk store", base):
            before = await in_io_thread(os.stat, path)
            if attempt == 0:
                task_status.started(before.st_atime_ns / 1e9)
            await trio.sleep(_ACCESS_TIME_WAIT_S)
            await store.touch(zero_digest)
            after = await in_io_thread(os.stat, path)
        if before.st_ino != after.st_ino and attempt == 0:
            continue  # somebody replaced it meanwhile
        if before.st_ino == after.st_ino and before.st_atime_ns < after.st_atime_ns:
            return
    raise StoreError(
        "use the chunk store",
        str(base),
        "touching a file does not change its access time",
        "garbage collection needs that; use another file system",
    )


def _another_chunk(path: str) -> StoreError:
    why, hint = "another chunk is stored under its digest", "'fleece verify' tells whether it is sound"
    return StoreError("store chunk", path, why, hint)


def _is_sound(path: str) -> bool:
    """True if a chunk's file can be read and its CRC is right."""
    try:
        Blob.parse(read_file(path, limit=MAX_ENCODED_CHUNK), where=path).check(where=path)
    except FormatError:
        return False
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EFBIG):
            raise
        return False
    return True


def _magic(path: str) -> bytes | None:
    """The first bytes of a chunk's file; None if the disk cannot read them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 8)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None
    finally:
        os.close(descriptor)
