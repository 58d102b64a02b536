"""Datastores for tests without paying for 65536 folders each time."""

import os
import shutil
from pathlib import Path

from datastore.files import Owner, create_file, make_folder
from datastore.local_chunks import CHUNK_FOLDER_MODE, fill_chunk_folder


class StorePool:
    """Lends empty datastores; the chunk folders are emptied and used again."""

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
        # The mark by which `take_back` knows which folders were used.
        for entry in os.scandir(chunks):
            os.utime(entry.path, ns=(0, 0))
        return base

    def take_back(self, base: Path) -> None:
        """Empty what `lend` gave; a store whose chunk folders were damaged is thrown away."""
        chunks = base / ".chunks"
        kept = self._folder / f"chunks-{self._number}-{len(self._free)}"
        count = 0
        for entry in os.scandir(chunks) if chunks.is_dir() else ():
            count += entry.is_dir(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False) and entry.stat().st_mtime_ns != 0:
                for name in Path(entry.path).iterdir():
                    name.unlink()
        if count == 1 << 16:
            chunks.rename(kept)
            self._free.append(kept)
        shutil.rmtree(base, ignore_errors=True)
