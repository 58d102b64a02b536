"""kill -9 of the command at exact points of its work: the guest goes on, the next run cleans up and is right.

The command halts itself at the point (`tests.support.stopping_fleece`) and is then killed.
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import trio

from tests.support.guest import SmallGuest
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import VmDisk
from tests.support.scripted_qmp import ScriptedAgent
from tests.vm.lab import CHUNK, MIB, Lab, PlayedGuest
from tests.vm.ring_images import position
from tests.vm.test_point_in_time import check_guest, restored_instant, ring_disks, start_writing

pytestmark = pytest.mark.qemu

#: From the set-up to the hand-over, in an order of which any beginning is a fair choice.
POINTS = (
    "command:blockdev-reopen:1:after",  # the instant is set, the old bitmaps still record
    "read:3",
    "finish:after",  # the snapshot is there, its bitmaps are not handed over
    "command:qom-set:1:after",  # one device switched, the other not
    "command:block-export-add:1:after",  # the map is exported, the bitmap busy
    "command:blockdev-reopen:2",  # end: exports and views are gone, the filters still in the way
    "command:transaction:1:after",  # the new bitmaps are there
    "command:blockdev-add:1:after",  # a fleecing image is open
    "command:blockdev-add:6:after",  # the filters are there, the guest does not use them yet
    "command:transaction:2:after",  # the old bitmaps are disabled
    "phase:start the NBD server",
    "finish",  # all is read, the manifest is not there
    "command:nbd-server-stop:1",
    "command:qom-set:3:after",  # end: one device is set back
    "command:transaction:3:after",  # end: the bitmaps are handed over
)
#: The snapshot of the killed run is whole from here on.
FINISHED = (
    "finish:after",
    "command:blockdev-reopen:2",
    "command:nbd-server-stop:1",
    "command:qom-set:3:after",
    "command:transaction:3:after",
)


@pytest.mark.guest
@pytest.mark.timeout(900)
async def test_killed_anywhere_the_guest_goes_on_and_the_next_run_cleans_up_and_is_right(
    qemu: QemuBinary, guest: SmallGuest, lab: Lab, rounds: Callable[[int], int]
) -> None:
    points = POINTS if os.environ.get("FLEECE_TEST_LONG") else POINTS[: rounds(10)]
    disks = ring_disks(lab)
    async with lab.vm(qemu, disks, guest=guest, lifetime_s=900) as vm:
        await start_writing(vm, disks)
        await lab.backup(vm)
        for point in points:
            finished = len(lab.finished())
            async with lab.stopped_backup(vm, point) as running:
                await running.kill()
            await check_guest(vm, disks)
            assert len(lab.finished()) - finished == (point in FINISHED), point
            before = position(disks[0].path)
            report = await lab.try_backup(vm)
            after = position(disks[0].path)
            assert report.code in (0, 3), (point, report)
            assert all("killed" in warning for warning in report.document["warnings"]), (point, report)
            assert before <= await restored_instant(lab, report.document["snapshot"]) <= after, point
            # A killed run costs a longer read, never a full one.
            assert [report.archives[f"drive-disk{disk}.img"]["mode"] for disk in (0, 1)] == ["incremental"] * 2, point
            await lab.nothing_left.check_host()
        await check_guest(vm, disks)
    await lab.assert_verifies()


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_killed_before_and_after_every_single_command(qemu: QemuBinary, lab: Lab) -> None:
    sizes = {"disk0": 12 * MIB, "disk1": 8 * MIB}
    disks = [
        VmDisk(await lab.qcow2(qemu, "a", sizes["disk0"]), "disk0", format="qcow2"),
        VmDisk(lab.raw("b", sizes["disk1"]), "disk1", bus="virtio-scsi"),
    ]
    async with lab.vm(qemu, disks, lifetime_s=3600) as vm:
        guest = PlayedGuest(vm, sizes)
        await lab.backup(vm)
        number, ended = 0, False
        while not ended:
            number += 1
            point = f"qmp:{(number + 1) // 2}" + (":after" if number % 2 == 0 else "")
            await guest.write("disk0", number % 256, number * MIB % (12 * MIB), 4096)
            async with lab.fleece.start("vm", "backup", *lab.arguments(vm), stop_at=point) as running:
                ended = await stopped_or_ended(running)
                await guest.write("disk1", number % 256, number * MIB % (8 * MIB), 4096)
                await running.kill()
            await guest.write("disk0", (number + 1) % 256, (number + 5) * MIB % (12 * MIB), 4096)
            report = await lab.try_backup(vm)
            assert report.code in (0, 3), (point, report)
            modes = {archive["mode"] for name, archive in report.archives.items() if name.startswith("drive-")}
            assert modes == {"incremental"}, (point, report)
            await lab.assert_restores(report, guest.images())
            await lab.nothing_left.check_host()
        assert number > 60
        await guest.reads_back()


async def stopped_or_ended(running: Any) -> bool:
    """True if the command came to its end before its point."""
    try:
        await running.stopped()
    except AssertionError:
        assert (await running.ended()).code in (0, 3)
        return True
    return False


async def test_cleanup_after_a_kill_says_what_it_did_and_leaves_the_bitmaps_in_order(
    qemu: QemuBinary, lab: Lab
) -> None:
    sizes = {"disk0": 12 * MIB, "disk1": 8 * MIB}
    disks = [
        VmDisk(await lab.qcow2(qemu, "a", sizes["disk0"]), "disk0", format="qcow2"),
        VmDisk(lab.raw("b", sizes["disk1"]), "disk1", bus="virtio-scsi"),
    ]
    async with lab.vm(qemu, disks) as vm:
        before = await lab.nothing_left.facts(vm)
        guest = PlayedGuest(vm, sizes)
        await lab.backup(vm)
        await guest.write("disk0", 0x11, 0, 512)  # before the instant of the killed run
        async with lab.stopped_backup(vm, "read:1:after") as running:
            await guest.write("disk0", 0x22, 9 * MIB, 512)  # after it
            await running.kill()
        # Of no other type: what QEMU does when the reader of a `vhost-user-blk` export leaves endangers it.
        assert [export["type"] for export in await vm.exports()] == ["nbd", "nbd"]
        assert (await lab.show(vm))["drive-disk0.img"]["next"]["mode"] == "full"  # it cannot say more in this state
        done = await lab.fleece.json("vm", "cleanup", "--qmp", vm.qmp)
        assert any("set" in line and "back" in line for line in done["done"]), done
        assert any("fleecing image" in line for line in done["done"]), done
        # Now, not only at the end of the test.
        assert {**await lab.nothing_left.facts(vm), "NBD server": "none"} == before
        report = await lab.backup(vm)
        assert report.archives["drive-disk0.img"]["dirty"] == 2 * CHUNK
        assert report.archives["drive-disk1.img"]["dirty"] == 0
        await lab.assert_restores(report, guest.images())


async def test_two_killed_runs_in_a_row_are_cleaned_up_by_the_third(distribution: QemuBinary, lab: Lab) -> None:
    async with lab.vm(distribution, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        guest = PlayedGuest(vm, {"disk0": 12 * MIB})
        await lab.backup(vm)
        for number, point in enumerate(("read:1", "phase:read", "finish"), start=1):
            await guest.write("disk0", number, number * 3 * MIB, 512)
            async with lab.stopped_backup(vm, point) as running:
                await running.kill()
        report = await lab.backup(vm, code=3)
        assert report.archives["drive-disk0.img"]["mode"] == "incremental"
        await lab.assert_restores(report, guest.images())


@pytest.mark.parametrize(
    "point", ["finish:after", "command:blockdev-reopen:2", "command:transaction:3", "command:transaction:3:after"]
)
async def test_a_signal_that_comes_when_the_snapshot_is_listed_takes_nothing_back(
    point: str, distribution: QemuBinary, lab: Lab
) -> None:
    async with lab.vm(distribution, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        guest = PlayedGuest(vm, {"disk0": 12 * MIB})
        await lab.backup(vm)
        await guest.write("disk0", 0x11, 0, 512)
        async with lab.stopped_backup(vm, point) as running:
            running.process.send_signal(signal.SIGTERM)
            running.go_on()
            outcome = await running.ended()
        assert outcome.code == 3, outcome
        (warning,) = outcome.document["warnings"]
        assert f"the snapshot {outcome.document['snapshot']} is whole and listed" in warning
        assert (await lab.snapshots())[-1] == outcome.document["snapshot"]
        await lab.assert_restores(outcome, guest.images())
        # The bitmap counts from that snapshot.
        await guest.write("disk0", 0x22, 5 * MIB, 512)
        report = await lab.backup(vm)
        assert report.archives["drive-disk0.img"]["read"] == CHUNK
        await lab.assert_restores(report, guest.images())


@pytest.mark.parametrize(
    "point", ["command:blockdev-reopen:1", "command:blockdev-reopen:1:after"], ids=["before", "after"]
)
async def test_killed_between_freeze_and_thaw_the_guest_is_thawed_within_ten_seconds(
    point: str, distribution: QemuBinary, lab: Lab
) -> None:
    agent = ScriptedAgent()
    async with agent.serving() as socket, lab.vm(distribution, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        guest = PlayedGuest(vm, {"disk0": 12 * MIB})
        report = await lab.backup(vm, "--guest-agent", str(socket))
        assert report.document["frozen-s"] > 0
        assert agent.seen.count("guest-fsfreeze-freeze") == agent.seen.count("guest-fsfreeze-thaw") == 1
        await guest.write("disk0", 0x11, 0, 512)
        async with lab.stopped_backup(vm, point, "--guest-agent", str(socket)) as running:
            assert agent.frozen
            began = trio.current_time()
            await running.kill()
            await agent.until("guest-fsfreeze-thaw", times=2)
        assert not agent.frozen
        assert trio.current_time() - began < 10
        report = await lab.backup(vm, "--guest-agent", str(socket), code=3)
        assert report.document["frozen-s"] > 0
        assert not agent.frozen
        await lab.assert_restores(report, guest.images())


async def test_a_run_that_hangs_between_freeze_and_thaw_does_not_keep_the_guest_frozen(
    distribution: QemuBinary, lab: Lab
) -> None:
    agent = ScriptedAgent()
    async with agent.serving() as socket, lab.vm(distribution, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        await lab.backup(vm)
        async with lab.stopped_backup(vm, "command:blockdev-reopen:1", "--guest-agent", str(socket)) as running:
            await agent.until("guest-fsfreeze-thaw")
            assert not agent.frozen
            running.go_on()
            report = await running.ended()
        assert report.code == 3, report
        assert any("thawed after 10 s" in warning for warning in report.document["warnings"])


#: Reads through two connections until it is killed; says so when it has begun.
_READER = """
import os, sys, threading, time
import nbd
uri, size = sys.argv[1], int(sys.argv[2])
def read():
    handle = nbd.NBD()
    handle.connect_uri(uri)
    while True:
        for offset in range(0, size, 4 << 20):
            handle.pread(4 << 20, offset)
            begun.set()
