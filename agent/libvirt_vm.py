"""A virtual machine that libvirt has: its settings completed from its description, and what of it goes along.

docs/libvirt.md, "What is in a backup".
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Final

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
from hypervisor.errors import VmStateError, VmUnsupportedError
from hypervisor.libvirt_host import check_no_job, domain_state, volume_path
from hypervisor.vm import check_identity

if TYPE_CHECKING:
    from agent.config import VmSection
    from agent.vm_settings import VmSettings

#: Where swtpm keeps the state of a domain's TPM, below the folder of its UUID, by the TPM's version.
TPM_FILES: Final = {"2.0": "tpm2/tpm2-00.permall", "1.2": "tpm1.2/tpm-00.permall"}


@dataclass(frozen=True, slots=True)
class LibvirtVm:
    """What libvirt says of a domain now."""

    address: DomainAddress
    name: str
    active: bool
    now: DomainDescription  #: as it runs, else as it is defined
    xml: str  #: what it will be when it is started next
    live_xml: str | None
    saved: bool = False  #: it does not run, and goes on from a managed save

    def blobs(self) -> list[tuple[str, bytes]]:
        """The descriptions, without secrets, as blobs of the snapshot; the one that defines it comes first."""
        found = [(f"{DOMAIN_XML_NAME}.blob", without_secrets(self.xml))]
        if self.live_xml is not None:
            found.append((f"{LIVE_XML_NAME}.blob", without_secrets(self.live_xml)))
        return found

    def tpm_state(self) -> Path | None:
        """The folder or file with the state of the domain's TPM; None if it has none that libvirt emulates."""
        tpm = self.now.tpm
        if tpm is None or tpm.version not in TPM_FILES:
            return None
        if tpm.source is not None:
            return Path(tpm.source)
        return (tpm_folder(self.address.uri) / self.now.uuid / TPM_FILES[tpm.version]).parent


def tpm_folder(uri: str) -> Path:
    """Where the libvirt at `uri` keeps the states of TPMs, by the domains' UUIDs."""
    if "/session" not in uri:
        return Path("/var/lib/libvirt/swtpm")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "libvirt/qemu/swtpm"


async def look_up(settings: "VmSettings", address: DomainAddress) -> "VmSettings":
    """`settings` with what libvirt says of the domain: names and paths of disks, whether it runs and has an agent.

    Raises:
        NotFoundError: there is no such domain.
        LibvirtError, FormatError: libvirt cannot be asked, or its answer not be read.
        VmUnsupportedError: the domain does not run, and a disk of it can be read only while it does; or another program
            has the disk.
    """
    state = await domain_state(address)
    now = parse_domain(state.live_xml or state.xml, f"libvirt's description of {state.name}")
    vm = LibvirtVm(address, state.name, state.active, now, state.xml, state.live_xml, state.saved)
    given = settings.section.names
    names = {disk: name for disk in now.disks if (name := _named(disk, given)) is not None}
    include = [*(_devices(settings.include, now.disks, vm.active, given))]
    exclude = [*(_devices(settings.exclude, now.disks, vm.active, given))]
    section = await in_io_thread(_with_places, settings.section, vm)
    if settings.section.efi_vars is None:
        settings = replace(settings, efi_format=now.nvram_format)
    agent = settings.guest_agent if now.has_agent or settings.guest_agent != str(address) else None
    settings = replace(settings, libvirt=vm, include=include, exclude=exclude, guest_agent=agent)
    if vm.active:
        _check_seen(names, include, exclude)
        by_id = {disk.alias or disk.target: name for disk, name in names.items()}
        shared = {disk.alias or disk.target for disk in now.disks if disk.shareable and not disk.read_only}
        section = section.model_copy(update={"names": {**given, **by_id}})
        return replace(settings, section=section, shared=frozenset(shared))
    paths, formats = {}, {}
    for disk, name in names.items():
        if disk.is_disk and not any(fnmatchcase(name, pattern) for pattern in exclude):
            if include and not any(fnmatchcase(name, pattern) for pattern in include):
                continue
            paths[name], formats[name] = await _path_of(disk, address)
    section = section.model_copy(update={"disks": paths})
    return replace(settings, section=section, formats=formats)


def _with_places(section: "VmSection", vm: LibvirtVm) -> "VmSection":
    """`section` with where EFI variables and TPM state are, unless it says so itself. libvirt makes them at a start."""
    tpm, nvram = vm.tpm_state(), vm.now.nvram
    found = {
        "tpm_state": tpm if tpm is not None and tpm.exists() else None,
        "efi_vars": Path(nvram) if nvram is not None and Path(nvram).exists() else None,
    }
    given = {name for name in found if getattr(section, name) is not None}
    return section.model_copy(update={name: path for name, path in found.items() if name not in given})


async def check_idle(settings: "VmSettings") -> None:
    """Refuse while libvirt is at work on the domain, and what is another VM than the one that is meant.

    Raises:
        VmStateError: it is.
        FleecingError: it is another VM.
        QmpError, QmpAnswerError: QEMU cannot be talked to.
    """
    if settings.qmp is not None and settings.section.uuid is not None:
        await check_identity(str(settings.qmp), settings.section.uuid)
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
    if disk.sliced:
        raise _only_running(disk, "it is only a part of its file")
    if disk.encrypted:
        raise _only_running(disk, "it is encrypted, and libvirt has the key")
    if disk.format not in ("raw", "qcow2"):
        raise _only_running(disk, f"its format is {disk.format}")
    return Path(path), disk.format


def _check_seen(names: Mapping[DomainDisk, str], include: Sequence[str], exclude: Sequence[str]) -> None:
    """Refuse a chosen disk that QEMU knows nothing of: nobody would notice that it is missing.

    Raises:
        VmUnsupportedError: there is one.
    """
    for disk, name in names.items():
        if disk.source == "vhostuser" and disk.kind == "other" and disk.is_disk:
            aliases = {name, f"drive-{name}.img", disk.target, disk.alias or disk.target}
            chosen = not include or any(fnmatchcase(alias, pattern) for alias in aliases for pattern in include)
            if chosen and not any(fnmatchcase(alias, pattern) for alias in aliases for pattern in exclude):
                raise VmUnsupportedError(
                    "back up disk", disk.target, "another program serves it to the guest, past QEMU (vhost-user)",
                    "exclude it",
                )  # fmt: skip


def _only_running(disk: DomainDisk, why: str) -> VmUnsupportedError:
    return VmUnsupportedError(
        "back up disk", disk.target, f"{why}, and the domain does not run", "exclude it, or start the domain"
    )
