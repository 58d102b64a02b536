"""A whole VM out of a snapshot: to files and devices, and what is refused before a byte is written."""

import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from agent import vm_script
from agent.snapshot_archives import OpenSnapshot, open_snapshot
from agent.vm_restore import RestoredVm, RestoreOrder, parse_targets, restore_vm
from agent.vm_script import ScriptOptions, firmware_for, machine_of, script_writes, write_script
from core.errors import BusyError, FormatError, NotFoundError, TargetError, UsageError
from core.nursery import open_nursery
from core.progress import Progress, Task
from datastore.codec import ChunkCodec
from datastore.names import Group
from hypervisor.discovery import list_disks
from hypervisor.errors import DiskInUseError
from hypervisor.machine import Firmware, Machine
from hypervisor.qmp import connect
from repository.archive import open_cache
from repository.interface import FIXED_CHUNK_SIZE
from repository.local import open_local
from tests.support.loop_devices import loop_device
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk
from tests.support.snapshots import write_snapshot
from tests.support.waiting import until

from .conftest import Fleece
from .live_machines import opened as machine_with

CHUNK = FIXED_CHUNK_SIZE
DISK0 = os.urandom(CHUNK) + bytes(CHUNK) + os.urandom(8192)
DISK1 = os.urandom(5 * 512)
COMMAND = [
    *("qemu-system-x86_64", "-m", "64", "-nodefaults", "-device", "virtio-scsi-pci,id=bus"),
    *("-drive", "if=none,id=a,file=/old/a.raw", "-device", "scsi-hd,bus=bus.0,drive=a,id=scsi0"),
    *("-drive", "if=none,id=b,file=/old/b.raw", "-device", "scsi-hd,bus=bus.0,drive=b,id=scsi1"),
]
FILES = {
    "drive-scsi0.img.fidx": DISK0,
    "drive-scsi1.img.fidx": DISK1,
    "qemu-command.json.blob": json.dumps(COMMAND).encode(),
    "notes.conf.blob": b"variables",
}


@asynccontextmanager
async def opened(store: Path, progress: Progress) -> AsyncIterator[OpenSnapshot]:
    """The snapshot vm/web with `FILES`."""
    repo = await open_local(store, name="test")
    try:
        snapshot = await repo.latest(Group.parse("vm/web")) or await write_snapshot(
            repo, "vm/web", 1000, FILES, chunk_size=CHUNK
        )
        async with (
            open_cache(CHUNK) as cache,
            open_snapshot(repo, snapshot, ChunkCodec(), cache, progress) as found,
        ):
            yield found
    finally:
        repo.close()


async def restored(store: Path, folder: Path, **options: Any) -> RestoredVm:
    progress = Progress()
    async with opened(store, progress) as found:
        return await restore_vm(found, RestoreOrder(folder=folder, **options), progress)


