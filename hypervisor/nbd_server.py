"""Serving a disk over NBD: nbdkit does it, and asks this process for the bytes.

A maintained server has the protocol right, for every client there is, and its filters come for free (`cow` makes a
read-only disk writable for as long as it is served). The plugin (`nbdkit_plugin.py`) is thin: keys, cache and
repository stay in this process, so that nothing secret gets into another one, and nbdkit may bring any Python.
docs/nbd.md, "How a backup is served".
"""

import contextlib
import errno
import logging
import math
import shutil
import signal
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Protocol

import trio

from core.buffers import Buffer
from core.errors import FleeceError, SourceError, UsageError
from core.limits import in_io_thread
from core.nursery import open_nursery
from hypervisor.children import Child, running
from hypervisor.errors import NbdServerError
from hypervisor.nbd_address import NbdAddress
from hypervisor.nbd_client import NbdConnection
from hypervisor.nbd_endpoint import Endpoint, Public, greets, listening
from hypervisor.qemu_tools import find_tool, prepare_overlay, private_folder, remove_private

_LOG = logging.getLogger(__name__)

#: Seconds until nbdkit must answer; it takes 0.1.
START_TIMEOUT_S: Final = 30.0
#: Bytes of one request; nbdkit itself takes no more.
_MAX_REQUEST: Final = 64 * 1024**2
#: Extents of one answer; a client asks on.
_MAX_EXTENTS: Final = 4096
#: Seconds until the same complaint is logged again, and how many different ones are remembered.
_LOG_AGAIN_S: Final = 60.0
_MAX_COMPLAINTS: Final = 1000
#: What nbdkit calls a range that reads as zeros and takes no space.
_HOLE_AND_ZERO: Final = 3
_REQUEST: Final = struct.Struct(">cQQ")
_ANSWER: Final = struct.Struct(">II")
_EXTENT: Final = struct.Struct(">QQI")
_PLUGIN: Final = Path(__file__).with_name("nbdkit_plugin.py")


