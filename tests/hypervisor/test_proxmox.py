"""Frozen views made by the QEMU of Proxmox VE: what is read, what becomes of bitmaps, and that nothing stays."""

import json
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest
import trio

from core.errors import FleeceError
from hypervisor import leftovers
from hypervisor.bitmaps import BitmapMode
from hypervisor.errors import FleecingError, QmpAnswerError, VmStateError, VmUnsupportedError
from hypervisor.flavours import DiskSelection, FlavourName
from hypervisor.leftovers import look_for_left
from hypervisor.qmp import connect
from hypervisor.vm import cleanup, flavour_of, preview
from tests.hypervisor.fleecing_bench import MIB, TARGET, Bench, facts, hanging_reader, make_qcow2
from tests.support.cache import ROOT
from tests.support.guest import SmallGuest
from tests.support.proxmox_qemu import ProxmoxQemu
from tests.support.qemu_binaries import QemuBinary
from tests.support.ring import Ring
from tests.support.running import QmpRefused, RunningQemu, VmDisk
from tests.support.scripted_qmp import ScriptedQmp

D0, D1 = "drive-d0.img", "drive-d1.img"
SIZE = 24 * MIB
TARGET_ID = f"fleece-{TARGET}"


@asynccontextmanager
async def proxmox(
    qemu: QemuBinary, folder: Path, *disks: VmDisk, size: int = SIZE, extra: Sequence[str] = ()
) -> AsyncIterator[tuple[RunningQemu, Bench, ProxmoxQemu]]:
    """A VM behind the double (without other disks: a raw one `d0`); afterwards nothing of a backup may be left."""
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
        async with ProxmoxQemu.before(vm) as double:
            yield vm, bench, double
        assert double.access is None
        assert await facts(vm, bench) == before
        assert list(bench.run_dir.iterdir()) == []
        assert list((folder / "w" / "scratch").iterdir()) == []


async def names(vm: RunningQemu, node: str) -> list[str]:
    """Bitmaps of a node, by name."""
    return sorted(bitmap["name"] for bitmap in await vm.bitmaps(node))


async def count(vm: RunningQemu, node: str) -> int:
    """Dirty bytes of the target's bitmap."""
    (bitmap,) = [bitmap for bitmap in await vm.bitmaps(node) if bitmap["name"] == TARGET_ID]
    assert bitmap["recording"]
    return int(bitmap["count"])


