"""The machine behind a stored domain XML of libvirt. See `hypervisor.machine_model`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, Final
from xml.etree import ElementTree

from core.errors import FormatError
from hypervisor.machine_model import (
    CPU_FLAG,
    CPU_MODEL,
    DEFAULT_MEMORY,
    MAX_CPUS,
    MAX_DEVICES,
    UUID,
    Device,
    FoundDisk,
    Machine,
    Notes,
    device,
    machine_name,
    machine_type,
    pair,
    plausible_memory,
    special_archives,
    value_allowed,
)

#: Bytes; a domain with a hundred devices has 60 KiB.
MAX_XML: Final = 1024 * 1024
#: Elements in each other; a domain has six.
_MAX_DEPTH: Final = 100
_UNITS: Final = {
    "b": 1, "bytes": 1, "KB": 1000, "k": 1024, "KiB": 1024, "MB": 10**6, "M": 1 << 20, "MiB": 1 << 20,
    "GB": 10**9, "G": 1 << 30, "GiB": 1 << 30, "TB": 10**12, "T": 1 << 40, "TiB": 1 << 40,
}  # fmt: skip
_SCSI_MODELS: Final = {
    "virtio-scsi": "virtio-scsi-pci", "virtio-transitional": "virtio-scsi-pci-transitional",
    "virtio-non-transitional": "virtio-scsi-pci-non-transitional", "lsilogic": "lsi53c895a", "lsisas1068": "mptsas1068",
    "lsisas1078": "megasas", "vmpvscsi": "pvscsi", "auto": "lsi53c895a",
}  # fmt: skip
_USB_MODELS: Final = {
    "qemu-xhci": "qemu-xhci", "nec-xhci": "nec-usb-xhci", "ehci": "usb-ehci", "ich9-ehci1": "ich9-usb-ehci1",
    "piix3-uhci": "piix3-usb-uhci", "piix4-uhci": "piix4-usb-uhci", "pci-ohci": "pci-ohci",
}  # fmt: skip
_DISPLAYS: Final = {
    "vga": "VGA", "qxl": "qxl-vga", "virtio": "virtio-vga", "cirrus": "cirrus-vga", "vmvga": "vmware-svga",
    "bochs": "bochs-display",
}  # fmt: skip
_CARD_MODELS: Final = {
    "virtio": "virtio-net-pci", "virtio-transitional": "virtio-net-pci-transitional",
    "virtio-non-transitional": "virtio-net-pci-non-transitional",
}  # fmt: skip
_NUMBER: Final = re.compile(r"(?:0[xX][0-9A-Fa-f]{1,8}|[0-9]{1,9})")
_EFI_CODE: Final = re.compile(r"ovmf|edk2|aavmf|qemu_efi", re.IGNORECASE)
#: Children of `<domain>` and `<devices>` that are read, or say nothing a restored machine would need.
_READ: Final = frozenset({
    "name", "uuid", "title", "description", "metadata", "memory", "currentMemory", "vcpu", "os", "features", "cpu",
    "clock", "on_poweroff", "on_reboot", "on_crash", "pm", "devices", "seclabel", "resource", "sysinfo", "iothreads",
    "emulator", "disk", "controller", "interface", "video", "graphics", "input", "memballoon", "tpm", "rng", "console",
    "serial", "channel", "genid", "launchSecurity",
})  # fmt: skip


def from_domain_xml(text: bytes | str, archives: Sequence[str]) -> Machine:
    """The machine that a domain of libvirt describes.

    Args:
        text: the XML.
        archives: the disk images of the backup: `drive-vda.img`, `drive-virtio-disk0.img`.

    Raises:
        FormatError: it is too large, no XML, has a document type (whose entities could grow without end), or is no
            domain.
    """
    root = _parsed(text)
    notes = Notes()
    system = root.find("os")
    kind = system.find("type") if system is not None else None
    arch = kind.get("arch", "x86_64") if kind is not None else "x86_64"
    if arch not in ("x86_64", "i686", "aarch64"):
        notes.warn(f"architecture {arch[:40]!r} is not known: it gets x86_64")
    arch = {"i686": "i386", "aarch64": "aarch64"}.get(arch, "x86_64")
    machine = machine_type(kind.get("machine", "q35") if kind is not None else "q35", arch, notes)
    efi, secure = _firmware(root, arch)
    order = [one.get("dev") for one in root.findall("os/boot")]
    found = list(_disks(root, notes, q35="q35" in machine, hd_first=not order or order[0] == "hd"))
    cpus, topology = _cpus(root)
    model, flags = _cpu(root, notes)
    for parent in (root, root.find("devices")):
        for child in [] if parent is None else list(parent):
            name = _tag(child)
            if name not in _READ:
                notes.leave_out(f"<{name}>")
    direct = system is not None and system.find("kernel") is not None
    efi_archive, tpm_archive = special_archives(archives)
    display = root.find("devices/video/model")
    uuid = (root.findtext("uuid") or "").strip()
    arguments = (root.findtext("os/cmdline") or "").strip()
    return Machine(
        name=machine_name((root.findtext("name") or "").strip()) or "restored",
        uuid=uuid if UUID.fullmatch(uuid) else None,
        arch=arch,
        type=machine,
        type_options={"smm": "on"} if secure and "q35" in machine else {},
        cpu=model,
        cpu_flags=flags,
        memory=_memory(root, notes),
        cpus=cpus,
        topology=topology,
        efi=efi,
        secure_boot=secure,
        tpm=_tpm(root),
        local_time=(clock := root.find("clock")) is not None and clock.get("offset") == "localtime",
        controllers=tuple(_controllers(root, notes)),
        disks=pair(found, archives, notes, arch=arch),
        cards=tuple(_cards(root, notes)),
        display=None if display is None or display.get("type") == "none" else Device(
            _DISPLAYS.get(display.get("type", ""), "VGA")
        ),
        others=tuple(_others(root)),
        efi_archive=efi_archive,
        tpm_archive=tpm_archive,
        direct_kernel=direct,
        kernel_arguments=arguments if arguments and arguments.isprintable() and len(arguments) <= 4096 else None,
        left_out=notes.left_out,
        warnings=notes.warnings,
    )  # fmt: skip


def _parsed(text: bytes | str) -> ElementTree.Element:
    def refused(why: str) -> FormatError:
        return FormatError("read", "the domain's XML", why, "the machine cannot be rebuilt from it")

    if len(text) > MAX_XML:
        raise refused(f"{len(text)} bytes, {MAX_XML} are allowed")
    # As text, so that no other encoding hides a document type.
    content = text if isinstance(text, str) else bytes(text).decode("utf-8", "replace")
    if "\0" in content or "<!DOCTYPE" in content or "<!ENTITY" in content:
        # Zeros: the parser would take the text for UTF-16, in which the words would not be seen here.
        raise refused("it has a document type")
    parser: Any = ElementTree.XMLPullParser(("start", "end"))
    root: ElementTree.Element | None = None
    depth = 0
    try:
        for start in range(0, len(content), 4096):
            parser.feed(content[start : start + 4096])
            for event, element in parser.read_events():
                root = element if root is None else root
                depth += 1 if event == "start" else -1
                if depth > _MAX_DEPTH:
                    raise refused("it is no domain")
        parser.close()
    except (ElementTree.ParseError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise refused(f"it is no XML: {error}") from error
    if root is None or root.tag != "domain":
        raise refused("it is no domain")
    return root


def _tag(element: ElementTree.Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _number(text: str | None) -> int | None:
    return int(text, 0 if text[:2].lower() == "0x" else 10) if text is not None and _NUMBER.fullmatch(text) else None


def _memory(root: ElementTree.Element, notes: Notes) -> int:
    element = root.find("memory")
    amount = _number((element.text or "").strip()) if element is not None else None
    unit = _UNITS.get(element.get("unit", "KiB")) if element is not None else None
    return DEFAULT_MEMORY if amount is None or unit is None else plausible_memory(amount * unit, notes)


def _cpus(root: ElementTree.Element) -> tuple[int, dict[str, int]]:
    count = max(1, min(_number((root.findtext("vcpu") or "1").strip()) or 1, MAX_CPUS))
    element = root.find("cpu/topology")
    if element is None:
        return count, {}
    parts = {name: _number(element.get(name)) or 1 for name in ("sockets", "cores", "threads")}
    return count, parts if parts["sockets"] * parts["cores"] * parts["threads"] == count else {}


def _cpu(root: ElementTree.Element, notes: Notes) -> tuple[str | None, tuple[str, ...]]:
    element = root.find("cpu")
    if element is None:
        return None, ()
    if element.get("mode") in ("host-passthrough", "maximum"):
        model: str | None = "host" if element.get("mode") == "host-passthrough" else "max"
    else:
        model = (element.findtext("model") or "").strip() or None
    if model is not None and not CPU_MODEL.fullmatch(model):
        notes.leave_out(f"processor model {model}")
        model = None
    flags = []
    for feature in element.findall("feature")[:MAX_DEVICES]:
        sign = {"require": "+", "force": "+", "disable": "-"}.get(feature.get("policy", "require"))
        flag = f"{sign}{feature.get('name', '')}"
        if sign is not None and CPU_FLAG.fullmatch(flag):
            flags.append(flag)
    return model, tuple(flags)


def _firmware(root: ElementTree.Element, arch: str) -> tuple[bool, bool]:
    """Whether it is EFI, and one with Secure Boot."""
    system, loader = root.find("os"), root.find("os/loader")
    name = PurePosixPath((loader.text or "").strip()).name if loader is not None else ""
    efi = arch == "aarch64" or (system is not None and system.get("firmware") == "efi") or bool(_EFI_CODE.search(name))
    secure = loader is not None and loader.get("secure") == "yes"
    for feature in root.findall("os/firmware/feature"):
        if feature.get("name") == "secure-boot" and feature.get("enabled") == "yes":
            secure = True
    return efi, efi and secure


def _tpm(root: ElementTree.Element) -> str | None:
    element = root.find("devices/tpm")
    backend = None if element is None else element.find("backend")
    if element is None or backend is None or backend.get("type") != "emulator":
        return None
    return "tpm-crb" if element.get("model") == "tpm-crb" else "tpm-tis"


def _place(element: ElementTree.Element, controllers: dict[int, str]) -> dict[str, str]:
    """`bus` and `addr` on PCI, if they are given and the bus is one of ours."""
    address = element.find("address")
    if address is None or address.get("type") != "pci":
        return {}
    bus, slot, function = (_number(address.get(name)) for name in ("bus", "slot", "function"))
    if bus is None or slot is None or bus not in controllers or slot > 31 or (function or 0) > 7:
        return {}
    more = {"multifunction": "on"} if address.get("multifunction") == "on" else {}
    return {"bus": controllers[bus], "addr": f"{slot:x}.{function or 0}", **more}


def _pci_buses(root: ElementTree.Element) -> dict[int, str]:
    """Names of the PCI buses by libvirt's numbers."""
    buses = {}
    for element in root.findall("devices/controller")[:MAX_DEVICES]:
        number = _number(element.get("index"))
        if element.get("type") == "pci" and number is not None and number < MAX_DEVICES:
            model = element.get("model", "")
            root_name = {"pcie-root": "pcie.0", "pci-root": "pci.0"}.get(model)
            buses[number] = root_name or f"pci.{number}"
    return buses


