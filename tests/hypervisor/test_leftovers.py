"""What a killed run leaves, and how the next one, or `fleece vm cleanup`, removes it: QEMU alone is enough."""

import os
import random
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest
import trio

from hypervisor.errors import QmpConnectError, VmStateError
from hypervisor.leftovers import Left, look_for_left
from hypervisor.qmp import connect
from hypervisor.scratch import remove_stale
from hypervisor.state import clean_dead
from hypervisor.vm import DiskPreview, DiskSelection, cleanup, preview
from tests.hypervisor.fleecing_bench import MIB, TARGET, Bench, facts, make_qcow2
from tests.support.cache import ROOT
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk
from tests.support.scripted_qmp import ScriptedAgent, ScriptedQmp

D0, D1 = "drive-d0.img", "drive-d1.img"
SIZE = 32 * MIB
#: Every step of a run, in order; a run dies before it.
PHASES = (
    "add the new bitmaps",
    "add the fleecing images",
    "add the pass-through nodes",
    "switch the devices to them",
    "add the copy-before-write filters",
    "freeze the guest, switch to the filters",
    "disable the old bitmaps",
    "add the frozen views",
    "start the NBD server",
    "read the maps",
    "export the frozen views",
    "read",
    "reading",
    "undo",
    "hand the bitmaps over",
    "done",
)


@asynccontextmanager
async def two_disks(qemu: QemuBinary, folder: Path) -> AsyncIterator[tuple[RunningQemu, Bench]]:
    await make_qcow2(qemu, folder / "d0", SIZE)
    (folder / "d1").write_bytes(bytes(SIZE))
    (folder / "w" / "scratch").mkdir(parents=True)
    (folder / "w" / "run").mkdir(mode=0o700)
    disks = [VmDisk(folder / "d0", "d0", format="qcow2"), VmDisk(folder / "d1", "d1", bus="virtio-scsi")]
    async with RunningQemu.start(qemu, disks) as vm:
        yield vm, Bench(folder / "w")


def run_that_dies(vm: RunningQemu, bench: Bench, number: int, phase: str, *more: Path) -> list[str]:
    """Command line of a run that dies at `phase`."""
    base = "-" if bench.store.base is None else f"{bench.store.base}:{SIZE}"
    command = [sys.executable, "-m", "tests.hypervisor.killed_backup", vm.qmp, bench.folder, base, number, phase, *more]
    return [str(word) for word in command]


async def killed(vm: RunningQemu, bench: Bench, phase: str, *more: Path) -> int:
    """A run that dies at `phase`; returns the id of its snapshot."""
    number = bench.store.next_id()
    with trio.fail_after(240):  # of a start under any load; it only says that something hangs
        ended = await trio.run_process(
            run_that_dies(vm, bench, number, phase, *more), cwd=ROOT, check=False, stdin=DEVNULL, capture_stdout=True
        )
    assert ended.returncode == -9
    return number


async def rehearsed(vm: RunningQemu, bench: Bench) -> dict[str, DiskPreview]:
    """What the next run would read when it has cleaned up."""
    async with connect(vm.qmp) as qmp:
        left = await look_for_left(qmp, bench.run_dir)
        disks = (await DiskSelection().survey(qmp, instead=left.roots)).disks
        assert [disk.node for disk in disks] == ["fmt-d0", "fmt-d1"]
        free = left.bitmaps_free
        store = bench.store
        shown = await preview(qmp, disks, TARGET, store.base_of, store.is_finished, bitmaps_free=free)
    return {disk.name: disk for disk in shown}