def devices(seen: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """What the last setup asked for."""
    (arguments, *_) = [arguments for command, arguments in reversed(seen) if command == "backup-access-setup"]
    return {one["device"]: one["bitmap-mode"] for one in arguments["devices"]}


async def test_every_kind_of_disk_is_read_full_and_then_what_changed(qemu: QemuBinary, tmpfs: Path) -> None:
    disks = [
        VmDisk(tmpfs / "d0", "d0"),
        VmDisk(tmpfs / "d1", "d1", bus="virtio-scsi", format="qcow2"),
        VmDisk(tmpfs / "d2", "d2", form="drive"),
    ]
    async with proxmox(qemu, tmpfs, *disks) as (vm, bench, double):
        await vm.qemu_io("d1", "write -P 9 4M 1M")
        reads = await bench.backup(vm)
        assert devices(double.seen) == {"fmt-d0": "new", "fmt-d1": "new", "drive-d2": "new"}
        assert {read.mode for read in reads.values()} == {"full"}
        assert reads[D0].image == b"\x05" * SIZE
        assert reads[D1].image == bytes(4 * MIB) + b"\x09" * MIB + bytes(19 * MIB)
        await vm.qemu_io("d0", "write -P 7 9M 64k")
        await vm.qemu_io("d2", "write -P 8 23M 1M")
        reads = await bench.backup(vm)
        assert devices(double.seen) == {"fmt-d0": "use", "fmt-d1": "use", "drive-d2": "use"}
        assert {name: (read.mode, read.read) for name, read in reads.items()} == {
            D0: ("incremental", 4 * MIB),
            D1: ("incremental", 0),
            "drive-d2.img": ("incremental", 4 * MIB),
        }
        assert reads[D0].image[9 * MIB - 1 : 9 * MIB + 65537] == b"\x05" + b"\x07" * 65536 + b"\x05"
        assert reads["drive-d2.img"].image == b"\x05" * (23 * MIB) + b"\x08" * MIB
        assert bench.warnings == []
        (mark,) = [name for name in await names(vm, "fmt-d0") if name != TARGET_ID]
        assert mark.endswith(f"-{bench.store.base}")


async def killed(bench: Bench, double: ProxmoxQemu, phase: str) -> None:
    """A backup that is killed at a step; of the files of its run nothing is left."""
    command = [sys.executable, "-m", "tests.hypervisor.killed_backup", double.path, bench.folder]
    command += [f"{bench.store.base}:{SIZE}", bench.store.next_id(), phase]
    with trio.fail_after(240):
        ended = await trio.run_process(
            [str(word) for word in command], cwd=ROOT, check=False, stdin=DEVNULL, capture_stdout=True
        )
    assert ended.returncode == -9
    shutil.rmtree(bench.run_dir)
    bench.run_dir.mkdir(mode=0o700)


async def test_where_fleecing_images_must_be_drives_they_become_that(backports: QemuBinary, tmpfs: Path) -> None:
    disks = [VmDisk(tmpfs / "d0", "d0"), VmDisk(tmpfs / "d2", "d2", form="drive")]
    # Characters that mean something to QEMU's monitor, and to its options.
    folder = tmpfs / 'a, b\\ "c=d'
    folder.mkdir()
    async with proxmox(backports, folder, *disks) as (vm, bench, double):
        double.drives_only = True
        await bench.backup(vm)
        await vm.qemu_io("d2", "write -P 8 23M 1M")
        reads = await bench.backup(vm)
        assert devices(double.seen) == {"fmt-d0": "use", "drive-d2": "use"}
        assert (reads[D0].read, reads["drive-d2.img"].read) == (0, 4 * MIB)
        assert reads["drive-d2.img"].image == b"\x05" * (23 * MIB) + b"\x08" * MIB
        assert bench.warnings == []
        # Killed with an access that is up, or before: QEMU alone says what there is to be removed.
        for phase in ("read", "freeze the guest again, let QEMU make the views"):
            await killed(bench, double, phase)
            assert (double.access is not None) == (phase == "read")
            async with connect(vm.qmp) as qmp:
                left = await look_for_left(qmp, bench.run_dir)
            assert any("drive-d2-fleecing" in thing for thing in left.things)
            reads = await bench.backup(vm)
            assert {read.mode for read in reads.values()} == {"incremental"}
        double.plan = lambda command: "refuse" if command == "human-monitor-command" else None
        with pytest.raises(FleecingError, match="planned by the test"):
            await bench.backup(vm)
        double.plan = lambda _command: None


async def test_a_backup_that_fails_costs_nothing_but_reading_again(qemu: QemuBinary, tmpfs: Path) -> None:
    async with proxmox(qemu, tmpfs, VmDisk(tmpfs / "d0", "d0"), VmDisk(tmpfs / "d1", "d1", format="qcow2")) as (
        vm,
        bench,
        _,
    ):
        await bench.backup(vm, commit=False)
        # A first backup that fails leaves nothing to count from, and nothing that costs time.
        assert await names(vm, "fmt-d0") == await names(vm, "fmt-d1") == []
        await bench.backup(vm)
        before = await names(vm, "fmt-d0")
        await vm.qemu_io("d0", "write -P 1 0 1M")

        async def write_meanwhile() -> None:
            await vm.qemu_io("d0", "write -P 2 12M 1M")

        reads = await bench.backup(vm, between=write_meanwhile, commit=False)
        assert (reads[D0].mode, reads[D0].read) == ("incremental", 4 * MIB)
        assert reads[D0].image[12 * MIB] == 5
        assert await names(vm, "fmt-d0") == before
        assert await count(vm, "fmt-d0") == 8 * MIB
        reads = await bench.backup(vm)
        assert (reads[D0].mode, reads[D0].read) == ("incremental", 8 * MIB)
        assert (reads[D0].image[0], reads[D0].image[12 * MIB]) == (1, 2)
        assert await count(vm, "fmt-d0") == 0


@dataclass
class OneFault:
    """A fault at one command of a backup."""

    left: int  #: commands until then; positive at the end: it was not met
    kind: str

    def __call__(self, _command: str) -> str | None:
        self.left -= 1
        return self.kind if self.left == 0 else None


async def test_every_command_may_fail_or_be_lost(
    distribution: QemuBinary, tmpfs: Path, long_rounds: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypervisor.leftovers._EXPORTS_TIMEOUT_S", 5.0)  # for an export whose end is refused
    # Every command in `make test-long`, else every fifth, with all kinds of faults.
    stride = 5 // long_rounds(5)
    async with proxmox(distribution, tmpfs, size=8 * MIB) as (vm, bench, double):
        await bench.backup(vm)
        model = bytearray(b"\x05" * (8 * MIB))
        number = 0
        while True:
            number += stride
            fault = OneFault(number, ("refuse", "lose", "lose-after")[number % 3])
            place = number % 8
            await vm.qemu_io("d0", f"write -P {number} {place}M 1M")
            model[place * MIB : (place + 1) * MIB] = bytes([number]) * MIB
            double.plan = fault
            with suppress(FleeceError):
                # A connection that is lost as soon as it was made is made again: then this one succeeds.
                (read,) = (await bench.backup(vm)).values()
                assert read.image == model
            double.plan = lambda _command: None
            (read,) = (await bench.backup(vm)).values()
            assert read.image == model, number
            assert read.mode == "incremental", (number, read.reason)
            assert len(await names(vm, "fmt-d0")) == 2
            if fault.left > 0:
                break
        assert number > 30


async def test_without_bitmaps_everything_is_read_and_none_stays(backports: QemuBinary, tmpfs: Path) -> None:
    async with proxmox(backports, tmpfs) as (vm, bench, double):
        await bench.backup(vm)
        assert len(await names(vm, "fmt-d0")) == 2
        for _ in range(2):
            reads = await bench.backup(vm, bitmap_mode=BitmapMode.NONE)
            assert devices(double.seen) == {"fmt-d0": "none"}
            assert (reads[D0].mode, reads[D0].reason) == ("full", "dirty bitmaps are switched off")
            assert await names(vm, "fmt-d0") == []


async def test_a_bitmap_that_counts_from_another_backup_is_not_used(backports: QemuBinary, tmpfs: Path) -> None:
    async with proxmox(backports, tmpfs) as (vm, bench, double):
        await bench.backup(vm)
        base = bench.store.base
        assert base is not None
        await vm.qemu_io("d0", "write -P 1 0 1M")
        await bench.backup(vm)
        # The newest snapshot is removed: what was written before it is not in the bitmap.
        bench.store.finished.discard(bench.store.base or 0)
        bench.store.base = base
        reads = await bench.backup(vm)
        assert devices(double.seen) == {"fmt-d0": "new"}
        assert (reads[D0].mode, reads[D0].reason) == ("full", "previous snapshot gone")


async def test_a_base_that_is_found_to_be_of_no_use_is_not_used_again(backports: QemuBinary, tmpfs: Path) -> None:
    async with proxmox(backports, tmpfs) as (vm, bench, _):
        await bench.backup(vm)
        await vm.qemu_io("d0", "write -P 1 0 1M")
        with pytest.raises(FleecingError, match="shows only what changed"):
            async with bench.view(vm) as view:
                await view.sources[0].extents(incremental=False)
        reads = await bench.backup(vm)
        assert (reads[D0].mode, reads[D0].reason) == ("full", "no dirty bitmap yet")
        assert reads[D0].image[0] == 1


async def test_a_backup_of_somebody_else_is_told_and_left_alone(backports: QemuBinary, tmpfs: Path) -> None:
    async with proxmox(backports, tmpfs, size=8 * MIB) as (vm, bench, double):
        double.native_backup = True
        with pytest.raises(VmStateError, match="previous backup for target 'Proxmox VE' not finished"):
            await bench.backup(vm)
        double.native_backup = False
        async with foreign_access(vm, double):
            with pytest.raises(VmStateError, match="back up disk d0: another backup of it runs"):
                await bench.backup(vm)
            assert double.access is not None
            assert await cleanup(vm.qmp, run_dir=bench.run_dir, scratch=bench.folder / "scratch") == []
            assert double.access is not None
        await bench.backup(vm)


@asynccontextmanager
async def foreign_access(vm: RunningQemu, double: ProxmoxQemu) -> AsyncIterator[list[dict[str, Any]]]:
    """An access of Proxmox's own backup job, with its own names."""
    async with connect(double.path) as qmp:
        size = (await vm.block_info("d0"))["inserted"]["image"]["virtual-size"]
        await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "fmt-d0-fleecing", "size": size})
        asked = {"device": "fmt-d0", "bitmap-mode": "use"}
        told = await qmp.execute("backup-access-setup", {"target-id": "snapshot-access:other", "devices": [asked]})
    yield told
    async with connect(double.path) as qmp:
        await qmp.execute("backup-access-teardown", {"target-id": "snapshot-access:other", "success": True})
        await qmp.execute("block-dirty-bitmap-remove", {"node": "fmt-d0", "name": "snapshot-access:other"})
        await qmp.execute("blockdev-del", {"node-name": "fmt-d0-fleecing"})


