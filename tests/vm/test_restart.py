"""What a restart, a crash, a swap of disks and a change of size do to the next backup: full with a reason, or not."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.fleece_command import Outcome
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import QmpRefused, RunningQemu, VmDisk
from tests.vm.lab import CHUNK, MIB, Lab, PlayedGuest

pytestmark = pytest.mark.qemu


def how(report: Outcome) -> dict[str, tuple[str, str | None]]:
    """Mode and reason of each disk."""
    return {
        name: (archive["mode"], archive["reason"])
        for name, archive in report.archives.items()
        if name.startswith("drive-")
    }


async def two_kinds(lab: Lab, binary: QemuBinary) -> list[VmDisk]:
    """A disk that keeps bitmaps and one that cannot."""
    return [
        VmDisk(await lab.qcow2(binary, "kept", 24 * MIB), "kept", format="qcow2"),
        VmDisk(lab.raw("lost", 12 * MIB), "lost", bus="virtio-scsi"),
    ]


SIZES = {"kept": 24 * MIB, "lost": 12 * MIB}


@asynccontextmanager
async def played(
    lab: Lab, binary: QemuBinary, disks: Sequence[VmDisk], before: PlayedGuest | None = None
) -> AsyncIterator[tuple[RunningQemu, PlayedGuest]]:
    """A VM and its guest: one with `SIZES`, or the one from `before` a restart, which knows what is on the disks."""
    async with lab.vm(binary, disks) as vm:
        yield vm, PlayedGuest(vm, SIZES) if before is None else PlayedGuest.going_on(vm, before)


async def first_backup(lab: Lab, vm: RunningQemu, guest: PlayedGuest) -> Outcome:
    """A backup of a disk `kept` with 10 MiB on it."""
    await guest.write("kept", 0x11, 0, 10 * MIB)
    return await lab.backup(vm)


async def test_after_a_restart_a_qcow2_disk_is_read_by_its_bitmap_and_a_raw_one_says_why_it_is_not(
    qemu: QemuBinary, lab: Lab
) -> None:
    disks = await two_kinds(lab, qemu)
    async with played(lab, qemu, disks) as (vm, guest):
        await guest.write("kept", 0x11, 0, 10 * MIB)
        await guest.write("lost", 0x12, 0, 6 * MIB)
        await lab.backup(vm)
        await guest.write("kept", 0x22, 5 * MIB, 4096)  # before the restart
        await vm.quit()
    async with played(lab, qemu, disks, guest) as (vm, guest):
        await guest.write("kept", 0x33, 20 * MIB, 4096)  # and after it
        await guest.write("lost", 0x34, 0, 512)
        report = await lab.backup(vm)
        assert how(report) == {
            "drive-kept.img": ("incremental", None),
            "drive-lost.img": ("full", "VM restarted since the previous backup"),
        }
        kept, lost = report.archives["drive-kept.img"], report.archives["drive-lost.img"]
        assert (kept["read"], kept["dirty"]) == (2 * CHUNK, 2 * CHUNK)
        assert lost["dirty"] is None
        assert lost["chunks-new"] == 1  # a full read uploads nothing again
        await lab.assert_restores(report, guest.images())
        assert how(await lab.backup(vm))["drive-lost.img"] == ("incremental", None)


async def test_transient_bitmaps_on_demand_are_not_kept_over_a_restart(distribution: QemuBinary, lab: Lab) -> None:
    disks = [VmDisk(await lab.qcow2(distribution, "a", 8 * MIB), "kept", format="qcow2")]
    async with lab.vm(distribution, disks) as vm:
        await lab.backup(vm, "--bitmap", "transient")
        assert how(await lab.backup(vm, "--bitmap", "transient"))["drive-kept.img"] == ("incremental", None)
        await vm.quit()
    async with lab.vm(distribution, disks) as vm:
        report = await lab.backup(vm, "--bitmap", "none")
        assert how(report)["drive-kept.img"] == ("full", "dirty bitmaps are switched off")
        assert await vm.bitmaps("fmt-kept") == []


async def test_old_qcow2_images_have_bitmaps_as_long_as_their_qemu_runs(distribution: QemuBinary, lab: Lab) -> None:
    path = await lab.qcow2(distribution, "a", 8 * MIB, "-o", "compat=0.10")
    async with lab.vm(distribution, [VmDisk(path, "kept", format="qcow2")]) as vm:
        await lab.backup(vm)
        assert how(await lab.backup(vm))["drive-kept.img"] == ("incremental", None)
        await vm.quit()
    async with lab.vm(distribution, [VmDisk(path, "kept", format="qcow2")]) as vm:
        assert how(await lab.backup(vm))["drive-kept.img"] == ("full", "VM restarted since the previous backup")


async def test_two_equal_disks_swapped_over_a_restart_are_read_in_full_and_are_right(
    qemu: QemuBinary, lab: Lab
) -> None:
    paths = [await lab.qcow2(qemu, name, 12 * MIB) for name in ("a", "b")]

    def machine(first: Path, second: Path) -> list[VmDisk]:
        return [VmDisk(first, "disk0", format="qcow2"), VmDisk(second, "disk1", bus="virtio-scsi", format="qcow2")]

    async with lab.vm(qemu, machine(*paths)) as vm:
        guest = PlayedGuest(vm, {"disk0": 12 * MIB, "disk1": 12 * MIB})
        await guest.write("disk0", 0x11, 0, 12 * MIB)
        await guest.write("disk1", 0x22, 0, 12 * MIB)
        await lab.backup(vm)
        await vm.quit()
    guest.now = {"disk0": guest.now["disk1"], "disk1": guest.now["disk0"]}
    async with played(lab, qemu, machine(*reversed(paths)), guest) as (vm, guest):
        await guest.write("disk0", 0x33, 4 * MIB, 512)
        shown = {name: disk["next"]["mode"] for name, disk in (await lab.show(vm)).items()}
        assert shown == {"drive-disk0.img": "full", "drive-disk1.img": "full"}
        report = await lab.backup(vm)
        assert how(report) == {
            "drive-disk0.img": ("full", "disk moved from disk1"),
            "drive-disk1.img": ("full", "disk moved from disk0"),
        }
        await lab.assert_restores(report, guest.images())
        report = await lab.backup(vm)
        assert {mode for mode, _ in how(report).values()} == {"incremental"}
        await lab.assert_restores(report, guest.images())


async def test_a_crash_of_qemu_between_backups_makes_inconsistent_bitmaps_which_are_removed(
    qemu: QemuBinary, lab: Lab
) -> None:
    disks = await two_kinds(lab, qemu)
    async with played(lab, qemu, disks) as (vm, guest):
        await first_backup(lab, vm, guest)
        await vm.quit()  # the bitmap gets into the image
    async with played(lab, qemu, disks, guest) as (vm, guest):
        await guest.write("kept", 0x22, 0, 4096)
        await guest.flush()
        await vm.kill()
    async with played(lab, qemu, disks, guest) as (vm, guest):
        assert [bitmap["inconsistent"] for bitmap in await vm.bitmaps("fmt-kept")] == [True]
        reason = "bitmap inconsistent after a crash of QEMU"
        assert (await lab.show(vm))["drive-kept.img"]["next"]["reason"] == reason
        report = await lab.backup(vm)
        assert how(report)["drive-kept.img"] == ("full", reason)
        assert [bitmap.get("inconsistent", False) for bitmap in await vm.bitmaps("fmt-kept")] == [False]
        await lab.assert_restores(report, guest.images())
        assert how(await lab.backup(vm))["drive-kept.img"] == ("incremental", None)


@pytest.mark.parametrize("point", ["command:blockdev-add:3", "command:block-export-add:1:after", "read:2", "finish"])
async def test_a_crash_of_qemu_in_mid_backup_is_a_clear_error_and_the_next_one_reads_everything(
    point: str, qemu: QemuBinary, lab: Lab
) -> None:
    disks = await two_kinds(lab, qemu)
    async with played(lab, qemu, disks) as (vm, guest):
        await guest.write("kept", 0x11, 0, 10 * MIB)
        await guest.write("lost", 0x11, 0, 10 * MIB)
        first = await lab.backup(vm)
        await guest.write("kept", 0x22, 0, 20 * MIB)
        await guest.flush()
        async with lab.stopped_backup(vm, point) as running:
            await vm.kill()
            running.go_on()
            outcome = await running.ended()
        if point == "finish":
            # All was read: the snapshot is whole, and only what is left in QEMU could not be cleaned.
            assert outcome.code in (0, 3)
            assert len(await lab.snapshots()) == 2
            await lab.assert_restores(outcome, guest.images())
        else:
            assert (outcome.code, outcome.out) == (1, "")
            assert "QEMU" in str(outcome.error), outcome.error
            assert await lab.snapshots() == [first.document["snapshot"]]
    await lab.nothing_left.check_host()
    async with played(lab, qemu, disks, guest) as (vm, guest):
        report = await lab.backup(vm)
        kept, lost = how(report)["drive-kept.img"], how(report)["drive-lost.img"]
        assert kept[0] == "full"
        assert kept[1] in ("bitmap inconsistent after a crash of QEMU", "VM restarted since the previous backup")
        assert lost == ("full", "VM restarted since the previous backup")
        await lab.assert_restores(report, guest.images())
        await lab.assert_verifies()


async def test_a_vm_that_is_shut_down_in_mid_backup_keeps_in_its_image_what_was_counted(
    qemu: QemuBinary, lab: Lab
) -> None:
    disks = await two_kinds(lab, qemu)
    async with played(lab, qemu, disks) as (vm, guest):
        first = await first_backup(lab, vm, guest)
        await guest.write("kept", 0x22, 0, 4096)
        async with lab.stopped_backup(vm, "read:1") as running:
            await guest.write("kept", 0x33, 13 * MIB, 4096)  # after the instant
            await vm.quit()
            running.go_on()
            outcome = await running.ended()
        assert (outcome.code, outcome.out) == (1, "")
        assert "QEMU" in str(outcome.error), outcome.error
        assert await lab.snapshots() == [first.document["snapshot"]]
    await lab.nothing_left.check_host()
    async with played(lab, qemu, disks, guest) as (vm, guest):
        recording = sorted(bitmap["recording"] for bitmap in await vm.bitmaps("fmt-kept"))
        assert recording == [False, True]  # the old one was disabled at the instant, the new one has counted since
        assert (await lab.show(vm))["drive-kept.img"]["next"] == {
            "mode": "incremental", "reason": None, "bytes": 2 * CHUNK,
        }  # fmt: skip
        report = await lab.backup(vm)
        assert how(report)["drive-kept.img"] == ("incremental", None)
        assert report.archives["drive-kept.img"]["dirty"] == 2 * CHUNK
        await lab.assert_restores(report, guest.images())


async def test_a_disk_that_grew_is_read_in_full_and_none_can_grow_during_a_backup(qemu: QemuBinary, lab: Lab) -> None:
    disks = await two_kinds(lab, qemu)
    async with played(lab, qemu, disks) as (vm, guest):
        await first_backup(lab, vm, guest)

        # Between two backups.
        await guest.grow("kept", 26 * MIB + 512)
        await guest.write("kept", 0x22, 26 * MIB, 512)
        report = await lab.backup(vm)
        assert how(report)["drive-kept.img"] == ("full", "size changed from 24.0 MiB to 26.0 MiB")
        assert how(report)["drive-lost.img"] == ("incremental", None)
        await lab.assert_restores(report, guest.images())

        # During one it is refused, and possible again right after it.
        await guest.write("kept", 0x33, 0, 4096)
        async with lab.stopped_backup(vm, "read:1") as running:
            for disk in SIZES:
                with pytest.raises(QmpRefused, match="Cannot resize fixed-size"):
                    await guest.grow(disk, 30 * MIB)
            running.go_on()
            outcome = await running.ended()
        assert outcome.code == 0, outcome
        await lab.assert_restores(outcome, guest.images())
        await guest.grow("kept", 30 * MIB)
        await guest.grow("lost", 16 * MIB)
        report = await lab.backup(vm)
        assert {mode for mode, _ in how(report).values()} == {"full"}
        assert "size changed" in str(how(report)["drive-lost.img"][1])
        await lab.assert_restores(report, guest.images())


async def test_a_resize_while_the_map_is_read_does_not_end_the_vm(distribution: QemuBinary, lab: Lab) -> None:
    disks = await two_kinds(lab, distribution)
    async with played(lab, distribution, disks) as (vm, guest):
        await lab.backup(vm)
        await guest.write("lost", 0x11, 0, 4096)
        # QEMU would abort if it took a new size while a bitmap is exported.
        async with lab.stopped_backup(vm, "phase:read the maps") as running:
            with pytest.raises(QmpRefused, match="Cannot resize fixed-size"):
                await guest.grow("lost", 16 * MIB)
            running.go_on()
            outcome = await running.ended()
        assert vm.alive()
        assert outcome.code == 0, outcome
        report = await lab.backup(vm)
        await lab.assert_restores(report, guest.images())
