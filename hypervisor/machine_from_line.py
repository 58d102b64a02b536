"""The machine behind a stored command line of QEMU (`qemu-command.json`). See `hypervisor.machine_model`."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

from core.errors import FormatError
from hypervisor.cmdline import MASK
from hypervisor.disk_names import base_name
from hypervisor.machine_model import (
    ALIASES,
    CARDS,
    CONTROLLER_BUS,
    CPU_FLAG,
    CPU_MODEL,
    DEFAULT_MEMORY,
    DISK_BUS,
    DISPLAYS,
    MAX_CONFIGURATION,
    MAX_CPUS,
    MAX_DEVICES,
    OTHERS,
    UUID,
    Device,
    FoundDisk,
    Machine,
    Notes,
    device,
    machine_name,
    machine_type,
    options,
    pair,
    plausible_memory,
    special_archives,
    text_of,
    value_allowed,
)

#: Arguments of a command line.
_MAX_ARGUMENTS: Final = 10_000
#: Options without an argument. Of unknown ones that is guessed from what follows.
_FLAGS: Final = frozenset({
    "S", "daemonize", "nodefaults", "no-user-config", "enable-kvm", "nographic", "no-reboot", "no-shutdown", "no-acpi",
    "no-hpet", "snapshot", "usb", "full-screen", "no-fd-bootchk", "singlestep", "only-migratable", "win2k-hack",
    "no-quit", "mem-prealloc", "preconfig", "semihosting", "enable-fips", "rtc-td-hack", "portrait",
})  # fmt: skip
#: Options that say nothing of the machine which a new QEMU would not be given anyway.
_SILENT: Final = frozenset({"nodefaults", "no-user-config", "enable-kvm", "accel", "S", "daemonize"})
_TYPE_OPTIONS: Final = {"smm": r"on|off", "hpet": r"on|off", "vmport": r"on|off|auto", "acpi": r"on|off"}
#: Ones that are about the host, or that a new QEMU decides by itself.
_TYPE_SILENT: Final = frozenset({
    "accel", "usb", "dump-guest-core", "mem-merge", "graphics", "kernel_irqchip", "kernel-irqchip", "memory-backend",
})  # fmt: skip
_SIZE: Final = re.compile(r"([0-9]{1,15})([bkmgtBKMGT]?)")
_UNITS: Final = {"": 20, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SMBIOS: Final = ("manufacturer", "product", "version", "serial", "sku", "family")
_INTERFACES: Final = {"virtio": "virtio-blk-pci", "ide": "ide-hd", "scsi": "scsi-hd"}
_EFI_CODE: Final = re.compile(r"ovmf|edk2|aavmf|qemu_efi", re.IGNORECASE)
_SECURE: Final = re.compile(r"secboot|secure|\.ms\.", re.IGNORECASE)
#: Letters of a kernel's arguments that are kept.
_MAX_APPEND: Final = 4096


@dataclass(slots=True)
class _Image:
    """What is known of a `-drive` or a block node."""

    names: list[str]
    read_only: bool = False
    boot: int | None = None


@dataclass(slots=True)
class _Line:
    """What has been read so far."""

    notes: Notes
    arch: str = "x86_64"
    name: str = "restored"
    uuid: str | None = None
    type: str = ""
    type_options: dict[str, str] = field(default_factory=dict)
    cpu: str | None = None
    cpu_flags: list[str] = field(default_factory=list)
    memory: int = DEFAULT_MEMORY
    cpus: int = 1
    topology: dict[str, int] = field(default_factory=dict)
    firmware: list[str] = field(default_factory=list)  #: base names of firmware files
    secure: bool = False
    tpm: str | None = None
    local_time: bool = False
    smbios: dict[str, str] = field(default_factory=dict)
    devices: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: dict[str, _Image] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)  #: of `-drive if=...` without a device
    cards: list[Device] = field(default_factory=list)
    vga: str | None = None
    kernel: bool = False
    append: str | None = None


def from_command_line(arguments: bytes | Sequence[str], archives: Sequence[str]) -> Machine:
    """The machine that QEMU was told to make.

    Args:
        arguments: the command line with the program's name, or the blob that holds it as a JSON list.
        archives: the disk images of the backup: `drive-disk0.img`.

    Raises:
        FormatError: not a list of texts.
    """
    words = _words(arguments)
    line = _Line(Notes())
    if words and (match := re.search(r"qemu-system-(i386|aarch64)$", words[0])):
        line.arch = match[1]
    line.type = "virt" if line.arch == "aarch64" else "pc"  # what QEMU takes without -machine
    position = 1
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("-"):
            line.notes.leave_out(f"image {base_name(word) or word}")  # the first disk, of unknown format
            continue
        option = word.lstrip("-")
        value: str | None = None
        following = words[position] if position < len(words) else None
        if option not in _FLAGS and following is not None and (option in _READERS or not following.startswith("-")):
            value, position = following, position + 1
        _take(line, option, value)
    return _machine(line, archives)


def _words(arguments: bytes | Sequence[str]) -> list[str]:
    def refused(why: str) -> FormatError:
        return FormatError("read", "qemu-command.json", why, "the machine cannot be rebuilt from it")

    words: object = arguments
    if isinstance(arguments, bytes | bytearray):
        if len(arguments) > MAX_CONFIGURATION:
            raise refused(f"{len(arguments)} bytes, {MAX_CONFIGURATION} are allowed")
        try:
            words = json.loads(bytes(arguments))
        except (ValueError, RecursionError) as error:
            raise refused("it is no JSON") from error
    if not isinstance(words, Sequence) or isinstance(words, str):
        raise refused("it is no list")
    if len(words) > _MAX_ARGUMENTS or not all(isinstance(word, str) for word in words):
        raise refused("it is no list of up to 10000 texts")
    return list(words)


def _take(line: _Line, option: str, value: str | None) -> None:
    reader = _READERS.get(option)
    if reader is not None and value is not None:
        if MASK in value and option not in ("append", "smbios"):
            line.notes.leave_out(f"-{option} with a secret")
        reader(line, value)
    elif option == "usb":
        line.devices.append(("piix3-usb-uhci", {}))
    elif option not in _SILENT:
        line.notes.leave_out(f"-{option}" + (f" {value}" if value is not None else ""))


def _texts(text: str, first: str) -> dict[str, str]:
    return {name: value for name, raw in options(text, first).items() if (value := text_of(raw)) is not None}


# -- one reader for each option that is understood --------------------------------------------------------------------


def _read_name(line: _Line, value: str) -> None:
    given = _texts(value, "guest")
    line.name = machine_name(given.get("guest", "")) or line.name


def _read_uuid(line: _Line, value: str) -> None:
    if UUID.fullmatch(value):
        line.uuid = value
    else:
        line.notes.leave_out(f"-uuid {value}")


def _read_machine(line: _Line, value: str) -> None:
    given = _texts(value, "type")
    if "type" in given:
        line.type = given.pop("type")
    for name, text in given.items():
        if name in ("pflash0", "pflash1"):
            line.firmware += _file_names(line, text)
        elif (allowed := _TYPE_OPTIONS.get(name)) is not None and re.fullmatch(allowed, text):
            line.type_options[name] = text
        elif name not in _TYPE_SILENT:
            line.notes.leave_out(f"machine option {name}={text}")


def _read_cpu(line: _Line, value: str) -> None:
    parts = value.split(",")
    if CPU_MODEL.fullmatch(parts[0]):
        line.cpu = parts[0]
    else:
        line.notes.leave_out(f"processor model {parts[0]}")
    line.cpu_flags = []
    for flag in parts[1 : 1 + MAX_DEVICES]:
        if CPU_FLAG.fullmatch(flag):
            line.cpu_flags.append(flag)
        else:
            line.notes.leave_out(f"processor flag {flag}")


def _read_memory(line: _Line, value: str) -> None:
    match = _SIZE.fullmatch(_texts(value, "size").get("size", ""))
    if match is None:
        line.notes.leave_out(f"-m {value}")
        return
    line.memory = plausible_memory(int(match[1]) << _UNITS[match[2].lower()], line.notes)


def _read_cpus(line: _Line, value: str) -> None:
    numbers = {
        name: int(text)
        for name, text in _texts(value, "cpus").items()
        if text.isascii() and text.isdecimal() and 0 < len(text) <= 6 and 1 <= int(text) <= MAX_CPUS
    }
    names: tuple[str, ...] = ("sockets", "dies", "clusters", "cores", "threads")
    parts = {name: numbers[name] for name in names if name in numbers}
    product = 1
    for number in parts.values():
        product *= number
    line.cpus = min(numbers.get("cpus", product), MAX_CPUS)
    line.topology = parts if product == line.cpus else {}


def _read_firmware(line: _Line, value: str) -> None:
    line.firmware.append(PurePosixPath(value).name)


def _read_rtc(line: _Line, value: str) -> None:
    line.local_time = _texts(value, "base").get("base") == "localtime"


def _read_smbios(line: _Line, value: str) -> None:
    given = _texts(value, "type")
    if given.get("type") != "1":
        line.notes.leave_out(f"-smbios {value}")
        return
    for name, text in given.items():
        if name == "uuid" and UUID.fullmatch(text):
            line.uuid = text
        elif name in _SMBIOS and value_allowed(name, text) and MASK not in text:
            line.smbios[name] = text
        elif name != "type":
            line.notes.leave_out(f"-smbios type=1,{name}")


def _read_global(line: _Line, value: str) -> None:
    given = _texts(value, "driver")
    wanted = {"driver": "cfi.pflash01", "property": "secure", "value": "on"}
    if given == wanted or value == "cfi.pflash01.secure=on":
        line.secure = True
    else:
        line.notes.leave_out(f"-global {value}")


def _read_device(line: _Line, value: str) -> None:
    given = options(value, "driver")
    driver = given.get("driver")
    if not isinstance(driver, str):
        line.notes.leave_out(f"-device {value}")
    elif driver in ("tpm-tis", "tpm-crb"):
        line.tpm = driver
    elif len(line.devices) < 4 * MAX_DEVICES:
        line.devices.append((driver, given))
    else:
        line.notes.leave_out(f"device {driver}")


def _read_blockdev(line: _Line, value: str) -> None:
    given = options(value, "driver")
    name = given.get("node-name")
    if isinstance(name, str) and name and len(line.nodes) < 4 * MAX_DEVICES:
        line.nodes[name] = given
    elif not isinstance(name, str):
        line.notes.leave_out("-blockdev without a node name")


def _read_drive(line: _Line, value: str) -> None:
    given = _texts(value, "file")
    interface = given.get("if") or ("virtio" if line.arch == "aarch64" else "ide")
    image = base_name(given.get("file", ""))
    if interface == "pflash":
        line.firmware.append(image)
        return
    if interface == "none":
        if (name := given.get("id")) and len(line.images) < 4 * MAX_DEVICES:
            read_only = given.get("readonly", given.get("read-only")) == "on" or given.get("media") == "cdrom"
            line.images[name] = _Image([name, *filter(None, (given.get("node-name"), image))], read_only)
        return
    driver = _INTERFACES.get(interface)
    if driver is None or given.get("media") == "cdrom" or given.get("readonly") == "on":
        line.notes.leave_out(f"drive {image} of interface {interface}")
        return
    number = line.numbers.get(interface, 0)
    line.numbers[interface] = number + 1
    for name in ("index", "unit", "bus"):
        if name in given and given[name].isascii() and given[name].isdecimal() and len(given[name]) <= 3:
            number = int(given[name])
            break
    own = f"virtio{number}" if interface == "virtio" else f"{interface}{number // 2}-hd{number % 2}"
    drive = given.get("id") or own
    names = [drive, f"{interface}{number}-hd0", *filter(None, (given.get("node-name"), image))]
    line.images[f"\0{drive}"] = _Image(names)
    line.devices.append((driver, {"drive": f"\0{drive}"}))


def _read_shorthand(number: int) -> Callable[[_Line, str], None]:
    def read(line: _Line, value: str) -> None:
        _read_drive(line, f"file={value.replace(',', ',,')},if=ide,index={number}")

    return read


def _read_vga(line: _Line, value: str) -> None:
    names = {"std": "VGA", "cirrus": "cirrus-vga", "vmware": "vmware-svga", "qxl": "qxl-vga", "virtio": "virtio-vga"}
    line.vga = names.get(value)
    if line.vga is None and value != "none":
        line.notes.leave_out(f"-vga {value}")


def _read_nic(line: _Line, value: str) -> None:
    given = _texts(value, "type")
    if given.get("type") in ("none", "user", "tap", "bridge", "socket", None) and "model" not in given:
        given.setdefault("model", "e1000e" if "q35" in line.type else "e1000")
    mac = given.get("macaddr", given.get("mac"))
    made = device(given.get("model", ""), {} if mac is None else {"mac": mac}, line.notes)
    if given.get("type") != "none" and made is not None and made.driver in CARDS and len(line.cards) < MAX_DEVICES:
        line.cards.append(made)
    line.notes.leave_out(f"network {given.get('type')}")


def _read_net(line: _Line, value: str) -> None:
    if _texts(value, "type").get("type") == "nic":
        _read_nic(line, value)
    else:
        line.notes.leave_out(f"-net {value}")


def _read_append(line: _Line, value: str) -> None:
    if len(value) <= _MAX_APPEND and value.isprintable():
        line.append = value
    else:
        line.notes.leave_out("-append")


def _read_kernel(line: _Line, value: str) -> None:
    line.kernel = True
    line.notes.leave_out(f"kernel {PurePosixPath(value).name}")


_READERS: Final[Mapping[str, Callable[[_Line, str], None]]] = {
    "name": _read_name,
    "uuid": _read_uuid,
    "machine": _read_machine,
    "M": _read_machine,
    "cpu": _read_cpu,
    "m": _read_memory,
    "smp": _read_cpus,
    "bios": _read_firmware,
    "pflash": _read_firmware,
    "rtc": _read_rtc,
    "smbios": _read_smbios,
    "global": _read_global,
    "device": _read_device,
    "blockdev": _read_blockdev,
    "drive": _read_drive,
    "hda": _read_shorthand(0),
    "hdb": _read_shorthand(1),
    "hdc": _read_shorthand(2),
    "hdd": _read_shorthand(3),
    "vga": _read_vga,
    "nic": _read_nic,
    "net": _read_net,
    "append": _read_append,
    "kernel": _read_kernel,
}


# -- and what comes of it ---------------------------------------------------------------------------------------------


def _file_names(line: _Line, node: str) -> list[str]:
    """Base names of the file below a block node."""
    given: object = line.nodes.get(node)
    for _ in range(20):  # filters and formats, each over its `file`
        if isinstance(given, str):
            given = line.nodes.get(given)
        if not isinstance(given, dict):
            return []
        name = given.get("filename", given.get("file.filename"))
        if isinstance(name, str):
            return [PurePosixPath(name).name]
        given = given.get("file")
    return []


def _image(line: _Line, drive: object) -> _Image | None:
    """What a device's `drive` refers to."""
    if not isinstance(drive, str):
        return None
    if drive in line.images:
        return line.images[drive]
    node = line.nodes.get(drive)
    if node is None:
        return None
    return _Image([drive, *_file_names(line, drive)], text_of(node.get("read-only", "off")) == "on")


