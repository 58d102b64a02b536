"""`/dev/nbdX` of a real kernel: a Debian in a VM, in which the process behind `fleece nbd connect` holds devices.

What it serves is an export of `qemu-nbd`; docs/nbd.md says what must hold. The same on a kernel that is made of files:
tests/hypervisor/test_nbd_devices.py.
"""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support import vm_in_debian
from tests.support.debian_vm import DebianVm
from tests.support.fleece_command import FleeceCommand
from tests.support.fleece_disk import COMMAND_S, fleece_disk, open_store
from tests.support.python_in_vm import compiled, python_files
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import VmDisk
from tests.support.vm_in_debian import DISK

#: On a busy machine a VM may take minutes to start, and to start a Python.
pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

SIZE = 8 << 20

SERVE = "qemu-nbd --fork --persistent --shared=9 -r -f raw -x x -k /run/disk.sock /var/tmp/disk"
#: VMs that have the state `nbd`.
_PREPARED: set[Path] = set()

#: hold.py SOCKET SIZE LIMIT: holds the export until it is to end.
HOLD = """
import json, sys, trio
from contextlib import asynccontextmanager
from pathlib import Path
from agent.nbd_holder import HoldOrder, Offer, OfferedDisk, hold
from agent.nbd_records import Records
from core.errors import FleeceError
from hypervisor.dirty_regions import Region
from hypervisor.nbd_address import NbdAddress
from hypervisor.nbd_devices import NbdHost

socket, size, limit = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
folder = Path("/run/fleece/nbd")
source = {"type": "backup", "snapshot": "vm/1/2026-01-02T03:04:05Z"}

@asynccontextmanager
async def offer():
    yield Offer(source, [OfferedDisk("disk.img", NbdAddress.unix(socket, "x"), size, [Region(0, size)])])

order = HoldOrder(Records(folder), NbdHost(folder / "reserved", folder / "lock"), source, limit_s=limit or None)
try:
    print("ended:", trio.run(hold, offer(), order, lambda document: print(json.dumps(document), flush=True)))
except FleeceError as error:
    print("failed:", error)
"""

#: end.py: what `fleece nbd disconnect --all` does.
END = """
import trio
from pathlib import Path
from agent.nbd_records import Records, end_holder
from hypervisor.nbd_devices import NbdHost

async def main():
    folder = Path("/run/fleece/nbd")
    records, host = Records(folder), NbdHost(folder / "reserved", folder / "lock")
    for holding in records.load():
        print(*await end_holder(records, holding, host), sep="\\n")
    print([use.number for use in host.in_use()], records.load(), "used:", host.used_for(0))
trio.run(main)
"""


#: For the QEMU in the Debian VM.
VM_SECTION = """\
default-repository = "/srv/"
scratch = "/var/scratch"
[vm.web]
id = "100"
scratch-beside-disks = true
"""


@dataclass
class Kernel:
    """The VM, with `count` devices and an export of a disk of random bytes."""

    vm: DebianVm
    count: int = 0
    _holders: int = 0

    @classmethod
    def prepared(cls, vm: DebianVm, devices: int = 3) -> "Kernel":
        if vm.folder not in _PREPARED:
            files = python_files(["core", "hypervisor", "agent"], ["trio"])
            vm.unpack({**files, **compiled(files)}, "/opt/fleece")
            vm.unpack({"hold.py": HOLD.encode(), "end.py": END.encode()}, "/opt/test")
            vm.check(f"head -c {SIZE} /dev/urandom > /var/tmp/disk && mke2fs -q -t ext4 /var/tmp/disk")
            vm.check(SERVE)
            vm.save("nbd")
            _PREPARED.add(vm.folder)
        else:
            vm.restore("nbd")
        vm.check(f"rmmod nbd; modprobe nbd nbds_max={devices}")
        return cls(vm)

    def hold(self, limit_s: float = 0) -> str:
        """Start a holder; gives the file with what it says. Its process is in `FILE.pid`."""
        self._holders += 1
        said = f"/run/holder{self._holders}"
        self.vm.check(
            f"(exec setsid env PYTHONPATH=/opt/fleece python3 /opt/test/hold.py /run/disk.sock {SIZE} {limit_s}"
            f" > {said} 2>&1 < /dev/null) & echo $! > {said}.pid"
        )
        return said

    def held(self, said: str) -> dict[str, Any]:
        """What it holds, as soon as it does."""
        text = self.vm.until(f"grep -q . {said} && cat {said}")
        assert text.startswith("{"), text
        document: dict[str, Any] = json.loads(text.splitlines()[0])
        return document

    def device(self, said: str) -> str:
        found: str = self.held(said)["disks"][0]["device"]
        return found

    def send(self, said: str, signal: str) -> None:
        self.vm.check(f"kill -{signal} $(cat {said}.pid)")

    def ended(self, said: str) -> str:
        """Its last words, when it has ended."""
        self.vm.until(f"! kill -0 $(cat {said}.pid)")
        return self.vm.check(f"tail -1 {said}").strip()

    def in_use(self) -> list[str]:
        return self.vm.check("for n in /sys/block/nbd*; do [ ! -e $n/pid ] || echo ${n##*/}; done").split()

    def end_all(self) -> str:
        return self.vm.check("PYTHONPATH=/opt/fleece python3 /opt/test/end.py")


