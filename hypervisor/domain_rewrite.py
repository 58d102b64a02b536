"""A stored description of a domain, made to define it again: with other disks, and perhaps another name and identity.

What a description can make a host do goes far: open any file as a disk, run a script as root, hand over devices. So
what reaches into the host is left out unless the caller trusts the snapshot. docs/libvirt.md, "Restoring a domain".
"""

import posixpath
import re
import uuid as uuids
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from xml.etree.ElementTree import Element, SubElement

from core.errors import FormatError
from hypervisor.cmdline import MASK
from hypervisor.domain_xml import DomainDisk, as_bytes, described, element_of, nvram_format

#: Programs that may be a domain's emulator without trust.
_EMULATOR: Final = re.compile(r"/usr/(bin/(qemu-system-[a-z0-9_]+|kvm|qemu-kvm)|libexec/qemu-kvm)")
#: Where distributions install firmware.
_FIRMWARE: Final = "/usr/share/"
#: Devices that need nothing of the host, or only what a fresh machine of libvirt would get.
_HARMLESS: Final = frozenset(
    {
        "emulator", "disk", "controller", "interface", "serial", "parallel", "console", "channel", "input", "tpm",
        "graphics", "video", "audio", "sound", "watchdog", "memballoon", "rng", "panic", "iommu", "vsock", "hub",
        "redirdev",
    }
)  # fmt: skip
#: Children of `<domain>` that stay without trust.
_HARMLESS_PARTS: Final = frozenset(
    {
        "name", "uuid", "genid", "title", "description", "metadata", "memory", "currentMemory", "maxMemory", "vcpu",
        "vcpus", "iothreads", "iothreadids", "cputune", "blkiotune", "memtune", "memoryBacking", "numatune", "resource",
        "sysinfo", "os", "features", "cpu", "clock", "on_poweroff", "on_reboot", "on_crash", "on_lockfailure", "pm",
        "perf", "devices", "idmap",
    }
)  # fmt: skip
#: Children of `<os>` that stay without trust: what boots from the restored disks.
_HARMLESS_BOOT: Final = frozenset({"type", "loader", "nvram", "boot", "bootmenu", "bios", "smbios", "firmware"})
#: Children of `<domain>` of which libvirt would take any, or all, where there should be one.
_ONCE: Final = ("name", "uuid", "os", "devices")
#: Character devices, whose other end may be any file or socket of the host.
_CHARACTER: Final = ("serial", "parallel", "console", "channel", "redirdev")
#: Attributes that name a file, be it by a path that is relative to libvirt's folder or QEMU's, which is `/`.
_NAMES_FILE: Final = frozenset({"file", "path", "dir", "rendernode"})
#: Kinds of interfaces that join a network of libvirt's, or none.
_NETWORKS: Final = frozenset({"network", "bridge", "user"})


