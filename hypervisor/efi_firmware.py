"""EFI firmware of this host: which of its files fits a machine."""

from pathlib import Path
from typing import Final

#: Where distributions put it, the likeliest first: (file, for Secure Boot).
_CODE: Final = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", False),
    ("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", True),
    ("/usr/share/OVMF/OVMF_CODE.fd", False),
    ("/usr/share/OVMF/OVMF_CODE.secboot.fd", True),
    ("/usr/share/pve-edk2-firmware/OVMF_CODE_4M.fd", False),
    ("/usr/share/pve-edk2-firmware/OVMF_CODE_4M.secboot.fd", True),
    ("/usr/share/pve-edk2-firmware/OVMF_CODE.fd", False),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", False),
    ("/usr/share/edk2/x64/OVMF_CODE.secboot.4m.fd", True),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", False),
    ("/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", True),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", False),
    ("/usr/share/qemu/edk2-x86_64-code.fd", False),
    ("/usr/share/qemu/edk2-x86_64-secure-code.fd", True),
)
_ARM_CODE: Final = (
    ("/usr/share/AAVMF/AAVMF_CODE.fd", False),
    ("/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw", False),
    ("/usr/share/qemu/edk2-aarch64-code.fd", False),
)
#: Code and variables of OVMF together have one of these sizes in bytes, those of ARM one each of 64 MiB.
_SUMS: Final = (4 << 20, 2 << 20, 128 << 20)
#: Sizes of the variables alone.
VARIABLES_SIZES: Final = (540672, 131072, 64 << 20)


def is_for_secure_boot(code: Path) -> bool:
    """Whether firmware that `find_firmware` has found is one for Secure Boot."""
    return any(for_secure and code.name == Path(name).name for name, for_secure in _CODE)


def find_firmware(arch: str, *, variables: int | None, secure: bool, root: Path = Path("/")) -> Path | None:
    """The code that goes with variables of this size; None if this host has none. Blocks.

    Args:
        arch: of the machine.
        variables: bytes; None: any.
        secure: one for Secure Boot is preferred; without it such one is not taken, since it needs more of the machine.
        root: where the host's files begin.
    """
    found = []
    for name, for_secure in _ARM_CODE if arch == "aarch64" else _CODE:
        path = root / name.lstrip("/")
        try:
            size = path.stat().st_size
        except OSError:
            continue
        if variables is None or size + variables in _SUMS:
            found.append((for_secure, path))
    for for_secure, path in found:
        if for_secure is secure:
            return path
    return None if not found or not secure else found[0][1]
