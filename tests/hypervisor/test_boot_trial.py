"""Machines on trial on real QEMUs: guests of one sector that live, die, or do harm."""

import os
import re
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from core.buffers import Buffer
from core.errors import FormatError
from hypervisor.boot_linger import screen_at
from hypervisor.boot_trial import Sign, TrialOptions, try_boot
from hypervisor.boot_watch import Trial
from hypervisor.confined import accelerator
from hypervisor.efi_firmware import find_firmware
from hypervisor.errors import BootTrialError
from hypervisor.machine import Device, Kernel, Machine, MachineDisk
from hypervisor.nbd_server import serve_disk
from hypervisor.qmp import Qmp
from tests.support.boot_sectors import say, silent
from tests.support.guest import SmallGuest
from tests.support.ovmf import ovmf
from tests.support.qemu_binaries import QemuBinary, backports_qemu, distribution_qemu
from tests.support.waiting import until

MIB = 1024**2
ANY = (Sign("guest-agent"), Sign("serial"), Sign("screen"))

pytestmark = pytest.mark.qemu


@dataclass
class Memory:
    """A disk in memory; what is beyond `good` cannot be read."""

    content: bytes
    good: int = 1 << 62

    @property
    def size(self) -> int:
        return len(self.content)

    async def read(self, offset: int, length: int) -> Buffer:
        if offset + length > self.good:
            raise FormatError("read chunk", "vm/1/drive-a.img", "its CRC is wrong")
        return self.content[offset : offset + length]

    def zeros(self, offset: int, length: int) -> Sequence[tuple[int, bool]]:
        return [(length, False)]


MACHINE = Machine(disks=(MachineDisk(Device("virtio-blk-pci", {"id": "a"}), "drive-a.img"),))


async def trial(
    disk: Memory | bytes,
    *,
    signs: Sequence[Sign] = ANY,
    timeout_s: float = 60.0,
    machine: Machine = MACHINE,
    qemu: QemuBinary | None = None,
    linger: Callable[[Qmp, Trial], Any] | None = None,
    firmware: Path | None = None,
    variables: bytes | None = None,
    memory: int = 64 * MIB,
    **more: Any,
) -> Trial:
    served = Memory(disk) if isinstance(disk, bytes) else disk
    options = TrialOptions(
        signs, timeout_s, 1.0, memory=memory, accel="tcg", program=(qemu or distribution_qemu()).system, **more
    )
    async with serve_disk(served, where="a disk") as address:
        disks = {"drive-a.img": (address, served.size)}
        return await try_boot(machine, disks, options, linger=linger, firmware=firmware, variables=variables)


@pytest.fixture(params=["distribution", pytest.param("backports", marks=pytest.mark.long)])
def qemu(request: pytest.FixtureRequest) -> QemuBinary:
    return distribution_qemu() if request.param == "distribution" else backports_qemu()


@pytest.mark.parametrize("qemu", ["distribution", "backports"], indirect=True)
async def test_a_login_prompt_on_the_serial_port_is_life(qemu: QemuBinary) -> None:
    found = await trial(say(serial="Debian\nweb login: ", screen="hello"), qemu=qemu)
    assert (found.alive, found.sign, found.reason) == (True, "serial", "the serial port says 'web login:'")
    assert found.serial.rstrip() == b"Debian\r\nweb login:"  # what comes after the sign may not
    assert found.picture is not None
    assert (found.accel, found.restarts, found.warnings) == ("tcg", 0, [])
    assert found.qemu == ".".join(map(str, qemu.version))


async def test_a_screen_that_stands_still_with_a_processor_at_rest_is_life(qemu: QemuBinary) -> None:
    found = await trial(say(serial="x", screen="Debian 12\nweb login: "), signs=[Sign("screen")], qemu=qemu)
    assert (found.alive, found.sign) == (True, "screen")
    assert found.picture is not None
    assert not found.picture.blank


@pytest.mark.parametrize("then", ["spin", pytest.param("halt", marks=pytest.mark.long)])
async def test_a_screen_that_stands_still_over_a_dead_processor_is_not(then: str) -> None:
    found = await trial(say(serial="x", screen="something\nbroken", then=then), signs=[Sign("screen")], timeout_s=3.0)
    assert (found.alive, found.reason) == (False, "no sign of life within 3 s")


