"""Prune: which snapshots of a group stay, by PBS's rules, and the removal of the others.

Rules: docs/upkeep.md, "Prune". `decide` is pure, so that it can be compared with decisions of a real PBS; `prune_group`
applies it to a datastore.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Final, Protocol

from core.errors import FleeceError, UsageError
from core.limits import in_io_thread
from core.progress import Progress
from datastore.errors import SnapshotNotFoundError
from datastore.names import Group, Snapshot
from datastore.store import Datastore, SnapshotEntry


class Mark(Enum):
    """What shall become of a snapshot."""

    KEEP = "keep"
    KEEP_PARTIAL = "keep-partial"  #: unfinished, but the newest: it may be a running backup
    PROTECTED = "protected"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class KeepOptions:
    """How many snapshots stay, by kind of period; None says nothing of that kind, and none at all keeps everything.

    Raises:
        UsageError: a number below 1. 0 could mean "none of these" or "no such rule", so PBS refuses it too.
    """

    last: int | None = None
    hourly: int | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    yearly: int | None = None

    def __post_init__(self) -> None:
        for name, count in self.given():
            if count < 1:
                raise UsageError(
                    "prune", "", f"keep-{name} is {count}; it must be at least 1", "leave the option out instead"
                )

    def given(self) -> Iterator[tuple[str, int]]:
        """The kinds that say something, in the order in which they count, with their number."""
        for kind in fields(self):
            count = getattr(self, kind.name)
            if count is not None:
                yield kind.name, count

    @property
    def keeps_everything(self) -> bool:
        """True if no option is given."""
        return not any(True for _ in self.given())


class Candidate(Protocol):
    """What the decision needs to know of a snapshot."""

    @property
    def snapshot(self) -> Snapshot:
        """Which one."""
        ...

    @property
    def finished(self) -> bool:
        """Has a manifest."""
        ...

    @property
    def protected(self) -> bool:
        """Must not be removed."""
        ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What prune thinks of one snapshot."""

    snapshot: Snapshot
    mark: Mark
    protected: bool
    reason: str  #: for people: `daily 2 of 7`, `the same day as 2026-01-02T18:00:00Z`

    @property
    def keep(self) -> bool:
        """True if it stays."""
        return self.mark is not Mark.REMOVE


@dataclass(slots=True)
class PruneResult:
    """What became of one group."""

    group: Group
    decisions: list[Decision]  #: oldest first
    removed: set[Snapshot] = field(default_factory=set)
    failed: dict[Snapshot, str] = field(default_factory=dict)  #: should have gone, but stayed, and why


#: The period a time falls into, in the local time zone of the process, as PBS's server does it.
_PERIODS: Final[dict[str, str]] = {
    "hourly": "%Y/%m/%d/%H",
    "daily": "%Y/%m/%d",
    "weekly": "%G/%V",
    "monthly": "%Y/%m",
    "yearly": "%Y",
}
_PERIOD_NAMES: Final = {"hourly": "hour", "daily": "day", "weekly": "week", "monthly": "month", "yearly": "year"}


def _period(kind: str) -> Callable[[Snapshot], str]:
    if kind == "last":
        return lambda snapshot: snapshot.time
    pattern = _PERIODS[kind]
    return lambda snapshot: time.strftime(pattern, time.localtime(snapshot.ctime))


def decide(candidates: Sequence[Candidate], keep: KeepOptions) -> list[Decision]:
    """What shall become of `candidates`, all snapshots of one group in any order; the answer is oldest first.

    Days, weeks and so on are those of the process's time zone (`TZ`, else the system's).
    """
    newest_first = sorted(candidates, key=lambda one: (one.snapshot.ctime, one.snapshot.time), reverse=True)
    if keep.keeps_everything:
        return [
            Decision(one.snapshot, Mark.KEEP, one.protected, "no keep option is given")
            for one in reversed(newest_first)
        ]
    marks = _mark_unfinished(newest_first)
    for kind, count in keep.given():
        _mark_by(kind, count, newest_first, marks)
    decisions = []
    for one in reversed(newest_first):
        mark, reason = marks.get(one.snapshot, (Mark.REMOVE, "no keep option covers it"))
        if one.protected:
            mark, reason = Mark.PROTECTED, "protected"
        decisions.append(Decision(one.snapshot, mark, one.protected, reason))
    return decisions


_Marks = dict[Snapshot, tuple[Mark, str]]


def _mark_unfinished(newest_first: Sequence[Candidate]) -> _Marks:
    marks: _Marks = {}
    for position, one in enumerate(newest_first):
        if not one.finished and position == 0:
            marks[one.snapshot] = Mark.KEEP_PARTIAL, "unfinished, but the newest"
        elif not one.finished:
            marks[one.snapshot] = Mark.REMOVE, "unfinished"
    return marks


def _mark_by(kind: str, count: int, newest_first: Sequence[Candidate], marks: _Marks) -> None:
    """One pass; what an earlier pass marked stays as it is, even "remove"."""
    period = _period(kind)
    kept = [one for one in newest_first if marks.get(one.snapshot, (None, ""))[0] is Mark.KEEP]
    covered = {period(one.snapshot) for one in kept}
    included: dict[str, Snapshot] = {}
    for one in newest_first:
        snapshot = one.snapshot
        if snapshot in marks:
            continue
        if one.protected:  # takes no slot
            marks[snapshot] = Mark.PROTECTED, "protected"
            continue
        name = period(snapshot)
        if name in covered:
            continue  # a later kind may still want it
        if name in included:
            same = f"the same {_PERIOD_NAMES[kind]} as {included[name].time}" if kind != "last" else "the same time"
            marks[snapshot] = Mark.REMOVE, same
            continue
        if len(included) >= count:
            return
        included[name] = snapshot
        marks[snapshot] = Mark.KEEP, f"{kind} {len(included)} of {count}"


async def prune_group(
    store: Datastore, group: Group, keep: KeepOptions, *, dry_run: bool = False, progress: Progress | None = None
) -> PruneResult:
    """Remove the snapshots of `group` that `keep` does not cover, the oldest first.

    What cannot be removed (in use, protected meanwhile, no rights) stays with a warning. Cancelled or killed, every
    snapshot is there whole, or gone, or looks unfinished, and so goes with the next prune or backup.

    Raises:
        StoreError: the group cannot be listed, or the store may not be written.
    """
    progress = Progress() if progress is None else progress
    if not dry_run:
        store.check_writable()

    def look() -> list[SnapshotEntry]:
        found = []
        for one in store.snapshots(group, unfinished=True):
            with suppress(SnapshotNotFoundError):  # removed meanwhile
                found.append(store.entry(one))
        return found

    entries = await in_io_thread(look)
    result = PruneResult(group, decide(entries, keep))
    if dry_run:
        return result
    unfinished = {entry.snapshot for entry in entries if not entry.finished}
    for snapshot in [decision.snapshot for decision in result.decisions if not decision.keep]:
        try:
            # One that got its manifest since we looked is a backup, about which nothing was decided.
            await store.forget(snapshot, only_unfinished=snapshot in unfinished)
        except SnapshotNotFoundError:
            progress.log(f"{snapshot} was removed by somebody else")
        except FleeceError as error:
            result.failed[snapshot] = error.why
            progress.warn(f"{snapshot} stays: {error.why}")
        else:
            result.removed.add(snapshot)
            progress.log(f"removed {snapshot}")
    return result
