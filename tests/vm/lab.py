"""A laboratory for backups of running VMs by the real command: disks, VMs, what they must contain, what must not stay.

    async def test_something(qemu: QemuBinary, lab: Lab) -> None:
        disks = [VmDisk(lab.raw("a", 24 * MIB), "disk0"), VmDisk(await lab.qcow2(qemu, "b", 12 * MIB), "disk1", ...)]
        async with lab.vm(qemu, disks) as vm:
            played = PlayedGuest(vm, {"disk0": 24 * MIB, "disk1": 12 * MIB})
            await played.write("disk0", 0x11, 0, MIB)
            report = await lab.backup(vm)
            await lab.assert_restores(report, played.images())

`lab.vm` compares QEMU before and after, the fixture `nothing_left` compares the host.
"""

import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from datastore.names import parse_time
from hypervisor.bitmaps import GRANULARITY, BitmapName
from tests.support.fleece_command import FleeceCommand, Outcome
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import QmpRefused, RunningQemu, VmDisk

MIB: Final = 1 << 20
CHUNK: Final = 4 * MIB
#: Seconds for a process that thaws a guest to end after its parent.
_STRAGGLERS_S: Final = 15.0


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait until `condition` is true.

    Raises:
        TooSlowError: not within `timeout_s`.
    """
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110 - another process makes it true
            await trio.sleep(0.02)


async def until_exports(vm: RunningQemu, prefix: str, *, there: bool) -> None:
    """Wait until an export whose id begins with `prefix` is there, or none is any more."""
    with trio.fail_after(60):
        while any(export["id"].startswith(prefix) for export in await vm.exports()) != there:  # noqa: ASYNC110
            await trio.sleep(0.02)


@dataclass
class NothingLeft:
    """What may not be there after a test: of QEMU compared before and after, of the host found empty."""

    fleece: FleeceCommand
    scratch: Path

    async def facts(self, vm: RunningQemu) -> dict[str, Any]:
        """What a backup may not change in QEMU, but for Fleece's own bitmaps."""
        listed = await vm.execute("query-named-block-nodes", {"flat": True})
        devices = await vm.execute("query-block")
        return {
            "nodes": sorted(node["node-name"] for node in listed),
            "roots": {device["qdev"]: device["inserted"]["node-name"] for device in devices if device.get("inserted")},
            "foreign bitmaps": sorted(
                (node["node-name"], bitmap["name"], bitmap["recording"])
                for node in listed
                for bitmap in node.get("dirty-bitmaps", ())
                if not str(bitmap.get("name", "")).startswith("fleece-")
            ),
            "exports": await vm.exports(),
            "jobs": await vm.execute("query-jobs"),
            "open images": self._open_images(vm.pid),
            "NBD server": await _nbd_server(vm),
        }

    async def check(self, vm: RunningQemu, before: dict[str, Any]) -> None:
        """QEMU is as it was, and every disk has at most one bitmap of each target, which records."""
        assert await self.facts(vm) == before
        found = set()
        for node in await vm.execute("query-named-block-nodes", {"flat": True}):
            for bitmap in node.get("dirty-bitmaps", ()):
                name = BitmapName.parse(str(bitmap.get("name")))
                if name is None:
                    continue
                assert (node["node-name"], name.target, name.disk) not in found, f"two bitmaps on {node['node-name']}"
                found.add((node["node-name"], name.target, name.disk))
                assert bitmap["granularity"] == GRANULARITY
                assert (bitmap["recording"], bitmap["busy"], bitmap.get("inconsistent", False)) == (True, False, False)

    async def check_host(self) -> None:
        """No process, no socket, no lock, no state, no fleecing image, no temporary file, no half snapshot."""
        with suppress(trio.TooSlowError):
            await until(lambda: not self.fleece.processes(), _STRAGGLERS_S)
        assert self.fleece.processes() == []
        # Locks of `[limits]` stay; their files are empty.
        slots = self.fleece.run_dir / "slots"
        assert [path for path in _files(self.fleece.run_dir) if slots not in (path, path.parent)] == []
        assert _files(self.scratch) == []
        store = self.fleece.repo
        snapshots = [folder for folder in store.glob("vm/*/*") if folder.is_dir()]
        unfinished = [folder for folder in snapshots if not (folder / "index.json.blob").exists()]
        assert unfinished == []
        left = [path for path in _files(store / "vm") if "tmp" in path.name.lower()]
        assert left == []

    def check_chunk_folders(self) -> None:
        """No temporary file of a chunk is left; takes a look at 65536 folders."""
        assert _odd_chunk_files(self.fleece.repo / ".chunks") == []

    def _open_images(self, pid: int) -> list[str]:
        found = []
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)  # noqa: PTH115 - "(deleted)" is part of it
            if target.startswith(str(self.scratch)) or target.startswith(str(self.fleece.run_dir)):
                found.append(target)
        return found


