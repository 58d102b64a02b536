"""`/dev/nbdX`: an NBD export as a block device, for programs that can read nothing else.

The kernel's module `nbd` has a fixed number of devices that all programs of the host share. Which are in use the kernel
tells in `/sys/block/nbdN`; the lock sockets of `qemu-nbd` do not (one that fails removes another's). Between looking
for a free one and using it, a *reservation* keeps others of the same kind off: a file of lines `<number> <Unix
seconds>`, read and written under a lock, in the form that Proxmox VE has too. docs/nbd.md, "Block devices".
"""

import contextlib
import fcntl
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from core.errors import BusyError, os_reason
from core.limits import in_io_thread
from hypervisor.children import STOP_TIMEOUT_S, Child, end_process, running
from hypervisor.errors import NbdDeviceError
from hypervisor.nbd_address import NbdAddress
from hypervisor.qemu_tools import find_tool
from hypervisor.unix_socket import process_start_time

_LOG = logging.getLogger(__name__)

#: Seconds a reservation lasts: from then on the device is in use, or its user is gone.
RESERVED_S: Final = 60
#: Seconds to wait for the lock, which is held while a device is connected.
LOCK_TIMEOUT_S: Final = 10.0
#: Seconds for `qemu-nbd` to connect a device; it takes 0.2.
CONNECT_TIMEOUT_S: Final = 30.0
#: Seconds for `qemu-nbd --disconnect`, and for a device to be free when its `qemu-nbd` has ended.
_FREE_TIMEOUT_S: Final = 5.0
#: Seconds for a `qemu-nbd` to end when its device was disconnected.
_OBEY_TIMEOUT_S: Final = 5.0
#: Bytes of a file of reservations that are read.
_MAX_RESERVATIONS: Final = 64 * 1024
#: The kernel's own limit: a minor number has 20 bits.
_MAX_DEVICES: Final = 1 << 20
_LINE: Final = re.compile(rb"([0-9]{1,7}) ([0-9]{1,12})")
_NUMBER: Final = re.compile(rb"[0-9]{1,20}")
_NODE: Final = re.compile(r"(?:/dev/)?nbd(0|[1-9][0-9]{0,6})")
#: What `qemu-nbd` says about a device that somebody else was quicker to take.
_TAKEN: Final = "Failed to set NBD socket"
_SECTOR: Final = 512


def device_number(text: str) -> int | None:
    """3 of `/dev/nbd3` or `nbd3`; None for anything else."""
    match = _NODE.fullmatch(text)
    return int(match[1]) if match is not None and int(match[1]) < _MAX_DEVICES else None


def parse_reservations(data: bytes, now: float) -> dict[int, int]:
    """Numbers and Unix seconds of the reservations in `data` that still count; lines of another form are left out.

    A time that lies in the future is one of a clock that was wrong.
    """
    found: dict[int, int] = {}
    for line in data.split(b"\n"):
        match = _LINE.fullmatch(line)
        if match is not None and abs(now - int(match[2])) < RESERVED_S:
            found[int(match[1])] = max(int(match[2]), found.get(int(match[1]), 0))
    return found


def newest(data: bytes) -> int:
    """The number with the newest time, expired or not, where the search for a free device starts; 0 if none has."""
    entries = [(int(match[2]), int(match[1])) for match in map(_LINE.fullmatch, data.split(b"\n")) if match is not None]
    return max(entries, default=(0, 0))[1]


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What the kernel says of a device that is in use."""

    number: int
    task: int  #: id of the thread that serves it, of which the kernel knows no more
    size: int  #: bytes
    read_only: bool

    @property
    def path(self) -> Path:
        """`/dev/nbd3`."""
        return Path(f"/dev/nbd{self.number}")

    def served_by(self, pid: int) -> bool:
        """Whether process `pid` serves it."""
        return Path(f"/proc/{pid}/task/{self.task}").is_dir()


@dataclass(frozen=True, slots=True)
class NbdDevice:
    """A device that was connected, as long as its block runs."""

    number: int
    path: Path  #: `/dev/nbd3`
    size: int  #: bytes, as the kernel has it: whole sectors
    child: Child  #: the `qemu-nbd` that serves it


def _device_of(path: Path) -> tuple[int, int] | None:
    """Major and minor number of the block device at `path`; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (os.major(found.st_rdev), os.minor(found.st_rdev)) if stat.S_ISBLK(found.st_mode) else None