def test_devices_are_held_and_freed(debian_vm: DebianVm) -> None:
    kernel, vm = Kernel.prepared(debian_vm), debian_vm
    # Left by programs that were killed: no sign that a device is in use.
    vm.check("mkdir -p /run/lock && python3 -c 'import socket; socket.socket(1).bind(\"/run/lock/qemu-nbd-nbd0\")'")
    first = kernel.hold()
    assert kernel.device(first) == "/dev/nbd0"
    assert vm.check("blockdev --getro --getsize64 /dev/nbd0").split() == ["1", str(SIZE)]
    vm.check("cmp /dev/nbd0 /var/tmp/disk")
    second = kernel.hold()
    assert kernel.device(second) == "/dev/nbd1"
    # Ctrl-C and TERM free them, and so does being killed.
    kernel.send(first, "INT")
    assert kernel.ended(first) == "ended: SIGINT received"
    assert kernel.in_use() == ["nbd1"]
    kernel.send(second, "TERM")
    assert kernel.ended(second) == "ended: SIGTERM received"
    assert kernel.in_use() == []
    assert vm.check("ls -A /run/fleece/nbd").split() == ["lock", "reserved"]
    killed = kernel.hold()
    device = kernel.device(killed)
    kernel.send(killed, "KILL")
    vm.until(f"[ ! -e /sys/block/{device.removeprefix('/dev/')}/pid ]")
    assert vm.check("ls /run/fleece/nbd").count("holder-") == 2  # the record and the regions
    # The next one removes what is written of it.
    limited = kernel.hold(limit_s=0.5)
    assert kernel.device(limited) != device  # which is reserved for a minute
    assert kernel.ended(limited) == "ended: its time is up"
    assert vm.check("ls -A /run/fleece/nbd").split() == ["lock", "reserved"]


@pytest.mark.long
def test_two_never_get_one_device_and_nobody_elses(debian_vm: DebianVm) -> None:
    kernel, vm = Kernel.prepared(debian_vm, devices=3), debian_vm
    vm.check("qemu-nbd -c /dev/nbd1 -r -f raw /var/tmp/disk")
    vm.until("test -e /sys/block/nbd1/pid")
    stranger = vm.check("cat /sys/block/nbd1/pid")
    racing = [kernel.hold() for _ in range(3)]
    said = [vm.until(f"grep . {name}") for name in racing]
    devices = [json.loads(text)["disks"][0]["device"] for text in said if text.startswith("{")]
    assert sorted(devices) == ["/dev/nbd0", "/dev/nbd2"]
    (failed,) = [text for text in said if not text.startswith("{")]
    assert "cannot find a free device /dev/nbdX: all 3 are in use, reserved or missing" in failed
    assert kernel.end_all().splitlines()[-1] == "[1] [] used: []"
    assert vm.check("cat /sys/block/nbd1/pid") == stranger
    vm.check("cmp /dev/nbd1 /var/tmp/disk; qemu-nbd -d /dev/nbd1")


@pytest.mark.long
def test_what_happens_to_a_device_behind_the_holder(debian_vm: DebianVm) -> None:
    kernel, vm = Kernel.prepared(debian_vm), debian_vm
    # Somebody disconnects it by hand.
    taken = kernel.hold()
    vm.check(f"qemu-nbd -d {kernel.device(taken)}")
    assert kernel.ended(taken) == "ended: /dev/nbd0 was taken away (exit code 0)"
    # The server dies under a mounted file system: the device stays until its holder frees it.
    mounted = kernel.hold()
    vm.check(f"mount -o ro,noload {kernel.device(mounted)} /mnt")
    vm.check("kill -9 $(pgrep -f '[q]emu-nbd --fork')")
    assert vm.run(f"dd if={kernel.device(mounted)} of=/dev/null iflag=direct bs=1M").code != 0
    assert kernel.in_use() == ["nbd0"]
    # Nothing serves it any more; the kernel gives it back when it is unmounted.
    assert kernel.end_all().splitlines()[-1] == "[0] [] used: ['nbd0 is mounted on /mnt']"
    assert not vm.run("pgrep -f '[-]-connect='").out
    vm.check("umount /mnt")
    vm.until("[ ! -e /sys/block/nbd0/pid ]")


