"""What starts a restored machine: its configuration out of the backup, firmware of this host, and a script.

`hypervisor.machine` knows what a configuration says; here is what a restore makes of it. docs/vm-restore.md, "The
script".
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from agent.vm_restore import RestoredVm
from core.errors import TargetError, UsageError, os_reason
from core.limits import in_io_thread
from core.progress import Progress
from datastore.manifest import Manifest
from datastore.names import strip_archive_type
from hypervisor.efi import EFI_VARS_NAME
from hypervisor.efi_firmware import VARIABLES_SIZES, find_firmware, is_for_secure_boot
from hypervisor.machine import Backing, Firmware, Machine, from_files, start_script
from hypervisor.machine_model import machine_name
from hypervisor.nbd_address import NbdAddress
from hypervisor.tpm import STATE_NAME

#: Sockets of the machine lie in this folder beside its disks.
RUN_FOLDER: Final = "run"
TPM_FOLDER: Final = "tpm"
SCRIPT_NAME: Final = "start.sh"
_VARIABLES_NODE: Final = "efi-variables"
#: Bytes of the path of a unix socket.
_MAX_SOCKET_PATH: Final = 107
#: Bytes of a small file that is looked into.
_MAX_FILE: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptOptions:
    """What a person says about the script."""

    path: Path | None = None  #: None: `start.sh` in the machine's folder
    network: str | None = None  #: `user`, or a bridge of the host; None: no network
    firmware: Path | None = None  #: EFI firmware; None: the one of the host that fits

    def to_json(self) -> dict[str, str | None]:
        """What `from_json` reads back."""
        paths = {"path": self.path, "firmware": self.firmware}
        absolute = {name: None if path is None else str(path.absolute()) for name, path in paths.items()}
        return {**absolute, "network": self.network}

    @classmethod
    def from_json(cls, value: Mapping[str, str | None]) -> Self:
        """The options that were written down."""
        path, firmware = (None if (text := value.get(name)) is None else Path(text) for name in ("path", "firmware"))
        return cls(path=path, firmware=firmware, network=value.get("network"))


def images_of(manifest: Manifest) -> list[str]:
    """Names of all disk images of a snapshot, without type."""
    return [strip_archive_type(file.filename) for file in manifest.files if file.filename.endswith(".img.fidx")]


def machine_of(vm: RestoredVm) -> Machine:
    """The machine that the small files of the backup describe, by its name of today. Blocks."""
    files = {}
    for name, path in vm.files.items():
        with path.open("rb") as file:
            files[name] = file.read(_MAX_FILE)
    archives = [*(disk.archive for disk in vm.disks), *vm.left_out]
    machine = from_files(files, archives)
    named = vm.name != vm.snapshot.split("/")[1] or machine.name == Machine().name  # by a person; by nobody
    renamed = machine_name(vm.name) if named else None
    return replace(machine, name=renamed or machine.name)


def firmware_for(machine: Machine, vm: RestoredVm, given: Path | None, progress: Progress) -> Firmware | None:
    """The EFI firmware of this host that fits the machine's variables; None, and a warning, without one. Blocks."""
    if not machine.efi:
        return None
    kept = next((disk for disk in vm.disks if disk.archive == machine.efi_archive and disk.kind != "nbd"), None)
    variables, size = None, None
    if EFI_VARS_NAME in vm.files:
        path = vm.files[EFI_VARS_NAME]
        size = path.stat().st_size
        variables = Backing.file(path, _VARIABLES_NODE)
    elif kept is not None:
        # Proxmox VE keeps them in a volume that may be larger.
        size = max([one for one in VARIABLES_SIZES if one <= kept.size], default=kept.size)
        variables = _part(Path(kept.target), kept.format, size)
    code = given or find_firmware(machine.arch, variables=size, secure=machine.secure_boot)
    if code is None or not code.is_file():
        progress.warn(
            "the machine has EFI firmware, and none on this host fits its variables: it would start as with a BIOS; "
            "install the package ovmf (or qemu-efi-aarch64), or give --firmware"
        )
        return None
    if machine.secure_boot and given is None and not is_for_secure_boot(code):
        progress.warn(
            f"the machine has firmware for Secure Boot, and this host has none that fits its variables: it gets "
            f"{code}, which may not know Secure Boot; install the package ovmf, or give --firmware"
        )
    return Firmware(code, variables)


