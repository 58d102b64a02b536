"""The scratch folder on a small file system: the backup breaks, never the guest."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.qemu_binaries import QemuBinary
from tests.support.running import VmDisk
from tests.vm.lab import MIB, Lab, PlayedGuest, until_exports

pytestmark = pytest.mark.qemu

SIZES = {"disk0": 48 * MIB, "disk1": 8 * MIB}


@pytest.fixture
def small_scratch(lab: Lab) -> Iterator[Path]:
    """The scratch folder as a file system of its own in memory, with room enough for a backup to begin."""
    scratch = lab.nothing_left.scratch
    scratch.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=4g,mode=0700", "fleece-test", str(scratch)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("no small file system to test with: mount is missing")
    if done.returncode:
        pytest.skip(f"no small file system to test with: {done.stderr.strip()}")
    yield scratch
    subprocess.run(["umount", "--lazy", str(scratch)], check=True, timeout=30)


def resize(folder: Path, size: str) -> None:
    """The file system has `size` from now on."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True, timeout=30)


async def machine(lab: Lab, binary: QemuBinary) -> list[VmDisk]:
    return [
        VmDisk(await lab.qcow2(binary, "a", SIZES["disk0"]), "disk0", format="qcow2"),
        VmDisk(lab.raw("b", SIZES["disk1"]), "disk1", bus="virtio-scsi"),
    ]


async def test_a_full_fleecing_image_breaks_the_backup_and_the_guest_does_not_notice(
    qemu: QemuBinary, lab: Lab, small_scratch: Path
) -> None:
    async with lab.vm(qemu, await machine(lab, qemu)) as vm:
        guest = PlayedGuest(vm, SIZES)
        await guest.write("disk0", 0x11, 0, 48 * MIB)
        first = await lab.backup(vm)
        await guest.write("disk0", 0x22, 0, 48 * MIB)
        async with lab.stopped_backup(vm, "read:1") as running:
            resize(small_scratch, "4m")
            await guest.write("disk0", 0x33, 0, 48 * MIB)  # 48 MiB of old data want to be kept
            await guest.reads_back()
            resize(small_scratch, "4g")  # so that it is not the watch over the free space that ends the backup
            running.go_on()
            outcome = await running.ended()
        assert (outcome.code, outcome.out) == (1, "")
        assert "the fleecing image is full" in outcome.error["why"]
        assert "the guest is not affected" in outcome.error["hint"]
        assert [event["event"] for event in vm.own_qmp.events if event["event"] in ("BLOCK_IO_ERROR", "STOP")] == []
        await guest.reads_back()
        assert await lab.snapshots() == [first.document["snapshot"]]
        await lab.nothing_left.check_host()
        report = await lab.backup(vm)
        assert report.archives["drive-disk0.img"]["mode"] == "incremental"
        await lab.assert_restores(report, guest.images())


async def test_a_scratch_folder_that_runs_short_ends_the_backup_before_it_is_full(
    qemu: QemuBinary, lab: Lab, small_scratch: Path
) -> None:
    async with lab.vm(qemu, await machine(lab, qemu)) as vm:
        guest = PlayedGuest(vm, SIZES)
        await guest.write("disk0", 0x11, 0, 48 * MIB)
        first = await lab.backup(vm)
        await guest.write("disk0", 0x22, 0, 48 * MIB)
        async with lab.fleece.start("vm", "backup", *lab.arguments(vm), "--bwlimit", "2M") as running:
            await until_exports(vm, "fleece-e", there=True)
            resize(small_scratch, "1g")
            outcome = await running.ended()
        assert (outcome.code, outcome.out) == (1, "")
        assert "2.00 GiB must stay free" in outcome.error["why"]
        assert "the guest is not affected" in outcome.error["hint"]
        await guest.reads_back()
        assert await lab.snapshots() == [first.document["snapshot"]]

        # Too little from the beginning.
        outcome = await lab.try_backup(vm)
        assert (outcome.code, outcome.error["what"]) == (1, "use the scratch folder")
        resize(small_scratch, "4g")
        report = await lab.backup(vm)
        assert report.archives["drive-disk0.img"]["mode"] == "incremental"
        await lab.assert_restores(report, guest.images())


async def test_a_scratch_folder_beside_the_disks_is_refused_unless_it_is_allowed(
    distribution: QemuBinary, lab: Lab
) -> None:
    async with lab.vm(distribution, [VmDisk(lab.raw("a", 8 * MIB), "disk0")]) as vm:
        lab.fleece.config.write_text(f'scratch = "{lab.nothing_left.scratch}"\n')
        outcome = await lab.fleece.run("vm", "backup", "--qmp", vm.qmp, "--id", "strict")
        assert outcome.code == 1
        assert "on the file system of the disk" in outcome.error["why"]
        assert await lab.snapshots() == []
