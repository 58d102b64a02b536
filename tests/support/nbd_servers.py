"""NBD servers for tests: nbdkit as a child, and a scripted one that says whatever a test wants a client to survive."""

import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
import trio

from core.errors import SourceError
from hypervisor.nbd_client import NbdAddress, open_nbd
from tests.support.cache import once

PATIENCE_S: Final = 60.0


@once
def _has_nbdkit_python() -> bool:
    if shutil.which("nbdkit") is None:
        return False
    return subprocess.run(["nbdkit", "--dump-plugin", "python"], capture_output=True, timeout=60).returncode == 0


#: Mark of tests that serve a disk.
NEEDS_NBDKIT_PYTHON: Final = pytest.mark.skipif(
    not _has_nbdkit_python(),
    reason="nbdkit or its plugin for Python is not installed (apt install nbdkit-plugin-python)",
)


@dataclass
class ChildServer:
    """A running server program."""

    address: NbdAddress
    process: "subprocess.Popen[bytes]"
    folder: Path

    def stop_answering(self) -> None:
        """Freeze it: connections stay open, nothing comes."""
        self.process.send_signal(signal.SIGSTOP)
        # Its threads stop one after the other, and one that still runs would answer.
        tasks = Path(f"/proc/{self.process.pid}/task")
        while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()):
            time.sleep(0.001)

    async def kill(self) -> None:
        """End it at once, as a crash does."""
        self.process.kill()
        self.process.wait(PATIENCE_S)


