"""The flavours of QEMU: who makes and ends a frozen view, and with which commands.

    STOCK      any QEMU: nodes, filters and bitmaps of Fleece's own (`stock.py`)
    PROXMOX    the QEMU of Proxmox VE, which does it itself (`proxmox.py`)
    PROVIDED   somebody else has made the view and hands over its exports (`provided.py`)

The first two implement `Flavour`; the third needs no QMP. docs/hypervisor.md, "Flavours".
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hypervisor.bitmaps import Bitmap, BitmapMode, BitmapName, Choice, Finished
from hypervisor.block_graph import BlockNode
from hypervisor.discovery import SHAREABLE, Capabilities, Disk, Survey, survey
from hypervisor.pause import Pause
from hypervisor.qmp import Qmp
from hypervisor.scratch import Scratch
from hypervisor.state import Run

if TYPE_CHECKING:
    from hypervisor.fleecing import Fleecing


class FlavourName(Enum):
    """Who makes the frozen view."""

    STOCK = "stock"
    PROXMOX = "proxmox"
    PROVIDED = "provided"


@dataclass(frozen=True, slots=True)
class DiskSelection:
    """Which disks, and what their archives are called; as the arguments of `discovery.survey`."""

    names: Mapping[str, str] = field(default_factory=dict)
    include: Sequence[str] | None = None  #: None: all
    exclude: Sequence[str] = ()
    shared: frozenset[str] = frozenset()  #: devices of disks that others write to as well, past this QEMU

    async def survey(
        self, qmp: Qmp, *, instead: Mapping[str, str] | None = None, flash: bool = False, also: Sequence[Disk] = ()
    ) -> Survey:
        """Find the disks. Arguments and errors as those of `discovery.survey`."""
        found = await survey(
            qmp,
            names=self.names,
            include=self.include,
            exclude=self.exclude,
            instead=instead,
            flash=flash,
            also=also,
        )
        if not self.shared:
            return found
        disks = [replace(disk, written_past=SHAREABLE) if disk.device in self.shared else disk for disk in found.disks]
        return replace(found, disks=tuple(disks))


@dataclass(frozen=True, slots=True, kw_only=True)
class Standstill:
    """What of the guest stands still for the instant."""

    agent: Path | str | None = None  #: the guest agent's socket, by which file systems are frozen; None: they are not
    mount_points: Sequence[str] = ()  #: of the file systems that are frozen; empty: all
    pause: Pause = Pause.NEVER


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a backup wants of a view; as the arguments of `vm.frozen_view`."""

    qmp_path: str
    target: str
    new_id: int
    scratch: Scratch
    bitmap_mode: BitmapMode
    standstill: Standstill
    cbw_timeout_s: int
    at_instant: Callable[[Qmp], Awaitable[None]] | None
    on_step: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settled:
    """The bitmaps of a target as they are when what interrupted backups have left is brought into order."""

    bitmaps: Sequence[Bitmap]
    lost: Mapping[tuple[str, str], str]  #: why a disk has none, in words, by node and disk
    unsure: Mapping[str, str] = field(default_factory=dict)  #: nodes whose bitmaps do not tell all, and why


class Flavour(Protocol):
    """One way to make frozen views in a QEMU. Has no state; everything between two calls is in QEMU."""

    @property
    def name(self) -> FlavourName:
        """Which."""
        ...

    async def survey(self, qmp: Qmp, selection: DiskSelection, *, instead: Mapping[str, str] | None = None) -> Survey:
        """Find the disks. A disk's `node` is the one that has its bitmaps.

        Raises:
            DiskNameError, VmUnsupportedError: as `discovery.survey`.
            QmpError, QmpAnswerError: as `Qmp.execute`.
        """
        ...

    async def as_settled(self, nodes: Iterable[BlockNode], target: str, finished: Finished) -> Settled:
        """What `settle` would make of `nodes`; changes nothing.

        Raises:
            FleeceError: what `finished` raises.
        """
        ...

    async def settle(self, qmp: Qmp, target: str, finished: Finished) -> Settled:
        """Bring the bitmaps of `target` into order. If `finished` raises, none was touched.

        Raises:
            FleeceError: what `finished` raises.
            QmpError, QmpAnswerError: as `Qmp.execute`.
        """
        ...

    def bitmap_name(self, name: BitmapName) -> str:
        """What the bitmap that `as_settled` calls `name` is called in QEMU."""
        ...

    def fleecing(
        self,
        order: Order,
        chosen: Sequence[tuple[Disk, Choice]],
        *,
        able: Capabilities,
        run: Run,
        nodes: Iterable[BlockNode],
    ) -> "Fleecing":
        """What makes the view of the disks `chosen` and ends it; nothing is changed yet. `nodes` are QEMU's now.

        Raises:
            VmStateError, VmUnsupportedError: it can be told already that it will not work.
        """
        ...
