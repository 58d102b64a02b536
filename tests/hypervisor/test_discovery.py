from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import trio

from hypervisor.discovery import Disk, capabilities, check_vm, list_disks, survey
from hypervisor.disk_names import archive_name, image_path
from hypervisor.errors import DiskNameError, QmpAnswerError, VmStateError, VmUnsupportedError
from hypervisor.qmp import connect
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, RunningStorageDaemon, VmDisk
from tests.support.scripted_qmp import ScriptedQmp

MIB = 1 << 20


def raw(folder: Path, name: str, size: int = MIB) -> Path:
    path = folder / name
    with path.open("wb") as file:
        file.truncate(size)
    return path


async def image(binary: QemuBinary, path: Path, *options: str, size: int = 16 * MIB) -> Path:
    await trio.run_process([binary.img, "create", "-q", "-f", "qcow2", *options, str(path), str(size)])
    return path


def node(name: str, path: Path, driver: str = "raw") -> list[str]:
    return ["-blockdev", f"driver={driver},node-name={name},file.driver=file,file.filename={path}"]


def drive(path: Path, options: str) -> list[str]:
    return ["-drive", f"file={path},format=raw,{options}"]


async def test_every_kind_of_disk_is_found_and_named(qemu: QemuBinary, tmp_path: Path) -> None:
    v3 = await image(qemu, tmp_path / "v3.qcow2")
    v2 = await image(qemu, tmp_path / "v2.qcow2", "-o", "compat=0.10")
    extra = [
        *node("n0", raw(tmp_path, "a.raw", 3 * MIB)), "-device", "virtio-blk-pci,drive=n0,id=disk0",
        "-device", "virtio-scsi-pci,id=hba",
        *node("n1", v3, "qcow2"), "-device", "scsi-hd,bus=hba.0,drive=n1,id=scsi0",
        *node("n2", v2, "qcow2"), "-device", "scsi-hd,bus=hba.0,drive=n2",
        *drive(raw(tmp_path, "b.raw"), "if=none,id=drive-sata0"), "-device", "ide-hd,drive=drive-sata0,id=sata0",
        *drive(raw(tmp_path, "c.raw"), "if=virtio"),
        *drive(raw(tmp_path, "d.raw"), "if=none,id=dn"), "-device", "nvme,drive=dn,serial=1,id=nvme0",
        "-device", "qemu-xhci,id=xhci",
        *node("n3", raw(tmp_path, "e.raw")), "-device", "usb-storage,drive=n3,id=stick",
        "-blockdev", f"driver=file,node-name=n4,filename={raw(tmp_path, 'f.raw')}",
        "-device", "virtio-blk-pci,drive=n4,id=odd.name_1-2",
    ]  # fmt: skip
    async with RunningQemu.start(qemu, [], extra=extra) as vm, connect(vm.qmp) as qmp:
        disks = {disk.name: disk for disk in await list_disks(qmp)}
        assert {name: (disk.device, disk.device_type, disk.size, disk.driver) for name, disk in disks.items()} == {
            "drive-disk0.img": ("disk0", "virtio-blk", 3 * MIB, "raw"),
            "drive-scsi0.img": ("scsi0", "scsi-hd", 16 * MIB, "qcow2"),
            "drive-n2.img": ("/machine/peripheral-anon/device[0]", "scsi-hd", 16 * MIB, "qcow2"),
            "drive-sata0.img": ("sata0", "ide-hd", MIB, "raw"),
            "drive-virtio0.img": ("virtio0", "virtio-blk", MIB, "raw"),
            "drive-nvme0.img": ("nvme0", "nvme", MIB, "raw"),
            "drive-stick.img": ("stick", "usb-storage", MIB, "raw"),
            "drive-odd.name_1-2.img": ("odd.name_1-2", "virtio-blk", MIB, "file"),
        }
        assert {name for name, disk in disks.items() if disk.persistent_bitmaps_possible} == {"drive-scsi0.img"}
        assert disks["drive-scsi0.img"].file == str(v3)
        assert disks["drive-disk0.img"].node == "n0"
        for disk in disks.values():
            # The path is the one whose `drive` can be switched: a pass-through node and back, as a backup does.
            await qmp.execute("blockdev-add", {"driver": "raw", "node-name": "between", "file": disk.node})
            await qmp.qom_set(disk.qom_path, "drive", "between")
            await qmp.qom_set(disk.qom_path, "drive", disk.node)
            await qmp.execute("blockdev-del", {"node-name": "between"})
        assert [disk.name for disk in await list_disks(qmp)] == list(disks)


