"""Virtual machines of Proxmox VE by the mechanism `nbd`: a real QEMU behind the double of its commands."""

import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from core.units import MIB
from hypervisor.unix_socket import process_start_time
from tests.provider.plugin import Died, Plugin, Worker
from tests.support.proxmox_job import TARGET_ID, BackupJob
from tests.support.proxmox_qemu import ProxmoxQemu
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk
from tests.support.waiting import until

pytestmark = [pytest.mark.qemu, pytest.mark.fuse]

SIZE: Final = 24 * MIB
CONFIG: Final = "scsi0: local:vm-100-disk-0\nname: grün\n"
FIREWALL: Final = "[OPTIONS]\n\nenable: 1\n"
START: Final = 1_700_000_000
DEVICES: Final = ("fmt-d0", "fmt-d1")


@dataclass
class Machine:
    """A VM, and the hypervisor's backup jobs of it."""

    vm: RunningQemu
    job: BackupJob
    images: list[Path]
    started: int = START
    modes: dict[str, str] = field(default_factory=dict)  #: what the last query said

    async def back_up(self, plugin: Plugin, *, limit: int = 0, mode: str | None = None) -> str:
        """One guest of a job, from `backup_init` to `backup_cleanup`; the name of the archive."""
        self.started += 60
        name: str = (await plugin("backup_init", 100, "qemu", self.started))["archive-name"]
        try:
            await self.hand_over(plugin, {"bandwidth-limit": limit, "firewall-config": FIREWALL}, mode)
        except BaseException as error:
            await plugin("backup_cleanup", 100, "qemu", 0, {"error": str(error)})
            raise
        done = await plugin("backup_cleanup", 100, "qemu", 1, {})
        assert done["stats"]["archive-size"] == 2 * SIZE + len(CONFIG.encode()) + len(FIREWALL)
        return name

    async def hand_over(self, plugin: Plugin, info: dict[str, Any], mode: str | None) -> None:
        """What lies between."""
        self.modes = await plugin("backup_vm_query_incremental", 100, {device: {"size": SIZE} for device in DEVICES})
        self.job.success = False
        modes = dict(self.modes) if mode is None else dict.fromkeys(DEVICES, mode)
        async with self.job.prepared(modes) as disks:
            await self.vm.qemu_io("d0", "write -P 99 23M 64k")  # after the instant
            volumes = {
                disk.device: {
                    "size": disk.size,
                    "bitmap-mode": disk.bitmap_mode.value,
                    "nbd-path": str(self.job.socket),
                    "bitmap-name": TARGET_ID,
                }
                for disk in disks
            }
            await plugin("backup_vm", 100, CONFIG, volumes, info)
            self.job.success = True

    def content(self) -> list[bytes]:
        """The disks as they are now: what QEMU writes is in the file at once."""
        return [image.read_bytes() for image in self.images]


@asynccontextmanager
async def machine(qemu: QemuBinary, folder: Path) -> AsyncIterator[Machine]:
    images = [folder / "d0", folder / "d1"]
    for number, image in enumerate(images):
        image.write_bytes(bytes([number + 1]) * (SIZE - MIB) + bytes(MIB))
    disks = [VmDisk(image, image.name) for image in images]
    async with RunningQemu.start(qemu, disks) as vm, ProxmoxQemu.before(vm) as double:
        before = await vm.nodes()
        yield Machine(vm, BackupJob(double, folder), images)
        assert await vm.nodes() == before
        assert double.access is None


async def restored(plugin: Plugin, name: str, folder: Path) -> list[bytes]:
    """The disks of an archive, as `qemu-img convert` gets them, after the hypervisor's look at its source."""
    volname = f"backup/{name}"
    assert await plugin("restore_get_mechanism", volname) == ["qemu-img", "qemu"]
    assert await plugin("restore_vm_init", volname) == {device: {"size": SIZE} for device in DEVICES}
    found = []
    for device in DEVICES:
        path = (await plugin("restore_vm_volume_init", volname, device, {}))["qemu-img-path"]
        target = folder / "restored.raw"
        if not path.startswith("nbd"):
            assert Path(path).is_file()
        look = ["qemu-img", "info", "--output=json", "-f", "raw", path]
        assert json.loads((await trio.run_process(look, capture_stdout=True)).stdout)["virtual-size"] == SIZE
        await trio.run_process(["qemu-img", "convert", "-f", "raw", "-O", "raw", path, str(target)])
        found.append(target.read_bytes())
        await plugin("restore_vm_volume_cleanup", volname, device, {})
    await plugin("restore_vm_cleanup", volname)
    assert plugin.children() == []
    return found


