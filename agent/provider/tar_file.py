"""A tar file for a restore by the hypervisor, which reads it more than once and takes regular files only.

It has no name, so that nothing of it is left whatever becomes of the session; a link leads to its descriptor.
"""

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Final

from core.buffers import Buffer
from core.errors import TargetError, os_reason
from core.limits import in_io_thread

#: Zeros of at least one such part take no space.
_HOLE: Final = 64 << 10
_ZEROS: Final = bytes(_HOLE)


class TarFile:
    """The file; made by `open_tar_file`."""

    def __init__(self, file: IO[bytes], folder: str, link: Path) -> None:
        self._file, self._folder, self._link = file, folder, link

    async def write(self, data: Buffer) -> None:
        """Append `data`.

        Raises:
            TargetError: there is no more space, or the like.
        """
        await in_io_thread(self._write, data)

    def _write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), _HOLE):
                piece = view[start : start + _HOLE]
                if piece == _ZEROS:
                    self._file.seek(_HOLE, os.SEEK_CUR)
                else:
                    self._file.write(piece)
        except OSError as error:
            raise self._failure(error) from error

    async def finish(self) -> Path:
        """Say that it is whole; returns the path by which it can be read.

        Raises:
            TargetError: as `write`.
        """

        def finish() -> None:
            try:
                self._file.truncate(self._file.tell())
                self._file.flush()
                self._link.symlink_to(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
            except OSError as error:
                raise self._failure(error) from error

        await in_io_thread(finish)
        return self._link

    def _failure(self, error: OSError) -> TargetError:
        hint = "set fleece-container-restore of the storage to directory, which needs no space"
        return TargetError("write the files of the container to", self._folder, os_reason(error), hint)


@asynccontextmanager
async def open_tar_file(link: Path) -> AsyncIterator[TarFile]:
    """A new file in TMPDIR, else /var/tmp, while the block runs; `link` leads to it once it is whole.

    Raises:
        TargetError: it cannot be made.
    """
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        file = tempfile.TemporaryFile(dir=folder, buffering=1 << 20)  # noqa: SIM115 - closed below
    except OSError as error:
        raise TargetError("make a file in", folder, os_reason(error)) from error
    try:
        yield TarFile(file, folder, link)
    finally:
        with suppress(OSError), file:  # it may have something left to write, and no space
            os.unlink(link)  # noqa: PTH108 - a single system call
