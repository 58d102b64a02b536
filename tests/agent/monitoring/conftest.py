"""What tests of monitoring share: a run that has ended, and sections from TOML."""

import time
from pathlib import Path
from typing import Any

from agent.config import Config, parse_config
from agent.job_store import JobStore, Run
from agent.monitoring.messages import Message
from agent.monitoring.sections import AnyNotify, CommandSection, MailSection, WebhookSection

#: A name that tries to be a header, an option, a tag, an escape sequence and another line of a log at once.
HOSTILE = "web\r\nBcc: all@example.org\r\n\r\n<script>alert('1')</script>\u202e\x1b[2J\"&$job${"


def a_run(state: str = "failed", *, job: str = "night", number: int = 1, **fields: Any) -> Run:
    now = time.time()
    run = Run(f"{job}:20260102T030405Z-{number:04x}", job, "backup", now - 90, 4711, now, state)
    if state == "failed":
        run.error = {"what": "back up", "where": HOSTILE, "why": "the disk is gone", "hint": "look for it"}
    for name, value in fields.items():
        setattr(run, name, value)
    return run


def a_message(kind: str = "failure", **fields: Any) -> Message:
    guests = [
        {"guest": "db", "state": "ok", "snapshot": "vm/1/2026-01-02T03:04:05Z", "error": None},
        {"guest": HOSTILE, "state": "failed", "snapshot": None, "error": "it is\nbroken"},
    ]
    result = {"ok": 1, "failed": 1, "read": 1 << 20, "guests": guests}
    run = a_run(warnings=[HOSTILE], result=result)
    return Message(kind, run, "main", "at night", ["one", HOSTILE], **fields)


def config(text: str) -> Config:
    return parse_config(text, "f")


def target(text: str) -> AnyNotify:
    return config(f"[notify.x]\n{text}").notify["x"]


def mail(text: str = "") -> MailSection:
    section = target(f'type = "mail"\nto = ["root", "admin@example.org"]\n{text}')
    assert isinstance(section, MailSection)
    return section


def webhook(text: str) -> WebhookSection:
    section = target(f'type = "webhook"\n{text}')
    assert isinstance(section, WebhookSection)
    return section


def command(*words: str, text: str = "") -> CommandSection:
    section = target(f'type = "command"\ncommand = {list(words)!r}\n{text}')
    assert isinstance(section, CommandSection)
    return section


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def record(state_dir: Path, run: Run) -> Run:
    """Have `run` in the history of its job; a killed one without its end."""
    store = JobStore(state_dir, run.job)
    with store.begin(run.type) as recording:
        run.id, run.start = recording.run.id, recording.run.start
        if run.state == "killed":
            return run
        recording.end(run.state, warnings=run.warnings, result=run.result)
        run.end = recording.run.end
    return run