@pytest.mark.timeout(900)  # some twenty processes, one after the other: long where the machine has other work
async def test_a_run_killed_at_any_step_is_cleaned_up_by_the_next(
    qemu: QemuBinary, tmpfs: Path, rounds: Callable[[int], int]
) -> None:
    # A quarter of the steps on one of the QEMUs, spread over all of them.
    phases = PHASES[:: len(PHASES) // rounds(len(PHASES))]
    async with two_disks(qemu, tmpfs) as (vm, bench):
        before = await facts(vm, bench)
        await bench.backup(vm)
        model = bytearray(SIZE)
        for number, phase in enumerate(phases, start=1):
            place = (number - 1) * 2
            await vm.qemu_io("d0", f"write -P {number} {place}M 1M")
            model[place * MIB : (place + 1) * MIB] = bytes([number]) * MIB
            await killed(vm, bench, phase)
            # The guest goes on, and what it writes meanwhile counts.
            await vm.qemu_io("d0", f"write -P {number + 100} {place + 1}M 1M")
            model[(place + 1) * MIB : (place + 2) * MIB] = bytes([number + 100]) * MIB
            as_left = await facts(vm, bench)
            shown = await rehearsed(vm, bench)
            assert await facts(vm, bench) == as_left, phase
            reads = await bench.backup(vm)
            for name, read in reads.items():
                assert (shown[name].mode, shown[name].reason) == (read.mode, read.reason), phase
                assert read.read <= shown[name].bytes, phase
            assert reads[D0].image == model, phase
            if phase != "done":  # that one had handed its bitmaps over
                assert (reads[D0].mode, reads[D1].mode) == ("incremental", "incremental"), phase
                assert reads[D0].read <= 8 * MIB
            for node in ("fmt-d0", "fmt-d1"):
                assert len(await vm.bitmaps(node)) == 1, phase
            assert await facts(vm, bench) == before, phase


async def test_a_run_killed_between_freeze_and_thaw_leaves_no_frozen_guest(qemu: QemuBinary, tmpfs: Path) -> None:
    agent = ScriptedAgent(file_systems=2)
    async with two_disks(qemu, tmpfs) as (vm, bench), agent.serving() as path:
        before = await facts(vm, bench)
        await killed(vm, bench, "frozen", path)
        with trio.fail_after(60):
            await agent.until("closed")
        assert not agent.frozen
        await bench.backup(vm, guest_agent=path)
        assert await facts(vm, bench) == before


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
async def test_a_run_killed_at_any_moment_is_cleaned_up_by_the_next(qemu: QemuBinary, tmpfs: Path, seed: int) -> None:
    dice = random.Random(seed)
    async with two_disks(qemu, tmpfs) as (vm, bench):
        before = await facts(vm, bench)
        await bench.backup(vm)
        model = bytearray(SIZE)
        for number in range(1, 31):
            command = run_that_dies(vm, bench, bench.store.next_id(), "never")
            process = await trio.lowlevel.open_process(command, cwd=ROOT, stdin=DEVNULL, stdout=PIPE)
            assert process.stdout is not None
            assert await process.stdout.receive_some(2) == b"go"
            await trio.sleep(dice.random() * 0.3)
            process.kill()
            await process.stdout.aclose()
            await process.wait()
            await vm.qemu_io("d0", f"write -P {number} {number}M 1M")
            model[number * MIB : (number + 1) * MIB] = bytes([number]) * MIB
            assert (await bench.backup(vm))[D0].image == model
            assert await facts(vm, bench) == before


async def test_a_first_backup_that_was_killed_leaves_no_bitmap_to_count_on(qemu: QemuBinary, tmpfs: Path) -> None:
    async with two_disks(qemu, tmpfs) as (vm, bench):
        await killed(vm, bench, "reading")
        await vm.qemu_io("d1", "write -P 1 0 1M")
        reads = await bench.backup(vm)
        assert (reads[D1].reason, reads[D1].image[0]) == ("first backup", 1)
        assert len(await vm.bitmaps("fmt-d1")) == 1


async def test_a_run_that_had_nothing_but_the_hand_over_to_do_counts_as_done(qemu: QemuBinary, tmpfs: Path) -> None:
    async with two_disks(qemu, tmpfs) as (vm, bench):
        reads = await bench.backup(vm)
        await vm.qemu_io("d0", "write -P 1 0 1M")
        number = await killed(vm, bench, "undo")
        # The snapshot was finished before the kill.
        bench.store.base = number
        bench.store.finished.add(number)
        bench.store.images = {D0: b"\x01" * MIB + reads[D0].image[MIB:], D1: reads[D1].image}
        await vm.qemu_io("d0", "write -P 2 8M 1M")
        reads = await bench.backup(vm)
        assert (reads[D0].mode, reads[D0].read) == ("incremental", 4 * MIB)
        assert reads[D0].image[8 * MIB] == 2


async def test_clean_up_says_what_it_did_and_then_nothing_is_left(qemu: QemuBinary, tmpfs: Path) -> None:
    async with two_disks(qemu, tmpfs) as (vm, bench):
        before = await facts(vm, bench)
        await killed(vm, bench, "reading")
        assert await facts(vm, bench) != before
        async with connect(vm.qmp) as qmp:
            left = (await look_for_left(qmp, bench.run_dir)).things
        assert left[0] == "the exports fleece-e0, fleece-e1"
        assert left[1].startswith("the block nodes fleece-c0, fleece-c1, ")
        assert left[2].startswith(f"the fleecing images {bench.folder}/scratch/fleece-")
        # The filters have bitmaps of their own, without a name.
        bitmaps = [entry for entry in await vm.bitmaps("fmt-d0") if entry.get("name")]

        async def clean(**more: Any) -> list[str]:
            return await cleanup(vm.qmp, run_dir=bench.run_dir, scratch=bench.folder / "scratch", **more)

        done = await clean()
        assert "removed the export fleece-e0" in done
        assert "stopped the NBD server" in done
        assert "freed fmt-d0, fmt-d1" in done
        assert any(line.startswith("set /machine/peripheral/d1 back") for line in done)
        assert "removed the block nodes" in done
        assert len([line for line in done if line.startswith("removed the fleecing image")]) == 2
        assert await facts(vm, bench) == before
        assert await vm.bitmaps("fmt-d0") == bitmaps
        assert await clean() == []
        async with connect(vm.qmp) as qmp:
            assert await look_for_left(qmp, bench.run_dir) == Left([], {}, bitmaps_free=False)
        assert await clean(remove_bitmaps=True, target="11111111") == []
        assert await clean(remove_bitmaps=True) == ["removed 2 dirty bitmaps"]
        assert await vm.bitmaps("fmt-d0") == []


async def test_clean_up_needs_no_state_of_ours(qemu: QemuBinary, tmpfs: Path) -> None:
    async with two_disks(qemu, tmpfs) as (vm, bench):
        before = await facts(vm, bench)
        for has_exports in (True, False):  # without, by the frozen views: it was on its way to stop the server
            await killed(vm, bench, "reading")
            shutil.rmtree(bench.run_dir)
            bench.run_dir.mkdir(mode=0o700)
            for export in () if has_exports else await vm.execute("query-block-exports"):
                await vm.execute("block-export-del", {"id": export["id"], "mode": "hard"})
            await bench.backup(vm)
            assert await facts(vm, bench) == before


async def test_clean_up_leaves_what_is_not_ours(qemu: QemuBinary, tmpfs: Path) -> None:
    async with two_disks(qemu, tmpfs) as (vm, bench):
        await vm.execute("blockdev-add", {"driver": "null-co", "node-name": "fleece", "size": MIB})
        await vm.execute("blockdev-add", {"driver": "null-co", "node-name": "fleece-x1", "size": MIB})
        await vm.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(vm.folder / "theirs")}}})
        await vm.execute("block-export-add", {"type": "nbd", "id": "theirs", "node-name": "fleece"})
        before = await facts(vm, bench)
        assert await cleanup(vm.qmp, run_dir=bench.run_dir, scratch=bench.folder / "scratch") == []
        assert await facts(vm, bench) == before
        assert (vm.folder / "theirs").is_socket()


