"""`fleece status`, `fleece metrics`, `fleece notify`: what happens on this host, seen and told."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.invocation import Invocation, command
from core.errors import FleeceError, NotFoundError

if TYPE_CHECKING:
    from agent.monitoring.reporter import Monitoring
    from agent.monitoring.sections import AnyNotify
    from core.progress import Progress


class MessageKind(StrEnum):
    """What a test message pretends to be about."""

    TEST = "test"
    FAILURE = "failure"
    WARNING = "warning"
    SUCCESS = "success"
    RECOVERY = "recovery"


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    command(
        application,
        "status",
        repository=False,
        examples="""
fleece status                           guests, repositories, jobs: as of now
fleece status --refresh                 look at the repositories first
fleece status --html >/tmp/backups.html
fleece status --output json | jq '.guests[] | select(.overdue)'
""",
    )(status)
    metrics = typer.Typer(no_args_is_help=True, help="Figures for Prometheus.", rich_markup_mode=None)
    application.add_typer(metrics, name="metrics")
    command(metrics, "show", repository=False, output=False, examples="fleece metrics show | grep fleece_job_")(show)
    command(
        metrics,
        "refresh",
        repository=False,
        examples="""
fleece metrics refresh                  what the agent does every hour; for timers where there is no agent
""",
    )(refresh)
    notify = typer.Typer(no_args_is_help=True, help="Notifications about jobs.", rich_markup_mode=None)
    application.add_typer(notify, name="notify")
    command(notify, "list", repository=False, examples="fleece notify list --output json")(list_targets)
    command(
        notify,
        "test",
        repository=False,
        examples="""
fleece notify test admins               send a message that says that it is a test
fleece notify test admins --kind failure
fleece notify test chat --dry-run       only show what would be sent
""",
    )(send_test)


def _monitoring(invocation: Invocation, say: Any) -> "Monitoring":
    from agent.monitoring.reporter import Monitoring
    from agent.places import state_dir

    return Monitoring(invocation.config, invocation.registry, state_dir(), say, invocation.endpoints)


def _overview(invocation: Invocation) -> dict[str, Any]:
    from agent.monitoring.overview import overview
    from agent.places import state_dir

    return overview(invocation.config, state_dir())


def status(
    invocation: Invocation,
    refresh: Annotated[bool, typer.Option("--refresh", help="Look at the repositories now.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Print the agent's page.")] = False,
) -> None:
    """Show what is backed up, how old it is, what comes next, and how the repositories are.

    Repositories are not opened: what is shown of them is as of the last look, which 'fleece agent' and jobs take if
    the configuration has [metrics] or [status].
    """
    if refresh:
        _refresh(invocation)
    document = _overview(invocation)
    if html:
        from agent.monitoring.page import render_page

        page = render_page(document)
        invocation.emit(document, lambda: page.rstrip("\n"), cost=False)
        return
    invocation.emit(document, lambda: _status_lines(document), cost=False)


def _status_lines(document: dict[str, Any]) -> list[str]:
    from agent.documents import table
    from agent.monitoring.page import find_problems
    from agent.monitoring.templates import one_line
    from core.units import format_duration, format_size

    def age(seconds: Any) -> str:
        return "" if seconds is None else format_duration(max(0, seconds))

    def size(value: Any) -> str:
        return format_size(value) if isinstance(value, int | float) and value >= 0 else ""

    guests = [
        (
            one_line(str(one["guest"])), str(one["group"]), str(one["state"]), age(one["age-s"]), size(one["size"]),
            size(one["read"]), str(one["repository"] or ""), _local(one["next"]),
        )
        for one in document["guests"]
    ]  # fmt: skip
    heads = ("guest", "group", "state", "age", "size", "read", "repository", "next")
    lines = list(table(heads, guests, right=(3, 4, 5))) if guests else ["No guests."]
    stores = []
    for one in document["stores"]:
        known = one["status"] or {}
        left = size(known.get("avail")) if known.get("total") else ""
        health = one["error"] or ("" if known else "not looked at yet")
        stores.append((str(one["repository"]), size(known.get("used")), left, age(one["age-s"]), one_line(health)))
    if stores:
        lines += ["", *table(("repository", "used", "left", "looked at", ""), stores, right=(1, 2, 3))]
    problems = [f"  {one_line(text, 400)}" for _, text in find_problems(document)]
    return [*lines, "", *(["Needs attention:", *problems] if problems else ["Everything is as it should be."])]


def _local(moment: Any) -> str:
    import time

    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(float(moment)))


def show(invocation: Invocation) -> None:
    """Print the metrics in Prometheus's text format, as the agent serves them and as they are in the textfile."""
    from agent.monitoring.metrics import render

    text = render(_overview(invocation)).decode()
    invocation.emit(None, lambda: text.rstrip("\n"))