async def test_efi_variables_and_the_state_of_a_tpm_are_disks(backports: QemuBinary, tmpfs: Path) -> None:
    efi, tpm = tmpfs / "efi", tmpfs / "tpm"
    efi.write_bytes(b"\x0e" * 540672)
    tpm.write_bytes(b"\x0a" * (4 * MIB))
    node = {"driver": "raw", "node-name": "drive-efidisk0", "file": {"driver": "file", "filename": str(efi)}}
    disk = VmDisk(tmpfs / "d0", "d0")
    code = tmpfs / "code"
    code.write_bytes(bytes(64 * 1024))
    blockdevs = ["-blockdev", json.dumps(node), "-machine", "pflash1=drive-efidisk0"]
    rom = {"driver": "raw", "node-name": "rom", "read-only": True}
    rom["file"] = {"driver": "file", "filename": str(code), "read-only": True}
    blockdevs += ["-blockdev", json.dumps(rom), "-machine", "pflash0=rom"]
    async with proxmox(backports, tmpfs, disk, size=8 * MIB, extra=blockdevs) as (vm, bench, double):
        for mode in ("new", "use"):
            reads = await bench.backup(vm, tpm_state=tpm)
            asked = devices(double.seen)
            (tpm_device,) = set(asked) - {"fmt-d0", "drive-efidisk0"}
            assert asked == {"fmt-d0": mode, "drive-efidisk0": mode, tpm_device: "none"}
            assert reads["drive-efidisk0.img"].image == b"\x0e" * 540672
            assert reads["drive-tpmstate0-backup.img"].image == tpm.read_bytes()
            assert reads["drive-tpmstate0-backup.img"].reason == "the TPM's state is written past QEMU"
            tpm.write_bytes(b"\x0b" * (4 * MIB))
        without = await bench.backup(vm, disks=DiskSelection(exclude=["efidisk0", "tpmstate0"]), tpm_state=tpm)
        assert list(without) == [D0]