def qcow2_content(qemu: QemuBinary, path: Path) -> bytes:
    raw = path.with_name(path.name + ".as-raw")
    subprocess.run([qemu.img, "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)], check=True)
    return raw.read_bytes()


def run(*line: str) -> None:
    subprocess.run(line, check=True)


@pytest.fixture
def device(tmpfs: Path) -> Iterator[Path]:
    """A block device of 9 MiB."""
    image = tmpfs / "device.raw"
    image.write_bytes(bytes(9 << 20))
    with loop_device(image) as found:
        yield Path(found)


async def test_disks_and_small_files_come_into_a_new_folder(store_folder: Path, tmpfs: Path) -> None:
    folder = tmpfs / "new" / "web"
    vm = await restored(store_folder, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "drive-scsi0.raw", "drive-scsi1.raw", "notes.conf", "qemu-command.json",
    ]  # fmt: skip
    assert (folder / "drive-scsi0.raw").read_bytes() == DISK0
    assert (folder / "drive-scsi1.raw").read_bytes() == DISK1
    assert (folder / "notes.conf").read_bytes() == b"variables"
    assert (vm.name, vm.folder, vm.left_out) == ("web", folder, [])
    assert [(disk.archive, disk.device, disk.target, disk.format, disk.size, disk.kind) for disk in vm.disks] == [
        ("drive-scsi0.img", "scsi0", str(folder / "drive-scsi0.raw"), "raw", len(DISK0), "file"),
        ("drive-scsi1.img", "scsi1", str(folder / "drive-scsi1.raw"), "raw", len(DISK1), "file"),
    ]
    assert vm.files == {name: folder / name for name in ("qemu-command.json", "notes.conf")}


async def test_every_disk_can_have_a_place_and_format_of_its_own(
    store_folder: Path, tmpfs: Path, device: Path, distribution: QemuBinary
) -> None:
    other = tmpfs / "other.qcow2"
    targets = parse_targets([f"scsi0={device}", f"drive-scsi1.img={other}"])
    vm = await restored(store_folder, tmpfs / "web", targets=targets, name="again")
    assert device.read_bytes()[: len(DISK0)] == DISK0
    assert qcow2_content(distribution, other)[: len(DISK1)] == DISK1
    assert [(disk.format, disk.kind) for disk in vm.disks] == [("raw", "device"), ("qcow2", "file")]
    assert vm.name == "again"


async def test_the_format_is_that_of_new_files_and_disks_can_be_left_out(
    store_folder: Path, tmpfs: Path, distribution: QemuBinary
) -> None:
    vm = await restored(store_folder, tmpfs, format="qcow2", exclude=["scsi1"])
    assert qcow2_content(distribution, tmpfs / "drive-scsi0.qcow2") == DISK0
    assert vm.left_out == ["drive-scsi1.img"]


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        (["scsi0"], "not NAME=TARGET"),
        (["=x"], "not NAME=TARGET"),
        (["a="], "not NAME=TARGET"),
        (["a=b", "a=c"], "twice"),
    ],
)
def test_targets_have_a_form(targets: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_targets(targets)


async def test_what_cannot_be_is_refused_before_anything_is_made(store_folder: Path, tmpfs: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"targets": {"scsi7": "x"}}, NotFoundError, "it has scsi0, scsi1"),
        ({"include": ["scsi7"]}, NotFoundError, "it has scsi0, scsi1"),
        ({"exclude": ["*"]}, NotFoundError, "no disk of it is chosen"),
        (
            {"targets": {"scsi0": f"{tmpfs}/a", "scsi1": f"{tmpfs}/../{tmpfs.name}/a"}},
            UsageError,
            "two disks have this",
        ),
        ({"targets": {"scsi0": f"{tmpfs}/a.vmdk"}}, UsageError, "vmdk are not supported"),
        ({"targets": {"scsi1": f"{tmpfs}/no/folder/a"}}, TargetError, "No such file"),
        ({"targets": {"scsi1": str(tmpfs)}}, TargetError, "it is a folder|Is a directory"),
    ]
    for options, kind, why in cases:
        with pytest.raises(kind, match=why):
            await restored(store_folder, tmpfs / "web", **options)
        assert list(tmpfs.iterdir()) == [], options


async def test_a_device_that_is_too_small_is_refused_and_no_other_disk_is_touched(
    store_folder: Path, tmpfs: Path, device: Path
) -> None:
    run("truncate", "-s", "4M", str(tmpfs / "device.raw"))
    run("losetup", "--set-capacity", str(device))
    with pytest.raises(TargetError, match=r"it has 4194304 bytes .* choose a larger one"):
        await restored(store_folder, tmpfs / "web", targets={"scsi0": str(device)})
    assert not (tmpfs / "web").exists()
    assert device.read_bytes() == bytes(4 << 20)