_BRIDGES: Final = {
    "pcie-root-port": "pcie-root-port", "pci-bridge": "pci-bridge", "pcie-to-pci-bridge": "pcie-pci-bridge",
    "dmi-to-pci-bridge": "i82801b11-bridge", "pcie-switch-upstream-port": "x3130-upstream",
    "pcie-switch-downstream-port": "xio3130-downstream",
}  # fmt: skip


def _controllers(root: ElementTree.Element, notes: Notes) -> Iterator[Device]:
    buses = _pci_buses(root)
    for element in root.findall("devices/controller")[:MAX_DEVICES]:
        kind, model, number = element.get("type", ""), element.get("model", ""), _number(element.get("index"))
        if number is None or number > 255:
            continue
        place = _place(element, buses)
        if kind == "pci" and model in _BRIDGES:
            target = element.find("target")
            chassis = {"chassis": str(number)} if "port" in model and "upstream" not in model else {}
            if model == "pci-bridge":
                chassis = {"chassis_nr": str(number)}
            port = _number(target.get("port")) if target is not None else None
            more = {"port": str(port)} if port is not None and port < 256 and "chassis" in chassis else {}
            yield Device(_BRIDGES[model], {"id": f"pci.{number}", **place, **chassis, **more})
        elif kind == "scsi":
            yield Device(_SCSI_MODELS.get(model, "virtio-scsi-pci"), {"id": f"scsi{number}", **place})
        elif kind == "sata" and number > 0:
            yield Device("ich9-ahci", {"id": f"sata{number}", **place})
        elif kind == "usb" and model in _USB_MODELS:
            yield Device(_USB_MODELS[model], {"id": f"usb{number}", **place})
        elif kind not in ("pci", "ide", "sata", "fdc", "virtio-serial", "usb"):
            notes.leave_out(f"controller {kind} {model}")