async def _nbd_server(vm: RunningQemu) -> str:
    """Whether an NBD server runs; there is no other way to ask than to stop it."""
    try:
        await vm.execute("nbd-server-stop")
    except QmpRefused as refused:
        return "none" if "not running" in str(refused) else str(refused)
    return "was running"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name != ".fleece"] if folder.is_dir() else []


def _odd_chunk_files(chunks: Path) -> list[str]:
    """Files that are no chunks, in the chunk folders that were written to (the pool gives them with the time 0)."""
    used = [entry.path for entry in os.scandir(chunks) if entry.stat().st_mtime_ns]
    return [path for folder in used for path in os.listdir(folder) if len(path) != 64]  # noqa: PTH208


@dataclass
class Lab:
    """The command, a store, and a folder in memory for disks and scratch."""

    folder: Path
    fleece: FleeceCommand
    nothing_left: NothingLeft
    more: dict[str, str] = field(default_factory=dict)  #: further lines of the sections, by the VM's id
    _ids: set[str] = field(default_factory=set)

    def raw(self, name: str, size: int) -> Path:
        """A sparse raw image of zeros."""
        path = self.folder / f"{name}.raw"
        with path.open("wb") as file:
            file.truncate(size)
        return path

    async def qcow2(self, binary: QemuBinary, name: str, size: int, *options: str) -> Path:
        """An empty qcow2 image."""
        path = self.folder / f"{name}.qcow2"
        await trio.run_process([binary.img, "create", "-q", "-f", "qcow2", *options, str(path), str(size)])
        return path

    @asynccontextmanager
    async def vm(self, binary: QemuBinary, disks: Sequence[VmDisk], **options: Any) -> AsyncIterator[RunningQemu]:
        """As `RunningQemu.start`; if it still runs at the end it must be as it was at the beginning."""
        # A QEMU that starts within the second of the last backup is not known to have been restarted.
        await trio.sleep(max([0.0, *(ctime + 1.1 - time.time() for ctime in self.finished())]))
        options.setdefault("memory_mib", 256 if options.get("guest") else 64)
        async with RunningQemu.start(binary, disks, **options) as vm:
            before = await self.nothing_left.facts(vm)
            yield vm
            if vm.alive():
                await self.nothing_left.check(vm, before)

    def arguments(self, vm: RunningQemu, id: str = "web") -> tuple[str, ...]:
        """What names the VM on the command line of `fleece vm`."""
        if id not in self._ids:
            self._ids.add(id)
            # The scratch folder may be on the file system of the disks: both lie in memory.
            sections = [
                f"[vm.{known}]\nscratch-beside-disks = true\n{self.more.get(known, '')}" for known in sorted(self._ids)
            ]
            self.fleece.config.write_text(f'scratch = "{self.nothing_left.scratch}"\n' + "".join(sections))
        return "--qmp", str(vm.qmp), "--id", id

    async def try_backup(self, vm: RunningQemu, *more: str | Path, id: str = "web") -> Outcome:
        """`fleece vm backup` to its end, however that is."""
        return await self.fleece.run("vm", "backup", *self.arguments(vm, id), *more)

    async def backup(self, vm: RunningQemu, *more: str | Path, id: str = "web", code: int = 0) -> Outcome:
        """`fleece vm backup` that must end with `code`, 3 with warnings."""
        outcome = await self.try_backup(vm, *more, id=id)
        assert outcome.code == code, outcome
        assert bool(outcome.document.get("warnings")) == (code == 3)
        return outcome

    @asynccontextmanager
    async def stopped_backup(self, vm: RunningQemu, point: str, *more: str, id: str = "web") -> AsyncIterator[Any]:
        """A backup that has stopped at `point`; for a `RunningFleece`'s `kill` or `go_on`."""
        async with self.fleece.start("vm", "backup", *self.arguments(vm, id), *more, stop_at=point) as running:
            await running.stopped()
            yield running

    async def show(self, vm: RunningQemu, id: str = "web") -> dict[str, Any]:
        """The disks of `fleece vm show` by archive name."""
        document = await self.fleece.json("vm", "show", *self.arguments(vm, id))
        return {disk["name"]: disk for disk in document["disks"]}

    async def snapshots(self) -> list[str]:
        """What `fleece list` shows, oldest first."""
        return [entry["snapshot"] for entry in await self.fleece.json("list")]

    def finished(self) -> list[int]:
        """The backup times of all finished snapshots, by a quick look into the store."""
        return [parse_time(path.parent.name) for path in self.fleece.repo.glob("vm/*/*/index.json.blob")]

    async def restored(self, snapshot: str) -> Path:
        """The folder into which all of `snapshot` was restored; the caller or the end of the test removes it."""
        folder = self.folder / ("restored-" + snapshot.replace("/", "-").replace(":", ""))
        outcome = await self.fleece.run("restore", snapshot, "--all", folder)
        assert outcome.code == 0, outcome
        return folder

    async def assert_restores(self, report: Outcome | str, expected: dict[str, bytes]) -> None:
        """The images of a snapshot, restored, are `expected` byte for byte, and no more."""
        snapshot = report if isinstance(report, str) else report.document["snapshot"]
        folder = await self.restored(snapshot)
        try:
            images = {path.name: path for path in folder.iterdir() if path.name.endswith(".img")}
            assert set(images) == set(expected)
            for name, path in images.items():
                content = path.read_bytes()
                if content != expected[name]:
                    assert len(content) == len(expected[name])
                    chunks = range(0, len(content), CHUNK)
                    bad = [at // CHUNK for at in chunks if content[at : at + CHUNK] != expected[name][at : at + CHUNK]]
                    raise AssertionError(f"{snapshot}, {name}: chunks {bad} are not those of the instant")
        finally:
            shutil.rmtree(folder)

    async def assert_verifies(self) -> None:
        """`fleece verify` finds no fault in any snapshot."""
        results = await self.fleece.json("verify")
        assert [result["state"] for result in results] == ["ok"] * len(results)
        assert len(results) == len(await self.snapshots())


class PlayedGuest:
    """Plays the guest of a machine that stands still, and knows what its disks must contain."""

    def __init__(self, vm: RunningQemu, sizes: dict[str, int]) -> None:
        self.vm = vm
        self.now = {name: bytearray(size) for name, size in sizes.items()}

    @classmethod
    def going_on(cls, vm: RunningQemu, before: "PlayedGuest") -> "PlayedGuest":
        """The same disks in another QEMU."""
        guest = cls(vm, {})
        guest.now = before.now
        return guest

    async def write(self, disk: str, pattern: int, offset: int, length: int) -> None:
        """Fill a range with a byte."""
        await self.vm.qemu_io(disk, f"write -P {pattern} {offset} {length}")
        self.now[disk][offset : offset + length] = bytes([pattern]) * length

    async def zero(self, disk: str, offset: int, length: int) -> None:
        """Write zeros, deallocating where the image can."""
        await self.vm.qemu_io(disk, f"write -z -u {offset} {length}")
        self.now[disk][offset : offset + length] = bytes(length)

    async def flush(self) -> None:
        """Have everything written out, as a guest does that must not lose it in a crash."""
        for disk in self.now:
            await self.vm.qemu_io(disk, "flush")

    async def grow(self, disk: str, size: int) -> None:
        """Make the disk longer, as `block_resize` of an administrator does."""
        root = (await self.vm.block_info(disk))["inserted"]["node-name"]
        await self.vm.execute("block_resize", {"node-name": root, "size": size})
        self.now[disk] += bytes(size - len(self.now[disk]))

    async def reads_back(self) -> None:
        """The guest itself still sees on every disk what it wrote, and QEMU runs as if nothing had happened."""
        assert (await self.vm.execute("query-status"))["status"] in ("prelaunch", "running")
        for disk, image in self.now.items():
            for offset in range(0, len(image), MIB):
                pattern = image[offset]
                part = image[offset : offset + MIB]
                if part == bytes([pattern]) * len(part):
                    await self.vm.qemu_io(disk, f"read -P {pattern} {offset} {len(part)}")

    def images(self) -> dict[str, bytes]:
        """What a backup at this moment must hold, by archive name."""
        return {f"drive-{name}.img": bytes(image) for name, image in self.now.items()}
