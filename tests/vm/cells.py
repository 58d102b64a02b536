"""One cell of the matrix of situations: a VM on small disks without a guest, a target, and what must be in a backup.

    @matrix
    async def test_something(qemu: QemuBinary, format: ImageFormat, tmpfs: Path) -> None:
        cell = Cell(qemu, format, tmpfs)
        async with cell.vm(await cell.disk("d0")) as vm:
            await cell.write(vm, "d0", 1, 0, MIB)
            await cell.backup(vm, d0="first backup")
            await cell.backup(vm, d0=INCREMENTAL)

The test plays the guest through QEMU's monitor; every byte of every backup is compared with a copy of the instant.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import pytest
import trio

from tests.hypervisor.fleecing_bench import MIB, Bench, Read, make_qcow2, read_disk
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import PATIENCE_S, RunningQemu, VmDisk

ImageFormat = Literal["raw", "qcow2"]
#: Bytes of a disk, unless a test says otherwise: six chunks.
SIZE: Final = 24 * MIB
CHUNK: Final = 4 * MIB
#: Instead of a reason.
INCREMENTAL: Final = ""
ANY: Final = "*"

#: The distribution's QEMU is 7.2 or newer, that of its backports 10.0 or newer.
_CELLS: Final = [
    ("distribution", "raw"),
    ("backports", "qcow2"),
    ("distribution", "qcow2"),
    ("backports", "raw"),
]


_LONG: Final = [pytest.mark.qemu, pytest.mark.long]


def matrix_of(*formats: ImageFormat, quick: int = 0) -> pytest.MarkDecorator:
    """Both QEMUs and the `formats`; cell `quick` of those belongs to the quick tests, the others to the long ones."""
    cells = [cell for cell in _CELLS if cell[1] in formats]
    return pytest.mark.parametrize(
        ("qemu", "format"),
        [
            pytest.param(binary, name, marks=[pytest.mark.qemu] if number == quick else _LONG)
            for number, (binary, name) in enumerate(cells)
        ],
        indirect=["qemu"],
    )


@dataclass
class Cell:
    """Disks, what they contain, and the backups of them."""

    qemu: QemuBinary
    format: ImageFormat
    folder: Path
    now: dict[str, bytearray] = field(default_factory=dict)  #: content of each disk, by the device's id
    bench: Bench = field(init=False)

    def __post_init__(self) -> None:
        self.bench = self.another_target()

    def another_target(self) -> Bench:
        """A target with snapshots of its own."""
        folder = self.folder / f"w{len(list(self.folder.glob('w*')))}"
        folder.mkdir()
        return Bench(folder)

    async def disk(self, name: str, size: int = SIZE, **options: Any) -> VmDisk:
        """An empty disk; on virtio-scsi, which takes disks away without the guest's help."""
        path = self.folder / name
        if self.format == "qcow2":
            await make_qcow2(self.qemu, path, size)
        else:
            with path.open("wb") as file:
                file.truncate(size)
        self.now[name] = bytearray(size)
        return VmDisk(path, name, format=self.format, **{"bus": "virtio-scsi", **options})

    @asynccontextmanager
    async def vm(self, *disks: VmDisk, extra: Sequence[str] = (), memory_mib: int = 64) -> AsyncIterator[RunningQemu]:
        """A QEMU with `disks`, without a guest."""
        async with RunningQemu.start(self.qemu, disks, memory_mib=memory_mib, extra=extra) as vm:
            yield vm

    async def write(self, vm: RunningQemu, disk: str, pattern: int, offset: int, length: int = MIB) -> None:
        """Fill a range with a byte."""
        await vm.qemu_io(disk, f"write -P {pattern} {offset} {length}")
        self.now[disk][offset : offset + length] = bytes([pattern]) * length

    async def discard(self, vm: RunningQemu, disk: str, offset: int, length: int) -> None:
        """Discard a range, which reads as zeros then."""
        await vm.qemu_io(disk, f"discard {offset} {length}")
        self.now[disk][offset : offset + length] = bytes(length)

    async def resize(self, vm: RunningQemu, disk: str, size: int) -> None:
        """`block_resize` of the disk's root."""
        root = (await vm.block_info(disk))["inserted"]["node-name"]
        await vm.execute("block_resize", {"node-name": root, "size": size})
        image = self.now[disk]
        self.now[disk] = image[:size] + bytes(max(0, size - len(image)))

    def copy(self) -> dict[str, bytes]:
        """What a backup of this moment must hold, by archive."""
        return {f"drive-{name}.img": bytes(image) for name, image in self.now.items()}

    async def backup(
        self,
        vm: RunningQemu,
        *,
        bench: Bench | None = None,
        during: Callable[[], Any] | None = None,
        options: dict[str, Any] | None = None,
        **reasons: str,
    ) -> dict[str, Read]:
        """A backup that must be of the disks `reasons` names, each full for that reason (or `ANY`) or `INCREMENTAL`.

        `during` is awaited when the view is there and nothing is read yet; what it changes is not in the backup.
        """
        bench = bench or self.bench
        number = bench.store.next_id()
        truth = self.copy()
        async with bench.view(vm, number, **(options or {})) as view:
            plans = {source.name: source.plan.reason for source in view.sources}
            wanted = {f"drive-{name}.img": reason for name, reason in reasons.items()}
            assert plans == {name: plans.get(name) if reason == ANY else reason for name, reason in wanted.items()}
            if during is not None:
                await during()
            old = bench.store.images
            reads = {source.name: await read_disk(source, old.get(source.name)) for source in view.sources}
            for name, read in reads.items():
                assert read.image == truth[name], f"{name}: not what was there at the instant"
            bench.store.images.update({name: read.image for name, read in reads.items()})
            bench.store.finished.add(number)
            bench.store.base = number
            view.commit()
        bench.warnings = view.warnings
        return {_short(name): read for name, read in reads.items()}