@dataclass(frozen=True, slots=True)
class NewDisk:
    """Where a disk of the domain lies now."""

    archive: str  #: `drive-vda.img`
    path: str
    kind: Literal["file", "block"]
    format: str  #: `raw` or `qcow2`


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDomain:
    """What a domain is to become."""

    name: str
    uuid: str  #: with dashes
    new_identity: bool  #: other MAC addresses and generation id as well
    disks: Sequence[NewDisk]
    nvram: str | None = None  #: path of the EFI variables, in the format that the description names
    trusted: bool = False  #: keep what reaches into the host
    exists: Callable[[str], bool] = field(default=lambda path: Path(path).exists())  #: for media of other drives


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A description for libvirt."""

    xml: str
    disks: Mapping[str, str]  #: archive names by target
    warnings: Sequence[str]


def new_uuid() -> str:
    """A UUID for a domain."""
    return str(uuids.uuid4())


def rewrite(text: bytes, wanted: NewDomain, *, where: str, live: bytes | None = None) -> Rewritten:
    """The description `text` as `wanted`; `live`, how the domain ran, tells of disks that were plugged in only then.

    Raises:
        FormatError: `text` is no description of a domain of QEMU's, or the disks do not fit to it.
    """
    root = element_of(text, where)
    if root.get("type") not in ("qemu", "kvm", "hvf"):
        raise FormatError(
            "restore the domain of", where, f"it is of the type {str(root.get('type'))[:20]!r}, not QEMU's"
        )
    warnings: list[str] = []
    running = None if live is None else element_of(live, where)
    for one in (root, *([] if running is None else [running])):
        for tag in _ONCE:
            if len(one.findall(tag)) > 1:
                raise FormatError("restore the domain of", where, f"its description has more than one <{tag}>")
    _set_identity(root, wanted)
    if not wanted.trusted:
        _leave_out(root, warnings)
    matched = _set_disks(root, running, wanted, warnings, where)
    _set_firmware(root, wanted, warnings)
    for interface in root.findall("devices/interface"):
        if wanted.new_identity:
            _drop(interface, "mac")
        for target in interface.findall("target"):
            if target.get("dev", "").startswith("vnet"):
                interface.remove(target)
    for label in root.findall("seclabel"):
        root.remove(label)  # of the host that it ran on, or made anew at each start
    result = as_bytes(root).decode()
    if MASK in result:
        warnings.append(f"secrets in it were left out of the backup: look for {MASK} in the definition")
    described(element_of(result, where), where)
    return Rewritten(result, matched, warnings)


def _drop(element: Element, *names: str) -> None:
    for name in names:
        for child in element.findall(name):
            element.remove(child)


def _set_identity(root: Element, wanted: NewDomain) -> None:
    root.attrib.pop("id", None)
    for tag, value in (("name", wanted.name), ("uuid", wanted.uuid)):
        element = root.find(tag)
        if element is None:
            element = SubElement(root, tag)
        element.text = value
    for entry in root.findall("sysinfo/system/entry[@name='uuid']"):
        entry.text = wanted.uuid  # libvirt insists that they are the same
    if wanted.new_identity:
        for genid in root.findall("genid"):
            genid.text = new_uuid()


# -- what reaches into the host ---------------------------------------------------------------------------------------


def _leave_out(root: Element, warnings: list[str]) -> None:
    out: list[str] = []
    for child in list(root):
        if child.tag not in (*_HARMLESS_PARTS, "seclabel"):
            root.remove(child)
            out.append(_called(child))
    _drop_parts(root, out)
    for devices in root.findall("devices"):
        for device in list(devices):
            if device.tag not in _HARMLESS or not _is_harmless(device):
                devices.remove(device)
                out.append(_called(device))
        for tag in _CHARACTER:
            for device in devices.findall(tag):
                if device.get("type") not in ("pty", "spicevmc", "null", "vc") and not _is_agent(device):
                    _to_pty(device)
                    out.append(f"the other end of <{tag}>")
                if device.find("log") is not None:  # a file that a service of root writes what the guest says to
                    _drop(device, "log")
                    out.append(f"the log of <{tag}>")
                if not _is_agent(device):
                    _drop(device, "source")  # what it was called on the host it ran on
                device.attrib.pop("tty", None)
        for device in devices:
            if device.tag not in ("emulator", "rng"):  # looked at above
                _leave_out_paths(device, out)
    warnings += [f"left out, since it reaches into the host: {what}; --trust keeps it" for what in sorted(set(out))]


def _leave_out_paths(device: Element, out: list[str]) -> None:
    """Leave out every part of a device that names a file or socket, whatever libvirt would do with it."""
    for name in [name for name, value in device.attrib.items() if _is_path(value) or name in _NAMES_FILE]:
        del device.attrib[name]
        out.append(f"{name} of {_called(device)}"[:80])
    for child in list(device):
        if device.tag == "disk" and child.tag in ("source", "backingStore", "mirror"):
            continue  # goes in any case, or with its medium
        if any(map(_names_file, child.iter())):
            device.remove(child)
            out.append(f"{_called(child)} of {_called(device)}")


def _names_file(element: Element) -> bool:
    return any(map(_is_path, (element.text or "", *element.attrib.values()))) or not _NAMES_FILE.isdisjoint(
        element.attrib
    )


def _is_path(text: str) -> bool:
    text = text.strip()
    return text.startswith("/") or ":/" in text or "=/" in text


def _called(element: Element) -> str:
    name = str(element.tag).rpartition("}")[2]
    return f"<{name}>" if name.isascii() and len(name) < 40 else "an element"


def _drop_parts(root: Element, out: list[str]) -> None:
    for system in root.findall("os"):
        for child in list(system):
            again = child.tag != "boot" and child is not system.find(str(child.tag))
            if child.tag not in _HARMLESS_BOOT or again:
                system.remove(child)
                out.append(_called(child))
        for loader in system.findall("loader"):
            if loader.get("readonly") == "no" or (loader.get("type") == "pflash" and loader.get("readonly") != "yes"):
                loader.set("readonly", "yes")  # of flash memory nothing said means that it can be written to
                out.append("that it may write to its <loader>")
            if not _is_below((loader.text or "").strip(), _FIRMWARE):
                system.remove(loader)
                system.set("firmware", "efi")
                out.append("<loader>")
        for nvram in system.findall("nvram"):
            if nvram.get("template") is not None and not _is_below(nvram.get("template", ""), _FIRMWARE):
                del nvram.attrib["template"]
                out.append("the template of <nvram>")
    for backing in root.findall("memoryBacking"):
        _drop(backing, "source", "access")
    for info in root.findall("sysinfo"):
        for entry in info.findall("entry"):
            if entry.get("file") is not None:
                info.remove(entry)
                out.append("a file of <sysinfo>")
    for emulator in root.findall("devices/emulator"):
        if not _EMULATOR.fullmatch((emulator.text or "").strip()):
            emulator.text = ""
            out.append("<emulator>")
    for devices in root.findall("devices"):
        for emulator in devices.findall("emulator"):
            if not emulator.text:
                devices.remove(emulator)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder) and posixpath.normpath(path) == path


def _is_harmless(device: Element) -> bool:
    if device.tag == "interface":
        for name in ("script", "downscript", "backend", "source/address"):
            if device.find(name) is not None:
                return False
        return device.get("type") in _NETWORKS
    if device.tag in ("tpm", "rng") and len(device.findall("backend")) != 1:
        return False
    if device.tag == "tpm":
        backend = device.find("backend")
        return backend is not None and backend.get("type") == "emulator" and backend.find("source") is None
    if device.tag == "rng":
        backend = device.find("backend")
        random = backend is not None and backend.get("model") in ("random", "builtin")
        return random and ((backend.text or "") if backend is not None else "").strip() in (
            "", "/dev/urandom", "/dev/random", "/dev/hwrng",
        )  # fmt: skip
    if device.tag == "graphics":
        return (
            device.get("type") in ("vnc", "spice")
            and device.get("socket") is None
            and not any(listen.get("type") == "socket" for listen in device.findall("listen"))
        )
    if device.tag == "audio":
        return device.get("type") in ("none", "spice")
    if device.tag == "input":
        return device.get("type") in ("tablet", "mouse", "keyboard")
    return True


def _is_agent(device: Element) -> bool:
    """A channel whose socket libvirt makes itself."""
    source = device.find("source")
    return device.tag == "channel" and device.get("type") == "unix" and (source is None or source.get("path") is None)


def _to_pty(device: Element) -> None:
    device.set("type", "pty")
    _drop(device, "source", "log", "protocol")


# -- disks and firmware -----------------------------------------------------------------------------------------------


def _set_disks(
    root: Element, running: Element | None, wanted: NewDomain, warnings: list[str], where: str
) -> dict[str, str]:
    devices = root.find("devices")
    if devices is None:
        devices = SubElement(root, "devices")
    known = {disk.target: disk for disk in described(root, where).disks}
    elements = {_target(element): element for element in devices.findall("disk")}
    if running is not None:
        for disk in described(running, where).disks:
            if disk.target not in known and disk.is_disk:
                element = next(one for one in running.findall("devices/disk") if _target(one) == disk.target)
                if not wanted.trusted:
                    _leave_out_paths(element, [])
                devices.append(element)
                known[disk.target], elements[disk.target] = disk, element
            elif disk.target in known and disk.alias:
                known[disk.target] = disk
    matched = _match(wanted.disks, [disk for disk in known.values() if disk.is_disk], warnings, where)
    new = dict(matched)
    for target, element in elements.items():
        if target in new:
            _point_to(element, new[target])
        elif known[target].device in ("cdrom", "floppy"):
            _medium(element, known[target], wanted, warnings)
        else:
            devices.remove(element)
            warnings.append(f"without the disk {target}, which is not among the restored ones")
    return {target: disk.archive for target, disk in matched}


def _target(element: Element) -> str:
    target = element.find("target")
    return "" if target is None else target.get("dev", "")


def _match(
    disks: Sequence[NewDisk], known: Sequence[DomainDisk], warnings: list[str], where: str
) -> list[tuple[str, NewDisk]]:
    """Which restored disk is which: by name, else, where their numbers agree, by order."""
    from hypervisor.disk_names import archive_name

    free = list(known)
    result = []
    rest = []
    for disk in disks:
        found = next((one for one in free if disk.archive in _archives(one, archive_name)), None)
        if found is None:
            rest.append(disk)
        else:
            free.remove(found)
            result.append((found.target, disk))
    if rest and len(rest) != len(free):
        names = ", ".join(disk.archive for disk in rest)
        raise FormatError("restore the domain of", where, f"its description has no disk for {names}")
    for disk, one in zip(rest, free, strict=False):
        warnings.append(f"no disk of the domain is called like {disk.archive}: it is taken for {one.target}")
        result.append((one.target, disk))
    return result


def _archives(disk: DomainDisk, archive_name: Callable[[str], str]) -> Iterator[str]:
    yield disk.archive
    if disk.alias:
        yield archive_name(disk.alias)


def _point_to(element: Element, disk: NewDisk) -> None:
    element.set("type", disk.kind)
    element.set("device", "disk")
    for name in ("snapshot", "rawio", "sgio"):  # the latter are for a `lun` only
        element.attrib.pop(name, None)
    _drop(element, "source", "backingStore", "mirror", "encryption", "auth")
    alias = element.find("alias")
    if alias is not None and not alias.get("name", "").startswith("ua-"):
        element.remove(alias)
    driver = element.find("driver")
    if driver is None:
        driver = SubElement(element, "driver")
    driver.set("name", "qemu")
    driver.set("type", disk.format)
    if disk.format != "qcow2":
        driver.attrib.pop("discard_no_unref", None)
        _drop(driver, "metadata_cache")
    SubElement(element, "source", {"file" if disk.kind == "file" else "dev": disk.path})


def _medium(element: Element, drive: DomainDisk, wanted: NewDomain, warnings: list[str]) -> None:
    """Keep the medium of a drive only where it is there, and nobody could mean harm by it."""
    _drop(element, "backingStore", "mirror")
    if wanted.trusted and (drive.kind not in ("file", "block") or wanted.exists(drive.source)):
        return
    sources = element.findall("source")
    _drop(element, "source")
    if element.get("type") not in ("file", "block"):
        element.set("type", "file")
    # Libvirt takes a path without a slash in front as well.
    had = drive.source or next((path for one in sources if (path := one.get("file") or one.get("dev"))), "")
    if had:
        warnings.append(f"the drive {drive.target} is empty; it had {had}"[:300])


def _set_firmware(root: Element, wanted: NewDomain, warnings: list[str]) -> None:
    system = root.find("os")
    if system is None:
        return
    nvram = system.find("nvram")
    if wanted.nvram is None:
        if nvram is not None:
            # libvirt makes new ones from the firmware's template, where the name of the domain says.
            template = nvram.get("template")
            system.remove(nvram)
            if template is not None:
                SubElement(system, "nvram", {"template": template})
            warnings.append("the snapshot has no EFI variables: the firmware starts with its defaults")
        return
    if nvram is None:
        if system.find("loader") is None and system.get("firmware") != "efi":
            return
        nvram = SubElement(system, "nvram")
    format = nvram_format(root)
    for child in list(nvram):
        nvram.remove(child)
    for name in ("type", "format", "templateFormat"):
        nvram.attrib.pop(name, None)
    if format != "raw":
        nvram.set("format", format)  # libvirt insists on that of the firmware
    nvram.text = wanted.nvram
