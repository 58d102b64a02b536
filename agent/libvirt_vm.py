"""A virtual machine that libvirt has: its settings completed from its description, and what of it goes along.

docs/libvirt.md, "What is in a backup".
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Final

from core.errors import SourceError, os_reason
from core.limits import in_io_thread
from hypervisor.domain_address import DomainAddress
from hypervisor.domain_xml import (
    DOMAIN_XML_NAME,
    LIVE_XML_NAME,
    DomainDescription,
    DomainDisk,
    parse_domain,
    without_secrets,
)
from hypervisor.efi import EFI_VARS_NAME
from hypervisor.efi import MAX_SIZE as MAX_EFI_VARS
from hypervisor.errors import VmStateError, VmUnsupportedError
from hypervisor.libvirt_host import check_no_job, domain_state, volume_path

if TYPE_CHECKING:
    from agent.vm_settings import VmSettings

#: Where swtpm keeps the state of a domain's TPM, below the folder of its UUID, by the TPM's version.
_TPM_FILES: Final = {"2.0": "tpm2/tpm2-00.permall", "1.2": "tpm1.2/tpm-00.permall"}
#: Bytes; a TPM keeps some ten KiB.
_MAX_TPM_STATE: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class LibvirtVm:
    """What libvirt says of a domain now."""

    address: DomainAddress
    name: str
    active: bool
    now: DomainDescription  #: as it runs, else as it is defined
    xml: str  #: what it will be when it is started next
    live_xml: str | None

    def blobs(self) -> list[tuple[str, bytes]]:
        """The descriptions, without secrets, as blobs of the snapshot; the one that defines it comes first."""
        found = [(f"{DOMAIN_XML_NAME}.blob", without_secrets(self.xml))]
        if self.live_xml is not None:
            found.append((f"{LIVE_XML_NAME}.blob", without_secrets(self.live_xml)))
        return found

    def tpm_state(self) -> Path | None:
        """The file with the state of the domain's TPM; None if it has none that libvirt emulates."""
        tpm = self.now.tpm
        file = None if tpm is None else _TPM_FILES.get(tpm.version)
        if tpm is None or file is None:
            return None
        if tpm.source is not None:
            given = Path(tpm.source)
            return given / Path(file).name if given.is_dir() else given
        return tpm_folder(self.address.uri) / self.now.uuid / file

    def read_tpm_state(self) -> tuple[str, bytes] | None:
        """Name and content of the blob with the TPM's state; None without a TPM. Blocks.

        Raises:
            SourceError: it cannot be read.
        """
        path = self.tpm_state()
        if path is None:
            return None
        # swtpm writes a new file and renames it: whichever is read is whole.
        return f"{path.name}.blob", _read(path, _MAX_TPM_STATE, "the state of the TPM")

    def read_efi_vars(self) -> tuple[str, bytes] | None:
        """Name and content of the blob with the EFI variables of a domain that does not run. Blocks.

        Raises:
            SourceError: they cannot be read.
        """
        if self.now.nvram is None:
            return None
        path = Path(self.now.nvram)
        if not path.exists():
            return None  # libvirt makes it at the first start
        return f"{EFI_VARS_NAME}.blob", _read(path, MAX_EFI_VARS, "the EFI variables")


def tpm_folder(uri: str) -> Path:
    """Where the libvirt at `uri` keeps the states of TPMs, by the domains' UUIDs."""
    if "/session" not in uri:
        return Path("/var/lib/libvirt/swtpm")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "libvirt/qemu/swtpm"


def _read(path: Path, limit: int, what: str) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
            content = file.read(limit + 1)
    except OSError as error:
        raise SourceError(f"read {what} in", str(path), os_reason(error)) from error
    if len(content) > limit:
        raise SourceError(f"read {what} in", str(path), f"more than {limit} bytes")
    return content


