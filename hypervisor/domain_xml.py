"""The XML by which libvirt describes a domain: what a backup needs of it, and how one is written for a restore.

What is read may come out of a snapshot that somebody else wrote: it is bounded before it is parsed, has no DOCTYPE (and
so no entities), and no path in it is opened here. docs/libvirt.md, "What is in a backup".
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias
from xml.etree.ElementTree import Element

from core.errors import FormatError
from hypervisor.cmdline import MASK, masked
from hypervisor.disk_names import archive_name

#: The blobs' names without `.blob`: what the domain will be when it is started, and what it was when it was backed up.
DOMAIN_XML_NAME: Final = "domain.xml"
LIVE_XML_NAME: Final = "domain-live.xml"
#: Bytes of a description; libvirt itself sends and takes no more.
MAX_SIZE: Final = 4 * 1024 * 1024
#: Elements, and how deep they lie in each other; those of libvirt's are at most 12 deep.
MAX_ELEMENTS: Final = 50_000
MAX_DEPTH: Final = 64
#: Disks of a domain; libvirt's buses have room for fewer.
MAX_DISKS: Final = 4096

_TARGET: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
_UUID: Final = re.compile(r"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}", re.IGNORECASE)
ElementTree.register_namespace("qemu", _NAMESPACE)

SourceKind: TypeAlias = Literal["file", "block", "volume", "other", "empty"]


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """One `<disk>` with a target."""

    target: str  #: `vda`: what libvirt calls it, the same whether the domain runs or not
    alias: str | None  #: the device's id in QEMU, of a domain that runs
    device: str  #: `disk`, `cdrom`, `floppy` or `lun`
    kind: SourceKind  #: where its bytes are
    source: str  #: path of the file or block device, `POOL/VOLUME`, else the type (`network`, `nvme`, ...)
    format: str  #: of its driver: `raw`, `qcow2`, ...
    read_only: bool
    shareable: bool  #: another domain may write to it
    encrypted: bool
    sliced: bool = False  #: it is only a part of its source

    @property
    def archive(self) -> str:
        """Name of its archive: `drive-vda.img`."""
        return archive_name(self.target)

    @property
    def is_disk(self) -> bool:
        """Whether a backup takes it: no CD-ROM or floppy drive, nothing that is empty or read-only."""
        return self.device in ("disk", "lun") and not self.read_only and self.kind != "empty"


@dataclass(frozen=True, slots=True)
class Tpm:
    """An emulated TPM, whose state libvirt's swtpm keeps."""

    version: str  #: `1.2` or `2.0`
    source: str | None  #: path of the state, where the description names it


@dataclass(frozen=True, slots=True)
class DomainDescription:
    """What a backup or restore needs of a domain."""

    name: str
    uuid: str  #: with dashes; empty if it has none
    disks: tuple[DomainDisk, ...]
    nvram: str | None  #: path of the EFI variables
    nvram_format: str  #: of the file with them: `raw` or `qcow2`
    tpm: Tpm | None
    has_agent: bool  #: there is a channel for the guest agent
    owner: int | None  #: uid of its QEMU, of a domain that runs


def parse_domain(text: str | bytes, where: str = "the domain's XML") -> DomainDescription:
    """Read a description.

    Raises:
        FormatError: it is none, or larger or deeper than any of libvirt's.
    """
    return described(element_of(text, where), where)


def element_of(text: str | bytes, where: str) -> Element:
    """The checked root of a description. Raises as `parse_domain`."""
    if len(text) > MAX_SIZE:
        raise FormatError("read", where, f"{len(text)} bytes are more than any domain's description has")
    try:
        # As text: what a declaration says of the encoding cannot hide anything from the next line.
        plain = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise FormatError("read", where, "it is not UTF-8") from error
    # Zeros: the parser would take the text for UTF-16, in which the words would not be seen here.
    if "\0" in plain or "<!DOCTYPE" in plain or "<!ENTITY" in plain:
        raise FormatError("read", where, "it declares a document type, which libvirt never does")
    parser: ElementTree.XMLPullParser[Element] = ElementTree.XMLPullParser(["start", "end"])
    depth = count = 0
    root: Element | None = None
    try:
        for start in range(0, len(plain), 65536):
            parser.feed(plain[start : start + 65536])
            for event, element in parser.read_events():  # type: ignore[misc] # "start" and "end" are pairs
                if root is None and isinstance(element, Element):
                    root = element
                depth += 1 if event == "start" else -1
                count += event == "start"
                if depth > MAX_DEPTH or count > MAX_ELEMENTS:
                    raise FormatError("read", where, "more or deeper elements than any domain's description has")
        parser.close()
    except (ElementTree.ParseError, ValueError) as error:
        raise FormatError("read", where, f"it is no XML: {error}") from error
    if root is None or root.tag != "domain" or depth:
        raise FormatError("read", where, "it describes no domain")
    return root


