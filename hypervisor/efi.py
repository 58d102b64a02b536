"""The EFI variables of a running VM: its writable flash memory, which goes along as blob `efivars.fd.blob`.

QEMU copies them itself, by a backup job into memory that both share: that works for every format of the image and
wherever it lies. Before 9.1 it keeps every descriptor it was ever passed as long as any other client is connected to a
monitor of its; there a raw image is read directly, if QEMU has that very file open.
docs/hypervisor.md, "What goes along".
"""

import fcntl
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from core.errors import SourceError, os_reason
from core.limits import in_io_thread
from hypervisor import checked
from hypervisor.disk_names import image_path
from hypervisor.errors import QmpCommandError, QmpTimeoutError
from hypervisor.qmp import Qmp
from hypervisor.unix_socket import Peer

#: The blob's name without `.blob`.
EFI_VARS_NAME: Final = "efivars.fd"
#: Bytes. The largest flash of the usual firmware has 8 MiB, the variables' part under 1 MiB.
MAX_SIZE: Final = 64 * 1024 * 1024

_FLASH: Final = "/machine/system.flash"
#: The copy counts as a fleecing image, so that clean-up knows it; no VM has so many disks.
_NODE: Final = "fleece-f9999"
_JOB: Final = "fleece-efi"
#: The first version that gives a descriptor back when it is removed, and how many an older one may be left with.
_GIVES_BACK: Final = (9, 1, 0)
_MAX_KEPT: Final = 16
#: Seconds for copying a few hundred KiB; the guest may be frozen meanwhile.
_COPY_TIMEOUT_S: Final = 5.0
#: Seconds for a cancelled job to end.
_CANCEL_TIMEOUT_S: Final = 2.0
#: Seconds for removing job and node again.
_CLEANUP_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class EfiVars:
    """Where a VM keeps its EFI variables."""

    node: str  #: the block node of the flash memory
    size: int  #: bytes, at most `MAX_SIZE`
    driver: str  #: of the node: `raw`, `qcow2`
    file: str | None  #: path of the image, as QEMU knows it


async def find_efi_vars(qmp: Qmp) -> EfiVars | None:
    """The writable flash memory of a VM; None if it has none.

    Raises:
        SourceError: it is larger than any flash.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    where = f"{qmp.where}, query-block"
    for entry in checked.objects(await qmp.execute("query-block"), where):
        qdev = checked.optional(entry, "qdev", str, where) or ""
        inserted = checked.optional(entry, "inserted", dict, where)
        if not qdev.startswith(_FLASH) or inserted is None or checked.field(inserted, "ro", bool, where):
            continue
        size = checked.field(checked.field(inserted, "image", dict, where), "virtual-size", int, where)
        if not 0 < size <= MAX_SIZE:
            raise SourceError("read the EFI variables of", qmp.where, f"a flash memory of {size} bytes")
        return EfiVars(
            node=checked.field(inserted, "node-name", str, where),
            size=size,
            driver=checked.field(inserted, "drv", str, where),
            file=image_path(checked.optional(inserted, "file", str, where) or ""),
        )
    return None


async def efi_vars(qmp: Qmp) -> bytes | None:
    """The EFI variables as they are now; None if the VM has none. Cancelled or failed, QEMU is as before.

    Raises:
        SourceError: QEMU cannot copy them.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    found = await find_efi_vars(qmp)
    if found is None:
        return None
    if qmp.version < _GIVES_BACK:
        if found.driver == "raw" and found.file is not None:
            with suppress(SourceError):  # hidden from us: QEMU copies it
                return await in_io_thread(_read, qmp.peer, found.file, found.size)
        await _check_kept(qmp)
    memory = os.memfd_create("fleece-efi", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory, found.size)
        # QEMU gets a descriptor to write to; it must not make us hold more than that.
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        async with _target(qmp, memory):
            await _copy(qmp, found.node)
        return os.pread(memory, found.size, 0)
    except QmpCommandError as error:
        raise SourceError("read the EFI variables of", qmp.where, error.desc) from error
    finally:
        os.close(memory)