@pytest.mark.long
def test_without_the_module_and_with_a_program_that_outlived_its_holder(debian_vm: DebianVm) -> None:
    kernel, vm = Kernel.prepared(debian_vm), debian_vm
    vm.check("rmmod nbd")
    missing = kernel.hold()
    assert "the kernel module nbd is not loaded; as root: modprobe nbd" in vm.until(f"grep failed {missing}")
    vm.check("modprobe nbd nbds_max=2")
    # As if the signal that ends it with its holder had been lost.
    killed = kernel.hold()
    device = kernel.device(killed)
    name = device.removeprefix("/dev/")
    vm.check(f"kill -STOP $(pgrep -f -- '[-]-connect={device}')")
    kernel.send(killed, "KILL")
    kernel.ended(killed)
    assert kernel.in_use() == [name]
    vm.check(f"(sleep 1; kill -CONT $(pgrep -f -- '[-]-connect={device}')) > /dev/null 2>&1 & true")
    assert kernel.end_all().splitlines()[-1] == "[] [] used: []"


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_a_disk_of_a_backup_is_a_block_device(distribution: QemuBinary, store_folder: Path, tmpfs: Path) -> None:
    """The whole command, on a disk of its own: `qemu-nbd` reads from nbdkit, that from Fleece, that from the store."""
    source, part = tmpfs / "disk.raw", tmpfs / "part"
    (part / "etc").mkdir(parents=True)
    (part / "etc/hostname").write_text("backed-up\n")
    await trio.run_process(["mke2fs", "-q", "-t", "ext4", "-d", str(part), str(source), "24M"])
    with source.open("r+b") as file:
        file.seek(20 << 20)
        file.write(os.urandom(3 << 20))
    fleece = FleeceCommand(tmpfs / "h", store_folder)
    await fleece.json("backup", f"drive-scsi0.img:{source}", "--backup-type", "vm", "--backup-id", "100")
    make = functools.partial(fleece_disk, tmpfs / "d", tmpfs / "fleece.img", store=store_folder)
    disk = await trio.to_thread.run_sync(make)
    work = functools.partial(_disk_of_a_backup, distribution, disk, source)
    await trio.to_thread.run_sync(work)


def _disk_of_a_backup(qemu: QemuBinary, disk: VmDisk, source: Path) -> None:
    with DebianVm.start(qemu, disks=[disk]) as vm:
        vm.check("mount /dev/vdb /mnt; modprobe nbd nbds_max=2")
        open_store(vm)
        assert vm.run("/mnt/fleece nbd list", timeout_s=COMMAND_S).out == "Nothing is connected.\n"
        connect = "/mnt/fleece nbd connect vm/100/latest drive-scsi0.img --repo /srv/ --output json"
        document = json.loads(vm.check(connect, timeout_s=COMMAND_S))
        assert document["disks"][0] == {
            "name": "drive-scsi0.img", "device": "/dev/nbd0", "file": None, "uri": None, "size": 24 << 20,
            "read-only": True, "changed": None,
        }  # fmt: skip
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        assert vm.check("sha256sum /dev/nbd0").split()[0] == digest
        vm.check("mkdir /run/disk; mount -o ro,noload /dev/nbd0 /run/disk")
        assert vm.check("cat /run/disk/etc/hostname") == "backed-up\n"
        assert "nbd0 is mounted on /run/disk" in vm.run("/mnt/fleece nbd disconnect /dev/nbd0", timeout_s=COMMAND_S).err
        vm.check("umount /run/disk")
        assert vm.check("/mnt/fleece nbd disconnect /dev/nbd0", timeout_s=COMMAND_S) == "disconnected /dev/nbd0\n"
        assert vm.run("ls /sys/block/nbd0/pid; pgrep nbdkit; pgrep qemu-nbd").out == ""
        # Killed, it takes device and server along.
        document = json.loads(vm.check(connect, timeout_s=COMMAND_S))
        device = document["disks"][0]["device"].removeprefix("/dev/")
        vm.check(f"kill -9 {document['pid']}")
        vm.until(f"[ ! -e /sys/block/{device}/pid ] && ! pgrep nbdkit")


