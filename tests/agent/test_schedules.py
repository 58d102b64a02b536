"""Schedules: what is accepted here is what systemd accepts."""

import shutil

import pytest

from agent.schedules import check_schedule, next_elapse
from core.errors import UsageError

GOOD = [
    "02:00", "daily", "Mon..Fri 22:30", "*-*-* 02:00:00", "sat,sun *-*-1..7 18:00", "*-*~3 10:00", "*:0/15",
    "Mon *-05~07/1 12:00 Europe/Berlin", "2003-3-5", "*-*-* *:*:0/5.5", "weekly UTC", "Mon", "12,14,13:20,10,30",
    "quarterly", "08:05:40 UTC", "Thu,Fri 2012-*-1,5 11:12:13", "2027-01-01 00:00:00", "Monday 04:00", "*:5", "10-15",
    "Wed..Sat,Tue 12-10-15 1:2:3", "*-12-* 01:00", "HOURLY",
]  # fmt: skip
BAD = [
    "", " ", "soon", "2026-13-01", "02:60", "24:00", "02:00;", "Mon..Wed..Thu", "2026-01-32", "*-0-1", "daily 02:00",
    "02:00 Mon", "UTC", "-rf", "--help", "02", "1:2:3:4", "$(id)", "02:00 02:00", "xday 02:00",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_what_systemd_understands_is_accepted(text: str) -> None:
    assert check_schedule(text) == text
    next_elapse(text)


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_calendar_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        check_schedule(text)


@pytest.mark.parametrize("text", [text for text in BAD if text.strip()])
def test_systemd_has_the_same_opinion(text: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    with pytest.raises(UsageError, match="systemd says"):
        next_elapse(text)


def test_the_next_time_is_told_in_unix_seconds() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    assert next_elapse("2037-01-01 00:00:00 UTC") == 2114380800
    assert next_elapse("2001-01-01 00:00:00 UTC") is None


def test_without_systemd_nobody_knows_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert next_elapse("daily") is None
