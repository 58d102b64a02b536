"""What is kept of each job beside its history: the last run, counters that only grow, the last backup of each guest.

The history holds 100 runs and is long to read; this is one small file, `jobs/NAME/summary.json`, brought up to date
when a run ends. A run that was killed is counted with the next one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from agent.job_store import JobStore, Run
from agent.monitoring.state import finite, read_document, write_document

#: States of a run that has ended.
STATES: Final = ("ok", "warnings", "failed", "interrupted", "killed")
GOOD: Final = ("ok", "warnings")
#: Figures of a run's result that are added up.
SUMMED: Final = (
    "size", "read", "new", "reused", "stored", "removed", "removed-chunks", "removed-bytes", "bytes-sent",
    "chunks-sent",
)  # fmt: skip
#: Guests of one job that are remembered.
_MAX_GUESTS: Final = 5000
_MAX_WARNINGS: Final = 20
_MAX_ENDPOINTS: Final = 64
#: Numbers beyond are damage: no file, and no sum of them, is that large.
_MAX_NUMBER: Final = 1 << 80


@dataclass(slots=True)
class Summary:
    """What is kept of one job."""

    through: str | None = None  #: the newest run that is counted
    through_start: float = 0.0  #: when it began, Unix seconds
    last: dict[str, Any] | None = None  #: that run, as `Run.to_json`, without guests
    last_success: float | None = None  #: end of the last run that was done, warnings or not
    last_failure: float | None = None
    runs: Counter[str] = field(default_factory=Counter)  #: by state
    totals: Counter[str] = field(default_factory=Counter)  #: of `SUMMED`
    seconds: float = 0.0  #: all runs together
    s3: dict[str, dict[str, Any]] = field(default_factory=dict)  #: by endpoint: requests, uploaded, downloaded
    guests: dict[str, dict[str, Any]] = field(default_factory=dict)  #: by repository, namespace and group

    def take(self, run: Run) -> None:
        """Count one run that has ended."""
        result = finite(run.result or {})
        self.through, self.through_start = run.id, run.start
        end = run.start if run.end is None else run.end
        last = run.to_json() | {"start": run.start, "end": run.end, "warnings": run.warnings[:_MAX_WARNINGS]}
        self.last = {**last, "result": {key: value for key, value in result.items() if key != "guests"} or None}
        self.last["warning-count"] = len(run.warnings)
        self.runs[run.state if run.state in STATES else "failed"] += 1
        if run.state in GOOD:
            self.last_success = end
        elif run.state != "interrupted":
            self.last_failure = end
        self.seconds += max(0.0, end - run.start)
        self.totals.update({name: number(result.get(name)) for name in SUMMED if number(result.get(name))})
        self._take_s3(result.get("s3"))
        guests = result.get("guests")
        for guest in guests if isinstance(guests, list) else ():
            if isinstance(guest, dict):
                self._take_guest(guest, end)

    def _take_s3(self, document: Any) -> None:
        if not isinstance(document, dict) or not isinstance(document.get("endpoint"), str):
            return
        one = self.s3.get(document["endpoint"])
        if one is None:
            if len(self.s3) >= _MAX_ENDPOINTS:
                return
            one = self.s3[document["endpoint"]] = {"requests": {}, "uploaded": 0, "downloaded": 0}
        requests = document.get("requests")
        for method, count in requests.items() if isinstance(requests, dict) else ():
            one["requests"][str(method)] = one["requests"].get(str(method), 0) + number(count)
        for name in ("uploaded", "downloaded"):
            one[name] += number(document.get(name))

    def _take_guest(self, guest: Mapping[str, Any], end: float) -> None:
        self._take_s3(guest.get("s3"))
        key = "|".join(str(guest.get(name) or "") for name in ("repository", "ns", "group"))
        if not guest.get("group"):
            key += f"|{guest.get('guest')}"
        before = self.guests.pop(key, {})
        kept = {
            name: guest.get(name)
            for name in ("guest", "repository", "ns", "group", "state", "attempts", "error")
        } | {"attempted": end}  # fmt: skip
        if guest.get("state") in GOOD:
            figures = ("snapshot", "duration-s", "size", "read", "new", "reused", "stored", "reasons")
            kept["backup"] = {name: guest.get(name) for name in figures} | {"time": end}
        elif before.get("backup"):
            kept["backup"] = before["backup"]
        self.guests[key] = kept
        while len(self.guests) > _MAX_GUESTS:  # the one that was heard of longest ago
            del self.guests[next(iter(self.guests))]

    def to_json(self) -> dict[str, Any]:
        """The file."""
        return {
            "schema": 1,
            "through": self.through,
            "through-start": self.through_start,
            "last": self.last,
            "last-success": self.last_success,
            "last-failure": self.last_failure,
            "runs": dict(self.runs),
            "totals": dict(self.totals),
            "seconds": self.seconds,
            "s3": self.s3,
            "guests": self.guests,
        }

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> "Summary":
        """Read the file; parts that are damaged count as missing."""
        found = cls()
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            found.last = _last(document["last"])
            found.through = str(document["through"]) if document["through"] is not None else None
            found.through_start = _time(document["through-start"]) or 0.0
            found.last_success, found.last_failure = _time(document["last-success"]), _time(document["last-failure"])
            found.seconds = float(number(document["seconds"]))
            found.runs.update({state: int(number(document["runs"].get(state))) for state in STATES})
            found.totals.update({name: number(document["totals"].get(name)) for name in SUMMED})
            for endpoint, one in list(document["s3"].items())[:_MAX_ENDPOINTS]:
                requests = {str(method): number(count) for method, count in one["requests"].items()}
                found.s3[str(endpoint)] = {
                    "requests": requests, "uploaded": number(one["uploaded"]), "downloaded": number(one["downloaded"]),
                }  # fmt: skip
            found.guests = {
                str(key): one for key, one in list(document["guests"].items())[:_MAX_GUESTS] if isinstance(one, dict)
            }
        return found


def _last(value: Any) -> dict[str, Any] | None:
    """What the file says of the last run, if everything in it is of its kind."""
    if not isinstance(value, dict):
        return None
    kinds = {"state": str, "run": str, "warnings": list, "start": int | float, "warning-count": int}
    maybe = {"result": dict, "error": dict, "end": int | float, "duration-s": int | float}
    good = all(isinstance(value.get(name), kind) for name, kind in kinds.items())
    good &= all(value.get(name) is None or isinstance(value[name], kind) for name, kind in maybe.items())
    return value if good else None


def number(value: Any) -> Any:
    """`value` if it is a number that can be one of ours, else 0."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MAX_NUMBER
    return value if good else 0


def _time(value: Any) -> float | None:
    return float(value) if value is not None and number(value) == value and value < 1e11 else None


def summary_path(store: JobStore) -> Path:
    """Where the summary of a job lies."""
    return store.folder / "summary.json"


def load_summary(store: JobStore) -> Summary | None:
    """What was kept of the job; None if nothing was, or it is damaged."""
    document = read_document(summary_path(store))
    return None if document is None else Summary.parse(document)


def uncounted(summary: Summary | None, runs: Iterable[Run]) -> list[Run]:
    """Those of `runs` (oldest first) that have ended and are not counted yet."""
    ended = [run for run in runs if run.state != "running"]
    if summary is None or summary.through is None:
        return ended
    ids = [run.id for run in ended]
    if summary.through in ids:
        return ended[ids.index(summary.through) + 1 :]
    return [run for run in ended if run.start > summary.through_start]


def save_summary(store: JobStore, summary: Summary) -> None:
    """Write what is kept.

    Raises:
        FleeceError: it cannot be written.
    """
    write_document(summary_path(store), summary.to_json())
