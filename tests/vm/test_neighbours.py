"""Whatever else is in a QEMU, or works on it at the same time, is left alone or is a clear refusal."""

from functools import partial

import pytest
import trio

from tests.support.qemu_binaries import QemuBinary
from tests.support.running import VmDisk
from tests.vm.lab import CHUNK, MIB, Lab, PlayedGuest, until_exports

pytestmark = pytest.mark.qemu


async def test_bitmaps_of_others_are_left_alone(qemu: QemuBinary, lab: Lab) -> None:
    disks = [VmDisk(await lab.qcow2(qemu, "a", 12 * MIB), "disk0", format="qcow2")]
    async with lab.vm(qemu, disks) as vm:
        guest = PlayedGuest(vm, {"disk0": 12 * MIB})
        others = {"checkpoint-1": True, "fleece-of-somebody": False, "libvirt-2": False}
        for name, persistent in others.items():
            argument = {"node": "fmt-disk0", "name": name, "granularity": 65536, "persistent": persistent}
            await vm.execute("block-dirty-bitmap-add", argument)
        await vm.execute("block-dirty-bitmap-disable", {"node": "fmt-disk0", "name": "libvirt-2"})
        await guest.write("disk0", 0x11, MIB, 4096)
        before = {bitmap["name"]: bitmap for bitmap in await vm.bitmaps("fmt-disk0")}
        await lab.backup(vm)
        await lab.backup(vm)
        async with lab.stopped_backup(vm, "finish") as running:
            await running.kill()
        await lab.fleece.json("vm", "cleanup", "--qmp", vm.qmp, "--bitmaps")
        assert {bitmap["name"]: bitmap for bitmap in await vm.bitmaps("fmt-disk0")} == before
        await lab.backup(vm)
        for name in others:
            await vm.execute("block-dirty-bitmap-remove", {"node": "fmt-disk0", "name": name})


async def test_two_targets_count_for_themselves(qemu: QemuBinary, lab: Lab) -> None:
    disks = [VmDisk(await lab.qcow2(qemu, "a", 24 * MIB), "disk0", format="qcow2")]
    async with lab.vm(qemu, disks) as vm:
        guest = PlayedGuest(vm, {"disk0": 24 * MIB})
        await guest.write("disk0", 0x11, 0, 24 * MIB)
        await lab.backup(vm, id="daily")
        await guest.write("disk0", 0x22, 0, 512)
        await lab.backup(vm, id="weekly")
        await guest.write("disk0", 0x33, 8 * MIB, 512)
        assert len(await vm.bitmaps("fmt-disk0")) == 2
        weekly = await lab.backup(vm, id="weekly")
        daily = await lab.backup(vm, id="daily")
        assert weekly.archives["drive-disk0.img"]["dirty"] == CHUNK
        assert daily.archives["drive-disk0.img"]["dirty"] == 2 * CHUNK
        for report in (weekly, daily):
            await lab.assert_restores(report, guest.images())


