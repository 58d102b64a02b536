"""Frozen views of real QEMUs, and everything that may happen to a VM while one is up: the guest never notices."""

import errno
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from core.errors import SourceError
from hypervisor import leftovers
from hypervisor.block_graph import block_nodes
from hypervisor.errors import FleecingError, SnapshotBrokenError, VmStateError, VmUnsupportedError
from hypervisor.fleecing import Fleecing
from hypervisor.qmp import Qmp, connect
from hypervisor.scratch import Scratch
from hypervisor.state import Run
from hypervisor.vm import FrozenView
from tests.hypervisor.fleecing_bench import MIB, Bench, facts, hanging_reader, make_qcow2, read_disk
from tests.support.guest import SmallGuest
from tests.support.qemu_binaries import QemuBinary
from tests.support.ring import Ring
from tests.support.running import OwnQmp, QmpRefused, RunningQemu, VmDisk
from tests.support.scripted_qmp import ScriptedAgent

D0 = "drive-d0.img"


@asynccontextmanager
async def vm_with(
    qemu: QemuBinary, folder: Path, *disks: VmDisk, size: int = 24 * MIB, extra: Sequence[str] = ()
) -> AsyncIterator[tuple[RunningQemu, Bench]]:
    """A VM (without other disks: a raw one `d0`) and an empty store; afterwards nothing of a backup may be left."""
    disks = disks or (VmDisk(folder / "d0.raw", "d0"),)
    for disk in disks:
        if disk.format == "qcow2":
            await make_qcow2(qemu, disk.path, size)
        else:
            disk.path.write_bytes(b"\x05" * size)
    (folder / "w" / "scratch").mkdir(parents=True)
    (folder / "w" / "run").mkdir(mode=0o700)
    bench = Bench(folder / "w")
    async with RunningQemu.start(qemu, disks, extra=extra) as vm:
        before = await facts(vm, bench)
        yield vm, bench
        if vm.alive():
            assert await facts(vm, bench) == before
        assert list(bench.run_dir.iterdir()) == []
        assert list((folder / "w" / "scratch").iterdir()) == []


async def content(view: FrozenView, bench: Bench | None = None) -> bytes:
    """The only disk as the backup sees it; what is CLEAN comes from the newest snapshot in `bench`."""
    (source,) = view.sources
    return (await read_disk(source, None if bench is None else bench.store.images[source.name])).image


# -- the good case ----------------------------------------------------------------------------------------------------


async def test_every_kind_of_disk_is_read_and_put_back(qemu: QemuBinary, tmpfs: Path) -> None:
    disks = [
        VmDisk(tmpfs / "blk", "blk"),
        VmDisk(tmpfs / "scsi", "scsi", bus="virtio-scsi", format="qcow2"),
        VmDisk(tmpfs / "sata", "sata", bus="ide"),
        VmDisk(tmpfs / "nvme", "nvme0", bus="nvme"),
        VmDisk(tmpfs / "drive", "drive", form="drive"),
        VmDisk(tmpfs / "ro", "ro", read_only=True),
    ]
    async with vm_with(qemu, tmpfs, *disks, size=5 * MIB + 512) as (vm, bench):
        await vm.qemu_io("scsi", "write -P 9 4M 1M")
        reads = await bench.backup(vm)
        assert sorted(reads) == [f"drive-{name}.img" for name in ("blk", "drive", "nvme0", "sata", "scsi")]
        for name, read in reads.items():
            expected = (
                b"\x05" * (5 * MIB + 512) if name != "drive-scsi.img" else bytes(4 * MIB) + b"\x09" * MIB + bytes(512)
            )
            assert read.image == expected, name
        assert bench.warnings == []