async def test_a_reader_that_hangs_at_the_end_does_not_hold_up_the_guest(
    backports: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "_EXPORTS_TIMEOUT_S", 0.2)
    async with proxmox(backports, tmpfs, size=32 * MIB) as (vm, bench, _):
        await bench.backup(vm)
        await vm.qemu_io("d0", "write -P 7 0 32M")  # only what changed can be read
        async with hanging_reader(vm, bench):
            await vm.qemu_io("d0", "write -P 9 4M 1M")
        read = (await bench.backup(vm))[D0]
        assert (read.mode, read.read) == ("incremental", 32 * MIB)
        assert read.image == b"\x07" * 4 * MIB + b"\x09" * MIB + b"\x07" * 27 * MIB


async def test_a_shared_disk_is_read_in_full_each_time(backports: QemuBinary, tmpfs: Path) -> None:
    disks = [VmDisk(tmpfs / "d0", "d0", device_options="share-rw=on"), VmDisk(tmpfs / "d1", "d1")]
    async with proxmox(backports, tmpfs, *disks) as (vm, bench, double):
        for mode in ("new", "use"):
            reads = await bench.backup(vm)
            assert devices(double.seen) == {"fmt-d0": "none", "fmt-d1": mode}
            assert (reads[D0].mode, reads[D0].image) == ("full", b"\x05" * SIZE)
            assert "shareable" in reads[D0].reason
            assert await vm.bitmaps("fmt-d0") == []
        assert reads[D1].mode == "incremental"


