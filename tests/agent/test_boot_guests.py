"""Test boots of real guests."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from tests.support.guest import INIT, SmallGuest
from tests.support.qemu_binaries import QemuBinary, backports_qemu, distribution_qemu
from tests.support.running import RunningQemu, VmDisk

from .conftest import Fleece

pytestmark = [pytest.mark.qemu, pytest.mark.guest]

#: What the guest does before it obeys its second serial port, which a machine on trial has not: a login prompt, and a
#: guest agent that knows one question.
PREFACE: Final = r"""
printf 'Small Linux web ttyS0\n\nweb login: ' >/dev/ttyS0
for port in /dev/vport*; do
    [ -c "$port" ] && while read -r line; do
        id=${line##*:}
        printf '\377{"return": %s}\n' "${id%%\}*}"
    done <>"$port" >&0 &
done
[ "$(cat /sys/class/tty/ttyS1/type)" = 0 ] && while :; do sleep 1000; done
"""

#: A busy machine makes the kernel believe that it has no timer.
CONSOLE: Final = "no_timer_check root=/dev/vda rw"


def make_disk(guest: SmallGuest, folder: Path) -> Path:
    root = folder / "root"
    guest.write_root(root)
    (root / "sbin/init").write_text(INIT.replace("exec </dev/ttyS1", f"{PREFACE}exec </dev/ttyS1"))
    disk = folder / "disk.raw"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, disk, "24M"], check=True, timeout=60)
    shutil.rmtree(root)
    return disk


@pytest.fixture
def backed_up(stored: Fleece, guest: SmallGuest, tmpfs: Path) -> Fleece:
    """A store with a backup of the guest's disk, beside the command line that it was started with."""
    line = stored.home / "line.json"
    words = ["qemu-system-x86_64", "-machine", "q35", "-m", "256", "-device", "virtio-blk-pci,id=disk0"]
    line.write_text(
        json.dumps([*words, "-kernel", "/gone", "-append", f"{CONSOLE} console=ttyS0", "-qmp", "unix:/run/x"])
    )
    answer = stored(
        "backup", f"drive-disk0.img:{make_disk(guest, tmpfs)}", f"qemu-command.json:{line}", "--backup-id", "web",
        "--backup-type", "vm",
    )  # fmt: skip
    assert answer.code == 0, answer
    return stored


def boot(fleece: Fleece, guest: SmallGuest, qemu: QemuBinary, *more: str, initrd: bool = True) -> Any:
    answer = fleece(
        "test-boot", "vm/web/latest", "--accel", "tcg", "--settle", "2s", "--timeout", "100s", "--qemu", qemu.system,
        "--kernel", guest.kernel, *(("--initrd", guest.initrd) if initrd else ()), "--output", "json", *more,
    )  # fmt: skip
    assert answer.code in (0, 1), answer
    assert answer.document["alive"] is (answer.code == 0)
    return answer.document


async def test_a_real_guest_comes_to_life(backed_up: Fleece, guest: SmallGuest) -> None:
    # The kernel's arguments are those of the stored command line.
    report = boot(backed_up, guest, distribution_qemu(), "--wait", "serial")
    assert (report["alive"], report["reason"]) == (True, "the serial port says 'web login:'")
    assert (report["warnings"], report["memory"]) == ([], 256 << 20)
    assert "-qmp unix:/run/x" in report["left-out"]


@pytest.fixture(params=["distribution", "backports"])
def both(request: pytest.FixtureRequest) -> QemuBinary:
    return distribution_qemu() if request.param == "distribution" else backports_qemu()


@pytest.mark.long
@pytest.mark.parametrize(
    ("sign", "reason"),
    [
        ("guest-agent", "the guest agent answers"),
        (r"serial:/Small Linux \w+/", "the serial port says 'Small Linux web'"),
        ("screen", "the screen stands still"),
    ],
)
async def test_every_sign_of_a_real_guest(
    backed_up: Fleece, guest: SmallGuest, both: QemuBinary, sign: str, reason: str
) -> None:
    report = boot(backed_up, guest, both, "--wait", sign, "--append", f"{CONSOLE} console=ttyS0 console=tty0")
    assert report["alive"], report
    assert report["reason"].startswith(reason)


@pytest.mark.long
@pytest.mark.parametrize(("console", "where"), [("ttyS0", "on the serial port: "), ("tty0", "on the screen: ")])
async def test_a_kernel_that_panics_is_not_alive(
    backed_up: Fleece, guest: SmallGuest, both: QemuBinary, console: str, where: str
) -> None:
    # Without its initial RAM disk it finds no root file system.
    report = boot(backed_up, guest, both, "--append", f"{CONSOLE} console={console}", initrd=False)
    assert not report["alive"]
    assert report["reason"].startswith(where)
    assert "kernel" in report["reason"]


@pytest.mark.long
async def test_a_guest_that_was_backed_up_while_it_ran_comes_to_life(
    stored: Fleece, guest: SmallGuest, both: QemuBinary, tmpfs: Path
) -> None:
    disk, scratch = make_disk(guest, tmpfs), stored.home / "scratch"
    scratch.mkdir()
    async with RunningQemu.start(both, [VmDisk(disk, "disk0")], guest=guest, append="root=/dev/vda rw") as vm:
        assert vm.guest is not None
        await vm.guest.check("(while :; do date >> /data/log; sync; done) & sleep 0.2", timeout_s=120)
        line = ("vm", "backup", "--qmp", str(vm.qmp), "--id", "web", "--scratch", str(scratch), "--output", "json")
        answer = await trio.to_thread.run_sync(lambda: stored(*line))
        assert answer.code in (0, 3), answer
    report = boot(stored, guest, both, "--wait", "serial", "--wait", "guest-agent")
    assert report["alive"], report
    assert any(one.startswith("-qmp unix:") for one in report["left-out"])
