"""The matrix of situations, disks: each gives a correct backup, full with its reason or incremental.

docs/hypervisor.md, "Situations". The quick tests take one cell of each.
"""

from pathlib import Path

import pytest

from hypervisor.size_marks import CUT, MISSING, mark_name
from hypervisor.vm import BitmapMode, cleanup
from tests.hypervisor.fleecing_bench import MIB, TARGET
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import QmpRefused, RunningQemu
from tests.vm.cells import (
    ANY,
    CHUNK,
    INCREMENTAL,
    SIZE,
    Cell,
    ImageFormat,
    job_done,
    matrix_of,
    overlay,
    plug,
    plug_device,
    unplug,
    unplug_device,
)

TOP_IMAGE = "the disk has a new top image since the previous backup (external snapshot)"
ANOTHER_IMAGE = "the disk has another image since the previous backup (mirrored or streamed)"
PLUGGED = "the disk was plugged in again, or has another image, since the previous backup"
NOT_THERE = "disk is not in the previous snapshot"
SNAPSHOTS = "the disk has internal snapshots now, which a dirty bitmap in the image would keep from being loaded"
NEWER = "a newer snapshot was made without the dirty bitmap"


@matrix_of("raw", "qcow2", quick=1)
async def test_an_external_snapshot_gives_a_full_read_and_its_commit_none(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    disk = await cell.disk("d0")
    async with cell.vm(disk) as vm:
        await cell.write(vm, "d0", 1, 0, 10 * MIB)
        await cell.backup(vm, d0="first backup")
        await cell.write(vm, "d0", 2, MIB)
        await overlay(vm, disk, "top")
        await cell.write(vm, "d0", 3, 9 * MIB)
        await vm.execute("block-commit", {"job-id": "commit", "device": "top"})
        assert await job_done(vm, "commit") == ""
        # Snapshot and commit between two backups: what is committed passes the bitmap.
        assert (await cell.backup(vm, d0=INCREMENTAL))["d0"].read == 2 * CHUNK
        await overlay(vm, disk, "top2")
        await cell.write(vm, "d0", 4, 13 * MIB)
        await cell.backup(vm, d0=TOP_IMAGE)
        await cell.write(vm, "d0", 5, 17 * MIB)
        assert (await cell.backup(vm, d0=INCREMENTAL))["d0"].read == CHUNK
        await vm.execute("block-commit", {"job-id": "commit", "device": "top2"})
        assert await job_done(vm, "commit") == ""
        await cell.backup(vm, d0=NEWER)
        await cell.write(vm, "d0", 6, 5 * MIB)
        await cell.backup(vm, d0=INCREMENTAL)


@matrix_of("raw", "qcow2")
async def test_a_stream_into_the_top_image_leaves_its_bitmap_right(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    disk = await cell.disk("d0")
    async with cell.vm(disk) as vm:
        await cell.write(vm, "d0", 1, 0, 10 * MIB)
        await overlay(vm, disk, "top")
        await cell.write(vm, "d0", 2, 5 * MIB)
        await cell.backup(vm, d0="first backup")
        await cell.write(vm, "d0", 3, 17 * MIB)
        await vm.execute("block-stream", {"job-id": "stream", "device": "top"})
        assert await job_done(vm, "stream") == ""
        await cell.write(vm, "d0", 4, 21 * MIB)
        await cell.backup(vm, d0=INCREMENTAL)


@matrix_of("raw", "qcow2")
async def test_a_disk_that_was_mirrored_or_streamed_to_another_image_is_read_in_full(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    disk, copy = await cell.disk("d0"), await cell.disk("copy")
    async with cell.vm(disk) as vm:
        await cell.write(vm, "d0", 1, 0, 10 * MIB)
        await cell.backup(vm, d0="first backup")
        await vm.execute("blockdev-add", copy.blockdev())
        mirror = {"job-id": "mirror", "device": disk.node, "target": copy.node, "sync": "full"}
        await vm.execute("blockdev-mirror", mirror)
        assert await job_done(vm, "mirror") == ""
        await cell.write(vm, "d0", 2, 5 * MIB)
        await cell.backup(vm, d0=ANOTHER_IMAGE)
        await cell.write(vm, "d0", 3, 17 * MIB)
        await cell.backup(vm, d0=INCREMENTAL)
        await overlay(vm, disk, "top")
        await vm.execute("block-stream", {"job-id": "stream", "device": "top"})
        assert await job_done(vm, "stream") == ""
        await cell.backup(vm, d0=ANOTHER_IMAGE)
        await cell.backup(vm, d0=INCREMENTAL)


@matrix_of("raw", "qcow2", quick=1)
async def test_an_external_snapshot_during_a_backup_does_not_change_it(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    disk = await cell.disk("d0")
    async with cell.vm(disk) as vm:
        await cell.write(vm, "d0", 1, 0, 10 * MIB)
        await cell.backup(vm, d0="first backup")
        await cell.write(vm, "d0", 2, 5 * MIB)

        async def snapshot() -> None:
            await overlay(vm, disk, "top")
            await cell.write(vm, "d0", 3, 4 * MIB)

        await cell.backup(vm, d0=INCREMENTAL, during=snapshot)
        assert "stays above fmt-d0, where it does no harm" in cell.bench.warnings[0]
        await cell.backup(vm, d0=TOP_IMAGE)


@matrix_of("raw", "qcow2", quick=1)
async def test_a_disk_of_another_size_is_read_in_full(qemu: QemuBinary, format: ImageFormat, tmpfs: Path) -> None:
    cell = Cell(qemu, format, tmpfs)
    async with cell.vm(await cell.disk("d0")) as vm:
        await cell.write(vm, "d0", 1, 0, SIZE)
        await cell.backup(vm, d0="first backup")
        await cell.resize(vm, "d0", SIZE + 5 * MIB)
        await cell.write(vm, "d0", 2, SIZE + MIB)
        await cell.backup(vm, d0="size changed from 24.0 MiB to 29.0 MiB")
        await cell.write(vm, "d0", 3, SIZE + 4 * MIB)
        assert (await cell.backup(vm, d0=INCREMENTAL))["d0"].read == MIB  # the last chunk
        await cell.resize(vm, "d0", SIZE)
        await cell.backup(vm, d0="size changed from 29.0 MiB to 24.0 MiB")
        await cell.backup(vm, d0=INCREMENTAL)


@matrix_of("raw", "qcow2")
async def test_a_disk_that_was_smaller_in_between_is_read_in_full(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    other = cell.another_target()
    async with cell.vm(await cell.disk("d0")) as vm:
        await cell.write(vm, "d0", 1, 0, SIZE)
        await cell.backup(vm, d0="first backup")
        for smaller in (SIZE - 6 * MIB, SIZE - 512):
            await cell.resize(vm, "d0", smaller)
            # Marks of another target are as old as its own bitmaps.
            await cell.backup(vm, bench=other, options={"target": "00000002"}, d0=ANY)
            await cell.resize(vm, "d0", SIZE)
            await cell.backup(vm, d0=CUT)
            await cell.write(vm, "d0", 2, 20 * MIB)
        # Larger and back again loses nothing of what was there.
        await cell.resize(vm, "d0", SIZE + MIB)
        await cell.resize(vm, "d0", SIZE)
        await cell.backup(vm, d0=INCREMENTAL)
        await vm.execute("block-dirty-bitmap-remove", {"node": "fmt-d0", "name": mark_name(TARGET)})
        await cell.backup(vm, d0=MISSING)
        await cell.backup(vm, d0=INCREMENTAL)
        done = await cleanup(vm.qmp, run_dir=cell.bench.run_dir, remove_bitmaps=True)
        assert done == ["removed 2 dirty bitmaps"]
        assert await vm.bitmaps("fmt-d0", marks=True) == []


@matrix_of("raw", "qcow2")
async def test_a_resize_during_a_backup_is_refused(qemu: QemuBinary, format: ImageFormat, tmpfs: Path) -> None:
    cell = Cell(qemu, format, tmpfs)
    async with cell.vm(await cell.disk("d0")) as vm:
        await cell.write(vm, "d0", 1, 0, 10 * MIB)

        async def resize() -> None:
            for node in ("fmt-d0", "fleece-p0"):
                for size in (SIZE - MIB, SIZE + MIB):
                    with pytest.raises(QmpRefused):
                        await vm.execute("block_resize", {"node-name": node, "size": size})

        await cell.backup(vm, d0="first backup", during=resize)
        await cell.resize(vm, "d0", SIZE + MIB)
        await cell.backup(vm, d0="size changed from 24.0 MiB to 25.0 MiB")


@matrix_of("raw", "qcow2")
async def test_disks_that_come_and_go_between_backups(qemu: QemuBinary, format: ImageFormat, tmpfs: Path) -> None:
    cell = Cell(qemu, format, tmpfs)
    first, second = await cell.disk("d0"), await cell.disk("d1")
    # What QEMU closes in order keeps its bitmap in the image, if that can hold one.
    unplugged = INCREMENTAL if format == "qcow2" else PLUGGED
    async with cell.vm(first) as vm:
        await cell.write(vm, "d0", 1, 0, 10 * MIB)
        await cell.backup(vm, d0="first backup")
        await plug(vm, second)
        await cell.write(vm, "d1", 2, 0, 10 * MIB)
        await cell.write(vm, "d0", 3, 5 * MIB)
        await cell.backup(vm, d0=INCREMENTAL, d1=NOT_THERE)
        await cell.write(vm, "d1", 4, 13 * MIB)
        await unplug(vm, second)
        await plug(vm, second)
        await cell.write(vm, "d1", 5, 17 * MIB)
        await cell.backup(vm, d0=INCREMENTAL, d1=unplugged)
        # The device alone; what is not a disk of the VM at the moment is not in its backup.
        await cell.write(vm, "d1", 6, 21 * MIB)
        await unplug_device(vm, second)
        await cell.backup(vm, d0=INCREMENTAL)
        await plug_device(vm, second)
        await cell.backup(vm, d0=INCREMENTAL, d1=NEWER)
        await cell.backup(vm, d0=INCREMENTAL, d1=INCREMENTAL)


@matrix_of("raw", "qcow2", quick=1)
async def test_disks_that_come_and_go_during_a_backup(qemu: QemuBinary, format: ImageFormat, tmpfs: Path) -> None:
    cell = Cell(qemu, format, tmpfs)
    first, second = await cell.disk("d0"), await cell.disk("d1")
    async with cell.vm(first, second) as vm:
        await cell.write(vm, "d1", 1, 0, 10 * MIB)
        await cell.backup(vm, d0="first backup", d1="first backup")
        await cell.write(vm, "d1", 2, 5 * MIB)

        async def leave() -> None:
            await unplug_device(vm, second)
            with pytest.raises(QmpRefused, match="in use"):
                await vm.execute("blockdev-del", {"node-name": second.node})

        await cell.backup(vm, d0=INCREMENTAL, d1=INCREMENTAL, during=leave)

        async def come() -> None:
            await plug_device(vm, second)
            await cell.write(vm, "d1", 3, 13 * MIB)

        await cell.backup(vm, d0=INCREMENTAL, during=come)
        assert cell.bench.warnings == []
        await cell.backup(vm, d0=INCREMENTAL, d1=NEWER)


@matrix_of("qcow2")
async def test_internal_snapshots_are_loaded_only_where_no_bitmap_would_be_wrong_then(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    disk = await cell.disk("d0")
    async with cell.vm(disk) as vm:

        async def run(command: str, tag: str) -> str:
            arguments = {"job-id": "snapshot", "tag": tag, "vmstate": disk.node, "devices": [disk.node]}
            await vm.execute(command, arguments)
            return await job_done(vm, "snapshot")

        async def no_load() -> None:
            assert "active dirty bitmaps" in await run("snapshot-load", "one")
            assert await run("snapshot-save", f"at {cell.bench.store.clock} {len(cell.bench.store.finished)}") == ""

        await cell.write(vm, "d0", 1, 0, 10 * MIB)
        assert await run("snapshot-save", "one") == ""
        saved = cell.now["d0"][:]
        await cell.backup(vm, d0="first backup")
        await cell.write(vm, "d0", 2, 5 * MIB)
        await no_load()
        await cell.backup(vm, d0=INCREMENTAL, during=no_load)
        await cleanup(vm.qmp, run_dir=cell.bench.run_dir, remove_bitmaps=True)
        # Without bitmaps it would be loaded past the filter.
        off = {"bitmap_mode": BitmapMode.NONE}
        await cell.backup(vm, d0="dirty bitmaps are switched off", options=off, during=no_load)
        assert await vm.bitmaps("fmt-d0", marks=True) == []
        assert await run("snapshot-load", "one") == ""
        cell.now["d0"] = saved
        await cell.backup(vm, d0="no dirty bitmap yet")
        await cell.write(vm, "d0", 3, 9 * MIB)
        await cell.backup(vm, d0=INCREMENTAL)


@matrix_of("qcow2")
async def test_a_disk_with_internal_snapshots_has_no_bitmap_in_its_image(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    disk = await cell.disk("d0")

    async def persistent(vm: RunningQemu) -> set[bool]:
        return {bitmap["persistent"] for bitmap in await vm.bitmaps("fmt-d0", marks=True)}

    async with cell.vm(disk) as vm:
        await cell.write(vm, "d0", 1, 0, 10 * MIB)
        await cell.backup(vm, d0="first backup")
        assert await persistent(vm) == {True}
        arguments = {"job-id": "snapshot", "tag": "one", "vmstate": disk.node, "devices": [disk.node]}
        await vm.execute("snapshot-save", arguments)
        assert await job_done(vm, "snapshot") == ""
        saved = cell.now["d0"][:]
        await cell.write(vm, "d0", 2, 5 * MIB)
        await cell.backup(vm, d0=SNAPSHOTS)
        assert await persistent(vm) == {False}
        await cell.write(vm, "d0", 3, 9 * MIB)
        await cell.backup(vm, d0=INCREMENTAL)
    # As libvirt goes back to a snapshot: in a new process, which ends if the image has a bitmap.
    async with cell.vm(disk, extra=["-loadvm", "one"]) as vm:
        cell.now["d0"] = saved
        await cell.backup(vm, d0=ANY)


@matrix_of("raw", "qcow2", quick=1)
async def test_discards_come_as_zeros_and_lose_nothing_of_the_instant(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path
) -> None:
    cell = Cell(qemu, format, tmpfs)
    async with cell.vm(await cell.disk("d0")) as vm:
        await cell.write(vm, "d0", 1, 0, 20 * MIB)
        await cell.backup(vm, d0="first backup")
        await cell.discard(vm, "d0", 0, 8 * MIB)

        async def trim_all() -> None:
            await vm.qemu_io("d0", f"discard 0 {SIZE}")
            # What was there is neither lost nor saved: discards of the guest do nothing now.
            used = [path.stat().st_blocks for path in (cell.bench.folder / "scratch").iterdir()]
            assert used == [0]

        read = (await cell.backup(vm, d0=INCREMENTAL, during=trim_all))["d0"]
        # From QEMU 8.2 on holes need not be read.
        assert (read.zeros, read.read) == ((8 * MIB, 0) if qemu.version >= (8, 2, 0) else (0, 8 * MIB))
        await cell.discard(vm, "d0", 8 * MIB, 12 * MIB)
        await cell.backup(vm, d0=INCREMENTAL)
        assert cell.bench.store.images["drive-d0.img"] == bytes(SIZE)
