"""The QEMUs there are to test with: the distribution's, and the newer one of its backports.

The newer one is unpacked below `.cache/qemu-10/` (the folder is named after the first version it was made for) and run
through wrapper scripts in its `bin/`, beside the distribution's and without touching it.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.apt import AptRoot, codename
from tests.support.cache import Unavailable, cached, once

TOOLS: Final = ("qemu-system-x86_64", "qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon")
#: `-L` folders of the unpacked tree; the ROMs of network cards may be the distribution's.
_FIRMWARE: Final = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
_PACKAGES: Final = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "qemu-utils", "seabios")


@dataclass(frozen=True)
class QemuBinary:
    """One set of QEMU's programs of the same version."""

    name: str  #: for test ids: `qemu-7.2`
    version: tuple[int, int, int]
    folder: Path  #: holds the programs

    @property
    def system(self) -> str:
        """Path of qemu-system-x86_64."""
        return self.tool("qemu-system-x86_64")

    @property
    def storage_daemon(self) -> str:
        """Path of qemu-storage-daemon."""
        return self.tool("qemu-storage-daemon")

    @property
    def img(self) -> str:
        """Path of qemu-img."""
        return self.tool("qemu-img")

    @property
    def nbd(self) -> str:
        """Path of qemu-nbd."""
        return self.tool("qemu-nbd")

    def tool(self, name: str) -> str:
        """Path of one of `TOOLS`."""
        return str(self.folder / name)


@once
def distribution_qemu() -> QemuBinary:
    """The QEMU that is installed.

    Raises:
        Unavailable: none is.
    """
    system = shutil.which("qemu-system-x86_64")
    if system is None:
        raise Unavailable("qemu-system-x86_64 is not installed")
    return _identified(Path(system).parent)


@once
def backports_qemu() -> QemuBinary:
    """The newer QEMU of the distribution's backports, downloaded and unpacked at the first use.

    Raises:
        Unavailable: no APT source of this machine offers it.
    """
    return _identified(cached("qemu-10", _unpack_backports) / "bin")


def _identified(folder: Path) -> QemuBinary:
    program = str(folder / "qemu-system-x86_64")
    text = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise Unavailable(f"{program} does not tell its version")
    version = (int(match[1]), int(match[2]), int(match[3]))
    return QemuBinary(f"qemu-{version[0]}.{version[1]}", version, folder)


def _unpack_backports(folder: Path) -> None:
    release = codename()
    if subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True).stdout.strip() != "x86_64":
        raise Unavailable("the newer QEMU is tested on amd64 only")
    suite = f"{release}-backports"
    apt = AptRoot.open("apt-backports", (release, suite))
    apt.latest("qemu-system-x86", suite)
    root = folder / "root"
    apt.unpack_with_dependencies(_PACKAGES, suite, root)
    (folder / "bin").mkdir()
    for tool in TOOLS:
        _write_wrapper(folder / "bin" / tool, tool, root)
        missing = _missing_libraries(root, root / "usr/bin" / tool)
        if missing:
            raise Unavailable(f"{tool} of {suite} needs {', '.join(missing)}, which APT did not bring")


def _write_wrapper(path: Path, tool: str, root: Path) -> None:
    """A script that becomes the program (same pid), with the libraries, modules and firmware it came with."""
    firmware = ""
    if tool.startswith("qemu-system-"):
        present = [part for part in _FIRMWARE if (root / part).is_dir()]
        # Folders of the distribution come last, for packages that were installed and so not fetched again.
        firmware = " ".join([*(f'-L "$root/{part}"' for part in present), *(f"-L /{part}" for part in _FIRMWARE)])
    path.write_text(
        "#!/bin/sh\n"
        f'root=$(cd "${{0%/*}}/../root" && pwd)\n'
        'LD_LIBRARY_PATH="$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu"\n'
        'QEMU_MODULE_DIR="$root/usr/lib/x86_64-linux-gnu/qemu"\n'
        "export LD_LIBRARY_PATH QEMU_MODULE_DIR\n"
        f'exec "$root/usr/bin/{tool}" {firmware} "$@"\n'
    )
    path.chmod(0o755)


def _missing_libraries(root: Path, program: Path) -> list[str]:
    libraries = f"{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu"
    text = subprocess.run(
        ["ldd", str(program)],
        env={"LD_LIBRARY_PATH": libraries, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    ).stdout
    return re.findall(r"^\s*(\S+) => not found", text, re.MULTILINE)