async def test_a_device_that_is_mounted_or_has_content_is_refused(
    store_folder: Path, tmpfs: Path, device: Path
) -> None:
    run("mke2fs", "-q", str(device))
    with pytest.raises(TargetError, match="first MiB is not zero"):
        await restored(store_folder, tmpfs / "web", targets={"scsi0": str(device)})
    (tmpfs / "mnt").mkdir()
    run("mount", str(device), str(tmpfs / "mnt"))
    try:
        with pytest.raises(DiskInUseError, match="mounted or in use"):
            await restored(store_folder, tmpfs / "web", targets={"scsi0": str(device)}, force=True)
    finally:
        run("umount", str(device))
    assert not (tmpfs / "web").exists()


async def test_a_disk_of_a_running_vm_is_refused_with_force_too(
    store_folder: Path, tmpfs: Path, distribution: QemuBinary
) -> None:
    path = tmpfs / "used.raw"
    path.write_bytes(bytes(len(DISK0)))
    async with RunningQemu.start(distribution, [VmDisk(path, "scsi0")]):
        with pytest.raises(DiskInUseError, match="in use"):
            await restored(store_folder, tmpfs / "web", targets={"scsi0": str(path)}, force=True)
    assert path.read_bytes() == bytes(len(DISK0))
    assert not (tmpfs / "web").exists()


async def test_files_that_are_there_need_force_and_stay_until_the_new_ones_are_whole(
    store_folder: Path, tmpfs: Path
) -> None:
    disk = tmpfs / "drive-scsi0.raw"
    disk.write_bytes(b"old")
    disk.chmod(0o640)
    with pytest.raises(TargetError, match="the file exists with 3 bytes"):
        await restored(store_folder, tmpfs)
    disk.rename(tmpfs / "aside")
    (tmpfs / "notes.conf").write_bytes(b"old")
    with pytest.raises(TargetError, match=r"notes\.conf: the file has content"):
        await restored(store_folder, tmpfs)
    assert sorted(path.name for path in tmpfs.iterdir()) == ["aside", "notes.conf"]
    (tmpfs / "aside").rename(disk)
    script = tmpfs / "start.sh"
    script.write_text("start the old disks")
    await restored(store_folder, tmpfs, force=True, writes=[script])
    assert disk.read_bytes() == DISK0
    assert disk.stat().st_mode & 0o777 == 0o640
    assert (tmpfs / "notes.conf").read_bytes() == b"variables"
    assert not script.exists()  # nobody has written the new one


async def test_a_restore_that_fails_in_the_middle_leaves_what_was_there(store_folder: Path, tmpfs: Path) -> None:
    progress = Progress()
    disk = tmpfs / "drive-scsi0.raw"
    disk.write_bytes(b"old")
    async with opened(store_folder, progress) as found:
        (damaged,) = [path for path in store_folder.glob(".chunks/*/*") if DISK1[:512] in path.read_bytes()]
        raw = bytearray(damaged.read_bytes())
        raw[100] ^= 1
        damaged.write_bytes(raw)
        with pytest.raises(FormatError, match=r"drive-scsi1\.img"):
            await restore_vm(found, RestoreOrder(folder=tmpfs, force=True), progress)
    assert [path.name for path in tmpfs.iterdir()] == [disk.name]
    assert disk.read_bytes() == b"old"


async def test_a_device_that_holds_a_part_only_is_named_when_the_restore_is_cancelled(
    store_folder: Path, tmpfs: Path
) -> None:
    class Cancelling(Progress):
        def started(self, task: Task) -> None:
            scope.cancel()

    progress = Cancelling()
    image = tmpfs / "device.raw"
    image.write_bytes(bytes(3 * CHUNK))
    with loop_device(image) as device:
        async with opened(store_folder, progress) as found:
            with trio.CancelScope() as scope:
                await restore_vm(found, RestoreOrder(folder=tmpfs / "web", targets={"scsi0": device}), progress)
            assert progress.warnings == [f"{device} may hold a part of the image only"]
        assert not (tmpfs / "web").exists()