def _refresh(invocation: Invocation) -> list[str]:
    async def work(progress: "Progress") -> list[str]:
        problems = await _monitoring(invocation, progress.warn).refresh(always=True)
        for problem in problems:
            progress.warn(problem)
        return problems

    return invocation.run(work, what="look at the repositories")


def refresh(
    invocation: Invocation,
    job: Annotated[str | None, typer.Option("--job", hidden=True)] = None,
    exit_code: Annotated[int, typer.Option("--exit-code", hidden=True)] = 1,
    begun: Annotated[float, typer.Option("--begun", hidden=True)] = 0.0,
) -> None:
    """Look at the repositories, tell of jobs that were killed, send what could not be sent, write the textfile.

    The agent does this by itself.
    """
    if job is not None:  # the agent tells how a job of its own ended
        name = job

        async def tell(progress: "Progress") -> None:
            await _monitoring(invocation, progress.log).job_ended(name, exit_code, begun)

        invocation.run(tell, what="tell of the job", where=name)
        return
    problems = _refresh(invocation)
    invocation.emit({"problems": problems}, lambda: [], cost=False)


def _target(invocation: Invocation, name: str) -> "AnyNotify":
    section = invocation.config.notify.get(name)
    if section is None:
        known = ", ".join(sorted(invocation.config.notify))
        hint = f"known ones: {known}" if known else "docs/monitoring.md says how to write one"
        raise NotFoundError("find the notification", repr(name), f"the configuration has no [notify.{name}]", hint)
    return section


def list_targets(invocation: Invocation) -> None:
    """List the notifications of the configuration, what was sent so far, and what went wrong last."""
    from agent.documents import table
    from agent.monitoring.rules import TargetStates
    from agent.places import state_dir

    sections = invocation.config.notify
    found = [
        {**figures, "on": list(sections[figures["name"]].on), "jobs": list(sections[figures["name"]].jobs)}
        for figures in TargetStates(state_dir()).figures(sections)
    ]

    def lines() -> list[str]:
        rows = [
            (
                one["name"], one["type"], ", ".join(one["on"]), ", ".join(one["jobs"]) or "all", str(one["sent"]),
                str(one["failed"]), str(one["pending"]), _local(one["last-sent"]), one["last-error"] or "",
            )
            for one in found
        ]  # fmt: skip
        heads = ("name", "type", "on", "jobs", "sent", "failed", "waiting", "last sent", "last error")
        return list(table(heads, rows, right=(4, 5, 6))) if rows else ["No notifications."]

    invocation.emit(found, lines)


def send_test(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in [notify.NAME] of the configuration.")],
    kind: Annotated[MessageKind, typer.Option("--kind", help="What the message says.")] = MessageKind.TEST,
    job: Annotated[str, typer.Option("--job", metavar="NAME", help="The job that it names.")] = "test",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent.")] = False,
) -> None:
    """Send a message of a run that never was, whatever the rules of the notification say, and say whether it was taken.

    It is tried once, and counts for nothing.
    """
    from agent.job_sections import check_job_name
    from agent.monitoring.messages import sample

    section = _target(invocation, name)
    message = sample(check_job_name(job), kind.value)
    if dry_run:
        text = _preview(section, message)
        invocation.emit({"name": name, "sent": False, "preview": text}, lambda: text)
        return

    async def work(progress: "Progress") -> None:
        from agent.monitoring.delivery import deliver

        await deliver(section, message, progress.log, hurried=True)

    try:
        invocation.run(work, what="send the notification", where=name)
    except FleeceError as error:
        error.add_note(f"it is of type {section.type}; docs/monitoring.md explains its options")
        raise
    invocation.emit({"name": name, "sent": True, "preview": None}, lambda: f"{name}: sent")


def _preview(section: "AnyNotify", message: Any) -> str:
    """What would be sent, without secrets."""
    import json

    if section.type == "mail":
        from agent.monitoring.mail import compose

        mail = compose(section, message)
        head = "\n".join(f"{key}: {value}" for key, value in mail.items())
        return f"{head}\n\n{mail.get_content().rstrip()}"
    if section.type == "webhook":
        from agent.monitoring.webhook import request_body

        lines = [f"{section.method} {section.url}", *(f"{key}: {value}" for key, value in section.headers.items())]
        return "\n".join([*lines, f"Content-Type: {section.content_type}", "", request_body(section, message).decode()])
    from agent.monitoring.command import environment

    lines = [" ".join(section.command), *(f"{key}={text!r}" for key, text in environment(section, message).items())]
    return "\n".join([*lines, "", json.dumps(message.document, indent=2)])
