"""Datastores for tests without paying for 65536 folders each time."""

import os
import shutil
from pathlib import Path

from datastore.files import Owner, create_file, make_folder
from datastore.local_chunks import CHUNK_FOLDER_MODE, fill_chunk_folder


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
            make_folder(chunks, owner, CHUNK_FOLDER_MODE)
            fill_chunk_folder(chunks, owner)
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
