"""A small Linux guest: the distribution's kernel for clouds, busybox, and an init that obeys one shell line at a time.

The guest listens on its second serial port (a unix socket on our side): one shell line in, its output and `##RC n` out.
The first thing it says is `##READY`. It is made from packages that are unpacked, never installed, in about ten
seconds, and kept in `.cache/`. With TCG it is ready two to four seconds after QEMU starts.

    disks         /dev/vda.. (virtio-blk), /dev/sda.. (virtio-scsi, AHCI), /dev/nvme0n1
    commands      busybox, and `ring` (ring.c): ordered O_DIRECT writes, see ring.py for reading them
    root=DEVICE   on the kernel's command line: that file system becomes the root, and its /sbin/init (`INIT`) obeys
"""

import gzip
import lzma
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket
from typing import Final, Self

import trio

from tests.support.apt import AptRoot, codename
from tests.support.cache import Unavailable, cached, once

#: Drivers by name; what they depend on comes along, what the kernel has built in or lacks is left out.
MODULES: Final = (
    "virtio_pci", "virtio_blk", "virtio_scsi", "virtio_console", "sd_mod", "ahci", "ata_piix", "nvme", "nbd", "fuse",
)  # fmt: skip
#: Drivers for a root file system that is more than busybox, laid beside the kernel in `SmallGuest.modules`.
ROOT_MODULES: Final = (
    *MODULES, "loop", "overlay", "dm_mod", "dm_snapshot", "xfs", "btrfs", "virtio_net", "efivarfs", "autofs4",
)  # fmt: skip
#: Words after which the guest has obeyed a line.
_DONE: Final = re.compile(rb"(?:^|\n)##RC (\d+)\r?\n")
#: First line the guest says.
READY: Final = b"##READY"
#: Seconds until a started guest must be ready; TCG on a busy machine takes ten times the two seconds it should.
BOOT_TIMEOUT_S: Final = 180.0
#: Raised when what is built changes.
_REVISION: Final = 2

INIT: Final = r"""#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
/bin/busybox mkdir -p /sbin /usr/bin /usr/sbin /tmp /proc /sys /dev /n
[ -e /bin/mount ] || /bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
if [ -e /modules ]; then
    while read -r module; do insmod "/m/$module.ko"; done < /modules
    root=$(sed -n 's/.*\broot=\([^ ]*\).*/\1/p' /proc/cmdline)
    if [ -n "$root" ]; then
        tries=0
        until [ -b "$root" ] || [ $tries -ge 100 ]; do sleep 0.1; tries=$((tries + 1)); done
        mount -t ext4 "$root" /n && umount /proc /sys /dev && exec switch_root /n /sbin/init
    fi
fi
exec </dev/ttyS1 >/dev/ttyS1 2>&1
stty raw -echo
echo "##READY $(cut -d' ' -f1 /proc/uptime)"
while read -r line; do
    eval "$line" </dev/null
    echo "##RC $?"
done
sync
poweroff -f
"""


