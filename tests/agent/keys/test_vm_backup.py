"""A change of key or mode in the backups of a virtual machine."""

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk

from ..conftest import Fleece
from .conftest import MIB


@pytest.mark.qemu
async def test_the_backup_of_a_vm_is_incremental_with_the_same_key_and_full_with_another(
    distribution: QemuBinary, stored: Fleece, tmpfs: Path, key: Path, other_key: Path
) -> None:
    async def run(*arguments: str | Path) -> Any:
        answer = await trio.to_thread.run_sync(lambda: stored(*arguments, "--output", "json"))
        assert answer.code == 0, answer.err
        return answer.document

    (tmpfs / "scratch").mkdir()
    (stored.home / "fleece.toml").write_text(f'[vm.web]\nscratch = "{tmpfs}/scratch"\nscratch-beside-disks = true\n')
    await trio.run_process([distribution.img, "create", "-q", "-f", "qcow2", str(tmpfs / "a.qcow2"), "24M"])
    disk = VmDisk(tmpfs / "a.qcow2", "disk0", format="qcow2")
    async with RunningQemu.start(distribution, [disk], memory_mib=64) as vm:
        await vm.qemu_io("disk0", "write -P 0x11 0 10M")
        target = ("--qmp", vm.qmp, "--id", "web")

        async def backup(*arguments: str | Path) -> tuple[str, str, str | None]:
            # Backups of one group have different seconds.
            await trio.sleep(1.1)
            shown = await run("vm", "show", *target, *arguments)
            report = await run("vm", "backup", *target, *arguments)
            archive = next(one for one in report["archives"] if one["name"] == "drive-disk0.img")
            after = shown["disks"][0]["next"]
            assert (after["mode"], after["reason"]) == (archive["mode"], archive["reason"])
            snapshot: str = report["snapshot"]
            return snapshot, archive["mode"], archive["reason"]

        assert (await backup("--keyfile", key))[1] == "full"
        await vm.qemu_io("disk0", "write -P 0x22 5M 64k")
        snapshot, mode, reason = await backup("--keyfile", key)
        assert (mode, reason) == ("incremental", None)
        out = tmpfs / "out.raw"
        await trio.to_thread.run_sync(lambda: stored("restore", snapshot, "drive-disk0.img", out, "--keyfile", key))
        wanted = b"\x11" * (5 * MIB) + b"\x22" * 65536 + b"\x11" * (5 * MIB - 65536) + bytes(14 * MIB)
        assert out.read_bytes() == wanted
        assert (await backup("--keyfile", other_key))[1:] == ("full", "key changed")
        assert (await backup())[1:] == ("full", "key changed")
        assert (await backup("--keyfile", key, "--crypt-mode", "sign-only"))[1:] == ("full", "key changed")
        assert (await backup("--keyfile", key))[1:] == ("full", "crypt mode changed")
    assert {one["filename"]: one["crypt-mode"] for one in stored.json("list")[0]["files"]}[
        "drive-disk0.img.fidx"
    ] == "encrypt"
