"""A virtual machine out of a backup: what its stored configuration says, as a command line of QEMU or a start script.

    from_command_line       qemu-command.json, as Fleece stores it of a VM of stock QEMU
    from_qemu_server_conf   qemu-server.conf of Proxmox VE
    from_domain_xml         a domain of libvirt
    from_files              whichever of these a snapshot has, else a plain machine with its disks
    command_line            the way back, for disks that lie wherever the caller has put them
    start_script            the same as a shell script

Only what `machine_model` lists is taken over, so that no configuration can make QEMU open a file, run a program or
reach a network. docs/test-boot.md, "The machine".
"""

import json
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from core.errors import FormatError, UsageError
from hypervisor.checked import printable
from hypervisor.cmdline import COMMAND_LINE_NAME
from hypervisor.efi import EFI_VARS_NAME
from hypervisor.machine_buses import Buses
from hypervisor.machine_from_conf import from_qemu_server_conf as from_qemu_server_conf
from hypervisor.machine_from_line import from_command_line as from_command_line
from hypervisor.machine_from_xml import from_domain_xml as from_domain_xml
from hypervisor.machine_model import Device as Device
from hypervisor.machine_model import Machine as Machine
from hypervisor.machine_model import MachineDisk as MachineDisk
from hypervisor.machine_model import Notes, pair, special_archives
from hypervisor.nbd_address import NbdAddress

#: What Proxmox VE's configuration of a VM is called in its backups, without `.blob`.
PROXMOX_CONFIG_NAME: Final = "qemu-server.conf"
_Reader = Callable[[bytes, Sequence[str]], Machine]
#: Names of network interfaces of the host.
_BRIDGE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
#: Node names of firmware; disks have others.
_CODE_NODE: Final = "fleece-fw-code"
_VARIABLES_NODE: Final = "fleece-fw-vars"


@dataclass(frozen=True, slots=True)
class Backing:
    """Where the bytes of a disk (or of the EFI variables) lie: block nodes, each as `-blockdev` takes them."""

    nodes: Sequence[Mapping[str, Any]]
    node: str  #: name of the one that the device uses

    @classmethod
    def file(cls, path: Path, node: str, *, format: str = "raw", read_only: bool = False) -> "Backing":
        """An image file or block device of this host, never probed for its format; `node` has up to 31 characters."""
        driver = "host_device" if path.is_block_device() else "file"
        below = {"driver": driver, "filename": str(path.absolute()), "read-only": read_only}
        if not read_only:
            below["discard"] = "unmap"
        top = {"driver": format, "node-name": node, "read-only": read_only, "file": below}
        return cls([top if read_only else top | {"discard": "unmap", "detect-zeroes": "unmap"}], node)

    @classmethod
    def nbd(cls, address: NbdAddress, node: str, *, read_only: bool = False, reconnect_s: int = 60) -> "Backing":
        """An NBD export on a unix socket.

        Raises:
            UsageError: the export is on a host: QEMU would need more than its name.
        """
        if not address.socket:
            raise UsageError("use the NBD export", str(address), "only exports on unix sockets can be a disk here")
        server = {"type": "unix", "path": address.socket}
        below = {
            "driver": "nbd", "server": server, "export": address.export, "reconnect-delay": reconnect_s,
            "open-timeout": 30, "read-only": read_only,
        }  # fmt: skip
        return cls([{"driver": "raw", "node-name": node, "read-only": read_only, "file": below}], node)


@dataclass(frozen=True, slots=True)
class Firmware:
    """EFI firmware of this host."""

    code: Path
    variables: Backing | None = None  #: None: every start begins with empty ones


