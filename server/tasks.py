"""Tasks: what the server does on behalf of somebody, with a log each, listed after their end and after a restart.

Folder `tasks` of the server's state:

    lock                held by the server that runs
    index               a line per start ("S UPID") and per end ("E UPID ENDTIME STATUS")
    log/XX/HASH         the log of a task, HASH from its UPID
    stop/HASH           somebody asks for a task to be stopped (`fleece task stop`)
"""

import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Final, TextIO

import trio

from core.errors import FleeceError, FormatError, os_reason
from core.limits import in_io_thread
from core.nursery import open_nursery
from core.progress import Progress
from datastore.s3.counters import TaskCost, counted_for
from datastore.upid import Upid
from server.errors import ApiError, ServerError

_LOG = logging.getLogger(__name__)
OK: Final = "OK"
ABORTED: Final = "task aborted"
UNKNOWN: Final = "unknown"
#: Ended tasks that are kept in the list, with their logs.
KEPT: Final = 5000
#: Bytes of one log; what comes then is left out.
MAX_LOG: Final = 16 << 20
#: Tasks that requests may have started and that have not ended.
MAX_STARTED: Final = 64
#: Characters of a line.
_MAX_LINE: Final = 8192
#: What would end a line, or speak to the terminal of somebody who reads it.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
#: Tries to take the lock, and seconds between them: a command may look at it for a moment.
_LOCK_TRIES: Final = 20
_LOCK_PAUSE_S: Final = 0.05
#: Seconds between two looks for requests to stop.
_WATCH_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """One task as listed."""

    upid: Upid
    end: int | None = None  #: Unix seconds; None: running
    status: str | None = None  #: None: running


def _name(upid: str) -> str:
    return hashlib.sha256(upid.encode()).hexdigest()[:40]


