"""When a schedule in systemd's calendar form is due, reckoned here: the agent asks often, and with any time.

The form itself is checked by `agent.schedules`. Where a clock change leaves out a local time, nothing is due at it;
where one comes twice, its first one counts. Both is what systemd does.
"""

import re
import time
from bisect import bisect_left
from calendar import monthrange
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, tzinfo
from functools import partial
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from agent.schedules import check_schedule

_SHORTHANDS: Final = {
    "minutely": "*-*-* *:*:00",
    "hourly": "*-*-* *:00:00",
    "daily": "*-*-* 00:00:00",
    "weekly": "Mon *-*-* 00:00:00",
    "monthly": "*-*-01 00:00:00",
    "quarterly": "*-01,04,07,10-01 00:00:00",
    **dict.fromkeys(
        ("semiannually", "semi-annually", "biannually", "bi-annually"), "*-01,07-01 00:00:00"),
    **dict.fromkeys(("yearly", "annually", "anually"), "*-01-01 00:00:00"),
}  # fmt: skip
_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DATE: Final = re.compile(r"(?:([^-~]+)-)?([^-~]+)([-~])([^-~]+)")
#: Years that a schedule may name, as `agent.schedules` has them.
_FIRST_YEAR: Final = 1970
_LAST_YEAR: Final = 2199

#: Unix seconds of a local time, at most two of them, or none if the clock leaves it out.
_Instants = Callable[[datetime], list[int]]


@dataclass(frozen=True, slots=True)
class CalendarTimes:
    """A schedule, taken apart. All fields are sorted; `days` are those of a month of a given length."""

    weekdays: frozenset[int]  #: 0 is Monday
    years: frozenset[int]
    months: frozenset[int]
    day_field: str
    from_end: bool  #: days are counted from the end of the month
    times: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  #: hours, minutes, seconds
    zone: str | None  #: None: this host's

    @classmethod
    def parse(cls, text: str) -> "CalendarTimes":
        """Take `text` apart.

        Raises:
            UsageError: as `agent.schedules.check_schedule`.
        """
        words = check_schedule(text).split()
        if (shorthand := _SHORTHANDS.get(words[0].lower())) is not None:
            words = shorthand.split() + words[1:]
        weekdays = frozenset(range(7))
        if words[0][0].isalpha():
            weekdays = _weekdays(words.pop(0))
        year, month, between, day = "*", "*", "-", "*"
        if words and ":" not in words[0] and (match := _DATE.fullmatch(words[0])):
            year, month, between, day = match[1] or "*", match[2], match[3], match[4]
            words.pop(0)
        hours, minutes, seconds = "0", "0", "0"
        if words and ":" in words[0]:
            hours, minutes, seconds, *_ = (*words.pop(0).split(":"), "0")
        return cls(
            weekdays,
            frozenset(_values(_four_digits(year), _FIRST_YEAR, _LAST_YEAR)),
            frozenset(_values(month, 1, 12)),
            day,
            between == "~",
            (tuple(_values(hours, 0, 23)), tuple(_values(minutes, 0, 59)), tuple(_values(seconds, 0, 59))),
            words[0] if words else None,
        )

    def after(self, moment: float) -> int | None:
        """The first time (Unix seconds) later than `moment` at which it is due; None if there will be none."""
        instants, local = self._clock()
        for wall in self._walls(local(moment)):
            for instant in instants(wall)[:1]:
                if instant > moment:
                    return instant
        return None

    def _clock(self) -> tuple[_Instants, Callable[[float], datetime]]:
        zone = self.zone
        if zone is not None:
            try:
                info: tzinfo = UTC if zone.upper() == "UTC" else ZoneInfo(zone)
            except (ZoneInfoNotFoundError, ValueError):
                pass  # a host without a list of zones: its own time is the best there is
            else:
                return partial(_zone_instants, info), lambda moment: datetime.fromtimestamp(moment, info).replace(
                    tzinfo=None
                )
        return _host_instants, lambda moment: datetime(*time.localtime(moment)[:6])

    def _walls(self, start: datetime) -> Iterator[datetime]:
        """Local times from `start` on at which it is due, as a clock on the wall shows them."""
        hours, minutes, seconds = self.times
        for day in self._dates(start.date()):
            begin = (start.hour, start.minute, start.second) if day == start.date() else (0, 0, 0)
            for hour in hours[bisect_left(hours, begin[0]) :]:
                same_hour = hour == begin[0]
                for minute in minutes[bisect_left(minutes, begin[1] if same_hour else 0) :]:
                    same_minute = same_hour and minute == begin[1]
                    for second in seconds[bisect_left(seconds, begin[2] if same_minute else 0) :]:
                        yield datetime(day.year, day.month, day.day, hour, minute, second)

    def _dates(self, start: date) -> Iterator[date]:
        for year in sorted(self.years):
            if year < start.year:
                continue
            for month in sorted(self.months):
                if (year, month) < (start.year, start.month):
                    continue
                for number in self._days_of(monthrange(year, month)[1]):
                    day = date(year, month, number)
                    if day >= start and day.weekday() in self.weekdays:
                        yield day

    def _days_of(self, length: int) -> list[int]:
        """The days that are meant in a month of `length` days."""
        if not self.from_end:
            return [day for day in _values(self.day_field, 1, 31) if day <= length]
        found: set[int] = set()
        for part in self.day_field.split(","):
            if part == "*":
                return list(range(1, length + 1))
            first, last, step = _part(part)
            low, high = length + 1 - (last if last is not None else first), length + 1 - first
            if last is None:
                high = length if step else low
            found.update(range(max(low, 1), high + 1, step or 1))
        return sorted(found)


