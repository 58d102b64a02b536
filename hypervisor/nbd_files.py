"""An NBD export as a file, by libnbd's `nbdfuse`: for programs that want an open file, and hosts without `/dev/nbdX`.

Needs no kernel module but fuse, and no root. docs/nbd.md, "Files".
"""

import contextlib
import os
import shutil
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import trio

from core.errors import os_reason
from core.limits import in_io_thread, io_limiter
from hypervisor.children import Child, running
from hypervisor.errors import NbdDeviceError
from hypervisor.nbd_address import NbdAddress

#: Seconds for `nbdfuse` to connect and mount; it takes 0.1.
START_TIMEOUT_S: Final = 30.0
#: Seconds for an unmount that is in nobody's way.
_UNMOUNT_TIMEOUT_S: Final = 5.0


def find_nbdfuse(where: str) -> str:
    """Path of `nbdfuse`.

    Raises:
        NbdDeviceError: it, or what it mounts with, is not installed.
    """
    for program, package in (("nbdfuse", "libnbd-bin (Debian 13: nbdfuse)"), ("fusermount3", "fuse3")):
        if shutil.which(program) is None:
            raise NbdDeviceError(
                "make the file", where, f"{program} is not installed", f"apt install it with the package {package}"
            )
    if not Path("/dev/fuse").exists():
        raise NbdDeviceError("make the file", where, "/dev/fuse is missing", "modprobe fuse")
    return shutil.which("nbdfuse") or "nbdfuse"


@asynccontextmanager
async def mounted_file(address: NbdAddress, path: Path, size: int, *, read_only: bool = True) -> AsyncIterator[Child]:
    """The export at `address`, of `size` bytes, as the new file `path` while the block runs; gives its `nbdfuse`.

    However the block ends, the file is gone; who has it open still gets errors from then on. If this process is killed
    its `nbdfuse` ends, and leaves an empty file.

    Args:
        address: of the export.
        path: absolute; must not be there yet, its folder must.
        size: bytes that it must have.
        read_only: writes are refused; else they, and holes that are punched, reach the server.

    Raises:
        NbdDeviceError: `nbdfuse` is missing or fails, with its words, or the file is there already.
    """
    program = await in_io_thread(find_nbdfuse, str(path))
    try:
        await in_io_thread(lambda: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)))
    except OSError as error:
        raise NbdDeviceError("make the file", str(path), os_reason(error)) from error
    try:
        line = [program, *(["--readonly"] if read_only else []), os.fspath(path), str(address)]
        async with running(line, fault=NbdDeviceError) as child:
            try:
                await _wait_for(path, size, child)
                yield child
            finally:
                with trio.CancelScope(shield=True):
                    await _unmount(path, child)
    finally:
        # Two system calls: no thread, so that cancellation cannot come between.
        _remove(path)


@contextmanager
def open_handle(path: Path, *, read_only: bool = True) -> Iterator[int]:
    """A descriptor of the file at `path` that passes the page cache by, as programs expect to be handed.

    Raises:
        NbdDeviceError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise NbdDeviceError("open", str(path), os_reason(error)) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_mounted(path: Path) -> bool:
    """Whether something is mounted on the file itself; never asks what is mounted, which may hang."""
    wanted = os.path.realpath(path.parent) + "/" + path.name
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    return any(_unescaped(line.split()[4]) == os.fsencode(wanted) for line in lines)


def _remove(path: Path) -> None:
    """Remove the empty file below the mount; if that is still there, nothing can be done."""
    with contextlib.suppress(OSError):
        if not is_mounted(path):
            path.unlink()


def _unescaped(field: bytes) -> bytes:
    for escaped, letter in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        field = field.replace(escaped, letter)
    return field


async def _wait_for(path: Path, size: int, child: Child) -> None:
    deadline = trio.current_time() + START_TIMEOUT_S
    pause_s = 0.005
    while True:
        ended = child.code is not None
        if await in_io_thread(is_mounted, path):
            # The answer comes from another process, so the thread may have to be left behind.
            with trio.move_on_at(deadline):
                found = await trio.to_thread.run_sync(
                    lambda: path.stat().st_size, abandon_on_cancel=True, limiter=io_limiter()
                )
                if found != size:
                    raise NbdDeviceError("make the file", str(path), f"it has {found} bytes, not {size}")
                return
        if ended:
            words = await child.last_words()
            raise NbdDeviceError("make the file", str(path), words or f"nbdfuse ended with exit code {child.code}")
        if trio.current_time() > deadline:
            raise NbdDeviceError("make the file", str(path), f"nbdfuse was not ready after {START_TIMEOUT_S:.0f} s")
        await trio.sleep(pause_s)
        pause_s = min(0.1, pause_s * 1.5)


async def _unmount(path: Path, child: Child) -> None:
    """Take the mount away; if it is in use from under its users, who get errors then."""
    for how in ([], ["-z"]):
        if not await in_io_thread(is_mounted, path):
            break
        await unmount(path, *how)
        with trio.move_on_after(_UNMOUNT_TIMEOUT_S if not await in_io_thread(is_mounted, path) else 0):
            await child.wait()
    await child.stop()


async def remove_left(path: Path) -> bool:
    """Remove what a killed process has left of the file at `path`, mounted or not; True if there was something.

    A file with content is somebody else's.

    Raises:
        NbdDeviceError: the mount is still there.
    """
    mounted = await in_io_thread(is_mounted, path)
    if mounted:
        await unmount(path, "-z")
        if await in_io_thread(is_mounted, path):
            raise NbdDeviceError("remove", str(path), "it cannot be unmounted", f"fusermount3 -u -z {path}")

    def remove() -> bool:
        with contextlib.suppress(OSError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_size == 0:
                path.unlink()
                return True
        return mounted

    return await in_io_thread(remove)


async def unmount(path: Path, *how: str) -> None:
    """`fusermount3 -u`, which says nothing if it could not."""
    program = await in_io_thread(shutil.which, "fusermount3")
    if program is None:
        return
    async with running([program, "-u", "-q", *how, "--", str(path)], fault=NbdDeviceError) as helper:
        with trio.move_on_after(_UNMOUNT_TIMEOUT_S):
            await helper.wait()
