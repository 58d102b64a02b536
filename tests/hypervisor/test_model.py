"""The model test: a backup holds the state of its instant T, byte for byte, full or incremental.

Whatever a guest writes, zeroes or discards before, between and after its steps, over successes and failures in any
order, and whichever flavour makes the view.
"""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from core.errors import FleeceError
from hypervisor.errors import QmpCommandError, QmpLostError
from hypervisor.fleecing import Fleecing
from hypervisor.qmp import Qmp
from hypervisor.vm import cleanup
from tests.hypervisor.fleecing_bench import MIB, Bench, facts, make_qcow2, read_disk
from tests.support.proxmox_qemu import ProxmoxQemu
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk

SECTOR = 512
CLUSTER = 65536


class GuestModel:
    """Does random things to the disks and knows what they must contain."""

    def __init__(self, vm: RunningQemu, sizes: dict[str, int], rng: random.Random) -> None:
        self.vm, self.rng = vm, rng
        self.now = {name: bytearray(size) for name, size in sizes.items()}
        self.filtered = False  #: discards of the guest are dropped while a backup runs
        self.discards = True  #: there are any

    async def some(self, count: int) -> None:
        for _ in range(self.rng.randint(0, count)):
            await self.one()

    async def one(self) -> None:
        name = self.rng.choice(sorted(self.now))
        image = self.now[name]
        kinds = ["write", "write", "write", "write -z", "write -z -u", "discard"]
        kind = self.rng.choice(kinds if self.discards else kinds[:-1])
        unit = CLUSTER if kind == "discard" else SECTOR
        blocks = len(image) // unit
        longest = max(1, min(blocks, self.rng.choice([SECTOR, 4096, CLUSTER, MIB, 5 * MIB]) // unit))
        length = self.rng.randint(1, longest) * unit
        offset = self.rng.randint(0, blocks - length // unit) * unit
        if unit == SECTOR and self.rng.random() < 0.2:
            offset = len(image) - length  # ends of disks are special
        if kind == "write":
            pattern = self.rng.randint(1, 255)
            await self.vm.qemu_io(name, f"write -P {pattern} {offset} {length}")
            image[offset : offset + length] = bytes([pattern]) * length
        else:
            await self.vm.qemu_io(name, f"{kind} {offset} {length}")
            if kind != "discard" or not self.filtered:
                image[offset : offset + length] = bytes(length)

    def copy(self) -> dict[str, bytes]:
        return {f"drive-{name}.img": bytes(image) for name, image in self.now.items()}


@dataclass
class Faults:
    """Has QEMU refuse a command now and then, or go away before or after it."""

    rng: random.Random
    at: int | None = None  #: number of the command at fault, counted down; None: no fault
    kind: str = ""
    met: int = 0

    def plan(self, *, set_up: bool) -> None:
        """A fault somewhere in the set-up that begins now, or in the end."""
        self.at = self.rng.randint(0, 60 if set_up else 25)
        self.kind = self.rng.choice(["refuse", "lose", "lose-after"])

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand between Fleece and QEMU."""
        execute, lost = Qmp.execute, set[Qmp]()

        async def faulty(qmp: Qmp, command: str, *arguments: Any, **more: Any) -> Any:
            if command in ("query-version", "query-commands"):
                return await execute(qmp, command, *arguments, **more)
            here = self.at == 0
            self.at = None if self.at in (None, 0) else self.at - 1
            self.met += here
            if here and self.kind == "refuse":
                raise QmpCommandError(qmp.where, command, "GenericError", "planned by the test")
            if here and self.kind == "lose":
                lost.add(qmp)
            if qmp in lost:
                raise QmpLostError(f"run {command} in", qmp.where, "planned by the test")
            answer = await execute(qmp, command, *arguments, **more)
            if here:
                lost.add(qmp)
                raise QmpLostError(f"run {command} in", qmp.where, "planned by the test, after it was done")
            return answer

        monkeypatch.setattr(Qmp, "execute", faulty)


async def run_model(
    qemu: QemuBinary,
    tmpfs: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounds: int,
    seed: int,
    *,
    proxmox: bool = False,
    faulty: bool = False,
    threads: bool = False,
) -> dict[str, int]:
    """`rounds` backups, by the double of Proxmox VE's QEMU or the stock one; returns how often what was seen.

    With `faulty` commands fail at random, in the set-up and at the end; with `threads` disks are served by threads of
    their own.
    """
    rng = random.Random(seed)
    sizes = {"d0": 61 * MIB + 512 * rng.randint(0, 300), "d1": 13 * MIB + 512 * rng.randint(0, 300), "d2": 8 * MIB}
    await make_qcow2(qemu, tmpfs / "d0", sizes["d0"])
    for name in ("d1", "d2"):
        with (tmpfs / name).open("wb") as file:
            file.truncate(sizes[name])
    own, extra = ("iothread=io0", "bus=scsi1.0", "iothread=io2") if threads else ("", "", ""), list[str]()
    if threads:
        extra += [word for number in range(3) for word in ("-object", f"iothread,id=io{number}")]
        extra += ["-device", "virtio-scsi-pci,id=scsi1,iothread=io1"]
    disks = [
        VmDisk(tmpfs / "d0", "d0", format="qcow2", device_options=own[0]),
        VmDisk(tmpfs / "d1", "d1", bus="virtio-scsi", device_options=own[1]),
        VmDisk(tmpfs / "d2", "d2", form="drive", device_options=own[2]),
    ]
    bench = Bench(tmpfs / "w")
    bench.folder.mkdir()
    seen = {"full": 0, "incremental": 0, "committed": 0, "failed": 0, "clean": 0, "zeros": 0, "faults": 0}
    step = Fleecing._step
    faults = Faults(rng)
    faults.install(monkeypatch)
    monkeypatch.setattr("hypervisor.fleecing._MAP_TIMEOUT_S", 5.0)  # for an export whose end is refused
    async with (
        RunningQemu.start(qemu, disks, extra=extra, lifetime_s=1500) as vm,
        ProxmoxQemu.before(vm) if proxmox else nullcontext(),
    ):
        model = GuestModel(vm, sizes, rng)
        # What a fault leaves drops discards until the next backup has removed it.
        model.discards = not faulty
        before = await facts(vm, bench)
        at_t: dict[str, bytes] = {}

        async def busy_step(self: Fleecing, phase: str, **more: Any) -> None:
            await step(self, phase, **more)
            # From the pass-through nodes on, discards are dropped.
            model.filtered |= phase == "add the copy-before-write filters"
            if phase not in ("add the pass-through nodes", "switch the devices to them", "undo"):
                await model.some(2)

        async def at_instant(_qmp: object) -> None:
            model.filtered = True
            at_t.update(model.copy())
            await model.some(3)

        monkeypatch.setattr(Fleecing, "_step", busy_step)
        for number in range(rounds):
            await model.some(5)
            new_id = bench.store.next_id()
            commit = rng.random() < 0.6
            committed = False
            if faulty and rng.random() < 0.4:
                faults.plan(set_up=True)
            with monkeypatch.context() as patch:
                patch.setattr(model, "filtered", False)
                try:
                    async with bench.view(vm, new_id, at_instant=at_instant) as view:
                        whole = rng.random() < 0.8
                        for source in view.sources:
                            old = bench.store.images.get(source.name)
                            read = await read_disk(source, old, lambda: model.some(2), rng)
                            assert read.image == at_t[source.name], (
                                f"seed {seed} round {number} {source.name} {read.mode}: chunks "
                                f"{different(read.image, at_t[source.name])} are not those of T"
                            )
                            seen[read.mode] += 1
                            seen["zeros"] += read.zeros > 0
                            seen["clean"] += read.read + read.zeros < source.size
                            if not whole:
                                raise Interrupted
                        if not commit:
                            raise Interrupted
                        bench.store.images = dict(at_t)
                        bench.store.base = new_id
                        bench.store.finished.add(new_id)
                        view.commit()
                        committed = True
                        seen["committed"] += 1
                        if faulty and rng.random() < 0.3:
                            faults.plan(set_up=False)
                except Interrupted:
                    seen["failed"] += 1
                except FleeceError:
                    # What it says need not be the fault: a refused end of an export shows in that it does not go.
                    if faults.met == seen["faults"]:
                        raise
                    seen["failed"] += not committed
                else:
                    assert faulty or view.warnings == []
                seen["faults"], faults.at = faults.met, None
        monkeypatch.setattr(Fleecing, "_step", step)
        if faulty:
            await cleanup(vm.qmp, run_dir=bench.run_dir, scratch=bench.folder / "scratch")
        after = await facts(vm, bench)
        # While the machine stands still, QEMU before 9.1 keeps a set of descriptors that was taken back.
        not_gone: dict[str, Any] = {"fds": []} if faulty and qemu.version < (9, 1, 0) else {}
        assert {**after, "files": [], **not_gone} == {**before, "files": [], **not_gone}
        assert list(bench.run_dir.iterdir()) == []
        assert list((bench.folder / "scratch").iterdir()) == []
    return seen


class Interrupted(Exception):  # noqa: N818 - a backup that is given up
    pass


def different(one: bytes, other: bytes) -> list[int]:
    step = 4 * MIB
    return [at // step for at in range(0, len(other), step) if one[at : at + step] != other[at : at + step]]


async def test_every_backup_holds_the_state_of_its_instant(
    qemu: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch, rounds: Callable[[int], int]
) -> None:
    seen = await run_model(qemu, tmpfs, monkeypatch, rounds(20), seed=7)
    assert seen["committed"]
    assert seen["failed"]
    assert seen["incremental"]
    assert seen["clean"]
    assert (seen["zeros"] > 0) == (qemu.version >= (8, 2, 0))


async def test_every_backup_by_the_commands_of_proxmox_holds_the_state_of_its_instant(
    qemu: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch, rounds: Callable[[int], int]
) -> None:
    seen = await run_model(qemu, tmpfs, monkeypatch, rounds(12), seed=3, proxmox=True)
    assert seen["committed"]
    assert seen["failed"]
    assert seen["incremental"]
    assert seen["clean"]


@pytest.mark.parametrize("proxmox", [False, True])
async def test_disks_with_threads_of_their_own_are_no_exception(
    backports: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch, proxmox: bool
) -> None:
    seen = await run_model(backports, tmpfs, monkeypatch, 4, seed=5, proxmox=proxmox, threads=True)
    assert seen["committed"]
    assert seen["incremental"]


@pytest.mark.parametrize("proxmox", [False, True])
async def test_backups_hold_the_state_of_their_instants_whatever_step_fails(
    qemu: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch, rounds: Callable[[int], int], proxmox: bool
) -> None:
    count = rounds(12)
    seen = await run_model(qemu, tmpfs, monkeypatch, count, seed=1, proxmox=proxmox, faulty=True)
    assert seen["committed"] + seen["failed"] == count
    if count == 12:
        assert seen["faults"]
        assert seen["incremental"]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
async def test_hundreds_of_backups_hold_the_state_of_their_instants(
    qemu: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    seen = await run_model(qemu, tmpfs, monkeypatch, 40, seed)
    assert seen["incremental"]


@pytest.mark.long
@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("proxmox", [False, True])
async def test_hundreds_of_backups_of_each_flavour_with_and_without_faults(
    qemu: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch, seed: int, proxmox: bool, faulty: bool
) -> None:
    seen = await run_model(qemu, tmpfs, monkeypatch, 40, 100 + seed, proxmox=proxmox, faulty=faulty)
    assert seen["incremental"]


@pytest.mark.long
@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("proxmox", [False, True])
async def test_hundreds_of_backups_of_disks_with_threads_of_their_own(
    backports: QemuBinary, tmpfs: Path, monkeypatch: pytest.MonkeyPatch, seed: int, proxmox: bool, faulty: bool
) -> None:
    seen = await run_model(backports, tmpfs, monkeypatch, 40, 200 + seed, proxmox=proxmox, faulty=faulty, threads=True)
    assert seen["incremental"]