async def test_clean_up_waits_for_no_backup_that_runs(qemu: QemuBinary, tmpfs: Path) -> None:
    async with two_disks(qemu, tmpfs) as (vm, bench), bench.view(vm):
        with pytest.raises(VmStateError, match="another backup or clean-up"):
            await cleanup(vm.qmp, run_dir=bench.run_dir)
        async with connect(vm.qmp) as qmp:
            with pytest.raises(VmStateError, match="another backup or clean-up"):
                await look_for_left(qmp, bench.run_dir)


async def test_files_of_a_qemu_that_is_gone_are_removed(qemu: QemuBinary, tmpfs: Path) -> None:
    async with two_disks(qemu, tmpfs) as (vm, bench):
        await killed(vm, bench, "reading")
        assert list((bench.folder / "scratch").iterdir())
        assert await clean_dead(bench.run_dir) == []  # it still runs
        await vm.kill()
        with pytest.raises(QmpConnectError) as caught:
            await cleanup(vm.qmp, run_dir=bench.run_dir, scratch=bench.folder / "scratch")
        assert any("which has ended" in note for note in caught.value.__notes__)
        assert list((bench.folder / "scratch").iterdir()) == []
        assert list(bench.run_dir.iterdir()) == []


async def test_images_without_any_state_are_removed_unless_a_qemu_has_them_open(qemu: QemuBinary, tmpfs: Path) -> None:
    async with two_disks(qemu, tmpfs) as (vm, bench), bench.view(vm) as view:
        scratch = bench.folder / "scratch"
        used = sorted(scratch.iterdir())
        assert len(used) == 2
        old, young, foreign = scratch / "fleece-1-2-0.raw", scratch / "fleece-1-2-1.raw", scratch / "somebody.raw"
        for path in (old, young, foreign):
            path.write_bytes(bytes(MIB))
        for path in (old, foreign, *used):
            os.utime(path, (1, 1))
        assert remove_stale(scratch) == [old]
        assert sorted(scratch.iterdir()) == sorted([young, foreign, *used])
        for source in view.sources:
            await source.read_into(0, bytearray(MIB))


