"""The matrix of situations, by the real command: EFI variables, a TPM, VMs that are off, templates.

docs/hypervisor.md, "Situations". The quick tests take one cell of each.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk
from tests.vm.cells import ImageFormat, matrix_of
from tests.vm.lab import MIB, Lab, PlayedGuest, until

SIZE = 12 * MIB


async def disk_of(lab: Lab, qemu: QemuBinary, format: ImageFormat, name: str) -> VmDisk:
    """An empty disk."""
    path = await lab.qcow2(qemu, name, SIZE) if format == "qcow2" else lab.raw(name, SIZE)
    return VmDisk(path, name, format=format)


@contextmanager
def swtpm(folder: Path, state: Path) -> Iterator[list[str]]:
    """An emulated TPM with an encrypted state in the folder `state`; gives the options of a QEMU that uses it."""
    key = folder / "key"
    key.write_bytes(bytes(range(16)))
    control = folder / "tpm"
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"]
    command += ["--key", f"file={key},mode=aes-cbc,format=binary", "--terminate"]
    process = subprocess.Popen(["timeout", "120", *command], stdin=subprocess.DEVNULL)
    try:
        yield [
            *("-chardev", f"socket,id=tpm,path={control}"),
            *("-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm0"),
        ]
    finally:
        process.terminate()
        process.wait(30)


def firmware(folder: Path) -> list[str]:
    """Options of a QEMU with flash memory, whose variables lie in `vars.fd`."""
    (folder / "code.fd").write_bytes(bytes(3653632))
    return [
        *("-drive", f"file={folder}/code.fd,format=raw,if=pflash,unit=0,readonly=on"),
        *("-drive", f"file={folder}/vars.fd,format=raw,if=pflash,unit=1"),
    ]


@matrix_of("raw", "qcow2", quick=1)
async def test_efi_variables_and_tpm_state_come_back_with_the_disks(
    qemu: QemuBinary, format: ImageFormat, lab: Lab, tmpfs: Path
) -> None:
    disk = await disk_of(lab, qemu, format, "disk0")
    state, short = tmpfs / "state", tmpfs / "t"
    state.mkdir()
    short.mkdir()
    (tmpfs / "vars.fd").write_bytes((b"boot order" * 54068)[: 528 * 1024])
    lab.more["web"] = f'tpm-state = "{state}"\n'
    with swtpm(short, state) as options:
        await until((short / "tpm").exists)
        async with lab.vm(qemu, [disk], extra=[*options, *firmware(tmpfs)]) as vm:
            guest = PlayedGuest(vm, {"disk0": SIZE})
            await guest.write("disk0", 0x11, 0, MIB)
            await vm.execute("cont")
            await until(lambda: (state / "tpm2-00.permall").exists())
            unknown = await lab.fleece.json("vm", "show", *lab.arguments(vm, "other"))
            assert (
                "name its folder as tpm-state"
                in {left["device"]: left["reason"] for left in unknown["left-out"]}["tpm0"]
            )
            report = await lab.backup(vm)
            assert set(report.archives) == {"drive-disk0.img", "efivars.fd", "qemu-command.json", "tpm2-00.permall"}
            await lab.assert_restores(report, guest.images())
    folder = await lab.restored(report.document["snapshot"])
    assert (folder / "efivars.fd").read_bytes() == (tmpfs / "vars.fd").read_bytes()
    assert (folder / "tpm2-00.permall").read_bytes() == (state / "tpm2-00.permall").read_bytes()
    # A machine on what was restored starts: the TPM takes its state, which it could not without the key.
    new = tmpfs / "new"
    new.mkdir()
    (folder / "tpm2-00.permall").rename(new / "tpm2-00.permall")
    with swtpm(short, new) as options:
        await until((short / "tpm").exists)
        restored = VmDisk(folder / "drive-disk0.img", "disk0")
        async with RunningQemu.start(qemu, [restored], extra=options, memory_mib=64) as vm:
            await vm.execute("cont")
            await vm.qemu_io("disk0", "read -P 0x11 0 1M")
            assert (await vm.execute("query-tpm"))[0]["id"] == "tpm0"


@matrix_of("raw", "qcow2")
async def test_a_vm_that_is_off_is_read_in_full_with_all_that_belongs_to_it(
    qemu: QemuBinary, format: ImageFormat, lab: Lab, tmpfs: Path
) -> None:
    disk = await disk_of(lab, qemu, format, "disk0")
    state = tmpfs / "state"
    state.mkdir()
    (state / "tpm2-00.permall").write_bytes(b"state of a TPM")
    (tmpfs / "vars.fd").write_bytes(b"variables")
    lab.more["web"] = f'tpm-state = "{state}"\nefi-vars = "{tmpfs}/vars.fd"\n[vm.web.disks]\ndisk0 = "{disk.path}"\n'
    async with lab.vm(qemu, [disk]) as vm:
        guest = PlayedGuest(vm, {"disk0": SIZE})
        await guest.write("disk0", 0x11, 0, MIB)
        await lab.backup(vm)
        await guest.write("disk0", 0x22, 5 * MIB, MIB)
        await vm.quit()
    shown = (await lab.show(vm))["drive-disk0.img"]
    assert (shown["node"], shown["next"]) == (None, {"mode": "full", "reason": "the VM does not run", "bytes": SIZE})
    report = await lab.backup(vm)
    archive = report.archives["drive-disk0.img"]
    assert (archive["mode"], archive["reason"]) == ("full", "the VM does not run")
    assert archive["new"] == 4 * MIB  # the others are there already
    assert set(report.archives) == {"drive-disk0.img", "efivars.fd", "tpm2-00.permall"}
    await lab.assert_restores(report, guest.images())
    async with lab.vm(qemu, [disk]) as vm:
        guest = PlayedGuest.going_on(vm, guest)
        reason = "a newer snapshot was made without the dirty bitmap"
        if format == "raw":
            reason = "VM restarted since the previous backup"
        shown = (await lab.show(vm))["drive-disk0.img"]["next"]
        assert (shown["mode"], shown["reason"]) == ("full", reason)
        report = await lab.backup(vm)
        assert report.archives["drive-disk0.img"]["reason"] == reason
        await guest.write("disk0", 0x33, 9 * MIB, MIB)
        report = await lab.backup(vm)
        assert report.archives["drive-disk0.img"]["mode"] == "incremental"
        await lab.assert_restores(report, guest.images())


@matrix_of("raw", "qcow2", quick=1)
async def test_a_template_is_backed_up_beside_the_clones_that_run_on_it(
    qemu: QemuBinary, format: ImageFormat, lab: Lab, tmpfs: Path
) -> None:
    base = await disk_of(lab, qemu, format, "base")
    async with RunningQemu.start(qemu, [base], memory_mib=64) as vm:
        template = PlayedGuest(vm, {"base": SIZE})
        await template.write("base", 0x11, 0, 6 * MIB)
        await vm.quit()
    base.path.chmod(0o444)
    clone = tmpfs / "clone.qcow2"
    create = [qemu.img, "create", "-q", "-f", "qcow2", "-b", str(base.path), "-F", format, str(clone)]
    await trio.run_process(create)
    lab.more["template"] = f'qmp = "{tmpfs}/nobody"\n[vm.template.disks]\nbase = "{base.path}"\n'
    async with lab.vm(qemu, [VmDisk(clone, "disk0", format="qcow2")]) as vm:
        guest = PlayedGuest(vm, {"disk0": SIZE})
        guest.now["disk0"] = template.now["base"][:]
        await guest.write("disk0", 0x22, 5 * MIB, MIB)
        report = await lab.backup(vm)
        await lab.assert_restores(report, guest.images())
        lab.arguments(vm, "template")
        outcome = await lab.fleece.run("vm", "backup", "template")
        assert outcome.code == 0, outcome
        assert outcome.archives["drive-base.img"]["reason"] == "the VM does not run"
        await lab.assert_restores(outcome, template.images())
        await guest.write("disk0", 0x33, 9 * MIB, MIB)
        report = await lab.backup(vm)
        assert report.archives["drive-disk0.img"]["mode"] == "incremental"
        await lab.assert_restores(report, guest.images())