@pytest.mark.parametrize("where", ["screen", pytest.param("serial", marks=pytest.mark.long)])
async def test_a_guest_that_asks_for_a_passphrase_is_not_alive(where: str) -> None:
    question = "Please unlock disk vda3_crypt: "
    disk = say(screen=question) if where == "screen" else say(serial=question, screen="something at rest")
    found = await trial(disk, timeout_s=3.0)
    assert not found.alive
    assert found.reason.startswith("no sign of life within 3 s; on the ")
    assert found.reason.endswith("it asks for a passphrase ('unlock disk vda3_crypt:')")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)]
    if subprocess.run(mounting, capture_output=True, check=False, timeout=60).returncode:
        pytest.skip("needs the right to mount a tmpfs")  # nothing else is full so soon, and only root may
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True, timeout=60)


@pytest.mark.long
async def test_what_a_guest_cannot_write_for_lack_of_space_is_told_as_that(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(small))
    found = await trial(say(serial="x", then="write", size=64 * MIB))
    assert (found.alive, found.reason) == (
        False, f"there is no space left in {small} for what the guest writes: set TMPDIR",
    )  # fmt: skip
    with suppress(OSError), (small / "full").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with pytest.raises(BootTrialError, match=f"a temporary file in {small}: No space left on device; set TMPDIR"):
        await trial(say(serial="x"))


@pytest.mark.long
async def test_a_disk_that_does_nothing_is_not_alive() -> None:
    found = await trial(silent(), timeout_s=3.0)
    assert not found.alive
    assert found.picture is not None


async def test_a_zeroed_disk_fails_at_once_with_a_picture(qemu: QemuBinary) -> None:
    found = await trial(bytes(MIB), qemu=qemu)
    assert not found.alive
    assert "finds nothing to boot from" in found.reason
    assert found.picture is not None
    assert not found.picture.blank


async def test_words_of_a_panic_win_over_words_of_life() -> None:
    found = await trial(
        say(serial="web login: \nKernel panic - not syncing"), signs=[Sign("serial", re.compile("web"))]
    )
    # Whichever piece comes first: said together they are a panic.
    assert found.reason.startswith(("on the serial port: the kernel panics", "the serial port says 'web'"))
    panic = await trial(say(screen="Kernel panic - not syncing: VFS", then="spin"))
    assert (panic.alive, panic.reason) == (
        False, "on the screen: the kernel panics ('Kernel panic - not syncing')",
    )  # fmt: skip


async def test_a_guest_that_starts_anew_again_and_again_is_not_alive() -> None:
    found = await trial(say(serial="x", then="reset"))
    assert (found.alive, found.reason, found.restarts) == (
        False, "the guest has ended or started anew 4 times", 3,
    )  # fmt: skip


async def test_a_guest_that_writes_without_end_is_stopped() -> None:
    found = await trial(say(serial="x", then="write", size=64 * MIB), space=MIB)
    assert not found.alive
    assert "--space allows" in found.reason
    assert found.written > MIB


async def test_a_disk_that_cannot_be_read_is_no_life() -> None:
    found = await trial(Memory(say(serial="web login: "), good=0), timeout_s=60.0)
    assert not found.alive


async def test_devices_that_qemu_refuses_at_their_places_go_elsewhere() -> None:
    taken = Device("virtio-blk-pci", {"id": "a", "bus": "pcie.0", "addr": "1f.0"})  # the board's own
    machine = Machine(disks=(MachineDisk(taken, "drive-a.img"),), type="pc-q35-42.0")  # and a type that is gone
    found = await trial(say(serial="web login: "), machine=machine)
    assert (found.alive, found.machine) == (True, "q35")
    assert found.warnings == ["devices are not in their places: QEMU refused the machine as the configuration has it"]


async def test_a_qemu_that_is_not_there_or_is_none_is_an_error(tmp_path: Path) -> None:
    for program in (tmp_path / "none", Path("/bin/false")):
        with pytest.raises(BootTrialError, match=f"cannot start {program}"):
            await try_boot(MACHINE, {}, TrialOptions(ANY, 10, program=str(program)))


@pytest.mark.long
async def test_kvm_is_taken_only_if_it_works(tmp_path: Path) -> None:
    program = distribution_qemu().system
    assert await accelerator(program, "tcg") == ("tcg", "as asked for")
    chosen, why = await accelerator(program, "auto")
    assert chosen in ("kvm", "tcg")
    assert why
    broken = tmp_path / "qemu"  # KVM fails in it
    broken.write_text(f'#!/bin/sh\ncase "$*" in *"-accel kvm"*) echo no KVM >&2; exit 1;; esac\nexec {program} "$@"\n')
    broken.chmod(0o755)
    assert (await accelerator(str(broken), "auto"))[0] == "tcg"


