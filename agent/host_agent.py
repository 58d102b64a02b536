"""`fleece agent`: runs the jobs of the configuration when they are due, each in a process of its own.

The agent itself stays small: what a job needs is imported in its process, and given back with it. A job that crashes
takes nothing along, and one that is ended cleans up as `fleece job run` does. docs/agent.md.
"""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Final

import trio

from agent.due_jobs import DueJobs
from agent.job_store import JobStore
from core.errors import BusyError, ExitCode, FleeceError, os_reason
from core.limits import in_io_thread
from core.nursery import open_nursery
from core.systemd import notify, watchdog_s

if TYPE_CHECKING:
    from agent.config import Config
    from agent.monitoring.watching import AgentWatch

#: Seconds at most between two looks at the clock: it may be set, and the host may have slept.
_LOOK_S: Final = 60.0
#: Seconds that jobs have to clean up when the agent ends; then they are killed.
STOP_TIMEOUT_S: Final = 300.0
#: Seconds that a job has to be gone when it was killed; one that waits for a dead disk is not, and is left alone.
_KILLED_S: Final = 10.0
#: Seconds by which systemd is asked for more time, again and again, while jobs clean up.
_EXTEND_S: Final = 30.0
#: Variables that belong to the agent and not to its jobs.
_OWN_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")

#: Exit codes of a job that has done what it was to do.
_DONE: Final = (ExitCode.DONE, ExitCode.WARNINGS)

#: Runs a job to its end and returns its exit code. Cancelled, it ends the job first; of one that was done all the same
#: it returns the code.
RunJob = Callable[[str], Awaitable[int]]


@dataclass(slots=True)
class ChildRunner:
    """Runs jobs as `fleece job run NAME`; what they say goes to where the agent's own words go.

    They get the configuration that the agent has, not what its file has become meanwhile: while it is being edited, or
    after a reload that was refused, jobs could not even begin with that.
    """

    config: str | None = None  #: the text of the configuration; None: the file is read
    stop_timeout_s: float = STOP_TIMEOUT_S
    program: Sequence[str] = (sys.executable, "-P", "-m", "agent.main")

    async def __call__(self, name: str) -> int:
        """See `RunJob`.

        Raises:
            FleeceError: no process can be started.
        """
        return await self.command("job", "run", name)

    async def refresh(self, *arguments: str) -> int:
        """Run `fleece metrics refresh`; see `RunJob`.

        Raises:
            FleeceError: no process can be started.
        """
        return await self.command("metrics", "refresh", *arguments)

    async def command(self, *arguments: str) -> int:
        """Run `fleece` with `arguments`; see `RunJob`.

        Raises:
            FleeceError: no process can be started.
        """
        line = [*self.program, *arguments, "--quiet"]
        environment = {key: value for key, value in os.environ.items() if key not in _OWN_VARIABLES}
        try:
            # In memory: a full disk does not matter, nobody else can read it, and nothing is left of it.
            with open(os.memfd_create("fleece-config"), "wb") as file:  # noqa: PTH123, ASYNC230
                if self.config is not None:
                    file.write(self.config.encode())
                    file.flush()
                    line += ["--config", f"/proc/self/fd/{file.fileno()}"]
                process = await trio.lowlevel.open_process(
                    line, stdin=DEVNULL, stdout=DEVNULL, env=environment, start_new_session=True,
                    pass_fds=(file.fileno(),),
                )  # fmt: skip
        except OSError as error:
            raise FleeceError("start", f"'fleece {' '.join(arguments)}'", os_reason(error)) from error
        try:
            return await process.wait()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                code = await self._end(process)
            if code is not None and code in _DONE:  # it was in its last steps, and is not to be run again
                return code
            raise

    async def _end(self, process: trio.Process) -> int | None:
        """End a process that may have ended by itself; its exit code, negative if a signal ended it.

        None: it cannot be killed, and is not waited for.
        """
        if process.poll() is None:
            process.terminate()
            with trio.move_on_after(self.stop_timeout_s):
                await process.wait()
        if process.poll() is None:
            process.kill()
            with trio.move_on_after(_KILLED_S):
                await process.wait()
        return process.poll()


