from collections.abc import Callable
from pathlib import Path
from subprocess import CalledProcessError

import pytest
import trio

from core.errors import NotFoundError, SourceError, UsageError
from hypervisor.errors import DiskInUseError, DiskNameError
from hypervisor.stopped import StoppedDisk, held, stopped_disks
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk

MIB = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    return path


async def as_qcow2(binary: QemuBinary, raw: Path) -> Path:
    path = raw.with_suffix(".qcow2")
    await trio.run_process([binary.img, "convert", "-O", "qcow2", str(raw), str(path)])
    return path


def test_disks_have_the_names_of_the_running_vm() -> None:
    disks = stopped_disks(
        {"scsi0": "/a/b.qcow2", "drive-x.img": "/dev/vg/x", "odd name": "c.img"}, {"odd name": "qcow2"}
    )
    assert disks == [
        StoppedDisk("drive-scsi0.img", "/a/b.qcow2", "qcow2"),
        StoppedDisk("drive-x.img", "/dev/vg/x", "raw"),
        StoppedDisk("drive-odd_name.img", "c.img", "qcow2"),
    ]


def test_clashes_and_unknown_formats_are_refused() -> None:
    with pytest.raises(DiskNameError, match=r"two of them would both be drive-a_b\.img"):
        stopped_disks({"a b": "/1", "a_b": "/2"})
    with pytest.raises(UsageError, match="'vmdk'"):
        stopped_disks({"a": "/1"}, {"a": "vmdk"})


@pytest.mark.parametrize("form", ["blockdev", "drive"])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_the_disk_of_a_running_vm_is_in_use(qemu: QemuBinary, raw: Path, kind: str, form: str) -> None:
    path = raw if kind == "raw" else await as_qcow2(qemu, raw)
    disks = stopped_disks({"disk0": str(path)})
    disk = VmDisk(path, format=kind, form=form)  # type: ignore[arg-type]  # two of the literals
    async with RunningQemu.start(qemu, [disk]) as vm:
        with pytest.raises(
            DiskInUseError, match=rf"it is in use by qemu-system\S* \(pid {vm.pid}\); stop it, or back up the running"
        ):
            async with held(disks):
                pytest.fail("not held")
        await vm.quit()
    async with held(disks):
        pass


async def test_a_read_only_user_does_not_disturb(distribution: QemuBinary, raw: Path) -> None:
    async with RunningQemu.start(distribution, [VmDisk(raw, read_only=True)]), held(stopped_disks({"a": str(raw)})):
        pass


async def test_several_readers_at_once(distribution: QemuBinary, raw: Path) -> None:
    disks = stopped_disks({"a": str(raw)})
    async with held(disks), held(disks):
        await trio.run_process([distribution.img, "convert", "-f", "raw", str(raw), str(raw) + ".copy"])


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_while_held_no_vm_starts_and_qemu_nbd_reads(qemu: QemuBinary, raw: Path, kind: str) -> None:
    path = raw if kind == "raw" else await as_qcow2(qemu, raw)
    disk = VmDisk(path, format=kind)  # type: ignore[arg-type]  # one of the two
    async with held(stopped_disks({"disk0": str(path)})):
        with pytest.raises(AssertionError, match='Failed to get "write" lock'):
            async with RunningQemu.start(qemu, [disk]):
                pass
        with pytest.raises(CalledProcessError):
            await trio.run_process(
                [qemu.tool("qemu-io"), "-f", kind, "-c", "write 0 64k", str(path)],
                capture_stderr=True,
                capture_stdout=True,
            )
        options = ["--read-only", "--format", kind, "--socket", str(path.parent / "s"), "--fork", "--pid-file"]
        await trio.run_process([qemu.nbd, *options, str(path.parent / "pid"), str(path)])
        server = int((path.parent / "pid").read_text())
        await trio.run_process(["nbdinfo", f"nbd+unix:///?socket={path.parent / 's'}"], capture_stdout=True)
        with trio.fail_after(60):
            while Path(f"/proc/{server}/exe").exists():  # noqa: ASYNC110 - another process
                await trio.sleep(0.02)
    async with RunningQemu.start(qemu, [disk]):
        pass


async def test_a_failure_lets_go_of_the_other_disks(distribution: QemuBinary, raw: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MIB))
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    async with RunningQemu.start(distribution, [VmDisk(raw)]):
        with pytest.raises(DiskInUseError):
            async with held(stopped_disks({"a": str(other), "b": str(raw)})):
                pass
    async with RunningQemu.start(distribution, [VmDisk(other)]):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: None, NotFoundError),
        (lambda path: path.symlink_to(path), SourceError),
    ],
    ids=["missing", "loop"],
)
async def test_what_cannot_be_opened_is_named(tmp_path: Path, make: Callable[[Path], None], error: type) -> None:
    path = tmp_path / "disk.raw"
    make(path)
    with pytest.raises(error, match=f"cannot read disk {path}: "):
        async with held(stopped_disks({"a": str(path)})):
            pass