@dataclass(frozen=True)
class SmallGuest:
    """What QEMU needs to boot the guest; `folder` also holds `busybox` and `ring`, for making root file systems."""

    folder: Path

    @property
    def kernel(self) -> Path:
        """For `-kernel`."""
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """For `-initrd`."""
        return self.folder / "initrd.gz"

    @property
    def modules(self) -> Path:
        """What belongs into /lib of a root file system: `modules/VERSION/` with `ROOT_MODULES`, before depmod."""
        return self.folder / "lib/modules"

    def write_root(self, folder: Path) -> None:
        """Make `folder` the root of a Linux that obeys lines: give it to `mke2fs -d`, boot with `root=/dev/vda`."""
        for part in ("bin", "sbin", "dev", "proc", "sys", "tmp", "data"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for program in ("busybox", "ring"):
            shutil.copy2(self.folder / program, folder / "bin" / program)
        (folder / "sbin/init").write_text(INIT)
        (folder / "sbin/init").chmod(0o755)


@once
def small_guest() -> SmallGuest:
    """The guest, built at the first use.

    Raises:
        Unavailable: no kernel can be downloaded, or there is no C compiler.
    """
    return SmallGuest(cached(f"guest-{_REVISION}", _build))


def _build(folder: Path) -> None:
    release = codename()
    apt = AptRoot.open("apt-release", (release,))
    kernels = [name for name in apt.depends("linux-image-cloud-amd64") if name.startswith("linux-image-")]
    if not kernels:
        raise Unavailable(f"{release} has no linux-image-cloud-amd64, whose kernel the small guest uses")
    unpacked = folder / "unpacked"
    apt.unpack([kernels[0], "busybox-static"], unpacked)
    shutil.copy2(next((unpacked / "boot").glob("vmlinuz-*")), folder / "vmlinuz")
    busybox = next(path for path in (unpacked / "bin/busybox", unpacked / "usr/bin/busybox") if path.exists())
    shutil.copy2(busybox, folder / "busybox")
    compile_static(Path(__file__).with_name("ring.c"), folder / "ring")
    files = _module_files(unpacked)
    modules = load_order(files, MODULES)
    entries: list[tuple[str, int, bytes]] = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "m", "dev", "proc")]
    entries += [(f"bin/{name}", stat.S_IFREG | 0o755, (folder / name).read_bytes()) for name in ("busybox", "ring")]
    entries += [(f"m/{name}.ko", stat.S_IFREG | 0o644, content) for name, content in modules]
    entries += [
        ("bin/sh", stat.S_IFLNK | 0o777, b"busybox"),
        ("modules", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name, _ in modules).encode()),
        ("init", stat.S_IFREG | 0o755, INIT.encode()),
    ]
    (folder / "initrd.gz").write_bytes(gzip.compress(newc_archive(entries), compresslevel=1, mtime=0))
    _keep_modules(unpacked, files, folder / "lib/modules")
    shutil.rmtree(unpacked)


def _keep_modules(unpacked: Path, files: dict[str, Path], target: Path) -> None:
    """`ROOT_MODULES` and what depmod wants to know, in the folders they had."""
    (version,) = (path.parent for path in unpacked.glob("**/modules/*/modules.builtin"))
    kept = [files[name] for name, _ in load_order(files, ROOT_MODULES)]
    for path in (*kept, *version.glob("modules.*")):
        place = target / path.relative_to(version.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place)


def compile_static(source: Path, program: Path) -> None:
    """Compile one C file into a program that needs no library of the guest's.

    Raises:
        Unavailable: there is no compiler.
    """
    line = ["gcc", "-O2", "-static", "-Wall", "-Werror", "-o", str(program), str(source)]
    try:
        subprocess.run(line, check=True, capture_output=True, text=True, timeout=120)
    except FileNotFoundError as error:
        raise Unavailable("there is no gcc to compile the guest's writer with") from error


