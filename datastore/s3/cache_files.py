"""The chunk files of a local cache, and what each says about the object in the bucket.

    absent         nothing is known
    empty          a marker: the object exists; the access time is the chunk's age for garbage collection
    not empty      a cached chunk, and a marker as well
    <hex>.using    a running garbage collection saw the chunk in an index, but no file of it
    <hex>.N.bad    the object was found corrupt, and lies under that name

A chunk file appears only when the object is there for certain, and under the chunk's lock (R20 to R22). These are
system calls for worker threads.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import trio

from core.buffers import Buffer
from datastore.blob import MAX_ENCODED_CHUNK
from datastore.errors import StoreError
from datastore.files import (
    FILE_MODE,
    Owner,
    make_folders,
    read_file,
    replace_file,
    store_errors,
    temporary_path,
    touch,
    unlink_existing,
    unlink_quietly,
)
from datastore.s3.keys import BAD_NUMBERS

#: Where files are written before they get their names; the same file system as the chunks.
TEMPORARY_FOLDER: Final = ".fleece/tmp"
_FOLDERS: Final = 1 << 16


class CachedFile(NamedTuple):
    """One chunk file."""

    digest: bytes
    size: int  #: bytes, 0 for a marker
    atime: float  #: Unix seconds


class CacheFiles:
    """The files below `.chunks` of one cache folder."""

    def __init__(self, base: Path, owner: Owner) -> None:
        self.base: Final = base
        self.folder: Final = str(base / ".chunks")
        self._owner = owner

    def path(self, digest: bytes) -> str:
        """Where the chunk `digest` lies."""
        name = digest.hex()
        return f"{self.folder}/{name[:4]}/{name}"

    def using(self, digest: bytes) -> str:
        """The mark of a chunk that is used, but not known to be there."""
        return f"{self.path(digest)}.using"

    def bad(self, digest: bytes, number: int) -> str:
        """The file that stands for a corrupt copy."""
        return f"{self.path(digest)}.{number}.bad"

    def size(self, digest: bytes) -> int | None:
        """Bytes of the chunk file; None if there is none.

        Raises:
            StoreError: something that is no file, or it cannot be looked at.
        """
        path = self.path(digest)
        with store_errors("look at chunk", path):
            try:
                found = os.stat(path, follow_symlinks=False)  # noqa: PTH116 - hot path, no Path objects
            except FileNotFoundError:
                return None
        if not stat.S_ISREG(found.st_mode):
            raise StoreError("use the chunk", path, "something that is no file is in its place", "remove it")
        return found.st_size

    def touch(self, digest: bytes) -> int | None:
        """Set the access time to now; returns the size, None if there is no file. Errors as `size`."""
        size = self.size(digest)
        if size is not None and not touch_file(self.path(digest)):
            return None
        return size

    def read(self, digest: bytes) -> bytes | None:
        """The content, empty for a marker; None if there is no file.

        Raises:
            StoreError: unreadable, longer than any chunk, or no file.
        """
        path = self.path(digest)
        with store_errors("read chunk", path):
            try:
                return read_file(path, limit=MAX_ENCODED_CHUNK)
            except FileNotFoundError:
                return None

    def write(self, digest: bytes, parts: Sequence[Buffer]) -> None:
        """Put the chunk in place, or a marker if there are no `parts`; its access time is now.

        Raises:
            OSError: no space, no rights; the file that was there stays.
        """
        make_folders(self.base, TEMPORARY_FOLDER, self._owner)
        temporary = temporary_path(self.base / TEMPORARY_FOLDER / digest.hex())
        replace_file(Path(self.path(digest)), parts, self._owner, temporary=temporary)

    def mark(self, digest: bytes) -> None:
        """See to it that there is a file, and that its access time is now.

        Raises:
            StoreError: no space, no rights.
        """
        with store_errors("mark chunk", self.path(digest)):
            if not touch_file(self.path(digest)):
                make_empty(self.path(digest), self._owner)
            unlink_existing(self.using(digest))

    def note_use(self, digest: bytes) -> bool:
        """For garbage collection: touch the file, or make a `.using`; False if there was no file.

        Raises:
            StoreError: no space, no rights.
        """
        with store_errors("mark chunk", self.path(digest)):
            if touch_file(self.path(digest)):
                return True
            make_empty(self.using(digest), self._owner)
        return False

    def empty(self, digest: bytes) -> int:
        """Make a marker of a cached chunk: in place, which takes no space and leaves the access time as it is.

        Somebody who reads the file meanwhile finds it shorter than it began, and asks the bucket.

        Returns:
            bytes that it had.

        Raises:
            StoreError: no rights.
        """
        with store_errors("drop the cached chunk", self.path(digest)):
            try:
                fd = os.open(self.path(digest), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return 0
            try:
                size = os.fstat(fd).st_size
                os.ftruncate(fd, 0)
                return size
            finally:
                os.close(fd)

    def remove(self, digest: bytes) -> None:
        """Remove the chunk file and a `.using`; fine if there are none."""
        with store_errors("remove chunk", self.path(digest)):
            unlink_existing(self.path(digest))
            unlink_existing(self.using(digest))

    def set_aside(self, digest: bytes, number: int) -> None:
        """The object has become the corrupt copy `number`: an empty file stands for it from now on.

        Raises:
            StoreError: no space, no rights.
        """
        with store_errors("set the corrupt chunk aside", self.path(digest)):
            if not touch_file(self.bad(digest, number)):
                make_empty(self.bad(digest, number), self._owner)
            unlink_existing(self.path(digest))

    def free_numbers(self, digest: bytes) -> list[int]:
        """Numbers of corrupt copies without a local file, the lowest first."""
        return [number for number in range(BAD_NUMBERS) if not os.path.lexists(self.bad(digest, number))]

    def was_set_aside(self, digest: bytes) -> bool:
        """True if there is a corrupt copy of the chunk."""
        return len(self.free_numbers(digest)) < BAD_NUMBERS

    def scan(self, start: int, count: int) -> Iterator[CachedFile]:
        """The chunk files in the folders `start` to `start + count - 1`, without `.using` and `.bad`.

        Raises:
            StoreError: a folder cannot be read.
        """
        for number in range(start, min(start + count, _FOLDERS)):
            folder = f"{number:04x}"
            for entry in list_folder(f"{self.folder}/{folder}"):
                name = entry.name
                if len(name) != 64 or not name.startswith(folder):
                    continue
                try:
                    digest, found = bytes.fromhex(name), entry.stat(follow_symlinks=False)
                except (ValueError, FileNotFoundError):
                    continue
                if stat.S_ISREG(found.st_mode):
                    yield CachedFile(digest, found.st_size, found.st_atime)

    def remove_temporary_files(self, before: float) -> None:
        """Remove what killed processes left in the folder for temporary files before `before` (Unix seconds)."""
        try:
            with os.scandir(self.base / TEMPORARY_FOLDER) as entries:
                old = [
                    Path(entry.path)
                    for entry in entries
                    if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < before
                ]
        except OSError:
            return  # there is none, or somebody else is at work in it
        for path in old:
            unlink_quietly(path)


def list_folder(path: str) -> list[os.DirEntry[str]]:
    """The entries of a chunk folder, none if it is missing; in a worker thread, which may be cancelled here.

    Raises:
        StoreError: it cannot be read.
    """
    trio.from_thread.check_cancelled()
    with store_errors("list chunks in", path):
        try:
            with os.scandir(path) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []


def touch_file(path: str) -> bool:
    """Set the access time to now; False if there is no file.

    Raises:
        OSError: not ours.
    """
    try:
        touch(path)
    except FileNotFoundError:
        return False
    return True


def make_empty(path: str, owner: Owner) -> None:
    """Make an empty file; one that is there stays.

    Raises:
        OSError: no space, no rights.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    except FileExistsError:
        return
    try:
        os.fchmod(fd, FILE_MODE)
        owner.own(fd)
    finally:
        os.close(fd)
