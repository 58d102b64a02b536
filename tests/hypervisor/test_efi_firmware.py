"""EFI firmware of a host: the code that fits a machine's variables."""

from pathlib import Path

import pytest

from hypervisor.efi_firmware import find_firmware, is_for_secure_boot

LARGE, SMALL = 540_672, 131_072


def make(root: Path, name: str, size: int) -> Path:
    path = root / "usr/share/OVMF" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_the_code_has_the_size_that_goes_with_the_variables(tmp_path: Path) -> None:
    large = make(tmp_path, "OVMF_CODE_4M.fd", (4 << 20) - LARGE)
    small = make(tmp_path, "OVMF_CODE.fd", (2 << 20) - SMALL)
    assert find_firmware("x86_64", variables=LARGE, secure=False, root=tmp_path) == large
    assert find_firmware("x86_64", variables=SMALL, secure=False, root=tmp_path) == small
    assert find_firmware("x86_64", variables=None, secure=False, root=tmp_path) == large
    assert find_firmware("x86_64", variables=1000, secure=False, root=tmp_path) is None
    assert find_firmware("aarch64", variables=None, secure=False, root=tmp_path) is None


def test_secure_boot_has_code_of_its_own_and_does_without_rather_than_not_start(tmp_path: Path) -> None:
    plain = make(tmp_path, "OVMF_CODE_4M.fd", (4 << 20) - LARGE)
    assert find_firmware("x86_64", variables=LARGE, secure=True, root=tmp_path) == plain
    secure = make(tmp_path, "OVMF_CODE_4M.secboot.fd", (4 << 20) - LARGE)
    assert find_firmware("x86_64", variables=LARGE, secure=True, root=tmp_path) == secure
    assert (is_for_secure_boot(plain), is_for_secure_boot(secure)) == (False, True)
    plain.unlink()
    assert find_firmware("x86_64", variables=LARGE, secure=False, root=tmp_path) is None


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_a_host_without_any_has_none(tmp_path: Path, arch: str) -> None:
    assert find_firmware(arch, variables=None, secure=False, root=tmp_path) is None
