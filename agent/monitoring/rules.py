"""Which notifications are sent: by what happened, what was told before, and how much was told in the last hour.

For each `[notify.NAME]` there is a file in `monitoring/notify/` of the state folder. A message is entered there before
it is sent and taken out afterwards, so that one which a crash or a dead network swallowed is sent later; that it comes
twice is possible, that it is lost is not, for `PENDING_S`.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent.monitoring.state import locked, read_document, write_document
from agent.monitoring.summaries import number

if TYPE_CHECKING:
    from agent.monitoring.sections import AnyNotify

#: What a state of a run is to notifications.
KINDS: Final[Mapping[str, str]] = {
    "ok": "success",
    "warnings": "warning",
    "failed": "failure",
    "killed": "failure",
    "interrupted": "interrupted",
}
#: Seconds for which a message that could not be sent is tried again, whenever something else happens.
PENDING_S: Final = 86_400.0
#: Seconds after which a message that another process is sending counts as not sent.
TRYING_S: Final = 600.0
_HOUR_S: Final = 3600.0
#: Jobs of one target that are remembered.
_MAX_JOBS: Final = 1000
_MAX_ERROR: Final = 500


@dataclass(slots=True)
class JobState:
    """What one target knows of one job."""

    told: str | None = None  #: kind of the last message that still holds: `failure` until it was told to be over
    told_at: float = 0.0
    left_out: int = 0  #: messages that were not sent since the last one


@dataclass(slots=True)
class Pending:
    """A message that is to be sent."""

    job: str
    run: str
    kind: str
    since: float  #: when it was entered, Unix seconds
    left_out: int = 0
    trying: float = 0.0  #: since when somebody sends it
    pid: int = 0


@dataclass(slots=True)
class TargetState:
    """What is remembered of one target."""

    jobs: dict[str, JobState] = field(default_factory=dict)
    hour: list[float] = field(default_factory=list)  #: when the messages of the last hour were sent
    pending: list[Pending] = field(default_factory=list)
    sent: int = 0
    failed: int = 0
    left_out: int = 0
    last_sent: float | None = None
    last_error: str | None = None  #: of the last attempt, if that failed

    def decide(self, section: "AnyNotify", job: str, run: str, state: str, now: float) -> Pending | None:
        """Note how a run of `job` ended; returns the message that is to be sent, already entered as pending."""
        from agent.cli_verify import parse_duration

        kind = KINDS.get(state, "failure")
        known = self.jobs.pop(job, None) or JobState()
        self.jobs[job] = known  # the last one heard of
        while len(self.jobs) > _MAX_JOBS:
            del self.jobs[next(iter(self.jobs))]
        # What could not be told of older runs; this one must not be left out because of it.
        unsent = [one for one in self.pending if one.job == job and not 0 <= now - one.trying < TRYING_S]
        over = known.told == "failure" and kind in ("success", "warning")
        wanted = kind in section.on or "always" in section.on
        if over and section.recovery:
            kind = "recovery"
        elif not wanted:
            if kind in ("success", "warning"):
                known.told, known.left_out = None, 0
            return None
        elif kind == known.told and not unsent and 0 <= now - known.told_at < parse_duration(section.repeat):
            return self._leave_out(known)
        self.hour = [moment for moment in self.hour if 0 <= now - moment < _HOUR_S]
        if len(self.hour) >= section.at_most:
            return self._leave_out(known)
        self.hour.append(now)
        # What this message says too, or what it says to be over, is out of date. All else is still to be told.
        old = [one for one in unsent if one.kind == kind or kind in ("failure", "recovery")]
        self.pending = [one for one in self.pending if one not in old]
        message = Pending(job, run, kind, now, known.left_out, now, os.getpid())
        self.pending.append(message)
        known.told = kind if kind in ("failure", "warning") else None
        known.told_at, known.left_out = now, 0
        return message

    def _leave_out(self, known: JobState) -> Pending | None:
        known.left_out += 1
        self.left_out += 1
        return None

    def late(self, now: float) -> list[Pending]:
        """Messages of earlier that could not be sent; they are tried now. Those that are too old go."""
        self.pending = [one for one in self.pending if 0 <= now - one.since < PENDING_S]
        found = [one for one in self.pending if not 0 <= now - one.trying < TRYING_S]
        for one in found:
            one.trying, one.pid = now, os.getpid()
        return found

    def done(self, message: Pending, error: str | None, now: float) -> None:
        """Note that `message` was sent, or why not."""
        mine = [one for one in self.pending if one.run == message.run and one.kind == message.kind]
        if error is None:
            self.pending = [one for one in self.pending if one not in mine]
            self.sent, self.last_sent, self.last_error = self.sent + 1, now, None
            return
        self.failed, self.last_error = self.failed + 1, error[:_MAX_ERROR]
        for one in mine:
            one.trying, one.pid = 0.0, 0

    def to_json(self) -> dict[str, Any]:
        """The file."""
        return {"schema": 1, **asdict(self)}

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> "TargetState":
        """Read the file; parts that are damaged count as missing."""
        found = cls()
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            found.sent, found.failed = int(number(document["sent"])), int(number(document["failed"]))
            found.left_out = int(number(document["left_out"]))
            found.last_sent = float(number(document["last_sent"])) if document["last_sent"] is not None else None
            found.last_error = str(document["last_error"]) if document["last_error"] is not None else None
            found.hour = [float(number(one)) for one in document["hour"]][:1000]
            for name, one in list(document["jobs"].items())[:_MAX_JOBS]:
                told = one["told"] if one["told"] in ("failure", "warning") else None
                found.jobs[str(name)] = JobState(told, float(number(one["told_at"])), int(number(one["left_out"])))
            for one in document["pending"][:_MAX_JOBS]:
                found.pending.append(
                    Pending(
                        str(one["job"]), str(one["run"]), str(one["kind"]), float(number(one["since"])),
                        int(number(one["left_out"])), float(number(one["trying"])), int(number(one["pid"])),
                    )
                )  # fmt: skip
        return found


class TargetStates:
    """The files of all targets. Methods wait for locks: call them in a thread."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "monitoring" / "notify"

    def read(self, name: str) -> TargetState:
        """What is remembered of a target, without a lock; nothing if the file is missing or damaged."""
        document = read_document(self._folder / f"{name}.json")
        return TargetState() if document is None else TargetState.parse(document)

    def decide(
        self, name: str, section: "AnyNotify", runs: Sequence[tuple[str, str, str]], now: float
    ) -> list[Pending]:
        """Note how runs ended (job, id, state), and return what is to be sent, late messages first.

        Raises:
            BusyError, FleeceError: the file cannot be used.
        """
        with locked(self._folder / f"{name}.lock"):
            state = self.read(name)
            messages = [found for run in runs if (found := state.decide(section, *run, now)) is not None]
            late = state.late(now)
            write_document(self._folder / f"{name}.json", state.to_json())
        return late + messages

    def done(self, name: str, message: Pending, error: str | None, now: float) -> None:
        """See `TargetState.done`.

        Raises:
            BusyError, FleeceError: the file cannot be used.
        """
        with locked(self._folder / f"{name}.lock"):
            state = self.read(name)
            state.done(message, error, now)
            write_document(self._folder / f"{name}.json", state.to_json())

    def figures(self, sections: "Mapping[str, AnyNotify]") -> list[dict[str, Any]]:
        """What was sent so far, of each target of the configuration."""
        found = []
        for name, section in sections.items():
            state = self.read(name)
            found.append(
                {
                    "name": name,
                    "type": section.type,
                    "sent": state.sent,
                    "failed": state.failed,
                    "left-out": state.left_out,
                    "pending": len(state.pending),
                    "last-sent": state.last_sent,
                    "last-error": state.last_error,
                }
            )
        return found


def is_meant(section: "AnyNotify", job: str) -> bool:
    """Whether a target wants to hear of `job`."""
    chosen = not section.jobs or any(fnmatchcase(job, pattern) for pattern in section.jobs)
    return chosen and not any(fnmatchcase(job, pattern) for pattern in section.exclude_jobs)