async def test_a_guest_is_freed_even_if_an_export_was_never_made(qemu: QemuBinary, tmpfs: Path) -> None:
    async with two_disks(qemu, tmpfs) as (vm, bench):
        await killed(vm, bench, "disable the old bitmaps")
        assert (await vm.block_info("d0"))["inserted"]["node-name"] == "fleece-p0"
        await cleanup(vm.qmp, run_dir=bench.run_dir, scratch=bench.folder / "scratch")
        assert (await vm.block_info("d0"))["inserted"]["node-name"] == "fmt-d0"
        assert TARGET in (await vm.bitmaps("fmt-d0"))[0]["name"]


async def test_what_qemu_calls_a_disk_does_not_steer_a_terminal(tmp_path: Path) -> None:
    disk = "fmt0\x1b[2J"
    names = {"fleece-o0": "raw", disk: "raw"}
    answers: dict[str, Any] = {
        "query-named-block-nodes": [
            {"node-name": name, "drv": driver, "ro": False, "image": {"virtual-size": 512}}
            for name, driver in names.items()
        ],
        "x-debug-query-block-graph": {
            "nodes": [{"id": number, "type": "block-driver", "name": name} for number, name in enumerate(names)],
            "edges": [{"parent": 0, "child": 1, "name": "file"}],
        },
    }
    async with ScriptedQmp(answers).serving() as path, connect(path) as qmp:
        with pytest.raises(VmStateError, match=r"in the middle: fmt0.*may hold a part") as caught:
            await look_for_left(qmp, tmp_path)
    assert str(caught.value).isprintable()
