"""Virtual machines of Proxmox VE by the mechanism `file-handle`: an open file and the regions that are to be read."""

import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from core.units import MIB
from tests.provider.plugin import Died, Plugin, Worker
from tests.provider.test_machines import CONFIG, DEVICES, SIZE, START, Machine, machine, restored
from tests.support.proxmox_job import TARGET_ID
from tests.support.qemu_binaries import QemuBinary
from tests.support.waiting import until

DEVICE: Final = "drive-scsi0"


async def back_up(plugin: Plugin, start: int, volume: dict[str, Any], *, keep: int | None = None) -> str:
    """A disk whose file is handed over; with `keep` noted, protected for a time, and all but so many removed."""
    name: str = (await plugin("backup_init", 100, "qemu", start))["archive-name"]
    await plugin("backup_vm_query_incremental", 100, {DEVICE: {"size": volume["size"]}})
    await plugin("backup_vm", 100, CONFIG, {DEVICE: volume}, {})
    if keep is not None:  # vzdump does that before the clean-up
        for attribute, value in (("notes", "web"), ("protected", 1), ("protected", 0)):
            await plugin.storage("update_volume_attribute", "@scfg", "fleece", f"backup/{name}", attribute, value)
        await plugin.storage("prune_backups", "@scfg", "fleece", {"keep-last": keep}, 100, "qemu", 0, None)
    await plugin("backup_cleanup", 100, "qemu", 1, {})
    return name


async def content_of(plugin: Plugin, name: str, target: Path) -> bytes:
    volname = f"backup/{name}"
    await plugin("restore_vm_init", volname)
    path = (await plugin("restore_vm_volume_init", volname, DEVICE, {}))["qemu-img-path"]
    await trio.run_process(["qemu-img", "convert", "-f", "raw", "-O", "raw", path, str(target)])
    await plugin("restore_vm_cleanup", volname)
    return target.read_bytes()


@pytest.mark.fuse
async def test_a_handed_file_is_read_and_only_given_up_if_it_may_be_written(worker: Worker, tmp_path: Path) -> None:
    disk, size = tmp_path / "disk", 9 * MIB + 512
    worker.scfg["fleece-mechanism"] = "file-handle"
    # The hypervisor's note of the VM's QEMU: a process that lives.
    (tmp_path / "100.pid").write_text(f"{os.getpid()}\n")
    worker.environment["FLEECE_QEMU_SERVER_DIR"] = str(tmp_path)
    async with worker.started() as plugin:
        assert await plugin("backup_get_mechanism", 100, "qemu") == "file-handle"
        old = os.urandom(size)
        disk.write_bytes(old)
        volume = {"size": size, "bitmap-mode": "new", "file": str(disk), "regions": [[0, size]]}
        first = await back_up(plugin, START, {**volume, "mode": "<"})
        assert disk.read_bytes() == old
        assert await content_of(plugin, first, tmp_path / "a") == old
        # What changed is read and nothing else: the rest of the file may be anything.
        new = b"\x07" * size
        disk.write_bytes(new)
        volume = {**volume, "bitmap-mode": "reuse", "regions": [[4 * MIB, 4 * MIB]]}
        second = await back_up(plugin, START + 60, volume, keep=1)
        assert disk.read_bytes() == new[: 4 * MIB] + bytes(4 * MIB) + new[8 * MIB :]
        (listed,) = await plugin.storage("list_volumes", "fleece", "@scfg", 100, ["backup"])
        assert (listed["volid"], listed["notes"]) == (f"fleece:backup/{second}", "web")
        # A chunk that is missing fails who reads it, and the log says why.
        last = min(
            Path(worker.scfg["fleece-repository"], ".chunks").glob("*/*"), key=lambda chunk: chunk.stat().st_size
        )
        aside = last.rename(last.with_name("aside"))
        with pytest.raises(subprocess.CalledProcessError):
            await content_of(plugin, second, tmp_path / "b")
        await plugin("restore_vm_volume_cleanup", f"backup/{second}", DEVICE, {})
        assert any(level == "warn" and last.name in text for level, text in plugin.log), plugin.log
        aside.rename(last)
        assert await content_of(plugin, second, tmp_path / "b") == old[: 4 * MIB] + new[: 4 * MIB] + old[8 * MIB :]


