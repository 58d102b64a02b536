"""The matrix of situations, the VM around the disks: migration, pause, targets, threads, firmware, templates.

docs/hypervisor.md, "Situations". The quick tests take one cell of each.
"""

import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hypervisor.bitmaps import MAX_TARGETS, BitmapMode
from hypervisor.errors import VmStateError, VmUnsupportedError
from hypervisor.pause import Pause
from hypervisor.qmp import Qmp
from hypervisor.size_marks import MISSING
from hypervisor.vm import cleanup
from tests.hypervisor.fleecing_bench import MIB, TARGET
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import PATIENCE_S, RunningQemu, VmDisk
from tests.support.scripted_qmp import ScriptedAgent
from tests.vm.cells import CHUNK, INCREMENTAL, Cell, ImageFormat, matrix_of

MIGRATED = "VM migrated since the previous backup, without its dirty bitmaps"


@asynccontextmanager
async def waiting_vm(cell: Cell, *disks: VmDisk) -> AsyncIterator[RunningQemu]:
    """A QEMU on the same images that a VM can migrate to."""
    async with cell.vm(*disks, extra=["-incoming", "defer"]) as vm:
        yield vm


async def migrated(source: RunningQemu, target: RunningQemu, *, bitmaps: bool) -> str:
    """Migrate, with or without the capability for dirty bitmaps; the state in which that ends."""
    for vm in (source, target):
        capability = {"capability": "dirty-bitmaps", "state": bitmaps}
        await vm.execute("migrate-set-capabilities", {"capabilities": [capability]})
    uri = f"unix:{target.folder}/migration"
    await target.execute("migrate-incoming", {"uri": uri})
    await source.execute("migrate", {"uri": uri})
    with trio.fail_after(PATIENCE_S):
        while (status := (await source.execute("query-migrate"))["status"]) not in ("completed", "failed"):  # noqa: ASYNC110
            await trio.sleep(0.02)
        while status == "completed" and (await target.execute("query-status"))["status"] == "inmigrate":  # noqa: ASYNC110
            await trio.sleep(0.02)
    return str(status)


@pytest.mark.parametrize("bitmaps", [True, False])
@matrix_of("raw", "qcow2")
async def test_a_migration_takes_the_bitmaps_along_or_the_reason_says_so(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path, bitmaps: bool
) -> None:
    cell = Cell(qemu, format, tmpfs)
    # As if the backup were a while ago: the QEMU that takes over is younger.
    cell.bench.store.clock = 1_000_000_000
    disk = await cell.disk("d0")
    async with cell.vm(disk) as source, waiting_vm(cell, disk) as target:
        await cell.write(source, "d0", 1, 0, 10 * MIB)
        await cell.backup(source, d0="first backup")
        await cell.write(source, "d0", 2, 5 * MIB)
        assert await migrated(source, target, bitmaps=bitmaps) == "completed"
        with pytest.raises(VmStateError, match="it was migrated away"):
            await cell.backup(source, d0=INCREMENTAL)
        await source.kill()
        if qemu.version >= (10, 0, 0):
            with pytest.raises(VmStateError, match="has migrated here and not gone on yet"):
                await cell.backup(target, d0=INCREMENTAL)
        await target.execute("cont")
        await cell.write(target, "d0", 3, 17 * MIB)
        if bitmaps or format == "qcow2":  # a persistent bitmap comes with the image
            assert (await cell.backup(target, d0=INCREMENTAL))["d0"].read == 2 * CHUNK
        else:
            await cell.backup(target, d0=MIGRATED)
        await cell.write(target, "d0", 4, 21 * MIB)
        assert (await cell.backup(target, d0=INCREMENTAL))["d0"].read == CHUNK