def described(root: Element, where: str) -> DomainDescription:
    """What `parse_domain` returns, of its root. Raises as it."""
    name = root.findtext("name") or ""
    if not name.strip() or "/" in name or len(name) > 255 or not name.isprintable():
        raise FormatError("read", where, f"{name[:60]!r} is no name of a domain")
    uuid = _text(root, "uuid")
    if uuid and not _UUID.fullmatch(uuid):
        raise FormatError("read", where, f"{uuid[:60]!r} is no UUID")
    nvram = root.find("os/nvram")
    return DomainDescription(
        name=name,
        uuid=uuid.lower(),
        disks=tuple(_disks(root, where)),
        nvram=None if nvram is None else _nvram_path(nvram),
        nvram_format=nvram_format(root),
        tpm=_tpm(root),
        has_agent=any(
            target.get("name") == "org.qemu.guest_agent.0" for target in root.findall("devices/channel/target")
        ),
        owner=_owner(root),
    )


def _text(root: Element, path: str) -> str:
    return (root.findtext(path) or "").strip()


def _disks(root: Element, where: str) -> Iterator[DomainDisk]:
    seen = set()
    elements = root.findall("devices/disk")
    if len(elements) > MAX_DISKS:
        raise FormatError("read", where, f"{len(elements)} disks")
    for disk in elements:
        target = _attribute(disk, "target", "dev")
        if not _TARGET.fullmatch(target):
            raise FormatError("read", where, f"a disk with the target {target[:60]!r}")
        if target in seen:
            raise FormatError("read", where, f"two disks with the target {target}")
        seen.add(target)
        kind, source = _source(disk)
        yield DomainDisk(
            target=target,
            alias=_attribute(disk, "alias", "name") or None,
            device=disk.get("device", "disk"),
            kind=kind,
            source=source,
            format=_attribute(disk, "driver", "type") or "raw",
            read_only=disk.find("readonly") is not None,
            shareable=disk.find("shareable") is not None,
            encrypted=disk.find("encryption") is not None or disk.find("source/encryption") is not None,
            sliced=disk.find("source/slices/slice") is not None,
        )


def _attribute(element: Element, child: str, name: str) -> str:
    found = element.find(child)
    return "" if found is None else found.get(name, "")


def _source(disk: Element) -> tuple[SourceKind, str]:
    kind = disk.get("type", "file")
    source = disk.find("source")
    if source is None:
        return "empty", ""
    if kind == "file":
        path = source.get("file", "")
        return ("file", path) if path.startswith("/") else ("empty", "")
    if kind == "block":
        path = source.get("dev", "")
        return ("block", path) if path.startswith("/") else ("empty", "")
    if kind == "volume":
        return "volume", f"{source.get('pool', '')}/{source.get('volume', '')}"
    return "other", kind


def _nvram_path(nvram: Element) -> str | None:
    path = nvram.get("type") in (None, "file") and ((nvram.text or "").strip() or _attribute(nvram, "source", "file"))
    return path if path and path.startswith("/") else None


def nvram_format(root: Element) -> str:
    """The format of the file with the EFI variables: its own, else that of the firmware (libvirt 9.2 and newer)."""
    given = [_attribute(root, path, "format") for path in ("os/nvram", "os/loader")]
    return "qcow2" if next((one for one in given if one), "raw") == "qcow2" else "raw"


def _tpm(root: Element) -> Tpm | None:
    for backend in root.findall("devices/tpm/backend"):
        if backend.get("type") == "emulator":
            source = backend.find("source")
            path = None if source is None else source.get("path")
            return Tpm(backend.get("version", "2.0"), path if path and path.startswith("/") else None)
    return None


def _owner(root: Element) -> int | None:
    for label in root.findall("seclabel"):
        if label.get("model") == "dac":
            match = re.fullmatch(r"\+?([0-9]{1,10}):\+?[0-9]{1,10}", _text(label, "label"))
            return int(match[1]) if match is not None else None
    return None


# -- for the snapshot -------------------------------------------------------------------------------------------------


def without_secrets(text: str) -> bytes:
    """A description as libvirt gives it (passwords of displays left out), with what else is secret masked.

    That is what users pass to QEMU by `<qemu:commandline>`, the arguments of the guest's kernel, and strings of the
    firmware. Nothing else is changed.

    Raises:
        FormatError: as `parse_domain`.
    """
    root = element_of(text, "the domain's XML")
    line = root.find(f"{{{_NAMESPACE}}}commandline")
    if line is not None:
        arguments = line.findall(f"{{{_NAMESPACE}}}arg")
        for argument, value in zip(arguments, masked([one.get("value", "") for one in arguments]), strict=True):
            argument.set("value", value)
        for variable in line.findall(f"{{{_NAMESPACE}}}env"):
            if variable.get("value"):
                variable.set("value", MASK)
    for kernel in root.findall("os/cmdline"):
        kernel.text = masked(["-append", kernel.text or ""])[1]
    for entry in root.findall("sysinfo/oemStrings/entry"):
        entry.text = masked(["-append", entry.text or ""])[1]
    for entry in root.findall("sysinfo[@type='fwcfg']/entry"):
        # It may be a whole configuration with passwords.
        if (entry.text or "").strip():
            entry.text = MASK
    for graphics in root.findall("devices/graphics"):
        graphics.attrib.pop("passwd", None)
    return as_bytes(root)


def as_bytes(root: Element) -> bytes:
    """A description as it is stored."""
    return str(ElementTree.tostring(root, encoding="unicode")).encode() + b"\n"