for line in sys.stdin:
    begun = threading.Event()
    pid = os.fork()
    if pid == 0:
        for _ in range(2):
            threading.Thread(target=read).start()
        begun.wait()
        os.write(1, b"%d\\n" % os.getpid())
        time.sleep(60)
        os._exit(1)
    os.waitpid(pid, 0)
    os.write(1, b"gone\\n")
"""


@pytest.mark.parametrize("kills", [8, pytest.param(500, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
async def test_readers_that_are_killed_in_the_middle_of_reading_do_not_end_qemu(
    kills: int, qemu: QemuBinary, lab: Lab
) -> None:
    choose = random.Random(kills)
    image = lab.raw("a", 16 * MIB)
    image.write_bytes(choose.randbytes(16 * MIB))
    async with lab.vm(qemu, [VmDisk(image, "disk0")], lifetime_s=900) as vm:
        async with lab.stopped_backup(vm, "read:1") as running:
            (socket,) = lab.fleece.run_dir.glob("*/nbd")
            line = [sys.executable, "-c", _READER, f"nbd+unix:///drive-0?socket={socket}", str(16 * MIB)]
            readers = await trio.lowlevel.open_process(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert readers.stdin is not None
            assert readers.stdout is not None
            async with readers.stdin, readers.stdout:
                for _ in range(kills):
                    await readers.stdin.send_all(b"again\n")
                    pid = int(await readers.stdout.receive_some())
                    await trio.sleep(choose.uniform(0, 0.02))
                    os.kill(pid, signal.SIGKILL)
                    assert await readers.stdout.receive_some() == b"gone\n"
                    await vm.execute("query-status")
            await readers.wait()
            running.go_on()
            assert (await running.ended()).code == 0
        await lab.assert_restores("vm/web/latest", {"drive-disk0.img": image.read_bytes()})
