"""Which virtual machines a job means: by name, id, tag, socket or domain, or patterns of these, without some."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from core.errors import UsageError

if TYPE_CHECKING:
    from agent.config import Config, VmSection
    from agent.vm_settings import VmOptions

Kind = Literal["name", "id", "tag", "socket", "libvirt"]
_KINDS: Final[tuple[Kind, ...]] = ("name", "id", "tag", "socket", "libvirt")
_WILDCARDS: Final = frozenset("*?[")
#: Endings of sockets that are no part of a virtual machine's name.
_SOCKET_ENDINGS: Final = (".qmp", ".sock", ".socket", ".monitor")


@dataclass(frozen=True, slots=True)
class Selector:
    """One entry of `vm` or `exclude-vm`."""

    kind: Kind
    pattern: str

    @classmethod
    def parse(cls, text: str) -> "Selector":
        """Read `NAME`, `name:PATTERN`, `id:PATTERN`, `tag:PATTERN`, `libvirt:PATTERN` or `socket:/PATH`.

        Raises:
            UsageError: nothing behind the colon, or a socket whose path is not absolute.
        """
        kind, colon, pattern = text.partition(":")
        found = cls(kind, pattern) if colon and kind in _KINDS else cls("name", text)
        if not found.pattern:
            raise UsageError("choose virtual machines by", repr(text), "it says nothing")
        if found.kind == "socket" and not found.pattern.startswith("/"):
            raise UsageError("choose virtual machines by", repr(text), "the path of a socket begins with a /")
        return found

    @property
    def is_pattern(self) -> bool:
        """False if it means one certain virtual machine, which must be there then."""
        return self.kind == "tag" or not _WILDCARDS.isdisjoint(self.pattern)

    def __str__(self) -> str:
        return self.pattern if self.kind == "name" else f"{self.kind}:{self.pattern}"

    def matches(
        self, name: str | None, id: str, tags: Sequence[str], qmp: Path | None, domain: str | None = None
    ) -> bool:
        """Whether it means the virtual machine."""
        if self.kind == "name":
            return name is not None and fnmatchcase(name, self.pattern)
        if self.kind == "id":
            return fnmatchcase(id, self.pattern)
        if self.kind == "tag":
            return any(fnmatchcase(tag, self.pattern) for tag in tags)
        if self.kind == "libvirt":
            return domain is not None and fnmatchcase(domain, self.pattern)
        return qmp is not None and fnmatchcase(str(qmp), self.pattern)


@dataclass(frozen=True, slots=True)
class ChosenVm:
    """A virtual machine that a job backs up."""

    label: str
    options: "VmOptions"
    certain: bool  #: it was named, not only matched


@dataclass(frozen=True, slots=True)
class Choice:
    """What the selectors of a job mean."""

    vms: list[ChosenVm]
    missing: list[str]  #: selectors of a certain one that is not there
    idle: list[str]  #: patterns that match nothing


def choose_vms(config: "Config", wanted: Sequence[str], excluded: Sequence[str]) -> Choice:
    """The virtual machines that are meant, those of the configuration first, in its order, then sockets by their path
    and domains by their names.

    Looks into folders for `socket:` selectors, and asks libvirt for `libvirt:` ones; call it in a thread where that may
    be slow.

    Raises:
        LibvirtError: libvirt cannot be asked.
    """
    from agent.vm_settings import VmOptions

    selectors = [Selector.parse(text) for text in wanted]
    without = [Selector.parse(text) for text in excluded]
    sockets = {selector: _sockets(selector) for selector in selectors if selector.kind == "socket"}
    used: set[Selector] = set()
    found: list[ChosenVm] = []

    def consider(
        name: str | None, section: "VmSection | None", id: str, qmp: Path | None, domain: str | None = None
    ) -> None:
        tags = section.tags if section is not None else ()
        by = [
            selector
            for selector in selectors
            if (qmp in sockets[selector] if selector in sockets else selector.matches(name, id, tags, qmp, domain))
        ]
        used.update(by)
        if by and not any(selector.matches(name, id, tags, qmp, domain) for selector in without):
            if name is not None:
                options = VmOptions(name=name)
            else:
                options = VmOptions(qmp=qmp, id=id) if domain is None else VmOptions(libvirt=domain)
            found.append(ChosenVm(name or id, options, any(not selector.is_pattern for selector in by)))

    for name, section in config.vm.items():
        consider(name, section, section.id or name, section.qmp, section.libvirt)
    configured = {section.qmp for section in config.vm.values()}
    for path in sorted({path for paths in sockets.values() for path in paths} - configured):
        consider(None, None, _id_of(path), path)
    if any(selector.kind == "libvirt" for selector in selectors):
        for domain in _domains(config):
            consider(None, None, domain, None, domain)
    unused = [selector for selector in dict.fromkeys(selectors) if selector not in used]
    return Choice(
        found,
        [str(selector) for selector in unused if not selector.is_pattern],
        [str(selector) for selector in unused if selector.is_pattern],
    )


def _domains(config: "Config") -> list[str]:
    """Names of the domains of the usual libvirt that have no section."""
    from hypervisor.domain_address import default_uri
    from hypervisor.libvirt_host import domain_names

    uri = default_uri()
    configured = {section.libvirt for section in config.vm.values() if section.connect in (None, uri)}
    return [name for name in domain_names(uri) if name not in configured]


def _sockets(selector: Selector) -> set[Path]:
    if not selector.is_pattern:
        return {Path(selector.pattern)}
    return {Path(text) for text in glob.glob(selector.pattern) if _is_socket(text)}  # noqa: PTH207 - absolute patterns


def _is_socket(text: str) -> bool:
    import stat

    try:
        return stat.S_ISSOCK(os.stat(text).st_mode)  # noqa: PTH116
    except OSError:
        return False


def _id_of(path: Path) -> str:
    """`web` of `/run/qemu/web.qmp`."""
    name = path.name
    for ending in _SOCKET_ENDINGS:
        if name.endswith(ending) and name != ending:
            return name.removesuffix(ending)
    return name
