"""Where the devices of a machine go: on the buses that its configuration names, as far as these are there.

A bus that the configuration does not bring along (it was made by a file of the other host) is none; the device then
goes where there is room, and a controller is added where there is none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from hypervisor.machine_model import CONTROLLER_BUS, DISK_BUS, ID, Device, MachineDisk

#: Disks that an AHCI controller takes.
_AHCI_PORTS: Final = 6


@dataclass
class Buses:
    """Collects the devices of one machine."""

    machine_type: str
    arch: str
    places: bool = True  #: False: what the configuration says of PCI is not followed
    _known: dict[str, str] = field(default_factory=dict)  #: buses by name, and their kind
    _ids: set[str] = field(default_factory=set)
    _taken: set[tuple[str, str]] = field(default_factory=set)  #: IDE units, PCI slots
    _bridges: list[Device] = field(default_factory=list)
    _placed: list[Device] = field(default_factory=list)  #: with a slot of their own
    _free: list[Device] = field(default_factory=list)  #: QEMU chooses one
    _inner: list[Device] = field(default_factory=list)  #: on other buses than PCI

    def __post_init__(self) -> None:
        q35 = "q35" in self.machine_type
        self._known["pcie.0" if q35 or self.arch == "aarch64" else "pci.0"] = "pci"
        for number in range(0 if self.arch == "aarch64" else _AHCI_PORTS if q35 else 2):
            self._known[f"ide.{number}"] = "ide"

    def devices(self) -> Iterator[Device]:
        """All, in an order in which QEMU can make them: no chosen slot may be one that another was promised."""
        yield from (*self._bridges, *self._placed, *self._free, *self._inner)

    def add_controller(self, controller: Device) -> None:
        """A controller or bridge, and the buses it gives."""
        given = self._unique(controller)
        self._add_pci(given, bridge=CONTROLLER_BUS.get(controller.driver) == "pci")
        if not given.id:
            return
        kind = CONTROLLER_BUS.get(controller.driver, "nvme" if controller.driver == "nvme" else "")
        if kind == "pci":
            self._known[given.id] = "pci"
        elif kind == "ide":
            for number in range(_AHCI_PORTS if "ahci" in given.driver else 2):
                self._known[f"{given.id}.{number}"] = "ide"
        elif kind == "nvme":
            self._known[given.id] = "nvme"
        elif kind:
            self._known[f"{given.id}.0"] = kind

    def add_disk(self, disk: MachineDisk, node: str, bootindex: str) -> None:
        """A disk over the block node `node`."""
        device = disk.device
        kind = DISK_BUS[device.driver]
        if kind == "nvme" and self._known.get(device.properties.get("bus", "")) != "nvme":
            device, kind = Device("nvme"), "pci"
        if not device.id:
            own = disk.archive.removeprefix("drive-").removesuffix(".img")
            device = device.with_properties(id=own if ID.fullmatch(own) else None)
        device = self._unique(device)
        if device.driver == "nvme" and "serial" not in device.properties:
            device = device.with_properties(serial=device.id or "fleece")
        device = device.with_properties(drive=node)
        if kind != "nvme":
            device = device.with_properties(bootindex=bootindex)
        if kind == "pci":
            self._add_pci(device)
        else:
            self._inner.append(self._on_bus(device, kind))

    def add(self, device: Device, **more: str) -> None:
        """Any other device; `more` are properties that no configuration may have."""
        device = self._unique(device).with_properties(**more)
        if device.driver.startswith("usb-"):
            self._inner.append(self._on_bus(device, "usb"))
        elif device.driver == "vmgenid":
            self._inner.append(device)
        else:
            self._add_pci(device)

    def _unique(self, device: Device) -> Device:
        if not device.id:
            return device
        # `fleece-` is ours; and the id of a device must not be the name of a bus of the board.
        if device.id in self._ids or device.id in ("pcie.0", "ide.0") or device.id.startswith("fleece-"):
            return device.with_properties(id=None)
        if self._known.get(device.id) is not None:
            return device.with_properties(id=None)
        self._ids.add(device.id)
        return device

    def _add_pci(self, device: Device, *, bridge: bool = False) -> None:
        bus, slot = device.properties.get("bus"), device.properties.get("addr")
        known = bus is None or self._known.get(bus) == "pci"
        place = (bus or "", _slot(slot)) if slot is not None else None
        if not self.places or not known or (place is not None and place in self._taken):
            device = device.with_properties(bus=None, addr=None, multifunction=None)
        elif place is not None:
            self._taken.add(place)
        if bridge:
            self._bridges.append(device)
        elif "addr" in device.properties or "bus" in device.properties:
            self._placed.append(device)
        else:
            self._free.append(device)

    def _on_bus(self, device: Device, kind: str) -> Device:
        bus = device.properties.get("bus", "")
        if kind == "ide":
            return self._on_ide(device)
        if self._known.get(bus) == kind:
            return device
        names = [name for name, of in self._known.items() if of == kind]
        if kind == "scsi":
            device = device.with_properties(**dict.fromkeys(("channel", "scsi-id", "lun")))
        elif "port" in device.properties:
            device = device.with_properties(port=None)
        if not names:
            name = f"fleece-{kind}"
            self._free.append(Device("virtio-scsi-pci" if kind == "scsi" else "qemu-xhci", {"id": name}))
            self._known[f"{name}.0"] = kind
            names = [f"{name}.0"]
        return device.with_properties(bus=names[0])

    def _on_ide(self, device: Device) -> Device:
        bus, unit = device.properties.get("bus", ""), device.properties.get("unit", "0")
        if self._known.get(bus) == "ide" and unit in self._units(bus) and (bus, unit) not in self._taken:
            self._taken.add((bus, unit))
            return device.with_properties(bus=bus, unit=unit)
        while True:
            for name in [name for name, kind in self._known.items() if kind == "ide"]:
                for unit in self._units(name):
                    if (name, unit) not in self._taken:
                        self._taken.add((name, unit))
                        return device.with_properties(bus=name, unit=unit)
            own = f"fleece-sata{len(self._known)}"
            self._free.append(Device("ich9-ahci", {"id": own}))
            self._known |= {f"{own}.{number}": "ide" for number in range(_AHCI_PORTS)}

    def _units(self, bus: str) -> tuple[str, ...]:
        """Places for disks on an IDE bus: two on a parallel one, one on a port of AHCI."""
        parallel = bus in ("ide.0", "ide.1") and "q35" not in self.machine_type
        return ("0", "1") if parallel or self._is_piix(bus) else ("0",)

    def _is_piix(self, bus: str) -> bool:
        owner = bus.rpartition(".")[0]
        return any(one.id == owner and one.driver == "piix3-ide" for one in (*self._placed, *self._free))


def _slot(text: str) -> str:
    """`0x5`, `05` and `5.0` are one."""
    number, _, function = text.lower().removeprefix("0x").partition(".")
    return f"{int(number, 16)}.{function or '0'}"
