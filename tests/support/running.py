"""One QEMU or qemu-storage-daemon with disks, for one test: bounded in time, gone at the end however the test ends.

Two QMP sockets: `qmp` is for Fleece alone (a socket serves one client at a time), the test talks over one of its own.
Sockets lie in a short folder of their own, since a path of more than 107 bytes is refused. `timeout` from coreutils is
the parent, so even a killed test run leaves nothing behind for long.
"""

import json
import os
import shutil
import signal
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import Any, Final, Literal, Self

import trio

from tests.support.guest import GuestControl, SmallGuest
from tests.support.qemu_binaries import QemuBinary

#: Seconds after which a QEMU is killed, whatever it is doing.
LIFETIME_S: Final = 300
#: Signals by which a program ends itself when it finds a fault of its own.
_CRASHES: Final = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}
#: Seconds for a start, a QMP answer or an orderly end on a busy machine.
PATIENCE_S: Final = 60.0

Bus = Literal["virtio-blk", "virtio-scsi", "ide", "nvme"]
_DEVICE: Final = {
    "virtio-blk": "virtio-blk-pci",
    "virtio-scsi": "scsi-hd,bus=scsi0.0",
    "ide": "ide-hd,bus=ide.{number}",
    "nvme": "nvme,serial={id}",
}


class QmpRefused(Exception):  # noqa: N818 - the test decides whether it is an error
    """QEMU's answer to a command was an error; the text is QEMU's."""


@dataclass(frozen=True)
class VmDisk:
    """One disk of a QEMU under test."""

    path: Path
    id: str = "disk0"  #: of the device, and with `fmt-` in front of the block node (not with `form` "drive")
    bus: Bus = "virtio-blk"
    format: Literal["raw", "qcow2"] = "raw"
    form: Literal["blockdev", "drive"] = "blockdev"
    read_only: bool = False
    discard: bool = True  #: the guest's discards reach the file
    device_options: str = ""  #: more options of the device, `iothread=io0`
    blockdev_options: dict[str, Any] = field(default_factory=dict)  #: more options of the format node

    @property
    def node(self) -> str:
        """Name of the format node."""
        return f"fmt-{self.id}"

    def blockdev(self) -> dict[str, Any]:
        """The argument of `blockdev-add` that opens it."""
        discard = "unmap" if self.discard else "ignore"
        return {
            "driver": self.format,
            "node-name": self.node,
            "read-only": self.read_only,
            "discard": discard,
            "file": {"driver": "file", "filename": str(self.path), "read-only": self.read_only, "discard": discard},
            **self.blockdev_options,
        }

    def arguments(self, number: int) -> list[str]:
        """Options for QEMU's command line; `number` is its place among the disks."""
        device = _DEVICE[self.bus].format(number=number, id=self.id)
        more = f",{self.device_options}" if self.device_options else ""
        if self.form == "blockdev":
            return [
                "-blockdev",
                json.dumps(self.blockdev()),
                "-device",
                f"{device},id={self.id},drive={self.node}{more}",
            ]
        flags = f"read-only={'on' if self.read_only else 'off'},discard={'unmap' if self.discard else 'ignore'}"
        drive = f"file={self.path},format={self.format},if=none,id=drive-{self.id},{flags}"
        return ["-drive", drive, "-device", f"{device},id={self.id},drive=drive-{self.id}{more}"]


