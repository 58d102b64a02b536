"""The one place that every run of a job goes through: events, what is kept of it, looks, notifications, metrics.

Nothing in here fails a job or adds to its warnings: what cannot be told is written to its log, and counted.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from agent.errors import first_cause
from agent.job_store import JobStore, Run
from agent.monitoring.events import EventLog
from agent.monitoring.messages import Message, last_lines
from agent.monitoring.rules import Pending, TargetState, TargetStates, is_meant
from agent.monitoring.state import locked
from agent.monitoring.summaries import Summary, load_summary, save_summary, uncounted
from agent.monitoring.survey import Surveys, surveyed_repositories
from core.errors import BusyError, FleeceError, NotFoundError
from core.limits import in_io_thread
from core.nursery import grace, open_nursery

if TYPE_CHECKING:
    from agent.config import Config
    from agent.job_backup import GuestResult
    from agent.monitoring.sections import AnyNotify
    from agent.registry import Registry
    from agent.s3_endpoints import EndpointRegistry

#: Seconds for all of it from when the job is being ended.
_ENDING_S: Final = 20.0
#: Runs that ended longer ago are counted, but nobody is told any more.
_NEWS_S: Final = 86_400.0
#: Ends the id of a run that did not begin, in place of eight random digits.
_UNBEGUN: Final = "-0000"
_Say = Callable[[str], None]


@dataclass(slots=True)
class Monitoring:
    """What reports go through, for all jobs of a configuration."""

    config: "Config"
    registry: "Registry"
    state_dir: Path
    say: _Say  #: told what could not be told
    endpoints: "EndpointRegistry | None" = None
    now: Callable[[], float] = time.time
    events: EventLog = field(init=False)

    def __post_init__(self) -> None:
        self.events = EventLog(self.config.events, self.say)

    async def report(self, name: str, current: Run | None = None, *, hurried: bool = False) -> None:
        """Bring what is kept of a job up to date, and tell of the runs that nobody was told of yet.

        Args:
            name: of the job.
            current: the run that has just ended; its history may be out of date, if the disk is full.
            hurried: everything is being ended: one attempt, in little time.
        """
        with ExitStack() as stack:
            lock = locked(self.state_dir / "jobs" / name / "report.lock", patience_s=5.0 if hurried else 60.0)
            try:
                await in_io_thread(stack.enter_context, lock)
            except FleeceError as error:
                if current is None and isinstance(error, BusyError):
                    return  # somebody is at it, and slow; what he does not know of stays for the next time
                # On a full disk people are told all the same.
                self.say(f"not everything can be reported: {error}")
            await self._report(name, current, hurried=hurried)

    async def remember(self, name: str) -> None:
        """Begin to keep something of a job: what it did before is counted, and all that comes is news.

        Raises:
            FleeceError: it cannot be written.
        """
        store = JobStore(self.state_dir, name)
        if await in_io_thread(load_summary, store) is None:
            kept = Summary()
            for run in uncounted(None, await in_io_thread(store.runs)):
                kept.take(run)
            await in_io_thread(save_summary, store, kept)

    async def _report(self, name: str, current: Run | None, *, hurried: bool) -> None:
        store = JobStore(self.state_dir, name)
        try:
            summary = await in_io_thread(load_summary, store)
            runs = await in_io_thread(uncounted, summary, await in_io_thread(store.runs))
        except FleeceError as error:
            self.say(f"not everything can be reported: {error}")
            summary, runs = None, []
        if current is not None:
            runs = [*(run for run in runs if run.id != current.id), current]
        # Of jobs that ran before anything was kept, only what happens now is news.
        news = runs if summary is not None else [run for run in runs if run is current]
        kept = summary or Summary()
        for run in runs:
            kept.take(run)
            if run is not current and run in news:  # nobody else could say so
                self.events.emit("job-end", f"job {name} was {run.state}", **_run_fields(run))
        recent = [run for run in news if run.end is None or self.now() - run.end < _NEWS_S]
        if recent:
            await self.notify(name, recent, hurried=hurried)
        if runs:
            try:
                await in_io_thread(save_summary, store, kept)
            except FleeceError as error:
                self.say(f"not everything can be reported: {error}")

    async def job_ended(self, name: str, code: int, begun: float) -> None:
        """Tell of a run that could not do so itself: it was killed, or did not even begin.

        Args:
            name: of the job.
            code: exit code, or signal below 0.
            begun: when its process was started, Unix seconds.

        Raises:
            FleeceError: its history cannot be read.
        """
        store = JobStore(self.state_dir, name)
        if any(run.start >= begun - 1 for run in await in_io_thread(store.runs)):
            await self.report(name)
        elif not await in_io_thread(store.running):  # somebody else's run, which tells of itself
            await self.not_begun(name, code)
        await self.textfile()

    async def not_begun(self, name: str, code: int) -> None:
        """Tell that a job could not even begin, so that its history says nothing of it."""
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        now = self.now()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        why = f"it did not begin ({how})"
        run = self._unbegun(name, f"{name}:{stamp}{_UNBEGUN}", now, why)
        self.events.emit("job-not-begun", f"job {name}: {why}", job=name, run=run.id, exit_code=code)
        await self.notify(name, [run])

    def _unbegun(self, name: str, run_id: str, moment: float, why: str = "it did not begin") -> Run:
        """A run that no history has."""
        section = self.config.job.get(name)
        run = Run(run_id, name, "unknown" if section is None else section.type, moment, 0, moment, "failed")
        run.error = {"what": "run the job", "where": name, "why": why, "hint": "the agent's journal says why"}
        return run

    async def notify(self, name: str, runs: Sequence[Run], *, hurried: bool = False) -> None:
        """Send what is to be sent about `runs`, and what could not be sent earlier, to all targets side by side."""
        if not self.config.notify:
            return
        async with open_nursery() as nursery:
            for target, section in self.config.notify.items():
                mine = [run for run in runs if is_meant(section, name)]
                nursery.start_soon(self._tell, target, section, mine, hurried)

    async def _tell(self, target: str, section: "AnyNotify", runs: Sequence[Run], hurried: bool) -> None:
        states = TargetStates(self.state_dir)
        keys = [(run.job, run.id, run.state) for run in runs]
        try:
            messages = await in_io_thread(states.decide, target, section, keys, self.now())
        except FleeceError as error:
            self.say(f"notification {target}: what was sent cannot be remembered: {error}")
            forgetful = TargetState()
            messages = [found for key in keys if (found := forgetful.decide(section, *key, self.now())) is not None]
        known = {run.id: run for run in runs}
        for pending in messages:
            message = await in_io_thread(self._message, pending, known.get(pending.run))
            if message is None:  # its run is forgotten by now
                await self._done(states, target, pending, None)
                continue
            await self._deliver(states, target, section, pending, message, hurried)

    async def _deliver(
        self, states: TargetStates, target: str, section: "AnyNotify", pending: Pending, message: Message, hurried: bool
    ) -> None:
        from agent.monitoring.delivery import deliver

        problem: str | None = "it was interrupted"
        fields = {"notification": target, "type": section.type, "kind": pending.kind, "job": pending.job}
        try:
            await deliver(section, message, lambda line: self.say(f"notification {target}: {line}"), hurried=hurried)
            problem = None
            self.say(f"notification {target}: sent ({pending.kind})")
        except FleeceError as error:
            problem = str(error)
            self.say(f"notification {target} failed: {error}")
        finally:
            with trio.CancelScope(shield=True):
                await self._done(states, target, pending, problem)
            outcome = "failed" if problem is not None else "sent"
            self.events.emit(
                "notification", f"notification {target}: {outcome}", **fields, run=pending.run, outcome=outcome,
                error=problem,
            )  # fmt: skip

    async def _done(self, states: TargetStates, target: str, pending: Pending, problem: str | None) -> None:
        try:
            await in_io_thread(states.done, target, pending, problem, self.now())
        except FleeceError as error:
            self.say(f"notification {target}: what was sent cannot be remembered: {error}")

    def _message(self, pending: Pending, run: Run | None) -> Message | None:
        store = JobStore(self.state_dir, pending.job)
        if run is None:
            run = next((one for one in _runs(store) if one.id == pending.run), None)
            if run is None and pending.run.endswith(_UNBEGUN):
                run = self._unbegun(pending.job, pending.run, pending.since)
            if run is None:
                return None
        section = self.config.job.get(pending.job)
        try:
            log = last_lines(store.read_log(run.id))
        except (FleeceError, NotFoundError):
            log = []
        repository = (section.repository if section is not None else None) or self.config.default_repository
        comment = section.comment if section is not None else None
        return Message(pending.kind, run, repository, comment, log, pending.left_out)

    async def survey(self, specs: Iterable[str], *, after_job: bool = False, always: bool = False) -> list[str]:
        """Look at repositories whose time has come; returns what is wrong with some. Nothing without `[metrics]` or
        `[status]`, unless `always`."""
        from agent.cli_verify import parse_duration

        if not always and self.config.metrics is None and self.config.status is None:
            return []
        interval_s = 3600.0 if self.config.metrics is None else parse_duration(self.config.metrics.survey)
        surveys, problems = Surveys(self.state_dir), []
        for spec in specs:
            if not always and not await in_io_thread(
                lambda spec=spec: surveys.is_due(spec, interval_s, after_job=after_job)
            ):
                continue
            before = await in_io_thread(surveys.known, spec)
            try:
                document = await surveys.survey(spec, self.config, self.registry, self._s3())
            except FleeceError as error:
                problems.append(f"repository {spec}: {error}")
                continue
            if document["error"] is not None:
                problems.append(f"repository {spec}: {document['error']}")
            if document["error"] is None or document["error"] != (before or {}).get("error"):
                self._tell_of_store(spec, document)
        return problems

    def _tell_of_store(self, spec: str, document: dict[str, Any]) -> None:
        status = document.get("status") or {}
        words = "cannot be used" if document["error"] else "was looked at"
        figures = {name: status.get(name) for name in ("total", "used", "avail", "unfinished", "verification")}
        self.events.emit(
            "store", f"repository {spec} {words}", repository=spec, error=document["error"],
            duration_s=document["duration-s"], **(figures if document["error"] is None else {}),
        )  # fmt: skip

    def _s3(self) -> Any:
        if self.endpoints is None:
            return None
        from functools import cache

        from agent.s3_use import S3Use

        endpoints = self.endpoints
        return cache(lambda: S3Use(endpoints, self.config.s3))

    async def textfile(self) -> None:
        """Write node_exporter's file, if there is one."""
        if self.config.metrics is None or self.config.metrics.textfile is None:
            return
        from agent.monitoring.metrics import write_textfile
        from agent.monitoring.overview import overview
        from core.errors import os_reason

        path = self.config.metrics.textfile

        def write() -> None:
            write_textfile(path, overview(self.config, self.state_dir, self.now()))

        try:
            await in_io_thread(write)
        except OSError as error:
            self.say(f"cannot write the metrics to {path}: {os_reason(error)}")

    async def refresh(self, *, always: bool = False) -> list[str]:
        """All of it, without a run: runs that were killed, messages that could not be sent, looks, metrics.

        Returns: what is wrong with repositories.
        """
        for name in self.config.job:
            await self.report(name)
        await self.notify("", ())  # once, and not for each job
        problems = await self.survey(surveyed_repositories(self.config), always=always)
        await self.textfile()
        return problems


