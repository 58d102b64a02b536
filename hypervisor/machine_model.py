"""What a virtual machine is made of, as far as a stored configuration is believed. docs/test-boot.md, "The machine".

A configuration in a backup may have been written by anybody. Nothing of it reaches a new QEMU as it is: devices and
properties are taken from lists of those that are understood and concern the guest only, their values have a form in
which nothing can hide, and whatever names a file, a program, a socket or a device of the host is left out. What is left
out is named, so that a person can look.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from hypervisor.checked import printable
from hypervisor.disk_names import archive_name
from hypervisor.errors import DiskNameError

#: Bytes of a stored configuration that is read.
MAX_CONFIGURATION: Final = 4 * 1024 * 1024
#: Devices of one kind; QEMU has no room for more on its buses either.
MAX_DEVICES: Final = 128
#: Lines that tell what was left out.
MAX_NOTES: Final = 200
MIN_MEMORY: Final = 16 * 1024**2
MAX_MEMORY: Final = 16 * 1024**4
DEFAULT_MEMORY: Final = 2 * 1024**3
MAX_CPUS: Final = 1024

ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
#: A value of a property: no comma, slash, brace or control character, so neither a path nor a further option.
_VALUE: Final = re.compile(r"[A-Za-z0-9_.:+-](?:[A-Za-z0-9 _.:+-]{0,126}[A-Za-z0-9_.:+-])?")
_MAC: Final = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_BUS_ADDRESS: Final = re.compile(r"(0x)?[0-9A-Fa-f]{1,2}(\.[0-7])?")
UUID: Final = re.compile(r"[0-9A-Fa-f]{8}-([0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.+@-]{0,126}")
#: `q35`, `pc-q35-8.2`, `pc-i440fx-9.0+pve1`, `virt-7.2`.
MACHINE_TYPE: Final = re.compile(
    r"(?:q35|pc|virt)|(?:pc-q35|pc-i440fx|virt)-[0-9]{1,2}\.[0-9]{1,2}(?:\.[0-9]{1,2})?(?:\+pve[0-9]{1,3})?"
    r"|pc-(?:q35|i440fx)-[a-z]{3,12}(?:[0-9]{1,2}(?:\.[0-9]{1,2}){0,2})?(?:-hpb)?"
)
CPU_MODEL: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]{0,63}")
CPU_FLAG: Final = re.compile(r"[+-]?[A-Za-z][A-Za-z0-9_.-]{0,63}(?:=[A-Za-z0-9_.-]{1,64})?")

_VIRTIO_FORMS: Final = ("", "-transitional", "-non-transitional")


def _forms(name: str) -> set[str]:
    return {name + form for form in _VIRTIO_FORMS}


#: Disks, and the kind of bus they need.
DISK_BUS: Final[Mapping[str, str]] = {
    **dict.fromkeys(_forms("virtio-blk-pci"), "pci"),
    "nvme": "pci",
    "scsi-hd": "scsi",
    "ide-hd": "ide",
    "usb-storage": "usb",
    "nvme-ns": "nvme",
}
#: Controllers and bridges: the kind of bus they give. All sit on PCI.
CONTROLLER_BUS: Final[Mapping[str, str]] = {
    **dict.fromkeys(_forms("virtio-scsi-pci"), "scsi"),
    **dict.fromkeys(("lsi53c895a", "lsi53c810", "megasas", "megasas-gen2", "mptsas1068", "pvscsi", "am53c974"), "scsi"),
    **dict.fromkeys(("ahci", "ich9-ahci", "piix3-ide"), "ide"),
    **dict.fromkeys(("qemu-xhci", "nec-usb-xhci", "usb-ehci", "ich9-usb-ehci1", "piix3-usb-uhci"), "usb"),
    **dict.fromkeys(("ich9-usb-uhci1", "ich9-usb-uhci2", "ich9-usb-uhci3", "piix4-usb-uhci", "pci-ohci"), "usb"),
    **dict.fromkeys(("pcie-root-port", "pci-bridge", "pcie-pci-bridge", "i82801b11-bridge", "ioh3420"), "pci"),
    **dict.fromkeys(("x3130-upstream", "xio3130-downstream"), "pci"),
}
CARDS: Final = _forms("virtio-net-pci") | {
    "e1000", "e1000e", "e1000-82544gc", "e1000-82545em", "igb", "rtl8139", "vmxnet3", "i82551", "i82557b", "i82559er",
    "ne2k_pci", "pcnet", "tulip",
}  # fmt: skip
DISPLAYS: Final = {"VGA", "virtio-vga", "qxl-vga", "cirrus-vga", "vmware-svga", "bochs-display", "virtio-gpu-pci"}
#: Devices without anything of the host behind them.
OTHERS: Final = {
    "usb-tablet", "usb-kbd", "usb-mouse", "virtio-keyboard-pci", "virtio-tablet-pci", "virtio-mouse-pci", "vmgenid",
} | _forms("virtio-balloon-pci")  # fmt: skip
#: Short names that QEMU knows as well.
ALIASES: Final[Mapping[str, str]] = {
    "virtio-blk": "virtio-blk-pci",
    "virtio-scsi": "virtio-scsi-pci",
    "virtio-net": "virtio-net-pci",
    "virtio-balloon": "virtio-balloon-pci",
    "lsi": "lsi53c895a",
    "qxl": "qxl-vga",
}

_PLACE: Final = {"id", "bus", "addr", "multifunction"}
_VIRTIO: Final = {"disable-legacy", "disable-modern", "packed", "iommu_platform", "ats"}
_DISK: Final = _PLACE | _VIRTIO | {
    "channel", "scsi-id", "lun", "unit", "port", "serial", "wwn", "vendor", "product", "model", "ver", "bootindex",
    "logical_block_size", "physical_block_size", "rotation_rate", "device_id", "nsid", "max_ioqpairs", "msix_qsize",
}  # fmt: skip
_CONTROLLER: Final = _PLACE | _VIRTIO | {
    "chassis", "chassis_nr", "port", "slot", "p2", "p3", "masterbus", "firstport", "ports", "max_sectors",
}  # fmt: skip
PROPERTIES: Final[Mapping[str, frozenset[str]]] = {
    **dict.fromkeys(DISK_BUS, frozenset(_DISK)),
    **dict.fromkeys(CONTROLLER_BUS, frozenset(_CONTROLLER)),
    **dict.fromkeys(CARDS, frozenset(_PLACE | _VIRTIO | {"mac"})),
    **dict.fromkeys(DISPLAYS, frozenset(_PLACE | {"vgamem_mb", "max_outputs", "edid", "xres", "yres"})),
    **dict.fromkeys(OTHERS, frozenset(_PLACE | _VIRTIO | {"port"})),
    "vmgenid": frozenset({"id"}),
}
#: Properties that tell how the host serves a device; that they are gone is no news.
_HOST_SIDE: Final = frozenset({
    "drive", "netdev", "iothread", "write-cache", "share-rw", "werror", "rerror", "num-queues", "num_queues", "mq",
    "vectors", "queue-size", "virtqueue_size", "rx_queue_size", "tx_queue_size", "host_mtu", "discard_granularity",
    "hotplug", "removable", "free-page-reporting", "deflate-on-oom", "guest-stats-polling-interval", "guid",
    "pref64-reserve", "io-reserve", "mem-reserve", "bus-reserve", "discard-no-unref", "scsi", "config-wce",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Device:
    """One device of the guest: a driver of the lists above, with checked properties."""

    driver: str
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Its id; empty without one."""
        return self.properties.get("id", "")

    def with_properties(self, **changes: str | None) -> "Device":
        """The same with some properties set, or (None) taken away."""
        new = {name: value for name, value in self.properties.items() if name not in changes}
        return Device(self.driver, new | {name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True, slots=True)
class MachineDisk:
    """A disk of the machine, in the order in which the guest finds them."""

    device: Device
    archive: str  #: the image in the backup: `drive-scsi0.img`
    boot: int | None = None  #: the machine is tried to boot from the lowest first; None: after those


@dataclass(frozen=True, slots=True)
class Machine:
    """A virtual machine as a configuration describes it, checked; the way back is `hypervisor.machine.command_line`."""

    name: str = "restored"
    uuid: str | None = None
    arch: str = "x86_64"  #: `x86_64`, `i386` or `aarch64`
    type: str = "q35"  #: QEMU's machine type, perhaps with a version
    type_options: Mapping[str, str] = field(default_factory=dict)
    cpu: str | None = None  #: the model; None: the best there is
    cpu_flags: Sequence[str] = ()  #: `+aes`, `-svm`, `hv-relaxed=on`
    memory: int = DEFAULT_MEMORY  #: bytes
    cpus: int = 1
    topology: Mapping[str, int] = field(default_factory=dict)  #: `sockets`, `cores`, ...; their product is `cpus`
    efi: bool = False  #: EFI firmware instead of a BIOS
    secure_boot: bool = False  #: the EFI firmware is the one for Secure Boot
    tpm: str | None = None  #: `tpm-tis` or `tpm-crb`
    local_time: bool = False  #: the clock tells local time, as Windows likes it
    smbios: Mapping[str, str] = field(default_factory=dict)  #: of the system: `manufacturer`, `serial`
    controllers: Sequence[Device] = ()
    disks: Sequence[MachineDisk] = ()
    cards: Sequence[Device] = ()  #: network cards
    display: Device | None = None
    others: Sequence[Device] = ()
    efi_archive: str | None = None  #: the image that holds the EFI variables, where they are one (Proxmox VE)
    tpm_archive: str | None = None  #: the image that holds the TPM's state, where it is one (Proxmox VE)
    direct_kernel: bool = False  #: it was started with a kernel that lies on its host
    kernel_arguments: str | None = None  #: for that kernel
    left_out: Sequence[str] = ()  #: what the configuration said and was not taken over, in words
    warnings: Sequence[str] = ()  #: what may keep the guest from starting as it did


class Notes:
    """Collects what is left out and what deserves a warning."""

    def __init__(self) -> None:
        self._left_out: dict[str, None] = {}
        self._warnings: dict[str, None] = {}

    @property
    def left_out(self) -> tuple[str, ...]:
        """In order, each once."""
        more = len(self._left_out) - MAX_NOTES
        return (*list(self._left_out)[:MAX_NOTES], *([f"and {more} more"] if more > 0 else []))

    @property
    def warnings(self) -> tuple[str, ...]:
        """In order, each once."""
        return tuple(self._warnings)[:MAX_NOTES]

    def leave_out(self, what: str) -> None:
        """Name something that is not taken over; the text may be hostile."""
        if len(self._left_out) < 10 * MAX_NOTES:
            self._left_out[printable(what, 120)] = None

    def warn(self, text: str) -> None:
        """Tell of what may change whether the guest starts."""
        if len(self._warnings) < MAX_NOTES:
            self._warnings[printable(text, 300)] = None


def device(driver: str, given: Mapping[str, object], notes: Notes) -> Device | None:
    """The device that a configuration describes; None, and a note, if it is not one of those that are understood."""
    driver = ALIASES.get(driver, driver)
    allowed = PROPERTIES.get(driver)
    if allowed is None:
        notes.leave_out(f"device {driver}")
        return None
    properties: dict[str, str] = {}
    for name, raw in given.items():
        if name in ("driver", *_HOST_SIDE):
            continue
        value = text_of(raw)
        if name not in allowed or value is None or not value_allowed(name, value):
            notes.leave_out(f"property {name} of device {driver}")
        else:
            properties[name] = value
    if driver == "vmgenid":
        properties["guid"] = "auto"  # a restored guest is to know that it is another one
    return Device(driver, properties)


def options(text: str, first: str) -> dict[str, object]:
    """`name=value` pairs, commas doubled, or JSON; what is given twice counts last, as for QEMU."""
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}
    found: dict[str, object] = {}
    for number, part in enumerate(text.replace(",,", "\0").split(",")):
        name, equals, value = part.replace("\0", ",").partition("=")
        if equals:
            found[name] = value
        elif number == 0:
            found[first] = name
        elif name:
            found[name.removeprefix("no")] = "off" if name.startswith("no") else "on"
    return found