class TaskFiles:
    """The files, for the server and for commands beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder
        self._index: Final = folder / "index"

    def log_path(self, upid: str) -> Path:
        """Where the log of a task lies."""
        name = _name(upid)
        return self.folder / "log" / name[:2] / name

    def load(self) -> dict[str, TaskInfo]:
        """All tasks by UPID, oldest first. Those without an end may be running, or their server was killed.

        Raises:
            ServerError: the files cannot be read.
        """
        tasks: dict[str, TaskInfo] = {}
        try:
            with self._index.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    kind, _, rest = line.rstrip("\n").partition(" ")
                    upid, _, end = rest.partition(" ")
                    with suppress(FormatError, ValueError):
                        if kind == "S":
                            tasks[upid] = TaskInfo(Upid.parse(upid))
                        elif kind == "E" and upid in tasks:
                            stamp, whole, status = end.partition(" ")
                            if whole:
                                tasks[upid] = TaskInfo(tasks[upid].upid, int(stamp), status)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ServerError("read the list of tasks", str(self._index), os_reason(error)) from error
        return tasks

    def write(self, tasks: dict[str, TaskInfo]) -> None:
        """Replace the list."""
        lines = []
        for upid, task in tasks.items():
            lines.append(f"S {upid}\n")
            if task.end is not None:
                lines.append(f"E {upid} {task.end} {task.status}\n")
        temporary = self._index.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name with nothing in it
        temporary.replace(self._index)

    def note(self, line: str) -> None:
        """Add a line to the list, or nothing of it.

        Raises:
            OSError: it cannot be written.
        """
        data = f"{line}\n".encode()
        descriptor = os.open(self._index, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            end = os.fstat(descriptor).st_size
            if end and os.pread(descriptor, 1, end - 1) != b"\n":
                data = b"\n" + data  # behind a line that a killed server did not end
            try:
                written = os.write(descriptor, data)
                if written < len(data):  # almost full
                    os.write(descriptor, data[written:])
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)

    def log_lines(self, upid: str, first: int = 0, count: int | None = None) -> tuple[list[str], int]:
        """Lines of a log from number `first` (from 0), at most `count`, and how many it has; none if there is none."""
        try:
            with self.open_log(upid) as file:
                skipped = sum(1 for _ in islice(file, first))
                found = [line.removesuffix("\n") for line in islice(file, count)]
                return found, skipped + len(found) + sum(1 for _ in file)
        except OSError:
            return [], 0

    def open_log(self, upid: str) -> TextIO:
        """The log, to read.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        # Only LF ends a line: it may have characters that others take for the end of one.
        return self.log_path(upid).open(encoding="utf-8", errors="replace", newline="\n")

    def lock(self) -> int:
        """Take the folder for a server; gives the descriptor to close in the end.

        Raises:
            ServerError: another server uses it.
            OSError: the lock cannot be made.
        """
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for left in reversed(range(_LOCK_TRIES)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if left:
                    time.sleep(_LOCK_PAUSE_S)
                    continue
                os.close(descriptor)
                why = "another 'fleece serve' uses it"
                raise ServerError("use the folder of tasks", str(self.folder), why, "one is enough") from None
            return descriptor
        raise AssertionError

    def server_runs(self) -> bool:
        """True if a server has the folder."""
        try:
            descriptor = os.open(self.folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return False

    def listed(self) -> dict[str, TaskInfo]:
        """As `load`, but those of a server that was killed have the status `unknown`."""
        runs = self.server_runs()  # first: what a server notes after that is found
        return {
            upid: task if task.end is not None or runs else TaskInfo(task.upid, None, UNKNOWN)
            for upid, task in self.load().items()
        }

    def ask_to_stop(self, upid: str) -> None:
        """Leave a request that the server finds within a second or so."""
        folder = self.folder / "stop"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / _name(upid)).touch()

    def requests_to_stop(self) -> Iterator[str]:
        """The hashes of tasks that are to be stopped; each request is given once."""
        with suppress(OSError):
            for path in (self.folder / "stop").iterdir():
                path.unlink(missing_ok=True)
                yield path.name


class Task(Progress):
    """A running task: its log takes what the work has to tell."""

    def __init__(self, upid: Upid, path: Path) -> None:
        super().__init__()
        self.upid: Final = upid
        self.scope: Final = trio.CancelScope()
        self.stopped = False  #: somebody asked for its end
        self.over: Final = trio.Event()
        self._written = 0
        self._broken = False
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Lines are short and go to the page cache: a thread for each would cost more than they do.
        self._file: Final = path.open("w", encoding="utf-8", errors="replace")

    def __str__(self) -> str:
        return str(self.upid)

    def log(self, text: str) -> None:
        """Add a line (or several) to the log; on a full disk it is lost, the work goes on."""
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        full = "".join(f"{stamp}: {_printable(line)}\n" for line in text.split("\n"))
        if self._written > MAX_LOG:
            return
        self._written += len(full)
        try:
            self._file.write(full)
            self._file.flush()
            self._broken = False
        except OSError as error:
            if not self._broken:
                _LOG.warning("the log of task %s cannot be written: %s", self.upid, os_reason(error))
            self._broken = True

    def warn(self, text: str) -> None:
        """See `Progress.warn`."""
        super().warn(text)
        self.log(f"WARN: {text}")

    def stop(self) -> None:
        """End the task."""
        self.stopped = True
        self.scope.cancel()

    def close(self) -> None:
        """Close the log."""
        with suppress(OSError):  # it has been said that it cannot be written
            self._file.close()


def _printable(line: str) -> str:
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", line[:_MAX_LINE])


class Tasks:
    """The running tasks of this server, and the list of those that were."""

    def __init__(self, folder: Path) -> None:
        self.files: Final = TaskFiles(folder)
        self._known: dict[str, TaskInfo] = {}
        self._running: dict[str, Task] = {}
        self._started = 0
        self._lines = 0  #: of the file
        self._nursery: trio.Nursery | None = None

    def _locked(self) -> int:
        try:
            self.files.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self.files.lock()
        except OSError as error:
            raise ServerError("use the folder of tasks", str(self.files.folder), os_reason(error)) from error

    def prepare(self) -> None:
        """Read the list; tasks of a server that was killed count as ended.

        Raises:
            ServerError: the folder cannot be used.
        """
        try:
            known = self.files.load()
            for upid, task in known.items():
                if task.end is None:
                    known[upid] = TaskInfo(task.upid, int(time.time()), UNKNOWN)
            for upid in list(known)[: max(0, len(known) - KEPT)]:
                del known[upid]
                self.files.log_path(upid).unlink(missing_ok=True)
            self.files.write(known)
            list(self.files.requests_to_stop())
        except OSError as error:
            raise ServerError("use the folder of tasks", str(self.files.folder), os_reason(error)) from error
        self._known = known
        self._lines = 2 * len(known)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Tasks can be started while the block runs; those that still run at its end are cancelled.

        Raises:
            ServerError: the folder cannot be used, or another server uses it.
        """
        lock = await in_io_thread(self._locked)
        try:
            await in_io_thread(self.prepare)
            async with open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._watch)
                try:
                    yield
                finally:
                    nursery.cancel_scope.cancel()
                    self._nursery = None
        finally:
            os.close(lock)

    async def _watch(self) -> None:
        while True:
            await trio.sleep(_WATCH_S)
            for name in await in_io_thread(lambda: list(self.files.requests_to_stop())):
                for upid, task in self._running.items():
                    if _name(upid) == name:
                        task.stop()

    # The list.

    def infos(self) -> list[TaskInfo]:
        """All tasks, running ones first, each kind newest first."""
        ended = [task for task in self._known.values() if task.end is not None]
        return [self._known[upid] for upid in reversed(self._running)] + ended[::-1]

    def info(self, upid: str) -> TaskInfo | None:
        """One task, None if it is not in the list."""
        return self._known.get(upid)

    def get(self, upid: str) -> Task | None:
        """A running task."""
        return self._running.get(upid)

    @property
    def busy(self) -> int:
        """Tasks that run."""
        return len(self._running)

    # Running.

    @asynccontextmanager
    async def task(
        self, kind: str, worker_id: str, auth_id: str, *, cost: TaskCost | None = None
    ) -> AsyncIterator[Task]:
        """A task that lasts as long as the block, which ends quietly when somebody stops it.

        An error of the block becomes its status and goes on to the caller. At its end the log says what the block has
        needed of buckets, with what was counted for `cost` before it began.

        Raises:
            ServerError: its log cannot be made.
        """
        upid = Upid.new(kind, worker_id, auth_id=auth_id)
        text = str(upid)
        try:
            task = await in_io_thread(self._begun, upid)
        except OSError as error:
            raise ServerError("start the task", f"{kind} {worker_id}", os_reason(error)) from error
        self._known[text] = TaskInfo(upid)
        self._running[text] = task
        self._lines += 1
        status = ABORTED
        cost = TaskCost() if cost is None else cost
        cost.warn = task.warn
        try:
            with task.scope, counted_for(cost):
                yield task
            if not task.stopped:
                count = len(task.warnings)
                status = f"WARNINGS: {count}" if count else OK
        except Exception as error:
            status = _status(error)
            raise
        finally:
            for line in cost.lines():
                task.log(line)
            self._end(task, status)

    def _begun(self, upid: Upid) -> Task:
        text = str(upid)
        path = self.files.log_path(text)
        task = Task(upid, path)
        try:
            self.files.note(f"S {text}")
        except OSError:
            task.close()
            path.unlink(missing_ok=True)
            raise
        return task

    def _end(self, task: Task, status: str) -> None:
        text = str(task)
        status = " ".join(status.split())[:1000] or UNKNOWN
        task.log("TASK OK" if status == OK else f"TASK {status}" if status.startswith("WARNINGS: ") else
                 f"TASK ERROR: {status}")  # fmt: skip
        task.close()
        task.over.set()
        self._running.pop(text, None)
        end = int(time.time())
        self._known[text] = TaskInfo(task.upid, end, status)
        try:
            ended = [upid for upid, info in self._known.items() if info.end is not None]
            for upid in ended[: max(0, len(ended) - KEPT)]:
                del self._known[upid]
                self.files.log_path(upid).unlink(missing_ok=True)
            self.files.note(f"E {text} {end} {_printable(status)}")
            self._lines += 1
            if self._lines > 6 * KEPT:  # a server runs for years
                self.files.write(self._known)
                self._lines = 2 * len(self._known)
        except OSError:
            _LOG.exception("the end of task %s could not be recorded", text)

    async def start(self, kind: str, worker_id: str, auth_id: str, work: Callable[[Task], Awaitable[None]]) -> str:
        """Start `work` as a task of its own and return its UPID."""
        if self._nursery is None:
            raise ApiError("the server is going down")
        if self._started >= MAX_STARTED:
            raise ApiError(f"{MAX_STARTED} tasks are running already, try again later")
        upid: str = await self._nursery.start(self._run, kind, worker_id, auth_id, work)
        return upid

    async def _run(
        self,
        kind: str,
        worker_id: str,
        auth_id: str,
        work: Callable[[Task], Awaitable[None]],
        *,
        task_status: "trio.TaskStatus[str]" = trio.TASK_STATUS_IGNORED,
    ) -> None:
        begun = False
        self._started += 1
        try:
            async with self.task(kind, worker_id, auth_id) as task:
                begun = True
                task_status.started(str(task))
                await work(task)
        except Exception as error:
            if not begun:
                raise  # whoever asked for it is told
            if not isinstance(error, FleeceError | ApiError):  # those say it in its status
                _LOG.exception("task %s of %s failed unexpectedly", kind, auth_id)
        finally:
            self._started -= 1


def _status(error: Exception) -> str:
    if isinstance(error, ApiError):
        return error.message
    return str(error) if isinstance(error, FleeceError) else f"internal error ({type(error).__name__})"
