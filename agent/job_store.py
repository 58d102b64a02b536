"""Runs of jobs on this host: one at a time of each job, their history, their logs.

Below the state folder, `jobs/NAME/`: `lock` (held while the job runs), `history.jsonl` (a line when a run begins and
one when it ends) and `logs/RUN.log`. A run whose end is missing while nobody holds the lock was killed.
"""

import errno
import fcntl
import io
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from core.errors import BusyError, FleeceError, NotFoundError, os_reason

#: Runs of one job that are remembered, with their logs.
KEPT_RUNS: Final = 100
#: Bytes of one log; what comes after is left out, and the log says so.
MAX_LOG_SIZE: Final = 8 << 20
#: Bytes of a history that are read, the last ones; a larger one is made shorter when the next run begins. Usual are
#: 50 KiB, but every run may have a hundred long warnings.
_MAX_HISTORY: Final = 16 << 20
#: Characters of one text in the history; the log has all of it.
_MAX_TEXT: Final = 1000
#: Seconds: no time in a history is later.
_MAX_TIME: Final = 253_402_300_799
_FILE_MODE: Final = 0o640
#: How often, and with which pause in seconds, a lock is tried that somebody may only be looking at.
_TRIES: Final = 20
_TRY_S: Final = 0.01
_RUN: Final = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._\-]*):([0-9]{8}T[0-9]{6}Z-(?:[0-9a-f]{4}){1,2})")


@dataclass(slots=True)
class Run:
    """One run of a job, as its history has it."""

    id: str  #: `NAME:20260102T030405Z-1a2b`
    job: str
    type: str
    start: float  #: Unix seconds
    pid: int
    end: float | None = None
    state: str = "running"  #: `running`, `ok`, `warnings`, `failed`, `interrupted`, `killed`
    warnings: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None
    result: dict[str, Any] | None = None  #: a few figures; which ones depends on the type

    def to_json(self) -> dict[str, Any]:
        """One element of `fleece job history`."""
        return {
            "run": self.id,
            "job": self.job,
            "type": self.type,
            "state": self.state,
            "start": int(self.start),
            "end": None if self.end is None else int(self.end),
            "duration-s": None if self.end is None else round(self.end - self.start, 3),
            "pid": self.pid,
            "warnings": self.warnings,
            "error": self.error,
            "result": self.result,
        }


class LogFile(io.TextIOBase):
    """A log with the time before each line; once it is full or the disk is, it takes no more and does not complain."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
        self._left = MAX_LOG_SIZE
        self._line = ""

    def write(self, text: str) -> int:
        """Take `text`; whole lines go to the file."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._put(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n")
        return len(text)

    def _put(self, line: str) -> None:
        raw = line.encode(errors="backslashreplace")
        if self._left <= 0:
            return
        self._left -= len(raw)
        if self._left <= 0:
            raw = b"(the log is full; what follows is left out)\n"
        with suppress(OSError):
            os.write(self._fd, raw)

    def close(self) -> None:
        """Write what is left of a line, and close the file."""
        if not self.closed:
            if self._line:
                self.write("\n")
            os.close(self._fd)
        super().close()