def text_of(value: object) -> str | None:
    """A JSON value the way QEMU's `name=value` lists write it; None if that has no such form."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 63 else None
    return value if isinstance(value, str) else None


def value_allowed(name: str, value: str) -> bool:
    """Whether `value` may be that of the property `name`."""
    if name == "mac":
        return _MAC.fullmatch(value) is not None
    if name == "addr":
        return _BUS_ADDRESS.fullmatch(value) is not None
    if name == "id":
        return ID.fullmatch(value) is not None and not value.startswith("fleece-")
    if name == "bootindex":
        return value.isascii() and value.isdecimal() and len(value) <= 9
    return _VALUE.fullmatch(value) is not None


def machine_name(text: str) -> str | None:
    """`text` if it can name a machine."""
    return text if _NAME.fullmatch(text) else None


def plausible_memory(size: int, notes: Notes) -> int:
    """`size`, or a default if no machine has so much or so little."""
    if MIN_MEMORY <= size <= MAX_MEMORY:
        return size
    notes.warn(f"a memory of {size} bytes is not plausible: it gets {DEFAULT_MEMORY >> 20} MiB")
    return DEFAULT_MEMORY


def machine_type(text: str, arch: str, notes: Notes) -> str:
    """`text` if it is a machine type of `arch` that is understood, else the usual one."""
    usual = "virt" if arch == "aarch64" else "q35"
    if len(text) <= 64 and MACHINE_TYPE.fullmatch(text) and text.startswith("virt") is (arch == "aarch64"):
        return text
    notes.warn(f"machine type {text[:64]!r} is not known here: it gets {usual}")
    return usual


@dataclass(frozen=True, slots=True)
class FoundDisk:
    """A disk of a configuration, before it is known which archive holds it."""

    device: Device
    names: Sequence[str]  #: what its archive may be called, without `drive-` and `.img`, the likeliest first
    boot: int | None = None


#: Archives that hold no disk of the guest.
_EFI_ARCHIVE: Final = re.compile(r"drive-efidisk\d+\.img")
_TPM_ARCHIVE: Final = re.compile(r"drive-tpmstate\d+(-backup)?\.img")


def special_archives(archives: Iterable[str]) -> tuple[str | None, str | None]:
    """The images with EFI variables and TPM state among `archives`."""
    archives = list(archives)
    return (
        next((name for name in archives if _EFI_ARCHIVE.fullmatch(name)), None),
        next((name for name in archives if _TPM_ARCHIVE.fullmatch(name)), None),
    )


def pair(found: Sequence[FoundDisk], archives: Sequence[str], notes: Notes, *, arch: str) -> tuple[MachineDisk, ...]:
    """Which archive holds which disk: by name, else, where the numbers agree, by order.

    An archive without a disk in the configuration becomes a disk behind the others, so that nothing of the backup is
    missing in the machine.
    """
    special = special_archives(archives)
    free = [name for name in archives if name not in special]
    chosen: dict[int, str] = {}
    for number, disk in enumerate(found):
        for candidate in map(_archive, disk.names):
            if candidate in free:
                free.remove(candidate)
                chosen[number] = candidate
                break
    rest = [number for number in range(len(found)) if number not in chosen]
    if rest and len(rest) == len(free):
        for number, archive in zip(rest, list(free), strict=True):
            notes.warn(f"no disk of the configuration is called like {archive}: taken for {_label(found[number])}")
            chosen[number] = archive
        free, rest = [], []
    for number in rest:
        notes.leave_out(f"disk {_label(found[number])}, which is not in the backup")
    disks = [MachineDisk(found[number].device, chosen[number], found[number].boot) for number in sorted(chosen)]
    for archive in free:
        if found:
            notes.warn(f"{archive} is no disk of the configuration: it is added as the last one")
        disks.append(MachineDisk(Device("virtio-blk-pci" if arch == "aarch64" else "ide-hd"), archive))
    return tuple(disks)


def _archive(name: str) -> str | None:
    try:
        return archive_name(name)
    except DiskNameError:
        return None


def _label(disk: FoundDisk) -> str:
    return printable(next(iter(disk.names), disk.device.driver), 60)
