"""EFI firmware for machines under test: the distribution's package, unpacked and not installed."""

from pathlib import Path

from tests.support.apt import AptRoot, codename
from tests.support.cache import cached, once


@once
def ovmf() -> Path:
    """A folder with `usr/share/OVMF/` in it.

    Raises:
        Unavailable: it cannot be downloaded.
    """
    return cached("ovmf-1", _build) / "root"


def _build(folder: Path) -> None:
    AptRoot.open("apt-release", (codename(),)).unpack(["ovmf"], folder / "root")