@dataclass
class HostAgent:
    """The service."""

    load: "Callable[[], Config]"  #: reads the configuration anew
    run_job: RunJob
    state_dir: Path
    say: Callable[[str], None]
    now: Callable[[], float] = time.time
    watch: "AgentWatch | None" = None  #: events, metrics, page
    _running: set[str] = field(default_factory=set)
    _wake: trio.Event = field(default_factory=trio.Event)
    _stopping: bool = False
    _looked: float = 0.0

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Run jobs until `stop` is called; those that run then are ended, and clean up.

        Raises:
            BusyError: another agent runs on this host.
            FleeceError: the configuration is not valid at the start, or the state folder cannot be used.
        """
        with _only_one(self.state_dir / "agent"):
            await self._run(task_status)

    async def _run(self, task_status: "trio.TaskStatus[None]") -> None:
        self._due = DueJobs(self.state_dir / "agent", self.now)
        await self._take(self.load())
        self._looked = trio.current_time()
        self._scope = trio.CancelScope()
        async with open_nursery() as outer:
            outer.start_soon(self._beat)
            if self.watch is not None:
                outer.start_soon(self.watch.run)
            notify("READY=1", self._status())
            task_status.started()
            with self._scope:
                async with open_nursery() as nursery:
                    await self._loop(nursery)
            outer.cancel_scope.cancel()

    async def reload(self) -> None:
        """Read the configuration again; one that is not valid changes nothing. Jobs that run are left alone."""
        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            await self._take(await in_io_thread(self.load))
            self.say("the configuration was read again")
            notify("READY=1", self._status())
        except FleeceError as error:
            if self.watch is not None:
                self.watch.refused(error)
            self.say(f"the old configuration stays in use: {error}")
            notify("READY=1", f"STATUS=The old configuration is in use: {error}")
        self._look()

    def stop(self) -> None:
        """End jobs that run, and then `run`."""
        if self._stopping:
            return
        self._stopping = True
        notify("STOPPING=1", f"STATUS=Ending {len(self._running)} jobs")
        if self._running:
            self.say(f"ending; waiting until these jobs have cleaned up: {', '.join(sorted(self._running))}")
        self._scope.cancel()

    def _look(self) -> None:
        self._wake.set()

    async def _take(self, config: "Config") -> None:
        # A history is read whole: not while the watchdog waits.
        starts = await in_io_thread(_last_starts, self.state_dir, [*config.job])
        self._noted(lambda: self._due.take(config.job, starts.get, self._running))
        if self.watch is not None:
            self.watch.take(config)

    def _noted(self, note: Callable[[], None]) -> None:
        """Note what is known of jobs; a full disk must not keep them, garbage collection among them, from running."""
        try:
            note()
        except FleeceError as error:
            self.say(str(error))

    async def _loop(self, nursery: trio.Nursery) -> None:
        while True:
            self._looked = trio.current_time()
            for name in self._due.due():
                self._begin(nursery, name)
            self._wake = trio.Event()
            coming = self._due.next()
            wait_s = _LOOK_S if coming is None else min(max(coming[0] - self.now(), 0.0), _LOOK_S)
            with trio.move_on_after(wait_s):
                await self._wake.wait()

    def _begin(self, nursery: trio.Nursery, name: str) -> None:
        if name in self._running:
            self.say(f"job {name} is due, but still runs: this time is left out")
            self._noted(lambda: self._due.begin(name, begun=False))
            if self.watch is not None:
                self.watch.left_out(name)
            return
        self._noted(lambda: self._due.begin(name))
        self._running.add(name)
        self.say(f"job {name} begins")
        notify(self._status())
        nursery.start_soon(self._job, name)

    async def _job(self, name: str) -> None:
        begun = self.now()
        code: int = ExitCode.FAILED
        try:
            code = await self.run_job(name)
            words = {0: "has ended", 3: "has ended with warnings"}.get(code, f"has failed (exit code {code})")
            self.say(f"job {name} {words}; 'fleece job log {name}' has the details")
        except FleeceError as error:
            self.say(f"job {name}: {error}")
        finally:
            self._running.discard(name)
        # What the agent's end cut off is made up for at its next start.
        if code in _DONE or not self._stopping:
            self._noted(lambda: self._due.end(name))
        if not self._stopping:
            notify(self._status())
            if self.watch is not None:
                await self.watch.job_ended(name, code, begun)

    async def _beat(self) -> None:
        """Tell systemd that the loop goes on, and while jobs clean up that this takes its time."""
        patience = watchdog_s()
        pause = min(patience / 3 if patience else _EXTEND_S / 3, _EXTEND_S / 3)
        while True:
            if self._stopping:
                notify("WATCHDOG=1", f"EXTEND_TIMEOUT_USEC={int(_EXTEND_S * 1e6)}")
            elif trio.current_time() - self._looked < 3 * _LOOK_S:
                notify("WATCHDOG=1")
            await trio.sleep(pause)

    def _status(self) -> str:
        if self._running:
            return f"STATUS=Running: {', '.join(sorted(self._running))}"
        coming = self._due.next()
        if coming is None:
            return "STATUS=No job has a schedule"
        return f"STATUS=Next: {coming[1]} at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(coming[0]))}"


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep a second agent of this state folder out while the block runs."""
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise FleeceError("use the agent's state in", str(folder), os_reason(error)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BusyError("run", "the agent", f"another one runs already and uses {folder}") from None
    try:
        yield
    finally:
        os.close(lock)


def _last_starts(state_dir: Path, names: Sequence[str]) -> dict[str, float]:
    """When each job was begun last; a history that cannot be read says nothing."""
    found = {}
    for name in names:
        try:
            runs = JobStore(state_dir, name).runs()
        except FleeceError:
            continue
        if runs:
            found[name] = runs[-1].start
    return found


async def run_until_signal(agent: HostAgent) -> None:
    """Run `agent` until SIGTERM or SIGINT; SIGHUP reads the configuration again.

    Raises:
        FleeceError: as `HostAgent.run`.
    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with open_nursery() as nursery:

            async def watch() -> None:
                async for number in signals:
                    if number == signal.SIGHUP:
                        await agent.reload()
                    else:
                        agent.stop()

            async def work(task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
                await agent.run(task_status=task_status)
                nursery.cancel_scope.cancel()

            await nursery.start(work)
            nursery.start_soon(watch)