# A dozen starts of the whole command, each half a minute and more on a busy machine.
@pytest.mark.timeout(1700)
@pytest.mark.long
def test_the_disk_of_a_running_vm_is_a_block_device(
    distribution: QemuBinary, backports: QemuBinary, store_folder: Path, tmpfs: Path
) -> None:
    """All of it in one piece: a QEMU in the Debian VM, the command, the kernel's device, and disks that change."""
    disk = fleece_disk(tmpfs / "d", tmpfs / "fleece.img", store=store_folder, qemu=backports)
    with DebianVm.start(distribution, disks=[disk], memory_mib=1024) as vm:
        vm.check("mount /dev/vdb /mnt; modprobe nbd nbds_max=2; mkdir -p /var/scratch /run/part/etc /run/disk")
        vm.write("/etc/fleece/fleece.toml", VM_SECTION)
        open_store(vm)
        vm.check(f"echo as-it-was >/run/part/etc/hostname; mke2fs -q -t ext4 -d /run/part {DISK} 24M")
        vm.check(f"head -c 3M /dev/urandom | dd of={DISK} bs=1M seek=20 conv=notrunc status=none")
        vm_in_debian.start(vm, qemu="/mnt/qemu/bin/qemu-system-x86_64")
        given = "--qmp /run/web.qmp --id 100 --output json"

        def fleece(line: str) -> Any:
            return json.loads(vm.check(f"/mnt/fleece {line}", timeout_s=COMMAND_S))

        backup = f"vm backup {given}"
        assert _disk0(fleece(backup))["mode"] == "full"
        before = vm_in_debian.look(vm)
        vm_in_debian.write(vm, 0x11, 9 << 20, 4096)
        instant = vm.check(f"sha256sum {DISK}").split()[0]
        held = fleece(f"nbd connect {given} --changed --time-limit 20m")
        assert (held["source"]["flavour"], held["disks"][0]) == ("stock", {
            "name": "drive-disk0.img", "device": "/dev/nbd0", "file": None, "uri": None, "size": 24 << 20,
            "read-only": True, "changed": 4 << 20,
        })  # fmt: skip
        # Whatever the guest does to its disk from here on, before or after a part of it is read, the device keeps.
        vm_in_debian.write(vm, 0x22, 0, 12 << 20)
        region = vm.check("dd if=/dev/nbd0 bs=4M skip=2 count=1 iflag=direct status=none | sha256sum")
        vm_in_debian.write(vm, 0x33, 8 << 20, 16 << 20)
        assert vm.check("dd if=/dev/nbd0 bs=4M skip=2 count=1 iflag=direct status=none | sha256sum") == region
        assert vm.check("sha256sum /dev/nbd0").split()[0] == instant
        assert vm.check(f"sha256sum {DISK}").split()[0] != instant
        vm.check("mount -o ro,noload /dev/nbd0 /run/disk")
        assert vm.check("cat /run/disk/etc/hostname; umount /run/disk") == "as-it-was\n"
        assert fleece("nbd regions /dev/nbd0 --output json") == [{"offset": 8 << 20, "length": 4 << 20}]
        assert vm.run("dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 conv=fsync").code != 0
        assert fleece("nbd disconnect /dev/nbd0 --output json") == {"disconnected": ["/dev/nbd0"]}
        _nothing_is_left(vm, before)
        # The bitmap goes on from the backup, not from the view.
        report = fleece(backup)
        assert (_disk0(report)["mode"], _disk0(report)["dirty"]) == ("incremental", 24 << 20)


def _disk0(report: dict[str, Any]) -> dict[str, Any]:
    (found,) = [archive for archive in report["archives"] if archive["name"] == "drive-disk0.img"]
    return dict(found)


def _nothing_is_left(vm: DebianVm, qemu: dict[str, Any]) -> None:
    """QEMU has what it had, and no device, process or file of the view is there."""
    assert vm_in_debian.look(vm) == qemu
    assert vm.run("cat /sys/block/nbd*/pid; pgrep -fa '[q]emu-nbd|[f]leece nbd'; ls -A /var/scratch").out == ""
    assert [name for name in vm.check("ls -A /run/fleece/nbd").split() if name.startswith("holder")] == []