async def test_a_folder_whose_machine_runs_while_it_is_restored_is_refused(store_folder: Path, tmpfs: Path) -> None:
    # Going on there would take the new disks for those that it had begun to fill.
    (tmpfs / "live-restore.json").write_text("{}")
    with pytest.raises(BusyError, match=r"a live restore is under way there; .* --resume"):
        await restored(store_folder, tmpfs, force=True)
    assert [path.name for path in tmpfs.iterdir()] == ["live-restore.json"]


@pytest.mark.parametrize("name", ["live-restore.json", "start.sh", "run"])
async def test_a_snapshot_brings_nothing_that_would_be_taken_for_fleeces_own(
    name: str, store_folder: Path, tmpfs: Path
) -> None:
    # `--resume` runs the command line that stands in such a file.
    async with machine_with(store_folder, {**FILES, f"{name}.blob": b"{}"}) as found:
        with pytest.raises(FormatError, match=rf"it holds a file '{name}', which is a name of Fleece's own"):
            await restore_vm(found, RestoreOrder(folder=tmpfs / "new"), Progress())
    assert not (tmpfs / "new").exists()


async def test_a_cancelled_restore_leaves_nothing_and_a_killed_ones_rest_is_replaced(
    store_folder: Path, tmpfs: Path
) -> None:
    progress = Progress()
    (tmpfs / "drive-scsi0.raw.partial").write_bytes(b"x" * 3 * CHUNK)  # of a killed one
    async with opened(store_folder, progress) as found:

        async def never(vm: RestoredVm, progress: Progress) -> None:
            raise AssertionError

        with trio.CancelScope() as scope:
            scope.cancel()
            await restore_vm(found, RestoreOrder(folder=tmpfs / "web", definers=[never]), progress)
        assert not (tmpfs / "web").exists()
        await restore_vm(found, RestoreOrder(folder=tmpfs), progress)
    assert (tmpfs / "drive-scsi0.raw").read_bytes() == DISK0
    assert not list(tmpfs.glob("*.partial"))


async def test_who_defines_the_machine_comes_last_and_sees_everything(store_folder: Path, tmpfs: Path) -> None:
    seen = []

    async def define(vm: RestoredVm, progress: Progress) -> None:
        seen.append([Path(disk.target).stat().st_size for disk in vm.disks])
        assert vm.files["notes.conf"].read_bytes() == b"variables"
        vm.definitions.append({"type": "test", "line": "defined"})

    vm = await restored(store_folder, tmpfs / "web", definers=[define])
    assert seen == [[len(DISK0), len(DISK1)]]
    assert vm.lines()[-1] == "defined"


def test_the_command_tells_where_everything_is(stored: Fleece, tmpfs: Path) -> None:
    (tmpfs / "a.raw").write_bytes(DISK0)
    (tmpfs / "a.conf").write_text("memory: 1\n")
    words = [f"drive-scsi0.img:{tmpfs}/a.raw", f"web.conf:{tmpfs}/a.conf", "--backup-id", "web", "--backup-type", "vm"]
    snapshot = stored.json("backup", *words)["snapshot"]
    answer = stored("vm", "restore", "vm/web/latest", tmpfs / "new", "--format", "qcow2", "--output", "json")
    assert answer.code == 3
    document = answer.document
    assert document["warnings"] == [
        "the backup has no configuration of a machine that can be read: a plain one is made"
    ]
    assert document["snapshot"] == snapshot
    assert document["disks"] == [
        {"name": "drive-scsi0.img", "target": f"{tmpfs}/new/drive-scsi0.qcow2", "format": "qcow2", "size": len(DISK0)}
    ]
    assert document["files"] == [{"name": "web.conf", "path": f"{tmpfs}/new/web.conf"}]
    assert document["definitions"] == [
        {
            "type": "script",
            "path": f"{tmpfs}/new/start.sh",
            "left-out": [],
            "line": f"start it with {tmpfs}/new/start.sh",
        }
    ]
    refused = stored("vm", "restore", "vm/web/latest", tmpfs / "new", "--format", "qcow2")
    assert refused.code == 1
    assert "has content" in refused.err
    # As a snapshot with such a file would, that is restored with --all.
    refused = stored("restore", "vm/web/latest", "web.conf", tmpfs / "live-restore.json")
    assert refused.code == 1
    assert "that is a name of Fleece's own" in refused.err
    # A path at which nobody can look, as a user's in a folder of root's.
    nowhere = tmpfs / ("x" * 300)
    for line in (
        ("vm", "restore", "vm/web/latest", nowhere),
        ("vm", "restore", "vm/web/latest", tmpfs / "other", "--disk", f"scsi0={nowhere}"),
        ("restore", "vm/web/latest", "drive-scsi0.img", nowhere),
        ("restore", "vm/web/latest", "web.conf", nowhere),
    ):
        refused = stored(*line)
        assert refused.code == 1
        assert "File name too long" in refused.err
        assert "unexpected" not in refused.err


