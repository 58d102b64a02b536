"""What processes hold as block devices or files, written down for `fleece nbd list` and `disconnect`.

A file for each process in the run folder, named after its id and start time, which together name it for ever: it is
alive, or what it has written down is left to be cleaned up. docs/nbd.md, "Who holds what".
"""

import contextlib
import json
import os
import re
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import trio

from core.errors import BusyError, FleeceError, os_reason
from core.limits import in_io_thread
from hypervisor import checked
from hypervisor.dirty_regions import Region
from hypervisor.nbd_devices import DeviceUse, NbdHost
from hypervisor.nbd_endpoint import remove_stale_of
from hypervisor.nbd_files import remove_left
from hypervisor.unix_socket import process_start_time

#: Bytes of a record that are read.
_MAX_RECORD: Final = 1 << 20
_NAME: Final = re.compile(r"holder-(?P<pid>[1-9][0-9]{0,9})-(?P<start>[0-9]{1,20})\.json")
#: Seconds for a holder to end: it takes down a frozen view, which may have to wait for its QEMU.
END_TIMEOUT_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class HeldDisk:
    """One disk that a process holds ready."""

    name: str  #: of the archive: `drive-scsi0.img`
    size: int  #: bytes
    read_only: bool = True
    number: int | None = None  #: of the device, None for a file or as long as there is none
    file: str | None = None  #: path of the file, None for a device
    pid: int | None = None  #: of the program that serves device or file
    start_time: int | None = None  #: of that program, clock ticks after boot
    changed: int | None = None  #: bytes that changed since the last backup, None if that is not known
    uri: str | None = None  #: of what is only served over NBD, None for a device or file

    @property
    def path(self) -> str:
        """Device, file or URI; empty as long as there is none."""
        return self.file or self.uri or ("" if self.number is None else f"/dev/nbd{self.number}")

    def to_json(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            "name": self.name,
            "device": None if self.number is None else self.path,
            "file": self.file,
            "uri": self.uri,
            "size": self.size,
            "read-only": self.read_only,
            "changed": self.changed,
        }


@dataclass(frozen=True, slots=True)
class Holding:
    """What one process holds."""

    pid: int
    start_time: int  #: clock ticks after boot
    source: Mapping[str, Any]  #: `type` (`vm` or `backup`), and what tells which
    since: float  #: Unix seconds
    expires: float | None  #: Unix seconds, None without a limit
    disks: Sequence[HeldDisk] = ()
    scratch: str | None = None  #: folder of the fleecing images of a `vm`

    @property
    def label(self) -> str:
        """What is held, for people."""
        source = self.source
        return f"VM {source.get('vm')}" if source.get("type") == "vm" else str(source.get("snapshot"))

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return process_start_time(self.pid) == self.start_time

    def to_json(self) -> dict[str, Any]:
        """For people and programs: an element of `fleece nbd list`, and what `connect` prints."""
        return {
            "state": "held" if self.alive else "left",
            "source": dict(self.source),
            "pid": self.pid,
            "since": int(self.since),
            "expires": None if self.expires is None else int(self.expires),
            "disks": [disk.to_json() for disk in self.disks],
        }

    def pack(self) -> bytes:
        """What `parse` reads back."""
        disks = [{name: getattr(disk, name) for name in HeldDisk.__slots__} for disk in self.disks]
        values = {name: getattr(self, name) for name in ("since", "expires", "scratch")}
        return json.dumps({"source": dict(self.source), "disks": disks, **values}, indent=1).encode()

    @classmethod
    def parse(cls, text: bytes, pid: int, start_time: int, where: str) -> Self:
        """The record of the process `pid`.

        Raises:
            FormatError: nobody has written it so.
        """
        try:
            value = checked.of_type(json.loads(text), dict, where)
        except (ValueError, RecursionError) as error:
            raise checked.nonsense(where, str(error)) from error
        disks = [
            HeldDisk(
                name=checked.field(entry, "name", str, where),
                size=checked.field(entry, "size", int, where),
                read_only=checked.field(entry, "read_only", bool, where),
                number=checked.optional(entry, "number", int, where),
                file=checked.optional(entry, "file", str, where),
                pid=checked.optional(entry, "pid", int, where),
                start_time=checked.optional(entry, "start_time", int, where),
                changed=checked.optional(entry, "changed", int, where),
                uri=checked.optional(entry, "uri", str, where),
            )
            for entry in checked.objects(value.get("disks"), where)
        ]
        since, expires = value.get("since"), value.get("expires")
        if not isinstance(since, int | float) or not isinstance(expires, int | float | None):
            raise checked.nonsense(where, "a time that is none")
        return cls(
            pid,
            start_time,
            checked.field(value, "source", dict, where),
            float(since),
            None if expires is None else float(expires),
            disks,
            checked.optional(value, "scratch", str, where),
        )


