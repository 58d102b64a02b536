"""Disk targets: what an image is restored to.

Nothing is overwritten that its owner may still want: a target with content needs `force`, and one that is too small,
mounted or in use is refused always. A file that this run has made is removed when the restore fails; what was there
before never is.

    target                  made by this run   zeros
    new file                yes                are holes already
    empty file              no                 are holes already
    file with content       no                 holes are punched, else zeros written
    block device            no                 the device's own command, else zeros written
    NBD export              no                 the server's own command, else zeros written
    qcow2, new or replaced  yes                are unallocated already
"""

import errno
import fcntl
import os
import select
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from core.buffers import Buffer
from core.disks import DiskTarget
from core.errors import TargetError, os_reason
from core.limits import in_io_thread
from core.units import MIB
from hypervisor.errors import DiskInUseError
from hypervisor.holes import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from hypervisor.image_files import image_format, unlock
from hypervisor.nbd_client import TIMEOUT_S, NbdAddress, NbdPool, is_nbd_uri, open_nbd
from hypervisor.qemu_tools import create_qcow2, find_tool, serve_image
from hypervisor.target_files import GUARD_SIZE, ZEROS, TargetFile, guards, refuse_content, space_hint, too_small

#: The first gives space back (on a device only if it can and then reads zeros), by the second the kernel writes zeros
#: where it must.
_ZERO_MODES: Final = (KEEP_SIZE | PUNCH_HOLE, KEEP_SIZE | ZERO_RANGE)
#: `fallocate` says so where the file system or device has no such command, or not for this alignment.
_NO_SUCH_ZEROS: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM)
#: Bytes of one such command: the kernel may have to write them, and cancellation waits for it.
_ZERO_STEP: Final = 64 * MIB
_STREAM_PIECE: Final = 256 * 1024
_STREAM_WAIT_MS: Final = 250
#: Bytes a pipe always takes without blocking once it polls as writable.
_PIPE_BUF: Final = 4096