async def test_what_is_no_disk_is_left_out_with_its_reason(qemu: QemuBinary, tmp_path: Path) -> None:
    extra = [
        *node("n0", raw(tmp_path, "a.raw")), "-device", "virtio-blk-pci,drive=n0,id=disk0",
        "-device", "ide-cd,bus=ide.0,id=empty",
        *drive(raw(tmp_path, "cd.iso"), "if=none,id=iso,media=cdrom"), "-device", "ide-cd,bus=ide.1,drive=iso,id=cd",
        *drive(raw(tmp_path, "r.raw"), "if=none,id=ro,readonly=on"), "-device", "virtio-blk-pci,drive=ro,id=fixed",
        *drive(raw(tmp_path, "u.raw"), "if=none,id=unused"),
        *drive(raw(tmp_path, "code.fd", 3653632), "if=pflash,unit=0,readonly=on"),
        *drive(raw(tmp_path, "vars.fd", 540672), "if=pflash,unit=1"),
    ]  # fmt: skip
    async with RunningQemu.start(qemu, [], extra=extra) as vm, connect(vm.qmp) as qmp:
        found = await survey(qmp)
        assert [disk.name for disk in found.disks] == ["drive-disk0.img"]
        assert {device.device: device.reason for device in found.left_out} == {
            "empty": "a removable medium",
            "cd": "a removable medium",
            "fixed": "read-only",
            "pflash0": "flash memory",
            "pflash1": "flash memory",
        }
        with pytest.raises(DiskNameError, match="cannot include disk 'fixed': it is left out: read-only"):
            await list_disks(qmp, include=["fixed"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["disk0", "disk1", "other"]),
        ({"include": ["disk*"]}, ["disk0", "disk1"]),
        ({"include": ["disk*"], "exclude": ["disk0"]}, ["disk1"]),
        ({"include": ["fmt-other"]}, ["other"]),
        ({"include": ["/machine/peripheral/disk1/virtio-backend"]}, ["disk1"]),
        ({"exclude": ["drive-disk0.img", "drive-disk1"]}, ["other"]),
        ({"exclude": ["*/two.raw"]}, ["disk0", "other"]),
        ({"exclude": ["*"]}, []),
        ({"exclude": ["no such disk"]}, ["disk0", "disk1", "other"]),
    ],
)
async def test_include_and_exclude_know_a_disk_by_all_its_names(
    distribution: QemuBinary, tmp_path: Path, options: dict[str, Any], expected: list[str]
) -> None:
    disks = [
        VmDisk(raw(tmp_path, "one.raw"), "disk0"),
        VmDisk(raw(tmp_path, "two.raw"), "disk1"),
        VmDisk(raw(tmp_path, "three.raw"), "other"),
    ]
    async with RunningQemu.start(distribution, disks) as vm, connect(vm.qmp) as qmp:
        assert sorted(disk.device for disk in await list_disks(qmp, **options)) == expected


async def test_names_of_the_configuration_win_and_clashes_ask_for_them(
    distribution: QemuBinary, tmp_path: Path
) -> None:
    extra = drive(raw(tmp_path, "a.raw"), "if=virtio")  # QEMU calls it virtio0
    disks = [VmDisk(raw(tmp_path, "b.raw"), "virtio0")]
    async with RunningQemu.start(distribution, disks, extra=extra) as vm, connect(vm.qmp) as qmp:
        with pytest.raises(DiskNameError, match=r"would both be drive-virtio0\.img; give one a name in the config"):
            await list_disks(qmp)
        named = {disk.node: disk.name for disk in await list_disks(qmp, names={"fmt-virtio0": "system"})}
        assert named.pop("fmt-virtio0") == "drive-system.img"
        assert list(named.values()) == ["drive-virtio0.img"]
        assert len(await list_disks(qmp, exclude=["fmt-virtio0"])) == 1
        with pytest.raises(DiskNameError, match="only letters, digits"):
            await list_disks(qmp, names={"fmt-virtio0": "a/../b"})
        with pytest.raises(DiskNameError, match=r"no such disk \(chosen: virtio0"):
            await list_disks(qmp, include=["fmt-virtio0", "missing"])