class Recording:
    """A run that is under way: its log, and where its end is written."""

    def __init__(self, store: "JobStore", run: Run, log: io.TextIOBase, problems: list[str]) -> None:
        self.run, self.log = run, log
        self.problems = problems  #: why it is recorded in part only
        self._store = store
        self._begun = _uptime()

    def end(
        self,
        state: str,
        *,
        warnings: list[str] | None = None,
        error: FleeceError | None = None,
        result: dict[str, Any] | None = None,
    ) -> None:
        """Write how it ended.

        Raises:
            FleeceError: the history cannot be written.
        """
        run = self.run
        # Not the clock's time: it may have been set meanwhile.
        run.end, run.state, run.result = run.start + _uptime() - self._begun, state, result
        run.warnings = [text[:_MAX_TEXT] for text in (warnings or [])[:100]]
        if error is not None:
            parts = {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
            run.error = {name: text[:_MAX_TEXT] for name, text in parts.items()}
        self._store.append(
            {"run": run.id, "event": "end", "end": run.end, "state": state, "warnings": run.warnings,
             "error": run.error, "result": result}
        )  # fmt: skip


class JobStore:
    """The runs of one job, in `folder`."""

    def __init__(self, state_dir: Path, name: str) -> None:
        self.name = name
        self.folder = state_dir / "jobs" / name

    @contextmanager
    def begin(self, kind: str) -> Iterator[Recording]:
        """Record a run while the block lasts; the caller says how it ended. Old runs and their logs go.

        Raises:
            BusyError: the job is running.
            FleeceError: the folder cannot be written.
        """
        try:
            (self.folder / "logs").mkdir(mode=0o755, parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        except OSError as error:
            raise self._error("run the job", error) from error
        try:
            if not _lock(lock):
                raise BusyError("run the job", self.name, f"it is running already{self._since()}")
            now = time.time()
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
            run = Run(f"{self.name}:{stamp}-{secrets.token_hex(4)}", self.name, kind, now, os.getpid())
            start = {"run": run.id, "event": "start", "type": kind, "start": now, "pid": run.pid}
            problems: list[str] = []
            for step in (self._rotate, lambda: self.append(start)):
                try:
                    step()
                except FleeceError as error:
                    problems.append(str(error))
            log: io.TextIOBase
            try:
                log = LogFile(self.log_path(run.id))
            except OSError as error:
                problems.append(str(self._error("write the log of the job", error)))
                log = io.StringIO()
            try:
                yield Recording(self, run, log, problems)
            finally:
                log.close()
        finally:
            os.close(lock)

    def _since(self) -> str:
        runs = self.runs()
        return f", as {runs[-1].id} (process {runs[-1].pid})" if runs and runs[-1].state == "running" else ""

    def running(self) -> bool:
        """True if a run is under way."""
        try:
            fd = os.open(self.folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def runs(self) -> list[Run]:
        """All runs that are remembered, oldest first; lines that are damaged are passed over.

        Raises:
            FleeceError: the history cannot be read.
        """
        running, runs = self.running(), self._known()
        if not running and runs and runs[-1].state == "running":
            # Killed, or it began right now: who does that holds the lock, or has written the end.
            running, runs = self.running(), self._known()
        for number, run in enumerate(runs):
            if run.state == "running" and not (running and number == len(runs) - 1):
                run.state = "killed"
        return runs

    def _known(self) -> list[Run]:
        found: dict[str, Run] = {}
        for entry in self._lines():
            with suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
                self._take(found, entry)
        return list(found.values())

    def _take(self, found: dict[str, Run], entry: dict[str, Any]) -> None:
        run_id = str(entry["run"])
        if entry["event"] == "start":
            found[run_id] = Run(run_id, self.name, str(entry["type"]), _time(entry["start"]), int(entry["pid"]))
        elif entry["event"] == "end":
            run = found[run_id]
            end, error, result = _time(entry["end"]), entry["error"], entry["result"]
            if error is not None:
                error = {name: str(error[name]) for name in ("what", "where", "why", "hint")}
            if result is not None and not isinstance(result, dict):
                raise ValueError("no figures")
            run.warnings, run.error, run.result = list(map(str, entry["warnings"])), error, result
            run.end, run.state = end, str(entry["state"])

    def _lines(self) -> list[dict[str, Any]]:
        try:
            with (self.folder / "history.jsonl").open("rb") as file:
                # The newest count. A line that this cuts is none.
                file.seek(max(0, os.fstat(file.fileno()).st_size - _MAX_HISTORY))
                raw = file.read(_MAX_HISTORY)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._error("read the history of the job", error) from error
        entries = []
        for line in raw.splitlines():
            with suppress(ValueError, RecursionError):
                entries.append(json.loads(line))
        return [entry for entry in entries if isinstance(entry, dict)]

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line to the history; the caller holds the lock.

        Raises:
            FleeceError: it cannot be written.
        """
        text = json.dumps(entry)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            fd = os.open(self.folder / "history.jsonl", flags, _FILE_MODE)
            try:
                size = os.fstat(fd).st_size
                # What a crash cut off must not swallow this line too.
                torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
                line = f"{'' if not torn else chr(10)}{text}\n".encode()
                if os.write(fd, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(fd)
        except OSError as error:
            raise self._error("write the history of the job", error) from error

    def _rotate(self) -> None:
        """Forget the oldest runs, so that with the one that begins there are `KEPT_RUNS`; the caller holds the lock."""
        entries = self._lines()
        known = list(dict.fromkeys(str(entry.get("run")) for entry in entries if entry.get("event") == "start"))
        kept = set(known[-(KEPT_RUNS - 1) :])
        try:
            if len(known) >= KEPT_RUNS or self._size() > _MAX_HISTORY:
                new = self.folder / "history.new"
                lines = [json.dumps(entry) for entry in entries if str(entry.get("run")) in kept]
                new.write_text("".join(f"{line}\n" for line in lines))
                new.chmod(_FILE_MODE)
                new.replace(self.folder / "history.jsonl")
            for path in (self.folder / "logs").iterdir():
                if f"{self.name}:{path.stem}" not in kept:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise self._error("rotate the history of the job", error) from error

    def _size(self) -> int:
        try:
            return (self.folder / "history.jsonl").stat().st_size
        except FileNotFoundError:
            return 0

    def log_path(self, run_id: str) -> Path:
        """Where the log of a run lies."""
        return self.folder / "logs" / f"{run_id.rpartition(':')[2]}.log"

    def read_log(self, run_id: str) -> str:
        """The log of a run.

        Raises:
            NotFoundError: no such run, or its log is gone.
        """
        try:
            return self.log_path(run_id).read_bytes().decode(errors="replace")
        except FileNotFoundError:
            hint = f"'fleece job history {self.name}' shows the runs that are kept"
            raise NotFoundError("read the log of", run_id, "there is no such run", hint) from None
        except OSError as error:
            raise self._error("read the log of", error) from error

    def _error(self, what: str, error: OSError) -> FleeceError:
        return FleeceError(what, f"{self.name} in {self.folder}", os_reason(error))


def _lock(fd: int) -> bool:
    """Take the lock of a job; who only looks whether it runs holds it for microseconds, which does not count."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_TRY_S)
        else:
            return True
    return False


def _uptime() -> float:
    """Seconds that nobody sets, suspended ones included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _time(value: Any) -> float:
    """A time as a history may have it; NaN and the like are none."""
    seconds = float(value)
    if not 0 <= seconds <= _MAX_TIME:
        raise ValueError("no time")
    return seconds


def split_run(text: str) -> tuple[str, str | None]:
    """The job and the run that `text` names: `NAME:20260102T030405Z-1a2b`, or a job alone."""
    match = _RUN.fullmatch(text)
    return (match[1], text) if match else (text, None)


def recorded_jobs(state_dir: Path) -> list[str]:
    """Names of all jobs that have ever run, also those that no longer stand in the configuration."""
    try:
        return sorted(path.name for path in (state_dir / "jobs").iterdir() if path.is_dir())
    except OSError:
        return []
