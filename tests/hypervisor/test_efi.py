from pathlib import Path
from typing import Any

import pytest
import trio

from core.errors import SourceError
from hypervisor.efi import efi_vars, find_efi_vars
from hypervisor.qmp import connect
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu
from tests.support.scripted_qmp import Refusal, ScriptedQmp

MIB = 1 << 20


async def flash(binary: QemuBinary, folder: Path, kind: str) -> tuple[list[str], bytes]:
    """Options for a VM with flash memory, and what is in its writable part."""
    content = (b"boot order" * 54068)[: 528 * 1024]
    variables = folder / "vars.raw"
    variables.write_bytes(content)
    path = variables.with_suffix("." + kind)
    if kind != "raw":
        await trio.run_process([binary.img, "convert", "-O", kind, str(variables), str(path)])
    code = folder / "code.fd"
    code.write_bytes(bytes(3653632))
    return [
        *("-drive", f"file={code},format=raw,if=pflash,unit=0,readonly=on"),
        *("-drive", f"file={path},format={kind},if=pflash,unit=1"),
    ], content


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_efi_variables_are_copied_by_qemu_and_leave_nothing(qemu: QemuBinary, tmp_path: Path, kind: str) -> None:
    extra, content = await flash(qemu, tmp_path, kind)
    async with RunningQemu.start(qemu, [], extra=extra) as vm:
        nodes = await vm.nodes()
        async with connect(vm.qmp) as qmp:
            began = trio.current_time()
            assert await efi_vars(qmp) == content
            assert await efi_vars(qmp) == content
            assert trio.current_time() - began < 10  # 0.03 s each on an idle machine; the guest may be frozen
        assert await vm.nodes() == nodes
        assert await vm.execute("query-jobs") == []
        kept = await vm.execute("query-fdsets")  # the test's own client is connected all the time
        assert len(kept) == (2 if qemu.version < (9, 1, 0) and kind != "raw" else 0)


async def test_descriptors_that_an_old_qemu_keeps_are_bounded(distribution: QemuBinary, tmp_path: Path) -> None:
    if distribution.version >= (9, 1, 0):
        pytest.skip("QEMU 9.1 and newer keep none")
    extra, content = await flash(distribution, tmp_path, "qcow2")
    async with RunningQemu.start(distribution, [], extra=extra) as vm, connect(vm.qmp) as qmp:
        for _ in range(16):
            assert await efi_vars(qmp) == content
        with pytest.raises(SourceError, match="keeps 16 descriptors of earlier backups"):
            await efi_vars(qmp)


async def test_a_file_that_qemu_names_but_does_not_have_open_is_not_read(
    distribution: QemuBinary, tmp_path: Path
) -> None:
    if distribution.version >= (9, 1, 0):
        pytest.skip("QEMU 9.1 and newer copy the variables themselves")
    extra, content = await flash(distribution, tmp_path, "raw")
    async with RunningQemu.start(distribution, [], extra=extra) as vm, connect(vm.qmp) as qmp:
        (tmp_path / "vars.raw").rename(tmp_path / "moved")
        (tmp_path / "vars.raw").write_bytes(b"of somebody else")
        assert await efi_vars(qmp) == content


async def test_efi_variables_can_be_read_after_a_killed_run(distribution: QemuBinary, tmp_path: Path) -> None:
    extra, content = await flash(distribution, tmp_path, "qcow2")
    async with RunningQemu.start(distribution, [], extra=extra) as vm, connect(vm.qmp) as qmp:
        size = len(content)
        await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "fleece-f9999", "size": size})
        assert await efi_vars(qmp) == content
        assert "fleece-f9999" not in await vm.nodes()
        # One that had copied them already.
        await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "fleece-f9999", "size": size})
        found = await find_efi_vars(qmp)
        assert found is not None
        job = {"job-id": "fleece-efi", "device": found.node, "target": "fleece-f9999", "sync": "full"}
        await qmp.execute("blockdev-backup", {**job, "auto-dismiss": False})
        await qmp.poll("query-jobs", lambda jobs: jobs[0]["status"] == "concluded", timeout_s=20)
        assert await efi_vars(qmp) == content
        assert await vm.execute("query-jobs") == []


async def test_cancelled_reading_of_efi_variables_leaves_nothing(distribution: QemuBinary, tmp_path: Path) -> None:
    extra, _ = await flash(distribution, tmp_path, "qcow2")
    async with RunningQemu.start(distribution, [], extra=extra) as vm, connect(vm.qmp) as qmp:
        cancelled = 0
        for step in range(12):
            with trio.move_on_after(0.002 * step) as scope:
                await efi_vars(qmp)
            cancelled += scope.cancelled_caught
            assert "fleece-f9999" not in await vm.nodes()
            assert await vm.execute("query-jobs") == []
        assert cancelled


async def test_a_vm_without_flash_has_no_efi_variables(distribution: QemuBinary) -> None:
    async with RunningQemu.start(distribution, []) as vm, connect(vm.qmp) as qmp:
        assert await efi_vars(qmp) is None


@pytest.mark.parametrize(
    ("size", "answers", "message"),
    [
        (1 << 40, {}, "a flash memory of 1099511627776 bytes"),
        (0, {}, "a flash memory of 0 bytes"),
        (MIB, {"blockdev-backup": Refusal("no such job")}, "no such job"),
        (MIB, {"query-jobs": [{"id": "fleece-efi", "status": "concluded", "error": "I/O error"}]}, "I/O error"),
        (MIB, {"query-jobs": []}, "QEMU has lost the job"),
    ],
)
async def test_efi_variables_that_cannot_be_read_are_an_error(size: int, answers: dict[str, Any], message: str) -> None:
    done: dict[str, Any] = {
        name: {} for name in ("blockdev-add", "blockdev-del", "blockdev-backup", "job-dismiss", "remove-fd")
    }
    inserted = {"node-name": "n1", "drv": "qcow2", "ro": False, "image": {"virtual-size": size}}
    entries = [{"qdev": "/machine/system.flash1", "inserted": inserted}]
    double = ScriptedQmp({**done, "query-block": entries, "add-fd": {"fdset-id": 3}, "query-fdsets": [], **answers})
    async with double.serving() as path, connect(path) as qmp:
        with pytest.raises(SourceError, match=message):
            await efi_vars(qmp)
    if size == MIB:
        assert [command for command, _ in double.seen[-2:]] == ["blockdev-del", "remove-fd"]