async def test_one_image_behind_two_devices_is_refused(distribution: QemuBinary, tmp_path: Path) -> None:
    extra = [
        *node("n0", raw(tmp_path, "a.raw")),
        *("-device", "virtio-blk-pci,drive=n0,id=path0,share-rw=on"),
        *("-device", "virtio-blk-pci,drive=n0,id=path1,share-rw=on"),
    ]
    async with RunningQemu.start(distribution, [], extra=extra) as vm, connect(vm.qmp) as qmp:
        with pytest.raises(DiskNameError, match=r"are one disk.*; exclude both"):
            await list_disks(qmp)
        assert [disk.device for disk in await list_disks(qmp, exclude=["path1"])] == ["path0"]


async def test_a_disk_that_another_program_serves_is_refused_until_it_is_excluded(
    qemu: QemuBinary, tmp_path: Path
) -> None:
    other = VmDisk(raw(tmp_path, "b.raw"), "b")
    async with RunningStorageDaemon.start(qemu, [other.blockdev()]) as daemon:
        address = {"type": "unix", "path": str(daemon.folder / "vhost")}
        export = {"type": "vhost-user-blk", "id": "e", "node-name": other.node, "addr": address, "writable": True}
        await daemon.execute("block-export-add", export)
        extra = [
            *("-object", "memory-backend-memfd,id=m,size=256M,share=on", "-machine", "memory-backend=m"),
            *("-chardev", f"socket,id=c,path={daemon.folder}/vhost", "-device", "vhost-user-blk-pci,chardev=c,id=past"),
        ]
        disk = VmDisk(raw(tmp_path, "a.raw"))
        async with RunningQemu.start(qemu, [disk], extra=extra) as vm, connect(vm.qmp) as qmp:
            with pytest.raises(VmUnsupportedError, match=r"back up disk past: another program .*; exclude it"):
                await survey(qmp)
            for found in (await survey(qmp, exclude=["past"]), await survey(qmp, include=["disk0"])):
                assert [one.device for one in found.disks] == ["disk0"]
                assert [(one.device, one.reason) for one in found.left_out] == [("past", "excluded")]


async def test_bitmaps_of_the_root_are_listed(qemu: QemuBinary, tmp_path: Path) -> None:
    disk = VmDisk(await image(qemu, tmp_path / "a.qcow2"), format="qcow2")
    async with RunningQemu.start(qemu, [disk]) as vm, connect(vm.qmp) as qmp:
        await qmp.execute(
            "block-dirty-bitmap-add",
            {"node": disk.node, "name": "mine", "granularity": 4 * MIB, "persistent": True, "disabled": True},
        )
        assert (await list_disks(qmp))[0].bitmaps == (
            {
                "name": "mine",
                "count": 0,
                "granularity": 4 * MIB,
                "recording": False,
                "busy": False,
                "persistent": True,
                "inconsistent": False,
            },
        )


async def test_capabilities_follow_the_version(qemu: QemuBinary) -> None:
    async with RunningQemu.start(qemu, []) as vm, connect(vm.qmp) as qmp:
        can = await capabilities(qmp)
    new = qemu.version >= (9, 1, 0)
    assert (can.version, can.flavour) == (qemu.version, "stock")
    assert (can.compat, can.allocation_map) == (qemu.version < (8, 2, 0), qemu.version >= (8, 2, 0))
    assert can.cbw_timeout_s == (45 if new else 4)


async def test_io_threads_need_qemu_9_1(qemu: QemuBinary, tmp_path: Path) -> None:
    disk = VmDisk(raw(tmp_path, "a.raw"), device_options="iothread=io0")
    extra = ["-object", "iothread,id=io0"]
    async with RunningQemu.start(qemu, [disk], extra=extra) as vm, connect(vm.qmp) as qmp:
        if qemu.version >= (9, 1, 0):
            assert (await capabilities(qmp)).cbw_timeout_s == 45
        else:
            with pytest.raises(VmUnsupportedError, match=r"I/O threads, and QEMU 7\.\d+\.\d+ aborts"):
                await capabilities(qmp)


@pytest.mark.parametrize(
    ("version", "compat", "refused"),
    [
        ((6, 2, 0), None, "its QEMU is 6.2.0; 7.2 is the oldest"),
        ((7, 1, 99), None, "7.2 is the oldest"),
        ((7, 2, 0), True, None),
        ((8, 1, 5), True, None),
        ((8, 2, 0), False, None),
        ((10, 2, 1), False, None),
    ],
)
async def test_versions_at_the_edges(version: tuple[int, int, int], compat: bool | None, refused: str | None) -> None:
    async with ScriptedQmp({"query-iothreads": []}, version=version).serving() as path, connect(path) as qmp:
        if refused:
            with pytest.raises(VmUnsupportedError, match=refused):
                await capabilities(qmp)
        else:
            assert (await capabilities(qmp)).compat is compat