@asynccontextmanager
async def _target(qmp: Qmp, memory: int) -> AsyncIterator[None]:
    """The node `_NODE` over our memory while the block runs."""
    filename = await qmp.add_fd(memory, opaque=_JOB)
    try:
        await _remove_copy(qmp)  # of a killed run
        await qmp.execute("blockdev-add", {"driver": "file", "node-name": _NODE, "filename": filename})
        yield
    finally:
        with trio.move_on_after(_CLEANUP_TIMEOUT_S, shield=True):
            await _remove_copy(qmp)
            await qmp.remove_fd_set(filename)


async def _remove_copy(qmp: Qmp) -> None:
    with suppress(QmpCommandError, QmpTimeoutError):  # in the good case it is done already
        await qmp.execute("job-cancel", {"id": _JOB})
        # It takes a moment, and as long as the job is there the node cannot go.
        await _ended(qmp, _CANCEL_TIMEOUT_S)
    for command, arguments in (("job-dismiss", {"id": _JOB}), ("blockdev-del", {"node-name": _NODE})):
        with suppress(QmpCommandError):  # gone already
            await qmp.execute(command, arguments)


async def _copy(qmp: Qmp, node: str) -> None:
    arguments = {"job-id": _JOB, "device": node, "target": _NODE, "sync": "full", "auto-dismiss": False}
    await qmp.execute("blockdev-backup", arguments)
    job = await _ended(qmp, _COPY_TIMEOUT_S)
    error = None if job is None else checked.optional(job, "error", str, f"{qmp.where}, query-jobs")
    if job is None or error is not None:
        raise SourceError("read the EFI variables of", qmp.where, error or "QEMU has lost the job that copies them")


async def _ended(qmp: Qmp, timeout_s: float) -> dict[str, Any] | None:
    """Our job when it has ended; None if it is gone."""
    where = f"{qmp.where}, query-jobs"

    def ours(answer: Any) -> dict[str, Any] | None:
        return next((job for job in checked.objects(answer, where) if job.get("id") == _JOB), None)

    def ended(answer: Any) -> bool:
        job = ours(answer)
        return job is None or job.get("status") == "concluded"

    return ours(await qmp.poll("query-jobs", ended, timeout_s=timeout_s, interval_s=0.005))


async def _check_kept(qmp: Qmp) -> None:
    kept = [fd for fds in (await qmp.fd_sets()).values() for fd in fds if fd.get("opaque") == _JOB]
    if len(kept) >= _MAX_KEPT:
        raise SourceError(
            "read the EFI variables of",
            qmp.where,
            f"QEMU keeps {len(kept)} descriptors of earlier backups while another client is connected",
            "use a raw image for the variables, or QEMU 9.1",
        )


def _read(peer: Peer, name: str, size: int) -> bytes:
    """What is in the image `name`; QEMU writes each change of a flash through to it."""
    # Only what QEMU itself has open: a path alone, from a process that may be hostile, could name any file of ours.
    path = Path(f"/proc/{peer.pid}/cwd") / name if not name.startswith("/") else Path(f"/proc/{peer.pid}/root{name}")
    try:
        wanted = path.stat()
        if not (stat.S_ISREG(wanted.st_mode) or stat.S_ISBLK(wanted.st_mode)):
            raise SourceError("read the EFI variables in", name, "it is neither a file nor a block device")
        with os.scandir(f"/proc/{peer.pid}/fd") as descriptors:
            for entry in descriptors:
                if _same(entry, wanted):
                    with Path(entry.path).open("rb") as image:
                        # Zeros: what QEMU reads where an image of odd length ends.
                        return image.read(size).ljust(size, b"\0")
    except OSError as error:
        raise SourceError("read the EFI variables in", name, os_reason(error)) from error
    raise SourceError("read the EFI variables in", name, "QEMU does not have that file open")


def _same(entry: os.DirEntry[str], wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(entry.stat(), wanted)
    except OSError:
        return False  # closed meanwhile