async def test_a_second_run_on_one_qemu_is_refused_and_the_first_one_finishes(qemu: QemuBinary, lab: Lab) -> None:
    async with lab.vm(qemu, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        guest = PlayedGuest(vm, {"disk0": 12 * MIB})
        await guest.write("disk0", 0x11, 0, 12 * MIB)
        lab.arguments(vm, "other")
        async with lab.stopped_backup(vm, "read:1") as running:
            expected = guest.images()
            await guest.write("disk0", 0x22, 0, 12 * MIB)
            for arguments in (("backup", *lab.arguments(vm, "other")), ("cleanup", "--qmp", str(vm.qmp), "--bitmaps")):
                second = await lab.fleece.run("vm", *arguments)
                assert (second.code, second.out) == (1, "")
                assert "another backup or clean-up of it runs" in second.error["why"]
                assert str(running.pid) in second.error["why"]
            same = await lab.try_backup(vm)
            assert same.code == 1
            assert same.error["why"]
            running.go_on()
            report = await running.ended()
        assert report.code == 0, report
        assert await lab.snapshots() == [report.document["snapshot"]]
        await lab.assert_restores(report, expected)
        await lab.assert_restores(await lab.backup(vm, id="other"), guest.images())


async def test_two_vms_are_backed_up_into_one_store_at_the_same_time(qemu: QemuBinary, lab: Lab) -> None:
    async with (
        lab.vm(qemu, [VmDisk(lab.raw("a", 24 * MIB), "disk0")]) as one,
        lab.vm(qemu, [VmDisk(lab.raw("b", 24 * MIB), "disk0")]) as other,
    ):
        vms = {"one": one, "other": other}
        guests = {id: PlayedGuest(vm, {"disk0": 24 * MIB}) for id, vm in vms.items()}
        for id in vms:
            lab.arguments(vms[id], id)
            await guests[id].write("disk0", 0x11, 0, 20 * MIB)  # chunks that both have
            await guests[id].write("disk0", 0x20 + len(id), 0, 4096)
        async with trio.open_nursery() as nursery:
            for id, vm in vms.items():
                nursery.start_soon(partial(lab.backup, vm, id=id))
        for id in vms:
            await lab.assert_restores(f"vm/{id}/latest", guests[id].images())
        await lab.assert_verifies()


async def test_an_nbd_server_of_somebody_else_is_a_refusal_and_goes_on(distribution: QemuBinary, lab: Lab) -> None:
    async with lab.vm(distribution, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        address = {"type": "unix", "data": {"path": str(vm.folder / "theirs")}}
        await vm.execute("nbd-server-start", {"addr": address})
        export = {"type": "nbd", "id": "theirs", "node-name": "fmt-disk0", "name": "x"}
        await vm.execute("block-export-add", export)
        outcome = await lab.try_backup(vm)
        assert (outcome.code, outcome.out) == (1, "")
        assert "it is running already, for somebody else" in outcome.error["why"]
        assert [found["id"] for found in await vm.exports()] == ["theirs"]
        assert await lab.snapshots() == []
        await vm.execute("block-export-del", {"id": "theirs", "mode": "hard"})
        # Stopped before, the server would hold up QEMU until its clients are gone.
        await until_exports(vm, "theirs", there=False)
        await vm.execute("nbd-server-stop")
        await lab.backup(vm)


async def test_an_external_snapshot_costs_a_full_read_and_is_right(qemu: QemuBinary, lab: Lab) -> None:
    disks = [VmDisk(await lab.qcow2(qemu, "a", 12 * MIB), "disk0", format="qcow2")]
    overlay = await lab.qcow2(qemu, "overlay", 12 * MIB)
    async with lab.vm(qemu, disks) as vm:
        guest = PlayedGuest(vm, {"disk0": 12 * MIB})
        await guest.write("disk0", 0x11, 0, 12 * MIB)
        await lab.backup(vm)
        file = {"driver": "file", "filename": str(overlay)}
        added = {"driver": "qcow2", "node-name": "overlay", "file": file, "backing": None}
        await vm.execute("blockdev-add", added)
        await vm.execute("blockdev-snapshot", {"node": "fmt-disk0", "overlay": "overlay"})
        await guest.write("disk0", 0x22, 0, MIB)
        report = await lab.backup(vm)
        archive = report.archives["drive-disk0.img"]
        assert archive["mode"] == "full"
        assert "external snapshot" in archive["reason"]
        await lab.assert_restores(report, guest.images())
        await guest.write("disk0", 0x33, 0, 512)
        report = await lab.backup(vm)
        assert report.archives["drive-disk0.img"]["dirty"] == CHUNK
        await lab.assert_restores(report, guest.images())
        await vm.quit()  # its roots are others than at the beginning


async def test_a_snapshot_that_was_removed_is_not_counted_on(distribution: QemuBinary, lab: Lab) -> None:
    async with lab.vm(distribution, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        guest = PlayedGuest(vm, {"disk0": 12 * MIB})
        await guest.write("disk0", 0x11, 0, 12 * MIB)
        await lab.backup(vm)
        await guest.write("disk0", 0x22, 0, MIB)
        second = await lab.backup(vm)
        await guest.write("disk0", 0x33, 4 * MIB, MIB)
        assert (await lab.fleece.run("forget", second.document["snapshot"])).code == 0
        report = await lab.backup(vm)
        archive = report.archives["drive-disk0.img"]
        assert (archive["mode"], archive["reason"]) == ("full", "previous snapshot gone")
        await lab.assert_restores(report, guest.images())


async def test_without_a_base_that_is_good_the_same_disk_is_read_again(distribution: QemuBinary, lab: Lab) -> None:
    async with lab.vm(distribution, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        guest = PlayedGuest(vm, {"disk0": 12 * MIB})
        await guest.write("disk0", 0x11, 0, 12 * MIB)
        await lab.backup(vm)
        # One backup without a bitmap in between: the older bitmap does not fit the newer snapshot.
        await lab.backup(vm, "--bitmap", "none")
        report = await lab.backup(vm)
        assert report.archives["drive-disk0.img"]["mode"] == "full"
        await lab.assert_restores(report, guest.images())
