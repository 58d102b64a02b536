"""What `fleece datastore status` shows: space, contents, deduplication, verification, garbage collection, growth."""

import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from agent.documents import table, verify_word
from core.errors import FormatError
from core.units import format_size
from datastore.errors import SnapshotNotFoundError
from datastore.names import BackupType, Namespace
from datastore.upid import Upid
from datastore.usage_history import UsageSample
from repository.interface import Repository, SnapshotInfo, StoreUsage

T = TypeVar("T")
_FORBIDDEN: Final = 403
_DAY_S: Final = 86_400
#: Days over which growth is summed up; the estimate rests on the longest one where there is no history.
_GROWTH_DAYS: Final = (1, 7, 30)
#: Days of history that count: some eight weekly garbage collections.
_HISTORY_DAYS: Final = 60
#: Garbage collections, days between the first and the last, and since the last, that make a history. One that is older
#: says nothing of today: since then nothing was removed.
_MIN_SAMPLES: Final = 4
_MIN_HISTORY_DAYS: Final = 7
_MAX_AGE_DAYS: Final = 14


@dataclass(slots=True)
class StoreStatus:
    """The facts, as they were at `now`."""

    name: str
    usage: StoreUsage
    gc: dict[str, Any] | None
    now: float
    namespaces: int = 0  #: without the root
    groups: Counter[BackupType] = field(default_factory=Counter)
    snapshots: Counter[BackupType] = field(default_factory=Counter)  #: finished ones
    unfinished: int = 0
    protected: int = 0
    verify: Counter[str] = field(default_factory=Counter)  #: `ok`, `failed`, `none`
    growth: Counter[int] = field(default_factory=Counter)  #: days -> bytes of new chunks stored in that time
    oldest: int | None = None  #: backup time of the oldest snapshot
    history: Sequence[UsageSample] = ()  #: oldest first

    @property
    def dedup_factor(self) -> float | None:
        """How often the data would be stored without deduplication and compression, as of the last GC."""
        counts = [None if self.gc is None else self.gc.get(name) for name in ("index-data-bytes", "disk-bytes")]
        data, disk = counts
        if not isinstance(data, int) or not isinstance(disk, int) or data < 0 or disk < 0:
            return None
        return data / disk if disk else 1.0

    @property
    def last_gc(self) -> int | None:
        """When the last garbage collection began, Unix seconds."""
        try:
            return Upid.parse(str((self.gc or {}).get("upid"))).start
        except FormatError:
            return None

    @property
    def recent(self) -> Sequence[UsageSample]:
        """The history that counts; empty if it is too short, or too old."""
        day = self.now / _DAY_S
        recent = [one for one in self.history if day - _HISTORY_DAYS <= one.time / _DAY_S <= day]
        if len(recent) < _MIN_SAMPLES or recent[-1].time - recent[0].time < _MIN_HISTORY_DAYS * _DAY_S:
            return ()
        return recent if day - recent[-1].time / _DAY_S <= _MAX_AGE_DAYS else ()

    @property
    def net_growth(self) -> float | None:
        """Bytes a day by which the used space grows, removals counted; None without enough history."""
        recent = self.recent
        # Theil and Sen: the median of the slopes between any two. Some odd samples (a large backup that was removed
        # again, files of somebody else) do not change it, where two end points or least squares would follow them.
        slopes = sorted(
            (two.used - one.used) / (two.time - one.time)
            for position, two in enumerate(recent)
            for one in recent[:position]
            if two.time > one.time
        )
        if not slopes:
            return None
        middle = len(slopes) // 2
        return _DAY_S * (slopes[middle] + slopes[-middle - 1]) / 2

    @property
    def basis(self) -> str | None:
        """What `full_date` rests on: `history`, `manifests` (what backups stored, all of it kept), None: nothing."""
        if not self.usage.total:
            return None
        if self.net_growth is not None:
            return "history"
        return None if self._full_without_removals() is None else "manifests"

    @property
    def full_date(self) -> int | None:
        """When the space will be used up; None if that is unknown, or never.

        At the net growth between garbage collections; without enough of these at the growth of the last 30 days, as if
        nothing were removed.
        """
        growth = self.net_growth
        if not self.usage.total:
            return None  # a bucket has no size
        if growth is None:
            return self._full_without_removals()
        return int(self.now + self.usage.available / growth * _DAY_S) if growth > 0 else None

    def _full_without_removals(self) -> int | None:
        longest = _GROWTH_DAYS[-1]
        if self.oldest is None or not self.growth[longest]:
            return None
        days = min(float(longest), (self.now - self.oldest) / _DAY_S)
        if days < 1:
            return None
        return int(self.now + self.usage.available / (self.growth[longest] / days) * _DAY_S)