async def test_the_instant_is_one_for_all_disks_under_a_writing_guest(
    qemu: QemuBinary, tmpfs: Path, guest: SmallGuest, rounds: Any
) -> None:
    ring = Ring()
    (tmpfs / "w").mkdir()
    bench = Bench(tmpfs / "w")
    disks = [VmDisk(tmpfs / "a", "d0"), VmDisk(tmpfs / "b", "d1", bus="virtio-scsi")]
    for disk in disks:
        disk.path.write_bytes(bytes(4 * MIB))
    async with RunningQemu.start(qemu, disks, guest=guest) as vm:
        assert vm.guest is not None
        await vm.guest.run(f"{ring.command('/dev/vda', '/dev/sda')} >/dev/null 2>&1 &")
        newest = 0
        for _ in range(rounds(20)):
            reads = await bench.backup(vm)
            images = [reads["drive-d0.img"].image, reads["drive-d1.img"].image]
            found = ring.assert_one_instant(
                *((lambda offset, length, image=image: image[offset : offset + length]) for image in images)
            )
            assert found > newest, "the guest has stopped writing"
            newest = found


async def test_the_plan_and_the_times_of_a_view(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        steps: list[str] = []
        started = time.time()
        async with bench.view(vm, on_step=steps.append) as view:
            assert started <= view.instant <= time.time()
            assert view.frozen_s == 0
            (source,) = view.sources
            assert (source.name, source.size) == (D0, 24 * MIB)
            assert (source.plan.base, source.plan.reason) == (None, "first backup")
            assert steps[0] == "add the new bitmaps"
            assert steps[-1] == "read"
        assert steps[-1] == "done"
        assert not view.committed


async def test_the_guest_is_frozen_at_the_instant_and_not_longer(qemu: QemuBinary, tmpfs: Path) -> None:
    agent = ScriptedAgent(file_systems=2)
    frozen: list[bool] = []

    async def look(_qmp: object) -> None:
        frozen.append(agent.frozen)

    async with vm_with(qemu, tmpfs) as (vm, bench), agent.serving() as path:
        async with bench.view(vm, guest_agent=path, at_instant=look) as view:
            assert frozen == [True]
            assert not agent.frozen
            assert 0 < view.frozen_s < 5
        assert view.warnings == []


async def test_a_missing_guest_agent_is_a_warning(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        await bench.backup(vm, guest_agent=tmpfs / "no-agent")
        (warning,) = bench.warnings
        assert "no-agent" in warning


async def test_at_the_instant_the_caller_may_look_at_qemu(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        seen: list[str] = []

        async def look(qmp: Any) -> None:
            seen.append((await qmp.execute("query-status"))["status"])
            await vm.qemu_io("d0", "write -P 1 0 1M")

        async with bench.view(vm, at_instant=look) as view:
            assert (await content(view))[:MIB] == b"\x05" * MIB
        assert seen


# -- failures of the backup -------------------------------------------------------------------------------------------


class Failure(Exception):  # noqa: N818 - what a block raises on purpose
    pass


async def test_an_error_of_the_block_comes_out_as_it_is(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        with pytest.raises(Failure, match="on purpose") as caught:
            async with bench.view(vm):
                raise Failure("on purpose")
        assert not hasattr(caught.value, "__notes__")
        assert await vm.bitmaps("fmt-d0") == []


async def test_a_cancelled_backup_leaves_nothing(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        await bench.backup(vm)
        before = await vm.bitmaps("fmt-d0")
        with trio.CancelScope() as scope:
            async with bench.view(vm) as view:
                await content(view)
                scope.cancel()
                await content(view)
        assert scope.cancelled_caught
        assert await vm.bitmaps("fmt-d0") == before


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_set_up_that_ends_at_any_step_is_undone(
    qemu: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    step = Fleecing._step
    async with vm_with(qemu, tmpfs, VmDisk(tmpfs / "q", "d0", format="qcow2"), VmDisk(tmpfs / "r", "d1")) as (
        vm,
        bench,
    ):
        await vm.qemu_io("d0", "write -P 1 0 1M")
        await bench.backup(vm)
        number = 0
        phases: list[str] = []
        while not phases or phases[-1] != "read":
            await vm.qemu_io("d0", f"write -P {number + 2} {number}M 1M")
            before = await vm.bitmaps("fmt-d0"), await vm.bitmaps("fmt-d1")
            with trio.CancelScope() as scope:
                seen: list[str] = []

                async def stop(
                    self: Fleecing, phase: str, seen: list[str] = seen, scope: Any = scope, **more: Any
                ) -> None:
                    await step(self, phase, **more)
                    seen.append(phase)
                    if len(seen) == len(phases) + 1 and phase != "undo":
                        if not cancelled:
                            raise Failure(phase)
                        scope.cancel()

                monkeypatch.setattr(Fleecing, "_step", stop)
                with pytest.raises((Failure, trio.Cancelled)):
                    async with bench.view(vm):
                        await trio.sleep_forever()
                phases.append(seen[len(phases)])
                await trio.lowlevel.checkpoint_if_cancelled()
            assert scope.cancelled_caught == cancelled
            assert (await vm.bitmaps("fmt-d0"), await vm.bitmaps("fmt-d1")) == before, phases[-1]
            number += 1
        assert len(phases) == 12
        monkeypatch.setattr(Fleecing, "_step", step)
        reads = await bench.backup(vm)
        assert reads[D0].mode == "incremental"
        assert [reads[D0].image[at * MIB] for at in range(number)] == [at + 2 for at in range(number)]


async def test_a_run_folder_that_is_full_at_the_end_does_not_keep_the_guest_behind_the_filters(
    qemu: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_run: Run, _text: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with vm_with(qemu, tmpfs) as (vm, bench), bench.view(vm) as view:
        monkeypatch.setattr(Run, "_save", full)
        assert await content(view) == b"\x05" * 24 * MIB


async def test_slow_switches_of_devices_are_waited_for(
    qemu: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qom_set = Qmp.qom_set

    async def slow(*arguments: Any) -> None:
        await trio.sleep(0.3)
        await qom_set(*arguments)

    disks = [VmDisk(tmpfs / f"d{number}", f"d{number}") for number in range(3)]
    async with vm_with(qemu, tmpfs, *disks) as (vm, bench), bench.view(vm):
        monkeypatch.setattr(leftovers, "_UNPLUG_TIMEOUT_S", 0.1)
        monkeypatch.setattr(Qmp, "qom_set", slow)


async def test_files_that_cannot_be_removed_are_said(
    qemu: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_run: Run) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with vm_with(qemu, tmpfs) as (vm, bench):
        with pytest.raises(FleecingError, match="could not remove all files of the run: Input/output error"):
            async with bench.view(vm) as view:
                monkeypatch.setattr(Run, "forget", broken)
                view.commit()
        monkeypatch.undo()
        await bench.backup(vm)


async def test_what_could_not_be_undone_is_said_to_one_who_cancelled_too(
    qemu: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_qmp: Qmp, undone: leftovers.Undone, _below: object) -> None:
        undone.problems.append("could not do it")

    async with vm_with(qemu, tmpfs) as (vm, bench):
        with trio.CancelScope() as scope, pytest.raises(FleecingError, match=r"frozen view down .*could not do it"):
            async with bench.view(vm):
                monkeypatch.setattr(leftovers, "_remove_nodes", fail)
                scope.cancel()
                await trio.sleep_forever()
        monkeypatch.undo()
        await bench.backup(vm)


async def test_warnings_are_told_of_a_set_up_that_fails_too(qemu: QemuBinary, tmpfs: Path) -> None:
    async def fail(_qmp: Qmp) -> None:
        raise Failure("at the instant")

    warnings: list[str] = []
    async with vm_with(qemu, tmpfs) as (vm, bench):
        with pytest.raises(Failure):
            async with bench.view(vm, guest_agent=tmpfs / "no-agent", at_instant=fail, on_warning=warnings.append):
                pass
    (warning,) = warnings
    assert "no-agent" in warning


# -- the scratch folder -----------------------------------------------------------------------------------------------


@contextmanager
def small_file_system(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def freezable_file_system(folder: Path) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A mounted ext4, and functions after which every write to it hangs or goes on."""
    folder.mkdir()
    image = folder.with_suffix(".ext4")
    with image.open("wb") as file:
        file.truncate(64 * MIB)

    def run(*command: str | Path) -> bool:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0

    if (
        os.geteuid() != 0
        or not run("mke2fs", "-q", "-F", "-t", "ext4", image)
        or not run("mount", "-o", "loop", image, folder)
    ):
        pytest.skip("mounting a loop device is not allowed here")
    frozen = False

    def freeze() -> None:
        nonlocal frozen
        assert run("fsfreeze", "-f", folder)
        frozen = True

    def thaw() -> None:
        nonlocal frozen
        frozen = not run("fsfreeze", "-u", folder)

    try:
        yield folder, freeze, thaw
    finally:
        if frozen:
            thaw()
        run("umount", folder)


async def test_a_full_fleecing_image_breaks_the_backup_and_not_the_guest(qemu: QemuBinary, tmpfs: Path) -> None:
    with small_file_system(tmpfs / "small", 4 * MIB) as folder:
        async with vm_with(qemu, tmpfs) as (vm, bench):
            scratch = Scratch(folder, min_free=0, min_free_fraction=0)
            with pytest.raises(SnapshotBrokenError, match=r"drive-d0\.img: its frozen view broke: the fleecing image"):
                async with bench.view(vm, scratch=scratch) as view:
                    await vm.qemu_io("d0", "write -P 1 0 16M")
                    await content(view)
            await vm.qemu_io("d0", "read -P 1 0 16M")
            assert (await vm.execute("query-status"))["status"] == "prelaunch"
            assert list(folder.iterdir()) == []
            # The whole 16 MiB come with the next backup.
            reads = await bench.backup(vm)
            assert reads[D0].image == b"\x01" * 16 * MIB + b"\x05" * 8 * MIB


async def test_a_hanging_scratch_folder_costs_the_guest_one_timeout_and_no_more(qemu: QemuBinary, tmpfs: Path) -> None:
    with freezable_file_system(tmpfs / "hanging") as (folder, freeze, thaw):
        async with vm_with(qemu, tmpfs) as (vm, bench), trio.open_nursery() as nursery:

            async def write(offset: int) -> float:
                started = trio.current_time()
                await vm.qemu_io("d0", f"write -P 1 {offset}M 1M")
                return trio.current_time() - started

            async def go_on() -> None:
                # The end of the backup is waiting meanwhile: it must not take QEMU with it.
                for offset in range(8, 16):
                    await trio.sleep(0.3)
                    assert await write(offset) < 3
                thaw()

            with pytest.raises(SnapshotBrokenError, match="too slow"):
                async with bench.view(vm, scratch=Scratch(folder / "s", min_free=0), cbw_timeout_s=3) as view:
                    freeze()
                    assert 2 < await write(0) < 30
                    assert await write(4) < 3
                    nursery.start_soon(go_on)
                    await content(view)
            assert list((folder / "s").iterdir()) == []


async def test_a_backup_stops_when_the_scratch_folder_runs_out_of_space(qemu: QemuBinary, tmpfs: Path) -> None:
    with small_file_system(tmpfs / "small", 32 * MIB) as folder:
        async with vm_with(qemu, tmpfs) as (vm, bench):
            scratch = Scratch(folder, min_free=24 * MIB, min_free_fraction=0, interval_s=0.05)
            with pytest.raises(FleecingError, match=r"scratch folder .*are free, 24.0 MiB must stay free.*guest"):
                async with bench.view(vm, scratch=scratch):
                    await vm.qemu_io("d0", "write -P 1 0 16M")
                    await trio.sleep(20)
            await vm.qemu_io("d0", "read -P 1 0 16M")
            assert list(folder.iterdir()) == []


async def test_too_little_space_is_said_before_anything_is_changed(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        with pytest.raises(FleecingError, match="must stay free"):
            async with bench.view(vm, scratch=bench.scratch(min_free=1 << 60)):
                pass


async def test_a_scratch_folder_on_the_file_system_of_a_disk_is_refused(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        with pytest.raises(FleecingError, match=r"on the file system of the disk .*d0\.raw"):
            async with bench.view(vm, scratch=bench.scratch(allow_shared=False)):
                pass


async def test_nor_may_it_be_where_a_disk_is_that_qemu_was_given_as_an_open_file(
    qemu: QemuBinary, tmpfs: Path, tmp_path: Path
) -> None:
    scratch = Scratch(tmp_path / "scratch", min_free=0, min_free_fraction=0)
    if tmpfs.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is only one file system")
    async with RunningQemu.start(qemu, []) as vm, connect(vm.qmp) as qmp:
        for node, folder in (("far", tmpfs), ("near", tmp_path)):
            (folder / "d0.raw").write_bytes(bytes(MIB))
            with (folder / "d0.raw").open("r+b") as disk:
                name = await qmp.add_fd(disk.fileno())
            await vm.execute("blockdev-add", {"driver": "file", "node-name": node, "filename": name})
            nodes = (await block_nodes(qmp)).values()
            if node == "far":
                await scratch.prepare(qmp, nodes)
            else:
                with pytest.raises(FleecingError, match=f"on the file system of the disk {name}"):
                    await scratch.prepare(qmp, nodes)


async def test_space_comes_back_while_reading(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench), bench.view(vm) as view:
        await vm.qemu_io("d0", "write -P 1 0 24M")
        (image,) = (bench.folder / "scratch").iterdir()
        assert image.stat().st_blocks * 512 >= 24 * MIB
        await content(view)
        assert image.stat().st_blocks * 512 < MIB
        await vm.qemu_io("d0", "write -P 2 0 24M")
        assert image.stat().st_blocks * 512 < MIB


async def test_a_qemu_of_another_user_gets_open_files(qemu: QemuBinary, tmpfs: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can start a QEMU that becomes another user")
    another_user = ["-runas", "nobody"] if qemu.version < (9, 1, 0) else ["-run-with", "user=nobody"]
    async with vm_with(qemu, tmpfs, extra=another_user) as (vm, bench):
        # Sets of descriptors are only tidied up while the VM runs.
        await vm.execute("cont")
        async with bench.view(vm) as view:
            await vm.qemu_io("d0", "write -P 1 0 24M")
            assert await content(view) == b"\x05" * 24 * MIB
        assert view.warnings == []
        assert (await bench.backup(vm))[D0].image == b"\x01" * 24 * MIB
        await vm.execute("stop")


# -- what others do meanwhile -----------------------------------------------------------------------------------------


async def test_a_disk_cannot_be_resized_during_a_backup_but_right_after_it(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        await bench.backup(vm)
        await vm.qemu_io("d0", "write -P 1 0 1M")

        async def resize() -> None:
            # A smaller disk under the frozen view would abort QEMU, and any new size while the map is exported.
            for node in ("fleece-p0", "fleece-c0", "fmt-d0"):
                for size in (12 * MIB, 40 * MIB):
                    with pytest.raises(QmpRefused, match=r"Cannot resize fixed-size|Permission conflict"):
                        await vm.execute("block_resize", {"node-name": node, "size": size})

        assert (await bench.backup(vm, between=resize))[D0].image == b"\x01" * MIB + b"\x05" * 23 * MIB
        await vm.execute("block_resize", {"node-name": "fmt-d0", "size": 40 * MIB})
        await vm.qemu_io("d0", "write -P 2 30M 1M")
        reads = await bench.backup(vm)
        assert reads[D0].reason == "size changed from 24.0 MiB to 40.0 MiB"
        assert reads[D0].image == b"\x01" * MIB + b"\x05" * 23 * MIB + bytes(6 * MIB) + b"\x02" * MIB + bytes(9 * MIB)


async def test_an_unplugged_disk_stays_readable(qemu: QemuBinary, tmpfs: Path) -> None:
    (tmpfs / "w" / "scratch").mkdir(parents=True)
    bench = Bench(tmpfs / "w")
    disk = VmDisk(tmpfs / "d0", "d0", bus="virtio-scsi")
    disk.path.write_bytes(b"\x05" * 8 * MIB)
    async with RunningQemu.start(qemu, [disk]) as vm:
        async with bench.view(vm) as view:
            await vm.execute("device_del", {"id": "d0"})
            assert await content(view) == b"\x05" * 8 * MIB
            view.commit()
        assert view.warnings == []
        assert await vm.nodes() == {"fmt-d0"}
        await vm.execute("blockdev-del", {"node-name": "fmt-d0"})


async def test_an_overlay_put_on_top_is_kept_and_the_next_backup_says_why_it_is_full(
    qemu: QemuBinary, tmpfs: Path
) -> None:
    disk = VmDisk(tmpfs / "d0", "d0", format="qcow2")
    await make_qcow2(qemu, disk.path, 8 * MIB)
    await make_qcow2(qemu, tmpfs / "over", 8 * MIB)
    (tmpfs / "w").mkdir()
    bench = Bench(tmpfs / "w")
    async with RunningQemu.start(qemu, [disk]) as vm:
        await vm.qemu_io("d0", "write -P 1 0 1M")
        await bench.backup(vm)
        async with bench.view(vm) as view:
            file = {"driver": "file", "filename": str(tmpfs / "over")}
            await vm.execute("blockdev-add", {"driver": "qcow2", "node-name": "over", "file": file, "backing": None})
            await vm.execute("blockdev-snapshot", {"node": "fleece-p0", "overlay": "over"})
            await vm.qemu_io("d0", "write -P 2 4M 1M")
            assert await content(view, bench) == b"\x01" * MIB + bytes(7 * MIB)
        (warning,) = view.warnings
        assert "fleece-p0 stays above fmt-d0, where it does no harm" in warning
        assert (await vm.block_info("d0"))["inserted"]["node-name"] == "over"
        reads = await bench.backup(vm)
        assert reads[D0].reason == "the disk has a new top image since the previous backup (external snapshot)"
        assert reads[D0].image == b"\x01" * MIB + bytes(3 * MIB) + b"\x02" * MIB + bytes(3 * MIB)
        assert (await bench.backup(vm))[D0].mode == "incremental"
        assert await vm.nodes() == {"fmt-d0", "over", "fleece-p0"}


async def test_an_overlay_put_below_stays_too(qemu: QemuBinary, tmpfs: Path) -> None:
    disk = VmDisk(tmpfs / "d0", "d0", format="qcow2")
    await make_qcow2(qemu, disk.path, 8 * MIB)
    await make_qcow2(qemu, tmpfs / "over", 8 * MIB)
    (tmpfs / "w").mkdir()
    bench = Bench(tmpfs / "w")
    async with RunningQemu.start(qemu, [disk]) as vm:
        await vm.qemu_io("d0", "write -P 1 0 1M")
        async with bench.view(vm) as view:
            file = {"driver": "file", "filename": str(tmpfs / "over")}
            await vm.execute("blockdev-add", {"driver": "qcow2", "node-name": "over", "file": file, "backing": None})
            with suppress(QmpRefused):  # either is fine, but no write may be lost
                await vm.execute("blockdev-snapshot", {"node": "fmt-d0", "overlay": "over"})
            await vm.qemu_io("d0", "write -P 2 4M 1M")
            assert await content(view) == b"\x01" * MIB + bytes(7 * MIB)
        await vm.qemu_io("d0", "read -P 1 0 1M")
        await vm.qemu_io("d0", "read -P 2 4M 1M")
        reads = await bench.backup(vm)
        assert reads[D0].image == b"\x01" * MIB + bytes(3 * MIB) + b"\x02" * MIB + bytes(3 * MIB)


async def test_a_killed_qemu_ends_the_backup_with_an_error_and_leaves_no_file(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        with pytest.raises(FleecingError, match="QEMU has ended"):
            async with bench.view(vm) as view:
                await vm.kill()
                await content(view)


async def test_a_killed_qemu_during_the_set_up_leaves_no_file(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):

        async def kill(_qmp: Any) -> None:
            await vm.kill()

        with pytest.raises(Exception, match="connection is lost"):
            async with bench.view(vm, at_instant=kill):
                pass


async def test_a_reader_that_hangs_at_the_end_does_not_hold_up_the_guest(
    qemu: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "_EXPORTS_TIMEOUT_S", 0.2)
    async with vm_with(qemu, tmpfs, size=32 * MIB) as (vm, bench):
        await bench.backup(vm)
        async with hanging_reader(vm, bench):
            await vm.qemu_io("d0", "write -P 9 4M 1M")
        read = (await bench.backup(vm))[D0]
        assert (read.mode, read.read) == ("incremental", 4 * MIB)
        assert read.image == b"\x05" * 4 * MIB + b"\x09" * MIB + b"\x05" * 27 * MIB


async def test_two_runs_exclude_each_other(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        async with bench.view(vm) as view:
            with pytest.raises(VmStateError, match=r"another backup or clean-up of it runs \(process \d+\)"):
                async with bench.view(vm, target="11111111"):
                    pass
            assert await content(view) == b"\x05" * 24 * MIB
        async with bench.view(vm, target="11111111"):
            pass


async def test_another_client_at_the_qmp_socket_delays_the_end_only(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench), trio.open_nursery() as nursery:

        async def hold(client: OwnQmp) -> None:
            await trio.sleep(0.5)
            await client.aclose()

        async with bench.view(vm):
            client = await OwnQmp.connect(vm.qmp)
            nursery.start_soon(hold, client)


async def test_somebody_elses_nbd_server_is_not_touched(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        address = {"type": "unix", "data": {"path": str(vm.folder / "theirs")}}
        await vm.execute("nbd-server-start", {"addr": address})
        with pytest.raises(FleecingError, match="it is running already, for somebody else"):
            async with bench.view(vm):
                pass
        assert (vm.folder / "theirs").is_socket()
        await vm.execute("nbd-server-stop")
        await bench.backup(vm)


async def test_a_block_job_on_a_disk_is_waited_for_by_nobody(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs) as (vm, bench):
        await vm.execute("blockdev-add", {"driver": "null-co", "node-name": "sink", "size": 24 * MIB})
        job = {"job-id": "mirror", "device": "fmt-d0", "target": "sink", "sync": "full", "speed": 1}
        await vm.execute("blockdev-backup", job)
        with pytest.raises(VmStateError, match="the block job 'mirror'"):
            async with bench.view(vm):
                pass
        await vm.execute("block-job-cancel", {"device": "mirror", "force": True})
        await trio.sleep(0.5)
        await vm.execute("blockdev-del", {"node-name": "sink"})


async def test_io_threads_are_backed_up_where_qemu_can_bear_it(qemu: QemuBinary, tmpfs: Path) -> None:
    disk = VmDisk(tmpfs / "d0", "d0", device_options="iothread=io0")
    async with vm_with(qemu, tmpfs, disk, extra=["-object", "iothread,id=io0"]) as (vm, bench):
        if qemu.version < (9, 1, 0):
            with pytest.raises(VmUnsupportedError, match="I/O threads"):
                async with bench.view(vm):
                    pass
        else:
            for number in range(3):
                await vm.qemu_io("d0", f"write -P {number + 1} {4 * number}M 1M")
                reads = await bench.backup(vm)
            assert reads[D0].mode == "incremental"
            assert reads[D0].read == 4 * MIB


async def test_what_another_machine_writes_to_a_shared_disk_is_not_missed(qemu: QemuBinary, tmpfs: Path) -> None:
    disks = [VmDisk(tmpfs / "d0", "d0", device_options="share-rw=on"), VmDisk(tmpfs / "d1", "d1")]
    async with vm_with(qemu, tmpfs, *disks, size=8 * MIB) as (vm, bench):
        await bench.backup(vm)
        with (tmpfs / "d0").open("r+b") as image:  # no bitmap of this QEMU sees that
            image.seek(4 * MIB)
            image.write(b"\x09" * MIB)
        reads = await bench.backup(vm)
        assert reads[D0].image == b"\x05" * 4 * MIB + b"\x09" * MIB + b"\x05" * 3 * MIB
        assert reads[D0].reason == "the disk is shareable: what other machines write to it is in no dirty bitmap"
        assert reads["drive-d1.img"].mode == "incremental"


async def test_a_vm_without_disks_is_refused(qemu: QemuBinary, tmpfs: Path) -> None:
    async with vm_with(qemu, tmpfs, VmDisk(tmpfs / "ro", "ro", read_only=True)) as (vm, bench):
        with pytest.raises(FleecingError, match="it has no disk to be backed up"):
            async with bench.view(vm):
                pass


async def test_a_storage_fault_is_told_from_a_broken_view(qemu: QemuBinary, tmpfs: Path) -> None:
    fault = {"event": "none", "iotype": "read", "errno": 5, "sector": 24576, "once": False}
    file = {"driver": "file", "filename": str(tmpfs / "d0")}
    faulty = {"file": {"driver": "blkdebug", "image": file, "inject-error": [fault]}}
    disk = VmDisk(tmpfs / "d0", "d0", blockdev_options=faulty)
    async with vm_with(qemu, tmpfs, disk) as (vm, bench):
        with pytest.raises(SourceError, match="Input/output error; look at the storage of the VM's disk") as caught:
            async with bench.view(vm) as view:
                await content(view)
        assert not isinstance(caught.value, SnapshotBrokenError)
