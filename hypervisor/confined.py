"""A QEMU that runs what nobody has checked: with as few rights as this host lets us take from it.

It never opens files of the host by name but its own firmware: disks, sockets and pictures are descriptors it inherits.
As root it runs as nobody, without capabilities, in a network of its own that has nothing but loopback; in a service
that may not change users it stays root, but without capabilities, too. QEMU's own system-call filter, and limits for
memory and files, come on top. docs/test-boot.md, "Confinement".
"""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from core.limits import in_io_thread
from hypervisor.children import running
from hypervisor.errors import BootTrialError

#: User and group nobody, as on every Linux.
_NOBODY: Final = 65534
#: Capabilities, as bits.
_KILL, _SETGID, _SETUID, _SETPCAP, _SYS_ADMIN = (1 << number for number in (5, 6, 7, 8, 21))
#: Gives all capabilities up and becomes another program, which gets none back: setpriv cannot, where the bounding set
#: must stay. Version 3 of capset(2): 64 bits each of what is effective, permitted and inheritable.
_DROP: Final = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):
    sys.exit(f"capset: {os.strerror(ctypes.get_errno())}")
os.execvp(sys.argv[1], sys.argv[1:])
"""
#: How TCG is asked for: its code is never writable where it is executed, which hardened services forbid.
TCG: Final = "tcg,split-wx=on,tb-size=128"
#: Options of QEMU for its system-call filter: no new programs, no other rights, no other scheduling.
SANDBOX: Final = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
#: Bytes of address space that QEMU itself needs beside the guest's memory: buffers of TCG, stacks of threads.
_OWN_MEMORY: Final = 12 * 1024**3
_MAX_DESCRIPTORS: Final = 1024
_KVM: Final = Path("/dev/kvm")

#: Seconds for a probe: SeaBIOS needs 0.1 to 0.5 of them.
_PROBE_TIMEOUT_S: Final = 10.0
#: KVM may be slower than this many times TCG, or this many seconds, before it counts as not working: nested in some
#: clouds it needs 30 times as long for everything.
_SLOWER: Final = 3.0
_SLOW_S: Final = 1.5
#: A boot sector: `cli; mov al,0x10; mov dx,0x501; out dx,al; hlt`. The port makes QEMU end with exit code 33.
_PROBE: Final = bytes.fromhex("fab010ba0105eef4").ljust(510, b"\0") + b"\x55\xaa"
_PROBE_EXIT: Final = 33


@dataclass(frozen=True, slots=True)
class Limits:
    """What one machine may take."""

    memory: int  #: bytes of the guest
    file: int  #: bytes of the largest file it writes, its own memory included: what ends a QEMU out of control


async def confined(command: Sequence[str], limits: Limits) -> list[str]:
    """The command line that runs `command` with fewer rights; for `hypervisor.children.running`."""
    return await in_io_thread(_confined, command, limits)


def _confined(command: Sequence[str], limits: Limits) -> list[str]:
    line: list[str] = []
    rights = ["setpriv", "--no-new-privs"]
    capable = _capabilities()  # a container, or a hardened service, may be root without some
    if capable & _SYS_ADMIN and _works("unshare", "--net", "--", "true"):
        line += ["unshare", "--net", "--"]
    if capable & _SETPCAP:
        rights += ["--inh-caps=-all", "--bounding-set=-all"]
    # Binaries in somebody's home cannot be run by nobody, nor by a root that may not overrule their permissions.
    open_to_all = _for_all(command[0])
    # Whoever may not end processes of other users must not start one.
    needed = _SETUID | _SETGID | _KILL
    becomes_nobody = capable & needed == needed and os.geteuid() == 0 and open_to_all
    if becomes_nobody:
        group = _kvm_group()
        rights += [f"--reuid={_NOBODY}", f"--regid={_NOBODY}"]
        rights += ["--clear-groups"] if group is None else [f"--groups={group}"]
    # The kernel forgets the former one, of `running`, when the user changes.
    line += [*rights, "--pdeathsig", "KILL", "--"]
    if capable and open_to_all and not becomes_nobody:
        line += [sys.executable, "-I", "-S", "-c", _DROP]
    line += ["prlimit", "--core=0", f"--fsize={limits.file}", f"--as={limits.memory + _OWN_MEMORY}"]
    return [*line, f"--nofile={_MAX_DESCRIPTORS}", "--", *command]


def _capabilities() -> int:
    """Those of this process, as bits."""
    try:
        fields = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["CapEff"], 16)
    except (OSError, KeyError, ValueError):
        return 0


def _works(*command: str) -> bool:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _for_all(program: str) -> bool:
    path = shutil.which(program)
    if path is None:
        return False
    real = Path(path).resolve()
    return all(one.stat().st_mode & stat.S_IXOTH for one in (real, *real.parents))


def _kvm_group() -> int | None:
    try:
        found = _KVM.stat()
    except OSError:
        return None
    return found.st_gid if found.st_mode & 0o060 == 0o060 and found.st_mode & 0o006 != 0o006 else None


async def accelerator(program: str, wanted: str) -> tuple[str, str]:
    """The accelerator to use, and why, in words.

    Args:
        program: QEMU.
        wanted: `kvm`, `tcg`, or `auto`: KVM where it works.

    Raises:
        BootTrialError: KVM is wanted and does not work.
    """
    if wanted == "tcg":
        return "tcg", "as asked for"
    if not await in_io_thread(_KVM.exists):
        took, why = None, "this host has no /dev/kvm"
    else:
        took, why = await _probe(program, "kvm")
    if wanted == "auto" and took is not None and took > _SLOW_S:
        other, _ = await _probe(program, "tcg")
        if other is not None and took > _SLOWER * other:
            took, why = None, f"KVM is slow here ({took:.1f} s for what TCG does in {other:.1f} s)"
    if took is not None:
        return "kvm", "it works"
    if wanted == "kvm":
        raise BootTrialError("use", "KVM", why, "leave --accel out, or give --accel tcg")
    return "tcg", why


async def _probe(program: str, accel: str) -> tuple[float | None, str]:
    """Seconds that a machine needs to run one sector; None, and why, if it does not."""
    sector = os.memfd_create("fleece-probe", os.MFD_CLOEXEC)
    try:
        os.write(sector, _PROBE)
        os.ftruncate(sector, 1 << 20)
        reading = os.open(f"/proc/self/fd/{sector}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            disk = "driver=raw,node-name=d,read-only=on,file.driver=file,file.filename=/dev/fdset/1"
            command = [
                program, "-nodefaults", "-no-user-config", "-display", "none",
                "-accel", TCG if accel == "tcg" else accel,
                "-m", "32",
                "-add-fd", f"fd={reading},set=1", "-blockdev", disk, "-device", "virtio-blk-pci,drive=d",
                "-device", "isa-debug-exit", *SANDBOX,
            ]  # fmt: skip
            started = trio.current_time()
            line = await confined(command, Limits(32 << 20, 1 << 30))
            async with running(line, fault=BootTrialError, pass_fds=[reading], stop_s=0.1) as child:
                with trio.move_on_after(_PROBE_TIMEOUT_S):
                    code = await child.wait()
                    if code == _PROBE_EXIT:
                        return trio.current_time() - started, ""
                    return None, f"{accel} does not work: {(await child.last_words())[:200] or f'exit code {code}'}"
                return None, f"{accel} does not work: a machine hangs"
        finally:
            os.close(reading)
    finally:
        os.close(sector)
