"""Schedules: what is accepted here is what systemd accepts."""

import shutil
from pathlib import Path

import pytest

from agent.job_sections import GcJob
from agent.schedules import check_schedule, next_elapse
from core.errors import UsageError

GOOD = [
    "02:00", "daily", "Mon..Fri 22:30", "*-*-* 02:00:00", "sat,sun *-*-1..7 18:00", "*-*~3 10:00", "*:0/15",
    "Mon *-05~07/1 12:00 Europe/Berlin", "2003-3-5", "*-*-* *:*:0/5.5", "weekly UTC", "Mon", "12,14,13:20,10,30",
    "quarterly", "08:05:40 UTC", "Thu,Fri 2012-*-1,5 11:12:13", "2027-01-01 00:00:00", "Monday 04:00", "*:5", "10-15",
    "Wed..Sat,Tue 12-10-15 1:2:3", "*-12-* 01:00", "HOURLY",
    "Mon..Mon", "Mon,Sun", "22/1:00", "0/23:00", "*-*~28", "*-*~3/2", "*-*~1..2/99", "69-01-01", "70-01-01", "2199-1-1",
    "1970/100-1-1", "02:00 utc", "02:00 CET", "*:1..2/99", "*:*:1..2.5/0.5", "10..10:00", "Mon, 10:00", "012:00",
]  # fmt: skip
BAD = [
    "", " ", "soon", "2026-13-01", "02:60", "24:00", "02:00;", "Mon..Wed..Thu", "2026-01-32", "*-0-1", "daily 02:00",
    "02:00 Mon", "UTC", "-rf", "--help", "02", "1:2:3:4", "$(id)", "02:00 02:00", "xday 02:00",
    "Sun..Mon", "Fri-Wed 02:00", "05..02:00", "*:30..10", "*-*-9..3", "*/2:00", "*:*/15", "*-*-*/2", "*-01,*-01",
    "2:0/0", "22/2:00", "0/24:00", "*:*:0/60", "*-*~29", "*-*~3/3", "1969-01-01", "2200-01-01", "100-1-1", "02:00 XYZ",
    "02:00 Foo/Bar", "02:00 ../../etc/passwd", "*:*:5..5", "Mon,,Tue", "1:00:5.", "9999999999:00",
]  # fmt: skip


def zones_of(texts: list[str]) -> list[str]:
    """Without those of whose time zone nobody knows here."""
    return texts if Path("/usr/share/zoneinfo/CET").exists() else [text for text in texts if "02:00 " not in text]


@pytest.mark.parametrize("text", zones_of(GOOD))
def test_what_systemd_understands_is_accepted(text: str) -> None:
    assert check_schedule(text) == text
    next_elapse(text)


@pytest.mark.parametrize("text", zones_of(BAD))
def test_what_is_no_calendar_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        check_schedule(text)


@pytest.mark.parametrize("text", [text for text in zones_of(BAD) if text.strip()])
def test_systemd_has_the_same_opinion(text: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is the oracle here, and this host has no systemd-analyze (containers often lack it)")
    with pytest.raises(UsageError, match="systemd says"):
        next_elapse(text)


def test_a_host_without_a_list_of_time_zones_believes_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.schedules._ZONES", Path("/nowhere"))
    assert check_schedule("02:00 Mars/Phobos")
    with pytest.raises(UsageError):
        check_schedule("02:00 mars")


def test_the_configuration_puts_one_space_between_the_parts() -> None:
    assert GcJob(type="gc", schedule=" Mon  02:00\tUTC ").schedule == "Mon 02:00 UTC"
    with pytest.raises(ValueError, match="runs backwards"):
        GcJob(type="gc", schedule="05..02:00")


def test_the_next_time_is_told_in_unix_seconds() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is the oracle here, and this host has no systemd-analyze (containers often lack it)")
    assert next_elapse("2037-01-01 00:00:00 UTC") == 2114380800
    assert next_elapse("2001-01-01 00:00:00 UTC") is None


def test_without_systemd_nobody_knows_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert next_elapse("daily") is None


@pytest.mark.parametrize("cutoff", ["59s", "49h", "1", "soon"])
def test_a_cutoff_that_no_collection_takes_is_refused_before_the_night(cutoff: str) -> None:
    with pytest.raises(ValueError, match=r"are possible|not a number"):
        GcJob(type="gc", cutoff=cutoff)
    assert GcJob(type="gc", cutoff="48h").cutoff == "48h"