def _machine(line: _Line, archives: Sequence[str]) -> Machine:
    notes = line.notes
    kinds: dict[str, list[Device]] = {"controllers": [], "cards": list(line.cards), "displays": [], "others": []}
    found: list[FoundDisk] = []
    for driver, given in line.devices:
        driver = ALIASES.get(driver, driver)
        image = _image(line, given.get("drive"))
        if driver in DISK_BUS and not (driver == "nvme" and image is None):
            if image is not None and image.read_only:
                notes.leave_out(f"read-only disk {image.names[0]}")
                continue
            made = device(driver, given, notes)
            if made is not None and len(found) < MAX_DEVICES:
                names = [name.removeprefix("\0") for name in (made.id, *(image.names if image else ())) if name]
                boot = made.properties.get("bootindex")
                bare = made.with_properties(bootindex=None)
                found.append(FoundDisk(bare, names, None if boot is None else int(boot)))
            continue
        made = device(driver, given, notes)
        kind = _kind(driver)
        if made is None or kind is None:
            continue
        if len(kinds[kind]) < MAX_DEVICES:
            kinds[kind].append(made)
        else:
            notes.leave_out(f"device {driver}")
    display = kinds["displays"][0] if kinds["displays"] else Device(line.vga) if line.vga else None
    efi = line.arch == "aarch64" or any(_EFI_CODE.search(name) for name in line.firmware)
    efi_archive, tpm_archive = special_archives(archives)
    return Machine(
        name=line.name,
        uuid=line.uuid,
        arch=line.arch,
        type=machine_type(line.type, line.arch, notes),
        type_options=line.type_options,
        cpu=line.cpu,
        cpu_flags=tuple(line.cpu_flags),
        memory=line.memory,
        cpus=line.cpus,
        topology=line.topology,
        efi=efi,
        secure_boot=efi and (line.secure or any(_SECURE.search(name) for name in line.firmware)),
        tpm=line.tpm,
        local_time=line.local_time,
        smbios=line.smbios,
        controllers=tuple(kinds["controllers"]),
        disks=pair(found, archives, notes, arch=line.arch),
        cards=tuple(kinds["cards"]),
        display=display,
        others=tuple(kinds["others"]),
        efi_archive=efi_archive,
        tpm_archive=tpm_archive,
        direct_kernel=line.kernel,
        kernel_arguments=line.append,
        left_out=notes.left_out,
        warnings=notes.warnings,
    )


def _kind(driver: str) -> str | None:
    if driver in CONTROLLER_BUS or driver == "nvme":
        return "controllers"
    if driver in CARDS:
        return "cards"
    if driver in DISPLAYS:
        return "displays"
    return "others" if driver in OTHERS else None
