"""What is known of one virtual machine: its section of the configuration, and what the command line says instead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from agent.config import Config, VmSection
from agent.places import scratch_dir
from agent.specifications import Specification, SpecificationKind, parse_specifications
from core.errors import FleeceError, NotFoundError, UsageError
from datastore.names import BackupType, Group, Namespace
from hypervisor.domain_address import DomainAddress, default_uri

if TYPE_CHECKING:
    from agent.libvirt_vm import LibvirtVm
    from hypervisor.flavours import DiskSelection
    from hypervisor.scratch import Scratch


@dataclass(frozen=True, slots=True)
class VmSettings:
    """One virtual machine, resolved."""

    label: str  #: as the user calls it
    id: str  #: backup id
    section: VmSection
    qmp: Path | None
    domain: DomainAddress | None  #: where libvirt has the VM
    guest_agent: Path | str | None  #: socket, or the address of a domain
    freeze_mounts: Sequence[str]  #: what of the guest is frozen, by its mount points; empty: all
    pause: str  #: `never`, `without-agent` or `always`
    scratch_folder: Path
    bitmap: str  #: `persistent`, `transient` or `none`
    flavour: str  #: `stock`, `proxmox`, or `auto`: what its QEMU offers
    include: Sequence[str]
    exclude: Sequence[str]
    files: Sequence[Specification]
    libvirt: "LibvirtVm | None" = None  #: what libvirt says of the domain; see `looked_up`
    formats: Mapping[str, str] = field(default_factory=dict)  #: of the section's disks, where it is known
    efi_format: str | None = None  #: of the file with the EFI variables; None: as its name says
    shared: frozenset[str] = frozenset()  #: devices of disks that others write to as well

    @property
    def monitor(self) -> str | None:
        """What `hypervisor.qmp.connect` takes; None if neither a socket nor a domain is known."""
        if self.domain is not None:
            return str(self.domain)
        return None if self.qmp is None else str(self.qmp)

    def group(self, ns: Namespace) -> Group:
        """The group of its snapshots."""
        return Group.parse(f"{BackupType.VM.value}/{self.id}", ns)

    @property
    def scratch(self) -> "Scratch":
        """Where its fleecing images go."""
        from hypervisor.scratch import Scratch

        return Scratch(self.scratch_folder, allow_shared=self.section.scratch_beside_disks)

    @property
    def selection(self) -> "DiskSelection":
        """Which of its disks are backed up, and their names."""
        from hypervisor.flavours import DiskSelection

        return DiskSelection(self.section.names, list(self.include) or None, list(self.exclude), self.shared)

    async def looked_up(self) -> "VmSettings":
        """The same with what libvirt says of it now, if it is a domain of libvirt's.

        Raises:
            FleeceError: as `agent.libvirt_vm.look_up`.
        """
        if self.domain is None:
            return self
        from agent.libvirt_vm import look_up

        return await look_up(self, self.domain)


@dataclass(frozen=True, slots=True)
class VmOptions:
    """What the command line says of a virtual machine."""

    name: str | None = None
    qmp: Path | None = None
    id: str | None = None
    guest_agent: Path | str | None = None
    scratch: Path | None = None
    bitmap: str | None = None
    flavour: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    no_freeze: bool = False
    libvirt: str | None = None
    connect: str | None = None
    freeze_mounts: Sequence[str] = ()
    pause: str | None = None


def resolve_vm(config: Config, options: VmOptions) -> VmSettings:
    """Join the section of the VM with the options; an option comes before the section.

    A domain of libvirt that neither has a section nor an id is backed up under its name.

    Raises:
        NotFoundError: the configuration has no VM of that name.
        UsageError: neither a VM nor a QMP socket with an id is named, or an id that is none.
    """
    name, section = _section(config, options)
    domain = _domain(options, section)
    backup_id = options.id or section.id or name or (None if domain is None else _id_of(domain))
    if not backup_id:
        raise UsageError(
            "find", "the virtual machine", "neither VM nor --libvirt DOMAIN nor --qmp SOCKET with --id ID is given",
            f"the configuration knows {', '.join(sorted(config.vm)) or 'none'}",
        )  # fmt: skip
    Group.parse(f"{BackupType.VM.value}/{backup_id}")
    freeze = section.freeze and not options.no_freeze
    agent = options.guest_agent or section.guest_agent or (str(domain) if domain is not None else None)
    files = parse_specifications(section.files)
    for one in files:
        if one.kind is not SpecificationKind.BLOB:
            raise UsageError("use the configuration of", name or backup_id, f"files: {one.name} is no small file")
    return VmSettings(
        label=name or backup_id,
        id=backup_id,
        section=section,
        qmp=None if domain is not None else options.qmp or section.qmp,
        domain=domain,
        guest_agent=agent if freeze else None,
        freeze_mounts=options.freeze_mounts or section.freeze_mounts,
        pause=options.pause or section.pause,
        scratch_folder=(options.scratch or section.scratch or config.scratch or scratch_dir()).absolute(),
        bitmap=options.bitmap or section.bitmap,
        flavour=options.flavour or section.flavour,
        include=options.include or section.include,
        exclude=options.exclude or section.exclude,
        files=files,
    )


def _section(config: Config, options: VmOptions) -> tuple[str | None, VmSection]:
    """Name and section of the VM; without its name those of the VM with that id, or that domain, or empty ones."""
    if options.name is not None:
        section = config.vm.get(options.name)
        if section is None:
            known = ", ".join(sorted(config.vm)) or "none"
            raise NotFoundError(
                "find the virtual machine", repr(options.name), f"the configuration knows {known}",
                "give --qmp SOCKET --id ID, or add a section [vm.NAME]",
            )  # fmt: skip
        return options.name, section
    if options.id is not None and (options.qmp is not None or options.libvirt is not None):
        for name, section in config.vm.items():
            if options.id == (section.id or name):
                return name, section
    elif options.libvirt is not None:
        for name, section in config.vm.items():
            if section.libvirt == options.libvirt and options.connect in (None, section.connect):
                return name, section
    return None, VmSection()


def _domain(options: VmOptions, section: VmSection) -> DomainAddress | None:
    """The domain that is meant; None if a socket is.

    Raises:
        UsageError: both are.
    """
    if options.qmp is not None and options.libvirt is not None:
        raise UsageError("find", "the virtual machine", "both --qmp and --libvirt are given")
    name = options.libvirt or (section.libvirt if options.qmp is None else None)
    if name is None:
        if options.connect is not None:
            raise UsageError("use", "--connect", "no domain is named", "give --libvirt DOMAIN")
        return None
    if "/" in name or not name.isprintable():
        raise UsageError("use the domain", repr(name[:60]), "that is no name of a domain")
    return DomainAddress(options.connect or section.connect or default_uri(), name)


def _id_of(domain: DomainAddress) -> str:
    """The backup id of a domain without a section: its name, as far as that may be one.

    Raises:
        UsageError: it may not.
    """
    try:
        Group.parse(f"{BackupType.VM.value}/{domain.domain}")
    except FleeceError as error:
        raise UsageError(
            "name the backups of", domain.domain, "its name is no backup id", "give one with --id ID"
        ) from error
    return domain.domain
