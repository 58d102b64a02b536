"""What a sync did. The JSON form is the contract of docs/json.md, "Report of a sync"."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from core.units import format_duration, format_size
from datastore.names import Group, Namespace, Snapshot


class Outcome(Enum):
    """What became of a snapshot that was looked at."""

    NEW = "new"  #: it is at the target now
    UPDATED = "updated"  #: its manifest changed
    RESYNCED = "resynced"  #: its data were fetched again
    LOG = "log"  #: its client's log came along late


def ns_text(ns: Namespace) -> str:
    """A namespace in a sentence."""
    return f"namespace '{ns}'" if ns.components else "root namespace"


def group_text(group: Group) -> str:
    """A group with its namespace, as people write it."""
    return f"{group.ns}: {group}" if group.ns.components else str(group)


def snapshot_text(snapshot: Snapshot) -> str:
    """A snapshot with its namespace, as people write it."""
    return f"{snapshot.group.ns}: {snapshot}" if snapshot.group.ns.components else str(snapshot)


@dataclass(slots=True)
class SnapshotReport:
    """One snapshot that changed at the target."""

    snapshot: Snapshot  #: as it is called at the target
    outcome: Outcome = Outcome.NEW
    chunks: int = 0  #: entries of its indexes
    size: int = 0  #: bytes of images and streams plain, of blobs encoded
    chunks_sent: int = 0
    sent: int = 0  #: encoded bytes of chunks and blobs that went over
    duration_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Its part of the report."""
        return {
            "snapshot": str(self.snapshot),
            "ns": str(self.snapshot.group.ns),
            "outcome": self.outcome.value,
            "chunks": self.chunks,
            "bytes": self.size,
            "chunks-sent": self.chunks_sent,
            "bytes-sent": self.sent,
            "duration-s": round(self.duration_s, 3),
        }


@dataclass(slots=True)
class SyncReport:
    """A whole sync. Names are those of the target."""

    source: str
    target: str
    namespaces: int = 0  #: that were gone through
    groups: int = 0  #: that were synced without an error
    skipped: int = 0  #: snapshots that were left out
    snapshots: list[SnapshotReport] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  #: what went wrong, by group or namespace
    created: list[Namespace] = field(default_factory=list)
    removed_namespaces: list[Namespace] = field(default_factory=list)
    removed_groups: list[Group] = field(default_factory=list)
    removed_snapshots: int = 0  #: those of removed groups included
    protected: list[Snapshot] = field(default_factory=list)  #: vanished, but kept for that reason
    duration_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The report as `--output json` prints it."""
        return {
            "source": self.source,
            "target": self.target,
            "namespaces": self.namespaces,
            "groups": self.groups,
            "skipped": self.skipped,
            "snapshots": [one.to_json() for one in self.snapshots],
            "failed": [{"what": what, "why": why} for what, why in self.failed.items()],
            "created-namespaces": [str(ns) for ns in self.created],
            "removed": {
                "namespaces": [str(ns) for ns in self.removed_namespaces],
                "groups": [{"ns": str(group.ns), "group": str(group)} for group in self.removed_groups],
                "snapshots": self.removed_snapshots,
            },
            "protected": [{"ns": str(one.group.ns), "snapshot": str(one)} for one in self.protected],
            "duration-s": round(self.duration_s, 3),
        }

    def lines(self, *, removal: bool) -> list[str]:
        """The closing lines for people; `removal`: what vanished was to be removed."""
        new = [one for one in self.snapshots if one.outcome is Outcome.NEW]
        others = len(self.snapshots) - len(new)
        sent, size = sum(one.sent for one in self.snapshots), sum(one.size for one in self.snapshots)
        took = format_duration(self.duration_s)
        if not self.snapshots:
            lines = [f"no new data ({self.groups} groups, {self.namespaces} namespaces, {took})"]
        else:
            also = f", {others} brought up to date" if others else ""
            lines = [
                f"{len(new)} new snapshots{also}: {format_size(size)}, of which {format_size(sent)} were transferred"
                f" ({self.groups} groups, {self.namespaces} namespaces, {took})"
            ]
        if removal:
            lines.append(
                f"removed as vanished: {self.removed_snapshots} snapshots, {len(self.removed_groups)} groups, "
                f"{len(self.removed_namespaces)} namespaces; {len(self.protected)} protected snapshots kept"
            )
        return lines
