"""The EFI variables of a running VM: its writable flash memory, which goes along as blob `efivars.fd.blob`.

docs/hypervisor.md, "What goes along".
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.errors import SourceError, os_reason
from core.limits import in_io_thread
from hypervisor import checked
from hypervisor.discovery import image_path
from hypervisor.qmp import Qmp
from hypervisor.unix_socket import Peer

#: The blob's name without `.blob`.
EFI_VARS_NAME: Final = "efivars.fd"
#: Bytes. The largest flash of the usual firmware has 8 MiB, the variables' part under 1 MiB.
MAX_SIZE: Final = 64 * 1024 * 1024

_FLASH: Final = "/machine/system.flash"


@dataclass(frozen=True, slots=True)
class EfiVars:
    """Where a VM keeps its EFI variables."""

    node: str  #: the block node of the flash memory
    size: int  #: bytes, at most `MAX_SIZE`
    driver: str  #: of the node: `raw` or `qcow2`
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
    """The EFI variables, read now from the raw image that QEMU has open; None if the VM has none.

    QEMU writes each change of the flash through to its image, so what another process reads there is what the guest
    would read. An image of another format must be read through an export of `EfiVars.node`.

    Raises:
        SourceError: the image is not raw, not local, or cannot be read.
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    found = await find_efi_vars(qmp)
    if found is None:
        return None
    if found.driver != "raw" or found.file is None:
        raise SourceError(
            "read the EFI variables of", qmp.where, f"they lie in a {found.driver} image", "use a raw image for them"
        )
    return await in_io_thread(_read, qmp.peer, found.file, found.size)


def _read(peer: Peer, name: str, size: int) -> bytes:
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