@dataclass(frozen=True, slots=True)
class Records:
    """The folder of the records."""

    folder: Path

    def load(self) -> list[Holding]:
        """What all processes hold, or have left, the oldest first; what is no record is left out."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                match = _NAME.fullmatch(path.name)
                if match is None:
                    continue
                with contextlib.suppress(OSError, FleeceError), path.open("rb") as file:
                    text = file.read(_MAX_RECORD)
                    found.append(Holding.parse(text, int(match["pid"]), int(match["start"]), str(path)))
        return sorted(found, key=lambda holding: holding.since)

    def save(self, holding: Holding) -> None:
        """Write the record; killed at any time, the old or the new one is there whole.

        Raises:
            FleeceError: it cannot be written.
        """
        _write(self._path(holding), holding.pack())

    def save_regions(self, holding: Holding, name: str, regions: Sequence[Region]) -> None:
        """Write which parts of the disk `name` have changed.

        Raises:
            FleeceError: it cannot be written.
        """
        number = [disk.name for disk in holding.disks].index(name)
        text = "".join(f"{offset} {length}\n" for offset, length in regions)
        _write(self._regions(holding, number), text.encode())

    def regions(self, holding: Holding, path: str) -> list[Region]:
        """Which parts of the device or file `path` have changed.

        Raises:
            FleeceError: they were not written down.
        """
        (number,) = [number for number, disk in enumerate(holding.disks) if disk.path == path]
        try:
            lines = self._regions(holding, number).read_text("ascii").splitlines()
            return [Region(*map(int, line.split(" "))) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise FleeceError("tell what has changed of", path, "it was not written down") from error

    def forget(self, holding: Holding) -> None:
        """Remove the record: nothing is held any more."""
        self._path(holding).unlink(missing_ok=True)
        for number in range(len(holding.disks)):
            self._regions(holding, number).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # if nothing else is in it

    def _path(self, holding: Holding) -> Path:
        return self.folder / f"holder-{holding.pid}-{holding.start_time}.json"

    def _regions(self, holding: Holding, number: int) -> Path:
        return self.folder / f"holder-{holding.pid}-{holding.start_time}-{number}.regions"


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise FleeceError("write down what is held in", str(path), os_reason(error)) from error


def own_holding(source: Mapping[str, Any], since: float, expires: float | None, scratch: Path | None) -> Holding:
    """The record of this process, which holds nothing yet."""
    pid = os.getpid()
    scratch_text = None if scratch is None else str(scratch)
    return Holding(pid, process_start_time(pid) or 0, source, since, expires, scratch=scratch_text)


def others(host: NbdHost, holdings: Sequence[Holding]) -> list[DeviceUse]:
    """The devices in use that none of `holdings` has."""
    ours = {(disk.number, disk.pid) for holding in holdings for disk in holding.disks}
    return [
        use
        for use in host.in_use()
        if not any(number == use.number and pid is not None and use.served_by(pid) for number, pid in ours)
    ]


# -- the end ----------------------------------------------------------------------------------------------------------


async def clean_left(records: Records, host: NbdHost, only: Holding | None = None) -> list[str]:
    """Remove what killed processes have left: devices, mounts, frozen views. Returns what was done, in words.

    What cannot be removed stays written down, and is said too.
    """
    done: list[str] = []
    for holding in await in_io_thread(records.load) if only is None else [only]:
        if await in_io_thread(lambda holding=holding: holding.alive):
            continue
        try:
            done += await _clean(holding, host)
            await in_io_thread(records.forget, holding)
        except FleeceError as error:
            done.append(str(error))
    return done


async def _clean(holding: Holding, host: NbdHost) -> list[str]:
    done = []
    for disk in holding.disks:
        if disk.number is not None and disk.pid is not None and disk.start_time is not None:
            if await host.free_left(disk.number, disk.pid, disk.start_time):
                done.append(f"{disk.path} of process {holding.pid}, which was killed, is free again")
        elif disk.file is not None and await remove_left(Path(disk.file)):
            done.append(f"removed {disk.file} of process {holding.pid}, which was killed")
        elif disk.uri is not None and await in_io_thread(remove_stale_of, disk.uri):
            done.append(f"removed the socket of process {holding.pid}, which was killed: {disk.uri}")
    qmp = holding.source.get("qmp")
    if isinstance(qmp, str):
        from hypervisor.errors import QmpConnectError
        from hypervisor.vm import cleanup

        scratch = None if holding.scratch is None else Path(holding.scratch)
        with contextlib.suppress(QmpConnectError):  # its QEMU has ended, and with it everything in it
            done += await cleanup(qmp, run_dir=records_run_dir(), scratch=scratch)
    return done


def records_run_dir() -> Path:
    """The run folder that the states of frozen views lie in."""
    from agent.places import run_dir

    return run_dir()


async def end_holder(records: Records, holding: Holding, host: NbdHost) -> list[str]:
    """End the process that holds something, and wait until everything is as before; what a killed one left goes too.

    Raises:
        FleeceError: it may not be ended, or has not ended.
    """
    try:
        descriptor = os.pidfd_open(holding.pid)
    except OSError:
        descriptor = -1
    try:
        # Behind the descriptor the number cannot become another process's.
        if descriptor >= 0 and holding.alive:
            try:
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            except OSError as error:
                raise FleeceError("end process", str(holding.pid), os_reason(error)) from error
            with trio.move_on_after(END_TIMEOUT_S) as scope:
                await trio.lowlevel.wait_readable(descriptor)
            if scope.cancelled_caught:
                raise BusyError(
                    "disconnect", holding.label, f"process {holding.pid} still works on it after {END_TIMEOUT_S:g} s"
                )
            return []
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return await clean_left(records, host, holding)


def in_use(host: NbdHost, holding: Holding) -> list[str]:
    """What on this host uses the devices of `holding` for good: mounts, swap, other block devices."""
    return [words for disk in holding.disks if disk.number is not None for words in host.used_for(disk.number)]


def with_disk(holding: Holding, number: int, disk: HeldDisk) -> Holding:
    """`holding` with another disk in the place `number`."""
    disks = list(holding.disks)
    disks[number] = disk
    return replace(holding, disks=disks)