@dataclass(frozen=True, slots=True)
class Channels:
    """Ways to the machine: paths of unix sockets that QEMU makes, or descriptors of connected ones it inherits."""

    qmp: Path | int | None = None
    serial: Path | int | None = None  #: the first serial port
    agent: Path | int | None = None  #: the guest agent's
    tpm: Path | int | None = None  #: control socket of a running swtpm; without it the machine has no TPM


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that QEMU boots directly, named by a person and never by a configuration."""

    kernel: Path
    initrd: Path | None = None
    arguments: str | None = None  #: None: those of the configuration


def from_files(files: Mapping[str, bytes], archives: Sequence[str]) -> Machine:
    """The machine that the small files of a snapshot describe.

    Args:
        files: content by name without `.blob`: `qemu-command.json`, `qemu-server.conf`, `NAME.xml`, `efivars.fd`.
        archives: its disk images.

    A configuration that cannot be read is a warning of the machine; without any, or if none can be read, it is a plain
    one. Never raises.
    """
    readers: list[tuple[str, _Reader]] = [(PROXMOX_CONFIG_NAME, from_qemu_server_conf)]
    readers += [(name, from_domain_xml) for name in files if name.endswith(".xml")]
    readers += [(COMMAND_LINE_NAME, from_command_line)]
    problems: list[str] = []
    for name, reader in readers:
        if name in files:
            try:
                machine = reader(files[name], archives)
            except FormatError as error:
                problems.append(str(error))
            else:
                efi = machine.efi or EFI_VARS_NAME in files
                return replace(machine, efi=efi, warnings=(*problems, *machine.warnings))
    problems.append("the backup has no configuration of a machine that can be read: a plain one is made")
    notes = Notes()
    disks = pair([], archives, notes, arch="x86_64")
    efi_archive, tpm_archive = special_archives(archives)
    return Machine(
        disks=disks, efi=efi_archive is not None or EFI_VARS_NAME in files, display=Device("VGA"),
        efi_archive=efi_archive, tpm_archive=tpm_archive, warnings=tuple(problems),
    )  # fmt: skip


def command_line(
    machine: Machine,
    disks: Mapping[str, Backing],
    *,
    program: str | None = None,
    accel: Sequence[str] = ("kvm", "tcg"),
    cpu: str | None = None,
    memory: int | None = None,
    cpus: int | None = None,
    firmware: Firmware | None = None,
    kernel: Kernel | None = None,
    network: str | None = None,
    channels: Channels = Channels(),
    known_types: Collection[str] | None = None,
    places: bool = True,
) -> list[str]:
    """The command line that starts `machine`; nothing of it comes unchecked from a stored configuration.

    Args:
        machine: what to start.
        disks: by archive name (`drive-scsi0.img`); disks of the machine that are not among them are left out.
        program: QEMU; None: `qemu-system-ARCH`.
        accel: accelerators, the first that works is taken.
        cpu: processor model; None: the machine's, where `host` becomes `max`, which any accelerator has.
        memory: bytes; None: the machine's.
        cpus: None: the machine's, with its topology.
        firmware: for a machine with EFI; without it that starts like one with a BIOS.
        kernel: booted instead of what is on the disks.
        network: None: no network cards; `user`: QEMU's own network; else the name of a bridge of the host.
        channels: sockets.
        known_types: machine types that `program` has; others become the newest of their kind.
        places: False puts devices where QEMU likes them.

    Raises:
        UsageError: a `network` that is none.
    """
    line = [program or f"qemu-system-{machine.arch}", "-nodefaults", "-no-user-config"]
    line += ["-name", f"guest={_doubled(machine.name)}"]
    kind = known_type(machine.type, known_types)
    line += ["-machine", ",".join([kind, *_type_options(machine, firmware)])]
    for one in accel:
        line += ["-accel", one]
    flags = machine.cpu_flags if cpu is None and tuple(accel) != ("tcg",) else ()
    model = cpu or machine.cpu or "max"
    line += ["-cpu", ",".join(["max" if model == "host" else model, *flags])]
    line += ["-m", f"{(memory or machine.memory) >> 20}M"]
    topology = machine.topology if cpus is None else {}
    line += ["-smp", ",".join([str(cpus or machine.cpus), *(f"{name}={value}" for name, value in topology.items())])]
    if machine.uuid is not None:
        line += ["-uuid", machine.uuid]
    if machine.smbios:
        line += ["-smbios", ",".join(["type=1", *(f"{name}={value}" for name, value in machine.smbios.items())])]
    line += ["-rtc", f"base={'localtime' if machine.local_time else 'utc'}"]
    if machine.type_options.get("hpet") == "off" and machine.arch != "aarch64":
        line += ["-global", "kvm-pit.lost_tick_policy=delay"]
    line += _firmware(machine, firmware)
    line += _kernel(machine, kernel)
    line += _devices(machine, disks, network, kind, places=places)
    return line + _channels(machine, channels) + ["-display", "none"]


def start_script(
    machine: Machine,
    disks: Mapping[str, Backing],
    *,
    folder: Path,
    firmware: Firmware | None = None,
    network: str | None = None,
    tpm_state: Path | None = None,
    known_types: Collection[str] | None = None,
    remarks: Sequence[str] = (),
) -> str:
    """A shell script that starts `machine`; what is given to it goes to QEMU as well (`-display gtk`).

    Args:
        machine: what to start.
        disks: as `command_line`.
        folder: where it makes its sockets: `qmp.sock`, `serial.sock`, `agent.sock`, `tpm.sock`.
        firmware: as `command_line`.
        network: as `command_line`.
        tpm_state: folder of swtpm's state, for a machine with a TPM.
        known_types: as `command_line`.
        remarks: lines for its head, beside what was left out of the configuration.

    Raises:
        UsageError: a `network` that is none.
    """
    tpm = folder / "tpm.sock" if tpm_state is not None and machine.tpm is not None else None
    channels = Channels(folder / "qmp.sock", folder / "serial.sock", folder / "agent.sock", tpm)
    line = command_line(
        machine, disks, firmware=firmware, network=network, channels=channels, known_types=known_types
    )  # fmt: skip
    said = [*remarks, *machine.warnings]
    if machine.left_out:
        said += ["Of the stored configuration these were left out:", *(f"  {one}" for one in machine.left_out)]
    head = [f"# {printable(text, 300)}".rstrip() for text in [f"Starts the restored machine {machine.name}.", *said]]
    text = ["#!/bin/sh", *head, "set -eu", f"mkdir -p -m 700 -- {shlex.quote(str(folder))}"]
    if tpm is not None and tpm_state is not None:
        control = f"type=unixio,path={tpm}"
        swtpm = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={tpm_state}", "--ctrl", control]
        text.append(shlex.join([*swtpm, "--daemon", "--terminate"]))
    return "\n".join([*text, "exec " + _folded(line), ""])


def _folded(line: Sequence[str]) -> str:
    """One option a line."""
    rows: list[str] = []
    for word in line:
        if word.startswith("-") or not rows:
            rows.append(shlex.quote(word))
        else:
            rows[-1] += " " + shlex.quote(word)
    return " \\\n    ".join([*rows, '"$@"'])


def known_type(kind: str, known: Collection[str] | None) -> str:
    """`kind`, or the nearest machine type among `known`."""
    if known is None or kind in known:
        return kind
    plain = kind.partition("+")[0]
    if plain in known:
        return plain
    return "virt" if kind.startswith("virt") else "q35" if "q35" in kind else "pc"


def _doubled(text: str) -> str:
    return text.replace(",", ",,")


def _json(options: Mapping[str, Any]) -> str:
    return json.dumps(options, ensure_ascii=True, separators=(",", ":"))


def _type_options(machine: Machine, firmware: Firmware | None) -> list[str]:
    options = dict(machine.type_options)
    options.pop("hpet", None)  # changed its place between versions
    if machine.arch == "aarch64":
        options.clear()
    if firmware is not None and machine.efi:
        options["pflash0"] = _CODE_NODE
        if firmware.variables is not None:
            options["pflash1"] = firmware.variables.node
        if machine.secure_boot and machine.arch != "aarch64":
            options["smm"] = "on"
    return [f"{name}={value}" for name, value in options.items()]


def _firmware(machine: Machine, firmware: Firmware | None) -> list[str]:
    if firmware is None or not machine.efi:
        return []
    line: list[str] = []
    code = Backing.file(firmware.code, _CODE_NODE, read_only=True)
    for node in [*code.nodes, *(firmware.variables.nodes if firmware.variables is not None else ())]:
        line += ["-blockdev", _json(node)]
    if machine.secure_boot and machine.arch != "aarch64":
        line += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    return line


def _kernel(machine: Machine, kernel: Kernel | None) -> list[str]:
    if kernel is None:
        return []
    line = ["-kernel", str(kernel.kernel.absolute())]
    if kernel.initrd is not None:
        line += ["-initrd", str(kernel.initrd.absolute())]
    arguments = machine.kernel_arguments if kernel.arguments is None else kernel.arguments
    return [*line, "-append", arguments] if arguments else line


def _devices(
    machine: Machine, disks: Mapping[str, Backing], network: str | None, kind: str, *, places: bool
) -> list[str]:
    buses = Buses(kind, machine.arch, places=places)
    there = [disk for disk in machine.disks if disk.archive in disks]
    order = sorted(range(len(there)), key=lambda n: (there[n].boot is None, there[n].boot or 0, n))
    bootindex = {number: str(position) for position, number in enumerate(order, start=1)}
    for controller in machine.controllers:
        buses.add_controller(controller)
    nodes: dict[str, Mapping[str, Any]] = {}
    for number, disk in enumerate(there):
        backing = disks[disk.archive]
        nodes |= {str(node.get("node-name", f"{number}")): node for node in backing.nodes}
        buses.add_disk(disk, backing.node, bootindex[number])
    line: list[str] = []
    for node in nodes.values():
        line += ["-blockdev", _json(node)]
    if network is not None:
        if network != "user" and not _BRIDGE.fullmatch(network):
            raise UsageError("connect the machine to", repr(network), "it is neither 'user' nor the name of a bridge")
        for number, card in enumerate(machine.cards):
            net = f"user,id=fleece-net{number}" if network == "user" else f"bridge,id=fleece-net{number},br={network}"
            line += ["-netdev", net]
            buses.add(card, netdev=f"fleece-net{number}")
    if machine.display is not None:
        buses.add(machine.display)
    for other in machine.others:
        buses.add(other)
    for device in buses.devices():
        properties = [f"{name}={_doubled(value)}" for name, value in device.properties.items()]
        line += ["-device", ",".join([device.driver, *properties])]
    return line


def _channels(machine: Machine, channels: Channels) -> list[str]:
    line: list[str] = []

    def chardev(name: str, end: Path | int, *, server: bool = True) -> None:
        if isinstance(end, int):
            where = f"fd={end}"
        else:
            where = f"path={_doubled(str(end))}" + (",server=on,wait=off" if server else "")
        line.extend(["-chardev", f"socket,id={name},{where}"])

    if channels.qmp is not None:
        chardev("fleece-qmp", channels.qmp)
        line += ["-mon", "chardev=fleece-qmp,mode=control"]
    if channels.serial is not None:
        chardev("fleece-serial", channels.serial)
        line += ["-serial", "chardev:fleece-serial"]
    if channels.agent is not None:
        chardev("fleece-agent", channels.agent)
        line += ["-device", "virtio-serial-pci,id=fleece-vser"]
        line += ["-device", "virtserialport,bus=fleece-vser.0,chardev=fleece-agent,name=org.qemu.guest_agent.0"]
    if channels.tpm is not None and machine.tpm is not None:
        chardev("fleece-tpm", channels.tpm, server=False)
        driver = "tpm-tis-device" if machine.arch == "aarch64" else machine.tpm
        line += ["-tpmdev", "emulator,id=fleece-tpm0,chardev=fleece-tpm", "-device", f"{driver},tpmdev=fleece-tpm0"]
    return line
