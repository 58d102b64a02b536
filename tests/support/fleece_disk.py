"""A disk with this checkout's `fleece`, for a Debian VM that has not installed its package.

    disk = fleece_disk(tmpfs / "d", tmpfs / "fleece.img", store=store_folder, qemu=backports_qemu())
    with DebianVm.start(qemu, disks=[disk]) as vm:
        vm.check("mount /dev/vdb /mnt && /mnt/fleece version")

On it are also `/mnt/store`, the files of a datastore without the empty folders of its chunks (`open_store` makes a
datastore of them), and `/mnt/qemu`, a QEMU that is not the VM's own: its programs lie in /mnt/qemu/bin.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.support.debian_vm import DebianVm
from tests.support.python_in_vm import python_files
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import VmDisk

#: Seconds for a command in the VM, a limit for what hangs: on a busy machine without acceleration it takes minutes.
COMMAND_S: Final = 600
_ROOMS: Final = ("agent", "core", "datastore", "diskfs", "fusefs", "hypervisor", "pxar", "repository", "server")
#: What a QEMU without firmware of its own kind of machine needs none of.
_LEFT_OUT: Final = ("doc", "*openbios*", "*u-boot*", "skiboot*", "slof*", "edk2*", "*.dtb", "keymaps")


def fleece_disk(
    folder: Path, disk: Path, *, store: Path | None = None, qemu: QemuBinary | None = None, mib: int = 600
) -> VmDisk:
    """Make the disk as the sparse file `disk` of so many MiB; `folder` has what is on it, with what it had before."""
    for name, content in python_files(_ROOMS, ["fleece"]).items():
        path = folder / "python" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    # In the VM that would take minutes.
    line = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(folder / "python")]
    subprocess.run(line, check=True, timeout=300)
    if store is not None:
        (folder / "store/.chunks").mkdir(parents=True)
        for path in store.rglob("*"):
            if path.is_file():
                copy = folder / "store" / path.relative_to(store)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    if qemu is not None:
        _copy_qemu(qemu, folder / "qemu")
    (folder / "fleece").write_text('#!/bin/sh\nPYTHONPATH=/mnt/python exec python3 -m agent.main "$@"\n')
    (folder / "fleece").chmod(0o755)
    subprocess.run(["truncate", "-s", f"{mib}M", str(disk)], check=True)
    line = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(folder), str(disk)]
    subprocess.run(line, check=True, timeout=120)
    return VmDisk(disk, "fleece")


def open_store(vm: DebianVm, target: str = "/srv") -> None:
    """A datastore in the VM's memory, with what the disk brought of one."""
    vm.check(f"mount -t tmpfs -o nr_inodes=0 tmpfs {target}; cp -a /mnt/store/. {target}")
    vm.check(f"cd {target}/.chunks && printf '%04x\\n' {{0..65535}} | xargs mkdir -p", timeout_s=COMMAND_S)


def _copy_qemu(qemu: QemuBinary, target: Path) -> None:
    """The program for machines of an unpacked QEMU (`backports_qemu`), with its libraries and firmware."""
    (target / "bin").mkdir(parents=True)
    shutil.copy2(qemu.system, target / "bin")
    root = qemu.folder.parent / "root"
    for part in ("usr/lib", "usr/share"):
        ignore = shutil.ignore_patterns(*_LEFT_OUT)
        shutil.copytree(root / part, target / "root" / part, symlinks=True, ignore=ignore)
    (target / "root/usr/bin").mkdir(exist_ok=True)
    shutil.copy2(root / "usr/bin" / Path(qemu.system).name, target / "root/usr/bin")
