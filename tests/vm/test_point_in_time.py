"""A backup is one instant over all disks, while a real guest writes to them without a pause.

The guest writes number n to the first disk, then to the second, then n + 1, ... In a snapshot the newest number of the
second disk is that of the first or one less, and no older write is missing: that is one point in time, of both disks
together. The first disk is virtio-blk, the second virtio-scsi.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.support.guest import SmallGuest
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk
from tests.vm.lab import Lab, until
from tests.vm.ring_images import RING, SIZE, assert_one_instant, position

pytestmark = [pytest.mark.qemu, pytest.mark.guest, pytest.mark.timeout(900)]

DEVICES = ("/dev/vda", "/dev/sda")


def ring_disks(lab: Lab) -> list[VmDisk]:
    """Raw disks, so that the test sees what the guest writes as soon as it is written."""
    return [VmDisk(lab.raw("first", SIZE), "disk0"), VmDisk(lab.raw("second", SIZE), "disk1", bus="virtio-scsi")]


async def start_writing(vm: RunningQemu, disks: Sequence[VmDisk]) -> None:
    """The guest writes to both disks from now on, until its end."""
    assert vm.guest is not None
    await vm.guest.check("dmesg -c >/dev/null")
    await vm.guest.check(RING.command(*DEVICES) + " >/tmp/ring 2>&1 &")
    await until(lambda: position(disks[1].path) > 100)


async def check_guest(vm: RunningQemu, disks: Sequence[VmDisk]) -> None:
    """The guest's writer goes on, and neither it nor the kernel has seen an error."""
    assert vm.guest is not None
    before = position(disks[0].path)
    assert await vm.guest.check("cat /tmp/ring") == ""
    code, found = await vm.guest.run("dmesg | grep -i 'error\\|reset\\|timed out\\|hung'")
    assert code == 1, found
    assert (await vm.execute("query-status"))["status"] == "running"
    await until(lambda: position(disks[0].path) > before)


async def restored_instant(lab: Lab, snapshot: str) -> int:
    folder = await lab.restored(snapshot)
    images = [folder / "drive-disk0.img", folder / "drive-disk1.img"]
    newest = assert_one_instant(images)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return newest


async def take_backups(
    qemu: QemuBinary,
    guest: SmallGuest,
    lab: Lab,
    count: int,
    disks: Sequence[VmDisk] | None = None,
    extra: Sequence[str] = (),
    more: Sequence[str] = (),
) -> None:
    """`count` backups of one guest, full and incremental in turn: every second one begins a group of its own.

    `more` are options of each backup.
    """
    disks = ring_disks(lab) if disks is None else disks
    taken: list[tuple[str, int, int]] = []
    modes = []
    async with lab.vm(qemu, disks, guest=guest, extra=extra, lifetime_s=900) as vm:
        await start_writing(vm, disks)
        for number in range(count):
            before = position(disks[0].path)
            report = await lab.backup(vm, *more, id=f"ring-{number // 2}")
            assert (report.document["frozen-s"] > 0) == ("--pause" in more)
            taken.append((report.document["snapshot"], before, position(disks[0].path)))
            modes += [report.archives[f"drive-disk{disk}.img"]["mode"] for disk in (0, 1)]
        await check_guest(vm, disks)
        assert vm.guest is not None
        await vm.guest.check("killall ring")
        # A chain of incremental backups without writes between them changes nothing.
        last = await lab.backup(vm, id="ring-0")
        final = await restored_instant(lab, last.document["snapshot"])
        assert final == position(disks[0].path)
        again = await lab.backup(vm, id="ring-0")
        assert [again.archives[f"drive-disk{disk}.img"]["read"] for disk in (0, 1)] == [0, 0]
        assert await restored_instant(lab, again.document["snapshot"]) == final
        for snapshot, before, after in taken:
            assert before <= await restored_instant(lab, snapshot) <= after, snapshot
    assert modes == (["full"] * 2 + ["incremental"] * 2) * (count // 2) + ["full"] * 2 * (count % 2)
    await lab.assert_verifies()


async def test_backups_under_continuous_writes_are_one_instant_of_both_disks(
    qemu: QemuBinary, guest: SmallGuest, lab: Lab, rounds: Callable[[int], int]
) -> None:
    await take_backups(qemu, guest, lab, rounds(20))


@pytest.mark.long
async def test_a_hundred_backups_under_continuous_writes(qemu: QemuBinary, guest: SmallGuest, lab: Lab) -> None:
    await take_backups(qemu, guest, lab, 100)


def disks_with_io_threads(lab: Lab) -> tuple[list[VmDisk], list[str]]:
    """The disks of the ring, each served by a thread of its own, and the options that make the threads."""
    disks = [
        VmDisk(lab.raw("first", SIZE), "disk0", device_options="iothread=io0"),
        VmDisk(lab.raw("second", SIZE), "disk1", bus="virtio-scsi", device_options="bus=scsi1.0"),
    ]
    threads = [
        *("-object", "iothread,id=io0", "-object", "iothread,id=io1"),
        *("-device", "virtio-scsi-pci,id=scsi1,iothread=io1"),
    ]
    return disks, threads


async def test_disks_with_io_threads_of_their_own_are_one_instant(
    backports: QemuBinary, guest: SmallGuest, lab: Lab
) -> None:
    disks, threads = disks_with_io_threads(lab)
    await take_backups(backports, guest, lab, 4, disks, threads)


async def test_io_threads_are_refused_where_a_backup_would_end_qemu(
    distribution: QemuBinary, guest: SmallGuest, lab: Lab
) -> None:
    if distribution.version >= (9, 1, 0):
        pytest.skip("this QEMU can back up disks with I/O threads")
    disks, threads = disks_with_io_threads(lab)
    async with lab.vm(distribution, disks, guest=guest, extra=threads) as vm:
        await start_writing(vm, disks)
        for outcome in (await lab.try_backup(vm), await lab.try_backup(vm, "--dry-run")):
            assert (outcome.code, outcome.out) == (1, "")
            assert "it has I/O threads" in outcome.error["why"]
            assert "9.1" in outcome.error["hint"]
        await check_guest(vm, disks)


async def test_a_backup_holds_what_a_paused_guest_has_on_its_disks(
    qemu: QemuBinary, guest: SmallGuest, lab: Lab, tmp_path: Path
) -> None:
    disks = ring_disks(lab)
    async with lab.vm(qemu, disks, guest=guest) as vm:
        await start_writing(vm, disks)
        await lab.backup(vm)
        await vm.execute("stop")
        expected = {f"drive-{disk.id}.img": disk.path.read_bytes() for disk in disks}
        async with lab.stopped_backup(vm, "phase:export the frozen views:after") as running:
            # The instant is over: what the guest writes from now on is of no concern.
            await vm.execute("cont")
            before = position(disks[0].path)
            await until(lambda: position(disks[0].path) > before + 1000)
            running.go_on()
            report = await running.ended()
        assert report.code == 0, report
        await lab.assert_restores(report, expected)
        await check_guest(vm, disks)