@pytest.mark.parametrize("mapped", ["all", "without marks", "other names"])
@matrix_of("raw", "qcow2", quick=-1)
async def test_bitmaps_that_a_migration_maps_to_aliases_count_only_if_nothing_is_missing(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path, mapped: str
) -> None:
    cell = Cell(qemu, format, tmpfs)
    cell.bench.store.clock = 1_000_000_000
    disk = await cell.disk("d0")
    async with cell.vm(disk) as source, waiting_vm(cell, disk) as target:
        await cell.write(source, "d0", 1, 0, 10 * MIB)
        # Not in the image, which would bring them along past the mapping.
        transient = {"bitmap_mode": BitmapMode.TRANSIENT}
        await cell.backup(source, d0="first backup", options=transient)
        await cell.write(source, "d0", 2, 5 * MIB)
        names = [one["name"] for one in await source.bitmaps(disk.node, marks=mapped != "without marks")]
        for vm, ending in ((source, ""), (target, "-x" if mapped == "other names" else "")):
            bitmaps = [{"name": name + ending, "alias": f"b{number}"} for number, name in enumerate(names)]
            mapping = [{"node-name": disk.node, "alias": "disk", "bitmaps": bitmaps}]
            await vm.execute("migrate-set-parameters", {"block-bitmap-mapping": mapping})
        assert await migrated(source, target, bitmaps=True) == "completed"
        await source.kill()
        await target.execute("cont")
        await cell.write(target, "d0", 3, 17 * MIB)
        reason = {"all": INCREMENTAL, "without marks": MISSING, "other names": MIGRATED}[mapped]
        await cell.backup(target, d0=reason, options=transient)
        await cell.write(target, "d0", 4, 21 * MIB)
        assert (await cell.backup(target, d0=INCREMENTAL))["d0"].read == CHUNK


