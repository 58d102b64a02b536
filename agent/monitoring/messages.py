"""One notification: what it is about, as JSON and in words."""

import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent.monitoring.templates import DEFAULT_BODY, DEFAULT_SUBJECT, MAX_TEMPLATE, check_template, fill, one_line
from core.errors import FleeceError, UsageError, os_reason
from core.units import format_duration, format_size

if TYPE_CHECKING:
    from agent.job_store import Run
    from agent.monitoring.sections import AnyNotify

_WORDS: Final[Mapping[str, str]] = {
    "failure": "has failed",
    "warning": "is done, with warnings",
    "success": "is done",
    "interrupted": "was interrupted",
    "recovery": "works again",
    "test": "is not concerned: this is a test",
}
#: Figures of a run's result that are bytes.
_BYTES: Final = (
    "read",
    "new",
    "bytes-sent",
    "removed-bytes",
    "disk-bytes",
    "pending-bytes",
    "index-data-bytes",
    "size",
)
#: Guests, warnings and lines of the log that a message has at most.
_MAX_GUESTS: Final = 200
_MAX_WARNINGS: Final = 100
LOG_LINES: Final = 30
_MAX_LOG_LINE: Final = 500


@dataclass(frozen=True, slots=True)
class Message:
    """What a notification says."""

    kind: str  #: `failure`, `warning`, `success`, `interrupted`, `recovery`, `test`
    run: "Run"
    repository: str | None = None
    comment: str | None = None
    log: Sequence[str] = ()  #: the last lines of its log
    left_out: int = 0  #: messages that were not sent since the last one
    host: str = field(default_factory=socket.gethostname)

    @property
    def document(self) -> dict[str, Any]:
        """Everything, for programs; docs/json.md, "Notifications"."""
        run = self.run.to_json()
        result = run["result"]
        if isinstance(result, dict) and isinstance(result.get("guests"), list):
            result = {**result, "guests": result["guests"][:_MAX_GUESTS]}
        return {
            "schema": 1,
            "kind": self.kind,
            "message": self.title,
            "host": self.host,
            "repository": self.repository,
            "comment": self.comment,
            **run,
            "warnings": run["warnings"][:_MAX_WARNINGS],
            "result": result,
            "left-out": self.left_out,
            "log": list(self.log),
        }

    @property
    def title(self) -> str:
        """One sentence."""
        return f"job {self.run.job} on {self.host} {_WORDS[self.kind]}"

    def values(self) -> dict[str, str]:
        """The variables of templates."""
        run = self.run
        error = run.error or {}
        why = f"cannot {error.get('what', '')} {error.get('where', '')}: {error.get('why', '')}" if error else ""
        values = {
            "kind": self.kind,
            "words": _WORDS[self.kind],
            "host": self.host,
            "job": run.job,
            "type": run.type,
            "comment": self.comment or "",
            "repository": self.repository or "",
            "state": run.state,
            "run": run.id,
            "start": _local(run.start),
            "end": _local(run.end),
            "duration": "" if run.end is None else format_duration(max(0.0, run.end - run.start)),
            "error": why,
            "hint": error.get("hint", ""),
            "warnings": "\n".join(run.warnings[:_MAX_WARNINGS]),
            "figures": "\n".join(_figures(run.result or {})),
            "guests": "\n".join(_guest_lines(run.result or {})),
            "log": "\n".join(self.log),
            "left_out": str(self.left_out),
            "document": json.dumps(self.document),
        }
        values = {name: _readable(text) for name, text in values.items()}
        return {**values, "facts": self._facts(values)}

    def _facts(self, values: Mapping[str, str]) -> str:
        parts = [
            (heading, values[name])
            for heading, name in (
                ("Why", "error"), ("Hint", "hint"), ("Warnings", "warnings"), ("Figures", "figures"),
                ("Guests", "guests"), ("The end of the log", "log"),
            )
        ]  # fmt: skip
        text = "".join(f"\n{heading}:\n{_indented(found)}\n" for heading, found in parts if found)
        if self.left_out:
            text += f"\n{self.left_out} messages about this job were left out since the last one.\n"
        return text

    def subject(self, section: "AnyNotify") -> str:
        """One line, whatever it is made of."""
        return one_line(fill(section.subject or DEFAULT_SUBJECT, self.values()))

    def body(self, section: "AnyNotify", *, default: str = DEFAULT_BODY, as_json: bool = False) -> str:
        """The text, by the section's template.

        Raises:
            FleeceError: the template's file cannot be used.
        """
        template = section.body if section.body is not None else default
        if section.template is not None:
            template = read_template(section.template)
        values = {**self.values(), "subject": self.subject(section)}
        return fill(template, values, as_json=as_json).encode("utf-8", "replace").decode()


def sample(job: str, kind: str = "test") -> Message:
    """A message about a run that never was, for `fleece notify test`."""
    from agent.job_store import Run

    now = time.time()
    state = {"failure": "failed", "warning": "warnings", "interrupted": "interrupted"}.get(kind, "ok")
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    run = Run(f"{job}:{stamp}-0000", job, "test", now - 61, 0, now, state)
    if state == "warnings":
        run.warnings = ["this warning belongs to a test"]
    if state == "failed":
        run.error = {"what": "run the job", "where": job, "why": "this is a test", "hint": "nothing is to be done"}
    return Message(kind, run, comment="sent by 'fleece notify test'")


def read_template(path: Path) -> str:
    """The template in a file.

    Raises:
        FleeceError: it cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TEMPLATE + 1).decode()
    except OSError as error:
        raise FleeceError("read the template", str(path), os_reason(error)) from error
    except UnicodeDecodeError:
        raise FleeceError("read the template", str(path), "it is not UTF-8") from None
    if len(text) > MAX_TEMPLATE:
        raise FleeceError("read the template", str(path), f"it has more than {MAX_TEMPLATE} bytes")
    try:
        check_template(text)
    except UsageError as error:
        raise FleeceError("use the template", str(path), error.why) from error
    return text


def _figures(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, value in result.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            continue
        shown = format_size(value) if name in _BYTES and isinstance(value, int | float) and value >= 0 else value
        lines.append(f"{name}: {shown}")
    return lines


def _guest_lines(result: Mapping[str, Any]) -> list[str]:
    guests = result.get("guests")
    if not isinstance(guests, list):
        return []
    # What failed first: a long list is cut.
    order = {"failed": 0, "warnings": 1}
    known = sorted(
        (one for one in guests if isinstance(one, dict)), key=lambda one: order.get(str(one.get("state")), 2)
    )
    lines = [
        f"{one.get('guest')}: {one.get('state')}, {one.get('error') or one.get('snapshot') or ''}".rstrip(", ")
        for one in known[:_MAX_GUESTS]
    ]
    return lines if len(known) <= _MAX_GUESTS else [*lines, f"and {len(known) - _MAX_GUESTS} more"]


def last_lines(text: str) -> list[str]:
    """The end of a log."""
    return [line[:_MAX_LOG_LINE] for line in text.splitlines()[-LOG_LINES:]]


def _readable(text: str) -> str:
    """Without characters that control a terminal or the direction of text; lines stay."""
    lines = text.replace("\r\n", "\n")
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in lines)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _local(moment: float | None) -> str:
    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(moment))