async def test_limits_of_speed_stay_above_the_filter(backports: QemuBinary, tmpfs: Path) -> None:
    path = tmpfs / "d0"
    disk = VmDisk(path, "d0", blockdev_options={})
    group = ["-object", "throttle-group,id=group0"]
    throttle = {"driver": "throttle", "node-name": "drive-d1", "throttle-group": "group0"}
    lower = tmpfs / "lower"
    lower.write_bytes(b"\x07" * (8 * MIB))
    throttle["file"] = {"driver": "raw", "node-name": "fmt-d1", "file": {"driver": "file", "filename": str(lower)}}  # type: ignore[assignment]
    extra = [*group, "-blockdev", json.dumps(throttle), "-device", "virtio-blk-pci,id=d1,drive=drive-d1"]
    async with proxmox(backports, tmpfs, disk, size=8 * MIB, extra=extra) as (vm, bench, double):
        await bench.backup(vm)
        assert devices(double.seen) == {"fmt-d0": "new", "drive-d1": "new"}
        assert len(await names(vm, "fmt-d1")) == 2
        assert await names(vm, "drive-d1") == []
        line = 'qemu-io -d /machine/peripheral/d1/virtio-backend "write -P 9 4M 1M"'
        await vm.execute("human-monitor-command", {"command-line": line})
        reads = await bench.backup(vm)
        assert (reads[D1].mode, reads[D1].read, reads[D1].image[4 * MIB]) == ("incremental", 4 * MIB, 9)


async def test_a_run_that_was_killed_is_cleaned_up_by_looking_at_qemu(qemu: QemuBinary, tmpfs: Path) -> None:
    async with proxmox(qemu, tmpfs, VmDisk(tmpfs / "d0", "d0"), VmDisk(tmpfs / "d1", "d1", format="qcow2")) as (
        vm,
        bench,
        double,
    ):
        await bench.backup(vm)
        for number, phase in enumerate(("freeze the guest, let QEMU make the views", "read", "hand the bitmaps over")):
            await vm.qemu_io("d0", f"write -P {number + 1} {4 * number}M 1M")
            await killed(bench, double, phase)
            assert (double.access is not None) == (number > 0)
            async with connect(vm.qmp) as qmp:
                left = await look_for_left(qmp, bench.run_dir)
            assert any("fmt-d0-fleecing" in thing for thing in left.things)
            if number == 1:
                done = await cleanup(vm.qmp, run_dir=bench.run_dir, scratch=bench.folder / "scratch")
                assert "ended QEMU's backup access" in done
                assert double.access is None
            reads = await bench.backup(vm)
            assert reads[D0].mode == reads[D1].mode == "incremental"
            assert reads[D0].read == 4 * MIB
            assert reads[D0].image[4 * number * MIB] == number + 1
        assert await cleanup(vm.qmp, run_dir=bench.run_dir, remove_bitmaps=True) == ["removed 2 dirty bitmaps"]
        assert await names(vm, "fmt-d0") == await names(vm, "fmt-d1") == []


