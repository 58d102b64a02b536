"""What a run writes down about one QEMU, and the lock by which at most one run works on it.

Both are keyed by QEMU's process id and start time, not by a VM's id: two configurations may name the same QEMU. The
lock is an flock, so it ends with the process that holds it. Clean-up needs only QEMU itself; the state tells which
files are to be removed, and what to say to people. docs/hypervisor.md, "Clean-up".
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from core.errors import os_reason
from core.limits import in_io_thread
from hypervisor import checked
from hypervisor.errors import FleecingError, QmpAnswerError, VmStateError
from hypervisor.scratch import remove_image
from hypervisor.unix_socket import Peer, process_start_time

#: `RunState.phase` of a rollback that has begun to write: until it is done the disks are no disks.
WRITING: Final = "rollback, which writes to the disks"
_FOLDER: Final = re.compile(r"qemu-(?P<pid>[0-9]{1,10})-(?P<start>[0-9]{1,20})")
#: Bytes of a state file; a thousand disks take less.
_MAX_STATE: Final = 1024 * 1024
#: Bytes of a unix socket's path, without the zero at its end.
_MAX_SOCKET_PATH: Final = 107


@dataclass(frozen=True, slots=True)
class DiskState:
    """One disk of a run."""

    number: int  #: of its nodes: `fleece-p<number>`
    archive: str  #: `drive-scsi0.img`
    device: str  #: the device's path, whose property `drive` is switched
    root: str  #: its block node
    image: str  #: path of the fleecing image, empty without one
    old: str | None  #: name of the bitmap that is used
    new: str | None  #: name of the bitmap that is added


@dataclass(slots=True)
class RunState:
    """What one run is about to do to a QEMU; written before each step."""

    qmp: str
    phase: str  #: the step that is next, for people
    target: str  #: 8 hex digits
    id: int  #: backup time of the new snapshot
    agent: int  #: process id of the run
    nbd_server: bool = False  #: the run starts (or has started) the NBD server
    paused: bool = False  #: the run stops (or has stopped) the guest, which is to go on
    disks: list[DiskState] = field(default_factory=list)

    @classmethod
    def parse(cls, text: bytes, where: str) -> "RunState":
        """Read what `pack` wrote.

        Raises:
            QmpAnswerError: it did not.
        """
        try:
            value = checked.of_type(json.loads(text), dict, where)
        except (ValueError, RecursionError) as error:
            raise QmpAnswerError("understand", where, str(error)) from error
        return cls(
            qmp=checked.field(value, "qmp", str, where),
            phase=checked.field(value, "phase", str, where),
            target=checked.field(value, "target", str, where),
            id=checked.field(value, "id", int, where),
            agent=checked.field(value, "agent", int, where),
            nbd_server=checked.field(value, "nbd_server", bool, where),
            paused=bool(checked.optional(value, "paused", bool, where)),
            disks=[
                DiskState(
                    number=checked.field(disk, "number", int, where),
                    archive=checked.field(disk, "archive", str, where),
                    device=checked.field(disk, "device", str, where),
                    root=checked.field(disk, "root", str, where),
                    image=checked.field(disk, "image", str, where),
                    old=checked.optional(disk, "old", str, where),
                    new=checked.optional(disk, "new", str, where),
                )
                for disk in checked.objects(value.get("disks"), where)
            ],
        )

    @property
    def images(self) -> list[Path]:
        """The fleecing images; a rollback has none."""
        return [Path(disk.image) for disk in self.disks if disk.image]

    def pack(self) -> bytes:
        """The state as JSON."""
        return json.dumps(asdict(self), indent=1).encode()


class Run:
    """The one run that may work on a QEMU; made by `exclusive`."""

    def __init__(self, folder: Path, peer: Peer) -> None:
        self.folder: Final = folder  #: of mode 0700, removed at the end
        self.peer: Final = peer
        #: Where QEMU's NBD server listens during this run; short enough for a socket.
        self.socket = folder / "nbd"

    @property
    def _state(self) -> Path:
        return self.folder / "state.json"

    async def load(self) -> RunState | None:
        """What a killed run on this QEMU wrote down; None if there was none, or it is unreadable."""
        return await in_io_thread(_load, self._state)

    async def save(self, state: RunState) -> None:
        """Write `state` down; killed at any time, the old or the new one is there whole.

        Raises:
            FleecingError: it cannot be written.
        """
        try:
            await in_io_thread(self._save, state.pack())
        except OSError as error:
            raise FleecingError("write down the state in", str(self._state), os_reason(error)) from error

    def _save(self, text: bytes) -> None:
        temporary = self._state.with_suffix(".tmp")
        temporary.write_bytes(text)
        temporary.replace(self._state)

    def forget(self) -> None:
        """Remove state and socket: nothing of ours is left in QEMU."""
        for path in (self._state, self._state.with_suffix(".tmp"), self.folder / "nbd"):
            path.unlink(missing_ok=True)


def _load(path: Path) -> RunState | None:
    try:
        with path.open("rb") as file:
            return RunState.parse(file.read(_MAX_STATE), str(path))
    except (OSError, QmpAnswerError):
        return None


@contextmanager
def exclusive(run_dir: Path, peer: Peer) -> Iterator[Run]:
    """The right to change the QEMU `peer`, as long as the block runs.

    If nothing is left to be remembered at its end, no file is left either.

    Raises:
        VmStateError: another run has it.
        FleecingError: the files cannot be made, or their paths are too long for a socket.
    """
    run = Run(run_dir / _name(peer), peer)
    if len(os.fsencode(run.socket)) > _MAX_SOCKET_PATH:
        raise FleecingError(
            "use the run folder",
            str(run_dir),
            f"its path is too long for a socket ({run.socket})",
            "name a shorter one with FLEECE_RUN_DIR",
        )
    lock = run_dir / f"{run.folder.name}.lock"
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = _lock(lock)
    except OSError as error:
        raise FleecingError("use the run folder", str(run_dir), os_reason(error)) from error
    if descriptor is None:
        raise _held(run)
    try:
        try:
            run.folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise FleecingError("use the run folder", str(run_dir), os_reason(error)) from error
        yield run
    finally:
        # What is still written down is for the next run, or for `clean_dead`.
        with contextlib.suppress(OSError):
            run.folder.rmdir()
        if not run.folder.exists():
            lock.unlink(missing_ok=True)
        os.close(descriptor)


async def left_state(run_dir: Path, peer: Peer) -> RunState | None:
    """What a killed run on the QEMU `peer` wrote down, None if there was none; changes nothing.

    Raises:
        VmStateError: a run works on it now.
    """
    return await in_io_thread(_left_state, run_dir, peer)


def _left_state(run_dir: Path, peer: Peer) -> RunState | None:
    run = Run(run_dir / _name(peer), peer)
    try:
        with (run_dir / f"{run.folder.name}.lock").open("rb") as lock:
            # Shared and for a moment: two that look do not see each other.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(run) from None
    except OSError:
        pass  # none, or somebody else's
    return _load(run._state)


def _held(run: Run) -> VmStateError:
    state = _load(run._state)
    by = f" (process {state.agent})" if state is not None else ""
    return VmStateError(
        "work on the VM with", f"process {run.peer.pid}", f"another backup or clean-up of it runs{by}",
        "'fleece nbd list' shows whether its disks are held as devices or files",
    )  # fmt: skip


def _name(peer: Peer) -> str:
    return f"qemu-{peer.pid}-{peer.start_time or 0}"


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock file, None if another process does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed it in between.
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.close(descriptor)


async def clean_dead(run_dir: Path) -> list[str]:
    """Remove what runs have left of QEMUs that are gone: fleecing images, sockets, state. Returns what was done.

    What `half_disks` finds in that is a warning: nobody else remembers it.
    """
    return await in_io_thread(_clean_dead, run_dir)


def half_disks(done: Iterable[str]) -> list[str]:
    """Of what `clean_dead` has returned that a rollback has ended together with its QEMU."""
    return [line for line in done if _HALF in line]


_HALF: Final = "ended in the middle of a rollback"


def _clean_dead(run_dir: Path) -> list[str]:
    done: list[str] = []
    if not run_dir.is_dir():
        return done
    for lock in run_dir.glob("qemu-*.lock"):
        match = _FOLDER.fullmatch(lock.stem)
        if match is None or process_start_time(int(match["pid"])) == int(match["start"]):
            continue
        with contextlib.suppress(OSError):
            descriptor = _lock(lock)
            if descriptor is None:
                continue  # its run is about to find out
            try:
                folder = run_dir / lock.stem
                state = _load(folder / "state.json")
                for image in state.images if state is not None else ():
                    if _is_image(image, match) and image.exists():
                        remove_image(image)
                        done.append(f"removed the fleecing image {image}")
                if state is not None and state.phase == WRITING:
                    disks = ", ".join(f"{disk.archive} ({disk.root})" for disk in state.disks)
                    done.append(
                        f"the QEMU whose QMP socket was {state.qmp} {_HALF}: unless restored since, its disks "
                        f"hold a part of a snapshot only: {checked.printable(disks, 500)}"
                    )
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)
                done.append(f"removed the state of the QEMU with process id {match['pid']}, which has ended")
            finally:
                os.close(descriptor)
    return done


def _is_image(path: Path, match: re.Match[str]) -> bool:
    return path.name.startswith(f"fleece-{match['pid']}-{match['start']}-")


def started(peer: Peer) -> float | None:
    """Unix seconds at which the process `peer` started, None if not known; right to a few hundredths of a second."""
    if peer.start_time is None:
        return None
    # Not by `btime` of /proc/stat: a whole second, so that a restart right after a backup would seem to be before it.
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - peer.start_time / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
