"""What a disk is to the rooms that share disks without knowing each other.

`hypervisor/` implements these protocols, `repository/` moves data between them and a backup session.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol, runtime_checkable

from core.buffers import Buffer, WritableBuffer


class ExtentState(Enum):
    """What is known of a range without reading it."""

    CLEAN = "clean"  #: unchanged since the base backup; only a source with `base` says so
    ZERO = "zero"  #: reads as zeros, need not be read
    DATA = "data"  #: must be read


class Extent(NamedTuple):
    """A range of a disk in one state; offset and length are bytes."""

    offset: int
    length: int
    state: ExtentState


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Whether a source can say what changed, and since when.

    `base` is the backup time (Unix seconds) of the snapshot from which its CLEAN extents count, None for a full
    read; `reason` says in words why a full read is needed ("no dirty bitmap", "size changed", ...), empty when
    incremental.
    """

    base: int | None
    reason: str


@runtime_checkable
class DiskSource(Protocol):
    """A disk to be read as of one instant."""

    @property
    def name(self) -> str:
        """The archive's name without its type extension, for example `drive-scsi0.img`."""
        ...

    @property
    def size(self) -> int:
        """Bytes, at least 1; does not change while the source is open."""
        ...

    @property
    def plan(self) -> ReadPlan:
        """What `extents` will be based on."""
        ...

    async def extents(self, *, incremental: bool = True) -> Sequence[Extent]:
        """The whole disk as extents: sorted, without gaps or overlaps, equal neighbours merged.

        Called once, before the first `read_into`. With `incremental` False (the caller cannot use the base after
        all) nothing is CLEAN.

        Raises:
            SourceError: the map cannot be read.
        """
        ...

    async def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill `buffer` with the bytes from `offset` on; the range lies inside the disk; many in flight.

        Raises:
            SourceError: unreadable, or (for a live VM) the frozen view is broken.
        """
        ...

    async def discard(self, offset: int, length: int) -> None:
        """The range was stored and will not be read again: a live source gives the fleecing space back.

        `length` is a multiple of 4 MiB except at the end of the disk. A no-op for other sources.
        """
        ...


@runtime_checkable
class DiskTarget(Protocol):
    """A disk to be written."""

    @property
    def size(self) -> int:
        """Bytes that can be written, at least those of the image."""
        ...

    @property
    def reads_zero(self) -> bool:
        """True if everything not written reads as zeros (a file this run has made); else zeros must be written."""
        ...

    async def write(self, offset: int, data: Buffer) -> None:
        """Write `data` at `offset`; several calls for different ranges may be in flight.

        Raises:
            TargetError: no space, an I/O error, a vanished server.
        """
        ...

    async def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, without allocating space where the target can.

        Raises:
            TargetError: as `write`.
        """
        ...

    async def flush(self) -> None:
        """Make everything written durable.

        Raises:
            TargetError: as `write`.
        """
        ...
