"""A night of backups: an agent backs a writing guest up every second while its jobs, itself and QEMU are killed.

Every snapshot that is listed is one instant of both disks, later than the one before; and at the end nothing is left,
and what lives long has not grown.
"""

import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from datastore.names import parse_time
from tests.support.fleece_command import RunningFleece
from tests.support.guest import SmallGuest
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk
from tests.vm.lab import MIB, Lab, until
from tests.vm.ring_images import RING, position
from tests.vm.test_point_in_time import DEVICES, check_guest, restored_instant, ring_disks

pytestmark = [pytest.mark.qemu, pytest.mark.guest, pytest.mark.timeout(3600)]

#: What a process may have more at the end than when it had done its work some times: caches fill, heaps have holes.
GROWTH = 24 * MIB


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


def children(pid: int) -> list[int]:
    """Processes that `pid` has started."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(one) for task in tasks for one in (task / "children").read_text().split()]
    except OSError:
        return []


@dataclass
class Night:
    """Backups one after the other, and what was seen of them."""

    lab: Lab
    disks: list[VmDisk]
    choose: random.Random
    #: Snapshots that were seen, with the newest number that was written by then.
    seen: dict[int, int] = field(default_factory=dict)
    killed: dict[str, int] = field(default_factory=dict)

    def look(self) -> int:
        """Take note of new snapshots; how many there are."""
        for ctime in self.lab.finished():
            if ctime not in self.seen:
                self.seen[ctime] = position(self.disks[0].path)
        return len(self.seen)

    async def further(self, vm: RunningQemu, count: int = 1) -> None:
        """Wait for so many further snapshots."""
        wanted = self.look() + count

        def there() -> bool:
            assert vm.alive(), vm.state()
            return self.look() >= wanted

        await until(there, 180)

    async def start_writing(self, vm: RunningQemu) -> None:
        """The guest goes on where the one before it ended: the last number may not be on the second disk."""
        assert vm.guest is not None
        await vm.guest.check("dmesg -c >/dev/null")
        start = max(1, position(self.disks[0].path))
        await vm.guest.check(RING.command(*DEVICES, start=start) + " >/tmp/ring 2>&1 &")
        await until(lambda: position(self.disks[1].path) > start + 50)

    @asynccontextmanager
    async def agent(self, vm: RunningQemu) -> AsyncIterator[RunningFleece]:
        """`fleece agent` with one job that is always due; killed at the end if it still runs."""
        scratch = self.lab.nothing_left.scratch
        self.lab.fleece.config.write_text(
            f'scratch = "{scratch}"\n[vm.web]\nqmp = "{vm.qmp}"\nscratch-beside-disks = true\n'
            f'[job.night]\ntype = "backup"\nvm = ["web"]\nschedule = "*:*:*"\nrepository = "{self.lab.fleece.repo}"\n'
        )
        async with self.lab.fleece.start("agent", output=False) as agent:
            yield agent

    async def a_while(self) -> None:
        await trio.sleep(self.choose.uniform(0, 1.5))

    async def kill_job(self, agent: RunningFleece) -> None:
        """SIGKILL for the job wherever it is."""
        await until(lambda: bool(children(agent.pid)))
        await trio.sleep(self.choose.uniform(0, 1.0))
        for pid in children(agent.pid):
            os.kill(pid, signal.SIGKILL)
        self._count("job")

    def _count(self, what: str) -> None:
        self.killed[what] = self.killed.get(what, 0) + 1

    async def one_life(self, vm: RunningQemu, events: list[str]) -> None:
        """Backups of one QEMU until it is killed, or `events` are used up and it is left in order."""
        await self.start_writing(vm)
        grown_from: tuple[int, int] | None = None
        while events:
            async with self.agent(vm) as agent:
                before: tuple[int, int] | None = None
                while events:
                    event = events.pop(0)
                    await self.further(vm, 2)
                    if grown_from is None and len(self.seen) > 4:
                        grown_from = resident(vm.pid), descriptors(vm.pid)
                    if before is None:
                        before = resident(agent.pid), descriptors(agent.pid)
                    if event == "job":
                        await self.kill_job(agent)
                    elif event == "agent":
                        await self.a_while()
                        await agent.kill()
                        self._count("agent")
                        break
                    elif event == "qemu":
                        await self.a_while()
                        await vm.kill()
                        self._count("qemu")
                        break
                if event != "agent":
                    assert before is not None
                    assert resident(agent.pid) < before[0] + GROWTH
                    os.kill(agent.pid, signal.SIGTERM)
                    assert (await agent.ended()).code == 0
            # A job whose agent was killed ends by itself, in order.
            await until(lambda: not self.lab.fleece.processes())
            if event == "qemu":
                return
        await check_guest(vm, self.disks)
        # Whatever a killed job has left is cleaned up by the next backup.
        outcome = await self.lab.fleece.run("vm", "backup", "web")
        assert outcome.code in (0, 3), outcome
        self.look()
        if grown_from is not None:
            assert descriptors(vm.pid) <= grown_from[1] + 2
            assert resident(vm.pid) < grown_from[0] + GROWTH

    async def check_snapshots(self) -> None:
        """Each is one instant, and they are in order."""
        snapshots = await self.lab.snapshots()
        assert len(snapshots) == len(self.seen)
        instants = []
        for snapshot in snapshots:
            instants.append(await restored_instant(self.lab, snapshot))
            assert instants[-1] <= self.seen[parse_time(snapshot.rpartition("/")[2])], snapshot
        assert instants == sorted(instants)
        await self.lab.assert_verifies()


async def go_through(lab: Lab, qemu: QemuBinary, guest: SmallGuest, events: list[str], seed: int) -> Night:
    night = Night(lab, ring_disks(lab), random.Random(seed))
    kills = len([event for event in events if event != "none"])
    while events:
        async with lab.vm(qemu, night.disks, guest=guest, lifetime_s=3600) as vm:
            await night.one_life(vm, events)
    assert sum(night.killed.values()) == kills
    await night.check_snapshots()
    return night


async def test_what_is_killed_during_backups_costs_no_snapshot(
    backports: QemuBinary, guest: SmallGuest, lab: Lab
) -> None:
    await go_through(lab, backports, guest, ["job", "agent", "qemu", "none"], 1)


@pytest.mark.long
async def test_two_hundred_backups_with_random_kills(qemu: QemuBinary, guest: SmallGuest, lab: Lab) -> None:
    choose = random.Random(2)
    events = [*choose.choices(["none", "job", "agent", "qemu"], [55, 25, 10, 10], k=99), "none"]
    night = await go_through(lab, qemu, guest, events, 3)
    assert len(night.seen) >= 200
    assert min(night.killed[what] for what in ("job", "agent", "qemu")) >= 3