async def test_the_preview_is_what_the_backup_does(backports: QemuBinary, tmpfs: Path) -> None:
    async with proxmox(backports, tmpfs, VmDisk(tmpfs / "d0", "d0"), VmDisk(tmpfs / "d1", "d1", form="drive")) as (
        vm,
        bench,
        _,
    ):

        async def shown() -> dict[str, tuple[str | None, str, str, int]]:
            async with connect(vm.qmp) as qmp:
                kind = await flavour_of(qmp)
                assert kind.name is FlavourName.PROXMOX
                disks = (await kind.survey(qmp, DiskSelection())).disks
                found = await preview(qmp, disks, TARGET, bench.store.base_of, bench.store.is_finished, flavour=kind)
            return {one.name: (one.bitmap, one.mode, one.reason, one.bytes) for one in found}

        full = (None, "full", "first backup", SIZE)
        assert await shown() == {D0: full, D1: full}
        await bench.backup(vm)
        await vm.qemu_io("d1", "write -P 1 0 1M")
        assert await shown() == {
            D0: (TARGET_ID, "incremental", "", 0),
            D1: (TARGET_ID, "incremental", "", 4 * MIB),
        }


async def test_a_disk_is_not_resized_into_a_crash_while_it_is_read(backports: QemuBinary, tmpfs: Path) -> None:
    async with proxmox(backports, tmpfs, size=8 * MIB) as (vm, bench, _):
        await bench.backup(vm)
        async with bench.view(vm) as view:
            with suppress(QmpRefused):
                await vm.execute("block_resize", {"node-name": "fmt-d0", "size": 16 * MIB})
            await view.sources[0].extents()
            view.commit()
        assert vm.alive()


async def test_the_flavour_is_found_by_looking_or_asked_for(backports: QemuBinary, tmpfs: Path) -> None:
    async with proxmox(backports, tmpfs, size=8 * MIB) as (vm, bench, double):
        async with bench.view(vm) as view:
            assert view.flavour is FlavourName.PROXMOX
        async with bench.view(vm, flavour=FlavourName.STOCK) as view:
            assert view.flavour is FlavourName.STOCK
        double.support["backup-fleecing"] = False
        async with bench.view(vm) as view:
            assert view.flavour is FlavourName.STOCK
        with pytest.raises(VmUnsupportedError, match="it does not support backup-fleecing"):
            await bench.backup(vm, flavour=FlavourName.PROXMOX)
    stock = ScriptedQmp()
    async with stock.serving() as path, connect(path) as qmp:
        assert (await flavour_of(qmp)).name is FlavourName.STOCK
        with pytest.raises(VmUnsupportedError, match="it lacks backup-access-setup, backup-access-teardown"):
            await flavour_of(qmp, FlavourName.PROXMOX)


async def test_the_flavours_do_not_count_on_the_bitmaps_of_each_other(backports: QemuBinary, tmpfs: Path) -> None:
    async with proxmox(backports, tmpfs) as (vm, bench, _):
        model = bytearray(b"\x05" * SIZE)
        for number, flavour in enumerate((None, FlavourName.STOCK, None, None, FlavourName.STOCK, FlavourName.STOCK)):
            await vm.qemu_io("d0", f"write -P {number} {number * 4}M 1M")
            model[number * 4 * MIB : (number * 4 + 1) * MIB] = bytes([number]) * MIB
            (read,) = (await bench.backup(vm, flavour=flavour)).values()
            assert read.image == model, number
            assert read.mode == ("incremental" if number in (3, 5) else "full"), (number, read.reason)


