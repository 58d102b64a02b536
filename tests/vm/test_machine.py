"""`fleece vm` over a machine with every kind of disk: what is found, what is said before, what comes back."""

import json
from pathlib import Path

import pytest

from tests.support.qemu_binaries import QemuBinary
from tests.support.running import VmDisk
from tests.vm.lab import CHUNK, MIB, Lab, PlayedGuest

pytestmark = pytest.mark.qemu


async def test_every_kind_of_disk_is_backed_up_by_its_name_and_comes_back(
    qemu: QemuBinary, lab: Lab, tmp_path: Path
) -> None:
    sizes = {"blk": 9 * MIB, "scsi": 6 * MIB + 512, "sata": 5 * MIB, "nvme": 4 * MIB, "old": 8 * MIB}
    disks = [
        VmDisk(await lab.qcow2(qemu, "blk", sizes["blk"]), "blk", format="qcow2"),
        VmDisk(lab.raw("scsi", sizes["scsi"]), "scsi", bus="virtio-scsi"),
        VmDisk(lab.raw("sata", sizes["sata"]), "sata", bus="ide"),
        VmDisk(lab.raw("nvme", sizes["nvme"]), "nvme", bus="nvme"),
        VmDisk(await lab.qcow2(qemu, "old", sizes["old"]), "old", format="qcow2", form="drive"),
        VmDisk(lab.raw("fixed", MIB), "fixed", read_only=True),
    ]
    variables = (b"boot order" * 54068)[: 528 * 1024]
    (tmp_path / "vars.fd").write_bytes(variables)
    (tmp_path / "code.fd").write_bytes(bytes(3653632))
    (tmp_path / "cd.iso").write_bytes(bytes(MIB))
    extra = [
        *("-drive", f"file={tmp_path}/code.fd,format=raw,if=pflash,unit=0,readonly=on"),
        *("-drive", f"file={tmp_path}/vars.fd,format=raw,if=pflash,unit=1"),
        *("-drive", f"file={tmp_path}/cd.iso,format=raw,if=none,id=cd,media=cdrom", "-device", "ide-cd,drive=cd,id=cd"),
        *("-object", "secret,id=s0,data=topsecret"),
    ]
    async with lab.vm(qemu, disks, extra=extra) as vm:
        guest = PlayedGuest(vm, sizes)
        for number, (disk, size) in enumerate(sizes.items()):
            await guest.write(disk, 0x10 + number, 0, MIB)
            await guest.write(disk, 0x20 + number, size - 512, 512)  # the last sector of odd and even sizes
        document = await lab.fleece.json("vm", "show", *lab.arguments(vm))
        assert {disk["device"]: disk["size"] for disk in document["disks"]} == sizes
        assert {left["device"]: left["reason"] for left in document["left-out"]} == {
            "fixed": "read-only", "cd": "a removable medium", "pflash0": "flash memory", "pflash1": "flash memory",
        }  # fmt: skip
        first = await lab.backup(vm)
        assert set(first.archives) == {f"drive-{disk}.img" for disk in sizes} | {"efivars.fd", "qemu-command.json"}
        await lab.assert_restores(first, guest.images())
        folder = await lab.restored(first.document["snapshot"])
        assert (folder / "efivars.fd").read_bytes() == variables
        command = json.loads((folder / "qemu-command.json").read_bytes())
        assert "secret,id=s0,data=***" in command
        assert "topsecret" not in str(command)

        await guest.write("sata", 0x77, 4 * MIB, 4096)
        await guest.zero("old", 0, MIB)
        second = await lab.backup(vm)
        assert {name: archive["dirty"] for name, archive in second.archives.items() if name.startswith("drive-")} == {
            "drive-blk.img": 0,
            "drive-scsi.img": 0,
            "drive-sata.img": MIB,  # the last chunk is shorter
            "drive-nvme.img": 0,
            "drive-old.img": 4 * MIB,
        }
        await lab.assert_restores(second, guest.images())
        await lab.assert_verifies()


