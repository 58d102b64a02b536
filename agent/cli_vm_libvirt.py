"""`fleece vm restore --libvirt`: its options, and what they mean."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from core.errors import UsageError

if TYPE_CHECKING:
    from agent.libvirt_restore import LibvirtDefiner

LibvirtFlag = Annotated[bool, typer.Option("--libvirt", help="Define the machine in libvirt again, as a domain.")]
ConnectOption = Annotated[
    str | None,
    typer.Option("--connect", metavar="URI", help="Which libvirt: qemu:///system (for root), qemu:///session."),
]
StartFlag = Annotated[bool, typer.Option("--start", help="With --libvirt: start the domain.")]
NewIdentityFlag = Annotated[
    bool, typer.Option("--new-identity", help="With --libvirt: another UUID and other MAC addresses in any case.")
]
TrustFlag = Annotated[
    bool,
    typer.Option("--trust", help="With --libvirt: keep also what of the definition reaches into this host."),
]


@dataclass(frozen=True, slots=True)
class LibvirtOptions:
    """What the command line says of libvirt."""

    libvirt: bool
    connect: str | None
    start: bool
    new_identity: bool
    trust: bool

    def definer(self, name: str | None, *, force: bool) -> "LibvirtDefiner | None":
        """What defines the domain called `name` (None: as it was); None without `--libvirt`.

        Raises:
            UsageError: options that are of no use without it.
        """
        if not self.libvirt:
            if self.connect is not None or self.start or self.new_identity or self.trust:
                raise UsageError("use", "--connect, --start, --new-identity and --trust", "they are for --libvirt")
            return None
        from agent.libvirt_restore import LibvirtDefiner
        from hypervisor.domain_address import default_uri

        if name is not None and ("/" in name or not name.isprintable() or not name):
            raise UsageError("use the name", repr(name[:60]), "that is no name of a domain")
        return LibvirtDefiner(
            uri=self.connect or default_uri(),
            name=name,
            new_identity=self.new_identity,
            trusted=self.trust,
            start=self.start,
            force=force,
        )