async def test_a_missing_command_and_the_flavour_are_told() -> None:
    double = ScriptedQmp({"query-iothreads": []})
    double.commands.append("backup-access-setup")
    async with double.serving() as path:
        async with connect(path) as qmp:
            assert (await capabilities(qmp)).flavour == "proxmox"
        double.commands.remove("blockdev-reopen")
        async with connect(path) as qmp:
            with pytest.raises(VmUnsupportedError, match="lacks blockdev-reopen"):
                await capabilities(qmp)


async def test_a_job_makes_its_disk_busy_and_no_other(qemu: QemuBinary, tmp_path: Path) -> None:
    base = await image(qemu, tmp_path / "base.qcow2")
    await trio.run_process([qemu.tool("qemu-io"), "-c", "write -P 2 0 16M", str(base)], capture_stdout=True)
    with_base = ("-F", "qcow2", "-b", str(base))
    one = VmDisk(await image(qemu, tmp_path / "one.qcow2", *with_base), "one", format="qcow2")
    two = VmDisk(await image(qemu, tmp_path / "two.qcow2", *with_base), "two", format="qcow2")
    async with RunningQemu.start(qemu, [one, two]) as vm, connect(vm.qmp) as qmp:
        disks = {disk.device: disk for disk in await list_disks(qmp)}
        await check_vm(qmp, list(disks.values()))
        await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "copy", "size": 16 * MIB})
        for command, arguments in (
            ("blockdev-mirror", {"device": one.node, "target": "copy", "sync": "full"}),
            ("block-stream", {"device": one.node, "speed": 1}),
        ):
            await qmp.execute(command, {"job-id": "job0", **arguments})
            with pytest.raises(VmStateError, match="cannot back up disk one: the block job 'job0'"):
                await check_vm(qmp, list(disks.values()))
            await check_vm(qmp, [disks["two"]])
            await qmp.execute("block-job-cancel", {"device": "job0", "force": True})
            await qmp.poll("query-block-jobs", lambda jobs: not jobs, timeout_s=20)
        await check_vm(qmp, list(disks.values()))


async def test_a_disk_that_is_still_switched_is_refused(distribution: QemuBinary, tmp_path: Path) -> None:
    disk = VmDisk(raw(tmp_path, "a.raw"))
    async with RunningQemu.start(distribution, [disk]) as vm, connect(vm.qmp) as qmp:
        await qmp.execute("blockdev-add", {"driver": "raw", "node-name": "fleece-p0", "file": disk.node})
        await qmp.qom_set(vm.device_path("disk0"), "drive", "fleece-p0")
        disks = await list_disks(qmp)
        assert disks[0].name == "drive-disk0.img"
        with pytest.raises(VmStateError, match="switched to fleece-p0: another backup runs, or one was killed"):
            await check_vm(qmp, disks)


@pytest.mark.parametrize("status", ["inmigrate", "finish-migrate", "postmigrate", "io-error"])
async def test_states_in_which_no_backup_starts(status: str) -> None:
    double = ScriptedQmp({"query-status": {"status": status, "running": False}})
    async with double.serving() as path, connect(path) as qmp:
        with pytest.raises(VmStateError, match=rf"\(status {status}\)"):
            await check_vm(qmp, [])


@pytest.mark.parametrize(
    ("status", "refused"),
    [("setup", True), ("active", True), ("cancelling", True), ("failed", False), ("completed", False), (None, False)],
)
async def test_no_backup_starts_while_the_vm_migrates(status: str | None, refused: bool) -> None:
    migration = {} if status is None else {"status": status}
    answers = {"query-status": {"status": "running", "running": True}, "query-block-jobs": []}
    double = ScriptedQmp({**answers, "query-migrate": migration})
    async with double.serving() as path, connect(path) as qmp:
        expected = pytest.raises(VmStateError, match=rf"a migration of it is under way \(status {status}\)")
        with expected if refused else nullcontext():
            await check_vm(qmp, [])


def entry(**changes: Any) -> dict[str, Any]:
    """An entry of `query-block` for a disk without id and names of its own."""
    inserted = {
        "node-name": "#block123",
        "ro": False,
        "drv": "raw",
        "file": "/images/disk 1.raw",
        "image": {"virtual-size": MIB},
    }
    inserted |= changes.pop("inserted", {})
    return {
        "device": "",
        "qdev": "/machine/peripheral-anon/device[1]",
        "removable": False,
        "inserted": inserted,
        **changes,
    }


