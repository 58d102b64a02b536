"""Push and pull: snapshots of one repository brought into another one.

engine.py     `sync`: namespaces and groups, several at a time, and what became of them
plan.py       which namespaces, groups and snapshots are meant
transfer.py   one new snapshot: chunks and blobs as they are stored, the manifest last
again.py      a snapshot that is on both sides: late logs, changed manifests, damaged data (pull)
removal.py    what vanished at the source, and the guards before it goes at the target
options.py    what a caller wants, and which rights it has
report.py     what was done
interface.py  what some repositories and sessions offer besides

Facts: docs/sync.md.
"""

from repository.sync.engine import sync
from repository.sync.options import AllRights, Direction, SyncOptions, SyncRights
from repository.sync.report import Outcome, SnapshotReport, SyncReport

__all__ = [
    "AllRights",
    "Direction",
    "Outcome",
    "SnapshotReport",
    "SyncOptions",
    "SyncReport",
    "SyncRights",
    "sync",
]
