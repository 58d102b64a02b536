"""A kernel with the module `nbd` that is made of files, and a `qemu-nbd` that changes them: for hosts without one.

The folders stand for `/sys` and `/dev`. The program `qemu-nbd` is a script that takes a device as the real one
does: it fails with its words where the device is taken, keeps it until it is told, asked or killed, and frees it. What
it is to do otherwise stands in files of `behaviour`.
"""

import contextlib
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hypervisor.nbd_devices import NbdHost

_PROGRAM = r"""#!PYTHON
import os, re, signal, sys, time
root = ROOT
words = " ".join(sys.argv)
action, number = re.search(r"--(connect|disconnect)=\S*/nbd(\d+)", words).groups()
block = f"{root}/sys/block/nbd{number}"
with open(f"{root}/calls", "a") as log:
    log.write(f"{action} {number} {words}\n")
def behaviour(name):
    try:
        with open(f"{root}/behaviour/{name}-{number}") as file:
            return file.read()
    except OSError:
        return ""
if action == "disconnect":
    try:
        with open(f"{block}/pid") as file:
            pid = int(file.read())
        if not behaviour("deaf"):
            os.kill(pid, signal.SIGUSR1)
    except OSError:
        pass
    print(f"/dev/nbd{number} disconnected")
    sys.exit(0)
if said := behaviour("fails"):
    print(f"qemu-nbd: {said}", file=sys.stderr)
    sys.exit(1)
def free(*_):
    os.unlink(f"{block}/pid")
    with open(f"{block}/size", "w") as file:
        file.write("0\n")
    os._exit(0)
signal.signal(signal.SIGUSR1, free)
signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour("deaf") else free)
try:
    descriptor = os.open(f"{block}/pid", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
except FileExistsError:
    print(f"qemu-nbd: Failed to set NBD socket\nqemu-nbd: Disconnect client, due to: ...", file=sys.stderr)
    sys.exit(1)
os.write(descriptor, f"{os.getpid()}\n".encode())
with open(f"{block}/size", "w") as file:
    file.write("2048\n")
while True:
    signal.pause()
"""


@dataclass
class FakeNbd:
    """The folder of all that."""

    root: Path
    devices: int = 4
    times: list[float] = field(default_factory=lambda: [1_000_000.0])

    def __post_init__(self) -> None:
        for folder in ("bin", "dev", "behaviour", "sys/module/nbd/parameters"):
            (self.root / folder).mkdir(parents=True)
        (self.root / "sys/module/nbd/parameters/nbds_max").write_text(f"{self.devices}\n")
        for number in range(self.devices):
            block = self.root / f"sys/block/nbd{number}"
            (block / "holders").mkdir(parents=True)
            (block / "size").write_text("0\n")
            (block / "ro").write_text("1\n")
            (block / "dev").write_text(f"43:{number * 16}\n")
            (self.root / f"dev/nbd{number}").write_text(f"43:{number * 16}")
        program = self.root / "bin/qemu-nbd"
        program.write_text(_PROGRAM.replace("PYTHON", sys.executable).replace("ROOT", repr(str(self.root))))
        program.chmod(0o755)

    @property
    def path(self) -> str:
        """For the variable PATH."""
        return f"{self.root / 'bin'}:{os.environ['PATH']}"

    @property
    def reservations(self) -> Path:
        """The file of them."""
        return self.root / "run/reserved"

    def host(self) -> NbdHost:
        """These devices."""
        return NbdHost(
            self.reservations,
            self.root / "run/lock",
            sys=self.root / "sys",
            dev=self.root / "dev",
            mounts=self.root / "mounts",
            swaps=self.root / "swaps",
            device_of=_number_in,
            clock=lambda: self.times[-1],
        )

    def take(self, number: int, pid: int = 1) -> None:
        """Somebody else uses the device."""
        (self.root / f"sys/block/nbd{number}/pid").write_text(f"{pid}\n")
        (self.root / f"sys/block/nbd{number}/size").write_text("4096\n")

    def user(self, number: int) -> int | None:
        """The process that serves the device."""
        try:
            return int((self.root / f"sys/block/nbd{number}/pid").read_text() or 0)
        except FileNotFoundError:
            return None

    def end_all(self) -> None:
        """End the programs that still serve a device."""
        for number in range(self.devices):
            pid = self.user(number)
            with contextlib.suppress(OSError):
                if pid and str(self.root) in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)

    def behave(self, what: str, number: int, how: str = "yes") -> None:
        """`fails`: connecting ends with these words. `deaf`: nothing but SIGKILL ends it."""
        (self.root / f"behaviour/{what}-{number}").write_text(how)

    def calls(self) -> list[str]:
        """`connect 0`, `disconnect 0`, ..."""
        try:
            return [" ".join(line.split()[:2]) for line in (self.root / "calls").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def command_lines(self) -> list[str]:
        """How `qemu-nbd` was called."""
        return (self.root / "calls").read_text().splitlines()


def _number_in(path: Path) -> tuple[int, int] | None:
    try:
        major, minor = path.read_text().split(":")
    except (OSError, ValueError):
        return None
    return int(major), int(minor)
