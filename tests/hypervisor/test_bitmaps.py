"""Names of dirty bitmaps, the choice with every reason in words, and the hand-over, pure and in real QEMUs."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import FleeceError
from hypervisor import bitmaps
from hypervisor.bitmaps import BaseInfo, Bitmap, BitmapMode, BitmapName, Situation, choose, disk_id, settle, undecided
from hypervisor.discovery import Disk
from hypervisor.qmp import connect
from hypervisor.vm import DiskSelection, preview
from tests.hypervisor.fleecing_bench import MIB, TARGET, Bench, Read, make_qcow2
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk

D0, D1 = "drive-d0.img", "drive-d1.img"


# -- names ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**32).map(lambda n: f"{n:08x}"[-8:]), st.text(min_size=1), st.integers(0, 10**12 - 1))
def test_a_name_reads_back_as_it_was_made(target: str, archive: str, number: int) -> None:
    name = BitmapName(target, disk_id(archive), number)
    assert BitmapName.parse(str(name)) == name
    assert len(str(name)) < 64


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fleece-0badcafe",
        "fleece-0badcafe-01234567-",
        "fleece-0badcafe-01234567-01",
        "fleece-0badcafe-01234567--1",
        "fleece-0badcafe-01234567-1\n",
        "fleece-0BADCAFE-01234567-1",
        "fleece-0badcafe-01234567-1000000000000",  # no time that a snapshot can have
        "xfleece-0badcafe-01234567-1",
        "libvirt-1",
    ],
)
def test_names_of_others_are_not_taken_for_ours(name: str) -> None:
    assert BitmapName.parse(name) is None


def test_a_target_depends_on_every_part_of_its_identity() -> None:
    targets = [bitmaps.target_id(*parts) for parts in (("a", "b", "c"), ("a", "b", "d"), ("ab", "", "c"), ("a", "bc"))]
    assert len(set(targets)) == 4
    assert all(BitmapName.parse(f"fleece-{target}-01234567-1") for target in targets)


# -- what an interrupted backup left ----------------------------------------------------------------------------------


def bitmap(number: int, *, archive: str = D0, node: str = "fmt-d0", **more: Any) -> Bitmap:
    plain = Bitmap(node, BitmapName(TARGET, disk_id(archive), number), 8 * MIB, 4 * MIB, True, False, False)
    return replace(plain, **more)


def verbs(settlement: bitmaps.Settlement) -> list[str]:
    return [
        f"{action['type'].removeprefix('block-dirty-bitmap-')} {action['data'].get('name', '')[-1:]}".strip()
        for action in settlement.actions
    ]


def test_an_unfinished_backup_is_merged_into_the_bitmap_before() -> None:
    pair = [bitmap(7), bitmap(5, recording=False)]
    assert undecided(pair) == 7
    settlement = settle(pair, False)
    assert verbs(settlement) == ["enable 5", "merge", "remove 7"]
    assert (settlement.kept, settlement.count, settlement.lost) == (pair[1].name, 16 * MIB, "")


def test_a_finished_backup_drops_the_bitmap_before() -> None:
    pair = [bitmap(5, recording=False), bitmap(7)]
    settlement = settle(pair, True)
    assert verbs(settlement) == ["remove 5"]
    assert settlement.kept == pair[1].name


def test_a_disabled_one_alone_is_removed_because_writes_are_missing_in_it() -> None:
    settlement = settle([bitmap(5, recording=False)], None)
    assert verbs(settlement) == ["remove 5"]
    assert settlement.kept is None
    assert settlement.lost == "an interrupted backup left no usable bitmap"


def test_inconsistent_ones_are_removed_and_the_reason_kept() -> None:
    settlement = settle([bitmap(5, inconsistent=True, recording=False), bitmap(7, inconsistent=True)], None)
    assert verbs(settlement) == ["remove 5", "remove 7"]
    assert settlement.lost == "bitmap inconsistent after a crash of QEMU"


def test_one_recording_bitmap_is_left_as_it_is() -> None:
    assert undecided([bitmap(5)]) is None
    settlement = settle([bitmap(5)], None)
    assert (settlement.actions, settlement.kept, settlement.lost) == ([], bitmap(5).name, "")


def test_busy_bitmaps_are_left_alone() -> None:
    assert settle([bitmap(5, busy=True), bitmap(7, busy=True)], None).actions == []


def test_more_than_two_prove_nothing_and_go() -> None:
    settlement = settle([bitmap(5), bitmap(6), bitmap(7)], None)
    assert verbs(settlement) == ["remove 5", "remove 6", "remove 7"]
    assert settlement.kept is None


# -- the choice -------------------------------------------------------------------------------------------------------


def disk(name: str = D0, node: str = "fmt-d0", size: int = 64 * MIB) -> Disk:
    device = name.removeprefix("drive-").removesuffix(".img")
    return Disk(name, device, f"/machine/peripheral/{device}", node, size, "raw", None, "virtio-blk", False)


def situation(*found: Bitmap, **more: Any) -> Situation:
    base: BaseInfo | str = more.get("base", BaseInfo(5, 64 * MIB))

    async def finished(number: int) -> bool:
        return number in more.get("kept", ())

    return Situation(
        target=TARGET,
        mode=more.get("mode", BitmapMode.PERSISTENT),
        disks=more.get("disks", [disk(), disk(D1, "fmt-d1")]),
        bitmaps=found,
        lost=more.get("lost", {}),
        started=more.get("started", 1.0),
        unsure=more.get("unsure", {}),
        graph=more.get("graph"),
        migrated=more.get("migrated", False),
        base_of=lambda archive: base,
        finished=finished,
    )


async def test_the_one_recording_bitmap_of_the_base_snapshot_is_used() -> None:
    choice = await choose(disk(), situation(bitmap(5)))
    assert (choice.bitmap, choice.base, choice.reason, choice.remove) == (bitmap(5).name, 5, "", ())


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (situation(bitmap(5), base="key changed"), "key changed"),
        (situation(bitmap(5), mode=BitmapMode.NONE), "dirty bitmaps are switched off"),
        (situation(), "no dirty bitmap yet"),
        (situation(bitmap(4, archive=D1, node="fmt-d1")), "no dirty bitmap yet"),
        (
            situation(bitmap(5, archive=D1, node="fmt-d1")),
            "the disk was plugged in again, or has another image, since the previous backup",
        ),
        (situation(started=6.0, migrated=True), "VM migrated since the previous backup, without its dirty bitmaps"),
        (situation(bitmap(5), unsure={"fmt-d0": "cut"}), "cut"),
        (situation(started=6.0), "VM restarted since the previous backup"),
        (
            situation(lost={("fmt-d0", disk_id(D0)): "bitmap inconsistent after a crash of QEMU"}, started=6.0),
            "bitmap inconsistent after a crash of QEMU",
        ),
        (situation(bitmap(5, archive=D1)), "disk moved from d1"),
        (situation(bitmap(5, archive="drive-old.img")), "the disk had another name at the previous backup"),
        (situation(bitmap(5, node="fmt-d1")), "another disk: the former one is now d1"),
        (
            # As libvirt makes an overlay.
            situation(bitmap(5), bitmap(5, node="below"), graph={"fmt-d0": {"backing": "below"}}),
            "the disk has a new top image since the previous backup (external snapshot)",
        ),
        (
            situation(bitmap(5, node="below"), graph={"fmt-d0": {"backing": "between"}, "between": {"file": "below"}}),
            "the disk has a new top image since the previous backup (external snapshot)",
        ),
        (
            situation(bitmap(5, node="below"), graph={"fmt-d0": {"file": "file0"}, "below": {"file": "fmt-d0"}}),
            "the disk has another image since the previous backup (mirrored or streamed)",
        ),
        (situation(bitmap(5, inconsistent=True, recording=False)), "bitmap inconsistent after a crash of QEMU"),
        (situation(bitmap(5, busy=True)), "the bitmap is in use by another operation of QEMU"),
        (situation(bitmap(5, recording=False)), "an interrupted backup left no usable bitmap"),
        (situation(bitmap(5), bitmap(6)), "an interrupted backup left no usable bitmap"),
        (situation(bitmap(5, granularity=65536)), "the bitmap has a granularity of 64.0 KiB"),
        (situation(bitmap(4)), "a newer snapshot was made without the dirty bitmap"),
        (situation(bitmap(9)), "previous snapshot gone"),
        (situation(bitmap(9), kept=[9]), "previous snapshot failed verification"),
        (situation(bitmap(5), base=BaseInfo(5, 32 * MIB)), "size changed from 32.0 MiB to 64.0 MiB"),
        (situation(bitmap(5), base=BaseInfo(5, 64 * MIB - 512)), "size changed by 512 B"),
    ],
)
async def test_every_reason_for_a_full_read_is_said_in_words(case: Situation, reason: str) -> None:
    choice = await choose(disk(), case)
    assert choice.bitmap is None
    assert choice.base is None
    assert choice.reason == reason
    # What is of no use goes, but never a busy one, nor one of another node.
    assert list(choice.remove) == [b for b in case.bitmaps if b.node == "fmt-d0" and not b.busy]


# -- in a real QEMU ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def vm_of(
    qemu: QemuBinary, folder: Path, *, swapped: bool = False, extra: Sequence[str] = ()
) -> AsyncIterator[RunningQemu]:
    """A VM with a qcow2 disk `d0` and a raw disk `d1`, or with their images swapped; made at the first use."""
    first, second = folder / "d0.qcow2", folder / "d1.raw"
    if not first.exists():
        await make_qcow2(qemu, first, 20 * MIB)
        second.write_bytes(bytes(20 * MIB))
    disks = [VmDisk(first, "d0", format="qcow2"), VmDisk(second, "d1")]
    if swapped:
        disks = [VmDisk(second, "d0"), VmDisk(first, "d1", format="qcow2")]
    async with RunningQemu.start(qemu, disks, extra=extra) as vm:
        yield vm


def bench_in(folder: Path) -> Bench:
    (folder / "w").mkdir(exist_ok=True)
    return Bench(folder / "w")


def modes(reads: dict[str, Read]) -> dict[str, str]:
    return {name: read.reason or "incremental" for name, read in reads.items()}


async def names_on(vm: RunningQemu, node: str) -> list[str]:
    return sorted(entry["name"] for entry in await vm.bitmaps(node))


async def test_only_the_persistent_bitmap_survives_a_restart(qemu: QemuBinary, tmpfs: Path) -> None:
    bench = bench_in(tmpfs)
    # As if the backup were a while ago: the VM that starts below is younger.
    bench.store.clock = 1_000_000_000
    async with vm_of(qemu, tmpfs) as vm:
        await vm.qemu_io("d0", "write -P 1 0 1M")
        await bench.backup(vm)
        await vm.qemu_io("d0", "write -P 2 8M 1M")
        await vm.quit()
    async with vm_of(qemu, tmpfs) as vm:
        await vm.qemu_io("d0", "write -P 3 16M 1M")
        reads = await bench.backup(vm)
        assert modes(reads) == {D0: "incremental", D1: "VM restarted since the previous backup"}
        assert reads[D0].read == 8 * MIB
        image = reads[D0].image
        assert (image[0], image[8 * MIB], image[16 * MIB]) == (1, 2, 3)
        assert modes(await bench.backup(vm)) == {D0: "incremental", D1: "incremental"}


async def test_two_disks_swapped_over_a_restart_are_read_in_full(qemu: QemuBinary, tmpfs: Path) -> None:
    bench = bench_in(tmpfs)
    async with vm_of(qemu, tmpfs) as vm:
        await vm.qemu_io("d0", "write -P 1 0 1M")
        await bench.backup(vm)
        await vm.quit()
    async with vm_of(qemu, tmpfs, swapped=True) as vm:
        reads = await bench.backup(vm)
        assert modes(reads) == {D0: "another disk: the former one is now d1", D1: "disk moved from d0"}
        assert (reads[D0].image[0], reads[D1].image[0]) == (0, 1)
        assert modes(await bench.backup(vm)) == {D0: "incremental", D1: "incremental"}


async def test_a_killed_qemu_leaves_an_inconsistent_bitmap_that_is_replaced(qemu: QemuBinary, tmpfs: Path) -> None:
    bench = bench_in(tmpfs)
    async with vm_of(qemu, tmpfs) as vm:
        await bench.backup(vm)
        await vm.quit()
    async with vm_of(qemu, tmpfs) as vm:
        await vm.qemu_io("d0", "write -P 7 4M 1M")
        await vm.qemu_io("d0", "flush")
        await vm.kill()
    async with vm_of(qemu, tmpfs) as vm:
        (entry,) = await vm.bitmaps("fmt-d0")
        assert entry["inconsistent"]
        reads = await bench.backup(vm)
        assert reads[D0].reason == "bitmap inconsistent after a crash of QEMU"
        assert reads[D0].image[4 * MIB] == 7
        assert modes(await bench.backup(vm))[D0] == "incremental"


@pytest.mark.parametrize("clean_quit", [True, False])
async def test_a_vm_that_ends_in_mid_backup_gives_a_right_next_backup(
    qemu: QemuBinary, tmpfs: Path, clean_quit: bool
) -> None:
    bench = bench_in(tmpfs)
    async with vm_of(qemu, tmpfs) as vm:
        await bench.backup(vm)
        await vm.quit()
    async with vm_of(qemu, tmpfs) as vm:
        await vm.qemu_io("d0", "write -P 1 0 1M")
        async with bench.view(vm):
            await vm.qemu_io("d0", "write -P 2 8M 1M")
            await vm.qemu_io("d0", "flush")
            await (vm.quit() if clean_quit else vm.kill())
    async with vm_of(qemu, tmpfs) as vm:
        assert len(await vm.bitmaps("fmt-d0")) == (2 if clean_quit else 1)
        await vm.qemu_io("d0", "write -P 3 16M 1M")
        reads = await bench.backup(vm)
        expected = "incremental" if clean_quit else "bitmap inconsistent after a crash of QEMU"
        assert modes(reads)[D0] == expected
        image = reads[D0].image
        assert (image[0], image[8 * MIB], image[16 * MIB]) == (1, 2, 3)
        assert len(await vm.bitmaps("fmt-d0")) == 1


async def pair_of_an_interrupted_run(vm: RunningQemu, bench: Bench) -> int:
    """Bitmaps as a run killed after T leaves them; returns the id of its snapshot."""
    await bench.backup(vm)
    await vm.qemu_io("d0", "write -P 1 0 1M")
    new_id = bench.store.next_id()
    for node, archive in (("fmt-d0", D0), ("fmt-d1", D1)):
        old = BitmapName(TARGET, disk_id(archive), bench.store.base or 0)
        new = BitmapName(TARGET, disk_id(archive), new_id)
        await vm.execute("transaction", {"actions": [bitmaps.add(node, new, persistent=False)]})
        await vm.execute("transaction", {"actions": [bitmaps.disable(node, old)]})
    await vm.qemu_io("d0", "write -P 2 8M 1M")
    return new_id


async def test_an_interrupted_run_is_taken_as_failed_if_its_snapshot_is_not_there(
    qemu: QemuBinary, tmpfs: Path
) -> None:
    bench = bench_in(tmpfs)
    async with vm_of(qemu, tmpfs) as vm:
        await pair_of_an_interrupted_run(vm, bench)
        reads = await bench.backup(vm)
        assert modes(reads) == {D0: "incremental", D1: "incremental"}
        assert reads[D0].read == 8 * MIB
        assert (reads[D0].image[0], reads[D0].image[8 * MIB]) == (1, 2)


async def test_an_interrupted_run_whose_snapshot_is_there_counts_as_finished(qemu: QemuBinary, tmpfs: Path) -> None:
    bench = bench_in(tmpfs)
    async with vm_of(qemu, tmpfs) as vm:
        number = await pair_of_an_interrupted_run(vm, bench)
        image = bytearray(bench.store.images[D0])
        image[:MIB] = b"\x01" * MIB
        bench.store.images[D0] = bytes(image)
        bench.store.base = number
        bench.store.finished.add(number)
        reads = await bench.backup(vm)
        assert modes(reads) == {D0: "incremental", D1: "incremental"}
        assert reads[D0].read == 4 * MIB
        assert (reads[D0].image[0], reads[D0].image[8 * MIB]) == (1, 2)


async def test_an_unreachable_target_stops_the_backup_and_touches_no_bitmap(qemu: QemuBinary, tmpfs: Path) -> None:
    async def unreachable(number: int) -> bool:
        raise FleeceError("reach", "backup.example:8007:store", "no route to host")

    bench = bench_in(tmpfs)
    async with vm_of(qemu, tmpfs) as vm:
        await pair_of_an_interrupted_run(vm, bench)
        before = await vm.bitmaps("fmt-d0"), await vm.bitmaps("fmt-d1")
        with pytest.raises(FleeceError, match="no route to host"):
            await bench.backup(vm, finished=unreachable)
        assert (await vm.bitmaps("fmt-d0"), await vm.bitmaps("fmt-d1")) == before


async def test_bitmaps_of_others_are_never_touched(qemu: QemuBinary, tmpfs: Path) -> None:
    bench = bench_in(tmpfs)
    foreign = ["libvirt-1", f"fleece-{TARGET}", f"fleece-11111111-{disk_id(D0)}-5", f"fleece-11111111-{disk_id(D0)}-6"]
    async with vm_of(qemu, tmpfs) as vm:
        for name in foreign:
            await vm.execute("block-dirty-bitmap-add", {"node": "fmt-d0", "name": name})
        await vm.execute("block-dirty-bitmap-disable", {"node": "fmt-d0", "name": foreign[2]})
        before = await vm.bitmaps("fmt-d0")
        await bench.backup(vm)
        await bench.backup(vm, commit=False)
        await bench.backup(vm)
        mine = BitmapName(TARGET, disk_id(D0), bench.store.base or 0)
        after = [entry for entry in await vm.bitmaps("fmt-d0") if entry["name"] != str(mine)]
        assert sorted(after, key=str) == sorted(before, key=str)


async def test_a_busy_bitmap_is_left_alone(qemu: QemuBinary, tmpfs: Path) -> None:
    bench = bench_in(tmpfs)
    async with vm_of(qemu, tmpfs) as vm:
        await bench.backup(vm)
        old = BitmapName(TARGET, disk_id(D1), bench.store.base or 0)
        # Somebody else's backup job uses it (against all advice).
        await vm.execute("blockdev-add", {"driver": "null-co", "node-name": "sink", "size": 20 * MIB})
        job = {"job-id": "other", "device": "fmt-d1", "target": "sink", "sync": "incremental", "bitmap": str(old)}
        await vm.qemu_io("d1", "write -P 1 0 16M")
        await vm.execute("blockdev-backup", {**job, "speed": 1})
        only_d0 = DiskSelection(include=["d0"])
        assert modes(await bench.backup(vm, disks=only_d0)) == {D0: "incremental"}
        (busy,) = [entry for entry in await vm.bitmaps("fmt-d1") if entry.get("name")]
        assert (busy["name"], busy["busy"]) == (str(old), True)


async def test_two_targets_of_one_vm_do_not_know_each_other(qemu: QemuBinary, tmpfs: Path) -> None:
    here, there = bench_in(tmpfs), Bench(tmpfs / "w")
    there.store.clock += 1000
    async with vm_of(qemu, tmpfs) as vm:
        await here.backup(vm)
        await vm.qemu_io("d1", "write -P 1 0 1M")
        assert modes(await there.backup(vm, target="11111111")) == {D0: "first backup", D1: "first backup"}
        await vm.qemu_io("d1", "write -P 2 8M 1M")
        assert (await here.backup(vm))[D1].read == 8 * MIB
        assert (await there.backup(vm, target="11111111"))[D1].read == 4 * MIB
        assert len(await vm.bitmaps("fmt-d1")) == 2


@pytest.mark.parametrize(
    ("mode", "kept"),
    [
        (BitmapMode.PERSISTENT, {"fmt-d0": [True], "fmt-d1": [False]}),
        (BitmapMode.TRANSIENT, {"fmt-d0": [False], "fmt-d1": [False]}),
        (BitmapMode.NONE, {"fmt-d0": [], "fmt-d1": []}),
    ],
)
async def test_the_mode_says_where_bitmaps_are_kept(
    qemu: QemuBinary, tmpfs: Path, mode: BitmapMode, kept: dict[str, list[bool]]
) -> None:
    bench = bench_in(tmpfs)
    async with vm_of(qemu, tmpfs) as vm:
        await bench.backup(vm)
        await bench.backup(vm, bitmap_mode=mode)
        assert bench.warnings == []
        found = {node: [entry["persistent"] for entry in await vm.bitmaps(node)] for node in kept}
        assert found == kept


async def test_old_qcow2_gets_a_transient_bitmap(qemu: QemuBinary, tmpfs: Path) -> None:
    bench = bench_in(tmpfs)
    await make_qcow2(qemu, tmpfs / "old", 8 * MIB, "-o", "compat=0.10")
    async with RunningQemu.start(qemu, [VmDisk(tmpfs / "old", "d0", format="qcow2")]) as vm:
        await bench.backup(vm)
        (entry,) = await vm.bitmaps("fmt-d0")
        assert not entry["persistent"]
        assert modes(await bench.backup(vm)) == {D0: "incremental"}


async def test_the_preview_says_what_the_backup_then_does(qemu: QemuBinary, tmpfs: Path) -> None:
    bench = bench_in(tmpfs)
    async with vm_of(qemu, tmpfs) as vm:

        async def look() -> dict[str, tuple[str, str, int]]:
            async with connect(vm.qmp) as qmp:
                found = await DiskSelection().survey(qmp)
                shown = await preview(qmp, found.disks, TARGET, bench.store.base_of, bench.store.is_finished)
            assert all((one.bitmap is None) == (one.mode == "full") for one in shown)
            return {one.name: (one.mode, one.reason, one.bytes) for one in shown}

        full = ("full", "first backup", 20 * MIB)
        assert await look() == {D0: full, D1: full}
        await bench.backup(vm)
        await vm.qemu_io("d0", "write -P 2 7M 2M")
        incremental = {D0: ("incremental", "", 8 * MIB), D1: ("incremental", "", 0)}
        assert await look() == incremental
        before = await vm.bitmaps("fmt-d0")
        assert await look() == incremental
        assert await vm.bitmaps("fmt-d0") == before
        reads = await bench.backup(vm)
        assert {name: read.read for name, read in reads.items()} == {D0: 8 * MIB, D1: 0}
        await pair_of_an_interrupted_run(vm, bench)
        assert (await look())[D0] == ("incremental", "", 8 * MIB)
        async with bench.view(vm):
            assert (await look())[D0] == ("full", "another backup runs, or one was killed", 20 * MIB)