def reads(plugin: Plugin) -> list[str]:
    """What the log says of each disk: how much of it was read, and why."""
    lines = [text for _, text in plugin.log if ".img: " in text and "read" in text]
    assert len(lines) == len(DEVICES), plugin.log
    return lines


async def test_a_chain_of_backups(worker: Worker, backports: QemuBinary, tmpfs: Path, tmp_path: Path) -> None:
    async with machine(backports, tmpfs) as host, worker.started() as plugin:
        await plugin("job_init", START)
        contents, names = [host.content()], []
        names.append(await host.back_up(plugin))
        assert host.modes == dict.fromkeys(DEVICES, "new")
        assert any("will be read as a whole: first backup of this group" in text for _, text in plugin.log)
        # What was written since, and nothing else, is read by the second one.
        plugin.log.clear()
        await host.vm.qemu_io("d1", "write -P 7 5M 64k")
        contents.append(host.content())
        names.append(await host.back_up(plugin))
        assert host.modes == dict.fromkeys(DEVICES, "use")
        assert all("incremental, read 4.00 MiB" in line for line in reads(plugin)), reads(plugin)
        # One that fails after all leaves bitmaps that count from before.
        await host.vm.qemu_io("d1", "write -P 8 13M 64k")
        with pytest.raises(Died, match="bandwidth-limit"):
            await host.back_up(plugin, limit=-1)
        await host.vm.qemu_io("d0", "write -P 9 0 64k")
        plugin.log.clear()
        contents.append(host.content())
        names.append(await host.back_up(plugin))
        assert host.modes == dict.fromkeys(DEVICES, "use")
        # Without bitmaps everything is read, and there are none afterwards.
        contents.append(host.content())
        names.append(await host.back_up(plugin, mode="none"))
        contents.append(host.content())
        names.append(await host.back_up(plugin))
        assert host.modes == dict.fromkeys(DEVICES, "new")
        for name, content in zip(names, contents, strict=True):
            assert await restored(plugin, name, tmp_path) == content, name
        assert await plugin("archive_get_guest_config", f"backup/{names[-1]}") == CONFIG
        assert await plugin("archive_get_firewall_config", f"backup/{names[-1]}") == FIREWALL
        (tmp_path / "task.log").write_text("INFO: done\n")
        await plugin("backup_handle_log_file", 100, str(tmp_path / "task.log"))
        await plugin("job_cleanup")


async def test_only_a_bitmap_that_counts_from_the_newest_backup_is_used(
    worker: Worker, backports: QemuBinary, tmpfs: Path, tmp_path: Path
) -> None:
    async with machine(backports, tmpfs) as host, worker.started() as plugin:
        first = await host.back_up(plugin)
        second = await host.back_up(plugin)
        assert host.modes == dict.fromkeys(DEVICES, "use")
        # The newest backup is removed: what the bitmap has forgotten is not in the one before.
        await host.vm.qemu_io("d0", "write -P 5 1M 64k")
        await plugin.storage("free_image", "fleece", "@scfg", f"backup/{second}")
        content = host.content()
        third = await host.back_up(plugin)
        assert host.modes == dict.fromkeys(DEVICES, "new")
        assert any("its dirty bitmap counts from another backup" in text for _, text in plugin.log)
        assert await restored(plugin, third, tmp_path) == content
        # Nor is one of another QEMU, though the note be there.
        (note,) = (worker.home / "run/provider").glob("fleece-100.json")
        noted = json.loads(note.read_text())
        note.write_text(json.dumps({**noted, "start_time": noted["start_time"] - 1}))
        await host.back_up(plugin)
        assert host.modes == dict.fromkeys(DEVICES, "new")
        # A base whose index is damaged is of no use: that backup fails, the next one reads everything.
        index = Path(worker.scfg["fleece-repository"], "vm/100")
        damaged = max(index.glob("*/fmt-d0.img.fidx"))
        damaged.chmod(0o644)
        damaged.write_bytes(damaged.read_bytes()[:-32] + bytes(32))
        with pytest.raises(Died, match="that backup is of no use; try again: the next backup reads everything"):
            await host.back_up(plugin)
        assert host.modes == dict.fromkeys(DEVICES, "use")
        content = host.content()
        last = await host.back_up(plugin)
        assert host.modes == dict.fromkeys(DEVICES, "new")
        assert await restored(plugin, last, tmp_path) == content
        assert first < second