def newc_archive(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive ("newc") of (name, mode, content or link target), all owned by root, as the kernel unpacks it."""
    parts = []
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        raw = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device (2), rdev (2), name size, check
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        parts += [header, bytes(-len(header) % 4), content, bytes(-len(content) % 4)]
    return b"".join(parts)


def _module_files(unpacked: Path) -> dict[str, Path]:
    found = (path for path in unpacked.rglob("*.ko*") if path.name.endswith((".ko", ".ko.xz")))
    return {path.name.split(".")[0].replace("-", "_"): path for path in found}


def load_order(files: dict[str, Path], wanted: Iterable[str]) -> list[tuple[str, bytes]]:
    """(name, content) of the modules `wanted` and of all they depend on, each after those it needs."""
    order: dict[str, bytes] = {}

    def visit(name: str) -> None:
        name = name.replace("-", "_")
        if name in order or name not in files:
            return
        raw = files[name].read_bytes()
        content = lzma.decompress(raw) if files[name].suffix == ".xz" else raw
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in depends[1].decode().split(",") if depends else ():
            visit(needed)
        order[name] = content

    for name in wanted:
        visit(name)
    return list(order.items())


class GuestError(Exception):
    """The guest did not answer, or a line it was to run failed."""


def _split_answer(received: bytes) -> tuple[int, str, bytes] | None:
    """Exit code, output and what follows, once an answer is whole."""
    match = _DONE.search(received)
    if match is None:
        return None
    output = received[: match.start()].decode(errors="replace").replace("\r\n", "\n")
    return int(match[1]), output, received[match.end() :]


class GuestControl:
    """Runs shell lines in the guest from trio; one at a time."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = b""

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Connect to the socket of the guest's second serial port."""
        return cls(await trio.open_unix_socket(path))

    async def ready(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Return when the guest has booted.

        Raises:
            GuestError: not within `timeout_s`.
        """
        with trio.move_on_after(timeout_s):
            while not re.search(READY + rb"[^\n]*\n", self._received):
                await self._receive()
            self._received = self._received.split(READY, 1)[1].split(b"\n", 1)[1]
            return
        raise GuestError(f"the guest is not ready after {timeout_s:.0f} s; it said {self._received[-500:]!r}")

    async def run(self, line: str, timeout_s: float = 60.0) -> tuple[int, str]:
        """Exit code and output (both streams) of one shell line; a background job (`... &`) outlives it.

        Raises:
            GuestError: no answer within `timeout_s`, or QEMU ended.
        """
        with trio.move_on_after(timeout_s):
            await self._stream.send_all(line.encode() + b"\n")
            while (answer := _split_answer(self._received)) is None:
                await self._receive()
            code, output, self._received = answer
            return code, output
        raise GuestError(f"no answer to {line!r} in {timeout_s:.0f} s; it said {self._received[-500:]!r}")

    async def check(self, line: str, timeout_s: float = 60.0) -> str:
        """Output of a line that must succeed.

        Raises:
            GuestError: it failed, or as `run`.
        """
        code, output = await self.run(line, timeout_s)
        if code:
            raise GuestError(f"{line!r} gave exit code {code}: {output}")
        return output

    async def aclose(self) -> None:
        """Hang up; the guest goes on."""
        await self._stream.aclose()

    async def _receive(self) -> None:
        try:
            data = await self._stream.receive_some(65536)
        except trio.BrokenResourceError as error:
            raise GuestError("the connection to the guest broke") from error
        if not data:
            raise GuestError("QEMU hung up")
        self._received += data


class BlockingGuestControl:
    """Runs shell lines in the guest from a plain thread or script; one at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket(AF_UNIX, SOCK_STREAM)
        self._socket.connect(str(path))
        self._received = b""

    def ready(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """As `GuestControl.ready`."""
        deadline = time.monotonic() + timeout_s
        while not re.search(READY + rb"[^\n]*\n", self._received):
            self._receive(deadline, "READY")
        self._received = self._received.split(READY, 1)[1].split(b"\n", 1)[1]

    def run(self, line: str, timeout_s: float = 60.0) -> tuple[int, str]:
        """As `GuestControl.run`."""
        deadline = time.monotonic() + timeout_s
        self._socket.sendall(line.encode() + b"\n")
        while (answer := _split_answer(self._received)) is None:
            self._receive(deadline, line)
        code, output, self._received = answer
        return code, output

    def check(self, line: str, timeout_s: float = 60.0) -> str:
        """As `GuestControl.check`."""
        code, output = self.run(line, timeout_s)
        if code:
            raise GuestError(f"{line!r} gave exit code {code}: {output}")
        return output

    def close(self) -> None:
        """Hang up; the guest goes on."""
        self._socket.close()

    def _receive(self, deadline: float, what: str) -> None:
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            data = self._socket.recv(65536)
        except (TimeoutError, ConnectionError) as error:
            raise GuestError(f"no answer to {what!r}; it said {self._received[-500:]!r}") from error
        if not data:
            raise GuestError("QEMU hung up")
        self._received += data
