"""A VM of the configuration whose QEMU does not run: its disks by path, while QEMU's image locks are held.

QEMU locks single bytes of an image: a shared lock on byte 100+p says "I use permission p", on byte 200+p "nobody else
may use it". While a backup reads we say what `qemu-img convert` says: we read, and nobody may write or resize. A QEMU
that has the image open for writing makes us fail, and one that is started meanwhile says `Failed to get "write" lock`.
docs/hypervisor.md, "A VM that does not run".
"""

import errno
import fcntl
import os
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.errors import NotFoundError, SourceError, UsageError, os_reason
from core.limits import in_io_thread
from hypervisor.discovery import archive_name
from hypervisor.errors import DiskInUseError, DiskNameError

#: The permissions of QEMU's block layer that matter here, by their bit.
_CONSISTENT_READ: Final = 0
_WRITE: Final = 1
_RESIZE: Final = 3
_USED_BASE: Final = 100
_UNSHARED_BASE: Final = 200
#: `struct flock`: type, whence, start, length, pid (0 for locks of an open file).
_FLOCK: Final = struct.Struct("hhqqi4x")
#: Errors of file systems without such locks; QEMU goes without there too.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})

FORMATS: Final = ("raw", "qcow2")


@dataclass(frozen=True, slots=True)
class StoppedDisk:
    """A disk of a VM that does not run."""

    name: str  #: the archive's name without its type extension, as for the running VM: `drive-scsi0.img`
    path: str  #: of the image or block device
    format: str  #: `raw` or `qcow2`; never found out by looking into the image, which the guest has written


def stopped_disks(disks: Mapping[str, str], formats: Mapping[str, str] | None = None) -> list[StoppedDisk]:
    """The disks of a configuration, `disks` from device id to path; without a word in `formats`, `.qcow2` files are
    qcow2 and all others raw.

    Raises:
        DiskNameError: two disks with one archive name.
        UsageError: an unknown format.
    """
    result: dict[str, StoppedDisk] = {}
    for device, path in disks.items():
        kind = (formats or {}).get(device) or ("qcow2" if path.endswith(".qcow2") else "raw")
        if kind not in FORMATS:
            raise UsageError("use the format", repr(kind), f"of disk {device}: not one of {', '.join(FORMATS)}")
        disk = StoppedDisk(archive_name(device), path, kind)
        if result.setdefault(disk.name, disk) is not disk:
            raise DiskNameError("name the disks", device, f"two of them would both be {disk.name}")
    return list(result.values())


@asynccontextmanager
async def held(disks: Sequence[StoppedDisk]) -> AsyncIterator[None]:
    """No QEMU can open the images of `disks` for writing while the block runs.

    Raises:
        DiskInUseError: one is open for writing; the VM runs after all.
        NotFoundError, SourceError: an image is not there, or cannot be opened.
    """
    with ExitStack() as stack:
        for disk in disks:
            descriptor = await in_io_thread(_hold, disk)
            stack.callback(os.close, descriptor)  # which gives up the locks
        yield


def _hold(disk: StoppedDisk) -> int:
    """Open and lock the image; returns the descriptor that holds the locks."""
    try:
        descriptor = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError("read disk", disk.path, os_reason(error)) from error
    except OSError as error:
        raise SourceError("read disk", disk.path, os_reason(error)) from error
    try:
        _lock(descriptor)
        return descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise DiskInUseError(
            "read disk", disk.path, f"it is in use{_user_of(disk.path)}", "back up the running VM by its QMP socket"
        ) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return descriptor
        os.close(descriptor)
        raise SourceError("lock disk", disk.path, os_reason(error)) from error
    except BaseException:
        os.close(descriptor)
        raise


def _lock(descriptor: int) -> None:
    """Take the locks of a reader that lets nobody write.

    Raises:
        BlockingIOError: somebody uses what we forbid, or forbids what we use.
    """
    # First say it, then look: of two that come at once, at least one sees the other.
    for byte in (_USED_BASE + _CONSISTENT_READ, _UNSHARED_BASE + _WRITE, _UNSHARED_BASE + _RESIZE):
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    for byte in (_UNSHARED_BASE + _CONSISTENT_READ, _USED_BASE + _WRITE, _USED_BASE + _RESIZE):
        # Asking for a lock against everybody tells whether anybody has one.
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
        if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _user_of(path: str) -> str:
    """` by NAME (pid N)` of a process that has the image open, if one can be seen."""
    try:
        wanted = Path(path).stat()
    except OSError:
        return ""
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            with os.scandir(process / "fd") as descriptors:
                if any(os.path.samestat(entry.stat(), wanted) for entry in descriptors):
                    return f" by {(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue  # gone, or somebody else's
    return ""