async def look_up(settings: "VmSettings", address: DomainAddress) -> "VmSettings":
    """`settings` with what libvirt says of the domain: names and paths of disks, whether it runs and has an agent.

    Raises:
        NotFoundError: there is no such domain.
        LibvirtError, FormatError: libvirt cannot be asked, or its answer not be read.
        VmUnsupportedError: the domain does not run, and a disk of it can be read only while it does.
    """
    state = await domain_state(address)
    now = parse_domain(state.live_xml or state.xml, f"libvirt's description of {state.name}")
    vm = LibvirtVm(address, state.name, state.active, now, state.xml, state.live_xml)
    given = settings.section.names
    names = {disk: name for disk in now.disks if (name := _named(disk, given)) is not None}
    include = [*(_devices(settings.include, now.disks, vm.active, given))]
    exclude = [*(_devices(settings.exclude, now.disks, vm.active, given))]
    agent = settings.guest_agent if now.has_agent or settings.guest_agent != str(address) else None
    settings = replace(settings, libvirt=vm, include=include, exclude=exclude, guest_agent=agent)
    if vm.active:
        by_id = {disk.alias or disk.target: name for disk, name in names.items()}
        shared = {disk.alias or disk.target for disk in now.disks if disk.shareable and not disk.read_only}
        section = settings.section.model_copy(update={"names": {**given, **by_id}})
        return replace(settings, section=section, shared=frozenset(shared))
    paths, formats = {}, {}
    for disk, name in names.items():
        if disk.is_disk and not any(fnmatchcase(name, pattern) for pattern in exclude):
            if include and not any(fnmatchcase(name, pattern) for pattern in include):
                continue
            paths[name], formats[name] = await _path_of(disk, address)
    section = settings.section.model_copy(update={"disks": paths})
    return replace(settings, section=section, formats=formats)


async def check_idle(settings: "VmSettings") -> None:
    """Refuse while libvirt is at work on the domain.

    Raises:
        VmStateError: it is.
    """
    if settings.libvirt is not None and settings.libvirt.active:
        await check_no_job(settings.libvirt.address)


async def check_still_off(vm: LibvirtVm) -> None:
    """The domain has not been started while its images were being locked.

    Raises:
        VmStateError: it has.
    """
    if (await domain_state(vm.address)).active:
        raise VmStateError("back up", str(vm.address), "it was started just now", "try again: it is backed up running")


def _named(disk: DomainDisk, given: Mapping[str, str]) -> str | None:
    """What the disk is called in archives: as the configuration says, else by its target."""
    for called in (disk.target, disk.alias, disk.source):
        if called and called in given:
            return given[called]
    return disk.target


def _devices(patterns: Sequence[str], disks: Sequence[DomainDisk], active: bool, given: Mapping[str, str]) -> list[str]:
    """`patterns` of targets (`vd*`) as what the disks are called in QEMU; others stay as they are."""
    result = []
    for pattern in patterns:
        meant = [disk for disk in disks if fnmatchcase(disk.target, pattern)]
        result += [disk.alias or disk.target if active else _named(disk, given) or disk.target for disk in meant]
        if not meant:
            result.append(pattern)
    return result


async def _path_of(disk: DomainDisk, address: DomainAddress) -> tuple[Path, str]:
    """Path and format of the image of a disk of a domain that does not run."""
    path = disk.source
    if disk.kind == "volume":
        pool, _, volume = disk.source.partition("/")
        path = await volume_path(address.uri, pool, volume)
    elif disk.kind not in ("file", "block"):
        raise _only_running(disk, f"its source is of the type {disk.source}")
    if disk.encrypted:
        raise _only_running(disk, "it is encrypted, and libvirt has the key")
    if disk.format not in ("raw", "qcow2"):
        raise _only_running(disk, f"its format is {disk.format}")
    return Path(path), disk.format


def _only_running(disk: DomainDisk, why: str) -> VmUnsupportedError:
    return VmUnsupportedError(
        "back up disk", disk.target, f"{why}, and the domain does not run", "exclude it, or start the domain"
    )


async def beside(vm: LibvirtVm) -> list[tuple[str, bytes]]:
    """The small files of a domain that does not run; see `LibvirtVm`.

    Raises:
        FormatError, SourceError: one cannot be read.
    """

    def read() -> list[tuple[str, bytes]]:
        found = [vm.read_efi_vars(), vm.read_tpm_state()]
        return [*vm.blobs(), *(one for one in found if one is not None)]

    return await in_io_thread(read)