# -- the script -------------------------------------------------------------------------------------------------------


def without_kvm(folder: Path, qemu: QemuBinary) -> dict[str, str]:
    """The environment in which `qemu-system-x86_64` never uses KVM: not every machine that has /dev/kvm can."""
    (folder / "bin").mkdir()
    program = folder / "bin/qemu-system-x86_64"
    swap = 'for word; do shift; [ "$word" = kvm ] && word=tcg; set -- "$@" "$word"; done'
    program.write_text(f'#!/bin/sh\n{swap}\nexec {qemu.system} "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as asking:
        return asking.connect_ex(str(path)) == 0


async def test_the_script_starts_the_machine_with_its_disks(
    store_folder: Path, tmpfs: Path, distribution: QemuBinary
) -> None:
    options = ScriptOptions()
    folder = tmpfs / "w"
    vm = await restored(
        store_folder,
        folder,
        format="qcow2",
        definers=[lambda vm, progress: write_script(vm, options, progress)],
        writes=script_writes(folder, options),
    )
    (definition,) = vm.definitions
    assert (definition["type"], definition["path"]) == ("script", f"{folder}/start.sh")
    script = folder / "start.sh"
    assert script.stat().st_mode & 0o777 == 0o755
    assert "From vm/web/1970-01-01T00:16:40Z." in script.read_text()
    environment = without_kvm(tmpfs, distribution)
    async with open_nursery() as nursery:
        line = [str(script), "-S"]
        process = await nursery.start(partial(trio.run_process, line, env=environment, check=False))
        await until(lambda: listens(folder / "run/qmp.sock"))
        async with connect(folder / "run/qmp.sock") as qmp:
            disks = await list_disks(qmp)
            assert sorted((disk.name, disk.file, disk.driver) for disk in disks) == [
                ("drive-scsi0.img", f"{folder}/drive-scsi0.qcow2", "qcow2"),
                ("drive-scsi1.img", f"{folder}/drive-scsi1.qcow2", "qcow2"),
            ]
            await qmp.execute("quit")
        with trio.fail_after(60):
            await process.wait()


def test_a_machine_without_a_name_has_that_of_its_backups_and_learns_what_becomes_of_secure_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = RestoredVm("vm/web/2026-01-02T03:04:05Z", "web", tmp_path, [])
    assert machine_of(vm).name == "web"
    code = tmp_path / "OVMF_CODE_4M.fd"
    code.touch()
    monkeypatch.setattr(vm_script, "find_firmware", lambda *_, **__: code)
    machine = Machine(efi=True, secure_boot=True)
    progress = Progress()
    assert firmware_for(machine, vm, code, progress) == Firmware(code)  # somebody's own choice
    assert progress.warnings == []
    assert firmware_for(machine, vm, None, progress) == Firmware(code)
    assert "may not know Secure Boot" in progress.warnings[0]


async def test_a_folder_in_which_the_script_could_not_start_the_machine_is_told(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 90) / "a,b"
    folder.mkdir(parents=True)
    (folder / "tpm2-00.permall").write_bytes(b"state")
    (folder / "qemu-command.json").write_text(json.dumps([*COMMAND, "-device", "tpm-tis,tpmdev=t"]))
    files = {name: folder / name for name in ("qemu-command.json", "tpm2-00.permall")}
    progress = Progress()
    await write_script(RestoredVm("vm/web/x", "web", folder, [], files), ScriptOptions(), progress)
    assert [word for word in ("too long for sockets", "has a comma") if word in " ".join(progress.warnings)] == [
        "too long for sockets", "has a comma"
    ]  # fmt: skip


PROXMOX = b"""\
bios: ovmf
boot: order=scsi0
cores: 2
efidisk0: local:vm-100-disk-0,efitype=4m,pre-enrolled-keys=1,size=528K
machine: q35
memory: 512
name: web
net0: virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1
ostype: l26
scsi0: local:vm-100-disk-1,discard=on,iothread=1,size=32G
scsihw: virtio-scsi-single
tpmstate0: local:vm-100-disk-2,size=4M,version=v2.0
#qmdump#map:scsi0:drive-scsi0:local:raw:
"""


async def test_a_backup_that_proxmox_made_gets_a_script_too(
    store_folder: Path, tmpfs: Path, distribution: QemuBinary
) -> None:
    files = {
        "drive-efidisk0.img.fidx": os.urandom(540672),
        "drive-scsi0.img.fidx": DISK0,
        "drive-tpmstate0-backup.img.fidx": os.urandom(CHUNK),
        "qemu-server.conf.blob": PROXMOX,
    }
    firmware = tmpfs / "code.fd"
    firmware.write_bytes(bytes(1 << 20))
    options = ScriptOptions(firmware=firmware, network="user")
    progress = Progress()
    repo = await open_local(store_folder, name="test")
    try:
        snapshot = await write_snapshot(repo, "vm/100", 1000, files, chunk_size=CHUNK)
        async with (
            open_cache(CHUNK) as cache,
            open_snapshot(repo, snapshot, ChunkCodec(), cache, progress) as found,
        ):
            order = RestoreOrder(
                folder=tmpfs / "w", definers=[lambda vm, progress: write_script(vm, options, progress)]
            )
            vm = await restore_vm(found, order, progress)
    finally:
        repo.close()
    assert [disk.archive for disk in vm.disks] == [
        "drive-efidisk0.img", "drive-scsi0.img", "drive-tpmstate0-backup.img",
    ]  # fmt: skip
    script = (tmpfs / "w/start.sh").read_text()
    assert "guest=web" in script
    assert f'"filename":"{tmpfs}/w/drive-scsi0.raw"' in script
    assert f'"filename":"{tmpfs}/w/drive-efidisk0.raw"' in script
    assert "pflash1=efi-variables" in script
    assert "user,id=" in script
    assert "vmbr0" not in script  # the bridge of another host
    assert any("TPM" in warning for warning in progress.warnings)
    # QEMU takes it all, but for firmware that is none.
    environment = without_kvm(tmpfs, distribution)
    async with open_nursery() as nursery:
        started = partial(trio.run_process, [str(tmpfs / "w/start.sh"), "-S"], env=environment, check=False)
        process = await nursery.start(started)
        await until(lambda: listens(tmpfs / "w/run/qmp.sock"))
        async with connect(tmpfs / "w/run/qmp.sock") as qmp:
            assert [disk.file for disk in await list_disks(qmp)] == [f"{tmpfs}/w/drive-scsi0.raw"]
            await qmp.execute("quit")
        with trio.fail_after(60):
            await process.wait()
