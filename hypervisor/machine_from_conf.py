"""The machine behind a stored `qemu-server.conf` of Proxmox VE. See `hypervisor.machine_model`.

Devices get the places on their buses that Proxmox VE gives them, so that a guest finds its network cards and disks
where they were.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Final

from core.errors import FormatError
from hypervisor.machine_model import (
    CPU_FLAG,
    CPU_MODEL,
    DEFAULT_MEMORY,
    MAX_CONFIGURATION,
    MAX_CPUS,
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

_LINE: Final = re.compile(r"([a-z][a-z_0-9-]{0,40}):(.*)")
_DISK: Final = re.compile(r"(scsi|virtio|sata|ide)([0-9]{1,2})")
_MOST: Final = {"scsi": 31, "virtio": 16, "sata": 6, "ide": 4}
_CARD: Final = re.compile(r"net([0-9]{1,2})")
_CARDS: Final = {"virtio": "virtio-net-pci", "vmxnet3": "vmxnet3", "rtl8139": "rtl8139", "ne2k_pci": "ne2k_pci"}
_SCSI: Final = {
    "lsi": "lsi53c895a", "lsi53c810": "lsi53c810", "megasas": "megasas", "pvscsi": "pvscsi",
    "virtio-scsi-pci": "virtio-scsi-pci", "virtio-scsi-single": "virtio-scsi-pci",
}  # fmt: skip
_DISPLAYS: Final = {
    "std": "VGA", "cirrus": "cirrus-vga", "vmware": "vmware-svga", "virtio": "virtio-vga", "qxl": "qxl-vga",
}  # fmt: skip
#: Keys that say nothing of the machine which matters to a restored one.
_SILENT: Final = frozenset({
    "name", "memory", "sockets", "cores", "vcpus", "cpu", "machine", "bios", "scsihw", "ostype", "boot", "bootdisk",
    "vga", "smbios1", "localtime", "kvm", "meta", "description", "digest", "tags", "onboot", "protection", "startup",
    "numa", "balloon", "shares", "agent", "acpi", "tablet", "template", "parent", "lock", "unused0", "hotplug",
    "vmgenid",
})  # fmt: skip


def from_qemu_server_conf(text: bytes | str, archives: Sequence[str]) -> Machine:
    """The machine that a configuration of Proxmox VE describes.

    Args:
        text: the file's content.
        archives: the disk images of the backup: `drive-scsi0.img`.

    Raises:
        FormatError: larger than any such file.
    """
    if len(text) > MAX_CONFIGURATION:
        raise FormatError("read", "qemu-server.conf", f"{len(text)} bytes, {MAX_CONFIGURATION} are allowed")
    notes = Notes()
    given = _lines(text if isinstance(text, str) else bytes(text).decode("utf-8", "replace"), notes)
    kind = _parts(given.get("machine", ""), "type").get("type") or "pc"
    kind = machine_type(kind, "x86_64", notes)
    found, controllers = _disks(given, notes, q35="q35" in kind)
    cpu, flags = _cpu(given.get("cpu", ""), notes)
    sockets, cores = _number(given.get("sockets"), 1), _number(given.get("cores"), 1)
    ostype = given.get("ostype", "")
    efi = given.get("bios") == "ovmf"
    efi_archive, tpm_archive = special_archives(archives)
    uuid, smbios = _smbios(given.get("smbios1", ""), notes)
    for key, value in given.items():
        if key not in _SILENT and not (
            _DISK.fullmatch(key) or _CARD.fullmatch(key) or key in ("efidisk0", "tpmstate0")
        ):
            notes.leave_out(f"{key}: {value}")
    return Machine(
        name=machine_name(given.get("name", "")) or "restored",
        uuid=uuid,
        type=kind,
        cpu=cpu,
        cpu_flags=flags,
        memory=_memory(given.get("memory"), notes),
        cpus=min(sockets * cores, MAX_CPUS),
        topology={"sockets": sockets, "cores": cores} if sockets * cores <= MAX_CPUS else {},
        efi=efi,
        # The firmware for it needs SMM as q35 has it, and says nothing on others; the plain one knows the keys as well.
        secure_boot=efi and "q35" in kind and _parts(given.get("efidisk0", ""), "file").get("pre-enrolled-keys") == "1",
        tpm="tpm-tis" if "tpmstate0" in given else None,
        local_time=given.get("localtime", "1" if ostype.startswith("w") else "0") == "1",
        smbios=smbios,
        controllers=tuple(controllers),
        disks=pair(found, archives, notes, arch="x86_64"),
        cards=tuple(_cards(given, notes)),
        display=_display(given.get("vga", "std"), notes),
        others=(Device("vmgenid", {"guid": "auto"}),) if "vmgenid" in given else (),
        efi_archive=efi_archive,
        tpm_archive=tpm_archive,
        left_out=notes.left_out,
        warnings=notes.warnings,
    )


def _lines(text: str, notes: Notes) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("["):
            break  # snapshots and pending changes
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        value = "" if match is None else match[2].strip()
        if match is None or not value or len(found) >= 1000:
            notes.leave_out(f"line {line}")
        else:
            found[match[1]] = value
    return found


def _parts(text: str, first: str) -> dict[str, str]:
    """`a,b=c` as a mapping; the part without a name is called `first`."""
    found = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        found[name if equals else first] = value if equals else name
    return found


def _number(text: str | None, otherwise: int) -> int:
    if text is None or not (text.isascii() and text.isdecimal() and len(text) <= 9):
        return otherwise
    return max(1, min(int(text), MAX_CPUS))


def _memory(text: str | None, notes: Notes) -> int:
    if text is None:
        return 512 << 20  # what Proxmox VE gives without being told
    amount = _parts(text, "current").get("current", "")
    if not (amount.isascii() and amount.isdecimal() and len(amount) <= 12):
        notes.leave_out(f"memory: {text}")
        return DEFAULT_MEMORY
    return plausible_memory(int(amount) << 20, notes)


def _cpu(text: str, notes: Notes) -> tuple[str | None, tuple[str, ...]]:
    parts = _parts(text, "cputype")
    model = parts.get("cputype", "") or "kvm64"
    flags = tuple(flag for flag in parts.get("flags", "").split(";") if CPU_FLAG.fullmatch(flag))[:64]
    if model.startswith(("custom-", "x86-64-v")) or not CPU_MODEL.fullmatch(model):
        notes.leave_out(f"processor model {model}, which only Proxmox VE has")
        return None, flags
    return model, flags


def _smbios(text: str, notes: Notes) -> tuple[str | None, dict[str, str]]:
    parts = _parts(text, "")
    found: dict[str, str] = {}
    for name in ("manufacturer", "product", "version", "serial", "sku", "family"):
        if name not in parts:
            continue
        value = parts[name]
        if parts.get("base64") == "1":
            try:
                value = base64.b64decode(value, validate=True).decode()
            except (binascii.Error, ValueError):
                value = ""
        if value_allowed(name, value):
            found[name] = value
        else:
            notes.leave_out(f"smbios1: {name}")
    uuid = parts.get("uuid", "")
    return uuid if UUID.fullmatch(uuid) else None, found


def _boot(given: Mapping[str, str]) -> list[str]:
    """Names of devices in the order in which they are tried."""
    boot = _parts(given.get("boot", ""), "legacy")
    if order := boot.get("order"):
        return order.split(";")
    return [given["bootdisk"]] if "bootdisk" in given else []


def _disks(given: Mapping[str, str], notes: Notes, *, q35: bool) -> tuple[list[FoundDisk], list[Device]]:
    found: list[FoundDisk] = []
    controllers: dict[str, Device] = {}
    if q35:  # the bridge that gives `pci.0` there, as Proxmox VE has it
        controllers["pcidmi"] = Device("i82801b11-bridge", {"id": "pcidmi", "bus": "pcie.0", "addr": "1e.0"})
        controllers["pci.0"] = Device("pci-bridge", {"id": "pci.0", "bus": "pcidmi", "addr": "1.0", "chassis_nr": "1"})
    order = _boot(given)
    for kind, most in _MOST.items():
        for number in range(most):
            name = f"{kind}{number}"
            if name not in given:
                continue
            parts = _parts(given[name], "file")
            if parts.get("media") == "cdrom" or parts.get("file") == "none":
                notes.leave_out(f"{name}, a CD-ROM drive")
                continue
            made = _disk(given, kind, number, parts, controllers, notes, q35=q35)
            found.append(FoundDisk(made, [name], order.index(name) if name in order else None))
    return found, list(controllers.values())


def _disk(
    given: Mapping[str, str],
    kind: str,
    number: int,
    parts: Mapping[str, str],
    controllers: dict[str, Device],
    notes: Notes,
    *,
    q35: bool,
) -> Device:
    properties = {"id": f"{kind}{number}"}
    for name in ("serial", "wwn", "model"):
        if name in parts and kind != "virtio" and value_allowed(name, parts[name]):
            properties[name] = parts[name]
    if kind == "virtio":
        if number < 6:
            properties |= {"bus": "pci.0", "addr": f"{10 + number:x}"}
        return Device("virtio-blk-pci", properties)
    if parts.get("ssd") == "1":
        properties["rotation_rate"] = "1"
    if kind == "ide":
        place = {"bus": f"ide.{number}"} if q35 else {"bus": f"ide.{number // 2}", "unit": str(number % 2)}
        return Device("ide-hd", properties | place)
    if kind == "sata":
        controllers.setdefault("ahci0", Device("ahci", {"id": "ahci0", "bus": "pci.0", "addr": "7"}))
        return Device("ide-hd", properties | {"bus": f"ahci0.{number}"})
    hardware = given.get("scsihw", "lsi")
    if hardware not in _SCSI:
        notes.warn(f"SCSI controller {hardware[:40]!r} is not known: it gets virtio-scsi-pci")
        hardware = "virtio-scsi-pci"
    single = hardware == "virtio-scsi-single"
    virtio = hardware.startswith("virtio")
    each = 1 if single else 31 if virtio else 7
    controller = f"{'virtioscsi' if single else 'scsihw'}{number // each}"
    place = {} if single or number >= each else {"bus": "pci.0", "addr": "5"}
    controllers.setdefault(controller, Device(_SCSI[hardware], {"id": controller, **place}))
    unit = {"channel": "0", "scsi-id": "0", "lun": str(number % each)} if virtio else {"scsi-id": str(number % each)}
    return Device("scsi-hd", properties | {"bus": f"{controller}.0"} | unit)


def _cards(given: Mapping[str, str], notes: Notes) -> list[Device]:
    cards = []
    for number in range(32):
        parts = _parts(given.get(f"net{number}", ""), "model")
        if f"net{number}" not in given:
            continue
        model, mac = parts.get("model", ""), parts.get("macaddr", "")
        for name in parts:
            if name in _CARDS or name.startswith("e1000"):
                model, mac = name, parts[name]
        properties = {"id": f"net{number}"} | ({"mac": mac} if mac else {})
        if number < 6:
            properties |= {"bus": "pci.0", "addr": f"{0x12 + number:x}"}
        if (made := device(_CARDS.get(model, model), properties, notes)) is not None:
            cards.append(made)
    return cards


def _display(text: str, notes: Notes) -> Device | None:
    kind = _parts(text, "type").get("type", "std")
    if kind in ("none",) or kind.startswith("serial"):
        return None
    if kind.removesuffix("-gl") not in _DISPLAYS and not kind.startswith("qxl"):
        notes.leave_out(f"vga: {text}")
    return Device(_DISPLAYS.get(kind, "qxl-vga" if kind.startswith("qxl") else "VGA"))
