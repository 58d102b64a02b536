"""Virtual machines of Proxmox VE by the mechanism `nbd`: a real QEMU behind the double of its commands."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from core.units import MIB
from tests.provider.plugin import Died, Plugin, Worker
from tests.support.proxmox_job import TARGET_ID, BackupJob
from tests.support.proxmox_qemu import ProxmoxQemu
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk

pytestmark = pytest.mark.qemu

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

    async def back_up(self, plugin: Plugin, *, firewall: str = FIREWALL) -> str:
        """One guest of a job, from `backup_init` to `backup_cleanup`; the name of the archive."""
        self.started += 60
        name: str = (await plugin("backup_init", 100, "qemu", self.started))["archive-name"]
        try:
            await self.hand_over(plugin, {"bandwidth-limit": 0, "firewall-config": firewall})
        except BaseException as error:
            await plugin("backup_cleanup", 100, "qemu", 0, {"error": str(error)})
            raise
        done = await plugin("backup_cleanup", 100, "qemu", 1, {})
        assert done["stats"]["archive-size"] == 2 * SIZE + len(CONFIG.encode()) + len(FIREWALL)
        return name

    async def hand_over(self, plugin: Plugin, info: dict[str, Any]) -> None:
        """What lies between."""
        self.modes = await plugin("backup_vm_query_incremental", 100, {device: {"size": SIZE} for device in DEVICES})
        self.job.success = False
        async with self.job.prepared(dict(self.modes)) as disks:
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
    """The disks of an archive, as `qemu-img convert` gets them."""
    volname = f"backup/{name}"
    assert await plugin("restore_get_mechanism", volname) == ["qemu-img", "qemu"]
    assert await plugin("restore_vm_init", volname) == {device: {"size": SIZE} for device in DEVICES}
    found = []
    for device in DEVICES:
        path = (await plugin("restore_vm_volume_init", volname, device, {}))["qemu-img-path"]
        target = folder / "restored.raw"
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
        with pytest.raises(Died, match=r"cannot store fw\.conf"):
            await host.back_up(plugin, firewall=os.urandom(18 << 20).hex())
        await host.vm.qemu_io("d0", "write -P 9 0 64k")
        plugin.log.clear()
        contents.append(host.content())
        names.append(await host.back_up(plugin))
        assert host.modes == dict.fromkeys(DEVICES, "use")
        for name, content in zip(names, contents, strict=True):
            assert await restored(plugin, name, tmp_path) == content, name
        assert await plugin("archive_get_guest_config", f"backup/{names[-1]}") == CONFIG
        assert await plugin("archive_get_firewall_config", f"backup/{names[-1]}") == FIREWALL
        (tmp_path / "task.log").write_text("INFO: done\n")
        await plugin("backup_handle_log_file", 100, str(tmp_path / "task.log"))
        await plugin("job_cleanup")