def _disks(root: ElementTree.Element, notes: Notes, *, q35: bool, hd_first: bool) -> Iterator[FoundDisk]:
    buses = _pci_buses(root)
    first = True
    for element in root.findall("devices/disk")[:MAX_DEVICES]:
        target = element.find("target")
        name = target.get("dev", "") if target is not None else ""
        if element.get("device", "disk") not in ("disk", "lun") or element.find("readonly") is not None:
            notes.leave_out(f"{element.get('device', 'disk')} {name}")
            continue
        bus = target.get("bus", "virtio") if target is not None else "virtio"
        made = _disk(element, bus, buses, q35=q35)
        if made is None:
            notes.leave_out(f"disk {name} on {bus}")
            continue
        serial = (element.findtext("serial") or "").strip()
        if serial and value_allowed("serial", serial):
            made = made.with_properties(serial=serial)
        boot = element.find("boot")
        order = _number(boot.get("order")) if boot is not None else 0 if first and hd_first else None
        first = False
        alias = element.find("alias")
        names = [name, alias.get("name", "") if alias is not None else "", *_device_names(element, bus, name)]
        source = element.find("source")
        if source is not None:
            names.append(PurePosixPath(source.get("file") or source.get("dev") or "").name)
        yield FoundDisk(made, [one for one in names if one], order)


