"""`fleece nbd`: disks of a running VM and of backups as files, held by a process of its own, and gone at its end."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from core.limits import in_io_thread
from hypervisor.nbd_files import is_mounted, open_handle
from tests.support.fuse import NEEDS_FUSE
from tests.support.nbd_servers import NEEDS_NBDKIT_PYTHON
from tests.support.proxmox_qemu import ProxmoxQemu
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk
from tests.support.waiting import until
from tests.vm.lab import CHUNK, MIB, Lab, PlayedGuest

pytestmark = [pytest.mark.qemu, pytest.mark.fuse, NEEDS_FUSE]

D0, D1 = "drive-disk0.img", "drive-disk1.img"


@pytest.fixture
def files(tmpfs: Path) -> Path:
    (tmpfs / "files").mkdir()
    return tmpfs / "files"


async def connect(lab: Lab, vm: RunningQemu, files: Path, *more: str) -> dict[str, Any]:
    document: dict[str, Any] = await lab.fleece.json(
        "nbd", "connect", *lab.arguments(vm), "--files", files, *more
    )  # fmt: skip
    return document


def gone(files: Path) -> bool:
    return list(files.iterdir()) == []


async def test_the_disks_of_a_running_vm_are_those_of_one_instant(backports: QemuBinary, lab: Lab, files: Path) -> None:
    disks = [VmDisk(lab.raw("a", 24 * MIB), "disk0"), VmDisk(lab.raw("b", 12 * MIB), "disk1")]
    async with lab.vm(backports, disks) as vm:
        guest = PlayedGuest(vm, {"disk0": 24 * MIB, "disk1": 12 * MIB})
        await guest.write("disk0", 0x11, 0, 24 * MIB)
        await lab.backup(vm)
        await guest.write("disk0", 0x22, 9 * MIB, 512)
        expected = guest.images()
        held = await connect(lab, vm, files, "--changed", "--time-limit", "10m")
        await guest.write("disk0", 0x33, 0, 24 * MIB)
        await guest.write("disk1", 0x44, 0, MIB)
        assert {disk["name"]: (disk["file"], disk["size"], disk["changed"]) for disk in held["disks"]} == {
            D0: (str(files / D0), 24 * MIB, CHUNK),
            D1: (str(files / D1), 12 * MIB, 0),
        }
        assert held["source"] == {**held["source"], "type": "vm", "vm": "web", "qmp": str(vm.qmp), "flavour": "stock"}
        assert 590 < held["expires"] - held["since"] < 700
        assert {name: (files / name).read_bytes() for name in (D0, D1)} == expected
        regions = await lab.fleece.json("nbd", "regions", files / D0)
        assert regions == [{"offset": 8 * MIB, "length": CHUNK}]
        (listed,) = [one for one in await lab.fleece.json("nbd", "list") if one["state"] == "held"]
        assert listed == {name: value for name, value in held.items() if name != "warnings"}
        # Nothing else may work on this QEMU meanwhile.
        refused = await lab.try_backup(vm)
        assert refused.code == 1
        assert "another backup or clean-up of it runs" in refused.error["why"]
        done = await lab.fleece.json("nbd", "disconnect", files / D1)
        assert done == {"disconnected": [str(files / D0), str(files / D1)]}
        assert gone(files)
        # The bitmap goes on counting from the backup, not from the view.
        report = await lab.backup(vm)
        assert {name: archive["dirty"] for name, archive in report.archives.items() if name in (D0, D1)} == {
            D0: 24 * MIB,
            D1: CHUNK,
        }
        await lab.assert_restores(report, guest.images())


async def test_the_end_of_qemu_and_a_time_limit_end_the_view(backports: QemuBinary, lab: Lab, files: Path) -> None:
    async with lab.vm(backports, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        held = await connect(lab, vm, files, "--time-limit", "1s")
        assert held["disks"][0]["changed"] is None
        await until(lambda: not Path(f"/proc/{held['pid']}").exists())
        assert gone(files)
        held = await connect(lab, vm, files)
        os.kill(vm.pid, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{held['pid']}").exists())
        assert gone(files)


async def test_what_a_killed_process_leaves_in_qemu_goes_with_disconnect(
    backports: QemuBinary, lab: Lab, files: Path
) -> None:
    async with lab.vm(backports, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        guest = PlayedGuest(vm, {"disk0": 12 * MIB})
        await guest.write("disk0", 0x11, 0, 12 * MIB)
        await lab.backup(vm)
        held = await connect(lab, vm, files, "--changed")
        os.kill(held["pid"], signal.SIGKILL)
        await until(lambda: not is_mounted(files / D0))
        (left,) = [one for one in await lab.fleece.json("nbd", "list") if one["state"] != "other"]
        assert (left["state"], left["disks"]) == ("left", held["disks"])
        await guest.write("disk0", 0x22, 0, 512)
        assert await lab.fleece.json("nbd", "disconnect", "--all") == {"disconnected": [str(files / D0)]}
        assert gone(files)
        report = await lab.backup(vm)
        assert report.archives[D0]["dirty"] == CHUNK
        await lab.assert_restores(report, guest.images())


async def test_under_proxmoxs_flavour_what_changed_can_be_read(backports: QemuBinary, lab: Lab, files: Path) -> None:
    async with lab.vm(backports, [VmDisk(lab.raw("a", 24 * MIB), "disk0")]) as vm, ProxmoxQemu.before(vm) as double:
        guest = PlayedGuest(vm, {"disk0": 24 * MIB})
        await guest.write("disk0", 0x11, 0, 24 * MIB)
        await lab.backup(vm)
        await guest.write("disk0", 0x22, 9 * MIB, 512)
        expected = guest.images()[D0]
        held = await connect(lab, vm, files, "--changed")
        await guest.write("disk0", 0x33, 0, 24 * MIB)
        assert (held["source"]["flavour"], held["disks"][0]["changed"]) == ("proxmox", CHUNK)
        ((offset, length),) = [tuple(region.values()) for region in await lab.fleece.json("nbd", "regions", files / D0)]
        with open_handle(files / D0) as handle:
            assert await in_io_thread(os.pread, handle, length, offset) == expected[offset : offset + length]
            with pytest.raises(OSError, match=r"Invalid argument|Input/output error"):
                await in_io_thread(os.pread, handle, 4096, 0)
        await lab.fleece.json("nbd", "disconnect", "--all")
        assert double.access is None
        report = await lab.backup(vm)
        assert report.archives[D0]["read"] == 24 * MIB
        await lab.assert_restores(report, guest.images())


async def test_an_old_qemu_and_what_it_cannot_bear_are_refused(distribution: QemuBinary, lab: Lab, files: Path) -> None:
    async with lab.vm(distribution, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        if vm.binary.version >= (8, 2, 0):
            pytest.skip("the distribution's QEMU is new enough")
        refused = await lab.fleece.run("nbd", "connect", *lab.arguments(vm), "--files", files)
        assert refused.code == 1
        assert "whose frozen views give wrong data to readers of any kind" in refused.error["why"]
        assert gone(files)


async def test_discards_through_the_file_free_scratch_space(backports: QemuBinary, lab: Lab, files: Path) -> None:
    async with lab.vm(backports, [VmDisk(lab.raw("a", 12 * MIB), "disk0")]) as vm:
        guest = PlayedGuest(vm, {"disk0": 12 * MIB})
        await guest.write("disk0", 0x11, 0, 12 * MIB)
        await connect(lab, vm, files, "--discard")
        await guest.write("disk0", 0x22, 0, 8 * MIB)
        (image,) = lab.nothing_left.scratch.iterdir()
        taken = image.stat().st_blocks
        assert taken * 512 >= 8 * MIB
        assert (files / D0).read_bytes() == b"\x11" * (12 * MIB)
        await _run("fallocate", "-p", "-o", str(MIB + 1000), "-l", str(4 * MIB), str(files / D0))
        assert image.stat().st_blocks <= taken - 3 * MIB // 512
        with pytest.raises(OSError), (files / D0).open("r+b", buffering=0) as file:
            file.write(b"1" * 4096)
            os.fsync(file.fileno())
        await lab.fleece.json("nbd", "disconnect", "--all")
        await guest.reads_back()


async def _run(*line: str) -> None:
    import trio

    with trio.fail_after(60):
        await trio.run_process(line)


# -- backups ----------------------------------------------------------------------------------------------------------


@NEEDS_NBDKIT_PYTHON
async def test_disks_of_a_backup_are_held_and_lock_it(lab: Lab, files: Path, tmpfs: Path) -> None:
    image = os.urandom(5 * MIB) + bytes(8 * MIB) + os.urandom(MIB + 512)
    (tmpfs / "disk.raw").write_bytes(image)
    (tmpfs / "x.conf").write_bytes(b"1")
    key = tmpfs / "key"
    await lab.fleece.json("key", "create", key, "--kdf", "none")
    made = await lab.fleece.json(
        "backup", f"{D0}:{tmpfs / 'disk.raw'}", f"x.conf:{tmpfs / 'x.conf'}", "--backup-id", "web",
        "--backup-type", "vm", "--keyfile", key,
    )  # fmt: skip
    snapshot = made["snapshot"]
    refused = await lab.fleece.run("nbd", "connect", snapshot, D0, "--files", files)
    assert "key" in refused.error["hint"] + refused.error["why"]
    for names, why in ((["x.conf"], "it is no disk image"), (["none.img"], "has no archive of that name")):
        refused = await lab.fleece.run("nbd", "connect", snapshot, *names, "--files", files, "--keyfile", key)
        assert refused.code != 0
        assert why in refused.error["why"]
    held = await lab.fleece.json("nbd", "connect", "vm/web/latest", "--files", files, "--keyfile", key)
    assert held["source"] == {"type": "backup", "repository": str(lab.fleece.repo), "ns": "", "snapshot": snapshot}
    assert (held["expires"], [disk["name"] for disk in held["disks"]]) == (None, [D0])
    assert (files / D0).read_bytes() == image
    assert (await lab.fleece.run("forget", snapshot)).code == 1
    os.kill(held["pid"], signal.SIGTERM)
    await until(lambda: not Path(f"/proc/{held['pid']}").exists())
    assert gone(files)
    # Killed, it leaves nothing that holds on to the snapshot, and the next one tidies up.
    held = await lab.fleece.json("nbd", "connect", snapshot, "--files", files, "--keyfile", key)
    os.kill(held["pid"], signal.SIGKILL)
    await until(lambda: not is_mounted(files / D0))
    held = await lab.fleece.json("nbd", "connect", snapshot, "--files", files, "--keyfile", key)
    assert (files / D0).read_bytes() == image
    assert (await lab.fleece.json("nbd", "disconnect", files / D0))["disconnected"] == [str(files / D0)]
    assert (await lab.fleece.json("forget", snapshot))["removed"] == [snapshot]


@pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="this host has the kernel module nbd")
@NEEDS_NBDKIT_PYTHON
async def test_without_the_kernel_module_nothing_is_left_behind(lab: Lab, tmpfs: Path) -> None:
    (tmpfs / "disk.raw").write_bytes(os.urandom(MIB))
    await lab.fleece.json("backup", f"{D0}:{tmpfs / 'disk.raw'}", "--backup-id", "web", "--backup-type", "vm")
    refused = await lab.fleece.run("nbd", "connect", "vm/web/latest", D0)
    assert refused.code == 1
    assert refused.error["why"] == "the kernel module nbd is not loaded"
    assert "modprobe nbd" in refused.error["hint"]
    assert await lab.fleece.json("nbd", "list") == []
    for words, why in ((["nbd", "disconnect", "/dev/nbd7"], "it is not connected"), (["nbd", "disconnect"], "either")):
        assert why in (await lab.fleece.run(*words)).error["why"]