async def look(
    repository: Repository,
    seen: Callable[[Namespace, Sequence[SnapshotInfo]], None] | None = None,
    *,
    lenient: bool = False,
) -> StoreStatus:
    """Collect the facts; reads every manifest.

    Args:
        repository: to look at.
        seen: told the snapshots of each namespace, unfinished ones too.
        lenient: what a server's user or token may not see is unknown: space 0, no garbage collection.

    Raises:
        FleeceError: the repository cannot be read.
    """
    usage = await _allowed(repository.usage, lenient=lenient) or StoreUsage(0, 0, 0)
    status = StoreStatus(repository.name, usage, await _allowed(repository.gc_status, lenient=lenient), time.time())
    status.history = await repository.usage_history()
    for ns in await repository.namespaces():
        status.namespaces += bool(ns.components)
        try:
            groups, infos = await repository.groups(ns), await repository.snapshots(ns, unfinished=True)
        except SnapshotNotFoundError:
            continue  # removed meanwhile
        status.groups.update(info.group.type for info in groups)
        if seen is not None:
            seen(ns, infos)
        for info in infos:
            status.protected += info.protected
            if not info.finished:
                status.unfinished += 1
                continue
            ctime = info.snapshot.ctime
            status.snapshots[info.snapshot.group.type] += 1
            status.verify[verify_word(info) or "none"] += 1
            status.oldest = ctime if status.oldest is None else min(status.oldest, ctime)
            for days in _GROWTH_DAYS:
                if 0 <= status.now - ctime < days * _DAY_S:
                    status.growth[days] += info.added or 0
    return status


async def _allowed(ask: Callable[[], Awaitable[T]], *, lenient: bool) -> T | None:
    from repository.remote.errors import RemoteRefusedError

    try:
        return await ask()
    except RemoteRefusedError as error:
        if not lenient or error.status != _FORBIDDEN:
            raise
        return None


def status_document(status: StoreStatus) -> dict[str, Any]:
    """The document; keys of PBS's datastore status where it has them."""
    factor = status.dedup_factor
    return {
        "store": status.name,
        "total": status.usage.total,
        "used": status.usage.used,
        "avail": status.usage.available,
        "counts": {
            kind.value: {"groups": status.groups[kind], "snapshots": status.snapshots[kind]} for kind in BackupType
        },
        "namespaces": status.namespaces,
        "unfinished": status.unfinished,
        "protected": status.protected,
        "verification": {state: status.verify[state] for state in ("ok", "failed", "none")},
        "gc-status": status.gc,
        "last-gc": status.last_gc,
        "deduplication-factor": None if factor is None else round(factor, 3),
        "growth": {f"{days}-days": status.growth[days] for days in _GROWTH_DAYS},
        "net-growth-per-day": None if status.net_growth is None else round(status.net_growth),
        "estimated-full-date": status.full_date,
        "estimate-basis": status.basis,
    }


def status_lines(status: StoreStatus, more: Sequence[tuple[str, str]] = ()) -> Iterator[str]:
    """The same for people, with `more` lines of name and text at the end; those without text are left out."""
    kinds = [
        f"{status.snapshots[kind]} of {status.groups[kind]} {kind.value} groups"
        for kind in BackupType
        if status.groups[kind]
    ]
    rows = [
        ("datastore", status.name),
        ("space", _space(status)),
        ("snapshots", ", ".join(kinds) or "none"),
        ("namespaces", str(status.namespaces or "")),
        ("unfinished", str(status.unfinished or "")),
        ("protected", str(status.protected or "")),
        ("verified", ", ".join(f"{status.verify[state]} {word}" for state, word in
                               (("failed", "failed"), ("ok", "ok"), ("none", "never")) if status.verify[state])),
        ("deduplication", _gc_words(status)),
        ("last gc", _last_gc(status)),
        ("growth", ", ".join(f"{format_size(status.growth[days])} in {days} days"
                             for days in _GROWTH_DAYS[1:] if status.growth[days])),
        ("net growth", _net_growth(status)),
        ("full", _full(status)),
        *more,
    ]  # fmt: skip
    yield from list(table(("", ""), [row for row in rows if row[1]]))[1:]


def _space(status: StoreStatus) -> str:
    usage = status.usage
    if not usage.total:
        known = f"{format_size(usage.used)} in the bucket, as of the last garbage collection"
        return known if status.gc is not None else "unknown before the first garbage collection ('fleece gc')"
    percent = f" ({100 * usage.used // usage.total} %)"
    sizes = f"{format_size(usage.used)} of {format_size(usage.total)} used{percent}"
    return f"{sizes}, {format_size(usage.available)} available"


def _gc_words(status: StoreStatus) -> str:
    if status.dedup_factor is None or status.gc is None:
        return "unknown before the first garbage collection ('fleece gc')"
    disk, data = (format_size(int(status.gc[name])) for name in ("disk-bytes", "index-data-bytes"))
    return f"factor {status.dedup_factor:.2f}: {data} of data in {disk} of chunks"


def _last_gc(status: StoreStatus) -> str:
    if status.gc is None:
        return "never"
    if status.last_gc is None:
        return "at an unknown time"
    removed, pending = (status.gc.get(name) for name in ("removed-bytes", "pending-bytes"))
    text = f"{_date(status.last_gc)} UTC"
    if isinstance(removed, int) and isinstance(pending, int):
        text += f", removed {format_size(removed)}, {format_size(pending)} pending"
    return text


def _net_growth(status: StoreStatus) -> str:
    growth, recent = status.net_growth, status.recent
    if growth is None:
        return ""
    days = (recent[-1].time - recent[0].time) / _DAY_S
    sign = "-" if growth <= -0.5 else ""
    return f"{sign}{format_size(abs(growth))} a day over {days:.0f} days, between {len(recent)} garbage collections"


def _full(status: StoreStatus) -> str:
    if status.basis is None:
        return ""
    days = math.inf if status.full_date is None else (status.full_date - status.now) / _DAY_S
    text = f"in about {days:.0f} days" if days < 3650 else "not within ten years"
    if status.basis == "history":
        return text
    return f"{text}, if nothing is removed (what is removed counts after a week with garbage collections)"


def _date(ctime: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(ctime))