class ServedDisk(Protocol):
    """A disk to be served; for any number of tasks at once."""

    @property
    def size(self) -> int:
        """Bytes; does not change."""
        ...

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes from `offset` on; the range lies inside the disk.

        Raises:
            FleeceError: they cannot be read; other ranges are not concerned.
        """
        ...

    def zeros(self, offset: int, length: int) -> Sequence[tuple[int, bool]]:
        """Lengths of the parts of the range, in order, and whether each is known to be zeros.

        May end before the range does, but not before its first part.
        """
        ...


@asynccontextmanager
async def serve_disk(
    disk: ServedDisk, *, where: str, overlay: bool = False, at: Endpoint | None = None, extents: bool = True
) -> AsyncIterator[NbdAddress]:
    """Serve `disk` while the block runs, by default on a private unix socket; if this process is killed nbdkit ends.

    Clients should have left when the block ends; they are cut off.

    Args:
        disk: what is served, read-only.
        where: it, for messages.
        overlay: clients can write; what they write is lost with the end of the block. It lies in a file without a name
            in `TMPDIR` (else /var/tmp).
        at: where clients find it.
        extents: tell clients what is zeros. Without, no client can ask, as QEMU must not that copies from here: where
            its question fails, it takes the range for copied.

    Raises:
        NbdServerError: nbdkit or its plugin for Python is missing, it ends, or nobody can listen there.
    """
    program = await in_io_thread(find_nbdkit, where)
    folder, claim = await in_io_thread(private_folder)
    try:
        listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await listener.bind(str(folder / "own"))
        listener.listen(64)
        complaints = _Complaints()
        async with open_nursery() as nursery:
            nursery.start_soon(
                trio.serve_listeners, lambda stream: _serve(stream, disk, complaints), [trio.SocketListener(listener)]
            )
            line = [program, "--foreground", "--newstyle"]
            line += ["--filter=cow"] if overlay else ["--readonly"]
            line += [] if extents else ["--no-sr"]
            if at is not None and at.tls_psk is not None:
                line += ["--tls=require", f"--tls-psk={at.tls_psk.absolute()}"]
            elif at is None:
                line += [f"--unix={folder / 'nbd'}"]
            line += ["python", str(_PLUGIN), f"socket={folder / 'own'}", f"size={disk.size}"]
            # An orderly end would answer what is asked with errors: who only loses the connection may wait for another.
            end = signal.SIGKILL
            async with listening(at) as public, _served(line, public, folder / "nbd", where, end) as address:
                yield address
            nursery.cancel_scope.cancel()
    finally:
        remove_private(folder, claim)  # two entries: no thread, so that cancellation cannot come between


@asynccontextmanager
async def serve_overlay(
    disk: ServedDisk, path: Path, identity: str, *, where: str, at: Endpoint | None = None
) -> AsyncIterator[NbdAddress]:
    """Serve `disk` while the block runs, for reading and writing; what is written lies in the qcow2 file `path`.

    The file is made if it is not there, and of use for this disk only: its header says so.

    Args:
        disk: what is served.
        path: the file of what is written.
        identity: what tells the content of `disk` from any other.
        where: it, for messages.
        at: where clients find it; None: a private unix socket.

    Raises:
        NbdServerError: a program is missing or ends, or nobody can listen there.
        TargetError: the file cannot be made.
        DiskInUseError: it is in use.
        UsageError: it was made for another disk, or TLS is asked for.
    """
    if at is not None and at.tls_psk is not None:
        raise UsageError("serve", where, "TLS is not possible with an overlay that is kept")
    program = await in_io_thread(find_tool, "qemu-nbd", NbdServerError)
    file = await in_io_thread(path.absolute)
    folder, claim = await in_io_thread(private_folder)
    try:
        async with serve_disk(disk, where=where) as below:
            await prepare_overlay(path, disk.size, identity, Path(below.socket))
            options = {
                "driver": "qcow2",
                "discard": "unmap",
                "file.driver": "file",
                "file.filename": str(file),
            }
            image = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
            line = [program, "--persistent", "--shared=16", "--image-opts"]
            line += [f"--socket={folder / 'nbd'}"] if at is None else []
            end = signal.SIGTERM  # it has something to write
            async with listening(at) as public, _served([*line, image], public, folder / "nbd", where, end) as address:
                yield address
    finally:
        remove_private(folder, claim)


@asynccontextmanager
async def _served(
    line: Sequence[str], public: Public | None, private: Path, where: str, on_our_death: signal.Signals
) -> AsyncIterator[NbdAddress]:
    """A server with the command line `line` serves while the block runs."""
    listener = None if public is None else public.listener
    async with running(line, fault=NbdServerError, listener=listener, on_our_death=on_our_death) as child:
        if public is not None:
            public.listener.close()  # it has its own: if it ends, nobody is to wait for an answer
        address = NbdAddress.unix(private, "") if public is None else public.address
        await _until_ready(child, address, where)
        async with open_nursery() as watching:  # over before the server is told to end
            watching.start_soon(_watch, child, Path(line[0]).name, where)
            yield address
            watching.cancel_scope.cancel()


def find_nbdkit(where: str) -> str:
    """Path of nbdkit.

    Raises:
        NbdServerError: it is not installed.
    """
    program = shutil.which("nbdkit")
    if program is None:
        raise NbdServerError("serve", where, "nbdkit is not installed", "apt install nbdkit nbdkit-plugin-python")
    return program


async def _until_ready(child: Child, address: NbdAddress, where: str) -> None:
    deadline = trio.current_time() + START_TIMEOUT_S
    pause_s = 0.005
    while True:
        ended = child.code is not None
        if await in_io_thread(_answers, address):
            return
        if ended:
            raise _failed(await child.last_words(), where)
        if trio.current_time() > deadline:
            raise NbdServerError("serve", where, f"the server was not ready after {START_TIMEOUT_S:.0f} s")
        await trio.sleep(pause_s)
        pause_s = min(0.1, pause_s * 1.5)


def _answers(address: NbdAddress) -> bool:
    """Whether a server is ready there."""
    if address.uri.startswith("nbds"):  # we have no key: that it greets must do
        return greets(address.uri, START_TIMEOUT_S)
    connection = NbdConnection(address)
    try:
        connection.connect()
    except SourceError:
        return False  # not listening yet, or already gone
    finally:
        connection.close()
    return True


def _failed(words: str, where: str) -> NbdServerError:
    if "Failed to get" in words and "lock" in words:
        return NbdServerError("serve", where, "its overlay is in use", "stop who has it open, or use another one")
    missing = "python" in words and "cannot open" in words
    why = "nbdkit's plugin for Python is not installed" if missing else words or "the server ended without a word"
    return NbdServerError("serve", where, why, "apt install nbdkit-plugin-python" if missing else "")


async def _watch(child: Child, program: str, where: str) -> None:
    """Say that the server has ended, which it never should before the block does."""
    code = await child.wait()
    words = await child.last_words() or "no word"
    raise NbdServerError("serve", where, f"{program} ended with exit code {code}: {words}")


# -- what the plugin asks ---------------------------------------------------------------------------------------------


class _Complaints:
    """Logs what cannot be read: clients that try again and again are told each time, the log once in a while."""

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}

    def log(self, text: str) -> None:
        """Log `text`, unless that was done less than `_LOG_AGAIN_S` ago."""
        now = trio.current_time()
        if now < self._logged.get(text, -math.inf) + _LOG_AGAIN_S:
            return
        if len(self._logged) >= _MAX_COMPLAINTS:
            self._logged.clear()
        self._logged[text] = now
        _LOG.error("%s", text)


async def _serve(stream: trio.SocketStream, disk: ServedDisk, complaints: _Complaints) -> None:
    """Answer one connection of the plugin."""
    with contextlib.suppress(trio.BrokenResourceError, EOFError):
        async with stream:
            while True:
                kind, offset, length = _REQUEST.unpack(await _exactly(stream, _REQUEST.size))
                number, answer = await _answer(disk, complaints, kind, offset, length)
                await stream.send_all(_ANSWER.pack(number, len(answer)))
                if len(answer):
                    await stream.send_all(answer)


async def _answer(
    disk: ServedDisk, complaints: _Complaints, kind: bytes, offset: int, length: int
) -> tuple[int, Buffer]:
    """Error number, and data or words."""
    if not length or offset + length > disk.size:
        return errno.EINVAL, b"outside of the disk"
    if kind == b"e":
        return 0, _extents(disk, offset, length)
    if kind != b"r" or length > _MAX_REQUEST:
        return errno.EINVAL, b"no such request"
    try:
        return 0, await disk.read(offset, length)
    except FleeceError as error:
        complaints.log(str(error))
        return errno.EIO, str(error).encode("utf-8", "replace")[:4000]


def _extents(disk: ServedDisk, offset: int, length: int) -> bytes:
    packed = []
    for size, zero in disk.zeros(offset, length)[:_MAX_EXTENTS]:
        packed.append(_EXTENT.pack(offset, size, _HOLE_AND_ZERO if zero else 0))
        offset += size
    return b"".join(packed)


async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data
