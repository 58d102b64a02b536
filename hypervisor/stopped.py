"""A VM of the configuration whose QEMU does not run: its disks by path, while QEMU's image locks are held.

While a backup reads we say what `qemu-img convert` says: we read, and nobody may write or resize. A QEMU that has the
image open for writing makes us fail, and one that is started meanwhile says `Failed to get "write" lock`.
docs/hypervisor.md, "A VM that does not run".
"""

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

from core.errors import NotFoundError, SourceError, UsageError, os_reason
from core.limits import in_io_thread
from hypervisor.disk_names import archive_name
from hypervisor.errors import DiskNameError
from hypervisor.image_files import lock_for_reading

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
        lock_for_reading(descriptor, disk.path, "read disk")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