def _part(path: Path, format: str, size: int) -> Backing:
    """The first `size` bytes of an image as a disk."""
    below = Backing.file(path, f"{_VARIABLES_NODE}-image", format=format)
    top: dict[str, Any] = {"driver": "raw", "node-name": _VARIABLES_NODE, "file": below.node, "size": size}
    return Backing([*below.nodes, top], _VARIABLES_NODE)


def disk_nodes(vm: RestoredVm, progress: Progress) -> dict[str, Backing]:
    """The disks by archive, as QEMU opens them. Blocks."""
    found = {}
    for number, disk in enumerate(vm.disks):
        node = f"disk{number}"
        try:
            if disk.kind == "nbd":
                found[disk.archive] = Backing.nbd(NbdAddress.parse(disk.target), node)
            else:
                found[disk.archive] = Backing.file(Path(disk.target), node, format=disk.format)
        except UsageError as error:
            progress.warn(f"the script is without {disk.archive}: {error.why}")
    return found


async def write_script(vm: RestoredVm, options: ScriptOptions, progress: Progress) -> None:
    """A `Definer`: the script that starts the machine.

    Raises:
        TargetError: it cannot be written.
        UsageError: a network that is none.
    """
    path = (options.path or vm.folder / SCRIPT_NAME).absolute()
    left_out = await in_io_thread(_write_script, vm, options, path, progress)
    vm.definitions.append({"type": "script", "path": str(path), "left-out": left_out, "line": f"start it with {path}"})


def _write_script(vm: RestoredVm, options: ScriptOptions, path: Path, progress: Progress) -> list[str]:
    machine = machine_of(vm)
    firmware = firmware_for(machine, vm, options.firmware, progress)
    for warning in machine.warnings:
        progress.warn(warning)
    tpm_state = tpm_folder(vm) if machine.tpm is not None else None
    if machine.tpm is not None and tpm_state is None:
        progress.warn("the state of its TPM is not in the backup as swtpm keeps it: the script is without the TPM")
    for warning in _unfit_folder(vm.folder, tpm=tpm_state is not None):
        progress.warn(warning)
    remarks = [f"From {vm.snapshot}."]
    if options.network is None and machine.cards:
        remarks.append(
            "Without network, as the machine it was made of may still run: restore with --network to have one."
        )
    text = start_script(
        machine,
        disk_nodes(vm, progress),
        folder=vm.folder / RUN_FOLDER,
        firmware=firmware,
        network=options.network,
        tpm_state=tpm_state,
        remarks=remarks,
    )
    write_program(path, text)
    return list(machine.left_out)


def _unfit_folder(folder: Path, *, tpm: bool) -> list[str]:
    """Why the machine could not be started in `folder`."""
    found = []
    if len(os.fsencode(folder / RUN_FOLDER / "serial.sock")) > _MAX_SOCKET_PATH:
        found.append(f"the path {folder} is too long for sockets in it: the script cannot start the machine there")
    if tpm and "," in str(folder):
        found.append(f"the path {folder} has a comma, which swtpm does not take: the script cannot start the machine")
    return found


def tpm_folder(vm: RestoredVm) -> Path | None:
    """The folder with the state of the TPM, made of the small files that hold it; None without any. Blocks.

    Raises:
        TargetError: it cannot be made.
    """
    states = {name: path for name, path in vm.files.items() if STATE_NAME.fullmatch(name)}
    if not states:
        return None
    folder = vm.folder / TPM_FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for name, path in states.items():
            path.replace(folder / name)
            vm.files[name] = folder / name
    except OSError as error:
        raise TargetError("write", str(folder), os_reason(error)) from error
    return folder


def write_program(path: Path, text: str) -> None:
    """Write a script that can be run, whole or not at all. Blocks.

    Raises:
        TargetError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), 0o755)
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TargetError("write", str(path), os_reason(error)) from error


def script_writes(folder: Path, options: ScriptOptions) -> Sequence[Path]:
    """What `write_script` writes, for `RestoreOrder.writes`."""
    return [(options.path or folder / SCRIPT_NAME).absolute()]
