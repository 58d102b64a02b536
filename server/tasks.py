"""Tasks: what the server does on behalf of somebody, with a log each, listed after their end and after a restart.

Folder `tasks` of the server's state:

    index               a line per start ("S UPID") and per end ("E UPID ENDTIME STATUS")
    log/XX/HASH         the log of a task, HASH from its UPID
    stop/HASH           somebody asks for a task to be stopped (`fleece task stop`)
"""

import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import trio

from core.errors import FleeceError, FormatError, os_reason
from core.limits import in_io_thread
from core.nursery import open_nursery
from core.progress import Progress
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
#: Characters of a line.
_MAX_LINE: Final = 8192
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
                            stamp, _, status = end.partition(" ")
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
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(self._index)

    def note(self, line: str) -> None:
        """Add a line to the list."""
        with self._index.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def read_log(self, upid: str) -> list[str]:
        """The lines of a log; none if there is none."""
        try:
            text = self.log_path(upid).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return text.splitlines()

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
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Lines are short and go to the page cache: a thread for each would cost more than they do.
        self._file: Final = path.open("w", encoding="utf-8", errors="replace")

    def __str__(self) -> str:
        return str(self.upid)

    def log(self, text: str) -> None:
        """Add a line (or several) to the log."""
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        for line in text.splitlines() or [""]:
            if self._written > MAX_LOG:
                return
            full = f"{stamp}: {line[:_MAX_LINE]}\n"
            self._written += len(full)
            self._file.write(full)
        self._file.flush()

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
        self._file.close()


class Tasks:
    """The running tasks of this server, and the list of those that were."""

    def __init__(self, folder: Path) -> None:
        self.files: Final = TaskFiles(folder)
        self._known: dict[str, TaskInfo] = {}
        self._running: dict[str, Task] = {}
        self._nursery: trio.Nursery | None = None

    def prepare(self) -> None:
        """Read the list; tasks of a server that was killed count as ended.

        Raises:
            ServerError: the folder cannot be used.
        """
        try:
            self.files.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Tasks can be started while the block runs; those that still run at its end are cancelled."""
        await in_io_thread(self.prepare)
        async with open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._watch)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()
                self._nursery = None

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
    async def task(self, kind: str, worker_id: str, auth_id: str) -> AsyncIterator[Task]:
        """A task that lasts as long as the block, which ends quietly when somebody stops it.

        An error of the block becomes its status and goes on to the caller.
        """
        upid = Upid.new(kind, worker_id, auth_id=auth_id)
        text = str(upid)
        task = await in_io_thread(Task, upid, self.files.log_path(text))
        self._known[text] = TaskInfo(upid)
        self._running[text] = task
        self.files.note(f"S {text}")
        status = ABORTED
        try:
            with task.scope:
                yield task
            if not task.stopped:
                count = len(task.warnings)
                status = f"WARNINGS: {count}" if count else OK
        except Exception as error:
            status = _status(error)
            raise
        finally:
            self._end(task, status)

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
            self.files.note(f"E {text} {end} {status}")
            ended = [upid for upid, info in self._known.items() if info.end is not None]
            for upid in ended[: max(0, len(ended) - KEPT)]:
                del self._known[upid]
                self.files.log_path(upid).unlink(missing_ok=True)
        except OSError:
            _LOG.exception("the end of task %s could not be recorded", text)

    async def start(self, kind: str, worker_id: str, auth_id: str, work: Callable[[Task], Awaitable[None]]) -> str:
        """Start `work` as a task of its own and return its UPID."""
        if self._nursery is None:
            raise ApiError("the server is going down")
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
        try:
            async with self.task(kind, worker_id, auth_id) as task:
                task_status.started(str(task))
                await work(task)
        except (FleeceError, ApiError):
            pass  # its status says it
        except Exception:
            _LOG.exception("task %s of %s failed unexpectedly", kind, auth_id)


def _status(error: Exception) -> str:
    if isinstance(error, ApiError):
        return error.message
    return str(error) if isinstance(error, FleeceError) else f"internal error ({type(error).__name__})"
