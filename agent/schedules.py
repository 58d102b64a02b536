"""Times at which jobs run, in systemd's calendar form: `02:00`, `Mon..Fri 22:30`, `*-*-1 04:00`, `weekly`.

The form is checked here, on every host; where systemd is there, it has the last word and says when a schedule is due.
See systemd.time(7).
"""

import re
import shutil
import subprocess
from typing import Final

from core.errors import UsageError

_SHORTHANDS: Final = frozenset(
    ("minutely", "hourly", "daily", "weekly", "monthly", "quarterly", "semiannually", "semi-annually", "yearly",
     "annually", "anually", "biannually", "bi-annually")
)  # fmt: skip
_DAY: Final = r"(?:mon(?:day)?|tue(?:sday)?|wed(?:nesday)?|thu(?:rsday)?|fri(?:day)?|sat(?:urday)?|sun(?:day)?)"
_DAYS: Final = re.compile(rf"{_DAY}(?:(?:\.\.|-){_DAY})?(?:,{_DAY}(?:(?:\.\.|-){_DAY})?)*,?")
_FIELD: Final = r"(?:\*|[0-9]+(?:\.\.[0-9]+)?)(?:/[0-9]+)?"
_LIST: Final = rf"{_FIELD}(?:,{_FIELD})*"
_SECONDS: Final = r"(?:\*|[0-9]+(?:\.[0-9]+)?(?:\.\.[0-9]+(?:\.[0-9]+)?)?)(?:/[0-9]+(?:\.[0-9]+)?)?"
_DATE: Final = re.compile(rf"(?:({_LIST})-)?({_LIST})[-~]({_LIST})")
_TIME: Final = re.compile(rf"({_LIST}):({_LIST})(?::({_SECONDS}(?:,{_SECONDS})*))?")
_ZONE: Final = re.compile(r"UTC|[A-Za-z]+(?:/[A-Za-z0-9_+\-]+)+|[A-Z]{3,5}")
_UTC: Final = re.compile(r"(?:Next elapse|\(in UTC\)): +\S+ (\d{4}-\d{2}-\d{2}) (\d{2}:\d{2}:\d{2}) UTC")
#: Seconds for one call of systemd-analyze.
_TIMEOUT_S: Final = 10.0


def check_schedule(text: str) -> str:
    """Return `text` if it has the form of a systemd calendar event.

    Raises:
        UsageError: another form, or a number that no clock or calendar has.
    """
    words = text.split()
    if words and words[0].lower() in _SHORTHANDS:
        words = words[1:]
        if not words or (len(words) == 1 and _ZONE.fullmatch(words[0])):
            return text
        raise _error(text, f"{words[0]!r} cannot stand behind such a word")
    if not words:
        raise _error(text, "it is empty")
    if _DAYS.fullmatch(words[0].lower()):
        words = words[1:]
        if not words:
            return text
    if match := _DATE.fullmatch(words[0]):
        _check_ranges(text, (match[2], match[3]), ((1, 12), (1, 31)))
        words = words[1:]
    if words and (match := _TIME.fullmatch(words[0])):
        _check_ranges(text, match.groups(), ((0, 23), (0, 59), (0, 59)))
        words = words[1:]
    if words and len(words) < len(text.split()) and _ZONE.fullmatch(words[0]):
        words = words[1:]
    if words:
        raise _error(text, f"{words[0]!r} is no part of a calendar time, or stands at the wrong place")
    return text


def _check_ranges(text: str, fields: tuple[str | None, ...], ranges: tuple[tuple[int, int], ...]) -> None:
    for field, (low, high) in zip(fields, ranges, strict=True):
        for part in (field or "*").split(","):
            values = [float(value) for value in part.partition("/")[0].split("..") if value != "*"]
            if not all(low <= value < high + 1 for value in values):
                raise _error(text, f"{part} is not between {low} and {high}")


def next_elapse(text: str) -> int | None:
    """When `text` is due next (Unix seconds), by systemd; None if it is not installed, or the time will never come.

    Raises:
        UsageError: systemd does not understand it.
    """
    from datastore.names import parse_time

    program = shutil.which("systemd-analyze")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "calendar", "--iterations=1", "--", text],
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL,
            env={**_environment(), "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise _error(text, f"systemd says: {lines[-1] if lines else 'it is not valid'}")
    match = _UTC.search(done.stdout)
    return None if match is None else parse_time(f"{match[1]}T{match[2]}Z")


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def _error(text: str, why: str) -> UsageError:
    return UsageError("use the schedule", repr(text), why, "write '02:00', 'Mon..Fri 22:30' or 'weekly'")