async def test_show_and_dry_run_say_what_the_backup_then_does_and_change_nothing(qemu: QemuBinary, lab: Lab) -> None:
    sizes = {"disk0": 24 * MIB, "disk1": 10 * MIB}
    disks = [
        VmDisk(await lab.qcow2(qemu, "a", sizes["disk0"]), "disk0", format="qcow2"),
        VmDisk(lab.raw("b", sizes["disk1"]), "disk1", bus="virtio-scsi"),
    ]
    async with lab.vm(qemu, disks) as vm:
        guest = PlayedGuest(vm, sizes)
        await guest.write("disk0", 0x11, 0, 8 * MIB)
        for name, disk in (await lab.show(vm)).items():
            size = sizes[disk["device"]]
            assert disk["bitmap"] is None
            assert disk["next"] == {"mode": "full", "reason": "first backup of this group", "bytes": size}, name
        assert await vm.bitmaps("fmt-disk0") == []
        first = await lab.backup(vm)

        assert {name: disk["next"]["bytes"] for name, disk in (await lab.show(vm)).items()} == {
            "drive-disk0.img": 0,
            "drive-disk1.img": 0,
        }
        await guest.write("disk0", 0x22, 9 * MIB, 512)
        await guest.write("disk1", 0x33, 10 * MIB - 512, 512)
        bitmaps = [await vm.bitmaps(disk.node) for disk in disks]
        shown = await lab.show(vm)
        assert {name: disk["next"] for name, disk in shown.items()} == {
            "drive-disk0.img": {"mode": "incremental", "reason": None, "bytes": CHUNK},
            "drive-disk1.img": {"mode": "incremental", "reason": None, "bytes": CHUNK},
        }
        assert [(one["dirty"], one["recording"]) for one in shown["drive-disk0.img"]["bitmaps"]] == [(CHUNK, True)]
        plan = await lab.backup(vm, "--dry-run")
        assert [disk["read"] for disk in plan.document["archives"]] == [CHUNK, CHUNK]
        assert await lab.snapshots() == [first.document["snapshot"]]
        assert [await vm.bitmaps(disk.node) for disk in disks] == bitmaps

        second = await lab.backup(vm)
        for name, disk in shown.items():
            archive = second.archives[name]
            assert (archive["mode"], archive["reason"]) == ("incremental", None)
            assert archive["read"] <= disk["next"]["bytes"]
        await lab.assert_restores(second, guest.images())


async def test_cleanup_takes_bitmaps_only_when_asked_and_the_next_backup_says_why_it_is_full(
    distribution: QemuBinary, lab: Lab
) -> None:
    async with lab.vm(distribution, [VmDisk(lab.raw("a", 8 * MIB), "disk0")]) as vm:
        await lab.backup(vm)
        assert await lab.fleece.json("vm", "cleanup", "--qmp", vm.qmp) == {"done": []}
        assert len(await vm.bitmaps("fmt-disk0")) == 1
        done = await lab.fleece.json("vm", "cleanup", "--qmp", vm.qmp, "--bitmaps")
        assert done == {"done": ["removed 1 dirty bitmaps"]}
        assert await vm.bitmaps("fmt-disk0") == []
        report = await lab.backup(vm)
        assert report.archives["drive-disk0.img"]["reason"] == "no dirty bitmap yet"


async def test_excluded_disks_are_left_out_and_their_return_is_a_full_read_of_them_alone(
    distribution: QemuBinary, lab: Lab
) -> None:
    disks = [VmDisk(lab.raw("a", 8 * MIB), "disk0"), VmDisk(lab.raw("b", 8 * MIB), "swap", bus="virtio-scsi")]
    async with lab.vm(distribution, disks) as vm:
        guest = PlayedGuest(vm, {"disk0": 8 * MIB, "swap": 8 * MIB})
        await guest.write("swap", 0x11, 0, MIB)
        report = await lab.backup(vm, "--exclude", "swap*")
        assert set(report.archives) == {"drive-disk0.img", "qemu-command.json"}
        assert await vm.bitmaps("fmt-swap") == []
        report = await lab.backup(vm)
        assert report.archives["drive-disk0.img"]["mode"] == "incremental"
        assert report.archives["drive-swap.img"]["reason"] == "disk is not in the previous snapshot"
        await lab.assert_restores(report, guest.images())
