"""The root file system of the Debian VM: built from the distribution's packages as root, kept in `.cache/`.

`mmdebstrap` makes it (it is unpacked for that, never installed), the kernel and its modules are those of the small
guest, `mke2fs -d` turns it into an image. Half a minute; its folder in the cache is named after the recipe, so a change
of anything below builds it anew.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tests.support.apt import AptRoot, codename
from tests.support.cache import Unavailable, cached, once
from tests.support.guest import small_guest

#: What a hypervisor host has. No Python library beyond those the Debian package of Fleece depends on.
PACKAGES: Final = (
    "systemd-sysv", "udev", "kmod", "dbus", "python3", "python3-libnbd", "python3-cryptography", "libnbd-bin",
    "qemu-system-x86", "qemu-utils", "qemu-guest-agent", "fuse3", "libfuse3-3", "iproute2", "procps", "psmisc",
    "adduser", "openssl", "nbdkit", "nbdkit-plugin-python",
)  # fmt: skip
#: Nobody reads or needs these in the VM.
_LEFT_OUT: Final = ("man", "doc", "locale", "info", "qemu/edk2*", "qemu/*.dtb", "zoneinfo")
_CONTROL: Final = Path(__file__).with_name("debian_vm_control.py")
#: Bytes of the file system; what is written to it beyond 700 MB is in each VM's overlay.
_SIZE: Final = 4 << 30
#: Seconds for the whole build on a busy machine with a slow mirror; a build that hangs skips the tests.
_BUILD_S: Final = 600

_FILES: Final = {
    "etc/hostname": "fleece-vm\n",
    "etc/hosts": "127.0.0.1 localhost fleece-vm\n::1 localhost\n",
    "etc/fstab": "",
    "etc/machine-id": "f1eece00f1eece00f1eece00f1eece00\n",
    "etc/default/locale": "LANG=C.UTF-8\n",
    "etc/systemd/system/fleece-test-control.service": """\
[Unit]
Description=Obeys the tests outside
Wants=dev-virtio\\x2dports-fleece.control.device
After=dev-virtio\\x2dports-fleece.control.device

[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/debian_vm_control.py
Environment=LANG=C.UTF-8 HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
KillMode=process
TasksMax=infinity
OOMScoreAdjust=-900
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target
""",
}
#: Of no use in a VM that lives for minutes: each costs a part of a second of its start.
_MASKED: Final = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "fstrim.timer", "getty@tty1.service", "serial-getty@ttyS0.service", "systemd-hwdb-update.service",
    "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "systemd-network-generator.service",
    "systemd-networkd.service", "systemd-pcrphase.service", "systemd-pcrphase-sysinit.service",
    "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount", "systemd-logind.service",
    "systemd-random-seed.service", "systemd-user-sessions.service",
)  # fmt: skip


@once
def debian_image() -> Path:
    """The image, an ext4 file system without partitions; never written to, VMs use overlays.

    Raises:
        Unavailable: this user is not root, packages cannot be fetched, or the machine lets nobody chroot.
    """
    recipe = (small_guest().folder.name, codename(), PACKAGES, _LEFT_OUT, _CONTROL.read_text(), _FILES, _MASKED, _SIZE)
    key = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    return cached(f"debian-vm-{key}", _build) / "root.img"


def _build(folder: Path) -> None:
    if os.geteuid() != 0:
        raise Unavailable("the Debian VM's file system is made by root only")
    apt = AptRoot.open("apt-release", (codename(),))
    # In memory if it can be: dpkg waits for the disk a thousand times.
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else folder
    with tempfile.TemporaryDirectory(prefix="fleece-debian-", dir=parent) as name:
        work = Path(name)
        work.chmod(0o755)
        root = work / "root"
        apt.unpack(["mmdebstrap"], work / "tools")
        _bootstrap(work / "tools/usr/bin", root, apt.folder / "fleece.sources", work)
        _configure(root)
        image = folder / "root.img"
        _run("truncate", "-s", str(_SIZE), str(image))
        _run(
            "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-d", str(root), str(image)
        )


def _bootstrap(tools: Path, root: Path, sources: Path, work: Path) -> None:
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _LEFT_OUT if "*" not in name]
    left_out += [f"--dpkgopt=path-exclude=/usr/share/{name}" for name in _LEFT_OUT if "*" in name]
    options = ["--mode=root", "--variant=minbase", "--format=directory", '--aptopt=Apt::Install-Recommends "false"']
    options += ["--dpkgopt=force-unsafe-io", *left_out, f"--include={','.join(PACKAGES)}"]
    _run(
        "perl", str(tools / "mmdebstrap"), *options, codename(), str(root), str(sources),
        env={"PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(work), "LC_ALL": "C.UTF-8"},
    )  # fmt: skip


def _configure(root: Path) -> None:
    shutil.copytree(small_guest().modules, root / "usr/lib/modules", dirs_exist_ok=True)
    (version,) = small_guest().modules.iterdir()
    _run("chroot", str(root), "/sbin/depmod", version.name)
    (root / "usr/local/lib").mkdir(parents=True, exist_ok=True)
    shutil.copy2(_CONTROL, root / "usr/local/lib" / _CONTROL.name)
    for name, text in _FILES.items():
        path = root / name
        path.unlink(missing_ok=True)
        path.write_text(text)
    units = root / "etc/systemd/system"
    for name in _MASKED:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    _run("chroot", str(root), "systemctl", "enable", "-q", "fleece-test-control.service")


def _run(*line: str, env: dict[str, str] | None = None) -> None:
    """Run a step of the build.

    Raises:
        Unavailable: it failed; says the last it said.
    """
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_BUILD_S, env=env or path
        )
    except FileNotFoundError as error:
        raise Unavailable(f"{line[0]} is not installed, which makes the Debian VM") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"the Debian VM was not built in {_BUILD_S} s") from error
    if done.returncode:
        said = [text for text in done.stderr.splitlines() if text.strip()] or ["nothing was said"]
        wrong = [text for text in said if text.startswith("E:")] or said[-1:]
        raise Unavailable(f"the Debian VM cannot be built: {Path(line[0]).name}: {wrong[0]}")
