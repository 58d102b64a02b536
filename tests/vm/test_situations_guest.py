"""Situations in which a real guest has a part: it trims, gives a disk back, or is paused while it writes.

docs/hypervisor.md, "Situations"; long ones, since each boots a guest for every cell of the matrix.
"""

from pathlib import Path

import pytest

from tests.hypervisor.fleecing_bench import MIB
from tests.support.guest import GuestControl, SmallGuest
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu
from tests.vm.cells import CHUNK, INCREMENTAL, SIZE, Cell, ImageFormat, matrix_of
from tests.vm.lab import Lab
from tests.vm.test_point_in_time import take_backups

pytestmark = [pytest.mark.guest, pytest.mark.long, pytest.mark.timeout(900)]


def guest_of(vm: RunningQemu) -> GuestControl:
    """The guest that runs in `vm`."""
    assert vm.guest is not None
    return vm.guest


async def fill(cell: Cell, vm: RunningQemu, disk: str, device: str, pattern: int, offset: int, length: int) -> None:
    """The guest fills a range, of whole MiB, with a byte."""
    assert offset % MIB == length % MIB == 0
    await guest_of(vm).check(
        f"tr '\\000' '\\{pattern:03o}' </dev/zero | dd of={device} bs=1M seek={offset // MIB} count={length // MIB} "
        "iflag=fullblock oflag=direct conv=notrunc 2>/dev/null"
    )
    cell.now[disk][offset : offset + length] = bytes([pattern]) * length


@matrix_of("raw", "qcow2")
async def test_a_guest_that_trims_during_a_backup_loses_nothing_of_the_instant(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path, guest: SmallGuest
) -> None:
    cell = Cell(qemu, format, tmpfs)
    disk = await cell.disk("d0", bus="virtio-blk")
    async with RunningQemu.start(qemu, [disk], guest=guest, lifetime_s=600) as vm:
        await fill(cell, vm, "d0", "/dev/vda", 0x11, 0, 20 * MIB)
        await cell.backup(vm, d0="first backup")
        await guest_of(vm).check(f"blkdiscard -o 0 -l {8 * MIB} /dev/vda")
        cell.now["d0"][: 8 * MIB] = bytes(8 * MIB)

        async def trim_all() -> None:
            await guest_of(vm).check("blkdiscard /dev/vda")
            used = [path.stat().st_blocks for path in (cell.bench.folder / "scratch").iterdir()]
            assert used == [0]
            await fill(cell, vm, "d0", "/dev/vda", 0x22, 21 * MIB, MIB)

        await cell.backup(vm, d0=INCREMENTAL, during=trim_all)
        assert (await cell.backup(vm, d0=INCREMENTAL))["d0"].read == CHUNK
        await guest_of(vm).check("blkdiscard /dev/vda")
        cell.now["d0"] = bytearray(SIZE)
        await cell.backup(vm, d0=INCREMENTAL)


@matrix_of("raw", "qcow2")
async def test_a_disk_that_the_guest_gives_back_during_a_backup_is_whole_in_it(
    qemu: QemuBinary, format: ImageFormat, tmpfs: Path, guest: SmallGuest
) -> None:
    cell = Cell(qemu, format, tmpfs)
    first = await cell.disk("d0", bus="virtio-blk")
    second = await cell.disk("d1", bus="virtio-blk", device_options="bus=port0")
    extra = ["-device", "pcie-root-port,id=port0,slot=1"]
    async with RunningQemu.start(qemu, [first, second], guest=guest, extra=extra, lifetime_s=600) as vm:
        await fill(cell, vm, "d1", "/dev/vdb", 0x11, 0, 10 * MIB)
        await cell.backup(vm, d0="first backup", d1="first backup")
        await fill(cell, vm, "d1", "/dev/vdb", 0x22, 5 * MIB, MIB)

        async def leave() -> None:
            await vm.execute("device_del", {"id": "d1"})
            await guest_of(vm).check("while [ -e /dev/vdb ]; do sleep 0.1; done")
            await fill(cell, vm, "d0", "/dev/vda", 0x33, 0, MIB)

        await cell.backup(vm, d0=INCREMENTAL, d1=INCREMENTAL, during=leave)
        assert cell.bench.warnings == []
        assert (await cell.backup(vm, d0=INCREMENTAL))["d0"].read == CHUNK


@pytest.mark.qemu
async def test_a_guest_that_is_paused_for_the_instant_writes_on_as_if_nothing_had_happened(
    qemu: QemuBinary, guest: SmallGuest, lab: Lab
) -> None:
    await take_backups(qemu, guest, lab, 4, more=("--pause", "always"))
