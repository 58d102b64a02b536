"""`fleece job`: the work that the configuration names, run and looked at."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.invocation import Invocation, command
from core.errors import FleeceError, NotFoundError

if TYPE_CHECKING:
    from agent.job_sections import RunnableJob
    from agent.job_store import JobStore, Run
    from core.progress import Progress

JobName = Annotated[str, typer.Argument(metavar="NAME", help="As in [job.NAME] of the configuration.")]


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    group = typer.Typer(no_args_is_help=True, help="Run the jobs of the configuration.", rich_markup_mode=None)
    application.add_typer(group, name="job")
    command(group, "list", repository=False, examples="fleece job list\nfleece job list --output json")(list_jobs)
    command(group, "run", repository=False, examples="fleece job run prune-main")(run)
    command(
        group,
        "history",
        repository=False,
        examples="""
fleece job history                      the last runs of every job
fleece job history prune-main --limit 5
fleece job history --output json | jq '.[] | select(.state != "ok")'
""",
    )(history)
    command(
        group,
        "log",
        repository=False,
        examples="""
fleece job log prune-main               of its last run
fleece job log prune-main:20260102T030405Z-1a2b
""",
    )(show_log)


def _store(name: str) -> "JobStore":
    from agent.job_store import JobStore
    from agent.places import state_dir

    return JobStore(state_dir(), name)


def _section(invocation: Invocation, name: str) -> "RunnableJob":
    """The section of a job.

    Raises:
        NotFoundError: there is none of that name.
    """
    section = invocation.config.job.get(name)
    if section is None:
        known = ", ".join(sorted(invocation.config.job))
        hint = f"known jobs: {known}" if known else "docs/configuration.md says how to write one"
        raise NotFoundError("find the job", repr(name), f"the configuration has no [job.{name}]", hint)
    return section


def list_jobs(invocation: Invocation) -> None:
    """List the jobs of the configuration, when each is due next, and how its last run ended.

    'fleece agent' runs them when they are due; without it a systemd timer or cron calls 'fleece job run NAME'.
    """
    from agent.calendar_times import CalendarTimes
    from agent.documents import table
    from agent.schedules import next_elapse

    found = []
    for name, section in invocation.config.job.items():
        due = None
        try:
            if section.schedule is not None:
                next_elapse(section.schedule)  # systemd's opinion, where it is installed
                due = CalendarTimes.parse(section.schedule).after(time.time())
        except FleeceError as error:
            invocation.warnings.append(f"job {name}: {error}")
        runs = _store(name).runs()
        found.append(
            {
                "job": name,
                "type": section.type,
                "schedule": section.schedule,
                "next": due,
                "repository": section.repository or invocation.config.default_repository,
                "comment": section.comment,
                "runnable": True,
                "last-run": runs[-1].to_json() if runs else None,
            }
        )

    def lines() -> list[str]:
        rows = [
            (
                str(job["job"]), str(job["type"]), str(job["schedule"] or ""), _local(job["next"]),
                _last(job["last-run"]),
                str(job["comment"] or ""),
            )
            for job in found
        ]  # fmt: skip
        header = ("job", "type", "schedule", "next", "last run", "comment")
        return list(table(header, rows)) if rows else ["No jobs."]

    invocation.emit(found, lines)


def _local(ctime: Any) -> str:
    """A time for people, in this host's zone."""
    return "" if ctime is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(float(ctime)))


def _last(run: Any) -> str:
    return f"{run['state']}, {_local(run['start'])}" if isinstance(run, dict) else "never"


def run(invocation: Invocation, name: JobName) -> None:
    """Run a job now, whatever its schedule says, and record it. A job runs once at a time.

    The repository is the job's own, else the configuration's default; FLEECE_REPOSITORY and the like do not count.
    """
    from agent.jobs import run_job

    section = _section(invocation, name)

    async def work(progress: "Progress") -> "Run":
        return await run_job(
            name,
            section,
            invocation.config,
            invocation.registry,
            _store(name),
            progress,
            endpoints=invocation.endpoints,
        )

    done = invocation.run(work, what="run the job", where=name)
    invocation.emit(
        done.to_json(),
        lambda: [f"{done.id}: {done.state}", *_result_lines(done.result or {})],
    )


def _result_lines(result: dict[str, Any]) -> list[str]:
    """The figures of a run for people; what a bucket cost is in its log. Names and errors are anybody's words."""
    from agent.monitoring.templates import one_line

    lines = [f"  {key}: {value}" for key, value in result.items() if key not in ("s3", "guests")]
    for guest in result.get("guests", ()):
        what = guest["error"] or guest["snapshot"]
        said = f"{guest['guest']}: {what} ({guest['state']})" if what else f"{guest['guest']}: {guest['state']}"
        lines.append(f"  {one_line(said, 1000)}")
    return lines


def history(
    invocation: Invocation,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this job.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="So many runs at most, the newest.")] = 20,
) -> None:
    """List the runs of a job, or of all, the newest last. The last 100 of each job are kept."""
    from agent.documents import table
    from agent.job_store import recorded_jobs
    from agent.places import state_dir
    from core.units import format_duration

    recorded = recorded_jobs(state_dir())
    if name is not None and name not in recorded:
        _section(invocation, name)
    names = recorded if name is None else [name] if name in recorded else []
    runs = [run for one in names for run in _store(one).runs()]
    if name is None:  # those of one job are in order, even if the clock was set
        runs.sort(key=lambda run: run.start)
    runs = runs[-limit:]

    def lines() -> list[str]:
        rows = [
            (
                run.id, run.type, run.state, _local(run.start),
                "" if run.end is None else format_duration(run.end - run.start),
                run.error["why"] if run.error else "; ".join(run.warnings[:1]),
            )
            for run in runs
        ]  # fmt: skip
        return list(table(("run", "type", "state", "begun", "took", ""), rows)) if rows else ["No runs."]

    invocation.emit([run.to_json() for run in runs], lines)


def show_log(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="RUN|NAME", help="A run as 'job history' lists it, or a job's last.")],
) -> None:
    """Show the log of a run."""
    from agent.job_sections import check_job_name
    from agent.job_store import split_run

    job, wanted = split_run(name)
    check_job_name(job)
    store = _store(job)
    runs = {run.id: run for run in store.runs()}
    if wanted is None:
        if not runs:
            raise NotFoundError("read the log of", name, "the job has never run", "'fleece job history' lists all runs")
        wanted = next(reversed(runs))
    text = store.read_log(wanted)
    record = runs[wanted].to_json() if wanted in runs else {"run": wanted}
    invocation.emit({**record, "log": text}, lambda: text.rstrip("\n"))