@asynccontextmanager
async def nbdkit(
    plugin: str, *arguments: str, filters: Sequence[str] = (), export: str = ""
) -> AsyncIterator[ChildServer]:
    """nbdkit serving `plugin arguments` behind `filters` on a unix socket while the block runs."""
    if shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed (apt install nbdkit)")
    folder = Path(tempfile.mkdtemp(prefix="fleece-nbdkit-"))
    try:
        socket = folder / "s"
        # In this thread: nbdkit ends with the thread that starts it, and trio's would end when idle for ten seconds.
        process = subprocess.Popen(  # noqa: ASYNC220
            ["nbdkit", "--foreground", "--exit-with-parent", f"--unix={socket}"]
            + [f"--filter={name}" for name in filters]
            + [plugin, *arguments],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with trio.fail_after(PATIENCE_S):
                while not await _listens(socket):
                    assert process.poll() is None, "nbdkit ended at its start"
                    await trio.sleep(0.01)
            yield ChildServer(NbdAddress.unix(socket, export), process, folder)
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(PATIENCE_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _listens(path: Path) -> bool:
    try:
        async with await trio.open_unix_socket(path):
            return True
    except OSError:
        return False


@asynccontextmanager
async def held_by_qemu(path: Path, image_format: str, *, read_only: bool = False) -> AsyncIterator[None]:
    """A qemu-storage-daemon has the image open as a VM would."""
    mode = "on" if read_only else "off"
    node = f"driver={image_format},node-name=t,file.driver=file,file.filename={path},read-only={mode}"
    socket_path = path.parent / "daemon.sock"
    command = ["qemu-storage-daemon", "--blockdev", node, "--nbd-server", f"addr.type=unix,addr.path={socket_path}"]
    command += ["--export", f"type=nbd,id=e,node-name=t,name=x,writable={'off' if read_only else 'on'}"]
    process = await trio.lowlevel.open_process(command)
    try:
        with trio.fail_after(PATIENCE_S):
            while True:
                try:
                    async with open_nbd(NbdAddress.unix(socket_path, "x")):
                        break  # the export is there, and with it the lock
                except SourceError:
                    assert process.poll() is None, "qemu-storage-daemon ended at its start"
                    await trio.sleep(0.01)
        yield
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()


@dataclass(frozen=True)
class Request:
    """What a client asked in the transmission phase."""

    flags: int
    type: int
    cookie: int
    offset: int
    length: int


READ: Final = 0
BLOCK_STATUS: Final = 7
_OPTION_EXPORT_NAME, _OPTION_ABORT, _OPTION_GO, _OPTION_STRUCTURED, _OPTION_SET_META = 1, 2, 7, 8, 10
_REPLY_ACK, _REPLY_INFO, _REPLY_META, _REPLY_UNSUPPORTED = 1, 3, 4, 0x80000001
_CONTEXT_ID: Final = 7

#: Gives the bytes to send for a request; None: stay silent. Raising `ConnectionError` closes the connection.
Answer = Callable[[Request], bytes | None]


def zeros(request: Request) -> bytes:
    """A right answer: everything reads as zeros and is data."""
    if request.type == READ:
        return structured(request, 1, struct.pack(">Q", request.offset) + bytes(request.length))
    if request.type == BLOCK_STATUS:
        return status(request, [(request.length, 0)])
    return structured(request, 0, b"")


def structured(request: Request, kind: int, payload: bytes) -> bytes:
    """One structured reply chunk that is also the last."""
    return struct.pack(">IHHQI", 0x668E33EF, 1, kind, request.cookie, len(payload)) + payload


def status(request: Request, extents: Sequence[tuple[int, int]]) -> bytes:
    """An answer to `block_status`: lengths and flags."""
    entries = b"".join(struct.pack(">II", *extent) for extent in extents)
    return structured(request, 5, struct.pack(">I", _CONTEXT_ID) + entries)


@dataclass
class ScriptedServer:
    """A server that announces and answers what the test says."""

    size: int = 16 * 1024**2
    flags: int = 1 | 1 << 8  # has flags, multi-conn
    blocks: tuple[int, int, int] | None = None  #: minimum, preferred, maximum
    answer: Answer = zeros
    handshake: Callable[[trio.SocketStream], Awaitable[bool]] | None = None  #: False: the test did it all itself
    requests: list[Request] = field(default_factory=list)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[NbdAddress]:
        """Listen on a unix socket while the block runs."""
        folder = Path(tempfile.mkdtemp(prefix="fleece-scripted-"))
        try:
            listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
            await listener.bind(str(folder / "s"))
            listener.listen()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, self._serve, [trio.SocketListener(listener)])
                yield NbdAddress.unix(folder / "s", "")
                nursery.cancel_scope.cancel()
        finally:
            shutil.rmtree(folder)

    async def _serve(self, stream: trio.SocketStream) -> None:
        with suppress(ConnectionError, trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            async with stream:
                if self.handshake is not None and not await self.handshake(stream):
                    return
                await self._negotiate(stream)
                while True:
                    _, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", await self._exactly(stream, 28))
                    if kind == 2:
                        return
                    request = Request(flags, kind, cookie, offset, length)
                    self.requests.append(request)
                    answer = self.answer(request)
                    if answer is not None:
                        await stream.send_all(answer)

    async def _negotiate(self, stream: trio.SocketStream) -> None:
        await stream.send_all(b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3))
        await self._exactly(stream, 4)
        while True:
            _, option, length = struct.unpack(">QII", await self._exactly(stream, 16))
            data = await self._exactly(stream, length)

            async def reply(kind: int, payload: bytes = b"", option: int = option) -> None:
                await stream.send_all(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(payload)) + payload)

            if option == _OPTION_STRUCTURED:
                await reply(_REPLY_ACK)
            elif option == _OPTION_SET_META:
                name_length = struct.unpack_from(">I", data)[0]
                context = data[4 + name_length + 8 :]
                await reply(_REPLY_META, struct.pack(">I", _CONTEXT_ID) + context)
                await reply(_REPLY_ACK)
            elif option == _OPTION_GO:
                await reply(_REPLY_INFO, struct.pack(">HQH", 0, self.size & (2**64 - 1), self.flags))
                if self.blocks is not None:
                    await reply(_REPLY_INFO, struct.pack(">HIII", 3, *self.blocks))
                await reply(_REPLY_ACK)
                return
            elif option == _OPTION_ABORT:
                await reply(_REPLY_ACK)
                raise EOFError
            else:
                await reply(_REPLY_UNSUPPORTED)

    async def _exactly(self, stream: trio.SocketStream, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = await stream.receive_some(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data