async def test_calls_out_of_order(worker: Worker, backports: QemuBinary, tmpfs: Path) -> None:
    async with machine(backports, tmpfs) as host, worker.started() as plugin:
        early: list[tuple[Any, ...]] = [
            ("backup_vm", 100, CONFIG, {}, {}),
            ("backup_vm_query_incremental", 100, {}),
            ("backup_cleanup", 100, "qemu", 1, {}),
        ]
        for call in early:
            with pytest.raises(Died, match="there is no backup that has begun"):
                await plugin(*call)
        assert await plugin("backup_cleanup", 100, None, 0, {}) == {"stats": {}}
        with pytest.raises(Died, match="no restore of a VM that has begun"):
            await plugin("restore_vm_volume_init", "backup/vm/100/2026-01-02T03:04:05Z", "fmt-d0", {})
        with pytest.raises(Died, match="is no archive of Fleece"):
            await plugin("restore_vm_init", "backup/../../etc/passwd")
        with pytest.raises(Died, match="2026-01-02T03:04:05Z"):
            await plugin("restore_vm_init", "backup/vm/100/2026-01-02T03:04:05Z")
        for guest, match in ((("99999999999", "qemu"), "vmid"), (("100", "other"), "vmtype")):
            with pytest.raises(Died, match=match):
                await plugin("backup_init", *guest, START)
        await plugin("backup_init", 100, "qemu", START)
        with pytest.raises(Died, match="nothing was backed up"):
            await plugin("backup_cleanup", 100, "qemu", 1, {})
        # A second one takes the place of one that was never cleaned up.
        await plugin("backup_init", 100, "qemu", START)
        await plugin("backup_init", 100, "qemu", START)
        assert len(plugin.children()) == 1
        volume = {"size": SIZE, "bitmap-mode": "none", "nbd-path": str(tmpfs / "not-there")}
        with pytest.raises(Died, match=r"cannot connect to .*not-there: No such file"):
            await plugin("backup_vm", 100, CONFIG, {"fmt-d0": volume}, {})
        with pytest.raises(Died, match="was done, or has failed, already"):
            await plugin("backup_vm", 100, CONFIG, {"fmt-d0": volume}, {})
        await plugin("backup_cleanup", 100, "qemu", 0, {})
        for broken, match in (
            ({"bitmap-mode": "use"}, r"fmt-d0\.bitmap-mode"),
            ({"size": 0}, r"fmt-d0\.size"),
            ({"nbd-path": "relative"}, "a path begins with a /"),
            ({"bitmap-name": ""}, "bitmap-name"),
        ):
            await plugin("backup_init", 100, "qemu", START)
            with pytest.raises(Died, match=match):
                await plugin("backup_vm", 100, CONFIG, {"fmt-d0": {**volume, **broken}}, {})
            await plugin("backup_cleanup", 100, "qemu", 0, {})
        name = await host.back_up(plugin)
        await plugin("restore_vm_init", f"backup/{name}")
        with pytest.raises(Died, match="no such disk"):
            await plugin("restore_vm_volume_init", f"backup/{name}", "drive-scsi0", {})
        await plugin("restore_vm_volume_init", f"backup/{name}", "fmt-d0", {})
        with pytest.raises(Died, match="it is served already"):
            await plugin("restore_vm_volume_init", f"backup/{name}", "fmt-d0", {})
        with pytest.raises(Died, match="it was not served"):
            await plugin("restore_vm_volume_cleanup", f"backup/{name}", "fmt-d1", {})
        await plugin("restore_vm_cleanup", f"backup/{name}")
        assert plugin.children() == []


@pytest.mark.parametrize("answer", [b"", b"\0" * 64, b"NBDMAGICIHAVEOPT" + b"\xff" * 4096, b"HTTP/1.1 400 no\r\n\r\n"])
async def test_who_listens_is_no_nbd_server(worker: Worker, tmpfs: Path, answer: bytes) -> None:
    async def talk(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(answer)
            if answer:
                await stream.receive_some(1)

    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(tmpfs / "nbd"))
    listener.listen(8)
    async with trio.open_nursery() as nursery, worker.started() as plugin:
        nursery.start_soon(trio.serve_listeners, talk, [trio.SocketListener(listener)])
        await plugin("backup_init", 100, "qemu", START)
        volume = {"size": SIZE, "bitmap-mode": "new", "nbd-path": str(tmpfs / "nbd"), "bitmap-name": "b"}
        with pytest.raises(Died, match="cannot connect to"):
            await plugin("backup_vm", 100, CONFIG, {"fmt-d0": volume}, {})
        await plugin("backup_cleanup", 100, "qemu", 0, {})
        assert plugin.children() == []
        nursery.cancel_scope.cancel()


