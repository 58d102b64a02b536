"""Times at which jobs run, in systemd's calendar form: `02:00`, `Mon..Fri 22:30`, `*-*-1 04:00`, `weekly`.

The form is checked here, on every host; where systemd is there, it has the last word and says when a schedule is due.
See systemd.time(7).
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from core.errors import UsageError

_SHORTHANDS: Final = frozenset(
    ("minutely", "hourly", "daily", "weekly", "monthly", "quarterly", "semiannually", "semi-annually", "yearly",
     "annually", "anually", "biannually", "bi-annually")
)  # fmt: skip
_DAY_NAMES: Final = ("mon(?:day)?", "tue(?:sday)?", "wed(?:nesday)?", "thu(?:rsday)?", "fri(?:day)?", "sat(?:urday)?",
                     "sun(?:day)?")  # fmt: skip
_DAY: Final = f"(?:{'|'.join(_DAY_NAMES)})"
_DAYS: Final = re.compile(rf"{_DAY}(?:(?:\.\.|-){_DAY})?(?:,{_DAY}(?:(?:\.\.|-){_DAY})?)*,?")
_NUMBER: Final = r"[0-9]{1,9}"
_FIELD: Final = rf"{_NUMBER}(?:\.\.{_NUMBER})?(?:/{_NUMBER})?"
_LIST: Final = rf"(?:\*|{_FIELD}(?:,{_FIELD})*)"
_DECIMAL: Final = rf"{_NUMBER}(?:\.[0-9]{{1,9}})?"
_SECOND: Final = rf"{_DECIMAL}(?:\.\.{_DECIMAL})?(?:/{_DECIMAL})?"
_SECONDS: Final = rf"(?:\*|{_SECOND}(?:,{_SECOND})*)"
_DATE: Final = re.compile(rf"(?:({_LIST})-)?({_LIST})([-~])({_LIST})")
_TIME: Final = re.compile(rf"({_LIST}):({_LIST})(?::({_SECONDS}))?")
_ZONE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_+\-]*(?:/[A-Za-z0-9_+\-]+)*")
_ZONES: Final = Path("/usr/share/zoneinfo")
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
        if not words or (len(words) == 1 and _is_zone(words[0])):
            return text
        raise _error(text, f"{words[0]!r} cannot stand behind such a word")
    if not words:
        raise _error(text, "it is empty")
    if _DAYS.fullmatch(words[0].lower()):
        _check_days(text, words[0].lower())
        words = words[1:]
    if words and (match := _DATE.fullmatch(words[0])):
        from_end = match[3] == "~"
        if match[1] is not None:
            _check_field(text, ",".join(map(_four_digits, match[1].split(","))), 1970, 2199)
        _check_field(text, match[2], 1, 12)
        # From the end of a month: as many days as each month has.
        _check_field(text, match[4], 1, 28 if from_end else 31, backwards=from_end)
        words = words[1:]
    if words and (match := _TIME.fullmatch(words[0])):
        _check_field(text, match[1], 0, 23)
        _check_field(text, match[2], 0, 59)
        _check_field(text, match[3] or "*", 0, 59, seconds=True)
        words = words[1:]
    if words and len(words) < len(text.split()) and _is_zone(words[0]):
        words = words[1:]
    if words:
        raise _error(text, f"{words[0]!r} is no part of a calendar time, or stands at the wrong place")
    return text


def _check_days(text: str, days: str) -> None:
    for part in days.rstrip(",").split(","):
        first, last = (part.replace("..", "-") + "-").split("-")[:2]
        numbers = [
            number
            for day in (first, last or first)
            for number, name in enumerate(_DAY_NAMES)
            if re.fullmatch(name, day)
        ]
        if numbers[0] > numbers[1]:
            raise _error(text, f"{part} runs backwards: a week begins on Monday")


def _four_digits(part: str) -> str:
    """Years of two digits count from 1970 to 2069."""
    return re.sub(
        r"(?<![0-9/])[0-9]{1,2}(?![0-9])", lambda year: str(int(year[0]) + (1900 if int(year[0]) >= 70 else 2000)), part
    )


def _check_field(text: str, field: str, low: int, high: int, *, backwards: bool = False, seconds: bool = False) -> None:
    """Refuse numbers beyond `low` to `high`, ranges that run backwards and steps that lead nowhere."""
    for part in field.split(","):
        if part == "*":
            continue
        values, _, step = part.partition("/")
        first, _, last = values.partition("..")
        numbers = [float(first), float(last or first)]
        if not all(low <= number < high + 1 for number in numbers):
            raise _error(text, f"{values} is not between {low} and {high}")
        if numbers[0] > numbers[1]:
            raise _error(text, f"{values} runs backwards")
        if seconds and last and numbers[0] == numbers[1]:
            raise _error(text, f"{values} is no range")
        # In a range systemd takes any step, and drops one that is too long.
        room = float("inf") if last else numbers[0] - low if backwards else high - numbers[0]
        if step and not 0 < float(step) <= room:
            raise _error(text, f"the step of {part} leads nowhere")


def _is_zone(word: str) -> bool:
    if word.upper() == "UTC":
        return True
    if _ZONE.fullmatch(word) is None:
        return False
    # Where there is no list of zones nobody can tell.
    return (_ZONES / word).is_file() if _ZONES.is_dir() else "/" in word or word.isupper()


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
