"""When schedules are due: the reckoning is the one of systemd, which is asked where it is installed."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from agent.calendar_times import CalendarTimes
from datastore.names import parse_time

TEXTS = [
    "02:00", "daily", "Mon..Fri 22:30", "sat,sun *-*-1..7 18:00", "*-*~3 10:00", "*:0/15", "Mon *-05~07/1 12:00",
    "weekly", "hourly", "minutely", "monthly", "quarterly", "semiannually", "yearly", "Thu,Fri *-*-1,5 11:12:13",
    "2027-01-01 00:00:00", "10-15", "*-*-* 0/6:20", "*-*-* *:*:10..40/15", "*-02-29", "*-*~1..2", "*-*~3..9/3",
    "Sun 02:30", "02:30 Europe/Berlin", "*:30 Europe/Berlin", "00:30 UTC", "28-2-29 5:00", "1970/7-3-1", "*-*-31",
    "*-04~5/1", "Mon,Wed..Fri 4,6..8/2:5",
]  # fmt: skip
BASES = ["2026-03-28T22:59:30Z", "2026-10-24T23:29:59Z", "2026-12-31T23:59:59Z"]


@pytest.fixture(params=["UTC", "Europe/Berlin", "America/New_York"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


def following(text: str, base: int, count: int) -> list[int]:
    times, moment = CalendarTimes.parse(text), float(base)
    found: list[int] = []
    while len(found) < count and (due := times.after(moment)) is not None:
        found.append(due)
        moment = due
    return found


def test_the_next_times_are_those_that_systemd_finds(zone: str) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd is the oracle here, and this host has no systemd-analyze (containers often lack it)")
    for text in TEXTS:
        for base in BASES:
            stamp = base.replace("T", " ").replace("Z", " UTC")
            done = subprocess.run(
                [program, "calendar", "--iterations=5", f"--base-time={stamp}", text],
                capture_output=True, text=True, check=True, env={"LC_ALL": "C", "TZ": zone},
            )  # fmt: skip
            lines = re.findall(r"(?:Next elapse|Iter\. #\d|Iteration #\d|\(in UTC\)): +(.*)", done.stdout)
            utc = [line for line in lines if line.endswith(" UTC")]
            expected = [parse_time(re.sub(r"\S+ (\S+) (\S+) UTC", r"\1T\2Z", line)) for line in utc]
            assert following(text, parse_time(base), 5) == expected, (text, base, done.stdout)


def test_a_time_that_never_comes_is_none() -> None:
    for text in ("*-02-30", "2020-01-01", "Mon 2027-01-01"):
        assert CalendarTimes.parse(text).after(parse_time("2026-01-01T00:00:00Z")) is None


def test_a_local_time_that_the_clock_leaves_out_is_passed_over_and_one_that_comes_twice_counts_once() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    found = following("02:30 Europe/Berlin", int(datetime(2026, 3, 28, 0, 0, tzinfo=berlin).timestamp()), 2)
    assert [datetime.fromtimestamp(one, berlin).day for one in found] == [28, 30]
    found = following("02:30 Europe/Berlin", int(datetime(2026, 10, 24, 12, 0, tzinfo=berlin).timestamp()), 2)
    assert [datetime.fromtimestamp(one, berlin).strftime("%d %H:%M %Z") for one in found] == [
        "25 02:30 CEST", "26 02:30 CET",
    ]  # fmt: skip