def under_way(worker: Worker) -> bool:
    """Whether a disk is being stored."""
    return any(Path(worker.scfg["fleece-repository"], "vm/100").glob("*/*fidx*"))


@pytest.mark.parametrize("killed", ["session", "worker", "job"])
async def test_a_backup_that_is_cut_off_leaves_nothing(
    worker: Worker, backports: QemuBinary, tmpfs: Path, tmp_path: Path, killed: str
) -> None:
    async with machine(backports, tmpfs) as host:
        async with worker.started() as plugin:
            first = await host.back_up(plugin)
        await host.vm.qemu_io("d0", "write -P 5 0 24M")
        shutil.rmtree(Path(worker.scfg["fleece-repository"], "vm/100", first.rpartition("/")[2]))
        host.started += 60
        async with worker.started() as plugin:
            await plugin("backup_init", 100, "qemu", host.started)
            async with host.job.prepared(dict.fromkeys(DEVICES, "new")) as disks:
                volumes = {
                    disk.device: {
                        "size": disk.size,
                        "bitmap-mode": disk.bitmap_mode.value,
                        "nbd-path": str(host.job.socket),
                        "bitmap-name": TARGET_ID,
                    }
                    for disk in disks
                }
                # So slow that it takes minutes.
                info = {"bandwidth-limit": 100_000}
                call = {"on": "provider", "call": "backup_vm", "args": [100, CONFIG, volumes, info]}
                await plugin.send(call)
                await until(lambda: under_way(worker))
                (session,) = plugin.children()
                if killed == "worker":
                    plugin.process.kill()
                    plugin.ends_with = -signal.SIGKILL
                    await until(lambda: process_start_time(session) is None)
                else:
                    number = signal.SIGKILL if killed == "session" else signal.SIGTERM
                    os.kill(session if killed == "session" else plugin.process.pid, number)
                    match = "ended by signal 9" if killed == "session" else "interrupted by signal"
                    with pytest.raises(Died, match=match):
                        await plugin.answer()
                    await plugin("backup_cleanup", 100, "qemu", 0, {"error": "cut off"})
                    assert plugin.children() == []
        async with worker.started() as plugin:
            assert await plugin.storage("list_volumes", "fleece", "@scfg", 100, ["backup"]) == []
            content = host.content()
            name = await host.back_up(plugin)
            assert await restored(plugin, name, tmp_path) == content


async def test_disks_of_a_restore_end_with_the_worker_and_those_of_a_killed_session_are_removed(
    worker: Worker, backports: QemuBinary, tmpfs: Path, tmp_path: Path
) -> None:
    async with machine(backports, tmpfs) as host:
        async with worker.started() as plugin:
            content = host.content()
            name = await host.back_up(plugin)
            volname = f"backup/{name}"
            await plugin("restore_vm_init", volname)
            for device in DEVICES:  # both at a time
                path = (await plugin("restore_vm_volume_init", volname, device, {}))["qemu-img-path"]
                assert Path(path).read_bytes() == content[DEVICES.index(device)]
            (session,) = plugin.children()
            plugin.process.kill()
            plugin.ends_with = -signal.SIGKILL
            await until(lambda: process_start_time(session) is None)
            await until(lambda: list((worker.home / "run").rglob("restore-*")) == [])
        async with worker.started() as plugin:
            await plugin("restore_vm_init", volname)
            path = (await plugin("restore_vm_volume_init", volname, "fmt-d0", {}))["qemu-img-path"]
            (session,) = plugin.children()
            os.kill(session, signal.SIGKILL)
            await until(lambda: process_start_time(session) is None)
            with pytest.raises(Died, match="ended by signal 9"):
                await plugin("restore_vm_volume_cleanup", volname, "fmt-d0", {})
            await plugin("restore_vm_cleanup", volname)
        worker.scfg["fleece-vm-restore"] = "nbd"  # as a URI, for whoever takes one
        async with worker.started() as plugin:
            assert await restored(plugin, name, tmp_path) == content
            assert not os.path.lexists(Path(path).parent)
