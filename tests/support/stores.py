"""Datastores for tests without paying for 65536 folders each time."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from datastore.files import Owner, create_file, make_folder
from datastore.local_chunks import CHUNK_FOLDER_MODE, fill_chunk_folder

#: Beginning of the names of the folders of pools.
_POOL: Final = "fleece-pool-"
#: Seconds after which a pool that nobody holds was left behind.
_YOUNG_S: Final = 60.0


class StorePool:
    """Lends empty datastores; the chunk folders are emptied and used again.

    Those nothing was ever stored in have the modification time 0: a look at all files would cost half a second.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._free: list[Path] = []
        self._number = 0

    def lend(self) -> Path:
        """The folder of an empty, valid datastore."""
        self._number += 1
        base = self._folder / f"store-{self._number}"
        base.mkdir()
        owner = Owner.of(base)
        create_file(base / ".lock", b"", owner)
        chunks = base / ".chunks"
        if self._free:
            self._free.pop().rename(chunks)
        else:
            try:
                make_folder(chunks, owner, CHUNK_FOLDER_MODE)
                fill_chunk_folder(chunks, owner)
            except OSError:
                shutil.rmtree(base)  # half of one would leave even less room for the next
                raise
            for made in chunks.iterdir():
                _mark_unused(made)
        return base

    def take_back(self, base: Path) -> None:
        """Empty what `lend` gave; a store whose chunk folders were damaged is thrown away."""
        chunks = base / ".chunks"
        count, used = _folders(chunks) if chunks.is_dir() else (0, [])
        if count == 1 << 16:
            for folder in used:
                for path in folder.iterdir():
                    path.unlink()
                _mark_unused(folder)
            kept = self._folder / f"chunks-{self._number}-{len(self._free)}"
            chunks.rename(kept)
            self._free.append(kept)
        shutil.rmtree(base, ignore_errors=True)


@contextmanager
def open_pool(parent: Path | None) -> Iterator[StorePool]:
    """A pool in a new folder of `parent`; what killed test runs have left there is removed first."""
    place = Path(parent or tempfile.gettempdir())
    for left in place.glob(f"{_POOL}*"):
        _remove_if_left(left)
    folder = Path(tempfile.mkdtemp(prefix=_POOL, dir=place))
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield StorePool(folder)
    finally:
        os.close(held)
        shutil.rmtree(folder)


def _remove_if_left(folder: Path) -> None:
    """Remove a pool that no process holds; a young one may be about to be held."""
    try:
        if time.time() - folder.stat().st_mtime < _YOUNG_S:
            return
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return  # another one is quicker
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(held)


def chunk_files(base: Path) -> list[Path]:
    """Every file in the chunk folders of a datastore: what `glob(".chunks/*/*")` finds, sooner."""
    _, used = _folders(base / ".chunks")
    return [path for folder in used for path in folder.iterdir()]


def _folders(chunks: Path) -> tuple[int, list[Path]]:
    """How many folders it has, and those that something was ever stored in (all, if they are no pool's)."""
    count, used = 0, []
    folder = os.open(chunks, os.O_RDONLY | os.O_DIRECTORY)  # for quicker looks at what is in it
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    count += 1
                    if entry.stat(follow_symlinks=False).st_mtime_ns != 0:
                        used.append(chunks / entry.name)
    finally:
        os.close(folder)
    return count, sorted(used)


def _mark_unused(folder: Path) -> None:
    os.utime(folder, ns=(0, 0))
