"""What is known of one virtual machine: its section of the configuration, and what the command line says instead."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent.config import Config, VmSection
from agent.places import scratch_dir
from agent.specifications import Specification, SpecificationKind, parse_specifications
from core.errors import NotFoundError, UsageError
from datastore.names import BackupType, Group, Namespace

if TYPE_CHECKING:
    from hypervisor.flavours import DiskSelection
    from hypervisor.scratch import Scratch


@dataclass(frozen=True, slots=True)
class VmSettings:
    """One virtual machine, resolved."""

    label: str  #: as the user calls it
    id: str  #: backup id
    section: VmSection
    qmp: Path | None
    guest_agent: Path | None
    scratch_folder: Path
    bitmap: str  #: `persistent`, `transient` or `none`
    flavour: str  #: `stock`, `proxmox`, or `auto`: what its QEMU offers
    include: Sequence[str]
    exclude: Sequence[str]
    files: Sequence[Specification]

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

        return DiskSelection(self.section.names, list(self.include) or None, list(self.exclude))


@dataclass(frozen=True, slots=True)
class VmOptions:
    """What the command line says of a virtual machine."""

    name: str | None = None
    qmp: Path | None = None
    id: str | None = None
    guest_agent: Path | None = None
    scratch: Path | None = None
    bitmap: str | None = None
    flavour: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    no_freeze: bool = False


def resolve_vm(config: Config, options: VmOptions) -> VmSettings:
    """Join the section of the VM with the options; an option comes before the section.

    Raises:
        NotFoundError: the configuration has no VM of that name.
        UsageError: neither a VM nor a QMP socket with an id is named, or an id that is none.
    """
    name, section = _section(config, options)
    backup_id = options.id or section.id or name
    if not backup_id:
        raise UsageError(
            "find", "the virtual machine", "neither VM nor --qmp SOCKET with --id ID is given",
            f"the configuration knows {', '.join(sorted(config.vm)) or 'none'}",
        )  # fmt: skip
    Group.parse(f"{BackupType.VM.value}/{backup_id}")
    freeze = section.freeze and not options.no_freeze
    files = parse_specifications(section.files)
    for one in files:
        if one.kind is not SpecificationKind.BLOB:
            raise UsageError("use the configuration of", name or backup_id, f"files: {one.name} is no small file")
    return VmSettings(
        label=name or backup_id,
        id=backup_id,
        section=section,
        qmp=(options.qmp or section.qmp),
        guest_agent=(options.guest_agent or section.guest_agent) if freeze else None,
        scratch_folder=(options.scratch or section.scratch or config.scratch or scratch_dir()).absolute(),
        bitmap=options.bitmap or section.bitmap,
        flavour=options.flavour or section.flavour,
        include=options.include or section.include,
        exclude=options.exclude or section.exclude,
        files=files,
    )


def _section(config: Config, options: VmOptions) -> tuple[str | None, VmSection]:
    """Name and section of the VM; with `--qmp` and `--id` only, those of the VM with that id, or empty ones."""
    if options.name is not None:
        section = config.vm.get(options.name)
        if section is None:
            known = ", ".join(sorted(config.vm)) or "none"
            raise NotFoundError(
                "find the virtual machine", repr(options.name), f"the configuration knows {known}",
                "give --qmp SOCKET --id ID, or add a section [vm.NAME]",
            )  # fmt: skip
        return options.name, section
    if options.qmp is None or options.id is None:
        return None, VmSection()
    for name, section in config.vm.items():
        if options.id == (section.id or name):
            return name, section
    return None, VmSection()
