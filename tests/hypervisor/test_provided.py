"""Views that somebody else has made: Proxmox VE's backup job sets up and exports, Fleece reads."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from core.errors import SourceError, UsageError
from hypervisor.errors import DiskNameError, FleecingError
from hypervisor.flavours import FlavourName
from hypervisor.provided import ProvidedDisk, provided_view
from tests.hypervisor.fleecing_bench import MIB, Bench, Read, read_disk
from tests.support.proxmox_job import TARGET_ID, BackupJob
from tests.support.proxmox_qemu import ProxmoxQemu
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk

D0, D1 = "drive-d0.img", "drive-d1.img"
SIZE = 24 * MIB


@asynccontextmanager
async def job_of(qemu: QemuBinary, folder: Path, count: int = 1) -> AsyncIterator[tuple[RunningQemu, BackupJob, Bench]]:
    disks = [VmDisk(folder / f"d{number}", f"d{number}") for number in range(count)]
    for disk in disks:
        disk.path.write_bytes(b"\x05" * SIZE)
    (folder / "w").mkdir()
    async with RunningQemu.start(qemu, disks) as vm, ProxmoxQemu.before(vm) as double:
        before = await vm.nodes()
        yield vm, BackupJob(double, folder), Bench(folder / "w")
        assert await vm.nodes() == before
        assert double.access is None


async def backup(
    job: BackupJob, bench: Bench, vm: RunningQemu, mode: str, *, commit: bool = True, **more: Any
) -> dict[str, Read]:
    """One backup by the job's disks `fmt-d<n>`, whose archives are `drive-d<n>.img`."""
    number = bench.store.next_id()
    devices = sorted(node for node in await vm.nodes() if node.startswith("fmt-"))
    names = {device: device.replace("fmt-", "drive-") + ".img" for device in devices}
    job.success = False
    async with (
        job.prepared(dict.fromkeys(devices, mode)) as disks,
        provided_view(
            job.socket,
            disks,
            bitmap=TARGET_ID,
            base_of=bench.store.base_of,
            names=names,
            qemu_version=vm.binary.version,
        ) as view,
    ):
        assert view.flavour is FlavourName.PROVIDED
        await vm.qemu_io("d0", "write -P 99 22M 1M")  # after the instant
        reads = {one.name: await read_disk(one, bench.store.images.get(one.name)) for one in view.sources}
        if commit:
            view.commit()
            job.success = view.committed
            bench.store.images.update({name: read.image for name, read in reads.items()})
            bench.store.base = number
    return reads


async def test_what_is_handed_over_is_read(qemu: QemuBinary, tmpfs: Path) -> None:
    async with job_of(qemu, tmpfs, 2) as (vm, job, bench):
        reads = await backup(job, bench, vm, "none")
        assert {name: (read.mode, read.reason) for name, read in reads.items()} == {
            D0: ("full", "first backup"),
            D1: ("full", "first backup"),
        }
        assert reads[D0].image == reads[D1].image == b"\x05" * SIZE
        reads = await backup(job, bench, vm, "use")
        assert (reads[D0].mode, reads[D0].reason) == ("full", "no dirty bitmap yet")
        assert reads[D0].image == b"\x05" * (22 * MIB) + b"\x63" * MIB + b"\x05" * MIB
        await vm.qemu_io("d1", "write -P 7 5M 64k")
        reads = await backup(job, bench, vm, "use", commit=False)
        assert {name: (read.mode, read.read) for name, read in reads.items()} == {
            D0: ("incremental", 4 * MIB),
            D1: ("incremental", 4 * MIB),
        }
        assert reads[D1].image == b"\x05" * (5 * MIB) + b"\x07" * 65536 + b"\x05" * (19 * MIB - 65536)
        await vm.qemu_io("d1", "write -P 8 0 64k")
        reads = await backup(job, bench, vm, "use")
        assert reads[D1].read == 8 * MIB
        assert (reads[D1].image[0], reads[D1].image[5 * MIB]) == (8, 7)


async def test_a_bitmap_that_counts_from_nothing_known_is_refused(backports: QemuBinary, tmpfs: Path) -> None:
    async with job_of(backports, tmpfs) as (vm, job, bench):
        await backup(job, bench, vm, "new")
        bench.store.base = None
        with pytest.raises(FleecingError, match="nothing to count on: first backup; back it up with a new bitmap"):
            await backup(job, bench, vm, "use")
        bench.store.base = 1
        bench.store.images[D0] += bytes(512)
        with pytest.raises(FleecingError, match="nothing to count on: size changed"):
            await backup(job, bench, vm, "use")
        bench.store.images[D0] = bench.store.images[D0][:-512]
        job.success = False
        async with job.prepared({"fmt-d0": "use"}) as disks:
            options: dict[str, Any] = {"base_of": bench.store.base_of, "names": {"fmt-d0": "d0"}}
            with pytest.raises(UsageError, match="its name was not given"):
                async with provided_view(job.socket, disks, bitmap=None, **options):
                    pass
            with pytest.raises(SourceError):
                async with provided_view(job.socket, disks, bitmap="other", **options):
                    pass
            async with provided_view(job.socket, disks, bitmap=TARGET_ID, **options) as view:
                with pytest.raises(FleecingError, match="shows only what changed"):
                    await view.sources[0].extents(incremental=False)
            other_size = [ProvidedDisk("fmt-d0", SIZE - 512)]
            with pytest.raises(FleecingError, match="its size changed"):
                async with provided_view(job.socket, other_size, bitmap=None, **options):
                    pass
            with pytest.raises(SourceError):
                async with provided_view(job.socket, [ProvidedDisk("gone", SIZE)], bitmap=None, **options):
                    pass


@pytest.mark.parametrize(
    ("disks", "error", "match"),
    [
        ([], UsageError, "no disk to be backed up"),
        ([ProvidedDisk("drive-scsi0", 0)], UsageError, "a disk of 0 bytes"),
        ([ProvidedDisk("drive-scsi0", 1 << 63)], UsageError, "a disk of"),
        ([ProvidedDisk("drive-a/b", 512), ProvidedDisk("drive-a_b", 512)], DiskNameError, "would both be drive-a_b"),
        ([ProvidedDisk("x" * 300, 512)], DiskNameError, "1 to 200 letters"),
    ],
)
async def test_what_no_device_can_be_is_refused(
    disks: Sequence[ProvidedDisk], error: type[Exception], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        async with provided_view(tmp_path / "none", disks, bitmap=None, base_of=lambda _archive: "first backup"):
            pass


def test_archives_are_called_as_by_proxmox() -> None:
    names = [ProvidedDisk(name, 512).archive for name in ("drive-scsi0", "drive-efidisk0", "drive-tpmstate0-backup")]
    assert names == ["drive-scsi0.img", "drive-efidisk0.img", "drive-tpmstate0-backup.img"]