def _drive_address(element: ElementTree.Element) -> tuple[int, int, int, int]:
    address = element.find("address")
    if address is None or address.get("type") != "drive":
        return 0, 0, 0, 0
    numbers = [_number(address.get(name)) or 0 for name in ("controller", "bus", "target", "unit")]
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _device_names(element: ElementTree.Element, bus: str, name: str) -> list[str]:
    """The id that libvirt gives the device in QEMU."""
    controller, channel, target, unit = _drive_address(element)
    if bus == "virtio" and re.fullmatch(r"vd[a-z]", name):
        return [f"virtio-disk{ord(name[2]) - ord('a')}"]
    return [f"{bus}{controller}-{channel}-{target}-{unit}", f"{bus}{controller}-{channel}-{unit}"]


def _disk(element: ElementTree.Element, bus: str, buses: dict[int, str], *, q35: bool) -> Device | None:
    controller, channel, target, unit = _drive_address(element)
    given = element.find("address") is not None
    if bus == "virtio":
        model = element.get("model", "")
        form = model.removeprefix("virtio") if model in ("virtio-transitional", "virtio-non-transitional") else ""
        return Device(f"virtio-blk-pci{form}", _place(element, buses))
    if bus == "scsi":
        place = {"channel": str(channel), "scsi-id": str(target), "lun": str(unit)} if given else {}
        return Device("scsi-hd", {"bus": f"scsi{controller}.0", **place})
    if bus == "sata":
        name = f"sata{controller}" if controller else "ide" if q35 else "sata0"
        return Device("ide-hd", {"bus": f"{name}.{unit}"} if given else {})
    if bus == "ide":
        return Device("ide-hd", {"bus": f"ide.{channel}", "unit": str(unit)} if given and not q35 else {})
    if bus == "usb":
        return Device("usb-storage")
    return Device("nvme", _place(element, buses)) if bus == "nvme" else None


def _cards(root: ElementTree.Element, notes: Notes) -> Iterator[Device]:
    buses = _pci_buses(root)
    for number, element in enumerate(root.findall("devices/interface")[:MAX_DEVICES]):
        model, mac = element.find("model"), element.find("mac")
        name = model.get("type", "virtio") if model is not None else "rtl8139"
        address = mac.get("address", "") if mac is not None else ""
        properties = {"id": f"net{number}", **({"mac": address} if address else {}), **_place(element, buses)}
        if (made := device(_CARD_MODELS.get(name, name), properties, notes)) is not None:
            yield made


def _others(root: ElementTree.Element) -> Iterator[Device]:
    for element in root.findall("devices/input")[:8]:
        if element.get("bus") == "usb" and element.get("type") in ("tablet", "keyboard", "mouse"):
            yield Device({"tablet": "usb-tablet", "keyboard": "usb-kbd"}.get(element.get("type", ""), "usb-mouse"))
    if root.find("genid") is not None:
        yield Device("vmgenid", {"guid": "auto"})
