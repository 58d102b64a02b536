"""The event log: whole lines, whatever the file and the texts are."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from agent.monitoring.events import MAX_LINE, EventLog
from agent.monitoring.sections import EventsSection
from core.systemd import to_journal

from .conftest import HOSTILE, config


def log_to(path: Path, problems: list[str] | None = None) -> EventLog:
    section = config(f'[events]\nfile = "{path}"').events
    return EventLog(section, (problems if problems is not None else []).append)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_each_event_is_one_line_of_ascii_with_the_documented_keys(tmp_path: Path) -> None:
    path = tmp_path / "log/events.jsonl"
    log_to(path).emit("job-end", HOSTILE, job=HOSTILE, duration_s=1.5, path="\udcff")
    raw = path.read_bytes()
    assert raw.count(b"\n") == 1
    assert raw.isascii()
    (event,) = lines(path)
    assert list(event) == ["schema", "time", "host", "pid", "event", "message", "job", "duration-s", "path"]
    assert (event["schema"], event["event"], event["job"], event["path"]) == (1, "job-end", HOSTILE, "\udcff")
    assert len(event["time"]) == len("2026-01-02T03:04:05.678Z")
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.parent.stat().st_mode & 0o777 == 0o750


def test_a_log_that_is_rotated_is_written_anew_without_being_told(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = log_to(path)
    log.emit("one", "")
    path.rename(tmp_path / "events.1")
    log.emit("two", "")
    assert [event["event"] for event in lines(path)] == ["two"]
    # copytruncate
    path.write_bytes(b"")
    log.emit("three", "")
    assert [event["event"] for event in lines(path)] == ["three"]


def test_half_a_line_of_a_crash_swallows_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "half')
    log_to(path).emit("whole", "")
    last = path.read_bytes().splitlines()[-1]
    assert json.loads(last)["event"] == "whole"


def test_a_long_event_loses_its_details_and_stays_one_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log_to(path).emit("job-end", "x", job="night", warnings=["w" * 1000] * 100, error={"why": "e"})
    (event,) = lines(path)
    assert len(path.read_bytes()) <= MAX_LINE
    assert (event["job"], event["warnings"], event["cut"], event["error"]) == ("night", None, True, {"why": "e"})


def test_what_is_no_log_is_not_written_and_told_of_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (
        tmp_path / "fifo",
        tmp_path / "link",
        tmp_path,
        Path("/dev/null"),
        tmp_path / "a/b/c",
        Path("/proc/x"),
    ):
        problems: list[str] = []
        log = log_to(path, problems)
        log.emit("one", "")
        log.emit("two", "")
        assert len(problems) == 1, path
        assert "event log" in problems[0]
    assert not (tmp_path / "elsewhere").exists()
    EventLog(None).emit("nothing", "is written")


def test_an_entry_of_the_journal_holds_what_was_said_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "journal")
    monkeypatch.setattr("core.systemd._JOURNAL", path)
    monkeypatch.setattr("agent.monitoring.events.to_journal", lambda fields: to_journal(fields, path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        EventLog(EventsSection(journal=True)).emit("job-end", f"{HOSTILE}\nPRIORITY=0", job="night", state="failed")
        fields = parse_entry(journal.recv(1 << 20))
    assert fields["MESSAGE"] == f"{HOSTILE}\nPRIORITY=0"
    assert (fields["PRIORITY"], fields["FLEECE_EVENT"], fields["FLEECE_STATE"]) == ("3", "job-end", "failed")
    assert json.loads(fields["FLEECE_DOCUMENT"])["job"] == "night"
    problems: list[str] = []
    log = EventLog(EventsSection(journal=True), problems.append)  # nobody listens any more
    log.emit("one", "")
    log.emit("two", "")
    assert len(problems) == 1


def parse_entry(data: bytes) -> dict[str, str]:
    fields = {}
    while data:
        name, _, rest = data.partition(b"\n")
        size = int.from_bytes(rest[:8], "little")
        fields[name.decode()] = rest[8 : 8 + size].decode()
        assert rest[8 + size : 9 + size] == b"\n"
        data = rest[9 + size :]
    return fields