class FileTarget:
    """A raw file or a block device, written as it is; made by `open_target`."""

    def __init__(self, fd: int, where: str, size: int, *, reads_zero: bool) -> None:
        self._fd, self._where, self._size, self._reads_zero = fd, where, size, reads_zero
        self._zero_modes = list(_ZERO_MODES)
        self.touched = False  #: something was written

    @property
    def size(self) -> int:
        """Bytes that can be written."""
        return self._size

    @property
    def reads_zero(self) -> bool:
        """True for a file that had no content before."""
        return self._reads_zero

    async def write(self, offset: int, data: Buffer) -> None:
        """Write `data` at `offset`; cancellation waits for it.

        Raises:
            TargetError: no space, an I/O error, or beyond the end.
        """
        await in_io_thread(self._write, offset, memoryview(data).cast("B"))

    async def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros: nothing to do in a file without content, else by a hole, else by writing.

        Raises:
            TargetError: as `write`.
        """
        self._check(offset, length)
        if not self._reads_zero and length:
            await in_io_thread(self._zero, offset, length)

    async def flush(self) -> None:
        """Make everything written durable.

        Raises:
            TargetError: the data did not reach the disk.
        """
        await in_io_thread(self._flush)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size:
            why = f"{offset}..{offset + length} lies outside its {self._size} bytes"
            raise TargetError("write to", self._where, why)

    def _write(self, offset: int, view: memoryview) -> None:
        self._check(offset, len(view))
        self.touched = True
        position = 0
        while position < len(view):
            try:
                position += os.pwrite(self._fd, view[position:], offset + position)
            except OSError as error:
                raise self._failed(error, offset + position) from error

    def _zero(self, offset: int, length: int) -> None:
        self.touched = True
        end = offset + length
        while offset < end:
            step = min(_ZERO_STEP, end - offset)
            if not self._zero_by_command(offset, step):
                step = min(len(ZEROS), step)
                self._write(offset, memoryview(ZEROS)[:step])
            offset += step
            trio.from_thread.check_cancelled()

    def _zero_by_command(self, offset: int, length: int) -> bool:
        """True if file system or device know a command for it."""
        for mode in tuple(self._zero_modes):
            try:
                fallocate(self._fd, mode, offset, length)
            except OSError as error:
                if error.errno not in _NO_SUCH_ZEROS:
                    raise self._failed(error, offset) from error
                if error.errno != errno.EINVAL:  # that may come from this range's alignment alone
                    self._zero_modes.remove(mode)
            else:
                return True
        return False

    def _flush(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failed(error, None) from error

    def _failed(self, error: OSError, offset: int | None) -> TargetError:
        where = "" if offset is None else f" at {offset}"
        return TargetError("write to", self._where, f"{os_reason(error)}{where}", space_hint(error))


class NbdTarget:
    """An NBD export; made by `open_target`."""

    def __init__(self, pool: NbdPool, *, reads_zero: bool) -> None:
        self._pool, self._reads_zero = pool, reads_zero
        self._patching = trio.Lock()  # two writes may share a block

    @property
    def size(self) -> int:
        """Bytes of the export."""
        return self._pool.size

    @property
    def reads_zero(self) -> bool:
        """True for an image that this run has just created."""
        return self._reads_zero

    async def write(self, offset: int, data: Buffer) -> None:
        """Write `data` at `offset`.

        Raises:
            TargetError: the server has no space, fails, is gone, or does not answer.
        """
        view = memoryview(data).cast("B")
        first, last = self._whole_blocks(offset, len(view))
        if first > last:  # inside one block
            await self._patch(offset, view)
            return
        if offset < first:
            await self._patch(offset, view[: first - offset])
        if first < last:
            await self._pool.write(first, view[first - offset : last - offset])
        if last < offset + len(view):
            await self._patch(last, view[last - offset :])

    async def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros by the server's own command; by writing them if it has none.

        Raises:
            TargetError: as `write`.
        """
        if self._reads_zero or not length:
            return
        first, last = self._whole_blocks(offset, length)
        if not self._pool.can_zero or first >= last:
            await self._write_zeros(offset, length)
            return
        await self._write_zeros(offset, first - offset)
        await self._pool.zero(first, last - first)
        await self._write_zeros(last, offset + length - last)

    async def _write_zeros(self, offset: int, length: int) -> None:
        for start in range(0, length, len(ZEROS)):
            await self.write(offset + start, memoryview(ZEROS)[: length - start])

    def _whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        """Where the range's whole blocks begin and end; the end is before the beginning if there is no boundary."""
        end, block = offset + length, self._pool.block
        if offset < 0 or end > self.size:
            raise TargetError(
                "write to", str(self._pool.address), f"{offset}..{end} lies outside its {self.size} bytes"
            )
        return -(-offset // block) * block, end // block * block

    async def _patch(self, offset: int, data: memoryview) -> None:
        """Write less than a block of the server, such as the end of an image; the rest of the block stays."""
        start = offset // self._pool.block * self._pool.block
        block = bytearray(self._pool.block)
        async with self._patching:
            await self._pool.read_into(start, block)
            block[offset - start : offset - start + len(data)] = data
            await self._pool.write(start, block)

    async def flush(self) -> None:
        """Make everything written durable, if the server can.

        Raises:
            TargetError: as `write`.
        """
        await self._pool.flush()


class StreamTarget:
    """A pipe, socket or open file that takes an image from its first to its last byte, such as standard output.

    It cannot go back, so it is no `DiskTarget`: the caller writes in order, one call at a time. Unlike a plain write,
    one into a full pipe can be cancelled.
    """

    def __init__(self, fd: int, where: str = "-") -> None:
        """Use `fd`, which stays the caller's, and stays blocking: whoever shares it would not expect otherwise.

        Raises:
            TargetError: it is a terminal.
        """
        if os.isatty(fd):
            raise TargetError("write to", where, "it is a terminal", "redirect it into a file or a pipe")
        self._fd, self._where = fd, where
        self._own_fd: int | None = None
        mode = os.fstat(fd).st_mode
        self._piece = _PIPE_BUF if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode) else _STREAM_PIECE
        if stat.S_ISFIFO(mode):
            # Where it can be opened once more, this description is ours alone and need not block.
            with suppress(OSError):
                self._own_fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._piece = _STREAM_PIECE
                fcntl.fcntl(self._own_fd, fcntl.F_SETPIPE_SZ, MIB)  # may be beyond the user's limit

    async def write(self, data: Buffer) -> None:
        """Write all of `data`; cancelled, any part of it may be written.

        Raises:
            TargetError: the reader went away, no space, or an I/O error.
        """
        await in_io_thread(self._write, memoryview(data).cast("B"))

    async def zero(self, length: int) -> None:
        """Write `length` zeros.

        Raises:
            TargetError: as `write`.
        """

        def fill() -> None:
            for start in range(0, length, len(ZEROS)):
                self._write(memoryview(ZEROS)[: length - start])

        await in_io_thread(fill)

    async def flush(self) -> None:
        """Make a file durable; a pipe has taken everything already.

        Raises:
            TargetError: the data did not reach the disk.
        """
        await in_io_thread(self._sync)

    def close(self) -> None:
        """Give up what was opened beside the caller's descriptor."""
        if self._own_fd is not None:
            os.close(self._own_fd)
            self._own_fd = None

    def _write(self, view: memoryview) -> None:
        fd = self._fd if self._own_fd is None else self._own_fd
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        position = 0
        while position < len(view):
            while not poll.poll(_STREAM_WAIT_MS):
                trio.from_thread.check_cancelled()
            try:
                position += os.write(fd, view[position : position + self._piece])
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise self._error("who reads it went away") from error
            except OSError as error:
                raise self._error(os_reason(error), space_hint(error)) from error

    def _sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):  # no file
                raise self._error(os_reason(error), space_hint(error)) from error

    def _error(self, why: str, hint: str = "") -> TargetError:
        return TargetError("write to", self._where, why, hint)