async def test_what_is_handed_over_is_checked(worker: Worker, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"\x01" * (8 * MIB))
    volume = {"size": 8 * MIB, "bitmap-mode": "none", "file": str(disk), "regions": [[0, 8 * MIB]]}
    reuse = {**volume, "bitmap-mode": "reuse"}
    async with worker.started() as plugin:
        for broken, match in (
            ({**volume, "size": 4 * MIB, "regions": []}, "size changed from 4194304 to 8388608"),
            ({**volume, "regions": [[4 * MIB, 4 * MIB], [0, 4 * MIB]]}, "out of order"),
            ({**volume, "regions": [[4 * MIB, 8 * MIB]]}, "outside of the disk"),
            ({**volume, "regions": [[0, -1]]}, "out of order"),
            ({**volume, "file": "/dev/null", "mode": "<"}, "is not the disk that was handed over"),
            ({**volume, "mode": ">>"}, "is open for writing only"),
            (reuse, "nothing to count on: first backup of this group"),
            ({"size": 512, "bitmap-mode": "none"}, "has neither an NBD path nor a file handle"),
        ):
            await plugin("backup_init", 100, "qemu", START)
            with pytest.raises(Died, match=match):
                await plugin("backup_vm", 100, CONFIG, {DEVICE: broken}, {})
            await plugin("backup_cleanup", 100, "qemu", 0, {})
        await plugin("backup_init", 100, "qemu", START)
        with pytest.raises(Died, match="'much' is no limit of bandwidth"):
            await plugin("backup_vm", 100, CONFIG, {DEVICE: volume}, {"bandwidth-limit": "much"})
        await plugin("backup_cleanup", 100, "qemu", 0, {})
        assert disk.read_bytes() == b"\x01" * (8 * MIB)
        assert plugin.children() == []


@asynccontextmanager
async def as_file(host: Machine, device: str, folder: Path) -> AsyncIterator[tuple[Path, list[list[int]]]]:
    """An export as the hypervisor makes a file of it, and its dirty regions."""
    uri = f"nbd+unix:///{device}?socket={host.job.socket}"
    asked = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{TARGET_ID}", uri]
    told = json.loads((await trio.run_process(asked, capture_stdout=True)).stdout)
    mountpoint, pid = folder / f"{device}.mount", folder / f"{device}.pid"
    mountpoint.mkdir(exist_ok=True)
    pid.unlink(missing_ok=True)
    process = await trio.lowlevel.open_process(["nbdfuse", "--pidfile", str(pid), str(mountpoint / "nbd"), uri])
    try:
        await until(pid.exists)
        yield mountpoint / "nbd", [[one["offset"], one["length"]] for one in told if one["type"] & 1]
    finally:
        with trio.CancelScope(shield=True):
            await trio.run_process(["umount", "-l", str(mountpoint)])
            await process.wait()


@pytest.mark.qemu
@pytest.mark.fuse
async def test_a_chain_behind_nbdfuse(
    worker: Worker, backports: QemuBinary, tmpfs: Path, tmp_path: Path, as_root: None
) -> None:
    worker.environment["FLEECE_QEMU_SERVER_DIR"] = str(tmp_path)
    async with machine(backports, tmpfs) as host, worker.started() as plugin:
        (tmp_path / "100.pid").write_text(f"{host.vm.pid}\n")
        contents, names = [], []
        for number, expected in enumerate(("new", "use", "use")):
            contents.append(host.content())
            names.append((await plugin("backup_init", 100, "qemu", START + number))["archive-name"])
            modes = await plugin("backup_vm_query_incremental", 100, {device: {"size": SIZE} for device in DEVICES})
            assert modes == dict.fromkeys(DEVICES, expected)
            host.job.success = False
            async with host.job.prepared(modes) as (zero, one):
                await host.vm.qemu_io("d0", "write -P 99 23M 64k")
                async with (
                    as_file(host, zero.device, tmp_path) as (file, regions),
                    as_file(host, one.device, tmp_path) as (other, others),
                ):
                    volumes = {
                        disk.device: {
                            "size": disk.size,
                            "bitmap-mode": disk.bitmap_mode.value,
                            "file": str(path),
                            "regions": dirty,
                        }
                        for disk, path, dirty in ((zero, file, regions), (one, other, others))
                    }
                    await plugin("backup_vm", 100, CONFIG, volumes, {})
                    await plugin("close_handles")
                host.job.success = True
            await plugin("backup_cleanup", 100, "qemu", 1, {})
            await host.vm.qemu_io("d1", f"write -P {number + 7} {4 * number}M 64k")
        for name, content in zip(names, contents, strict=True):
            assert await restored(plugin, name, tmp_path) == content, name