def qemus() -> list[int]:
    """Children of this process that are QEMUs; threads and processes may end while they are looked at."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            for pid in map(int, (task / "children").read_text().split()):
                with suppress(OSError):
                    if "qemu-system" in str(Path(f"/proc/{pid}/exe").readlink()):
                        found.append(pid)
    return found


async def test_qemu_has_no_rights_that_it_does_not_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    seen: list[dict[str, str]] = []
    files: list[str] = []

    async def look(qmp: Qmp, of: Trial) -> None:
        (pid,) = qemus()
        rows = Path(f"/proc/{pid}/status").read_text().splitlines()
        seen.append(dict(row.split(":\t", 1) for row in rows if ":\t" in row))
        seen[-1]["net"] = str(Path(f"/proc/{pid}/ns/net").readlink())
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if stat.S_ISREG(entry.stat().st_mode):
                files.append(str(entry.readlink()))

    found = await trial(say(serial="web login: "), linger=look)
    assert found.alive
    (status,) = seen
    assert (status["CapEff"], status["CapBnd"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert status["Seccomp"] == "2"
    if os.geteuid() == 0:
        assert status["Uid"].split() == ["65534"] * 4
        assert status["net"] != str(Path("/proc/self/ns/net").readlink())
    # Of regular files it has what it was given without a name, and firmware that it has read.
    named = [name for name in files if not name.startswith(("/memfd:", "/usr/share/")) and "(deleted)" not in name]
    assert named == []
    assert list(tmp_path.iterdir()) == []
    assert qemus() == []


async def test_a_cancelled_trial_leaves_no_process() -> None:
    async with running_trial() as scope:
        await until(qemus)
        scope.cancel()
    await until(lambda: not qemus())


@asynccontextmanager
async def running_trial() -> AsyncIterator[trio.CancelScope]:
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(trial, silent())
            yield nursery.cancel_scope
        assert not scope.cancelled_caught


async def test_the_screen_can_be_looked_at_by_its_user_alone(tmp_path: Path) -> None:
    greeting: list[bytes] = []
    modes: list[int] = []

    async def look(qmp: Qmp, of: Trial) -> None:
        async with screen_at(qmp, tmp_path / "vnc"), await trio.open_unix_socket(str(tmp_path / "vnc")) as client:
            greeting.append(await client.receive_some(100))
            modes.append((tmp_path / "vnc").stat().st_mode & 0o777)

    before = os.umask(0)
    try:
        with trio.fail_after(120):
            await trial(say(serial="web login: "), linger=look, vnc=True)
    finally:
        os.umask(before)
    assert (greeting, modes) == ([b"RFB 003.008\n"], [0o600])
    assert not (tmp_path / "vnc").exists()


@pytest.mark.long
@pytest.mark.parametrize("secure", [False, True])
async def test_efi_firmware_starts_with_the_variables_of_the_backup(
    qemu: QemuBinary, guest: SmallGuest, secure: bool
) -> None:
    variables = (ovmf() / "usr/share/OVMF" / ("OVMF_VARS_4M.ms.fd" if secure else "OVMF_VARS_4M.fd")).read_bytes()
    firmware = find_firmware("x86_64", variables=len(variables), secure=secure, root=ovmf())
    assert firmware is not None
    machine = replace(MACHINE, efi=True, secure_boot=secure)
    nothing = await trial(
        bytes(MIB), machine=machine, qemu=qemu, firmware=firmware, variables=variables, memory=256 * MIB
    )
    assert not nothing.alive
    # The shell is not signed.
    assert ("nothing to boot from" if secure else "the firmware ends in its shell") in nothing.reason
    kernel = Kernel(guest.kernel, guest.initrd, "no_timer_check console=ttyS0")
    signs = [Sign("serial", re.compile("efi: EFI v[0-9.]+ by"))]
    booted = await trial(
        bytes(MIB), machine=machine, qemu=qemu, firmware=firmware, variables=variables, memory=256 * MIB, signs=signs,
        kernel=kernel, timeout_s=120.0,
    )  # fmt: skip
    assert booted.alive, booted