@matrix_of("raw", "qcow2", quick=1)
async def test_a_migration_in_mid_backup_fails_and_the_vm_goes_on(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    disk = await cell.disk("d0")
    async with cell.vm(disk) as source, waiting_vm(cell, disk) as target:
        await source.execute("cont")
        await cell.write(source, "d0", 1, 0, 10 * MIB)
        await cell.backup(source, d0="first backup")
        await cell.write(source, "d0", 2, 5 * MIB)

        async def migrate() -> None:
            assert await migrated(source, target, bitmaps=True) == "failed"
            await cell.write(source, "d0", 3, 9 * MIB)

        await cell.backup(source, d0=INCREMENTAL, during=migrate)
        assert (await source.execute("query-status"))["status"] == "running"
        assert (await cell.backup(source, d0=INCREMENTAL))["d0"].read == CHUNK


@matrix_of("raw", "qcow2")
async def test_no_backup_starts_while_a_migration_is_under_way(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    disk = await cell.disk("d0")
    # What there is to be said of so much memory fits into no socket's buffer.
    async with cell.vm(disk, memory_mib=512) as source:
        await cell.backup(source, d0="first backup")
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.bind(f"{source.folder}/migration")
            deaf.listen()
            await source.execute("migrate", {"uri": f"unix:{source.folder}/migration"})
            with trio.fail_after(PATIENCE_S):
                while (await source.execute("query-migrate"))["status"] != "active":  # noqa: ASYNC110
                    await trio.sleep(0.02)
            with pytest.raises(VmStateError, match="a migration of it is under way"):
                await cell.backup(source, d0=INCREMENTAL)
            await source.execute("migrate_cancel")
        with trio.fail_after(PATIENCE_S):
            while (await source.execute("query-migrate"))["status"] != "cancelled":  # noqa: ASYNC110
                await trio.sleep(0.02)
        await cell.backup(source, d0=INCREMENTAL)


@matrix_of("raw", "qcow2", quick=1)
async def test_a_guest_that_cannot_be_frozen_is_paused_for_the_instant(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    states: list[str] = []

    async def look(qmp: Qmp) -> None:
        states.append((await qmp.execute("query-status"))["status"])

    async with cell.vm(await cell.disk("d0"), await cell.disk("d1")) as vm:
        await vm.execute("cont")
        number = cell.bench.store.next_id()
        async with cell.bench.view(vm, number, pause=Pause.WITHOUT_AGENT, at_instant=look) as view:
            assert 0 < view.frozen_s < PATIENCE_S
            assert (await vm.execute("query-status"))["status"] == "running"
        assert states == ["paused"]
        agent = ScriptedAgent()
        async with agent.serving() as path:
            options = {"pause": Pause.WITHOUT_AGENT, "guest_agent": path, "at_instant": look}
            async with cell.bench.view(vm, cell.bench.store.next_id(), **options) as view:
                assert view.frozen_s > 0
            assert states == ["paused", "running"]
        options = {"pause": Pause.WITHOUT_AGENT, "guest_agent": path, "at_instant": look}
        async with cell.bench.view(vm, cell.bench.store.next_id(), **options) as view:
            assert "no connection to the guest agent" in view.warnings[0]
        assert states == ["paused", "running", "paused"]
        # One that somebody else has paused stays so.
        await vm.execute("stop")
        async with cell.bench.view(vm, cell.bench.store.next_id(), pause=Pause.ALWAYS) as view:
            assert view.frozen_s == 0
        assert (await vm.execute("query-status"))["status"] == "paused"


_KILLED = """
import os, signal, sys
from pathlib import Path
import trio
from hypervisor.pause import Pause
from hypervisor.vm import frozen_view
from tests.hypervisor.fleecing_bench import Bench

class Vm:
    qmp = Path(sys.argv[1])

async def die(qmp):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with Bench(Path(sys.argv[2])).view(Vm, pause=Pause.ALWAYS, at_instant=die):
        pass

trio.run(main)
"""


@matrix_of("raw")
async def test_a_guest_goes_on_although_the_backup_that_paused_it_was_killed(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    async with cell.vm(await cell.disk("d0")) as vm:
        await vm.execute("cont")
        command = [sys.executable, "-c", _KILLED, str(vm.qmp), str(cell.bench.folder)]
        killed = await trio.run_process(command, check=False, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
        assert killed.returncode == -9
        with trio.fail_after(PATIENCE_S):
            while not (await vm.execute("query-status"))["running"]:  # noqa: ASYNC110
                await trio.sleep(0.02)
        assert {event["event"] for event in vm.own_qmp.events} >= {"STOP", "RESUME"}
        await cell.backup(vm, d0="first backup")


@matrix_of("raw", "qcow2", quick=1)
async def test_targets_count_for_themselves_and_the_oldest_of_too_many_goes(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    other = cell.another_target()
    there = {"target": "0badf00d"}
    async with cell.vm(await cell.disk("d0")) as vm:
        await cell.write(vm, "d0", 1, 0, 10 * MIB)
        await cell.backup(vm, d0="first backup")
        await cell.write(vm, "d0", 2, 5 * MIB)
        await cell.backup(vm, bench=other, options=there, d0="first backup")
        await cell.write(vm, "d0", 3, 17 * MIB)
        assert (await cell.backup(vm, d0=INCREMENTAL))["d0"].read == 2 * CHUNK
        assert (await cell.backup(vm, bench=other, options=there, d0=INCREMENTAL))["d0"].read == CHUNK
        # As many others as there may be: what counts from the oldest backup has to go.
        for number in range(MAX_TARGETS - 1):
            name = f"fleece-{number + 16:08x}-00000000-{3_000_000_000 + number}"
            await vm.execute("block-dirty-bitmap-add", {"node": "fmt-d0", "name": name})
        await cell.write(vm, "d0", 4, 21 * MIB)
        assert (await cell.backup(vm, d0=INCREMENTAL))["d0"].read == CHUNK
        assert any(f"fleece-{there['target']}-" in warning for warning in cell.bench.warnings)
        names = [bitmap["name"] for bitmap in await vm.bitmaps("fmt-d0", marks=True)]
        assert not any(there["target"] in name for name in names)
        assert sum(TARGET in name for name in names) == 2
        # And now the other one's.
        await cell.backup(vm, bench=other, options=there, d0="no dirty bitmap yet")
        # What nobody backs up to any more goes on demand.
        done = await cleanup(vm.qmp, run_dir=cell.bench.run_dir, remove_bitmaps=True, before=2_900_000_000)
        assert [line.split("-")[1] for line in done] == [there["target"]]
        assert len(await vm.bitmaps("fmt-d0", marks=True)) == MAX_TARGETS - 1


@matrix_of("raw", "qcow2", quick=1)
async def test_disks_with_threads_of_their_own_are_one_instant_or_refused(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    disks = [
        await cell.disk(f"d{number}", bus="virtio-blk", device_options=f"iothread=io{number}") for number in range(2)
    ]
    async with cell.vm(*disks, extra=["-object", "iothread,id=io0", "-object", "iothread,id=io1"]) as vm:
        await cell.write(vm, "d0", 1, 0, 10 * MIB)
        if qemu.version < (9, 1, 0):
            with pytest.raises(VmUnsupportedError, match="I/O threads"):
                await cell.backup(vm, d0="first backup", d1="first backup")
            return
        await cell.backup(vm, d0="first backup", d1="first backup")
        await cell.write(vm, "d1", 2, 5 * MIB)

        async def write() -> None:
            await cell.write(vm, "d0", 3, 0, 8 * MIB)

        reads = await cell.backup(vm, d0=INCREMENTAL, d1=INCREMENTAL, during=write)
        assert (reads["d0"].read, reads["d1"].read) == (0, CHUNK)
        await cell.backup(vm, d0=INCREMENTAL, d1=INCREMENTAL)
