"""A named pipe from which a tar stream can be read once, and which never shows a cut-off stream as a whole one.

A process of its own stands between (`tar_guard.py`), so that this holds even if this one is killed.
"""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from agent.provider import tar_guard
from core.buffers import Buffer
from core.errors import TargetError, os_reason

#: Seconds for the guard to end when everything ends; then it goes on by itself, for `tar_guard.PATIENCE_S` at most.
_END_S: Final = 5.0


class TarPipe:
    """The pipe; made by `open_tar_pipe`."""

    def __init__(self, path: Path, guard: trio.Process, control: int) -> None:
        self.path: Final = path
        self._guard, self._control = guard, control

    async def reader(self) -> None:
        """Wait until somebody reads.

        Raises:
            TargetError: the guard has ended.
        """
        assert self._guard.stdout is not None
        if not await self._guard.stdout.receive_some(1):
            raise self._gone()

    async def send(self, data: Buffer) -> None:
        """Write a part of the stream.

        Raises:
            TargetError: who reads has gone.
        """
        assert self._guard.stdin is not None
        try:
            await self._guard.stdin.send_all(data)
        except trio.BrokenResourceError as error:
            raise self._gone() from error

    async def finish(self) -> None:
        """Say that the stream is whole, and wait until all of it was taken.

        Raises:
            TargetError: it was not.
        """
        assert self._guard.stdin is not None
        with suppress(BrokenPipeError):
            os.write(self._control, b"1")
        await self._guard.stdin.aclose()
        if await self._guard.wait():
            raise self._gone()

    def _gone(self) -> TargetError:
        return TargetError("hand over", str(self.path), "who reads the archive has gone")


@asynccontextmanager
async def open_tar_pipe(path: Path) -> AsyncIterator[TarPipe]:
    """A new pipe at `path` while the block runs; without `TarPipe.finish`, whoever reads from it fails.

    Raises:
        TargetError: it cannot be made.
    """
    try:
        os.mkfifo(path, 0o600)
        theirs, control = os.pipe()
    except OSError as error:
        raise TargetError("make the pipe", str(path), os_reason(error)) from error
    try:
        # In a session of its own: what kills this process with its group must not reach it.
        guard = await trio.lowlevel.open_process(
            [sys.executable, "-I", "-S", tar_guard.__file__, str(path), str(theirs)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(theirs,),
            cwd="/", env={}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        os.close(control)
        raise TargetError("start what writes to", str(path), os_reason(error)) from error
    finally:
        os.close(theirs)
    try:
        yield TarPipe(path, guard, control)
    finally:
        with suppress(BrokenPipeError):
            os.write(control, b"0")
        os.close(control)
        await _end(guard)


async def _end(guard: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        assert guard.stdin is not None
        assert guard.stdout is not None
        await guard.stdin.aclose()
        await guard.stdout.aclose()
        with trio.move_on_after(_END_S):
            await guard.wait()
