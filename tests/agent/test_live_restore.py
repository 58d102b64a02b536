"""Machines that run while their disks come in: under writes, with servers and processes that are lost on the way."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from agent import live_restore
from agent.live_restore import LiveOptions, held, prepare
from agent.live_state import STATE_NAME, LiveState
from agent.nbd_offers import ImageDisk
from agent.places import private_run_dir
from agent.vm_restore import RestoreOrder
from agent.vm_script import ScriptOptions
from core.buffers import Buffer
from core.errors import BusyError, NotFoundError, TargetError, UsageError
from core.progress import Progress
from hypervisor.errors import DiskInUseError, NbdServerError, VmStateError
from hypervisor.live_restore import LiveDisk
from hypervisor.machine import Backing
from tests.support.guest import GuestControl, SmallGuest
from tests.support.loop_devices import loop_device
from tests.support.nbd_servers import NEEDS_NBDKIT_PYTHON
from tests.support.qemu_binaries import QemuBinary
from tests.support.ring import BLOCK, Ring
from tests.support.running import OwnQmp, RunningQemu, VmDisk
from tests.support.waiting import until

from .conftest import Fleece
from .live_machines import (
    CHUNK,
    CLUSTER,
    COMMAND,
    CONTENT,
    FILES,
    SIZE,
    Gate,
    Machine,
    ended,
    nbdkits,
    opened,
)

pytestmark = NEEDS_NBDKIT_PYTHON


@pytest.fixture(autouse=True)
def own_places(monkeypatch: pytest.MonkeyPatch, tmpfs: Path) -> None:
    monkeypatch.setenv("FLEECE_RUN_DIR", str(tmpfs / "r"))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    one = Gate(until=CHUNK)

    class Gated(ImageDisk):
        async def read(self, offset: int, length: int) -> Buffer:
            if offset + length > one.until:
                await one.opened.wait()
            if self.size == SIZE:
                await trio.sleep(one.delay_s)
            return await super().read(offset, length)

    monkeypatch.setattr(live_restore, "ImageDisk", Gated)
    return one


@pytest.fixture
async def machine_of(store_folder: Path, tmpfs: Path) -> AsyncIterator[Callable[[QemuBinary, str], Machine]]:
    made: list[Machine] = []

    def make(qemu: QemuBinary, format: str) -> Machine:
        made.append(Machine(store_folder, tmpfs / "m", qemu, format))
        return made[-1]

    yield make
    for machine in made:
        pid = machine.folder / "run/qemu.pid"
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)


MakeMachine = Callable[[QemuBinary, str], Machine]


def can_be_read(qemu: QemuBinary, image: Path) -> bool:
    line = [qemu.img, "convert", "-f", "qcow2", "-O", "raw", str(image), os.devnull]
    return subprocess.run(line, capture_output=True).returncode == 0


@pytest.mark.parametrize("format", ["qcow2", "raw"])
async def test_a_machine_runs_and_writes_while_servers_and_processes_are_lost(
    qemu: QemuBinary, machine_of: MakeMachine, gate: Gate, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server that is away for longer stops the guest until QMP lets it go on, and QMP waits for the writes made here.
    monkeypatch.setattr("hypervisor.live_restore.RECONNECT_S", 300)
    machine = machine_of(qemu, format)
    expected = bytearray(CONTENT)
    chance = random.Random(4)
    number = 0

    async def writes() -> None:
        nonlocal number
        commands = []
        for _ in range(5):
            number += 1
            # A write to what is being copied waits for it: the second chunk is for long, and others may be meanwhile.
            clusters = [one for one in range(SIZE // CLUSTER) if gate.until == SIZE or one // 64 > 2]
            offset = chance.choice(clusters) * CLUSTER
            commands.append(f"write -P {number} {offset} {CLUSTER}")
            expected[offset : offset + CLUSTER] = bytes([number]) * CLUSTER
        await machine.write(*commands)

    async with machine.restoring() as (scope, told):
        assert (told["name"], told["was-running"]) == ("web", False)
        await writes()
        assert not (machine.folder / "start.sh").exists()
        (first,) = nbdkits()
        # Of a map that cannot be had QEMU's `block-stream` makes a range that it takes for copied: there is none.
        assert b"--no-sr" in Path(f"/proc/{first}/cmdline").read_bytes().split(b"\0")
        os.kill(first, signal.SIGKILL)
        # These writes hold QEMU's main loop, and 7.2 sometimes does not notice then that the server is there again: a
        # guest's do not, and the long tests have one.
        await until(lambda: len(nbdkits()) == 1 and nbdkits() != [first])
        await writes()
        assert not machine.whole
        scope.cancel()
    assert nbdkits() == []
    await writes()
    gate.open()
    async with machine.restoring() as (_, told):
        assert told["was-running"]
        await writes()
    assert machine.whole
    assert nbdkits() == []
    await writes()
    async with machine.qmp() as qmp:
        assert (await qmp.execute("query-status"))["status"] == "prelaunch"
        nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
        assert [node["node-name"] for node in nodes if not node["node-name"].startswith("#")] == ["disk0"]
    await machine.quit()
    assert machine.content() == bytes(expected)
    assert sorted(path.name for path in machine.folder.iterdir()) == [
        "as-raw", machine.target.name, "qemu-command.json", "run", "start.sh",
    ]  # fmt: skip


async def test_a_machine_that_was_killed_is_started_again_with_what_it_had_written(
    distribution: QemuBinary, machine_of: MakeMachine, gate: Gate
) -> None:
    machine = machine_of(distribution, "qcow2")
    with pytest.raises(VmStateError, match=r"QEMU has ended before .* --resume"):
        async with machine.restoring():
            await machine.write(f"write -P 7 {3 * CHUNK} 64k", "flush")
            os.kill(int((machine.folder / "run/qemu.pid").read_text()), signal.SIGKILL)
    # Nobody takes the image for a whole one.
    assert not can_be_read(distribution, machine.target)
    gate.open()
    async with machine.restoring() as (_, told):
        assert not told["was-running"]
    await machine.quit()
    assert machine.content() == CONTENT[: 3 * CHUNK] + b"\7" * CLUSTER + CONTENT[3 * CHUNK + CLUSTER :]


#: Two disks, the first of which comes in at once and the second when the gate opens.
TWO = {
    "drive-disk0.img.fidx": bytes(CHUNK) + os.urandom(CLUSTER + 512),
    "drive-disk1.img.fidx": CONTENT,
    "qemu-command.json.blob": json.dumps(
        [*COMMAND, "-drive", "if=none,id=b,file=/old/b.raw", "-device", "virtio-blk-pci,drive=b,id=disk1"]
    ).encode(),
}


@pytest.fixture
def spare(tmpfs: Path) -> Iterator[Path]:
    """A block device of 12 MiB."""
    image = tmpfs / "spare.raw"
    image.write_bytes(bytes(12 << 20))
    with loop_device(image) as found:
        yield Path(found)


async def test_a_disk_that_has_gone_over_is_not_old_again_after_a_crash(
    qemu: QemuBinary, machine_of: MakeMachine, gate: Gate, spare: Path
) -> None:
    machine = machine_of(qemu, "raw")
    machine.files, machine.targets = TWO, {"disk0": str(spare)}  # larger than the disk, as logical volumes are
    gate.open()
    gate.delay_s = 0.5  # the second disk; a closed gate would hold a QEMU 10 that changes its graph

    async def gone_over() -> bool:
        async with machine.qmp() as qmp:
            nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
        return "disk0-live" not in {node["node-name"] for node in nodes}

    with pytest.raises(VmStateError, match="QEMU has ended before"):
        async with machine.restoring():
            async with machine.qmp() as qmp:
                while "fleece-r1" not in [one["device"] for one in await qmp.execute("query-block-jobs")]:  # noqa: ASYNC110
                    await trio.sleep(0.02)
                await qmp.execute("block-job-set-speed", {"device": "fleece-r1", "speed": 1})
            await machine.write("write -P 5 64k 64k")
            while not await gone_over():  # noqa: ASYNC110 - QEMU must be asked
                await trio.sleep(0.02)
            await machine.write("write -P 6 0 64k", "flush")  # this is nowhere but in the target
            await machine.kill()
    gate.delay_s = 0
    async with machine.restoring() as (_, told):
        assert not told["was-running"]
        async with machine.qmp() as qmp:
            sizes = {
                disk["inserted"]["node-name"]: disk["inserted"]["image"]["virtual-size"]
                for disk in await qmp.execute("query-block")
            }
        assert sizes["disk0"] == len(TWO["drive-disk0.img.fidx"])
    await machine.quit()
    expected = b"\6" * CLUSTER + b"\5" * CLUSTER + TWO["drive-disk0.img.fidx"][2 * CLUSTER :]
    assert spare.read_bytes()[: len(expected)] == expected
    assert (machine.folder / "drive-disk1.raw").read_bytes() == CONTENT


async def test_no_target_is_touched_before_all_were_looked_at(
    distribution: QemuBinary, machine_of: MakeMachine, tmpfs: Path, spare: Path
) -> None:
    machine = machine_of(distribution, "raw")
    mine, small = tmpfs / "mine.raw", tmpfs / "small.raw"
    mine.write_bytes(b"mine" * 4096)
    machine.files, machine.force = TWO, True
    machine.targets = {"disk0": str(mine), "disk1": str(spare)}
    with pytest.raises(TargetError, match="choose a larger one"):
        await machine.restore()
    small.write_bytes(bytes(512))
    machine.targets = {"disk0": str(mine), "disk1": str(small)}
    async with RunningQemu.start(distribution, [VmDisk(small, "held")]):
        with pytest.raises(DiskInUseError, match="in use"):
            await machine.restore()
    assert mine.read_bytes() == b"mine" * 4096
    assert not machine.folder.exists()


async def test_links_are_followed_and_stay_and_ends_within_a_sector_come_in(
    distribution: QemuBinary, machine_of: MakeMachine, tmpfs: Path
) -> None:
    machine = machine_of(distribution, "")
    # QEMU waits for ever for the rest of a sector, if the server has not all of it and no map.
    odd = {f"drive-disk{number}.img.fidx": os.urandom(CLUSTER + 100 + number) for number in range(2)}
    machine.files = TWO | odd
    links = [tmpfs / "link", tmpfs / "link.qcow2"]
    for link, name in zip(links, ("one.raw", "two.qcow2"), strict=True):
        (tmpfs / name).touch()
        link.symlink_to(name)
    machine.targets = {f"disk{number}": str(link) for number, link in enumerate(links)}
    machine.extra = ("-no-such-option",)
    with pytest.raises(VmStateError, match="no-such-option"):
        await machine.restore()
    assert [link.exists() for link in links] == [True, True]
    assert [(tmpfs / name).stat().st_size for name in ("one.raw", "two.qcow2")] == [0, 0]
    machine.extra = ("-S",)
    with trio.fail_after(60):
        await machine.restore()
    await machine.quit()
    assert (tmpfs / "one.raw").read_bytes() == odd["drive-disk0.img.fidx"] + bytes(412)
    assert links[1].is_symlink()
    line = [distribution.img, "convert", "-f", "qcow2", "-O", "raw", str(tmpfs / "two.qcow2"), str(tmpfs / "as-raw")]
    await trio.run_process(line)
    assert (tmpfs / "as-raw").read_bytes() == odd["drive-disk1.img.fidx"] + bytes(411)


async def test_a_job_that_fails_is_told_and_begun_anew(
    distribution: QemuBinary, machine_of: MakeMachine, spare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = machine_of(distribution, "raw")
    machine.files, machine.targets = TWO, {"disk0": str(spare)}
    monkeypatch.setattr("hypervisor.live_restore._AGAIN_S", 0.1)
    backing = LiveDisk.backing

    def of_another_size(disk: LiveDisk) -> Backing:
        found = backing(disk)
        for node in found.nodes:
            if node.get("node-name") == "disk0":
                node["size"] = 12 << 20  # type: ignore[index]
        return found

    monkeypatch.setattr(LiveDisk, "backing", of_another_size)
    async with machine.restoring() as (scope, _):
        await until(lambda: sum("different sizes" in line for line in machine.said) > 1)
        assert not machine.whole
        scope.cancel()


async def test_what_cannot_be_restored_live_leaves_nothing(
    distribution: QemuBinary, store_folder: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(store_folder, tmpfs / "m", distribution, "qcow2", extra=("-no-such-option",))
    line = [*COMMAND, "-tpmdev", "emulator,id=t,chardev=c", "-device", "tpm-crb,tpmdev=t"]
    machine.files = {**FILES, "qemu-command.json.blob": json.dumps(line).encode(), "tpm2-00.permall.blob": b"tpm"}
    with pytest.raises(VmStateError, match="no-such-option"):
        await machine.restore()
    assert not machine.folder.exists()
    with monkeypatch.context() as patched:
        patched.setattr("hypervisor.nbd_server._PLUGIN", tmpfs / "no-plugin")
        with pytest.raises(NbdServerError, match="no-plugin"):
            await machine.restore()
    assert not machine.folder.exists()
    order = RestoreOrder(folder=machine.folder, targets={"disk0": "nbd://127.0.0.1:1"})
    options = LiveOptions(script=ScriptOptions())
    async with opened(store_folder) as found:
        with pytest.raises(UsageError, match="cannot be filled while"):
            await prepare(found, order, options, Progress())
        machine.folder.mkdir()
        machine.target.write_bytes(b"mine")
        with pytest.raises(TargetError, match="exists with 4 bytes"):
            await prepare(found, RestoreOrder(folder=machine.folder, format="qcow2"), options, Progress())
        assert [path.name for path in machine.folder.iterdir()] == [machine.target.name]
        # What was in a folder of that name is not the restore's.
        (machine.folder / "run").mkdir()
        others = [machine.folder / name for name in ("run/daemon.pid", "qemu.log")]
        for path in others:
            path.write_text("1")
        with pytest.raises(TargetError, match="exists with 4 bytes"):
            await prepare(found, RestoreOrder(folder=machine.folder, format="qcow2"), options, Progress())
        assert all(path.exists() for path in others)
        forced = RestoreOrder(folder=machine.folder, format="qcow2", force=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as running:
            running.bind(str(machine.folder / "run/qmp.sock"))
            running.listen()
            with pytest.raises(BusyError, match="a machine runs there"):
                await prepare(found, forced, options, Progress())
        with monkeypatch.context() as patched:
            patched.setattr("hypervisor.nbd_server.shutil.which", lambda _name: None)
            with pytest.raises(NbdServerError, match="nbdkit is not installed"):
                await prepare(found, forced, options, Progress())
        assert machine.target.read_bytes() == b"mine"
        (machine.folder / STATE_NAME).write_text("{}")
        with pytest.raises(BusyError, match="a live restore is under way"):
            await prepare(found, order, options, Progress())


def test_what_is_written_down_is_checked(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no live restore is under way there"):
        LiveState.load(tmp_path)
    state = LiveState("vm/1/x", "", "web", str(tmp_path), [], [], {}, [], ["qemu"], "/q", {"path": None})
    state.save()
    assert LiveState.load(tmp_path) == state
    (tmp_path / "link").symlink_to(tmp_path)
    assert LiveState.load(tmp_path / "link") == state
    (tmp_path / "copy").mkdir()
    path = tmp_path / STATE_NAME
    shutil.copy(path, tmp_path / "copy")
    with pytest.raises(UsageError, match=rf"it was begun in {tmp_path}; 'fleece vm restore --resume {tmp_path}'"):
        LiveState.load(tmp_path / "copy")
    path.chmod(0o620)
    with pytest.raises(UsageError, match="others than its owner"):
        LiveState.load(tmp_path)
    path.chmod(0o600)
    for text in ("[]", "{", '{"version": 2}', '{"version": 1}', '{"version": 1, "disks": 3}'):
        path.write_text(text)
        with pytest.raises((UsageError, ValueError)):
            LiveState.load(tmp_path)


def test_one_process_fills_a_machine(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for same in (tmp_path, tmp_path / "link", tmp_path / ".." / tmp_path.name):
        with held(tmp_path), pytest.raises(BusyError, match="another process"), held(same):
            raise AssertionError
    with held(tmp_path):
        pass
    assert not list((private_run_dir() / "live").iterdir())


def the_command(
    stored: Fleece, folder: Path, disk: Path, qemu: QemuBinary, extra: Sequence[str], format: str
) -> list[str]:
    """Back `disk` up; the words that restore it live, with `extra` for QEMU."""
    stored.environment["FLEECE_RUN_DIR"] = str(folder / "r")  # a short path
    command = folder / "qemu-command.json"
    command.write_text(json.dumps(COMMAND))
    words = [f"drive-disk0.img:{disk}", f"qemu-command.json:{command}", "--backup-id", "web", "--backup-type", "vm"]
    stored.json("backup", *words)
    line = ["vm", "restore", "vm/web/latest", str(folder / "m"), "--live", "--format", format, "--accel", "tcg"]
    return [*line, "--qemu", qemu.system, *(f"--qemu-option={word}" for word in extra)]


def boots(guest: SmallGuest, folder: Path) -> list[str]:
    append = "no_timer_check console=ttyS0 quiet panic=-1"
    extra = ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", append, "-m", "256"]
    # The guest's first word waits for somebody who listens.
    return [*extra, "-chardev", f"socket,id=ctl,path={folder}/ctl,server=on,wait=off", "-serial", "chardev:ctl", "-S"]


@asynccontextmanager
async def guest_of(folder: Path, *, speed: int | None = None) -> AsyncIterator[tuple[GuestControl, OwnQmp]]:
    """The machine in `folder / "m"`, which has booted; its disk comes in with `speed` bytes a second at most."""
    control = await GuestControl.connect(folder / "ctl")
    qmp = await OwnQmp.connect(folder / "m/run/qmp.sock")
    try:
        if speed is not None:
            while not await qmp.execute("query-block-jobs"):  # noqa: ASYNC110 - QEMU must be asked
                await trio.sleep(0.01)
            await qmp.execute("block-job-set-speed", {"device": "fleece-r0", "speed": speed})
        await qmp.execute("cont")
        await control.ready()
        yield control, qmp
    finally:
        await qmp.aclose()
        await control.aclose()
        pid = folder / "m/run/qemu.pid"
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)


async def test_the_command_returns_when_the_machine_runs(
    stored: Fleece, tmpfs: Path, distribution: QemuBinary, machine_of: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmpfs / "disk.raw"
    disk.write_bytes(CONTENT)
    line = await trio.to_thread.run_sync(the_command, stored, tmpfs, disk, distribution, ["-S"], "qcow2")
    # Where a person calls it paths are meant from there, also in the process in the background.
    monkeypatch.chdir(tmpfs)
    line[line.index(str(tmpfs / "m"))] = "m"
    told = await trio.to_thread.run_sync(lambda: stored.json(*line, "--disk", "disk0=m/drive-disk0.qcow2"))
    assert [(one["name"], one["target"]) for one in told["disks"]] == [
        ("drive-disk0.img", str(tmpfs / "m/drive-disk0.qcow2"))
    ]
    assert told["folder"] == str(tmpfs / "m")
    machine = machine_of(distribution, "qcow2")
    await machine.write("write -P 3 0 64k")
    await until(lambda: machine.whole)
    await until(lambda: ended(told["pid"]))
    nothing = await trio.to_thread.run_sync(lambda: stored("vm", "restore", "--resume", tmpfs / "m"))
    assert nothing.code == 1
    assert "no live restore is under way there" in nothing.err
    await machine.quit()
    assert await trio.to_thread.run_sync(machine.content) == b"\3" * CLUSTER + CONTENT[CLUSTER:]


@pytest.mark.long
@pytest.mark.parametrize("format", ["qcow2", "raw"])
async def test_a_guest_notices_nothing_of_a_server_that_is_killed_for_long(
    stored: Fleece, tmpfs: Path, qemu: QemuBinary, guest: SmallGuest, format: str
) -> None:
    size = 400 * CHUNK
    disk = tmpfs / "disk.raw"
    with disk.open("wb") as file:
        for offset in range(0, size, 2 * CHUNK):
            file.seek(offset)
            file.write(os.urandom(CHUNK))
        file.truncate(size)
    ring = Ring(stride=CHUNK)
    line = await trio.to_thread.run_sync(the_command, stored, tmpfs, disk, qemu, boots(guest, tmpfs), format)
    told = await trio.to_thread.run_sync(lambda: stored.json(*line))
    stops = 0
    async with guest_of(tmpfs, speed=4 * CHUNK) as (control, qmp):
        await control.check(f"{ring.command('/dev/vda', told='/tmp/told')} >/tmp/said 2>&1 & echo $! >/tmp/pid")
        for pause_s in (1.0, 20.0):  # within the time for which QEMU waits, and beyond it
            assert (tmpfs / "m" / STATE_NAME).exists(), "the disk was too small to be still under way"
            os.kill(told["pid"], signal.SIGKILL)
            await trio.sleep(pause_s)
            stops += (await qmp.execute("query-status"))["status"] == "io-error"
            told = await trio.to_thread.run_sync(lambda: stored.json("vm", "restore", "--resume", tmpfs / "m"))
            assert told["was-running"]
        await qmp.execute("block-job-set-speed", {"device": "fleece-r0", "speed": 0})
        await until(lambda: not (tmpfs / "m" / STATE_NAME).exists(), 120)
        await until(lambda: ended(told["pid"]))
        await control.check("kill $(cat /tmp/pid); while kill -0 $(cat /tmp/pid); do sleep 0.1; done 2>/dev/null; true")
        newest = int(await control.check("od -An -tu8 /tmp/told"))
        errors = await control.run("dmesg | grep -i 'i/o error'")
        assert errors[0] != 0, errors[1]
        assert (await qmp.execute("query-status"))["status"] == "running"
        with contextlib.suppress(EOFError):
            await qmp.execute("quit")
        await until(lambda: not (tmpfs / "m/run/qemu.pid").exists())
    machine = Machine(Path(), tmpfs / "m", qemu, format)
    content = await trio.to_thread.run_sync(machine.content)
    numbers = ring.numbers(lambda offset, length: content[offset : offset + length])
    assert max(numbers) in (newest, newest + 1)
    before = disk.read_bytes()
    for offset in range(0, size, CHUNK):
        written = BLOCK if offset < ring.slots * CHUNK else 0
        assert content[offset + written : offset + CHUNK] == before[offset + written : offset + CHUNK], offset
