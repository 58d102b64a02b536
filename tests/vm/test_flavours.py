"""The command on a VM of Proxmox VE: it looks, says which flavour it used, and restores what the guest had."""

import pytest

from tests.support.proxmox_qemu import ProxmoxQemu
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import VmDisk
from tests.vm.lab import CHUNK, MIB, Lab, PlayedGuest

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]


async def test_a_vm_of_proxmox_is_backed_up_by_its_own_commands(backports: QemuBinary, lab: Lab) -> None:
    qcow2 = await lab.qcow2(backports, "b", 9 * MIB)
    disks = [VmDisk(lab.raw("a", 12 * MIB), "disk0"), VmDisk(qcow2, "disk1", bus="virtio-scsi", format="qcow2")]
    async with lab.vm(backports, disks) as vm, ProxmoxQemu.before(vm) as double:
        played = PlayedGuest(vm, {"disk0": 12 * MIB, "disk1": 9 * MIB})
        await played.write("disk0", 0x11, 0, MIB)
        await played.write("disk1", 0x12, 8 * MIB, MIB)
        report = await lab.backup(vm)
        assert report.document["flavour"] == "proxmox"
        assert {archive["mode"] for archive in report.archives.values() if archive["chunks"]} == {"full"}
        await played.write("disk1", 0x13, 0, MIB)
        shown = await lab.fleece.json("vm", "show", *lab.arguments(vm))
        assert shown["flavour"] == "proxmox"
        assert {disk["name"]: disk["next"]["bytes"] for disk in shown["disks"]} == {
            "drive-disk0.img": 0,
            "drive-disk1.img": CHUNK,
        }
        assert double.access is None
        report = await lab.backup(vm)
        assert report.archives["drive-disk1.img"]["read"] == CHUNK
        await lab.assert_restores(report, played.images())
        report = await lab.backup(vm, "--flavour", "stock")
        assert report.document["flavour"] == "stock"
        refused = await lab.try_backup(vm, "--flavour", "other")
        assert refused.code == 2