class OwnQmp:
    """A QMP client with nothing but what tests need."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = b""
        self._number = 0
        self._one_at_a_time = trio.Lock()
        self.events: list[dict[str, Any]] = []

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Connect and negotiate."""
        qmp = cls(await trio.open_unix_socket(path))
        try:
            with trio.fail_after(PATIENCE_S):
                await qmp._message()
                await qmp.execute("qmp_capabilities")
        except BaseException:
            await qmp.aclose()
            raise
        return qmp

    @property
    def peer_pid(self) -> int:
        """Process id of QEMU."""
        credentials = self._stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, _, _ = struct.unpack("3i", credentials)
        return int(pid)

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """What QEMU answers; events that come meanwhile are added to `events`.

        Raises:
            QmpRefused: QEMU answered with an error.
            EOFError: QEMU ended.
        """
        message = await self.ask(command, arguments)
        if "error" in message:
            raise QmpRefused(f"{command}: {message['error']['desc']}")
        return message["return"]

    async def ask(self, command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole answer, `return` or `error`; events that come meanwhile are added to `events`.

        Raises:
            EOFError: QEMU ended.
        """
        async with self._one_at_a_time:
            self._number += 1
            request = {"execute": command, "id": self._number, **({"arguments": arguments} if arguments else {})}
            with trio.fail_after(PATIENCE_S):
                try:
                    await self._stream.send_all(json.dumps(request).encode() + b"\n")
                    while (message := await self._message()).get("id") != self._number:
                        self.events.append(message)
                except trio.BrokenResourceError as error:
                    raise EOFError("QEMU ended") from error
        return message

    async def aclose(self) -> None:
        """Hang up."""
        await self._stream.aclose()

    async def _message(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            data = await self._stream.receive_some(65536)
            if not data:
                raise EOFError("QEMU ended")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


@dataclass
class RunningProcess:
    """What QEMU and qemu-storage-daemon have in common."""

    folder: Path  #: short, holds the sockets and logs; removed at the end
    qmp: Path  #: the socket for Fleece
    process: trio.Process  #: `timeout`, the parent of the one that is meant
    pid: int  #: of the one that is meant
    own_qmp: OwnQmp

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run one QMP command over the test's own socket.

        Raises:
            EOFError: QEMU ended, or only this connection; the text says which, and what it printed.
        """
        try:
            return await self.own_qmp.execute(command, arguments)
        except EOFError as error:
            await trio.sleep(0.2)
            raise EOFError(f"{error}; {self.state()}") from error

    def state(self) -> str:
        """Whether it runs, or how it has ended, and what it printed."""
        status = self.process.poll()
        return f"{'it runs' if status is None else f'ended with {status}'}, printed: {self.log()[-2000:]!r}"

    def log(self) -> str:
        """All that the process has printed."""
        return (self.folder / "log").read_text(errors="replace")

    async def nodes(self) -> set[str]:
        """Names of all block nodes, for comparing before and after; generated ones are left out."""
        listed = await self.execute("query-named-block-nodes", {"flat": True})
        return {node["node-name"] for node in listed if not node["node-name"].startswith("#")}

    async def bitmaps(self, node: str, *, marks: bool = False) -> list[dict[str, Any]]:
        """The dirty bitmaps of a node, as QEMU lists them; without Fleece's marks of sizes unless they are wanted."""
        for listed in await self.execute("query-named-block-nodes", {"flat": True}):
            if listed["node-name"] == node:
                return [
                    bitmap
                    for bitmap in listed.get("dirty-bitmaps", ())
                    if marks or not str(bitmap.get("name")).startswith("fleece-size-")
                ]
        raise KeyError(node)

    async def exports(self) -> list[dict[str, Any]]:
        """The block exports, as QEMU lists them."""
        return list(await self.execute("query-block-exports"))

    def alive(self) -> bool:
        """True while it runs."""
        return self.process.poll() is None

    async def kill(self) -> None:
        """End it at once, as a crash does, and wait until it is gone."""
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)
        with trio.fail_after(PATIENCE_S):
            await self.process.wait()

    async def quit(self) -> None:
        """Let it end in order (it writes persistent bitmaps), and wait until it is gone."""
        with suppress(EOFError):  # it may be gone before it answers
            await self.own_qmp.execute("quit")
        with trio.fail_after(PATIENCE_S):
            await self.process.wait()


@dataclass
class RunningQemu(RunningProcess):
    """A QEMU with disks; without a guest it stays where `-S` leaves it and the test plays the guest by `qemu_io`."""

    binary: QemuBinary
    disks: Sequence[VmDisk]
    guest: GuestControl | None = None  #: None without a guest

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        binary: QemuBinary,
        disks: Sequence[VmDisk],
        *,
        guest: SmallGuest | None = None,
        append: str = "",
        extra: Sequence[str] = (),
        machine: str = "q35",
        memory_mib: int = 256,
        lifetime_s: float = LIFETIME_S,
    ) -> AsyncIterator[Self]:
        """A running QEMU while the block runs; with `guest` it has booted, `append` goes to its kernel's command line.

        The block may kill or quit it. It uses TCG: KVM is not to be trusted on nested hosts.
        """
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(_short_folder())
            line = [binary.system, "-nodefaults", "-no-user-config", "-display", "none", "-machine", machine]
            line += ["-accel", "tcg", "-m", str(memory_mib), "-smp", "1", "-S", "-name", "fleece-test"]
            line += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off", "-qmp", f"unix:{folder}/own,server=on,wait=off"]
            if any(disk.bus == "virtio-scsi" for disk in disks):
                line += ["-device", "virtio-scsi-pci,id=scsi0"]
            line += extra
            for number, disk in enumerate(disks):
                line += disk.arguments(number)
            if guest is not None:
                line += ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd)]
                # On a busy machine the kernel would take a timer that ticks late for one that is not there, and hang.
                line += ["-append", f"no_timer_check console=ttyS0 quiet panic=-1 {append}".strip()]
                line += ["-chardev", f"file,id=s0,path={folder}/console", "-serial", "chardev:s0"]
                line += ["-chardev", f"socket,id=s1,path={folder}/ctl,server=on,wait=off", "-serial", "chardev:s1"]
            process, own = await _started(stack, line, folder, lifetime_s)
            running = cls(folder, folder / "qmp", process, own.peer_pid, own, binary, tuple(disks))
            if guest is not None:
                # Connected before the first instruction: what a serial port says to nobody is lost.
                running.guest = await GuestControl.connect(folder / "ctl")
                stack.push_async_callback(running.guest.aclose)
                await running.execute("cont")
                await running.guest.ready()
            yield running

    def device_path(self, disk: str) -> str:
        """QOM path of the device `disk` (its id) where the block backend hangs."""
        bus = next(known.bus for known in self.disks if known.id == disk)
        return f"/machine/peripheral/{disk}" + ("/virtio-backend" if bus == "virtio-blk" else "")

    async def qemu_io(self, disk: str, command: str) -> str:
        """Do what a guest would: `write -P 0x11 0 1M`, `write -z -u 4M 4M`, `discard 0 1M`, `read -P 0 0 1M`.

        Returns what qemu-io prints.

        Raises:
            AssertionError: the request failed, or a pattern differs.
        """
        before = len(self.log())
        line = f'qemu-io -d {self.device_path(disk)} "{command}"'
        answer = await self.execute("human-monitor-command", {"command-line": line})
        output = str(answer) + self.log()[before:]
        # What its NBD server has to say of clients that were killed comes out where it happens.
        output = "\n".join(line for line in output.splitlines() if "option negotiation failed" not in line)
        for bad in ("failed", "Error", "error", "invalid", "not found"):
            assert bad not in output, f"{line}: {output}"
        return output

    async def block_info(self, disk: str) -> dict[str, Any]:
        """The entry of `query-block` for the device `disk` (its id)."""
        for listed in await self.execute("query-block"):
            if disk in listed.get("qdev", "").split("/"):
                entry: dict[str, Any] = listed
                return entry
        raise KeyError(disk)


