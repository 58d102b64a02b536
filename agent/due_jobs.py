"""Which jobs are due: what the agent knows of each schedule, kept over restarts and reboots.

In `agent/schedule.json` of the state folder each job has the schedule that counts and the time from which on it is
reckoned, so that a time that was missed is found, and a schedule that was changed does not make up for the past.
"""

import json
import math
import os
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent.calendar_times import CalendarTimes
from core.errors import FleeceError, os_reason

if TYPE_CHECKING:
    from agent.job_sections import RunnableJob

#: Seconds by which the clock may be set back without a time of a schedule that is done coming again.
_SET_BACK_S: Final = 3600.0
#: Seconds after which a time counts as missed; the agent looks more often, unless the host slept.
_MISSED_S: Final = 300.0
#: Bytes of the file.
_MAX_SIZE: Final = 4 << 20


@dataclass(slots=True)
class Known:
    """One job."""

    schedule: str
    since: float  #: Unix seconds: everything due up to then is done
    begun: bool = False  #: the agent began a run and has not seen its end
    due: float | None = None  #: Unix seconds
    catch_up: bool = True  #: a time that was missed is made up for


class DueJobs:
    """All jobs with a schedule."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self._path = folder / "schedule.json"
        self._now = now
        self._jobs = _read(self._path)

    def take(
        self,
        jobs: "Mapping[str, RunnableJob]",
        last_start: Callable[[str], float | None],
        running: Container[str] = (),
    ) -> None:
        """These are the jobs of the configuration from now on.

        Args:
            jobs: by name; those without schedule are not heeded.
            last_start: when a job was run last, by whomever (Unix seconds).
            running: names of those that run now.

        Raises:
            FleeceError: the file cannot be written.
        """
        now, taken = self._now(), {}
        for name, section in jobs.items():
            if section.schedule is None:
                continue
            known = self._jobs.get(name)
            if known is None or known.schedule != section.schedule or known.since > now + _SET_BACK_S:
                known = Known(section.schedule, now, begun=known.begun if known is not None else False)
            taken[name] = known
            times = CalendarTimes.parse(section.schedule)
            begin = max(known.since, min(last_start(name) or 0.0, now))
            known.due = times.after(begin)
            known.catch_up = getattr(section, "catch_up", True)
            if known.begun and known.catch_up and name not in running:  # it was cut off
                known.due = now
            elif known.due is not None and known.due < now - _MISSED_S and not known.catch_up:
                known.due = times.after(now)
        self._jobs = taken
        self._write()

    def due(self) -> list[str]:
        """Names of the jobs whose time has come, the one that waits longest first.

        The clock may have been set, or the host have slept, since this was asked last.
        """
        now = self._now()
        for known in self._jobs.values():
            if known.since > now + _SET_BACK_S:
                # It was ahead when the job was begun: the next time by that clock may be years away.
                known.since = now
                known.due = CalendarTimes.parse(known.schedule).after(now)
            elif known.due is not None and known.due < now - _MISSED_S and not known.catch_up:
                known.due = CalendarTimes.parse(known.schedule).after(now)
        found = [(known.due, name) for name, known in self._jobs.items() if known.due is not None and known.due <= now]
        return [name for _, name in sorted(found)]

    def next(self) -> tuple[float, str] | None:
        """When the next job is due (Unix seconds), and which."""
        found = [(known.due, name) for name, known in self._jobs.items() if known.due is not None]
        return min(found, default=None)

    def begin(self, name: str, *, begun: bool = True) -> None:
        """The time of the job has been taken; with `begun` it runs, and `end` will be called.

        Raises:
            FleeceError: as `take`.
        """
        known = self._jobs[name]
        known.since, known.begun = self._now(), known.begun or begun
        known.due = CalendarTimes.parse(known.schedule).after(known.since)
        self._write()

    def end(self, name: str) -> None:
        """The run of the job is over.

        Raises:
            FleeceError: as `take`.
        """
        if (known := self._jobs.get(name)) is not None:
            known.begun = False
            self._write()

    def _write(self) -> None:
        data = {name: asdict(known) for name, known in self._jobs.items()}
        new = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with new.open("w") as file:
                json.dump(data, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError as error:
            raise FleeceError("write the agent's state", str(self._path), os_reason(error)) from error


def _read(path: Path) -> dict[str, Known]:
    """What is known; a file that is damaged counts as none: then every job counts from now."""
    try:
        with path.open("rb") as file:
            data: Any = json.loads(file.read(_MAX_SIZE))
        return {
            str(name): Known(str(one["schedule"]), _moment(one["since"]), bool(one["begun"]))
            for name, one in data.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def _moment(value: Any) -> float:
    """Unix seconds; JSON as Python reads it has NaN, too."""
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError("no time")
    return seconds