@asynccontextmanager
async def open_target(
    spec: str, size: int, *, force: bool = False, format: str | None = None, timeout_s: float = TIMEOUT_S
) -> AsyncIterator[DiskTarget]:
    """The disk that `spec` names, ready to take an image of `size` bytes: a file, a block device or an NBD URI.

    A file is qcow2 if `format` says so, or without one if its name ends in `.qcow2`; anything else is raw. If the
    block raises, a file made by this run is removed, and one that was there and empty is empty again. When it ends
    well a file has exactly the image's size, and all is durable.

    Raises:
        TargetError: too small, or it cannot be made or written; content that needs `force` to be overwritten.
        DiskInUseError: mounted, or open somewhere else (with `force` too).
        UsageError: a format or URI that is not supported.
    """
    if size < 1:
        raise TargetError("restore to", spec, "the image is empty")
    async with AsyncExitStack() as stack:
        if is_nbd_uri(spec):
            yield await stack.enter_async_context(_open_nbd(spec, size, force=force, timeout_s=timeout_s))
        elif image_format(Path(spec), format) == "qcow2":
            yield await stack.enter_async_context(_open_qcow2(Path(spec), size, force=force, timeout_s=timeout_s))
        else:
            yield await stack.enter_async_context(_open_raw(Path(spec), size, force=force))


@asynccontextmanager
async def _open_nbd(spec: str, size: int, *, force: bool, timeout_s: float) -> AsyncIterator[NbdTarget]:
    async with open_nbd(NbdAddress.parse(spec), writable=True, timeout_s=timeout_s) as pool:
        if pool.size < size:
            raise too_small(spec, pool.size, size)
        if not force:
            for offset in guards(pool.size):
                start = bytearray(min(GUARD_SIZE, pool.size - offset))
                await pool.read_into(offset, start)
                refuse_content(spec, start, offset)
        target = NbdTarget(pool, reads_zero=False)
        yield target
        await target.flush()


@asynccontextmanager
async def _open_qcow2(path: Path, size: int, *, force: bool, timeout_s: float) -> AsyncIterator[NbdTarget]:
    for tool in ("qemu-img", "qemu-nbd"):  # before anything is overwritten
        await in_io_thread(find_tool, tool, TargetError)
    file = await in_io_thread(TargetFile.open, path, force)
    overwritten = False
    try:
        if file.is_device:
            raise TargetError("restore to", str(path), "a qcow2 image on a block device is not supported", "use raw")
        # QEMU's tools lock it from here on; two locks would be in each other's way.
        unlock(file.fd)
        overwritten = True
        await create_qcow2(path, size)
        async with (
            serve_image(path, "qcow2", writable=True, fault=TargetError) as address,
            open_nbd(address, writable=True, timeout_s=timeout_s) as pool,
        ):
            if pool.size < size:
                raise too_small(str(path), pool.size, size)
            target = NbdTarget(pool, reads_zero=True)
            yield target
            await target.flush()
        await in_io_thread(file.keep)
    except BaseException as error:
        # What is left is half an image and must not look whole; an older one was overwritten by the first step. But
        # an image that somebody else took meanwhile is theirs.
        file.discard(emptied=overwritten and not isinstance(error, DiskInUseError))
        raise
    finally:
        file.close()


@asynccontextmanager
async def _open_raw(path: Path, size: int, *, force: bool) -> AsyncIterator[FileTarget]:
    file = await in_io_thread(TargetFile.open, path, force)
    target: FileTarget | None = None
    try:
        await in_io_thread(file.prepare, size, force)
        target = FileTarget(file.fd, str(path), size, reads_zero=not file.is_device and file.old_size == 0)
        yield target
        if not file.is_device:
            await in_io_thread(file.resize, size)
        await target.flush()
        await in_io_thread(file.keep)
    except BaseException:
        file.discard(emptied=False, untouched=target is None or not target.touched)
        raise
    finally:
        file.close()
