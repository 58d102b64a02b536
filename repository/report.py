"""What a backup did, in figures: the closing report of the command line.

The JSON form is the contract of docs/json.md, "Report of a backup".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from core.units import MIB, format_duration, format_size
from datastore.names import Snapshot


class Mode(Enum):
    """How an archive was read."""

    FULL = "full"
    INCREMENTAL = "incremental"  #: only what changed since the previous snapshot


@dataclass(slots=True)
class ArchiveReport:
    """One archive of a backup; sizes are bytes."""

    name: str  #: without type extension
    size: int  #: of the image or file
    mode: Mode = Mode.FULL
    reason: str | None = None  #: why everything was read, in words; None if incremental
    read: int = 0  #: read from the source
    dirty: int | None = None  #: changed by the dirty bitmap, None without one
    reused: int = 0  #: plain, referred to without storing it again
    new: int = 0  #: plain, newly stored
    stored: int = 0  #: encoded size of what is new
    chunks: int = 0
    chunks_new: int = 0

    def to_json(self) -> dict[str, Any]:
        """The archive's part of the report."""
        return {
            "name": self.name,
            "size": self.size,
            "mode": self.mode.value,
            "reason": self.reason,
            "read": self.read,
            "dirty": self.dirty,
            "reused": self.reused,
            "new": self.new,
            "stored": self.stored,
            "chunks": self.chunks,
            "chunks-new": self.chunks_new,
        }

    def __str__(self) -> str:
        if not self.chunks:
            return f"{self.name}: {format_size(self.size)}, stored {format_size(self.stored)}"
        how = self.mode.value if self.reason is None else f"{self.mode.value} ({self.reason})"
        return (
            f"{self.name}: {format_size(self.size)}, {how}, read {format_size(self.read)}, "
            f"new {format_size(self.new)} ({self.chunks_new} of {self.chunks} chunks), "
            f"stored {format_size(self.stored)}"
        )


class FileArchiveFigures(Protocol):
    """What the walk through a folder found."""

    def to_json(self) -> dict[str, Any]:
        """Its element of `file-archives`."""
        ...

    def lines(self) -> list[str]:
        """The same for people."""
        ...


@dataclass(slots=True)
class BackupReport:
    """One backup as a whole."""

    snapshot: Snapshot
    archives: Sequence[ArchiveReport]
    duration_s: float
    frozen_s: float = 0.0  #: from freeze sent to thaw answered, 0 without a guest agent
    warnings: Sequence[str] = field(default_factory=tuple)
    file_archives: Sequence[FileArchiveFigures] = ()  #: of the folders among the archives
    flavour: str | None = None  #: who made the frozen view of a running VM, None without one

    def to_json(self) -> dict[str, Any]:
        """The report as `--output json` prints it."""
        document: dict[str, Any] = {
            "snapshot": str(self.snapshot),
            "archives": [archive.to_json() for archive in self.archives],
            "frozen-s": round(self.frozen_s, 3),
            "duration-s": round(self.duration_s, 3),
            "warnings": list(self.warnings),
        }
        if self.flavour is not None:
            document["flavour"] = self.flavour
        if self.file_archives:
            document["file-archives"] = [archive.to_json() for archive in self.file_archives]
        return document

    def lines(self) -> list[str]:
        """The report for people, one line per archive and a closing one."""
        read = sum(archive.read for archive in self.archives)
        # Of a few small files a rate would only tell how long the rest took.
        rate = f", {format_size(read / self.duration_s)}/s" if read >= MIB and self.duration_s > 0 else ""
        lines = [line for archive in self.file_archives for line in archive.lines()]
        lines += [str(archive) for archive in self.archives]
        lines.append(f"{self.snapshot}: read {format_size(read)} in {format_duration(self.duration_s)}{rate}")
        if self.frozen_s:
            lines.append(f"guest file systems were frozen for {format_duration(self.frozen_s)}")
        return lines