@dataclass(frozen=True, slots=True)
class NbdHost:
    """The devices of this host. What stands for the kernel is something else in tests only."""

    reservations: Path
    lock: Path
    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    mounts: Path = Path("/proc/self/mountinfo")
    swaps: Path = Path("/proc/swaps")
    device_of: Callable[[Path], tuple[int, int] | None] = _device_of
    clock: Callable[[], float] = field(default=time.time)

    # -- what the kernel says ---------------------------------------------------------------------------------------

    def count(self) -> int:
        """How many devices there are.

        Raises:
            NbdDeviceError: the kernel module is not loaded.
        """
        path = self.sys / "module/nbd/parameters/nbds_max"
        try:
            text = _read_start(path).strip()
        except OSError as error:
            raise NbdDeviceError(
                "use", "/dev/nbdX", "the kernel module nbd is not loaded",
                "as root: modprobe nbd nbds_max=16 (for good: 'nbd' into /etc/modules-load.d/nbd.conf)",
            ) from error  # fmt: skip
        if not _NUMBER.fullmatch(text):
            raise NbdDeviceError("use", "/dev/nbdX", f"{path} does not tell how many there are")
        return min(int(text), _MAX_DEVICES)

    def use_of(self, number: int) -> DeviceUse | None:
        """Who uses the device, None if nobody does."""
        folder = self._block(number)
        try:
            pid, sectors = (_read_start(folder / name).strip() for name in ("pid", "size"))
            read_only = (folder / "ro").exists() and _read_start(folder / "ro").strip() == b"1"
        except OSError:
            return None
        if not _NUMBER.fullmatch(pid) or not _NUMBER.fullmatch(sectors) or int(sectors) == 0:
            return None
        return DeviceUse(number, int(pid), int(sectors) * _SECTOR, read_only)

    def in_use(self) -> list[DeviceUse]:
        """All devices in use; empty without the kernel module."""
        try:
            return [use for number in range(self.count()) if (use := self.use_of(number)) is not None]
        except NbdDeviceError:
            return []

    def used_for(self, number: int) -> list[str]:
        """What on this host has the device open for good, in words: mounts, swap, other block devices."""
        nodes = [self._block(number), *self._block(number).glob(f"nbd{number}p*")]
        words = []
        names = {node.name: device for node in nodes if (device := _dev_number(node)) is not None}
        for node in nodes:
            words += [f"{holder.name} is made of {node.name}" for holder in sorted(_entries(node / "holders"))]
        for line in _lines(self.mounts):
            fields = line.split()
            words += [f"{name} is mounted on {fields[4]}" for name, dev in names.items() if fields[2:3] == [dev]]
        swaps = {line.split()[0] for line in _lines(self.swaps)[1:] if line.split()}
        return words + [f"{name} is swap space" for name in names if f"/dev/{name}" in swaps]

    def _block(self, number: int) -> Path:
        return self.sys / f"block/nbd{number}"

    def _is_there(self, number: int) -> bool:
        """Whether there is a node for the device, and it is that of the kernel's device."""
        device = self.device_of(self.dev / f"nbd{number}")
        return device is not None and _dev_number(self._block(number)) == f"{device[0]}:{device[1]}"

    # -- reservations -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """Keep others from looking for a device while the block runs.

        Raises:
            BusyError: somebody else does for longer than `LOCK_TIMEOUT_S`.
            NbdDeviceError: the lock file cannot be made.
        """
        try:
            self.lock.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise NbdDeviceError("lock", str(self.lock), os_reason(error)) from error
        try:
            deadline = trio.current_time() + LOCK_TIMEOUT_S
            while not _try_lock(descriptor):
                if trio.current_time() >= deadline:
                    raise BusyError(
                        "reserve",
                        "a device /dev/nbdX",
                        f"another program has held {self.lock} for {LOCK_TIMEOUT_S:g} s",
                    )
                await trio.sleep(0.05)
            yield
        finally:
            os.close(descriptor)

    def _load(self) -> bytes:
        try:
            return _read_start(self.reservations, _MAX_RESERVATIONS)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise NbdDeviceError("read the reservations in", str(self.reservations), os_reason(error)) from error

    def _save(self, entries: Mapping[int, int]) -> None:
        """Write the reservations; killed at any time, the old or the new ones are there whole."""
        text = "".join(f"{number} {at}\n" for number, at in sorted(entries.items()))
        try:
            self.reservations.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{self.reservations.name}.", dir=self.reservations.parent)
            try:
                with os.fdopen(descriptor, "w") as file:
                    os.fchmod(descriptor, 0o644)
                    file.write(text)
                Path(temporary).replace(self.reservations)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise NbdDeviceError("write the reservations in", str(self.reservations), os_reason(error)) from error

    async def _unreserve(self, number: int, at: int) -> None:
        """Take back a reservation that was made `at` that time; if that fails it expires."""
        with trio.CancelScope(shield=True), contextlib.suppress(NbdDeviceError, BusyError):
            async with self._locked():
                entries = parse_reservations(await in_io_thread(self._load), self.clock())
                if entries.get(number) == at:
                    del entries[number]
                    await in_io_thread(self._save, entries)

    def _candidates(self, data: bytes) -> Iterator[int]:
        """Free devices, from the one that was reserved last round to it."""
        count = self.count()
        reserved = parse_reservations(data, self.clock())
        start = newest(data)
        for step in range(count):
            number = (start + step) % count
            if number not in reserved and self._is_there(number) and self.use_of(number) is None:
                yield number

    def check(self, count: int = 1) -> None:
        """Look whether `count` devices could be connected now; who connects them may find others quicker all the same.

        Raises:
            NbdDeviceError: no `qemu-nbd`, no kernel module, or too few free devices.
        """
        find_tool("qemu-nbd", NbdDeviceError)
        free = len(list(self._candidates(self._load())))
        if free == 0:
            raise self._none_free()
        if free < count:
            raise self._none_free(f"{count} are needed, and of {self.count()} only {free} can be used: the others")

    def _none_free(self, which: str = "") -> NbdDeviceError:
        return NbdDeviceError(
            "find", "a free device /dev/nbdX", f"{which or f'all {self.count()}'} are in use, reserved or missing",
            "'fleece nbd list' shows who uses them; the module's parameter nbds_max says how many there are",
        )  # fmt: skip

    # -- connecting -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def connected(
        self, address: NbdAddress, *, read_only: bool = True, discard: bool = False
    ) -> AsyncIterator[NbdDevice]:
        """The export at `address` as a free block device while the block runs.

        However the block ends, the device is free again; an error says so if it is not. If this process is killed its
        `qemu-nbd` ends, and with it the device is free.

        Args:
            address: of the export; its server must not be this process's own trio loop if that could wait for the
                device.
            read_only: whether the kernel refuses writes.
            discard: discards reach the server. Before QEMU 9.1 an unaligned one aborts it: never for those.

        Raises:
            NbdDeviceError: no kernel module, no free device, or `qemu-nbd` failed, with its words.
            BusyError: another program looks for a device for too long.
        """
        tool = await in_io_thread(find_tool, "qemu-nbd", NbdDeviceError)
        await in_io_thread(self.count)
        async with contextlib.AsyncExitStack() as stack:
            async with self._locked():
                device = await self._connect(stack, tool, address, read_only=read_only, discard=discard)
            yield device

    async def _connect(
        self, stack: contextlib.AsyncExitStack, tool: str, address: NbdAddress, *, read_only: bool, discard: bool
    ) -> NbdDevice:
        data = await in_io_thread(self._load)
        for number in await in_io_thread(lambda: list(self._candidates(data))):
            path = self.dev / f"nbd{number}"
            line = [tool, "--verbose", f"--connect={path}", "--image-opts", _image(address)]
            line += ["--read-only"] if read_only else []
            line += ["--discard=unmap"] if discard else []
            async with contextlib.AsyncExitStack() as attempt:
                child = await attempt.enter_async_context(running(line, fault=NbdDeviceError))
                attempt.push_async_callback(self._disconnect, tool, number, child)
                use = await self._wait_for(number, child)
                if use is not None:
                    now = int(self.clock())
                    stack.push_async_callback(self._unreserve, number, now)
                    stack.push_async_exit(attempt.pop_all())
                    await in_io_thread(self._save, {**parse_reservations(data, self.clock()), number: now})
                    return NbdDevice(number, path, use.size, child)
                words = await child.last_words()
                if _TAKEN not in words:
                    raise NbdDeviceError("connect", str(path), words or f"qemu-nbd ended with exit code {child.code}")
                _LOG.info("%s was taken by somebody else; trying another one", path)
        raise self._none_free()

    async def _wait_for(self, number: int, child: Child) -> DeviceUse | None:
        """The device's use by `child`, None if that ended instead."""
        deadline = trio.current_time() + CONNECT_TIMEOUT_S
        pause_s = 0.005
        while True:
            ended = child.code is not None
            use = await in_io_thread(self.use_of, number)
            if use is not None and use.served_by(child.pid) and not ended:
                return use
            if ended:
                return None
            if trio.current_time() > deadline:
                raise NbdDeviceError(
                    "connect", f"/dev/nbd{number}", f"qemu-nbd was not ready after {CONNECT_TIMEOUT_S:.0f} s"
                )
            await trio.sleep(pause_s)
            pause_s = min(0.1, pause_s * 1.5)

    async def _disconnect(self, tool: str, number: int, child: Child) -> None:
        """Free the device that `child` serves: told so first, then SIGTERM and SIGKILL."""
        with trio.CancelScope(shield=True):
            await self._tell(tool, number, child.pid)
            with trio.move_on_after(_OBEY_TIMEOUT_S):
                await child.wait()
            await child.stop(stop_s=STOP_TIMEOUT_S)
            await self._check_free(number, child.pid)

    async def _tell(self, tool: str, number: int, pid: int) -> None:
        """`qemu-nbd --disconnect`, if it is `pid` that serves the device: it would free anybody's."""
        use = await in_io_thread(self.use_of, number)
        if use is None or not use.served_by(pid):
            return
        async with running([tool, f"--disconnect={self.dev / f'nbd{number}'}"], fault=NbdDeviceError) as teller:
            with trio.move_on_after(_FREE_TIMEOUT_S):
                # It says "disconnected" in any case.
                await teller.wait()

    async def _check_free(self, number: int, pid: int) -> None:
        deadline = trio.current_time() + _FREE_TIMEOUT_S
        while True:
            use = await in_io_thread(self.use_of, number)
            if use is None or not use.served_by(pid):
                return
            if trio.current_time() > deadline:
                raise NbdDeviceError(
                    "disconnect", f"/dev/nbd{number}", f"process {pid} still serves it", f"qemu-nbd -d /dev/nbd{number}"
                )
            await trio.sleep(0.02)

    async def free_left(self, number: int, pid: int, start_time: int) -> bool:
        """Free a device whose user was killed, but not its `qemu-nbd`, the process `pid` that began at `start_time`.

        A device that another process serves by now is left alone. True if there was something to be done.

        Raises:
            NbdDeviceError: it cannot be freed.
        """
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return False
        try:
            # From here on `pid` cannot become another process's without the descriptor telling.
            if process_start_time(pid) != start_time:
                return False
            use = await in_io_thread(self.use_of, number)
            if use is None or not use.served_by(pid):
                return False
            tool = await in_io_thread(find_tool, "qemu-nbd", NbdDeviceError)
            with trio.CancelScope(shield=True):
                await self._tell(tool, number, pid)
                await end_process(descriptor, first_s=1.0)
                await self._check_free(number, pid)
            return True
        finally:
            os.close(descriptor)


def _image(address: NbdAddress) -> str:
    """The export as options of QEMU's, in which names can be anything; commas are doubled there."""
    options = {"driver": "raw", "file.driver": "nbd"}
    if address.uri:
        raise NbdDeviceError("connect", address.uri, "only an export at a unix socket can be a block device")
    options |= {
        "file.server.type": "unix",
        "file.server.path": address.socket,
        "file.export": address.export,
    }
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_start(path: Path, length: int = 256) -> bytes:
    with path.open("rb") as file:
        return file.read(length)


def _dev_number(folder: Path) -> str | None:
    """`43:16`, as the kernel has it for a block device or partition."""
    try:
        return _read_start(folder / "dev").decode("ascii", "replace").strip()
    except OSError:
        return None


def _entries(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