class JobReport:
    """What a run of a job tells, from its beginning to its end."""

    def __init__(self, monitoring: Monitoring, run: Run, repository: str | None) -> None:
        self._monitoring = monitoring
        self._run = run
        self._repositories = [] if repository is None else [repository]
        self._repository = repository

    async def began(self) -> None:
        """The run has begun. No failure is raised."""
        run = self._run
        await self._safely(self._monitoring.remember(run.job))
        self._monitoring.events.emit(
            "job-start", f"job {run.job} begins", job=run.job, type=run.type, run=run.id, repository=self._repository
        )

    def guest_done(self, result: "GuestResult") -> None:
        """A guest of the run has its backup, or not."""
        run, document = self._run, result.to_json()
        if document["repository"]:
            self._repositories.append(str(document["repository"]))
        message = f"job {run.job}: backup of {document['guest']}: {document['state']}"
        self._monitoring.events.emit("guest-end", message, job=run.job, run=run.id, **document)

    def warned(self, text: str) -> None:
        """The run has warned of something."""
        self._monitoring.events.emit("job-warning", text[:2000], job=self._run.job, run=self._run.id)

    async def ended(self) -> None:
        """The run has ended, as it says itself. No failure is raised.

        Cancelled before or meanwhile, it ends within `_ENDING_S`.
        """
        monitoring, run = self._monitoring, self._run
        hurried = trio.current_effective_deadline() <= trio.current_time()
        monitoring.events.emit(
            "job-end", f"job {run.job} has ended: {run.state}", repository=self._repository, **_run_fields(run)
        )
        async with grace(_ENDING_S):
            await self._safely(monitoring.report(run.job, run, hurried=hurried))
            if not hurried and run.state != "interrupted":
                await self._safely(monitoring.survey(dict.fromkeys(self._repositories), after_job=True))
            await self._safely(monitoring.textfile())

    async def _safely(self, work: Any) -> None:
        try:
            await work
        except Exception as error:
            cause = first_cause(error)
            self._monitoring.say(f"not everything can be reported ({type(cause).__name__}: {cause})")


def _run_fields(run: Run) -> dict[str, Any]:
    """What an event says of a run that has ended; its guests have events of their own."""
    document = run.to_json()
    result = document["result"]
    if isinstance(result, dict):
        document["result"] = {name: value for name, value in result.items() if name != "guests"}
    return {name.replace("-", "_"): value for name, value in document.items() if name != "pid"}


def _runs(store: JobStore) -> list[Run]:
    try:
        return store.runs()
    except FleeceError:
        return []