@pytest.mark.parametrize(
    ("twist", "match"),
    [
        (lambda told: told[:-1], "nothing about the device"),
        (lambda told: [*told, {**told[0], "device": "other"}], "'other' was not asked for"),
        (lambda told: [{**told[0], "size": 4096}], "its size changed"),
        (lambda told: [{**told[0], "bitmap-action": "used"}], "answers the bitmap mode 'new' with 'used'"),
        (lambda told: [{**told[0], "bitmap-action": "odd"}], "answers the bitmap mode 'new' with 'odd'"),
        (lambda told: [{**told[0], "node-name": 7}], "a number where a text belongs"),
        (lambda _told: {}, "an object where a list belongs"),
    ],
)
async def test_an_answer_that_makes_no_sense_ends_the_backup(
    backports: QemuBinary, tmpfs: Path, twist: Any, match: str
) -> None:
    async with proxmox(backports, tmpfs, size=4 * MIB) as (vm, bench, double):
        double.twist = twist
        with pytest.raises((FleecingError, QmpAnswerError), match=match):
            await bench.backup(vm)


async def test_a_bitmap_that_qemu_has_started_anew_is_read_in_full(backports: QemuBinary, tmpfs: Path) -> None:
    async with proxmox(backports, tmpfs, size=8 * MIB) as (vm, bench, double):
        await bench.backup(vm)

        async def drop() -> None:
            await vm.execute("block-dirty-bitmap-remove", {"node": "fmt-d0", "name": TARGET_ID})

        # Between the look and the setup somebody removes it.
        double.before_setup = drop
        reads = await bench.backup(vm)
        assert (reads[D0].mode, reads[D0].reason) == ("full", "QEMU has started a new bitmap (missing-recreated)")


@pytest.mark.long
async def test_the_instant_is_one_for_all_disks_under_a_writing_guest(
    qemu: QemuBinary, tmpfs: Path, guest: SmallGuest, rounds: Callable[[int], int]
) -> None:
    ring = Ring()
    disks = [VmDisk(tmpfs / "a", "d0"), VmDisk(tmpfs / "b", "d1", bus="virtio-scsi")]
    for disk in disks:
        disk.path.write_bytes(bytes(4 * MIB))
    (tmpfs / "w").mkdir()
    bench = Bench(tmpfs / "w")
    async with RunningQemu.start(qemu, disks, guest=guest) as vm, ProxmoxQemu.before(vm):
        assert vm.guest is not None
        await vm.guest.run(f"{ring.command('/dev/vda', '/dev/sda')} >/dev/null 2>&1 &")
        newest = 0
        for _ in range(rounds(20)):
            reads = await bench.backup(vm)
            images = [reads[D0].image, reads[D1].image]
            found = ring.assert_one_instant(
                *((lambda offset, length, image=image: image[offset : offset + length]) for image in images)
            )
            assert found > newest, "the guest has stopped writing"
            newest = found


async def test_disks_with_io_threads_of_their_own(backports: QemuBinary, tmpfs: Path) -> None:
    disks = [
        VmDisk(tmpfs / "d0", "d0", device_options="iothread=io0"),
        VmDisk(tmpfs / "d1", "d1", format="qcow2", device_options="iothread=io1"),
    ]
    threads = ["-object", "iothread,id=io0", "-object", "iothread,id=io1"]
    async with proxmox(backports, tmpfs, *disks, extra=threads) as (vm, bench, _):
        await bench.backup(vm)
        await vm.qemu_io("d0", "write -P 3 20M 1M")
        reads = await bench.backup(vm)
        assert (reads[D0].read, reads[D1].read) == (4 * MIB, 0)
        assert reads[D0].image == b"\x05" * (20 * MIB) + b"\x03" * MIB + b"\x05" * (3 * MIB)