def _zone_instants(zone: tzinfo, wall: datetime) -> list[int]:
    found = []
    for fold in (0, 1):
        instant = wall.replace(tzinfo=zone, fold=fold).timestamp()
        if datetime.fromtimestamp(instant, zone).replace(tzinfo=None) == wall and int(instant) not in found:
            found.append(int(instant))
    return found


def _host_instants(wall: datetime) -> list[int]:
    found = []
    for daylight in (1, 0):
        try:
            instant = int(time.mktime((*wall.timetuple()[:8], daylight)))
            same = time.localtime(instant)[:6] == wall.timetuple()[:6]
        except (OverflowError, ValueError):
            continue
        if same and instant not in found:
            found.append(instant)
    return sorted(found)


def _weekdays(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.lower().rstrip(",").split(","):
        first, _, last = part.replace("..", "-").partition("-")
        begin = _DAYS.index(first[:3])
        found.update(range(begin, (_DAYS.index(last[:3]) if last else begin) + 1))
    return frozenset(found)


def _four_digits(field: str) -> str:
    """Years of two digits count from 1970 to 2069; steps are no years."""
    return re.sub(
        r"(?<![0-9/])[0-9]{1,2}(?![0-9])",
        lambda year: str(int(year[0]) + (1900 if int(year[0]) >= 70 else 2000)),
        field,
    )


def _part(part: str) -> tuple[int, int | None, int]:
    """First, last and step of `A`, `A..B`, `A/S` or `A..B/S`; fractions of a second are cut off."""
    values, slash, step = part.partition("/")
    first, _, last = values.partition("..")
    return int(float(first)), int(float(last)) if last else None, max(1, int(float(step))) if slash else 0


def _values(field: str, low: int, high: int) -> list[int]:
    """The numbers from `low` to `high` that `field` means, in order."""
    found: set[int] = set()
    for part in field.split(","):
        if part == "*":
            return list(range(low, high + 1))
        first, last, step = _part(part)
        end = last if last is not None else high if step else first
        found.update(range(first, min(end, high) + 1, step or 1))
    return sorted(found)