def _short(archive: str) -> str:
    return archive.removeprefix("drive-").removesuffix(".img")


async def job_done(vm: RunningQemu, name: str) -> str:
    """Wait for the end of the job `name`, completing it when it is ready; its error, empty if it has none."""
    with trio.fail_after(PATIENCE_S):
        while True:
            job = next((job for job in await vm.execute("query-jobs") if job["id"] == name), None)
            if job is None:
                return ""
            if job["status"] == "ready":
                await vm.execute("job-complete", {"id": name})
            if job["status"] == "concluded":
                await vm.execute("job-dismiss", {"id": name})
                return str(job.get("error", ""))
            await trio.sleep(0.02)


async def overlay(vm: RunningQemu, disk: VmDisk, name: str) -> None:
    """An external snapshot: the image `name` on top of the disk's root."""
    root = (await vm.block_info(disk.id))["inserted"]["node-name"]
    arguments = {"node-name": root, "snapshot-file": str(disk.path.with_name(name)), "format": "qcow2"}
    await vm.execute("blockdev-snapshot-sync", {**arguments, "snapshot-node-name": name})


async def plug(vm: RunningQemu, disk: VmDisk) -> None:
    """Hot-plug `disk`."""
    vm.disks = [*(known for known in vm.disks if known.id != disk.id), disk]
    await vm.execute("blockdev-add", disk.blockdev())
    await plug_device(vm, disk)


async def plug_device(vm: RunningQemu, disk: VmDisk) -> None:
    """Hot-plug the device of `disk`, whose block node is there."""
    await vm.execute("device_add", {"driver": "scsi-hd", "bus": "scsi0.0", "drive": disk.node, "id": disk.id})


async def unplug_device(vm: RunningQemu, disk: VmDisk) -> None:
    """Take the device of `disk` away, and wait until it is gone."""
    await vm.execute("device_del", {"id": disk.id})
    with trio.fail_after(PATIENCE_S):
        while any(disk.id in entry.get("qdev", "").split("/") for entry in await vm.execute("query-block")):  # noqa: ASYNC110
            await trio.sleep(0.02)


async def unplug(vm: RunningQemu, disk: VmDisk) -> None:
    """Take `disk` away with its block node."""
    await unplug_device(vm, disk)
    await vm.execute("blockdev-del", {"node-name": disk.node})