@dataclass
class RunningStorageDaemon(RunningProcess):
    """A qemu-storage-daemon: block nodes, bitmaps, jobs and exports without a machine around them."""

    binary: QemuBinary

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        binary: QemuBinary,
        blockdevs: Sequence[dict[str, Any]] = (),
        *,
        extra: Sequence[str] = (),
        lifetime_s: float = LIFETIME_S,
    ) -> AsyncIterator[Self]:
        """A running daemon with the given block nodes while the block runs; the block may kill or quit it."""
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(_short_folder())
            line = [binary.storage_daemon]
            for name in ("qmp", "own"):
                line += ["--chardev", f"socket,id={name},path={folder}/{name},server=on,wait=off"]
                line += ["--monitor", f"chardev={name}"]
            for blockdev in blockdevs:
                line += ["--blockdev", json.dumps(blockdev)]
            line += extra
            process, own = await _started(stack, line, folder, lifetime_s)
            yield cls(folder, folder / "qmp", process, own.peer_pid, own, binary)


@contextmanager
def _short_folder() -> Iterator[Path]:
    """A folder with a short path that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="fleece-vm-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _started(
    stack: AsyncExitStack, line: Sequence[str], folder: Path, lifetime_s: float
) -> tuple[trio.Process, OwnQmp]:
    """Start `line`, connect to its socket `own`; when `stack` ends the process is ended."""
    # Lines at once, so that qemu_io finds the answer of its command in the log.
    bounded = ["timeout", "-k", "5", f"{lifetime_s}s", "stdbuf", "-oL", *line]
    with (folder / "log").open("wb") as log:
        process = await trio.lowlevel.open_process(bounded, stdin=DEVNULL, stdout=log, stderr=STDOUT)
    stack.push_async_callback(_end, process, folder / "log")
    with trio.move_on_after(PATIENCE_S):
        while process.poll() is None:
            try:
                own = await OwnQmp.connect(folder / "own")
            except (FileNotFoundError, ConnectionRefusedError, EOFError, trio.BrokenResourceError):
                # Not yet there, or it ends already: then it has told the log why.
                await trio.sleep(0.01)
                continue
            stack.push_async_callback(own.aclose)
            return process, own
    said = (folder / "log").read_text(errors="replace")
    raise AssertionError(f"{line[0]} did not start: {said}\ncommand: {' '.join(line)}")


async def _end(process: trio.Process, log: Path) -> None:
    """End `timeout`, which passes SIGTERM on; QEMU ends in order then. Killed if that takes too long.

    Raises:
        AssertionError: it has crashed, which no test may bring about.
    """
    with trio.CancelScope(shield=True):
        status = process.poll()
        if status in _CRASHES:
            raise AssertionError(f"it crashed, status {status}: {log.read_text(errors='replace')[-2000:]}")
        process.terminate()
        with trio.move_on_after(PATIENCE_S):
            await process.wait()
            return
        process.kill()
        await process.wait()
