"""What a QEMU on trial inherits: sockets, files without a name, memory; it opens nothing of the host by itself."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from core.errors import os_reason
from hypervisor.boot_signs import MAX_PICTURE
from hypervisor.errors import BootTrialError
from hypervisor.machine import Backing


def scratch_folder() -> str:
    """Where what the guest writes lies."""
    return os.environ.get("TMPDIR") or "/var/tmp"


def nameless() -> int:
    """A file without a name in the folder for temporary files."""
    folder = scratch_folder()
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise BootTrialError("make", f"a temporary file in {folder}", os_reason(error), "set TMPDIR") from error


def connected(path: str) -> int:
    """A socket connected to the server at `path`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise BootTrialError("connect to", path, os_reason(error)) from error
    return sock.detach()


@contextmanager
def open_ends() -> Iterator["Ends"]:
    """Sockets and a canvas; everything is closed with the block."""
    with ExitStack() as stack:
        yield Ends(stack)


class Ends:
    """Descriptors that QEMU gets, and our ends of its sockets; closed with the stack."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._theirs: list[socket.socket] = []
        self._sets: list[tuple[int, int]] = []
        self.inherited: list[int] = []
        self.overlays: list[int] = []
        self.our_qmp, self.qmp = self._pair()
        self.our_serial, self.serial = self._pair()
        self.our_agent, self.agent = self._pair()
        self._picture = os.memfd_create("fleece-screen", os.MFD_CLOEXEC)
        self.keep(self._picture, inherit=False)
        self._canvas = os.open(f"/proc/self/fd/{self._picture}", os.O_WRONLY | os.O_CLOEXEC)
        self.keep(self._canvas)
        self.canvas = self.in_set(self._canvas)

    def _pair(self) -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair()
        self._stack.callback(ours.close)
        self._stack.callback(theirs.close)
        ours.setblocking(False)
        self._theirs.append(theirs)
        self.inherited.append(theirs.fileno())
        return ours, theirs.fileno()

    def keep(self, descriptor: int, *, inherit: bool = True) -> None:
        """Close it in the end."""
        self._stack.callback(os.close, descriptor)
        if inherit:
            self.inherited.append(descriptor)

    def in_set(self, descriptor: int) -> str:
        """The file name by which QEMU opens it."""
        number = len(self._sets) + 1
        self._sets.append((number, descriptor))
        return f"/dev/fdset/{number}"

    def sets(self) -> list[str]:
        """Options of QEMU that make these names."""
        return [word for number, fd in self._sets for word in ("-add-fd", f"fd={fd},set={number}")]

    def file(self, content: bytes, node: str) -> Backing:
        """A file in memory as a block node."""
        memory = os.memfd_create(node, os.MFD_CLOEXEC)
        self.keep(memory)
        os.write(memory, content)
        below = {"driver": "file", "filename": self.in_set(memory)}
        return Backing([{"driver": "raw", "node-name": node, "file": below}], node)

    def copy(self, path: Path) -> Path:
        """A copy of a file of the host, for a QEMU that may not read it itself."""
        memory = os.memfd_create("fleece-kernel", os.MFD_CLOEXEC)
        self.keep(memory)
        try:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    os.write(memory, piece)
        except OSError as error:
            raise BootTrialError("read", str(path), os_reason(error)) from error
        return Path(f"/proc/self/fd/{memory}")

    def close_theirs(self) -> None:
        """Close our copies of its sockets, so that its end is seen."""
        for one in self._theirs:
            one.close()

    def clear_canvas(self) -> None:
        """Before each picture: QEMU writes on where it stopped."""
        os.lseek(self._canvas, 0, os.SEEK_SET)
        os.ftruncate(self._picture, 0)

    def read_canvas(self) -> bytes:
        """The picture that was drawn."""
        return os.pread(self._picture, MAX_PICTURE, 0)

    def space(self) -> int:
        """Bytes of disk space that the overlays take."""
        return sum(os.fstat(one).st_blocks * 512 for one in self.overlays)