async def listed(entries: object, kind: object = "scsi-hd", **options: Any) -> Sequence[Disk]:
    double = ScriptedQmp({"query-block": entries, "qom-get": kind})
    async with double.serving() as path, connect(path) as qmp:
        return await list_disks(qmp, **options)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/images/disk 1.raw", "drive-disk_1.raw.img"),
        ("/dev/vg0/vm-1", "drive-vm-1.img"),
        ('json:{"driver": "raw", "file": {"driver": "file", "filename": "/a/b.raw"}}', "drive-b.raw.img"),
        ("nbd://host/export", "drive-export.img"),
        ("/images/" + "x" * 250, "drive-" + "x" * 200 + ".img"),
        ("json:{", "drive-_machine_peripheral-anon_device_1_.img"),
        ("", "drive-_machine_peripheral-anon_device_1_.img"),
    ],
)
async def test_without_any_id_the_image_gives_the_name(file: str, name: str) -> None:
    assert [disk.name for disk in await listed([entry(inserted={"file": file})])] == [name]


async def test_an_image_path_can_choose_and_name() -> None:
    both = [entry(), entry(qdev="/machine/peripheral-anon/device[2]", inserted={"node-name": "n2"})]
    disks = await listed(both, include=["/machine/peripheral-anon/device[2]"], names={"n2": "data"})
    assert [disk.name for disk in disks] == ["drive-data.img"]


@pytest.mark.parametrize("kind", ["scsi-generic", "scsi-block"])
async def test_pass_through_devices_are_refused_when_chosen(kind: str) -> None:
    with pytest.raises(VmUnsupportedError, match=f"a {kind} device passes QEMU by; exclude it"):
        await listed([entry()], kind)
    assert await listed([entry()], kind, exclude=["*"]) == []


@pytest.mark.parametrize(
    "entries",
    [
        {},
        [1],
        [entry(removable="no")],
        [entry(device=5)],
        [entry(qdev=["x"])],
        [entry(inserted={"node-name": None})],
        [entry(inserted={"ro": "yes"})],
        [entry(inserted={"image": []})],
        [entry(inserted={"image": {"virtual-size": "1"}})],
        [entry(inserted={"image": {"virtual-size": True}})],
        [entry(inserted={"dirty-bitmaps": {}})],
        [entry(inserted={"dirty-bitmaps": [{"name": "a"}]})],
        [entry(inserted={"dirty-bitmaps": [{"name": 1}]})],
        [entry(inserted={"file": {}})],
    ],
)
async def test_answers_of_another_form_are_errors(entries: object) -> None:
    with pytest.raises(QmpAnswerError, match="query-block"):
        await listed(entries)


@pytest.mark.parametrize("size", [0, -1, 1 << 63, 10**30])
async def test_a_size_that_no_disk_has_is_an_error(size: int) -> None:
    with pytest.raises(QmpAnswerError, match="bytes"):
        await listed([entry(inserted={"image": {"virtual-size": size}})])


async def test_names_cannot_steer_a_terminal() -> None:
    disks = await listed([entry(qdev="disk\x1b]0;title\x07", inserted={"node-name": "n0"})])
    assert [(disk.device, disk.name) for disk in disks] == [("disk?]0;title?", "drive-disk__0_title_.img")]


@pytest.mark.parametrize(
    ("given", "name"),
    [("scsi0", "drive-scsi0.img"), ("drive-scsi0.img", "drive-scsi0.img"), ("a b/c", "drive-a_b_c.img")],
)
def test_archive_names(given: str, name: str) -> None:
    assert archive_name(given) == name


@pytest.mark.parametrize("bad", ["", "x" * 201])
def test_names_that_cannot_be(bad: str) -> None:
    with pytest.raises(DiskNameError):
        archive_name(bad)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/a/b", "/a/b"),
        ("b.raw", "b.raw"),
        ("file:/a", "/a"),
        ("nbd://h/x", None),
        ("rbd:p/i", None),
        ("json:" + "[" * 100_000, None),
        ('json:{"driver": "ssh", "filename": "/a"}', None),
        ('json:{"file": {"file": {"driver": "host_device", "filename": "/dev/sda"}}}', "/dev/sda"),
    ],
)
def test_paths_in_names_of_images(name: str, path: str | None) -> None:
    assert image_path(name) == path
